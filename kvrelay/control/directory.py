"""The reading side of the registry: an image of all workers and gateways that is renewed again and again."""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from redis.asyncio import Redis

from kvrelay.control.membership import Membership, WorkerEntry
from kvrelay.control.registry import GatewayRecord, RejectedLease, open_lease
from kvrelay.control.script import Scripts
from kvrelay.errors import Unavailable
from kvrelay.request import WorkerState

__all__ = ["WorkerDirectory"]

_LOGGER = logging.getLogger(__name__)
_LONGEST_LEASE = 1 << 16  # bytes
_REJECTIONS_REMEMBERED = 1000


class WorkerDirectory:
    """What the registry says, kept at hand: looking something up is no I/O.

    While Redis is unreachable the last image stays, and after that every member has a lease's time to show itself
    again. Leases that are forged or malformed are counted, logged once and put aside in Redis.

    Args:
        cluster_key: the secret that all processes of the cluster share.
        lease_seconds: a member is dropped after this time without a heartbeat.
        interval: seconds between two looks into Redis.
    """

    def __init__(self, redis: Redis, cluster_key: bytes, *, lease_seconds: float, interval: float) -> None:
        self._cluster_key = cluster_key
        self._interval = interval
        scripts = Scripts(redis)
        self._read_leases = scripts.load("registry", "read_leases")
        self._reject_lease = scripts.load("registry", "reject_lease")
        self._membership = Membership(lease_seconds)
        self._workers: Mapping[str, WorkerEntry] = MappingProxyType({})
        self._gateways: Mapping[str, GatewayRecord] = MappingProxyType({})
        self._readable_since: float | None = None
        self._num_rejected = 0
        self._logged_rejections: dict[str, bytes] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._refreshed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    @property
    def redis_available(self) -> bool:
        """Whether the last look into Redis succeeded."""
        return self._readable_since is not None

    @property
    def num_rejected(self) -> int:
        """How often a lease was refused as forged or malformed."""
        return self._num_rejected

    def snapshot(self) -> Mapping[str, WorkerEntry]:
        """The workers by id. The mapping is never changed; the next look makes a new one."""
        return self._workers

    def gateways(self) -> Mapping[str, GatewayRecord]:
        """The gateways by id."""
        return self._gateways

    def on_change(self, callback: Callable[[], None]) -> None:
        """Calls back after a worker or gateway came, went, started anew, or changed its state; not for mere load."""
        self._callbacks.append(callback)

    async def start(self) -> None:
        """Takes a first look and keeps looking. Does not fail without Redis."""
        await self._look()
        self._task = asyncio.create_task(self._run(), name="worker directory")

    async def stop(self) -> None:
        """Stops looking; the last image stays."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def wait_for(self, predicate: Callable[[Mapping[str, WorkerEntry]], bool], timeout: float) -> None:
        """Returns as soon as the predicate holds for a snapshot.

        Raises:
            TimeoutError: after that many seconds.
        """
        async with asyncio.timeout(timeout), self._refreshed:
            await self._refreshed.wait_for(lambda: predicate(self._workers))

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self._look()

    async def _look(self) -> None:
        try:
            reply = await self._read_leases(_LONGEST_LEASE)
        except Unavailable:
            if self.redis_available:
                _LOGGER.warning("Redis cannot be reached; the workers last seen stay in use")
            self._readable_since = None
        else:
            await self._take(dict(zip(reply[::2], reply[1::2], strict=True)))
        async with self._refreshed:
            self._refreshed.notify_all()

    async def _take(self, leases: Mapping[str, str]) -> None:
        now = time.monotonic()
        if self._readable_since is None:
            self._readable_since = now
        rejected = [(member, text) for member, text in leases.items() if not self._renew(member, text, now)]
        self._membership.expire(now, self._readable_since)
        self._publish()
        for member, text in rejected:
            with contextlib.suppress(Unavailable):
                await self._reject_lease(member, text)

    def _renew(self, member: str, text: str, now: float) -> bool:
        try:
            lease = open_lease(member, text, self._cluster_key)
        except RejectedLease as error:
            self._note_rejection(member, text, error)
            return False
        self._membership.renew(lease, now)
        return True

    def _note_rejection(self, member: str, text: str, error: RejectedLease) -> None:
        self._num_rejected += 1
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
        if self._logged_rejections.get(member) != digest:
            if len(self._logged_rejections) >= _REJECTIONS_REMEMBERED:
                self._logged_rejections.clear()
            self._logged_rejections[member] = digest
            _LOGGER.warning("lease of %r refused: %s", member, error)

    def _publish(self) -> None:
        before = _identities(self._workers, self._gateways)
        self._workers = MappingProxyType(dict(self._membership.workers()))
        self._gateways = MappingProxyType(dict(self._membership.gateways()))
        after = _identities(self._workers, self._gateways)
        if before == after:
            return
        _LOGGER.info("members: %s", ", ".join(sorted([*self._workers, *self._gateways])) or "none")
        for callback in self._callbacks:
            try:
                callback()
            except Exception:
                # The directory serves others too; one listener's defect is not theirs.
                _LOGGER.exception("a listener of the worker directory failed")


def _identities(
    workers: Mapping[str, WorkerEntry], gateways: Mapping[str, GatewayRecord]
) -> tuple[dict[str, tuple[int, WorkerState]], dict[str, int]]:
    """What `on_change` tells about."""
    return (
        {worker_id: (entry.record.epoch, entry.load.state) for worker_id, entry in workers.items()},
        {gateway_id: record.epoch for gateway_id, record in gateways.items()},
    )
