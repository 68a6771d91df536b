"""Finds out, before any weight is read, whether transformers' own code for a model can run on paged attention.

The model is built on the meta device, which computes shapes and nothing else, and sees a few tokens with a recorder
in the place of attention.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kvrelay.engine.layers import rope_settings
from kvrelay.engine.models.interface import INTERFACE_NAME, AttentionCall, answer_attention
from kvrelay.errors import ConfigurationError

__all__ = ["ProbedModel", "probe"]

_NUM_TOKENS = 3
# What a model may pass to its attention without meaning anything that paged attention would have to do.
_HARMLESS = {"dropout", "position_ids", "use_cache", "logits_to_keep", "output_router_logits"}
_UNDERSTOOD = {"scaling", "sliding_window", "softcap"}


@dataclass(frozen=True, slots=True)
class ProbedModel:
    """What the calls to attention tell of a model; the fields are those of ModelSpec."""

    architecture: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None


def probe(config: Any, path: Path) -> ProbedModel:
    """Runs a model without weights.

    Args:
        config: of transformers.
        path: of the checkpoint, for the errors.

    Raises:
        ConfigurationError: saying why the model cannot be served.
    """
    architecture = _architecture(config, path)
    calls, num_logits = _record(config, architecture, path)
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    problem = _problem(calls, num_layers)
    if problem is None and num_logits != 1:
        problem = "it computes logits that were not asked for"
    if problem is not None:
        raise ConfigurationError(f"{path}: {architecture} is not supported: {problem}")
    _, num_kv_heads, _, head_dim = calls[0].key.shape
    windows = [call.options["sliding_window"] for call in calls if call.options.get("sliding_window")]
    return ProbedModel(architecture, num_layers, num_kv_heads, head_dim, min(windows, default=None))


def _architecture(config: Any, path: Path) -> str:
    if config.is_encoder_decoder:
        raise ConfigurationError(f"{path}: {config.model_type} has an encoder; only decoder-only models are supported")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    own_name = getattr(model_class, "__name__", config.model_type)
    architecture = str((config.architectures or [own_name])[0])
    if model_class is None or architecture != own_name:
        raise ConfigurationError(f"{path}: {architecture} is not a decoder-only language model")
    problem = None
    if model_class._is_stateful:
        problem = "some layers keep a state instead of a KV cache"
    elif not model_class._supports_attention_backend:
        problem = "transformers does not let its attention be replaced"
    if problem is not None:
        raise ConfigurationError(f"{path}: {architecture} is not supported: {problem}")
    return architecture


def _record(config: Any, architecture: str, path: Path) -> tuple[list[AttentionCall], int]:
    """The calls to attention in their order, and how many rows of logits came of one that was asked for."""
    build: Any = AutoModelForCausalLM.from_config
    config = copy.deepcopy(config)
    for rope in rope_settings(config.get_text_config(decoder=True)):
        rope["rope_type"] = "default"  # scalings may look at the positions, which have no values on the meta device
    calls: list[AttentionCall] = []

    def record(call: AttentionCall) -> torch.Tensor:
        calls.append(call)
        return call.value.new_empty(1, call.query.shape[2], call.query.shape[1], call.value.shape[3])

    try:
        with torch.device("meta"), torch.inference_mode(), answer_attention(record):
            # This implementation of experts has no shape that depends on what the router chose.
            model = build(config, attn_implementation=INTERFACE_NAME, experts_implementation="batched_mm")
            tokens = torch.zeros(1, _NUM_TOKENS, dtype=torch.int64)
            rows = torch.zeros(1, dtype=torch.int64)
            output = model.eval()(input_ids=tokens, position_ids=tokens, use_cache=False, logits_to_keep=rows)
    except Exception as error:  # whatever a model's code may raise, it cannot run
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ConfigurationError(f"{path}: {architecture} cannot run with paged attention ({reason})") from error
    return calls, output.logits.shape[1]


def _problem(calls: Sequence[AttentionCall], num_layers: int) -> str | None:
    if [call.layer for call in calls] != list(range(num_layers)):
        return f"{len(calls)} calls to attention in {num_layers} layers; each layer must attend exactly once"
    shape = calls[0].key.shape
    for call in calls:
        if not call.causal:
            return f"layer {call.layer} attends to later tokens"
        if call.mask is not None:
            return f"layer {call.layer} makes an attention mask of its own"
        if call.key.shape != shape or call.value.shape != shape:
            return f"keys and values do not have the same heads, or layer {call.layer} has others than the first"
        if call.query.shape[2:] != shape[2:]:
            return f"layer {call.layer} attends to other tokens than the step has"
        unknown = sorted(set(call.options) - _UNDERSTOOD - _HARMLESS)
        if unknown:
            return f"layer {call.layer} asks attention for {', '.join(unknown)}"
    return None
