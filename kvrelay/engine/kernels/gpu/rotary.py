"""What happens between the projection of queries, keys and values and attention, in one kernel."""

import torch
import triton
import triton.language as tl

from kvrelay.engine.batch import Batch
from kvrelay.engine.kernels.interface import HeadNorms, Rotation
from kvrelay.engine.kv_cache import KvCache

__all__ = ["rotate_and_store", "store"]

_ELEMENTS = 2048  # of a program, about; 16 a thread
_WARPS = 4


def rotate_and_store(
    heads: torch.Tensor,
    rotation: Rotation,
    norms: HeadNorms | None,
    cache: KvCache,
    layer: int,
    batch: Batch,
) -> torch.Tensor:
    """Normalises (if `norms`) and rotates queries and keys (Su et al., 2021); writes keys and values to the cache.

    All is computed in float32 and rounded once, at the end. A token whose entry in `batch.rows` is negative is padding:
    nothing of it goes to the cache.

    Args:
        heads: `[T, query_head + 2 * kv_head, D]`, contiguous: queries, keys, values.

    Returns:
        The rotated queries `[T, query_head, D]`, contiguous.
    """
    length, num_heads, head_dim = heads.shape
    num_kv_heads = cache.layout.num_kv_heads
    num_query_heads = num_heads - 2 * num_kv_heads
    query = heads.new_empty(length, num_query_heads, head_dim)
    if length:
        half_width = triton.next_power_of_2(head_dim // 2)
        tile = min(triton.next_power_of_2(num_heads), max(_ELEMENTS // (2 * half_width), 1))
        _rotate_and_store[(length, triton.cdiv(num_heads, tile))](
            heads,
            rotation.cosines,
            rotation.sines,
            heads if norms is None else norms.query,
            heads if norms is None else norms.key,
            0.0 if norms is None else norms.epsilon,
            query,
            cache.keys[layer],
            cache.values[layer],
            batch.rows,
            QUERY_HEADS=num_query_heads,
            KV_HEADS=num_kv_heads,
            HALF=head_dim // 2,
            HALF_WIDTH=half_width,
            TILE=tile,
            NORMS=norms is not None,
            num_warps=_WARPS,
        )
    return query


def store(key: torch.Tensor, value: torch.Tensor, cache: KvCache, layer: int, batch: Batch) -> None:
    """Writes keys and values `[T, kv_head, D]`, with any strides, into the cache, except those of padding."""
    length, num_kv_heads, head_dim = key.shape
    if not length:
        return
    dim_width = triton.next_power_of_2(head_dim)
    tile = min(triton.next_power_of_2(num_kv_heads), max(_ELEMENTS // (2 * dim_width), 1))
    _store[(length, triton.cdiv(num_kv_heads, tile))](
        key,
        value,
        *key.stride(),
        *value.stride(),
        cache.keys[layer],
        cache.values[layer],
        batch.rows,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        DIM_WIDTH=dim_width,
        TILE=tile,
        num_warps=_WARPS,
    )


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _rotate_and_store(
    heads,
    cosines,
    sines,
    query_norm,
    key_norm,
    epsilon,
    query,
    keys,
    values,
    rows,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    NORMS: tl.constexpr,
):
    """One program TILE heads of a token, each as its first and its second half `[TILE, HALF_WIDTH]`."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, HALF_WIDTH)
    inside = dims < HALF
    is_query = head < QUERY_HEADS
    present = (head < QUERY_HEADS + 2 * KV_HEADS)[:, None] & inside[None, :]
    offsets = head[:, None] * (2 * HALF) + dims[None, :]
    source = heads + token * ((QUERY_HEADS + 2 * KV_HEADS) * 2 * HALF)
    first = tl.load(source + offsets, mask=present, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + offsets, mask=present, other=0.0).to(tl.float32)

    cosine = tl.load(cosines + token * HALF + dims, mask=inside, other=0.0)[None, :]
    sine = tl.load(sines + token * HALF + dims, mask=inside, other=0.0)[None, :]
    normed = first
    normed_second = second
    if NORMS:
        scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / (2 * HALF) + epsilon)[:, None]
        normed = first * scale * _factors(query_norm, key_norm, is_query, dims, inside)
        normed_second = second * scale * _factors(query_norm + HALF, key_norm + HALF, is_query, dims, inside)
    rotated = normed * cosine - normed_second * sine
    rotated_second = normed_second * cosine + normed * sine

    of_query = present & is_query[:, None]
    target = query + token * (QUERY_HEADS * 2 * HALF) + offsets
    tl.store(target, rotated, mask=of_query)
    tl.store(target + HALF, rotated_second, mask=of_query)

    row = tl.load(rows + token)
    if row >= 0:
        of_key = present & ((head >= QUERY_HEADS) & (head < QUERY_HEADS + KV_HEADS))[:, None]
        target = keys + row * (KV_HEADS * 2 * HALF) - QUERY_HEADS * 2 * HALF + offsets
        tl.store(target, rotated, mask=of_key)
        tl.store(target + HALF, rotated_second, mask=of_key)

        of_value = present & (head >= QUERY_HEADS + KV_HEADS)[:, None]
        target = values + row * (KV_HEADS * 2 * HALF) - (QUERY_HEADS + KV_HEADS) * 2 * HALF + offsets
        tl.store(target, first, mask=of_value)
        tl.store(target + HALF, second, mask=of_value)


@triton.jit
def _factors(query_norm, key_norm, is_query, dims, inside):
    """Of each head `[TILE, HALF_WIDTH]`: the weights of its norm."""
    of_query = tl.load(query_norm + dims, mask=inside, other=0.0).to(tl.float32)
    of_key = tl.load(key_norm + dims, mask=inside, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], of_query[None, :], of_key[None, :])


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _store(
    key,
    value,
    key_token_stride,
    key_head_stride,
    key_dim_stride,
    value_token_stride,
    value_head_stride,
    value_dim_stride,
    keys,
    values,
    rows,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program TILE heads of a token."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
    dims = tl.arange(0, DIM_WIDTH)[None, :]
    present = (head < KV_HEADS) & (dims < HEAD_DIM)
    row = tl.load(rows + token)
    if row >= 0:
        target = row * (KV_HEADS * HEAD_DIM) + head * HEAD_DIM + dims
        source = key + token * key_token_stride + head * key_head_stride + dims * key_dim_stride
        tl.store(keys + target, tl.load(source, mask=present), mask=present)
        source = value + token * value_token_stride + head * value_head_stride + dims * value_dim_stride
        tl.store(values + target, tl.load(source, mask=present), mask=present)
