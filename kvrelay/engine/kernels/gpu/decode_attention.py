"""Paged attention of one new token a sequence: Flash-Decoding over the block-major cache.

One program attends with all query heads that share a KV head, so that a key is read once, to one piece of the context.
A second kernel joins the pieces. The grid depends on the number of rows and on an upper bound of the contexts, never
on the contexts themselves, so that a CUDA graph can replay it.
"""

from functools import cache as memoize

import torch
import triton
import triton.language as tl

from kvrelay.engine.batch import Batch
from kvrelay.engine.kernels.gpu.paged import attend_tile, cache_constants, input_precision, write_rows
from kvrelay.engine.kernels.gpu.tiles import Tiles, decode_tiles
from kvrelay.engine.kv_cache import KvCache

__all__ = ["decode_attention"]

_MAX_SPLITS = 64
_LONG_CONTEXT = 4096
_MULTIPROCESSORS = 132  # of a Hopper GPU, where there is no device to ask


@triton.jit
def _piece_length(context, num_splits, TILE: tl.constexpr):
    """Positions in each piece but the last: whole tiles. Pieces that begin behind the context are empty."""
    return tl.maximum(tl.cdiv(tl.cdiv(context, num_splits), TILE), 1) * TILE


@triton.jit(
    do_not_specialize=["table_stride", "num_splits"],
    do_not_specialize_on_alignment=["block_tables", "context_lengths"],
)
def _attend_kernel(
    query,
    keys,
    values,
    block_tables,
    context_lengths,
    output,
    log_totals,
    scale,
    softcap,
    token_stride,
    head_stride,
    table_stride,
    block_stride,
    num_splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    TILE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid `[kv_head, split, row]`: programs that read the same slots are neighbours.

    Args:
        output: `[row, query_head, split, HEAD_DIM]`, each piece normalised by itself.
        log_totals: `[row, query_head, split]`, in base 2: the weight of each piece. Used if PARTIAL.
    """
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    context = tl.load(context_lengths + row)
    piece = _piece_length(context, num_splits, TILE)
    start = split * piece
    if (split > 0) & (start >= context):
        return
    end = tl.minimum(start + piece, context)

    members, dims = tl.arange(0, QUERY_TILE), tl.arange(0, HEAD_WIDTH)
    present = members < GROUP
    heads = kv_head * GROUP + members
    query_offsets = row * token_stride + heads[:, None] * head_stride + dims[None, :]
    readable = present[:, None] & (dims < HEAD_DIM)[None, :]
    query_tile = tl.load(query + query_offsets, mask=readable, other=0.0)

    limits = tl.zeros([QUERY_TILE], dtype=tl.int32) + end
    maximum = tl.full([QUERY_TILE], float("-inf"), dtype=tl.float32)
    total = tl.zeros([QUERY_TILE], dtype=tl.float32)
    attended = tl.zeros([QUERY_TILE, HEAD_WIDTH], dtype=tl.float32)
    for first in range(start, end, TILE):
        maximum, total, attended = attend_tile(
            maximum,
            total,
            attended,
            query_tile,
            limits,
            keys + kv_head * HEAD_DIM,
            values + kv_head * HEAD_DIM,
            block_tables + row * table_stride,
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
            True,
            PRECISION,
        )

    num_heads = tl.num_programs(0) * GROUP
    rows = (row * num_heads + heads) * num_splits + split
    write_rows(output, attended, total, rows, present, HEAD_DIM, HEAD_WIDTH)
    if PARTIAL:
        tl.store(log_totals + rows, maximum + tl.log2(total), mask=present)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["context_lengths"])
def _join_kernel(
    pieces,
    log_totals,
    context_lengths,
    output,
    num_splits,
    HEAD_DIM: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Grid `[query_head, row]`. Averages the pieces, each by its share of the softmax's total; reads used ones only.

    Args:
        pieces: `[row, query_head, split, HEAD_DIM]`.
        log_totals: `[row, query_head, split]`.
        output: `[row, query_head, HEAD_DIM]`.
    """
    row = tl.program_id(1).to(tl.int64)
    index = row * tl.num_programs(0) + tl.program_id(0)
    context = tl.load(context_lengths + row)
    splits, dims = tl.arange(0, MAX_SPLITS), tl.arange(0, HEAD_WIDTH)
    used = splits < tl.cdiv(context, _piece_length(context, num_splits, TILE))
    present = dims < HEAD_DIM

    rows = index * num_splits + splits
    logs = tl.load(log_totals + rows, mask=used, other=float("-inf"))
    weights = tl.where(used, tl.exp2(logs - tl.max(logs, axis=0)), 0.0)
    readable = used[:, None] & present[None, :]
    tiles = tl.load(pieces + rows[:, None] * HEAD_DIM + dims[None, :], mask=readable, other=0.0)
    total = tl.sum(weights, axis=0)
    joined = tl.sum(tiles * weights[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(output + index * HEAD_DIM + dims, joined, mask=present)


def decode_attention(
    query: torch.Tensor,
    cache: KvCache,
    layer: int,
    batch: Batch,
    scale: float,
    softcap: float | None,
    output: torch.Tensor,
) -> None:
    """Attends from the first `batch.num_decodes` tokens, one of each sequence; leaves the other rows of `output`.

    A row whose context length is 0, which fills a CUDA graph's batch, reads nothing of the cache and becomes zero. The
    pieces come from PyTorch's allocator, so under capture from the graph's own pool.

    Args:
        query: `[T, query_head, D]`; the last dimension is contiguous.
        batch: `max_context_length` bounds all contexts to come where the launch is captured in a graph.
        output: `[T, query_head, D]`, contiguous.
    """
    rows, num_heads, head_dim = batch.num_decodes, query.shape[1], query.shape[2]
    constants = cache_constants(cache)
    tiles = decode_tiles(constants["HEAD_WIDTH"], query.dtype)
    num_kv_heads = cache.layout.num_kv_heads
    splits = _num_splits(rows * num_kv_heads, batch.max_context_length, tiles.context, query.device)
    pieces, log_totals = output, output
    if splits > 1:
        pieces = torch.empty(rows, num_heads, splits, head_dim, dtype=torch.float32, device=query.device)
        log_totals = torch.empty(rows, num_heads, splits, dtype=torch.float32, device=query.device)
    _launch(query, cache, layer, batch, scale, softcap, pieces, log_totals, splits, tiles)
    if splits > 1:
        _join_kernel[num_heads, rows](
            pieces,
            log_totals,
            batch.context_lengths,
            output,
            splits,
            HEAD_DIM=head_dim,
            HEAD_WIDTH=constants["HEAD_WIDTH"],
            TILE=tiles.context,
            MAX_SPLITS=_MAX_SPLITS,
            num_warps=max(1, constants["HEAD_WIDTH"] // 32),
        )


def _launch(
    query: torch.Tensor,
    cache: KvCache,
    layer: int,
    batch: Batch,
    scale: float,
    softcap: float | None,
    pieces: torch.Tensor,
    log_totals: torch.Tensor,
    splits: int,
    tiles: Tiles,
) -> None:
    num_kv_heads = cache.layout.num_kv_heads
    group = query.shape[1] // num_kv_heads
    constants = cache_constants(cache)
    _attend_kernel[num_kv_heads, splits, batch.num_decodes](
        query,
        cache.keys[layer],
        cache.values[layer],
        batch.block_tables,
        batch.context_lengths,
        pieces,
        log_totals,
        scale,
        softcap or 1.0,
        query.stride(0),
        query.stride(1),
        batch.block_tables.stride(0),
        cache.block_stride * constants["SLOT_STRIDE"],
        splits,
        GROUP=group,
        QUERY_TILE=max(tiles.query, triton.next_power_of_2(group)),
        TILE=tiles.context,
        SOFTCAP=softcap is not None,
        PARTIAL=splits > 1,
        PRECISION=input_precision(query.dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **constants,
    )


def _num_splits(programs: int, max_context_length: int, tile: int, device: torch.device) -> int:
    """How many pieces each context is cut into.

    Two programs a multiprocessor keep the memory busy. Four, where contexts may be long: then they differ more, and
    short programs level that out. A piece is worth its overhead from two tiles on.

    Args:
        programs: rows times KV heads.
    """
    programs_each = 2 if max_context_length < _LONG_CONTEXT else 4
    wanted = round(programs_each * _num_multiprocessors(device) / programs)
    return max(1, min(wanted, max_context_length // (2 * tile), _MAX_SPLITS))


@memoize
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
