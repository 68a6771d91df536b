"""Who is alive, by the leases seen: a policy without I/O or a clock of its own."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvrelay.control.registry import GatewayRecord, Lease, WorkerLoad, WorkerRecord

__all__ = ["Membership", "WorkerEntry"]


@dataclass(frozen=True, slots=True)
class WorkerEntry:
    """One worker as its last heartbeat showed it.

    Attributes:
        seen_at: when this process first saw that heartbeat, on the clock of `time.monotonic`.
    """

    record: WorkerRecord
    load: WorkerLoad
    seen_at: float


class Membership:
    """The members whose last new heartbeat is younger than a lease.

    Only a new heartbeat of the highest epoch keeps a member: a missing key says nothing (Redis may have been wiped)
    and an old lease proves nothing (it may be a replay). Time in which Redis could not be read does not count.
    """

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._latest: dict[str, tuple[int, int]] = {}
        self._alive: dict[str, tuple[Lease, float]] = {}

    def renew(self, lease: Lease, now: float) -> None:
        """Takes notice of a lease; an old one changes nothing."""
        member = lease.record.member
        if lease.order <= self._latest.get(member, (0, 0)):
            return
        self._latest[member] = lease.order
        if lease.withdrawn:
            self._alive.pop(member, None)
        else:
            self._alive[member] = lease, now

    def expire(self, now: float, readable_since: float) -> None:
        """Drops the members that were silent for a lease, all of it in a time in which Redis could be read."""
        for member, (_, seen_at) in list(self._alive.items()):
            if now - max(seen_at, readable_since) >= self._lease_seconds:
                del self._alive[member]

    def workers(self) -> Mapping[str, WorkerEntry]:
        """By worker id."""
        return {
            lease.record.worker_id: WorkerEntry(lease.record, lease.load, seen_at)
            for lease, seen_at in self._alive.values()
            if isinstance(lease.record, WorkerRecord) and lease.load is not None
        }

    def gateways(self) -> Mapping[str, GatewayRecord]:
        """By gateway id."""
        return {
            lease.record.gateway_id: lease.record
            for lease, _ in self._alive.values()
            if isinstance(lease.record, GatewayRecord)
        }
