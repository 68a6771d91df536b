"""Registration and directory over real servers: leases, epochs, outages."""

import asyncio
import json
import logging
import os
import signal
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from kvrelay.control.connection import connect
from kvrelay.control.directory import WorkerDirectory
from kvrelay.control.private_redis import PrivateRedis
from kvrelay.control.registration import Registration
from kvrelay.control.registry import (
    GatewayRecord,
    Lease,
    LinkRecord,
    WorkerLoad,
    WorkerRecord,
    open_lease,
    seal_lease,
)
from kvrelay.control.strict_json import from_json
from kvrelay.errors import FailedPrecondition, Unavailable
from kvrelay.request import WorkerState
from tests.contract.registry_kit import BEAT, KEY, LEASE, LOAD, WORKER, new_directory, new_registration, until_gone
from tests.patience import SOON, until

pytest_plugins = ["tests.contract.redis_kit", "tests.contract.registry_kit"]


async def test_worker_appears_with_record_and_load(registration: Registration, directory: WorkerDirectory) -> None:
    assert directory.snapshot() == {}
    epoch = await registration.start(WORKER)
    await directory.wait_for(lambda workers: "w1" in workers, SOON)
    entry = directory.snapshot()["w1"]
    assert entry.record == replace(WORKER, epoch=epoch)
    assert entry.load == LOAD
    await directory.wait_for(lambda workers: workers["w1"].seen_at > entry.seen_at, SOON)
    assert directory.gateways() == {}


async def test_load_is_asked_at_each_heartbeat(redis: Redis, directory: WorkerDirectory) -> None:
    load = LOAD
    registration = Registration(redis, KEY, lambda: load, lease_seconds=LEASE, interval=BEAT)
    await registration.start(WORKER)
    load = replace(LOAD, state=WorkerState.DRAINING, running=7)
    await directory.wait_for(lambda workers: "w1" in workers and workers["w1"].load == load, SOON)
    await registration.withdraw()


