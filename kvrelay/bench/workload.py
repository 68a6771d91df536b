"""What is asked of the cluster: an endless or recorded run of requests, the same for the same seed."""

import enum
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from kvrelay.bench.lengths import LengthDistribution
from kvrelay.bench.traces import HASH_BLOCK_TOKENS, Shape
from kvrelay.errors import ConfigurationError

__all__ = ["Job", "Purpose", "Synthetic", "Workload", "fit", "generator"]

CACHED_HASH_BLOCKS = 4096


class Purpose(enum.IntEnum):
    """What random numbers are for: each purpose has its own stream, so that a change to one leaves the others."""

    LENGTHS = 1
    TOKENS = 2
    ARRIVALS = 3
    WARMUP = 4
    PREFIX = 5


def generator(seed: int, purpose: Purpose) -> np.random.Generator:
    """The random numbers for one purpose."""
    return np.random.default_rng([seed, purpose])


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Requests of random lengths.

    Attributes:
        shared_prefix_tokens: tokens that come first in every prompt, beyond its own `input_tokens`.
    """

    input_tokens: LengthDistribution
    output_tokens: LengthDistribution
    shared_prefix_tokens: int = 0

    def shapes(self, seed: int) -> Iterator[Shape]:
        """Never ends."""
        random = generator(seed, Purpose.LENGTHS)
        while True:
            own = self.input_tokens.draw(random)
            yield Shape(self.shared_prefix_tokens + own, self.output_tokens.draw(random))


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send.

    Attributes:
        timestamp: as in `Shape`.
        was_cut: it was longer than the context.
    """

    index: int
    token_ids: Sequence[int]
    output_tokens: int
    timestamp: float | None
    was_cut: bool


class Workload:
    """Makes jobs of shapes: prompts that the model's vocabulary and context allow.

    Args:
        source: lengths to draw, or a trace.
        context_length: tokens of prompt and output together; what is longer is cut.
    """

    def __init__(self, source: Synthetic | Sequence[Shape], vocab_size: int, context_length: int, seed: int) -> None:
        self._source = source
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._seed = seed
        self._hash_block = functools.lru_cache(CACHED_HASH_BLOCKS)(self._draw_hash_block)
        if not isinstance(source, Synthetic):
            self._check_token_ids(source)

    def jobs(self, limit: int | None = None) -> Iterator[Job]:
        """The requests to measure, from the first on; endless for a synthetic source without a limit."""
        return self._jobs(islice(self._shapes(), limit), Purpose.TOKENS)

    def warmup(self, limit: int) -> Iterator[Job]:
        """Requests as long as the first ones, with other tokens: what they leave in a prefix cache helps nobody."""
        shapes = (replace(shape, hash_ids=(), token_ids=()) for shape in islice(self._shapes(), limit))
        return self._jobs(shapes, Purpose.WARMUP)

    def _shapes(self) -> Iterator[Shape]:
        return self._source.shapes(self._seed) if isinstance(self._source, Synthetic) else iter(self._source)

    def _jobs(self, shapes: Iterable[Shape], purpose: Purpose) -> Iterator[Job]:
        random = generator(self._seed, purpose)
        prefix = self._shared_prefix(random if purpose is Purpose.WARMUP else generator(self._seed, Purpose.PREFIX))
        for index, shape in enumerate(shapes):
            fitting = fit(shape, self._context_length)
            token_ids = fitting.token_ids or self._prompt(fitting, prefix, random)
            was_cut = fitting is not shape
            yield Job(index, token_ids, fitting.output_tokens, shape.timestamp, was_cut)

    def _prompt(self, shape: Shape, prefix: NDArray[np.int64], random: np.random.Generator) -> list[int]:
        blocks = [prefix, *map(self._hash_block, shape.hash_ids)]
        num_own = max(0, shape.input_tokens - sum(map(len, blocks)))
        own = random.integers(self._vocab_size, size=num_own)
        token_ids: list[int] = np.concatenate([*blocks, own])[: shape.input_tokens].tolist()
        return token_ids

    def _shared_prefix(self, random: np.random.Generator) -> NDArray[np.int64]:
        num_tokens = self._source.shared_prefix_tokens if isinstance(self._source, Synthetic) else 0
        return random.integers(self._vocab_size, size=min(num_tokens, self._context_length))

    def _draw_hash_block(self, hash_id: int) -> NDArray[np.int64]:
        # Keyed rather than drawn in turn, so that an id means the same tokens wherever it comes first.
        philox = np.random.Philox(key=np.array([self._seed, hash_id], dtype=np.uint64))
        return np.random.Generator(philox).integers(self._vocab_size, size=HASH_BLOCK_TOKENS)

    def _check_token_ids(self, shapes: Sequence[Shape]) -> None:
        for position, shape in enumerate(shapes, 1):
            if shape.token_ids and (largest := max(shape.token_ids)) >= self._vocab_size:
                raise ConfigurationError(
                    f"--trace: request {position}: token id {largest} is outside the model's vocabulary; "
                    f"ids are from 0 to {self._vocab_size - 1}"
                )


def fit(shape: Shape, context_length: int) -> Shape:
    """Cuts a request that is longer than the context; the shape itself if it fits.

    The longer side gives way: the output keeps what the prompt leaves, but at least half of the context, and then the
    prompt keeps what the output leaves. A prompt keeps its beginning, where prefixes are shared.
    """
    if shape.input_tokens + shape.output_tokens <= context_length:
        return shape
    output_tokens = min(shape.output_tokens, max(context_length - shape.input_tokens, context_length // 2))
    input_tokens = min(shape.input_tokens, context_length - output_tokens)
    num_hash_blocks = -(-input_tokens // HASH_BLOCK_TOKENS)
    return replace(
        shape,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        hash_ids=shape.hash_ids[:num_hash_blocks],
        token_ids=shape.token_ids[:input_tokens],
    )
