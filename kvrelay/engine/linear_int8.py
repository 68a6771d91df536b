"""Matrix products with 8-bit weights on the CPU, by the kernel in C++."""

import ctypes
from dataclasses import dataclass

import torch

from kvrelay.engine.kernels.native.library import load_library

__all__ = ["Int8Linear", "QuantizedWeight", "quantize_weight"]

_LARGEST = 127  # of a weight
_LARGEST_INPUT = 2**15 - 1
_LARGEST_SUM = 2**31 - 1
_PANEL_CHANNELS = 16  # kPanelChannels in int8.cpp


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """`values[o, i] * scales[o]` is nearly the weight; values `[out, in]` int8 in -127..127, scales `[out]` float32."""

    values: torch.Tensor
    scales: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """`[out, in]`, float32."""
        return self.values.float() * self.scales[:, None]


def quantize_weight(weight: torch.Tensor) -> QuantizedWeight:
    """Rounds each output channel to the nearest of 255 evenly spaced values, symmetric and up to its largest weight.

    Narrower scales that clip the largest weights for less squared error brought nothing that could be measured.

    Args:
        weight: `[out, in]`.
    """
    weight = weight.float()
    scales = weight.abs().amax(dim=1) / _LARGEST if weight.shape[1] else weight.new_zeros(len(weight))
    steps = torch.where(scales > 0, scales, 1)[:, None]
    return QuantizedWeight((weight / steps).round().to(torch.int8), scales)


class Int8Linear:
    """`x @ weight.T + bias` in float32, with the weight in 8 bits and each row of x rounded to 16 bits meanwhile.

    Sums are exact, so a row's result depends neither on the other rows nor on the machine, to the last bit.
    """

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None, library: ctypes.CDLL) -> None:
        """Puts the weight into the kernel's order.

        Args:
            bias: `[out]`, float32.
            library: of `load_library`.
        """
        self._library = library
        self._out_size, self._in_size = weight.values.shape
        self._panels = _panels(weight.values)
        self._scales = _padded(weight.scales, _PANEL_CHANNELS)
        self._bias = torch.zeros_like(self._scales) if bias is None else _padded(bias.float(), _PANEL_CHANNELS)
        self._limit = _input_limit(weight.values)

    @classmethod
    def quantize(cls, weight: torch.Tensor, bias: torch.Tensor | None = None) -> "Int8Linear | None":
        """The product with a float weight `[out, in]` made 8 bits; None if this machine has no compiled kernels."""
        library = load_library()
        return None if library is None else cls(quantize_weight(weight), bias, library)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, self._in_size).contiguous()
        output = rows.new_empty(len(rows), self._out_size)
        self._library.kvrelay_int8_linear(
            rows.data_ptr(),
            self._panels.data_ptr(),
            self._scales.data_ptr(),
            self._bias.data_ptr(),
            output.data_ptr(),
            len(rows),
            self._in_size,
            self._out_size,
            self._limit,
            torch.get_num_threads(),
        )
        return output.view(*hidden.shape[:-1], self._out_size)


def _padded(values: torch.Tensor, multiple: int) -> torch.Tensor:
    padding = -values.shape[0] % multiple
    return torch.cat([values, values.new_zeros(padding, *values.shape[1:])]).contiguous()


def _panels(values: torch.Tensor) -> torch.Tensor:
    """`[panel, input pair, channel, 2]`, both dimensions padded with zeros."""
    padded = _padded(_padded(values, _PANEL_CHANNELS).t(), 2)  # [in, out]
    num_inputs, num_channels = padded.shape
    pairs = padded.view(num_inputs // 2, 2, num_channels // _PANEL_CHANNELS, _PANEL_CHANNELS)
    return pairs.permute(2, 0, 3, 1).contiguous()


def _input_limit(values: torch.Tensor) -> int:
    """How large the integers of a row may be for no channel's sum to exceed 32 bits."""
    largest_sum = int(values.abs().sum(dim=1, dtype=torch.int64).max()) if values.numel() else 0
    return min(_LARGEST_INPUT, _LARGEST_SUM // max(largest_sum, 1))
