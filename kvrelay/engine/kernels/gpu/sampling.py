"""Sampling on the device: from logits to tokens in four launches, without a sort and without asking the host.

What is drawn is what `kvrelay.engine.sampler` draws, but for rounding and for one case: of several tokens that equal
the last one that top-p keeps, this keeps all, as both do for top-k; the sorting sampler keeps those with the highest
ids that it needs.

A row costs what it asks for: a greedy row one pass over its logits, a row with a temperature alone two, and a row
with top-k or top-p three, in which most tokens are recognised as too unlikely and the others, its candidates, are
copied together. Thresholds are then found by bisection among the candidates.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvrelay.engine.kernels.gpu.selection import find, is_limited, last_bucket, mass_from, threshold
from kvrelay.engine.kernels.gpu.weights import (
    BUCKETS,
    LEAST_KEY,
    buckets_of,
    finite,
    keys_of,
    logit_of,
    random_bits,
    share,
    weights_of,
)

__all__ = ["SamplingTensors", "sample_tokens"]

_TILE = 4096
_WARPS = 8
_MOST_CANDIDATES = 8192  # a row with more is searched as a whole, which is right but slow

# Views of one upload lie where they happen to; a kernel must not be compiled anew for each way they may.
_UNALIGNED = ["temperatures", "top_ks", "top_ps", "min_ps", "seeds", "positions"]

_LEAST_TEMPERATURE = tl.constexpr(1e-5)
_GREATEST_ID = tl.constexpr(2**31 - 1)


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """How each row is sampled; contiguous tensors `[R]` on the device. The values mean what `Sampling` says.

    Attributes:
        temperature: float32.
        top_k: int32; 0 keeps all tokens.
        top_p: float32; 1 keeps all tokens.
        min_p: float32; 0 keeps all tokens.
        seed: int64, with the bits of the unsigned seed.
        position: int64: of the token that is drawn, in its sequence.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor


