"""Philox4x32-10, a counter-based random number generator.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Random123). A number is a function
of key and counter and of nothing else, so that any worker draws the same for the same token of the same request.
"""

import numpy
from numpy.typing import ArrayLike, NDArray

__all__ = ["philox4x32", "uniforms"]

_ROUNDS = 10
_MULTIPLIERS = (numpy.uint64(0xD2511F53), numpy.uint64(0xCD9E8D57))
_KEY_INCREMENTS = (numpy.uint32(0x9E3779B9), numpy.uint32(0xBB67AE85))
_LOW = numpy.uint64(0xFFFFFFFF)
_HALF = numpy.uint64(32)
_SAMPLER_DOMAIN = 0x73616D70  # "samp": keeps the sampler's numbers apart from those that other purposes may draw


def philox4x32(counters: NDArray[numpy.uint32], keys: NDArray[numpy.uint32]) -> NDArray[numpy.uint32]:
    """Four random words for each row.

    Args:
        counters: `[R, 4]`.
        keys: `[R, 2]`.

    Returns:
        `[R, 4]`.
    """
    word0, word1, word2, word3 = counters.T
    key0, key1 = keys.T
    for _ in range(_ROUNDS):
        product0 = word0 * _MULTIPLIERS[0]  # 64 bits
        product1 = word2 * _MULTIPLIERS[1]
        word0, word2 = _high(product1) ^ word1 ^ key0, _high(product0) ^ word3 ^ key1
        word1, word3 = _low(product1), _low(product0)
        key0, key1 = key0 + _KEY_INCREMENTS[0], key1 + _KEY_INCREMENTS[1]
    return numpy.stack([word0, word1, word2, word3], axis=1)


def uniforms(seeds: ArrayLike, positions: ArrayLike, choices: ArrayLike = 0) -> NDArray[numpy.float64]:
    """A number in [0, 1) with 53 random bits for each row.

    Args:
        seeds: `[R]`, unsigned 64-bit: the requests' seeds.
        positions: `[R]`: the tokens' positions in their sequences.
        choices: `[R]` or one for all: which of several completions of one request.
    """
    seed = numpy.asarray(seeds, dtype=numpy.uint64)
    counters = numpy.zeros((len(seed), 4), dtype=numpy.uint32)
    counters[:, 0] = positions
    counters[:, 1] = choices
    counters[:, 3] = _SAMPLER_DOMAIN
    words = philox4x32(counters, numpy.stack([_low(seed), _high(seed)], axis=1)).astype(numpy.uint64)
    bits: NDArray[numpy.uint64] = (words[:, 0] << _HALF | words[:, 1]) >> numpy.uint64(11)
    return bits.astype(numpy.float64) * 2.0**-53


def _low(value: NDArray[numpy.uint64]) -> NDArray[numpy.uint32]:
    return (value & _LOW).astype(numpy.uint32)


def _high(value: NDArray[numpy.uint64]) -> NDArray[numpy.uint32]:
    return (value >> _HALF).astype(numpy.uint32)
