"""Paged attention of chunks: several new tokens a sequence, which attend to its context and causally to each other.

FlashAttention-2 (Dao, 2023) over the block-major cache. A tile of queries holds neighbouring tokens of one chunk, each
with all query heads that share a KV head, so that a key is read once for all of them.
"""

import torch
import triton
import triton.language as tl

from kvrelay.engine.batch import Batch
from kvrelay.engine.kernels.gpu.paged import attend_tile, cache_constants, input_precision, write_rows
from kvrelay.engine.kernels.gpu.tiles import chunk_tiles
from kvrelay.engine.kv_cache import KvCache

__all__ = ["chunk_attention"]


@triton.jit
def _first_tile(chunk, query_starts, TOKENS: tl.constexpr):
    """The number of a chunk's first tile. One tile more than the tokens before fill is enough for each chunk."""
    return (tl.load(query_starts + chunk) - tl.load(query_starts)) // TOKENS + chunk


@triton.jit
def _chunk_of(tile, query_starts, num_chunks, TOKENS: tl.constexpr):
    """The last chunk whose first tile is not behind `tile`, by binary search."""
    low, high = 0, num_chunks - 1
    while low < high:
        middle = (low + high + 1) // 2
        if _first_tile(middle, query_starts, TOKENS) <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit(
    do_not_specialize=["table_stride", "num_chunks"],
    do_not_specialize_on_alignment=["block_tables", "query_starts", "context_lengths"],
)
def _attend_kernel(
    query,
    keys,
    values,
    block_tables,
    query_starts,
    context_lengths,
    output,
    scale,
    softcap,
    token_stride,
    head_stride,
    table_stride,
    block_stride,
    num_chunks,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    TILE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid `[kv_head, tile]`, the last tiles first: they attend to most, and short ones fill the end."""
    TOKENS: tl.constexpr = QUERY_TILE // GROUP
    kv_head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    chunk = _chunk_of(tile, query_starts, num_chunks, TOKENS)
    chunk_start = tl.load(query_starts + chunk)
    chunk_length = tl.load(query_starts + chunk + 1) - chunk_start
    first_token = (tile - _first_tile(chunk, query_starts, TOKENS)) * TOKENS  # of the chunk
    if first_token >= chunk_length:
        return
    first_position = tl.load(context_lengths + chunk) - chunk_length + first_token
    end = first_position + tl.minimum(TOKENS, chunk_length - first_token)

    rows, dims = tl.arange(0, QUERY_TILE), tl.arange(0, HEAD_WIDTH)
    tokens = rows // GROUP  # of the tile
    present = (tokens < TOKENS) & (first_token + tokens < chunk_length)
    batch_tokens = (chunk_start + first_token + tokens).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    query_offsets = (batch_tokens * token_stride + heads * head_stride)[:, None] + dims[None, :]
    query_tile = tl.load(query + query_offsets, mask=present[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)

    limits = first_position + tokens + 1
    maximum = tl.full([QUERY_TILE], float("-inf"), dtype=tl.float32)
    total = tl.zeros([QUERY_TILE], dtype=tl.float32)
    attended = tl.zeros([QUERY_TILE, HEAD_WIDTH], dtype=tl.float32)
    seen_by_all = (first_position + 1) // TILE * TILE
    for MASKED in tl.static_range(2):
        for first in range(seen_by_all if MASKED else 0, end if MASKED else seen_by_all, TILE):
            maximum, total, attended = attend_tile(
                maximum,
                total,
                attended,
                query_tile,
                limits,
                keys + kv_head * HEAD_DIM,
                values + kv_head * HEAD_DIM,
                block_tables + chunk.to(tl.int64) * table_stride,
                first,
                end,
                scale,
                softcap,
                block_stride,
                HEAD_DIM,
                HEAD_WIDTH,
                SLOT_STRIDE,
                BLOCK_SIZE,
                TILE,
                SOFTCAP,
                MASKED,
                PRECISION,
            )
    num_heads = tl.num_programs(0) * GROUP
    write_rows(output, attended, total, batch_tokens * num_heads + heads, present, HEAD_DIM, HEAD_WIDTH)


def chunk_attention(
    query: torch.Tensor,
    cache: KvCache,
    layer: int,
    batch: Batch,
    scale: float,
    softcap: float | None,
    output: torch.Tensor,
) -> None:
    """Attends from the tokens of all chunks but the first `batch.num_decodes`; leaves the other rows of `output`.

    Args:
        query: `[T, query_head, D]`; the last dimension is contiguous.
        output: `[T, query_head, D]`, contiguous.
    """
    first = batch.num_decodes
    num_chunks = batch.num_chunks - first
    num_kv_heads = cache.layout.num_kv_heads
    group = query.shape[1] // num_kv_heads
    constants = cache_constants(cache)
    tiles = chunk_tiles(constants["HEAD_WIDTH"], query.dtype)
    query_tile = max(tiles.query, triton.next_power_of_2(group))
    num_tiles = (query.shape[0] - first) // (query_tile // group) + num_chunks
    _attend_kernel[num_kv_heads, num_tiles](
        query,
        cache.keys[layer],
        cache.values[layer],
        batch.block_tables[first:],
        batch.query_starts[first:],
        batch.context_lengths[first:],
        output,
        scale,
        softcap or 1.0,
        query.stride(0),
        query.stride(1),
        batch.block_tables.stride(0),
        cache.block_stride * constants["SLOT_STRIDE"],
        num_chunks,
        GROUP=group,
        QUERY_TILE=query_tile,
        TILE=tiles.context,
        SOFTCAP=softcap is not None,
        PRECISION=input_precision(query.dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **constants,
    )
