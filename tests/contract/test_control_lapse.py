"""A process that did not run for as long as its registration lasts was taken for lost, and is another afterwards."""

import asyncio
import time
from functools import partial

import pytest
from redis.asyncio import Redis

from kvrelay.control.directory import WorkerDirectory
from kvrelay.control.registration import Registration
from kvrelay.control.registry import Lease, seal_lease
from tests.contract.registry_kit import BEAT, KEY, LEASE, LOAD, WORKER
from tests.patience import SOON, until

pytest_plugins = ["tests.contract.redis_kit", "tests.contract.registry_kit"]


def stand_still(seconds: float) -> None:
    """For so long nothing of this process's event loop runs, as if the process had been stopped."""
    time.sleep(seconds)


def telling(redis: Redis) -> tuple[Registration, list[object]]:
    """A registration, and what it tells its worker: "lapse", then the new epoch."""
    told: list[object] = []

    async def on_lapse() -> None:
        told.append("lapse")

    registration = Registration(
        redis, KEY, lambda: LOAD, lease_seconds=LEASE, interval=BEAT, on_lapse=on_lapse, on_new_epoch=told.append
    )
    return registration, told


async def test_a_process_that_did_not_run_begins_a_new_epoch(redis: Redis, directory: WorkerDirectory) -> None:
    """First it ends what it was doing, then it says that it is there again, as somebody else."""
    registration, told = telling(redis)
    epoch = await registration.start(WORKER)
    await directory.wait_for(lambda workers: "w1" in workers, SOON)
    stand_still(1.5 * LEASE)
    await directory.wait_for(lambda workers: "w1" in workers and workers["w1"].record.epoch > epoch, SOON)
    first, second, *_ = told  # once more each time that a busy machine lets this process stand still for so long
    assert first == "lapse"
    assert second in range(epoch + 1, directory.snapshot()["w1"].record.epoch + 1)
    await registration.withdraw()


async def test_a_process_that_did_not_run_says_nothing_more_under_its_epoch(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int]] = []

    async def on_lapse() -> None:
        told.append(("lapse", epoch))
        await asyncio.sleep(5 * BEAT)

    def begin(new_epoch: int) -> None:
        told.append(("begins", new_epoch))

    def seal(lease: Lease, key: bytes) -> str:
        told.append(("heartbeat", lease.record.epoch))
        return seal_lease(lease, key)

    monkeypatch.setattr("kvrelay.control.registration.seal_lease", seal)
    registration = Registration(
        redis, KEY, lambda: LOAD, lease_seconds=LEASE, interval=BEAT, on_lapse=on_lapse, on_new_epoch=begin
    )
    epoch = await registration.start(WORKER)
    await asyncio.sleep(2 * BEAT)
    assert ("heartbeat", epoch) in told
    told.clear()
    stand_still(1.5 * LEASE)
    await until(lambda: any(what == "heartbeat" and whose > epoch for what, whose in told))
    assert [what for what, _ in told][:3] == ["lapse", "begins", "heartbeat"]
    await registration.withdraw()


class Clock:
    """Stands still until it is set, however long the machine takes; counts how often it is looked at."""

    def __init__(self) -> None:
        self.seconds, self.num_looks = 0.0, 0

    def __call__(self) -> float:
        self.num_looks += 1
        return self.seconds

    def was_looked_at(self, times: int) -> bool:
        return self.num_looks >= times


async def test_a_machine_that_was_suspended_begins_a_new_epoch(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop's own clock stood still meanwhile, as the process did. Else there is no new epoch."""
    clock = Clock()
    monkeypatch.setattr("kvrelay.control.registration._now", clock)
    registration, told = telling(redis)
    epoch = await registration.start(WORKER)
    for seconds in (0.0, 0.9 * LEASE):
        clock.seconds = seconds
        await until(partial(clock.was_looked_at, clock.num_looks + 5))
        assert told == []
    clock.seconds += 1.5 * LEASE
    await until(lambda: len(told) == 2)
    assert told[0] == "lapse"
    assert isinstance(told[1], int)
    assert told[1] > epoch
    await registration.withdraw()
