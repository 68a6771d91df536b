"""The writing side of the registry: a worker or a gateway that says again and again that it is there."""

import asyncio
import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Awaitable, Callable

from redis.asyncio import Redis

from kvrelay.control.registry import (
    GatewayRecord,
    Lease,
    WorkerLoad,
    WorkerRecord,
    seal_lease,
)
from kvrelay.control.script import Scripts
from kvrelay.errors import FailedPrecondition, Unavailable

__all__ = ["Registration"]

_LOGGER = logging.getLogger(__name__)


class Registration:
    """One member's lease, renewed by a task of its own until it is withdrawn.

    Each heartbeat writes everything there is to know of the member, so a wiped Redis is filled again by itself. A
    Redis that fails is logged once and tried again for ever. A later start of the same id takes the lease away:
    `superseded` tells, and nothing is written any more.

    A process that did not run for as long as its lease was taken for lost, and its work goes on elsewhere; so when it
    runs again it says nothing more under its epoch, and begins a new one.

    Args:
        cluster_key: the secret that all processes of the cluster share.
        load: asked at each heartbeat; None for a gateway.
        on_lapse: awaited after the process did not run for as long as its lease; ends what it was doing, and lets it
            do nothing else.
        on_new_epoch: called with each epoch after the first: it may go on.
        lease_seconds: after this time without a heartbeat the member counts as gone.
        interval: seconds between heartbeats.
    """

    def __init__(
        self,
        redis: Redis,
        cluster_key: bytes,
        load: Callable[[], WorkerLoad] | None = None,
        *,
        lease_seconds: float,
        interval: float,
        on_lapse: Callable[[], Awaitable[None]] | None = None,
        on_new_epoch: Callable[[int], None] = lambda epoch: None,
    ) -> None:
        self._cluster_key = cluster_key
        self._load = load
        self._lease_seconds = lease_seconds
        self._on_lapse = on_lapse
        self._on_new_epoch = on_new_epoch
        self._interval = interval
        scripts = Scripts(redis)
        self._next_epoch = scripts.load("registry", "next_epoch")
        self._write_lease = scripts.load("registry", "heartbeat")
        self._record: WorkerRecord | GatewayRecord | None = None
        self._beat = 0
        self._ran_at = 0.0
        self._superseded = False
        self._failing = False
        self._task: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def superseded(self) -> bool:
        """Whether the last heartbeat was refused because a later start of the same id has registered."""
        return self._superseded

    async def start(self, record: WorkerRecord | GatewayRecord, stopping: asyncio.Event | None = None) -> int:
        """Registers; the record's own epoch is passed over.

        Args:
            stopping: while it is not set, an outage of Redis is waited for: a model that has been loaded meanwhile is
                not to be loaded again.

        Returns:
            The epoch, which is higher than any that this id had before.

        Raises:
            Unavailable: Redis cannot be reached.
            FailedPrecondition: this Registration has been started already.
        """
        if self._task is not None:
            raise FailedPrecondition("The registration has been started already.")
        while True:
            try:
                return await self._start(record)
            except Unavailable:
                if stopping is None or stopping.is_set():
                    raise
                self._note_outage(None)
            await asyncio.sleep(self._interval)

    async def _start(self, record: WorkerRecord | GatewayRecord) -> int:
        epoch = int(await self._next_epoch(record.member))
        self._record = dataclasses.replace(record, epoch=epoch)
        self._beat = 0
        await self.heartbeat(self._load() if self._load else None)
        self._task = asyncio.create_task(self._run(), name=f"heartbeat of {record.member}")
        if self._on_lapse is not None:
            watch = self._watch_own_silence(self._on_lapse)
            self._watch = asyncio.create_task(watch, name=f"silence of {record.member}")
        return epoch

    async def heartbeat(self, load: WorkerLoad | None) -> None:
        """Renews the lease at once, with this load, in one round trip. Does nothing while a new epoch has to begin.

        Raises:
            Unavailable: Redis cannot be reached.
            FailedPrecondition: before `start` or after `withdraw`.
        """
        if not self._lapsed:
            await self._write(load, withdrawn=False)

    async def withdraw(self) -> None:
        """Ends the lease; readers drop the member at their next look. Without Redis it ends by itself."""
        if self._task is None:
            return
        tasks = [task for task in (self._task, self._watch) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._task = self._watch = None
        # A signed farewell, because readers do not believe a key that is merely missing.
        with contextlib.suppress(Unavailable):
            await self._write(self._load() if self._load else None, withdrawn=True)
        self._record = None

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.heartbeat(self._load() if self._load else None)
            except Unavailable:
                self._note_outage(None)
            except Exception as error:
                # A defect in what tells the load must not take the worker's name away silently.
                self._note_outage(error)
            else:
                self._failing = False

    async def _watch_own_silence(self, on_lapse: Callable[[], Awaitable[None]]) -> None:
        # Apart from the heartbeats, because these may wait for Redis, which is no silence of this process.
        while True:
            self._ran_at = _now()
            await asyncio.sleep(self._interval)
            if self._lapsed:
                await self._begin_anew(on_lapse)

    @property
    def _lapsed(self) -> bool:
        """Whether the process did not run for as long as its lease, and has no new epoch yet.

        By the clock, for what is due when it runs again runs in any order, the watch after a heartbeat maybe.
        """
        return self._watch is not None and _now() - self._ran_at >= self._lease_seconds

    async def _begin_anew(self, on_lapse: Callable[[], Awaitable[None]]) -> None:
        _LOGGER.warning("this process did not run for a while; it begins a new epoch")
        await on_lapse()
        while (record := self._record) is not None:
            try:
                epoch = int(await self._next_epoch(record.member))
            except Unavailable:
                await asyncio.sleep(self._interval)
                continue
            self._record = dataclasses.replace(record, epoch=epoch)
            self._beat = 0
            self._on_new_epoch(epoch)
            return

    def _note_outage(self, error: Exception | None) -> None:
        if not self._failing:
            _LOGGER.warning("heartbeats fail; they are tried again", exc_info=error)
        self._failing = True

    async def _write(self, load: WorkerLoad | None, *, withdrawn: bool) -> None:
        record = self._record
        if record is None:
            raise FailedPrecondition("The registration has not been started.")
        self._beat += 1
        lease = Lease(record, self._beat, load, withdrawn)
        text = seal_lease(lease, self._cluster_key)
        accepted = await self._write_lease(record.member, text, int(self._lease_seconds * 1000), record.epoch)
        if not accepted and not self._superseded:
            _LOGGER.error("%s: a later start has taken over; this process is out of the registry", record.member)
        self._superseded = not accepted


def _now() -> float:
    """Seconds, those too in which the machine was suspended; `time.monotonic` leaves these out on Linux."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
