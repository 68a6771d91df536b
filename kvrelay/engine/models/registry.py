"""From a checkpoint folder to a model: first judged by its configuration, then loaded."""

from pathlib import Path
from typing import Any

import torch

from kvrelay.engine.layers import rope_settings
from kvrelay.engine.models.llama import FUSED_ARCHITECTURES, LlamaModel, LlamaShape
from kvrelay.engine.models.spec import Model, ModelSpec
from kvrelay.engine.weights import CheckpointReader
from kvrelay.errors import ConfigurationError

__all__ = ["inspect_model", "load_model"]

_WINDOW_ATTRIBUTES = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
_KNOWN_LAYER_TYPES = {"full_attention", *_WINDOW_ATTRIBUTES}
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def inspect_model(path: Path) -> ModelSpec:
    """Judges a checkpoint without reading its weights.

    Raises:
        ConfigurationError: saying why the model cannot be served.
    """
    config = _load_config(path)
    if getattr(config, "quantization_config", None):
        raise ConfigurationError(f"{path}: quantized weights are not supported")
    text_config = config.get_text_config(decoder=True)
    _check_layer_types(path, text_config)
    shape = _fused_shape(config)
    if shape is not None:
        architecture, window = config.architectures[0], None
        num_layers, num_kv_heads, head_dim = shape.num_layers, shape.num_kv_heads, shape.head_dim
    else:
        from kvrelay.engine.models.probe import probe

        found = probe(config, path)
        architecture, window = found.architecture, found.sliding_window
        num_layers, num_kv_heads, head_dim = found.num_layers, found.num_kv_heads, found.head_dim
    window = min((size for size in (window, _configured_window(path, text_config)) if size), default=None)
    context_length, context_limit = _context_length(path, text_config, window)
    return ModelSpec(
        architecture=architecture,
        vocab_size=text_config.vocab_size,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        context_length=context_length,
        context_limit=context_limit,
        sliding_window=window,
        dtype=_DTYPES.get(config.dtype or text_config.dtype, "float32"),
    )


def load_model(
    path: Path, spec: ModelSpec, device: torch.device, dtype: torch.dtype, quantization: str = "none"
) -> Model:
    """Reads the weights of a checkpoint that `inspect_model` has judged.

    Args:
        quantization: "none", or "int8" on a CPU and in float32.

    Raises:
        ConfigurationError: the weights do not fit the configuration.
    """
    config = _load_config(path)
    shape = _fused_shape(config)
    if shape is not None:
        return LlamaModel(shape, config, CheckpointReader(path, device, dtype), device, quantization)
    from kvrelay.engine.models.transformers_model import TransformersModel

    return TransformersModel(config, path, spec, device, dtype, quantization)


def _load_config(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises all kinds of errors on a configuration that is wrong
        reason = str(error).strip().split("\n")[0]
        raise ConfigurationError(f"{path}/config.json: transformers cannot read it: {reason}") from error


def _fused_shape(config: Any) -> LlamaShape | None:
    architectures = config.architectures or [""]
    if architectures[0] not in FUSED_ARCHITECTURES:
        return None
    return LlamaShape.from_config(config, architectures[0])


def _check_layer_types(path: Path, config: Any) -> None:
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES)
    if unknown:
        raise ConfigurationError(f"{path}: layers of type {', '.join(unknown)} are not supported")


def _configured_window(path: Path, config: Any) -> int | None:
    """The narrowest window that the configuration names for any layer."""
    layer_types = getattr(config, "layer_types", None)
    windows = []
    if layer_types is None and getattr(config, "use_sliding_window", True):
        windows.append(getattr(config, "sliding_window", None))
    for layer_type, attribute in _WINDOW_ATTRIBUTES.items():
        if layer_type in (layer_types or ()):
            windows.append(getattr(config, attribute, None))
            if not windows[-1]:
                raise ConfigurationError(f"{path}/config.json: layers of {layer_type}, but no {attribute}")
    return min((window for window in windows if window), default=None)


def _context_length(path: Path, config: Any, window: int | None) -> tuple[int, str]:
    """Tokens that a sequence may have, and a sentence that says why not more."""
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        raise ConfigurationError(f"{path}/config.json: max_position_embeddings is missing")
    limits = [(positions, f"the model has positions for {positions} tokens (max_position_embeddings)")]
    if window:
        limits.append(
            (window, f"some layers attend to {window} tokens only, and contexts beyond such a window are not supported")
        )
    original = _longrope_limit(config)
    if original:
        limits.append((original, f"longrope changes its frequencies beyond {original} tokens, which is not supported"))
    return min(limits)


def _longrope_limit(config: Any) -> int | None:
    """Where longrope changes to other frequencies, at which a KV cache computed before would no longer fit."""
    longropes = [rope for rope in rope_settings(config) if rope.get("rope_type") == "longrope"]
    return min((rope["original_max_position_embeddings"] for rope in longropes), default=None)
