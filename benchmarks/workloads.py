"""Requests to measure with: prompts as token ids and the output length that every engine is forced to.

Random numbers come from `random.Random(seed)` alone, so a workload is the same on every machine and in every engine.
"""

import math
import random
from collections.abc import Callable

__all__ = [
    "DISTRIBUTIONS",
    "MEAN_OUTPUT_TOKENS",
    "PROMPT_TOKENS",
    "VOCAB_SIZE",
    "Workload",
    "output_tokens",
    "peers_workload",
    "prompt_tokens",
    "workload",
]

Workload = list[tuple[list[int], int]]  # (prompt token ids, output length) of each request, in order of arrival

VOCAB_SIZE = 4096
NUM_SPECIAL_TOKENS = 3
PROMPT_TOKENS = 64
MEAN_OUTPUT_TOKENS = 128
LONGEST_OUTPUT = 1024
LOGNORMAL_SIGMA = 1.2

_OUTPUT_LENGTHS: dict[str, Callable[[random.Random], float]] = {
    "fixed": lambda rng: MEAN_OUTPUT_TOKENS,
    "exponential": lambda rng: rng.expovariate(1 / MEAN_OUTPUT_TOKENS),
    "lognormal": lambda rng: rng.lognormvariate(math.log(MEAN_OUTPUT_TOKENS) - LOGNORMAL_SIGMA**2 / 2, LOGNORMAL_SIGMA),
}
DISTRIBUTIONS = (*_OUTPUT_LENGTHS, "peers")


def peers_workload(requests: int = 64, seed: int = 0) -> Workload:
    """The mixed workload that all engines of the peers' table run: both lengths lognormal, as chat traffic has them.

    With 64 requests and seed 0 these are 9,526 prompt tokens and 4,518 output tokens.
    """
    rng = random.Random(seed)
    pairs = []
    for _ in range(requests):
        prompt = int(min(512, max(16, rng.lognormvariate(4.6, 0.9))))
        output = int(min(256, max(8, rng.lognormvariate(4.0, 0.9))))
        pairs.append((_token_ids(rng, prompt), output))
    return pairs


def workload(distribution: str, requests: int = 64, seed: int = 0) -> Workload:
    """Requests whose output lengths follow one of DISTRIBUTIONS.

    "fixed", "exponential" and "lognormal" (sigma 1.2) have a mean of MEAN_OUTPUT_TOKENS and all prompts of
    PROMPT_TOKENS, so that nothing but the output lengths varies; "peers" is `peers_workload`.

    Raises:
        KeyError: no such distribution.
    """
    if distribution == "peers":
        return peers_workload(requests, seed)
    length = _OUTPUT_LENGTHS[distribution]
    rng = random.Random(seed)
    lengths = [min(LONGEST_OUTPUT, max(1, round(length(rng)))) for _ in range(requests)]
    return [(_token_ids(rng, PROMPT_TOKENS), output) for output in lengths]


def prompt_tokens(requests: Workload) -> int:
    """Tokens of all prompts."""
    return sum(len(prompt) for prompt, _ in requests)


def output_tokens(requests: Workload) -> int:
    """Tokens of all outputs."""
    return sum(output for _, output in requests)


def _token_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(NUM_SPECIAL_TOKENS, VOCAB_SIZE) for _ in range(count)]
