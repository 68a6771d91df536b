"""How a fault strikes: signals to processes, failpoints in them, and what links do to what passes."""

import asyncio
import signal
from collections.abc import Callable

from tests.faults.faults import Fault, Kind
from tests.faults.proxy import Link
from tests.faults.rig import Rig

__all__ = ["Strike"]

END_SECONDS = 20.0
SIGNALS = {Kind.KILL: signal.SIGKILL, Kind.DRAIN: signal.SIGTERM, Kind.FREEZE: signal.SIGSTOP}


class Strike:
    """One fault, which is not of a client, on its way into a cluster.

    Args:
        on_begun: called when it has struck, as far as it is up to us; a link may still wait for somebody to come.
    """

    def __init__(self, rig: Rig, fault: Fault, on_begun: Callable[[], None]) -> None:
        self.fault = fault
        self._rig = rig
        self._on_begun = on_begun
        self._has_begun = False
        self._link: Link | None = rig.link(fault.client, fault.target) if fault.client else None
        self._num_met = self._count()
        self._num_ends = 0

    @property
    def met_somebody(self) -> bool:
        if self.fault.kind in (Kind.FAILPOINT, Kind.FLIP, Kind.DELAY, Kind.STALL):
            return self._count() > self._num_met
        return self._has_begun

    def _count(self) -> int:
        """What it has met since the start of the rig."""
        if self.fault.failpoint is not None:
            return self._rig.processes[self.fault.target].met()[self.fault.failpoint.point]
        return 0 if self._link is None else self._link.num_struck

    async def exit_code(self) -> int:
        """With which the process ended that was struck. Raises: AssertionError if it does not end."""
        process = self._rig.processes[self.fault.target]

        async def has_ended() -> bool:
            return len(process.exit_codes) > self._num_ends

        await self._rig.eventually(has_ended, END_SECONDS, f"{process.name} ends")
        return process.exit_codes[self._num_ends]

    def arm(self) -> None:
        """Puts a failpoint in force, which then waits for its moment by itself."""
        if self.fault.failpoint is not None:
            self._rig.member(self.fault.target).away_seconds = self.fault.seconds
            self._rig.processes[self.fault.target].arm(str(self.fault.failpoint))

    async def at_last(self) -> None:
        """The moment of anything else has come. Ends with what it does, if that ends by itself."""
        fault = self.fault
        await asyncio.sleep(fault.pause)
        if self._link is not None:
            await self._strike_link(self._link)
            return
        if fault.kind is Kind.WIPE:
            self._rig.redis.wipe()
        else:
            member = self._rig.member(fault.target)
            member.away_seconds = fault.seconds
            self._num_ends = len(member.exit_codes)
            member.signal(SIGNALS[fault.kind])
        self._begin()

    def _begin(self) -> None:
        self._has_begun = True
        self._on_begun()

    async def _strike_link(self, link: Link) -> None:
        fault = self.fault
        match fault.kind:
            case Kind.CUT | Kind.REFUSE:
                link.refuses = fault.kind is Kind.REFUSE
                link.cut()
            case Kind.DELAY:
                link.delay = fault.seconds
            case Kind.STALL:
                link.stalled = fault.stalled
            case Kind.FLIP:
                link.num_flips = 1
        self._begin()
        if fault.kind not in (Kind.DELAY, Kind.FLIP):  # which last to the end
            await asyncio.sleep(fault.seconds)
            link.heal()
