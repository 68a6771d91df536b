"""Matrix products with weights, in the form that is fastest on a device."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from kvrelay.engine.linear_int8 import Int8Linear, quantize_weight

__all__ = ["Linear", "PackedLinear", "PlainLinear", "empty_rows", "make_linear"]

_PACK_ROWS = 64  # Weights packed for so many rows are as good for fewer and for more; measured from 1 to 512.


class Linear(Protocol):
    """`x @ weight.T + bias`."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[T, in]` to `[T, out]`."""


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """The product as torch does it; weight `[out, in]`, bias `[out]`."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, self.weight, self.bias)


def padded_rows(num_rows: int) -> int:
    """As many rows or a few more, so that few different numbers of rows occur."""
    step = 1 if num_rows <= 8 else 8 if num_rows <= 64 else 16 if num_rows <= 256 else 32
    return -(-num_rows // step) * step


def empty_rows(num_rows: int, width: int) -> torch.Tensor:
    """`[num_rows, width]`, float32, with memory behind it for the rows that `PackedLinear` adds."""
    return torch.empty(padded_rows(num_rows), width)[:num_rows]


class PackedLinear:
    """The product by oneDNN in float32, on a weight that was put into oneDNN's own order once.

    On two cores and shapes of a small model 1.4 to 3 times as fast as the plain product, most with few rows.

    oneDNN compiles a kernel, of half a megabyte, for every number of rows, so rows are added up to one of a few
    numbers. What is in the added rows does not matter: a row of the product depends on its own row only.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
        self._bias = bias

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        """Whether the weight can be packed here."""
        return weight.device.type == "cpu" and weight.dtype == torch.float32 and bool(torch._C._has_mkldnn)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        num_rows = hidden.shape[0]
        padded = _with_added_rows(hidden, padded_rows(num_rows))
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(padded, self._weight, self._bias, "none", [], "")
        return product[:num_rows]


def _with_added_rows(hidden: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`hidden` with the memory behind it as further rows; a copy where there is none."""
    if num_rows == hidden.shape[0]:
        return hidden
    width = hidden.shape[1]
    end = (hidden.storage_offset() + num_rows * width) * hidden.element_size()
    if hidden.is_contiguous() and end <= hidden.untyped_storage().nbytes():
        return hidden.as_strided((num_rows, width), (width, 1))
    return functional.pad(hidden, (0, 0, 0, num_rows - hidden.shape[0]))


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None, quantization: str = "none") -> Linear:
    """The fastest form of a product for the device and the type of its weight `[out, in]`.

    Args:
        quantization: "none", or "int8" on a CPU and in float32. Without the compiled kernels int8 gives the same but
            for rounding, from weights that are float again; it then saves neither time nor memory.
    """
    if quantization == "int8":
        product = Int8Linear.quantize(weight, bias)
        if product is not None:
            return product
        weight = quantize_weight(weight).dequantized()
    return PackedLinear(weight, bias) if PackedLinear.fits(weight) else PlainLinear(weight, bias)
