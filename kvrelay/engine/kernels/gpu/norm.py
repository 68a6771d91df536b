"""Residual addition and root mean square norm in one pass over the hidden state."""

import torch
import triton
import triton.language as tl

__all__ = ["add_rms_norm"]

_ELEMENTS_PER_WARP = 512  # 16 a thread: two loads of 16 bytes each in bfloat16
_MOST_WARPS = 16


def add_rms_norm(
    hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Adds `delta` to `hidden` in place, then normalises by the root mean square (Zhang and Sennrich, 2019).

    As in torch, the sum is rounded to the hidden state's type first, and the norm is computed from the rounded sum in
    float32 and rounded once.

    Args:
        hidden: `[T, H]`, contiguous.
        delta: `[T, H]`, contiguous; None adds nothing.
        weight: `[H]`.

    Returns:
        The normalised rows `[T, H]`.
    """
    length, width = hidden.shape
    output = torch.empty_like(hidden)
    if length:
        tile = triton.next_power_of_2(width)
        _add_rms_norm[(length,)](
            hidden,
            hidden if delta is None else delta,
            weight,
            output,
            epsilon,
            WIDTH=width,
            TILE=tile,
            ADD=delta is not None,
            num_warps=min(max(tile // _ELEMENTS_PER_WARP, 1), _MOST_WARPS),
        )
    return output


@triton.jit
def _add_rms_norm(hidden, delta, weight, output, epsilon, WIDTH: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, TILE)
    present = columns < WIDTH
    stored = tl.load(hidden + row + columns, mask=present, other=0.0)
    if ADD:
        added = tl.load(delta + row + columns, mask=present, other=0.0)
        stored = (stored.to(tl.float32) + added.to(tl.float32)).to(stored.dtype)
        tl.store(hidden + row + columns, stored, mask=present)
    values = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + epsilon)
    factors = tl.load(weight + columns, mask=present, other=0.0).to(tl.float32)
    tl.store(output + row + columns, values * scale * factors, mask=present)
