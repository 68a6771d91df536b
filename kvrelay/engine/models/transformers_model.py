"""Any decoder-only model with full attention, by transformers' own modeling code on our paged attention."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, logging

from kvrelay.engine.attention import PagedAttention
from kvrelay.engine.models.interface import INTERFACE_NAME, AttentionCall, answer_attention
from kvrelay.engine.models.spec import ModelSpec
from kvrelay.errors import ConfigurationError

__all__ = ["TransformersModel"]

_TOLERANCE = 0.05  # of the largest logit; far above rounding, far below what one token does to another


class TransformersModel:
    """Implements `kvrelay.engine.models.spec.Model`. All chunks of a step go in as one row of tokens."""

    def __init__(
        self,
        config: Any,
        path: Path,
        spec: ModelSpec,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str = "none",
    ) -> None:
        """Reads the weights.

        Raises:
            ConfigurationError: the checkpoint does not fit its configuration.
        """
        self._dtype = dtype
        self._model = _load(config, path, dtype).to(device)
        if quantization == "int8":
            _quantize(self._model, spec, path)
        try:
            self._check_independence(spec, path, device)
        except AttributeError as error:
            if quantization == "none":
                raise
            raise ConfigurationError(
                f"quantization int8: {spec.architecture} reads weights past its linear modules ({error})"
            ) from error

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, attention: PagedAttention
    ) -> torch.Tensor:
        def attend(call: AttentionCall) -> torch.Tensor:
            heads = (call.query, call.key, call.value)
            query, key, value = (states[0].transpose(0, 1).to(self._dtype) for states in heads)
            scale = call.options.get("scaling", query.shape[-1] ** -0.5)
            attended = attention.attend(call.layer, query, key, value, scale, call.options.get("softcap"))
            return attended[None].to(call.query.dtype)

        with answer_attention(attend):
            return self._logits(token_ids, positions, rows)

    def _logits(self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=token_ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows
        )
        logits: torch.Tensor = output.logits[0]
        return logits.float()

    def _check_independence(self, spec: ModelSpec, path: Path, device: torch.device) -> None:
        """Tokens of several sequences are neighbours in a batch, so they may meet nowhere but in attention.

        With an attention that looks at no other token, a token's logits must depend on itself and its position alone:
        not on its place, nor on its neighbours. A convolution, or positions counted by the model, would show here.
        """

        def attend(call: AttentionCall) -> torch.Tensor:
            group = call.query.shape[1] // call.key.shape[1]
            mixed = (call.key + call.value).repeat_interleave(group, dim=1) + call.query
            return (mixed / call.query.shape[-1]).transpose(1, 2)

        token = spec.vocab_size // 2
        last, first = torch.tensor([[1, 2, token], [token, 3, 4]], device=device)
        with torch.inference_mode(), answer_attention(attend):
            one = self._logits(last, torch.tensor([0, 1, 2], device=device), torch.tensor([2], device=device))
            other = self._logits(first, torch.tensor([2, 7, 5], device=device), torch.tensor([0], device=device))
        if not (one - other).abs().max() <= _TOLERANCE * one.abs().max():
            raise ConfigurationError(
                f"{path}: {spec.architecture} is not supported: its tokens act on each other outside of attention"
            )


def _quantize(model: Any, spec: ModelSpec, path: Path) -> None:
    from kvrelay.engine.models.int8_modules import quantize_modules

    if not quantize_modules(model):
        raise ConfigurationError(f"quantization int8: {path}: {spec.architecture} has no linear modules to quantise")


def _load(config: Any, path: Path, dtype: torch.dtype) -> Any:
    disable_progress_bar: Any = logging.disable_progress_bar
    disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            attn_implementation=INTERFACE_NAME,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{path}: the weights cannot be loaded: {error}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigurationError(f"{path}: tensor {missing[0]} is missing, and {len(missing) - 1} more")
    return model.eval().requires_grad_(False)
