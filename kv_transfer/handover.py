"""What a worker holds for another to take over, for one request, from the first block to the end of its lease."""

import asyncio
import enum

from kvrelay.errors import Cancelled, KvrelayError, NotFound, Unavailable

__all__ = ["EndReason", "Handover"]


class EndReason(enum.Enum):
    """Why a handover holds nothing any more."""

    RELEASED = "released"
    EXPIRED = "expired"
    ABORTED = "aborted"
    FAILED = "failed"


class Handover:
    """The blocks of one request, of which a growing number is final.

        computing ──complete──> complete ──┐
            └───────────────end────────────┴──> ended

    Invariant: the first `num_final_blocks` blocks hold their final content, and the number never shrinks; the first
    token is known exactly when the prompt is done, and then all blocks are final. Nothing changes after the end.

    Belongs to one event loop; not thread-safe.

    Attributes:
        completed_at: when the prompt was done, as `complete` was told; None before.
    """

    def __init__(self, request_id: str, block_ids: tuple[int, ...], generations: tuple[int, ...]) -> None:
        self.request_id = request_id
        self.block_ids = block_ids
        self.generations = generations
        self.completed_at: float | None = None
        self._num_final_blocks = 0
        self._first_token_id: int | None = None
        self._end_reason: EndReason | None = None
        self._changed = asyncio.Event()

    @property
    def num_final_blocks(self) -> int:
        return self._num_final_blocks

    @property
    def first_token_id(self) -> int | None:
        return self._first_token_id

    @property
    def end_reason(self) -> EndReason | None:
        return self._end_reason

    def advance(self, num_final_blocks: int) -> None:
        """So many blocks, from the first on, are final. A number that was surpassed already changes nothing.

        Raises:
            ValueError: the handover has fewer blocks.
        """
        if num_final_blocks > len(self.block_ids):
            raise ValueError(f"{num_final_blocks} blocks cannot be final, there are {len(self.block_ids)}")
        if self._end_reason is None and num_final_blocks > self._num_final_blocks:
            self._num_final_blocks = num_final_blocks
            self._notify()

    def complete(self, first_token_id: int, now: float) -> None:
        """The prompt is done: all blocks are final."""
        if self._end_reason is None and self._first_token_id is None:
            self._num_final_blocks = len(self.block_ids)
            self._first_token_id = first_token_id
            self.completed_at = now
            self._notify()

    def end(self, reason: EndReason) -> None:
        """The blocks are held no more; whoever waits gets an error. The first reason stands."""
        if self._end_reason is None:
            self._end_reason = reason
            self._notify()

    def check(self) -> None:
        """Raises: the error that says why the handover ended, if it did."""
        if self._end_reason is not None:
            raise _error(self.request_id, self._end_reason)

    async def wait_beyond(self, num_blocks: int) -> int:
        """Waits until more than `num_blocks` blocks are final; answers how many are.

        Raises:
            Cancelled, NotFound, Unavailable: the handover has ended.
            ValueError: there will never be so many.
        """
        if num_blocks >= len(self.block_ids):
            raise ValueError(f"no more than {len(self.block_ids)} blocks will be final, {num_blocks} are too many")
        while self._num_final_blocks <= num_blocks:
            await self._next_change()
        self.check()
        return self._num_final_blocks

    async def wait_complete(self) -> int:
        """Waits until the prompt is done; answers the first token. Raises as `wait_beyond` does."""
        while self._first_token_id is None:
            await self._next_change()
        self.check()
        return self._first_token_id

    async def wait_ended(self) -> EndReason:
        """Waits until nothing is held any more; answers why."""
        while self._end_reason is None:
            await self._changed.wait()
        return self._end_reason

    async def _next_change(self) -> None:
        self.check()
        await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _error(request_id: str, reason: EndReason) -> KvrelayError:
    if reason is EndReason.ABORTED:
        return Cancelled(f"request {request_id} was cancelled", reason="REQUEST_ABORTED")
    if reason is EndReason.FAILED:
        return Unavailable(f"the prefill of request {request_id} failed", reason="PREFILL_FAILED")
    return NotFound(f"nothing is held for request {request_id} any more", reason="TICKET_UNKNOWN")