def sample_tokens(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """Draws the next token of each row. Can be captured in a CUDA graph.

    Args:
        logits: `[R, V]`, float32; each row is contiguous.

    Returns:
        `[R]`, int64.
    """
    num_rows, vocabulary = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return token_ids
    # A power of two; those beyond the vocabulary are empty.
    num_tiles = triton.next_power_of_2(triton.cdiv(vocabulary, _TILE))
    num_candidates = min(_MOST_CANDIDATES, num_tiles * _TILE)
    ranks = token_ids.new_empty(num_rows, num_tiles)
    masses = torch.empty_like(ranks)
    counts = token_ids.new_empty(num_rows, num_tiles, BUCKETS.value, dtype=torch.int32)
    sizes = token_ids.new_empty(num_rows, dtype=torch.int32)
    candidates = logits.new_empty(num_rows, num_candidates)
    candidate_ids = token_ids.new_empty(num_rows, num_candidates, dtype=torch.int32)

    filters = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    found = (sizes, candidates, candidate_ids)
    shape = {"ROW_STRIDE": logits.stride(0), "VOCABULARY": vocabulary, "TILES": num_tiles, "TILE": _TILE}
    options = {"CAPACITY": num_candidates, "num_warps": _WARPS}
    grid = (num_rows, num_tiles)
    _rank[grid](logits, sampling.temperature, ranks, **shape, num_warps=_WARPS)
    _weigh[grid](logits, *filters, ranks, masses, counts, **shape, num_warps=_WARPS)
    _collect[grid](logits, *filters[:3], ranks, masses, counts, *found, **shape, **options)
    _choose[(num_rows,)](
        logits, *filters, sampling.seed, sampling.position, ranks, masses, *found, token_ids, **shape, **options
    )
    return token_ids


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED[:1])
def _rank(
    logits,
    temperatures,
    ranks,
    ROW_STRIDE: tl.constexpr,
    VOCABULARY: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Finds the best token of each tile, as a number that orders by logit, then by lower id.

    NaN is the greatest logit of a greedy row, as in torch; other rows count it as the least.
    """
    row, tile = tl.program_id(0), tl.program_id(1)
    values, ids, present = _load_tile(logits, row, tile, ROW_STRIDE, VOCABULARY, TILE)
    if tl.load(temperatures + row) < _LEAST_TEMPERATURE:
        keys = tl.where(values != values, 0x7FFFFFFF, keys_of(values))
    else:
        keys = keys_of(finite(values))
    rank = (keys.to(tl.int64) << 32) | (ids ^ _GREATEST_ID).to(tl.int64)
    tl.store(ranks + row * TILES + tile, tl.max(tl.where(present, rank, -(2**63)), axis=0))


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED[:4])
def _weigh(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    ranks,
    masses,
    counts,
    ROW_STRIDE: tl.constexpr,
    VOCABULARY: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums the weights of each tile and, for rows with top-k or top-p, counts its tokens by bucket."""
    row, tile = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if temperature >= _LEAST_TEMPERATURE:
        limited = is_limited(tl.load(top_ks + row), tl.load(top_ps + row), VOCABULARY)
        best = logit_of((_best_rank(ranks, row, TILES) >> 32).to(tl.int32))
        values, _, present = _load_tile(logits, row, tile, ROW_STRIDE, VOCABULARY, TILE)
        values = finite(values)
        # Top-p is measured before min-p is applied.
        min_p = tl.where(limited, 0.0, tl.load(min_ps + row))
        weights = tl.where(present, weights_of(values, best, temperature, min_p), 0)
        tl.store(masses + row * TILES + tile, tl.sum(weights, axis=0))
        if limited:
            buckets = buckets_of(values, best, temperature)
            count = tl.histogram(buckets, BUCKETS, mask=present & (buckets < BUCKETS))
            tl.store(counts + (row * TILES + tile) * BUCKETS + tl.arange(0, BUCKETS), count)


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED[:3])
def _collect(
    logits,
    temperatures,
    top_ks,
    top_ps,
    ranks,
    masses,
    counts,
    sizes,
    candidates,
    candidate_ids,
    ROW_STRIDE: tl.constexpr,
    VOCABULARY: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Copies the tokens that top-k, or else top-p, may keep, in the order of their ids, if they are few enough."""
    row, tile = tl.program_id(0), tl.program_id(1)
    temperature, top_k, top_p = tl.load(temperatures + row), tl.load(top_ks + row), tl.load(top_ps + row)
    if (temperature >= _LEAST_TEMPERATURE) & is_limited(top_k, top_p, VOCABULARY):
        tiles, buckets = tl.arange(0, TILES), tl.arange(0, BUCKETS)
        count = tl.load(counts + (row * TILES + tiles[:, None]) * BUCKETS + buckets[None, :])  # [TILES, BUCKETS]
        mass = tl.sum(tl.load(masses + row * TILES + tiles), axis=0)
        last = last_bucket(tl.sum(count, axis=0), mass, top_k, top_p, VOCABULARY)
        found = tl.sum(tl.where((buckets <= last)[None, :], count, 0), axis=1)  # [TILES]
        size = tl.sum(found, axis=0)
        if tile == 0:
            tl.store(sizes + row, size)
        if size <= CAPACITY:
            best = logit_of((_best_rank(ranks, row, TILES) >> 32).to(tl.int32))
            values, ids, present = _load_tile(logits, row, tile, ROW_STRIDE, VOCABULARY, TILE)
            values = finite(values)
            chosen = present & (buckets_of(values, best, temperature) <= last)
            before = tl.sum(tl.where(tiles < tile, found, 0), axis=0)
            slots = row * CAPACITY + before + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            tl.store(candidates + slots, values, mask=chosen)
            tl.store(candidate_ids + slots, ids, mask=chosen)


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def _choose(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    ranks,
    masses,
    sizes,
    candidates,
    candidate_ids,
    token_ids,
    ROW_STRIDE: tl.constexpr,
    VOCABULARY: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Takes the best token of each row, or inverts the cumulative distribution in the order of token ids."""
    row = tl.program_id(0)
    temperature, top_k, top_p = tl.load(temperatures + row), tl.load(top_ks + row), tl.load(top_ps + row)
    rank = _best_rank(ranks, row, TILES)
    if temperature < _LEAST_TEMPERATURE:
        token_id = (rank & 0xFFFFFFFF).to(tl.int32) ^ _GREATEST_ID
    else:
        best = logit_of((rank >> 32).to(tl.int32))
        min_p = tl.load(min_ps + row)
        number = random_bits(tl.load(seeds + row), tl.load(positions + row))
        tiles = tl.arange(0, TILES)
        tile_masses = tl.load(masses + row * TILES + tiles)
        source = logits + row.to(tl.int64) * ROW_STRIDE
        if is_limited(top_k, top_p, VOCABULARY):
            size = tl.load(sizes + row)
            collected = size <= CAPACITY
            length = tl.where(collected, size, VOCABULARY)
            if collected:
                source = candidates + row.to(tl.int64) * CAPACITY
            mass = tl.sum(tile_masses, axis=0)
            least = threshold(source, length, mass, best, temperature, top_k, top_p, VOCABULARY)
            target = share(number, mass_from(source, length, least, best, temperature, min_p))
            before = tl.full((), 0, tl.int64)
            token_id = find(source, row * 0, length, before, target, least, best, temperature, min_p, TILE)
            if collected:
                token_id = tl.load(candidate_ids + row * CAPACITY + token_id)
        else:
            target = share(number, tl.sum(tile_masses, axis=0))
            tile = tl.sum((tl.cumsum(tile_masses, axis=0) <= target).to(tl.int32), axis=0)
            before = tl.sum(tl.where(tiles < tile, tile_masses, 0), axis=0)
            end = tl.minimum((tile + 1) * TILE, VOCABULARY)
            token_id = find(source, tile * TILE, end, before, target, LEAST_KEY, best, temperature, min_p, TILE)
    tl.store(token_ids + row, token_id)


@triton.jit
def _load_tile(logits, row, tile, ROW_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr, TILE: tl.constexpr):
    """The logits `[TILE]` of a tile, their token ids, and which of them exist."""
    ids = tile * TILE + tl.arange(0, TILE)
    present = ids < VOCABULARY
    return tl.load(logits + row.to(tl.int64) * ROW_STRIDE + ids, mask=present, other=float("-inf")), ids, present


@triton.jit
def _best_rank(ranks, row, TILES: tl.constexpr):
    return tl.max(tl.load(ranks + row * TILES + tl.arange(0, TILES)), axis=0)
