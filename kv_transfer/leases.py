"""Leases: the blocks that a worker holds for others, each with an owner and an end."""

from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.handover import EndReason, Handover
from kv_transfer.tickets import Ticket
from kvrelay import telemetry
from kvrelay.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable

__all__ = ["LeaseTable"]


@dataclass(slots=True)
class _Lease:
    handover: Handover
    owner: str
    ends_with_call: bool
    renewed_at: float


class LeaseTable:
    """Request id -> handover under a lease.

    A lease either ends with the call that it was granted in, however long that waits for a decode worker with room; or
    there is no such call, and it runs out `lease_seconds` after the last of its grant and its renewals. A ticket opens
    what it names for as long as its lease lasts. Times are seconds on a clock that nobody sets, given by the caller.
    Belongs to one event loop.

    Attributes:
        epoch: of this start of the worker; 0 until it has registered.

    Args:
        generation_of: how often a block of the engine's pool has been allocated, at this moment; may be asked from the
            event loop's thread.
        on_free: called with the request id when a release or an expiry ends a lease: the engine may free the blocks.
    """

    def __init__(
        self,
        worker_id: str,
        lease_seconds: float,
        generation_of: Callable[[int], int],
        on_free: Callable[[str], None],
    ) -> None:
        self.worker_id = worker_id
        self.epoch = 0
        self._lease_seconds = lease_seconds
        self._generation_of = generation_of
        self._on_free = on_free
        self._leases: dict[str, _Lease] = {}
        self._expired = telemetry.meter().create_counter(telemetry.Metric.EXPIRED_LEASES)

    def __len__(self) -> int:
        return len(self._leases)

    async def wait_empty(self) -> None:
        """Until nothing is held."""
        while self._leases:
            await next(iter(self._leases.values())).handover.wait_ended()

    def begin_epoch(self, epoch: int) -> None:
        """Ends all leases of the former epoch, whose tickets are refused from now on."""
        for request_id in list(self._leases):
            self._free(request_id, EndReason.EXPIRED)
        self.epoch = epoch

    def grant(
        self,
        request_id: str,
        owner: str,
        block_ids: tuple[int, ...],
        generations: tuple[int, ...],
        now: float,
        *,
        ends_with_call: bool,
    ) -> tuple[Handover, Ticket]:
        """Begins a lease.

        Args:
            owner: the gateway that carries the ticket.
            ends_with_call: a call of the owner's stays open, whose handler calls `end`; so the lease does not run out.

        Raises:
            AlreadyExists: the request has one.
            Unavailable: the worker has no epoch yet.
        """
        if self.epoch == 0:
            raise Unavailable("this worker has not registered yet", reason="NOT_REGISTERED")
        if request_id in self._leases:
            raise AlreadyExists(f"blocks are held for request {request_id} already")
        handover = Handover(request_id, block_ids, generations)
        self._leases[request_id] = _Lease(handover, owner, ends_with_call, renewed_at=now)
        return handover, Ticket(request_id, self.worker_id, self.epoch, block_ids, generations)

    def find(self, ticket: Ticket, now: float) -> Handover:
        """The handover that the ticket opens.

        Raises:
            NotFound: nothing is held for it (any more); reason TICKET_UNKNOWN.
            FailedPrecondition: reason STALE_EPOCH, or STALE_GENERATION if a block means another content by now.
        """
        if ticket.worker_id == self.worker_id and ticket.epoch != self.epoch:
            raise FailedPrecondition("the KV ticket is from an earlier start of this worker", reason="STALE_EPOCH")
        lease = self._leases.get(ticket.request_id)
        if ticket.worker_id != self.worker_id or lease is None or self._end_of(lease) <= now:
            raise NotFound(f"nothing is held for request {ticket.request_id} (any more)", reason="TICKET_UNKNOWN")
        if (ticket.block_ids, ticket.generations) != (lease.handover.block_ids, lease.handover.generations):
            raise _stale_generation()
        self.verify(lease.handover, 0, len(ticket.block_ids))
        return lease.handover

    def pass_to(self, request_id: str, owner: str) -> None:
        """A decode worker pulls: the lease is that one's from now on. Unknown ids are passed over."""
        lease = self._leases.get(request_id)
        if lease is not None:
            lease.owner = owner

    def renew(self, request_id: str, now: float) -> None:
        """The decode worker is at work: the lease begins anew. Unknown ids are passed over."""
        lease = self._leases.get(request_id)
        if lease is not None:
            lease.renewed_at = max(lease.renewed_at, now)

    def verify(self, handover: Handover, first: int, count: int) -> None:
        """Proves that blocks `[first, first + count)` of the handover were held, and unchanged, until now.

        Raises:
            Cancelled, NotFound, Unavailable: the handover has ended.
            FailedPrecondition: a block was given to another sequence; reason STALE_GENERATION.
        """
        handover.check()
        run = slice(first, first + count)
        for block_id, generation in zip(handover.block_ids[run], handover.generations[run], strict=True):
            if self._generation_of(block_id) != generation:
                raise _stale_generation()

    def release(self, ticket: Ticket, now: float) -> None:
        """Ends the lease. That it does not raise proves that the blocks were held, and unchanged, until now.

        Raises:
            NotFound, FailedPrecondition: as `find`, or reason PREFILL_INCOMPLETE.
        """
        if self.find(ticket, now).first_token_id is None:
            raise FailedPrecondition("the prompt is still being computed", reason="PREFILL_INCOMPLETE")
        self._free(ticket.request_id, EndReason.RELEASED)

    def expire(self, now: float) -> list[str]:
        """Ends the leases that have run out; answers their request ids. To be called every second or so."""
        expired = [request_id for request_id, lease in self._leases.items() if self._end_of(lease) <= now]
        for request_id in expired:
            self._expired.add(1)
            self._free(request_id, EndReason.EXPIRED)
        return expired

    def end(self, request_id: str, reason: EndReason) -> None:
        """Who was granted the lease ends it himself, so `on_free` is not called. Unknown ids are passed over."""
        lease = self._leases.pop(request_id, None)
        if lease is not None:
            lease.handover.end(reason)

    def owner(self, request_id: str) -> str | None:
        """Who has to end the lease: the gateway or, once one has pulled, the decode worker; None for unknown ids."""
        lease = self._leases.get(request_id)
        return None if lease is None else lease.owner

    def lease_seconds(self, request_id: str, now: float) -> float | None:
        """Seconds until the lease runs out; None where it ends with a call, and for unknown ids."""
        lease = self._leases.get(request_id)
        if lease is None or lease.ends_with_call:
            return None
        return max(0.0, self._end_of(lease) - now)

    def _end_of(self, lease: _Lease) -> float:
        return float("inf") if lease.ends_with_call else lease.renewed_at + self._lease_seconds

    def _free(self, request_id: str, reason: EndReason) -> None:
        self.end(request_id, reason)
        self._on_free(request_id)


def _stale_generation() -> FailedPrecondition:
    return FailedPrecondition("a block of the KV ticket holds something else by now", reason="STALE_GENERATION")
