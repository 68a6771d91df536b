"""A storm of aborts: nine in ten clients cancel at random moments, and for the tenth nothing changes but the time."""

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvrelay import AsyncClient
from tests.checkpoints import VOCAB_SIZE
from tests.e2e.cluster import start_cluster

NUM_REQUESTS = 300
STAYING = 10  # one in so many clients stays
NUM_TOKENS = 24
FOREVER = 8000  # tokens, which nobody waits for
ARRIVE_WITHIN = 2.0
LONGEST_PATIENCE = 2.0

Prompt = list[int]


def prompts() -> list[Prompt]:
    """Of one block to several chunks; every other one begins with a prefix that others have too."""
    random = Random(5)
    prefix = [random.randrange(3, VOCAB_SIZE) for _ in range(40)]
    lengths = [random.choice((1, 7, 30, 80, 150)) for _ in range(NUM_REQUESTS)]
    bodies = [[random.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]
    return [prefix * (index % 2) + body for index, body in enumerate(bodies)]


async def complete(client: AsyncClient, prompt: Prompt, num_tokens: int = NUM_TOKENS) -> list[int]:
    result = await client.complete(token_ids=prompt, max_tokens=num_tokens, temperature=0, ignore_eos=True)
    return list(result.token_ids)


async def calm(target: str, asked: Sequence[Prompt]) -> list[list[int]]:
    """One after another."""
    async with AsyncClient(target, timeout=60) as client:
        return [await complete(client, prompt) for prompt in asked]


async def storm(target: str, asked: Sequence[Prompt], random: Random) -> list[list[int]]:
    """What those got who stayed."""
    async with AsyncClient(target, timeout=120) as client:

        async def leave(prompt: Prompt, comes: float, patience: float) -> None:
            await asyncio.sleep(comes)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await complete(client, prompt, FOREVER)

        async def stay(prompt: Prompt, comes: float) -> list[int]:
            await asyncio.sleep(comes)
            return await complete(client, prompt)

        staying: list[asyncio.Task[list[int]]] = []
        async with asyncio.TaskGroup() as clients:
            for index, prompt in enumerate(asked):
                comes = random.uniform(0.0, ARRIVE_WITHIN)
                if index % STAYING == 0:
                    staying.append(clients.create_task(stay(prompt, comes)))
                else:
                    clients.create_task(leave(prompt, comes, random.uniform(0.0, LONGEST_PATIENCE)))
        return [task.result() for task in staying]


@pytest.mark.parametrize("disaggregation", ["always", "auto"])
def test_a_storm_of_aborts_leaves_nothing_behind(disaggregation: str, tmp_path: Path, tiny_llama: Path) -> None:
    """More requests than may run, and blocks for fewer than do, so that clients leave queues, handovers and batches."""
    settings: dict[str, Any] = {"block_size": 8, "num_blocks": 1024, "max_batched_tokens": 64, "max_running": 32}
    asked = prompts()
    with start_cluster(tmp_path / "run", tiny_llama, disaggregation=disaggregation, **settings) as cluster:
        pids = {worker.id: worker.pid for worker in cluster.status().workers}
        expected = asyncio.run(calm(cluster.target, asked[::STAYING]))
        assert asyncio.run(storm(cluster.target, asked, Random(6))) == expected
        cluster.wait_whole()
        with cluster.client() as client:
            assert list(client.held_blocks()) == []
        assert asyncio.run(calm(cluster.target, asked[::STAYING])) == expected
        cluster.wait_whole()
        assert {worker.id: worker.pid for worker in cluster.status().workers} == pids
