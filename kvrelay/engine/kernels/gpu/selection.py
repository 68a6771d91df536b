"""Searches in a row of logits: the thresholds of top-k and top-p, and the token at a given cumulative weight.

A row is `length` float32 numbers from `source` on; it may be a whole row of logits or what is left of one.
"""

import triton
import triton.language as tl

from kvrelay.engine.kernels.gpu.weights import BUCKETS, LEAST_KEY, finite, heaviest_of_buckets, keys_of, weights_of

__all__ = ["find", "is_limited", "last_bucket", "mass_from", "threshold"]

_PIVOTS = tl.constexpr(8)
_PIVOT_TILE = tl.constexpr(2048)


@triton.jit
def has_top_k(top_k, VOCABULARY: tl.constexpr):
    return (top_k > 0) & (top_k < VOCABULARY)


@triton.jit
def is_limited(top_k, top_p, VOCABULARY: tl.constexpr):
    """Whether top-k or top-p is asked for, so that thresholds must be found."""
    return has_top_k(top_k, VOCABULARY) | (top_p < 1.0)


@triton.jit
def last_bucket(found, mass, top_k, top_p, VOCABULARY: tl.constexpr):
    """The last bucket with tokens that top-k, or without it top-p, may keep.

    Args:
        found: `[BUCKETS]`: how many tokens are in each.
        mass: the sum of all weights of the row.
    """
    if has_top_k(top_k, VOCABULARY):
        too_early = tl.cumsum(found, axis=0) < top_k
    else:
        heaviest = heaviest_of_buckets() * found
        beyond = tl.sum(heaviest, axis=0) - tl.cumsum(heaviest, axis=0)
        too_early = beyond > mass - _least_mass(top_p, mass)
    return tl.minimum(tl.sum(too_early.to(tl.int32), axis=0), BUCKETS - 1)


@triton.jit
def threshold(source, length, mass, best, temperature, top_k, top_p, VOCABULARY: tl.constexpr):
    """The key of the least logit that top-k, then top-p keep. Logits that are equal are kept or excluded together.

    Args:
        mass: the sum of all weights of the row.
        best: the greatest logit of the row.
    """
    least = tl.full((), LEAST_KEY, tl.int32)
    if has_top_k(top_k, VOCABULARY):
        least = _greatest_key(source, length, top_k.to(tl.int64), best, temperature, True)
        mass = mass_from(source, length, least, best, temperature, 0.0)
    if top_p < 1.0:
        least = _greatest_key(source, length, _least_mass(top_p, mass), best, temperature, False)
    return least


@triton.jit
def mass_from(source, length, key, best, temperature, min_p):
    """What the tokens from `key` on weigh."""
    keys = key + tl.full((1,), 0, tl.int32)
    return tl.sum(_sums_from(source, length, keys, best, temperature, min_p, False), axis=0)


@triton.jit
def find(source, start, end, before, target, least, best, temperature, min_p, TILE: tl.constexpr):
    """The first slot from `start` on at which the cumulative weight exceeds `target`.

    Args:
        before: cumulative weight before `start`, int64.
        least: the least key that counts.
    """
    found = end
    while (start < end) & (found == end):
        slots = start + tl.arange(0, TILE)
        values = finite(tl.load(source + slots, mask=slots < end, other=float("-inf")))
        counted = (slots < end) & (keys_of(values) >= least)
        weights = tl.where(counted, weights_of(values, best, temperature, min_p), 0)
        found = tl.min(tl.where(before + tl.cumsum(weights, axis=0) > target, slots, end), axis=0)
        before += tl.sum(weights, axis=0)
        start += TILE
    return tl.minimum(found, end - 1)


@triton.jit
def _least_mass(top_p, mass):
    """The least weight that top-p keeps, of `mass`."""
    kept = tl.ceil(top_p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64)
    return tl.minimum(tl.maximum(kept, 1), mass)


@triton.jit
def _greatest_key(source, length, target, best, temperature, COUNT: tl.constexpr):
    """The greatest key such that the tokens from it on weigh (COUNT: number) `target` or more; LEAST_KEY if none.

    Bisection, but into nine parts, because reading and weighing cost more than comparing.
    """
    low = tl.full((), LEAST_KEY, tl.int64)
    high = keys_of(best).to(tl.int64) + 1
    while high - low > 1:
        step = (high - low + _PIVOTS) // (_PIVOTS + 1)
        pivots = tl.minimum(low + step * (tl.arange(0, _PIVOTS) + 1), high).to(tl.int32)
        sums = _sums_from(source, length, pivots, best, temperature, 0.0, COUNT)
        low += step * tl.sum((sums >= target).to(tl.int64), axis=0)
        high = tl.minimum(high, low + step)
    return low.to(tl.int32)


@triton.jit
def _sums_from(source, length, keys, best, temperature, min_p, COUNT: tl.constexpr):
    """For each of `keys` `[P]` what the tokens from it on weigh (COUNT: how many they are), `[P]`, int64."""
    sums = tl.full((keys.shape[0], _PIVOT_TILE), 0, tl.int64)
    for start in range(0, length, _PIVOT_TILE):
        slots = start + tl.arange(0, _PIVOT_TILE)
        present = slots < length
        values = finite(tl.load(source + slots, mask=present, other=float("-inf")))
        amounts = present.to(tl.int64)
        if not COUNT:
            amounts *= weights_of(values, best, temperature, min_p)
        sums += tl.where(keys_of(values)[None, :] >= keys[:, None], amounts[None, :], 0)
    return tl.sum(sums, axis=1)
