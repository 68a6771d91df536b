"""When a request takes its blocks on the decode worker: with the ticket, or not before prefill is nearly done.

Early, transfer and prefill overlap from the first block on, but the blocks stand idle for as long as prefill takes.
Late, they serve others until then, and only the transfer of what was computed before is not hidden. So the decode
worker's free blocks decide.
"""

import asyncio

__all__ = ["Reservation", "reserves_late"]

# A prompt that leaves others less than its own size again would be in their way.
PLENTY = 2


def reserves_late(num_blocks: int, blocks_free: int, blocks_promised: int) -> bool:
    """Whether a request should let the decode worker's blocks be until prefill is nearly done.

    Args:
        num_blocks: what the request needs.
        blocks_free: by the worker's last heartbeat.
        blocks_promised: what others are going to take of them.
    """
    return blocks_free - blocks_promised < PLENTY * num_blocks


class Reservation:
    """Lets one request's Decode call begin: at once, or when its prefill worker says that one chunk is left.

    The first token lets it begin at the latest, so a prefill worker that announces nothing costs time only.
    """

    def __init__(self, late: bool) -> None:
        self.late = late
        self._due = asyncio.Event()
        if not late:
            self._due.set()

    def make_due(self) -> None:
        """Prefill has come so far."""
        self._due.set()

    async def wait(self) -> None:
        """Until the blocks may be reserved."""
        await self._due.wait()
