"""Leases in the registry that are forged, replayed or malformed: refused, put aside, and nobody else's loss."""

import asyncio
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from kvrelay.control.directory import WorkerDirectory
from kvrelay.control.registration import Registration
from kvrelay.control.registry import (
    Lease,
    LinkRecord,
    ModelInfo,
    WorkerLoad,
    WorkerRecord,
    seal_lease,
)
from tests.contract.registry_kit import BEAT, KEY, LOAD, MODEL, WORKER, until_gone
from tests.patience import SOON, until

pytest_plugins = ["tests.contract.redis_kit", "tests.contract.registry_kit"]

FOREIGN: dict[str, str | bytes] = {
    "another key": seal_lease(Lease(replace(WORKER, epoch=2**52), 1, LOAD), b"guess"),
    "no MAC": seal_lease(Lease(replace(WORKER, epoch=2**52), 1, LOAD), KEY).partition(".")[2],
    "another member's": seal_lease(Lease(replace(WORKER, worker_id="w2", epoch=2**52), 1, LOAD), KEY),
    "flipped": seal_lease(Lease(replace(WORKER, epoch=2**52), 1, LOAD), KEY).replace("7001", "6666"),
    "empty JSON": ".{}",
    "not UTF-8": b"\xff\xfe.\x80",
    "too long": "x" * (1 << 17),
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN.keys())
async def test_forged_lease_is_refused_and_put_aside(
    redis: Redis, directory: WorkerDirectory, text: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.sadd("kvrelay:members", "worker:w1")
    await redis.set("kvrelay:lease:worker:w1", text)
    await until_gone(redis, "kvrelay:lease:worker:w1")
    await until_gone(redis, "kvrelay:members")
    assert directory.snapshot() == {}
    assert await redis.exists("kvrelay:quarantine:worker:w1")
    if len(text) < 1 << 16:
        assert directory.num_rejected >= 1
        assert caplog.text.count("refused") == 1


async def test_forging_does_not_drop_the_true_worker(
    redis: Redis, registration: Registration, directory: WorkerDirectory
) -> None:
    epoch = await registration.start(WORKER)
    await directory.wait_for(lambda workers: "w1" in workers, SOON)
    for _ in range(20):
        await redis.set("kvrelay:lease:worker:w1", FOREIGN["another key"])
        await asyncio.sleep(0.01)  # hammers in the rhythm of an attacker, waits for nothing
        assert directory.snapshot()["w1"].record.epoch == epoch
    await until(lambda: directory.num_rejected > 0)


async def test_replayed_lease_does_not_keep_a_dead_worker(
    redis: Redis, registration: Registration, directory: WorkerDirectory
) -> None:
    await registration.start(WORKER)
    await directory.wait_for(lambda workers: "w1" in workers, SOON)
    old = await redis.get("kvrelay:lease:worker:w1")
    await registration.withdraw()
    assert old is not None
    await redis.set("kvrelay:lease:worker:w1", old)
    await redis.sadd("kvrelay:members", "worker:w1")
    await directory.wait_for(lambda workers: "w1" not in workers, SOON)
    with pytest.raises(TimeoutError):
        await directory.wait_for(lambda workers: "w1" in workers, timeout=3 * BEAT)


async def test_wrong_types_are_put_aside_and_the_registry_lives(
    redis: Redis, registration: Registration, directory: WorkerDirectory
) -> None:
    await redis.set("kvrelay:members", "text")
    await redis.lpush("kvrelay:lease:worker:w1", "list")
    await redis.lpush("kvrelay:epoch:worker:w1", "list")
    await redis.lpush("kvrelay:lease:worker:w9", "list")
    await registration.start(WORKER)
    await redis.sadd("kvrelay:members", "worker:w9", b"\xff", "")
    await directory.wait_for(lambda workers: "w1" in workers, SOON)
    await until_gone(redis, "kvrelay:lease:worker:w9")
    assert directory.redis_available


async def test_malformed_records_are_refused(redis: Redis, directory: WorkerDirectory) -> None:
    """Also when they are signed: a worker of another version is no reason to crash."""
    bad = [
        replace_unchecked(WORKER, pid="17"),
        replace_unchecked(WORKER, pid=True),
        replace_unchecked(WORKER, role="chef"),
        replace_unchecked(WORKER, address="nowhere"),
        replace_unchecked(WORKER, model=None),
        replace_unchecked(WORKER, shm=17),
        replace_unchecked(WORKER, max_batched_tokens=-1),
        replace_unchecked(WORKER, max_batched_tokens=16.0),
        replace_unchecked(WORKER, itl_limit=-0.1),
        replace_unchecked(WORKER, itl_limit=float("nan")),
        replace_unchecked(WORKER, itl_limit="0.1"),
        replace_unchecked(WORKER, model=_spoiled_model(block_size=0)),
    ]
    for record, load in [
        *((record, LOAD) for record in bad),
        *((replace(WORKER, epoch=1), load) for load in BAD_LOADS),
    ]:
        num_rejected = directory.num_rejected
        text = seal_lease(Lease(record, 1, load), KEY)
        await redis.set("kvrelay:lease:worker:w1", text)
        await redis.sadd("kvrelay:members", "worker:w1")
        await until_gone(redis, "kvrelay:lease:worker:w1")
        assert directory.num_rejected == num_rejected + 1
    assert directory.snapshot() == {}


def _bad_load(links: object) -> WorkerLoad:
    load = replace(LOAD)
    object.__setattr__(load, "links", links)
    return load


def _spoiled_link(**fields: object) -> LinkRecord:
    link = LinkRecord("prefill-0", "shm", 1.0, 1.0)
    for name, value in fields.items():
        object.__setattr__(link, name, value)
    return link


def _spoiled_model(**fields: object) -> ModelInfo:
    model = replace(MODEL)
    for name, value in fields.items():
        object.__setattr__(model, name, value)
    return model


BAD_LOADS = [
    _bad_load(17),
    _bad_load("shm"),
    _bad_load((17,)),
    _bad_load((_spoiled_link(bandwidth=-1.0),)),
    _bad_load((_spoiled_link(latency="0.1"),)),
    _bad_load((_spoiled_link(transport=None),)),
]


def replace_unchecked(record: WorkerRecord, **fields: object) -> WorkerRecord:
    changed = replace(record, epoch=1)
    for name, value in fields.items():
        object.__setattr__(changed, name, value)
    return changed
