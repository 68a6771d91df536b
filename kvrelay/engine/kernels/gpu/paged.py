"""What the attention kernels share: reading keys and values through a block table, and the online softmax."""

import torch
import triton
import triton.language as tl

from kvrelay.engine.kv_cache import KvCache

__all__ = ["attend_tile", "cache_constants", "input_precision", "write_rows"]

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_tile(
    maximum,
    total,
    attended,
    query,
    limits,
    keys,
    values,
    table,
    first,
    end,
    scale,
    softcap,
    block_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attends from all rows of a query tile to the TILE positions from `first` on, by the online softmax.

    Source: Dao, FlashAttention-2 (2023), algorithm 1. Exponents are in base 2, as the hardware computes them.

    Args:
        maximum: `[M]`, float32: the largest score so far, in base 2.
        total: `[M]`, float32: the sum of the weights so far, relative to the maximum.
        attended: `[M, HEAD_WIDTH]`, float32: the sum of the weighted values so far.
        query: `[M, HEAD_WIDTH]`.
        limits: `[M]`: row i attends to positions below `limits[i]`, one of them in the first tile. Used if MASKED.
        keys: the first element of this layer's key of block 0, slot 0, at this KV head.
        values: the same for values.
        table: the first entry of the sequence's block table.
        scale: factor on the scores, positive.
        end: from here on nothing is read, for there the cache may hold anything, NaN too.
        block_stride: elements from one block to the next.
        HEAD_WIDTH: HEAD_DIM up to the next power of two.
        SLOT_STRIDE: elements from one slot to the next.

    Returns:
        The new maximum, total and attended.
    """
    positions = first + tl.arange(0, TILE)
    dims = tl.arange(0, HEAD_WIDTH)
    written = positions < end
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=written, other=0)
    # A pool may have more than 2^31 elements, a block has not.
    slots = blocks.to(tl.int64) * block_stride + positions % BLOCK_SIZE * SLOT_STRIDE  # [TILE]
    readable = written[:, None]
    if HEAD_DIM != HEAD_WIDTH:
        readable = readable & (dims < HEAD_DIM)[None, :]
    offsets = slots[:, None] + dims[None, :]  # [TILE, HEAD_WIDTH]

    key = tl.load(keys + offsets, mask=readable, other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [M, TILE]
    factor = scale * _LOG2_E
    if SOFTCAP:
        scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * factor / softcap)))  # tanh(scores * scale / softcap)
        factor = softcap * _LOG2_E
    if MASKED:
        scores = tl.where(positions[None, :] < limits[:, None], scores, float("-inf"))

    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * factor)
    weights = tl.exp2(scores * factor - new_maximum[:, None])
    decay = tl.exp2(maximum - new_maximum)
    value = tl.load(values + offsets, mask=readable, other=0.0)
    attended = tl.dot(weights.to(value.dtype), value, attended * decay[:, None], input_precision=PRECISION)
    return new_maximum, total * decay + tl.sum(weights, axis=1), attended


@triton.jit
def write_rows(output, attended, total, rows, present, HEAD_DIM: tl.constexpr, HEAD_WIDTH: tl.constexpr):
    """Writes `attended / total`, and zeros where a row attended to nothing.

    Args:
        output: elements; row i begins at `output + rows[i] * HEAD_DIM`.
        attended: `[M, HEAD_WIDTH]`.
        total: `[M]`.
        present: `[M]`: which rows exist.
    """
    dims = tl.arange(0, HEAD_WIDTH)
    normalised = attended / tl.where(total > 0.0, total, 1.0)[:, None]
    writable = present[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(output + rows[:, None] * HEAD_DIM + dims[None, :], normalised, mask=writable)


def cache_constants(cache: KvCache) -> dict[str, int]:
    """The constants by which a kernel finds its way in the cache."""
    layout = cache.layout
    return {
        "HEAD_DIM": layout.head_dim,
        "HEAD_WIDTH": max(16, triton.next_power_of_2(layout.head_dim)),
        "SLOT_STRIDE": layout.num_kv_heads * layout.head_dim,
        "BLOCK_SIZE": layout.block_size,
    }


def input_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies. In float32 without rounding to tf32, so that greedy tokens equal those of others."""
    return "ieee" if dtype == torch.float32 else "tf32"
