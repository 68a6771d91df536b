"""Token for token what transformers gives, in float32 at temperature 0, through real processes and transports."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvrelay import Client
from kvrelay.client import Completion
from tests.checkpoints import VOCAB_SIZE, greedy_oracle, make_checkpoint
from tests.e2e.cluster import Cluster, start_cluster

NUM_REQUESTS = 32
BLOCK_SIZE = 8
# Small enough that 32 requests of up to 100 tokens cannot all be there at once, so that some are preempted.
NUM_BLOCKS = 20
# Shorter than most prompts, so that they are chunked, and no multiple of the block size.
TOKENS_PER_STEP = 27
MOST_ROUNDS = 12

Prompt = tuple[list[int], int]


def mixed_prompts(seed: int) -> list[Prompt]:
    """Prompts and completion lengths: short and long, a third of them with one of two common prefixes."""
    random = Random(seed)
    prefixes = [[random.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (24, 37)]
    prompts = []
    for index in range(NUM_REQUESTS):
        body = [random.randrange(3, VOCAB_SIZE) for _ in range(random.choice((1, 5, 16, 31, 50)))]
        prefix = prefixes[index % 2] if index % 3 == 0 else []
        prompts.append((prefix + body, random.choice((1, 2, 9, 24, 40))))
    return prompts


def complete_all(target: str, prompts: Sequence[Prompt]) -> list[Completion]:
    """All of them at once."""
    with Client(target, timeout=120) as client, ThreadPoolExecutor(len(prompts)) as threads:

        def complete(prompt: Prompt) -> Completion:
            token_ids, count = prompt
            return client.complete(token_ids=token_ids, max_tokens=count, temperature=0, ignore_eos=True)

        return list(threads.map(complete, prompts))


def num_preemptions(cluster: Cluster) -> int:
    return sum(worker.preemptions for worker in cluster.status().workers)


def rounds_with_preemption(cluster: Cluster, prompts: Sequence[Prompt], at_least: int) -> list[list[Completion]]:
    """Rounds of all prompts, until blocks have run out: the pool is too small for all, but timing decides who meets."""
    rounds: list[list[Completion]] = []
    while len(rounds) < at_least or (len(rounds) < MOST_ROUNDS and num_preemptions(cluster) == 0):
        rounds.append(complete_all(cluster.target, prompts))
        cluster.wait_whole()
    return rounds


@pytest.mark.parametrize(
    ("architecture", "transport", "prefill", "decode"),
    [
        ("llama", "pool", 1, 2),
        ("qwen3", "pool", 2, 2),
        ("llama", "shm", 2, 2),
        ("llama", "grpc", 1, 1),
        ("mistral", "shm", 2, 2),
        ("qwen2", "grpc", 2, 2),
        ("qwen3", "shm", 2, 2),
        ("qwen3", "grpc", 1, 1),
        ("gpt2", "shm", 1, 1),
        ("gpt2", "grpc", 1, 1),
    ],
)
def test_tokens_are_those_of_transformers(
    tmp_path: Path, architecture: str, transport: str, prefill: int, decode: int
) -> None:
    model = make_checkpoint(tmp_path / architecture, architecture)
    settings: dict[str, Any] = {
        "transport": transport,
        "shared_pool": "auto" if transport == "pool" else "",
        "block_size": BLOCK_SIZE,
        "num_blocks": NUM_BLOCKS,
        "max_batched_tokens": TOKENS_PER_STEP,
    }
    with start_cluster(tmp_path / "run", model, prefill=prefill, decode=decode, **settings) as cluster:
        prompts = mixed_prompts(seed=1)
        rounds = rounds_with_preemption(cluster, prompts, at_least=2)
        cached = sum(result.usage.cached_tokens for result in rounds[1])
        transports = {link.transport for worker in cluster.status().workers for link in worker.links}
        assert num_preemptions(cluster) > 0
    for (token_ids, count), *results in zip(prompts, *rounds, strict=True):
        expected = greedy_oracle(model, token_ids, count)
        for result in results:
            assert list(result.token_ids) == expected
    assert transports == {transport}
    assert cached > 0
