"""A worker as the source of handovers: its leases, the service that others pull by, and the end of what none pulls."""

import asyncio
import time
from collections.abc import Mapping
from typing import Protocol

from kv_transfer.handover import Handover
from kv_transfer.leases import LeaseTable
from kv_transfer.service import KvService
from kv_transfer.shm import offer_pool
from kv_transfer.tickets import sign_ticket
from kvrelay.control.registry import ShmOffer
from kvrelay.engine.async_engine import AsyncEngine
from kvrelay.engine.kv_cache import KvCache
from kvrelay.rpc import Service
from kvrelay.v1 import kv_pb2_grpc

__all__ = ["HandoverSource"]

LEASE_CHECK_SECONDS = 0.25


class Call(Protocol):
    """A gateway's, for one request."""

    gateway_id: str


class HandoverSource:
    """Holds KV caches for workers that pull them, until they have, or do not in time. Belongs to one event loop.

    Args:
        calls: in progress on the worker, by request id; whoever calls keeps it up to date.

    Attributes:
        leases: on the blocks of the worker's engine.
        service: for the worker's server.
    """

    def __init__(
        self,
        worker_id: str,
        engine: AsyncEngine,
        cache: KvCache,
        key: bytes,
        lease_seconds: float,
        calls: Mapping[str, Call],
    ) -> None:
        self._cache = cache
        self._key = key
        self._calls = calls
        self._expiry: asyncio.Task[None] | None = None
        self.leases = LeaseTable(worker_id, lease_seconds, engine.generation, engine.abort)
        servicer = KvService(self.leases, cache, key)
        self.service = Service("kvrelay.v1.KvService", kv_pb2_grpc.add_KvServiceServicer_to_server, servicer, work=())

    def begin(self, epoch: int) -> None:
        """The worker has this epoch from now on; what was granted in a former one holds nothing."""
        self.leases.begin_epoch(epoch)
        if self._expiry is None:
            self._expiry = asyncio.create_task(self._expire(), name="lease expiry")

    def stop(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()

    def grant(
        self,
        request_id: str,
        owner: str,
        block_ids: tuple[int, ...],
        generations: tuple[int, ...],
        *,
        ends_with_call: bool,
    ) -> tuple[Handover, bytes]:
        """As `LeaseTable.grant`, now, with the ticket signed."""
        handover, ticket = self.leases.grant(
            request_id, owner, block_ids, generations, time.monotonic(), ends_with_call=ends_with_call
        )
        return handover, sign_ticket(ticket, self._key)

    async def wait_released(self) -> None:
        """Until nothing is held for other workers."""
        await self.leases.wait_empty()

    def shared_memory(self) -> ShmOffer | None:
        """How other processes of this host reach the KV pool, if they are to."""
        return offer_pool(self._cache)

    def owner(self, request_id: str) -> str:
        """Who has to end what holds a request's blocks; empty for who has done so."""
        call = self._calls.get(request_id)
        return self.leases.owner(request_id) or ("" if call is None else call.gateway_id)

    def lease_seconds(self, request_id: str) -> float | None:
        """As `LeaseTable.lease_seconds`, now."""
        return self.leases.lease_seconds(request_id, time.monotonic())

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(LEASE_CHECK_SECONDS)
            self.leases.expire(time.monotonic())
