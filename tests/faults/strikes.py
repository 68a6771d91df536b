"""How a fault strikes: signals to processes, failpoints in them, and what links do to what passes."""

import asyncio
import signal

from tests.faults.faults import Fault, Kind
from tests.faults.proxy import Link
from tests.faults.rig import Rig

__all__ = ["Strike"]

END_SECONDS = 20.0
SIGNALS = {Kind.KILL: signal.SIGKILL, Kind.DRAIN: signal.SIGTERM, Kind.FREEZE: signal.SIGSTOP}


class Strike:
    """One fault, which is not of a client, on its way into a cluster.

    Attributes:
        begun: it has struck, as far as it is up to us; a failpoint or a link may still wait for somebody to come.
    """

    def __init__(self, rig: Rig, fault: Fault) -> None:
        self.fault = fault
        self.begun = asyncio.Event()
        self._rig = rig
        self._link: Link | None = rig.link(fault.client, fault.target) if fault.client else None
        self._num_met = self._count()
        self._num_ends = 0

    @property
    def met_somebody(self) -> bool:
        if self.fault.kind in (Kind.FAILPOINT, Kind.FLIP, Kind.DELAY, Kind.STALL):
            return self._count() > self._num_met
        return self.begun.is_set()

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

    async def at_last(self) -> None:
        """Its moment has come. Ends with what it does, if that ends by itself."""
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
            if fault.failpoint is not None:
                self._rig.processes[fault.target].arm(str(fault.failpoint))
            else:
                self._num_ends = len(member.exit_codes)
                member.signal(SIGNALS[fault.kind])
        self.begun.set()

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
        self.begun.set()
        if fault.kind not in (Kind.DELAY, Kind.FLIP):  # which last to the end
            await asyncio.sleep(fault.seconds)
            link.heal()
