"""8-bit weights in models that run by transformers' own modeling code."""

import logging
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from kvrelay.engine.linear import Linear, make_linear

__all__ = ["quantize_modules"]

log = logging.getLogger(__name__)


class _Product(torch.nn.Module):
    """Takes the place of a linear module; it has no `weight`, so who reaches for that fails and is not misled."""

    def __init__(self, linear: Linear, out_features: int) -> None:
        super().__init__()
        self._linear = linear
        self._out_features = out_features

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output = self._linear(hidden.reshape(-1, hidden.shape[-1]))
        return output.view(*hidden.shape[:-1], self._out_features)


def quantize_modules(model: Any) -> int:
    """Puts 8-bit products in the place of all linear modules, the head's included.

    What is no plain linear module stays float: embeddings (also where the head shares their weight), norms, routers,
    and experts whose weights are parameters of one module for all of them.

    Returns:
        The number of weights that are now in 8 bits.
    """
    quantized = 0
    total = sum(parameter.numel() for parameter in model.parameters())
    for name, module in list(model.named_modules()):
        weight = _weight(module)
        if weight is not None:
            parent, _, child = name.rpartition(".")
            product = _Product(make_linear(weight, module.bias, "int8"), len(weight))
            setattr(model.get_submodule(parent), child, product)
            quantized += weight.numel()
    kept = sum(parameter.numel() for parameter in model.parameters())
    log.info(
        "int8: %d million weights are quantised, %d of %d million stay float",
        quantized // 10**6,
        kept // 10**6,
        total // 10**6,
    )
    return quantized


def _weight(module: Any) -> torch.Tensor | None:
    """`[out, in]`; None if the module is another than those that are known. Subclasses may compute something else."""
    if type(module) is torch.nn.Linear:
        return module.weight
    if type(module) is Conv1D:  # GPT-2's, which is a linear module with a transposed weight
        return module.weight.t()
    return None