async def test_a_defect_in_load_is_logged_once_and_the_heart_beats_on(
    redis: Redis, directory: WorkerDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    failing = False

    def load() -> WorkerLoad:
        if failing:
            raise KeyError("defect")
        return LOAD

    registration = Registration(redis, KEY, load, lease_seconds=LEASE, interval=BEAT)
    await registration.start(WORKER)
    await directory.wait_for(lambda workers: "w1" in workers, SOON)
    failing = True
    await directory.wait_for(lambda workers: "w1" not in workers, SOON)
    failing = False
    await directory.wait_for(lambda workers: "w1" in workers, SOON)
    assert caplog.text.count("heartbeats fail") == 1
    await registration.withdraw()


async def test_withdrawn_worker_goes_before_its_lease_ends(redis: Redis) -> None:
    directory = WorkerDirectory(redis, KEY, lease_seconds=3600, interval=BEAT)
    await directory.start()
    registration = Registration(redis, KEY, lambda: LOAD, lease_seconds=3600, interval=BEAT)
    await registration.start(WORKER)
    await directory.wait_for(lambda workers: "w1" in workers, SOON)
    await registration.withdraw()
    await directory.wait_for(lambda workers: "w1" not in workers, SOON)
    with pytest.raises(FailedPrecondition):
        await registration.heartbeat(LOAD)
    await directory.stop()


async def test_silent_worker_goes_after_its_lease(redis: Redis, directory: WorkerDirectory) -> None:
    silent = Registration(redis, KEY, lambda: LOAD, lease_seconds=LEASE, interval=3600)
    await silent.start(WORKER)
    await directory.wait_for(lambda workers: "w1" in workers, SOON)
    await directory.wait_for(lambda workers: "w1" not in workers, SOON)
    assert await redis.keys("kvrelay:lease:*") == []
    await until_gone(redis, "kvrelay:members")
    await silent.withdraw()


async def test_gateways_are_listed_apart(redis: Redis, directory: WorkerDirectory) -> None:
    registration = Registration(redis, KEY, lease_seconds=LEASE, interval=BEAT)
    gateway = GatewayRecord("g1", "127.0.0.1:50051", pid=1)
    epoch = await registration.start(gateway)
    await until(lambda: bool(directory.gateways()))
    assert directory.gateways() == {"g1": replace(gateway, epoch=epoch)}
    assert directory.snapshot() == {}
    await registration.withdraw()
    await until(lambda: not directory.gateways())


async def test_epochs_grow_over_restarts_and_a_wipe(redis: Redis) -> None:
    epochs = []
    for wipe in (False, False, True, True):
        if wipe:
            await redis.flushall()
        registration = new_registration(redis)
        epochs.append(await registration.start(WORKER))
        await registration.withdraw()
        await asyncio.sleep(0.002)  # an epoch after a wipe is as fine as its clock: milliseconds
    assert epochs == sorted(set(epochs))


async def test_epochs_of_many_starts_at_once_differ(redis: Redis) -> None:
    registrations = [new_registration(redis) for _ in range(20)]
    results = await asyncio.gather(*(each.start(WORKER) for each in registrations))
    assert len(set(results)) == 20
    for each in registrations:
        await each.withdraw()


@pytest.mark.parametrize("value", ["nonsense", "-5", "nan", "inf", "1e300"])
async def test_epoch_counter_that_is_no_epoch_counts_as_none(redis: Redis, value: str) -> None:
    await redis.set("kvrelay:epoch:worker:w1", value)
    registration = new_registration(redis)
    assert 10**11 < await registration.start(WORKER) < 2**53
    await registration.withdraw()


async def test_heartbeat_lifts_a_wiped_epoch_counter(redis: Redis, registration: Registration) -> None:
    epoch = await registration.start(WORKER)
    await redis.flushall()
    await registration.heartbeat(LOAD)
    assert await redis.get("kvrelay:epoch:worker:w1") == str(epoch)


async def test_later_start_takes_the_name_over(redis: Redis, directory: WorkerDirectory) -> None:
    older, newer = new_registration(redis), new_registration(redis)
    await older.start(WORKER)
    epoch = await newer.start(replace(WORKER, address="127.0.0.1:7002"))
    await until(lambda: older.superseded)
    await directory.wait_for(lambda workers: "w1" in workers, SOON)
    await older.withdraw()
    await older_has_no_say(directory, epoch)
    assert not newer.superseded
    await newer.withdraw()


async def until_renewed(directory: WorkerDirectory) -> None:
    seen_at = directory.snapshot()["w1"].seen_at
    await directory.wait_for(lambda workers: workers["w1"].seen_at > seen_at, SOON)


async def older_has_no_say(directory: WorkerDirectory, epoch: int) -> None:
    seen_at = directory.snapshot()["w1"].seen_at
    await directory.wait_for(lambda workers: workers["w1"].seen_at > seen_at + 2 * BEAT, SOON)
    assert directory.snapshot()["w1"].record.epoch == epoch


async def test_wiped_redis_is_filled_again_and_nobody_is_dropped(
    redis: Redis, registration: Registration, directory: WorkerDirectory
) -> None:
    await registration.start(WORKER)
    await directory.wait_for(lambda workers: "w1" in workers, SOON)
    changes: list[None] = []
    directory.on_change(lambda: changes.append(None))
    for _ in range(5):
        await redis.flushall()
        await until_renewed(directory)
    assert changes == []


def test_a_heartbeat_carries_the_links() -> None:
    links = (LinkRecord("prefill-0", "shm", 3.1e9, 0.0004), LinkRecord("prefill-1", "nixl", 0.0, 0.0))
    load = replace(LOAD, links=links)
    assert open_lease("worker:w1", seal_lease(Lease(WORKER, 1, load), KEY), KEY).load == load
    assert open_lease("worker:w1", seal_lease(Lease(WORKER, 1, LOAD), KEY), KEY).load == LOAD


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_rate_is_a_finite_number(value: float) -> None:
    for field in ("bandwidth", "latency"):
        rates = {"bandwidth": 1.0, "latency": 1.0, field: value}
        with pytest.raises(ValueError, match="not finite"):
            LinkRecord("prefill-0", "shm", **rates)


def test_a_lease_of_an_older_worker_has_no_links() -> None:
    body = json.loads(seal_lease(Lease(WORKER, 1, LOAD), KEY).partition(".")[2])
    del body["load"]["links"]
    assert from_json(WorkerLoad, body["load"]) == LOAD


def test_a_lease_of_an_older_worker_says_nothing_of_its_steps() -> None:
    body = json.loads(seal_lease(Lease(WORKER, 1, LOAD), KEY).partition(".")[2])
    del body["record"]["max_batched_tokens"], body["record"]["itl_limit"]
    assert from_json(WorkerRecord, body["record"]) == WORKER


@pytest.mark.parametrize("limit", [0.0, 0.25, float("inf")])
def test_a_record_says_what_a_step_is_limited_to(limit: float) -> None:
    record = replace(WORKER, max_batched_tokens=64, itl_limit=limit)
    assert open_lease("worker:w1", seal_lease(Lease(record, 1, LOAD), KEY), KEY).record == record


async def test_on_change_tells_of_state_and_epoch_not_of_load(redis: Redis, directory: WorkerDirectory) -> None:
    changes: list[list[str]] = []
    directory.on_change(lambda: changes.append(sorted(directory.snapshot())))
    load = LOAD
    registration = Registration(redis, KEY, lambda: load, lease_seconds=LEASE, interval=BEAT)
    await registration.start(WORKER)
    await until(lambda: changes == [["w1"]])
    load = replace(LOAD, running=9)
    await directory.wait_for(lambda workers: workers["w1"].load.running == 9, SOON)
    assert len(changes) == 1
    load = replace(LOAD, state=WorkerState.DRAINING)
    await until(lambda: len(changes) == 2)
    await registration.withdraw()
    await until(lambda: changes[-1] == [])


async def test_failing_listener_stops_nothing(registration: Registration, directory: WorkerDirectory) -> None:
    def fail() -> None:
        raise KeyError("listener")

    directory.on_change(fail)
    await registration.start(WORKER)
    await directory.wait_for(lambda workers: "w1" in workers, SOON)


@pytest.mark.parametrize("fault", ["killed", "frozen"])
async def test_outage_loses_no_worker_and_ends_by_itself(
    own_server: PrivateRedis, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    client = await connect(own_server.url, timeout=0.2)
    registration, directory = new_registration(client), new_directory(client)
    epoch = await registration.start(WORKER)
    dead = Registration(client, KEY, lambda: LOAD, lease_seconds=LEASE, interval=3600)
    await dead.start(replace(WORKER, worker_id="dead"))
    await directory.start()
    await directory.wait_for(lambda workers: len(workers) == 2, SOON)
    assert own_server.pid is not None
    os.kill(own_server.pid, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    try:
        await until(lambda: not directory.redis_available)
        with pytest.raises(Unavailable):
            await registration.heartbeat(LOAD)
        seen_at = directory.snapshot()["w1"].seen_at
        await until(lambda: asyncio.get_running_loop().time() - seen_at > 1.5 * LEASE)
        assert directory.snapshot().keys() == {"w1", "dead"}
        if fault == "killed":
            own_server.stop()
            own_server.start()
    finally:
        if fault == "frozen":
            os.kill(own_server.pid, signal.SIGCONT)
    await until(lambda: directory.redis_available)
    assert "w1" in directory.snapshot()
    await directory.wait_for(lambda workers: workers.keys() == {"w1"} and workers["w1"].seen_at > seen_at, SOON)
    assert directory.snapshot()["w1"].record.epoch == epoch
    assert caplog.text.count("heartbeats fail") == 1
    assert caplog.text.count("cannot be reached") == 1
    for each in (registration, dead, directory):
        await (each.stop() if isinstance(each, WorkerDirectory) else each.withdraw())
    await client.aclose()


async def test_start_without_redis(own_server: PrivateRedis) -> None:
    client = await connect(own_server.url)
    own_server.stop()
    with pytest.raises(Unavailable):
        await new_registration(client).start(WORKER)
    directory = new_directory(client)
    await directory.start()
    assert not directory.redis_available
    await directory.stop()
    await client.aclose()


async def test_a_start_waits_for_redis_until_it_is_to_stop(own_server: PrivateRedis) -> None:
    """A worker may have loaded a model for minutes when Redis is away for a moment."""
    client, stopping = await connect(own_server.url), asyncio.Event()
    own_server.stop()
    starting = asyncio.create_task(new_registration(client).start(WORKER, stopping))
    await asyncio.wait([starting], timeout=3 * BEAT)
    stopping.set()
    with pytest.raises(Unavailable):
        await starting
    stopping.clear()
    registration = new_registration(client)
    starting = asyncio.create_task(registration.start(WORKER, stopping))
    await asyncio.wait([starting], timeout=3 * BEAT)
    assert not starting.done()
    own_server.start()
    assert await starting > 0
    await registration.withdraw()
    await client.aclose()


async def test_registration_starts_once(registration: Registration) -> None:
    await registration.start(WORKER)
    with pytest.raises(FailedPrecondition):
        await registration.start(WORKER)


async def test_redis_holds_no_more_than_it_must(redis: Redis, registration: Registration) -> None:
    await registration.start(WORKER)
    assert sorted(await redis.keys("*")) == ["kvrelay:epoch:worker:w1", "kvrelay:lease:worker:w1", "kvrelay:members"]
