"""From logits to what sampling counts with: ordered keys, integer weights, buckets of weights, random numbers.

A token's weight is its probability relative to the likeliest token's, in units of 2^-40, computed in float32 and cut
off. Sums of integers are exact, so they depend neither on the order of the summands nor on the number of programs. A
token less likely than the likeliest by a factor of more than 2^40 weighs nothing and is never drawn.
"""

import triton
import triton.language as tl

__all__ = [
    "BUCKETS",
    "LEAST_KEY",
    "buckets_of",
    "finite",
    "heaviest_of_buckets",
    "keys_of",
    "logit_of",
    "random_bits",
    "share",
    "weights_of",
]

BUCKETS = tl.constexpr(64)
LEAST_KEY = tl.constexpr(-(2**31))

_GREATEST = tl.constexpr(3.4028234663852886e38)
_LOG2_E = tl.constexpr(1.4426950408889634)
_OCTAVES = tl.constexpr(40)
_UNIT = tl.constexpr(2.0**40)
_BUCKETS_PER_OCTAVE = tl.constexpr(1.6)
_SAMPLER_DOMAIN = tl.constexpr(0x73616D70)


@triton.jit
def finite(values):
    """NaN and -inf become the least finite number, inf the greatest."""
    values = tl.where(values != values, -_GREATEST, values)
    return tl.minimum(tl.maximum(values, -_GREATEST), _GREATEST)


@triton.jit
def keys_of(values):
    """int32 numbers that order as the float32 numbers do; 0 and -0 have the same."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logit_of(key):
    """The number that has this key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weights_of(values, best, temperature, min_p):
    """int64; 0 for what min-p excludes.

    Args:
        best: the greatest logit of the row.
    """
    relative = tl.exp2(-_depths(values, best, temperature))
    return tl.where(relative >= min_p, relative * _UNIT, 0.0).to(tl.int64)


@triton.jit
def buckets_of(values, best, temperature):
    """The bucket of each token, BUCKETS for one that weighs nothing; int32.

    A bucket holds the tokens whose weights are within a factor of 2^(1 / 1.6); the first has the likeliest.
    """
    depths = tl.minimum(_depths(values, best, temperature), _OCTAVES)
    return (depths * _BUCKETS_PER_OCTAVE).to(tl.int32)


@triton.jit
def heaviest_of_buckets():
    """`[BUCKETS]`, int64: no token of a bucket weighs more."""
    depths = tl.arange(0, BUCKETS).to(tl.float32) / _BUCKETS_PER_OCTAVE
    return (tl.exp2(-depths + _OCTAVES) * 1.001).to(tl.int64) + 1  # 1.001 covers the errors of the exponentials


@triton.jit
def random_bits(seed, position):
    """53 random bits at the top of an unsigned 64-bit number: those of `kvrelay.engine.philox.uniforms`."""
    counter = position.to(tl.uint32)
    zero = counter * 0
    word0, word1, _, _ = tl.philox(seed, counter, zero, zero, zero + _SAMPLER_DOMAIN)
    return ((word0.to(tl.uint64) << 32) | word1.to(tl.uint64)) >> 11 << 11


@triton.jit
def share(number, mass):
    """`floor(u * mass)`, exactly, with the number u in [0, 1) that has the bits `number`; int64."""
    return tl.umulhi(number, mass.to(tl.uint64)).to(tl.int64)


@triton.jit
def _depths(values, best, temperature):
    """By how many powers of two each token is less likely than the likeliest."""
    return (best - values) / temperature * _LOG2_E
