"""Queues of one or more gateways over a real server, and what tests do with them."""

import time
from collections.abc import Iterable

import pytest
from redis.asyncio import Redis

from kvrelay.control.request_queue import Admission, RequestQueue, Verdict
from tests.patience import until

KEY = b"k" * 32
RUNNING, WAITING = Admission(Verdict.RUNNING), Admission(Verdict.WAITING)


def new_queue(
    redis: Redis, gateway_id: str = "g1", running: int = 2, waiting: int = 3, lease: float = 30.0, key: bytes = KEY
) -> RequestQueue:
    return RequestQueue(redis, key, gateway_id, max_running=running, max_waiting=waiting, lease_seconds=lease)


@pytest.fixture
def queue(redis: Redis) -> RequestQueue:
    return new_queue(redis)


async def enter(
    queue: RequestQueue, request_id: str, digest: str = "d", priority: int = 0, deadline: float | None = None
) -> Admission:
    return await queue.enter(request_id, digest, priority, deadline, time.time())


async def fill(queue: RequestQueue, request_ids: Iterable[str]) -> list[Verdict]:
    return [(await enter(queue, request_id)).verdict for request_id in request_ids]


async def counts(queue: RequestQueue) -> tuple[int, int]:
    status = await queue.status()
    return status.waiting, status.running


async def poll_until(queue: RequestQueue, expected: tuple[int, int]) -> list[str]:
    """Polls as a gateway does until (waiting, running) are as expected; what was promoted on the way."""
    promoted: list[str] = []

    async def is_as_expected() -> bool:
        promoted.extend(await queue.poll())
        return await counts(queue) == expected

    await until(is_as_expected, what=f"(waiting, running) are {expected}")
    return promoted
