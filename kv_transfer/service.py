"""The prefill worker's end of the handover."""

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from kv_transfer.blocks import checksums
from kv_transfer.handover import Handover
from kv_transfer.layouts import PROTOCOL_VERSION, check_layouts, check_versions, layout_to_proto
from kv_transfer.sampling import verified_positions
from kv_transfer.senders import Senders
from kv_transfer.threads import run_on_blocks
from kv_transfer.tickets import Ticket, open_ticket
from kv_transfer.transport import BlockSender
from kvrelay import failpoints
from kvrelay.engine.kv_cache import KvCache
from kvrelay.errors import InvalidArgument
from kvrelay.v1 import kv_pb2, kv_pb2_grpc

__all__ = ["KvService", "Leases"]

log = logging.getLogger(__name__)

# Of one event; a sender that puts bytes into it may want less.
MAX_RUN_BYTES = 16 << 20
MAX_PROBE_BYTES = 16 << 20
PROBE_PART_BYTES = 1 << 20


class Leases(Protocol):
    """What the service needs of `kv_transfer.leases.LeaseTable`, which says what the methods mean."""

    @property
    def worker_id(self) -> str: ...

    @property
    def epoch(self) -> int: ...

    def find(self, ticket: Ticket, now: float) -> Handover: ...

    def pass_to(self, request_id: str, owner: str) -> None: ...

    def renew(self, request_id: str, now: float) -> None: ...

    def verify(self, handover: Handover, first: int, count: int) -> None: ...

    def release(self, ticket: Ticket, now: float) -> None: ...


class KvService(kv_pb2_grpc.KvServiceServicer):
    """Pairs with decode workers, streams them the blocks of a ticket as they become final, and ends the lease.

    Args:
        key: the cluster's, which authenticates tickets.
        clock: of the leases, in seconds.
    """

    def __init__(
        self,
        leases: Leases,
        cache: KvCache,
        key: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leases = leases
        self._cache = cache
        self._key = key
        self._clock = clock
        self._senders = Senders(cache)

    async def Pair(self, request: kv_pb2.PairRequest, context: Any) -> kv_pb2.PairResponse:
        check_versions(request.protocol_version)
        layout = layout_to_proto(self._cache.layout)
        check_layouts(layout, request.layout)
        log.info("paired with decode worker %s, epoch %d", request.decode_worker_id, request.decode_epoch)
        return kv_pb2.PairResponse(
            prefill_worker_id=self._leases.worker_id,
            prefill_epoch=self._leases.epoch,
            layout=layout,
            protocol_version=PROTOCOL_VERSION,
            transports=self._senders.names(request.shared_pool),
            shared_pool=b"" if self._cache.shared is None else self._cache.shared.nonce,
        )

    async def Export(self, request: kv_pb2.ExportRequest, context: Any) -> kv_pb2.ExportResponse:
        return await self._senders.export(request.transport)

    async def Probe(self, request: kv_pb2.ProbeRequest, context: Any) -> AsyncIterator[kv_pb2.ProbeResponse]:
        if request.num_bytes > MAX_PROBE_BYTES:
            raise InvalidArgument.field("num_bytes", f"{request.num_bytes}; the limit is {MAX_PROBE_BYTES}")
        for start in range(0, request.num_bytes, PROBE_PART_BYTES):
            yield kv_pb2.ProbeResponse(data=bytes(min(PROBE_PART_BYTES, request.num_bytes - start)))

    async def Pull(self, request: kv_pb2.PullRequest, context: Any) -> AsyncIterator[kv_pb2.PullResponse]:
        ticket = open_ticket(request.ticket, self._key)
        handover = self._leases.find(ticket, self._clock())
        self._leases.pass_to(handover.request_id, request.decode_worker_id)
        sender = self._senders.find(request.transport)
        position, total = request.skip_blocks, len(handover.block_ids)
        max_blocks = max(1, min(MAX_RUN_BYTES, sender.max_event_bytes) // self._cache.layout.block_bytes)
        if position > total:
            raise InvalidArgument.field("skip_blocks", f"{position}, but the ticket has {total} blocks")
        while position < total:
            at_once = handover.num_final_blocks > position
            num_final = await handover.wait_beyond(position)
            count = min(num_final - position, max_blocks)
            verified = verified_positions(request.checksum, request.ticket, position, count, total)
            await failpoints.reach("pull.before_blocks")
            event = await self._ready_blocks(handover, sender, range(position, position + count), verified)
            event.ready.followed_at_once = at_once
            yield event
            await failpoints.reach("pull.after_blocks")
            position += count
        first_token_id = await handover.wait_complete()
        self._leases.renew(handover.request_id, self._clock())
        since_done = max(0.0, self._clock() - (handover.completed_at or 0.0))
        complete = kv_pb2.PrefillComplete(first_token_id=first_token_id, seconds_since_done=since_done)
        yield kv_pb2.PullResponse(complete=complete)

    async def Release(self, request: kv_pb2.ReleaseRequest, context: Any) -> kv_pb2.ReleaseResponse:
        await failpoints.reach("release.before")
        self._leases.release(open_ticket(request.ticket, self._key), self._clock())
        await failpoints.reach("release.after")
        return kv_pb2.ReleaseResponse()

    async def _ready_blocks(
        self, handover: Handover, sender: BlockSender, run: range, verified: Sequence[int]
    ) -> kv_pb2.PullResponse:
        """Reads a run, and proves afterwards that it was still held, so nobody else's bytes leave this process.

        Args:
            run: positions in the ticket.
            verified: those of them that get a checksum.
        """
        self._leases.renew(handover.request_id, self._clock())
        block_ids = handover.block_ids[run.start : run.stop]

        def read() -> kv_pb2.PullResponse:
            # Filled in place, because a finished message is copied when it is put into another.
            event = kv_pb2.PullResponse()
            event.ready.first, event.ready.count = run.start, len(run)
            event.ready.checksums.extend(checksums(self._cache, [handover.block_ids[each] for each in verified]))
            event.ready.data = sender.payload(block_ids)
            return event

        event = await run_on_blocks(self._cache, len(run), read)
        self._leases.verify(handover, run.start, len(run))
        return event
