"""The gated activation between the two matrix products of an MLP."""

import torch
import triton
import triton.language as tl

__all__ = ["gated_silu"]

_LARGEST_TILE = 1024
_WARPS = 4  # 8 elements a thread: one load of 16 bytes each in bfloat16


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` `[T, I]` of `gate_up` `[T, 2 * I]`, contiguous; in float32, rounded once."""
    length, width = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(length, width)
    if length:
        tile = min(triton.next_power_of_2(width), _LARGEST_TILE)
        grid = (length, triton.cdiv(width, tile))
        _gated_silu[grid](gate_up, output, WIDTH=width, TILE=tile, num_warps=_WARPS)
    return output


@triton.jit
def _gated_silu(gate_up, output, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """One program a tile of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    present = columns < WIDTH
    gate_row = gate_up + row * (2 * WIDTH)
    gate = tl.load(gate_row + columns, mask=present, other=0.0).to(tl.float32)
    up = tl.load(gate_row + WIDTH + columns, mask=present, other=0.0).to(tl.float32)
    tl.store(output + row * WIDTH + columns, gate * tl.sigmoid(gate) * up, mask=present)
