"""One worker, its registration and a directory that reads it, for tests over a real Redis."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from kvrelay.control.directory import WorkerDirectory
from kvrelay.control.registration import Registration
from kvrelay.control.registry import (
    ModelInfo,
    ShmOffer,
    WorkerLoad,
    WorkerRecord,
)
from kvrelay.request import WorkerRole, WorkerState
from tests.patience import until

KEY = b"the cluster's key"
MODEL = ModelInfo("demo", "LlamaForCausalLM", 2048, 4096, 16, "cd34")
SHM = ShmOffer("host", pid=17, fd=5, size=4096, nonce="00ff")
WORKER = WorkerRecord("w1", WorkerRole.PREFILL, "127.0.0.1:7001", pid=17, model=MODEL, shm=SHM)
LOAD = WorkerLoad(WorkerState.READY, running=1, waiting=2, blocks_total=64, blocks_free=32, waiting_tokens=100)
LEASE = 2.0
BEAT = 0.05


@pytest.fixture
async def registration(redis: Redis) -> AsyncIterator[Registration]:
    made = new_registration(redis)
    yield made
    await made.withdraw()


@pytest.fixture
async def directory(redis: Redis) -> AsyncIterator[WorkerDirectory]:
    made = new_directory(redis)
    await made.start()
    yield made
    await made.stop()


def new_registration(redis: Redis, key: bytes = KEY) -> Registration:
    return Registration(redis, key, lambda: LOAD, lease_seconds=LEASE, interval=BEAT)


def new_directory(redis: Redis) -> WorkerDirectory:
    return WorkerDirectory(redis, KEY, lease_seconds=LEASE, interval=BEAT)


async def until_gone(redis: Redis, key: str) -> None:
    async def is_gone() -> bool:
        return not await redis.exists(key)

    await until(is_gone, what=f"{key} is gone")
