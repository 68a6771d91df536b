"""How the bytes of blocks travel: the two roles, and what a transfer that failed leaves behind.

A transport is a sender on the prefill worker and a receiver on the decode worker. The events of `KvService.Pull` say
which blocks are final; a sender may put their bytes into the event, else the receiver fetches them by its own means.
"""

from collections.abc import Sequence
from typing import Protocol

__all__ = ["BlockReceiver", "BlockSender", "FetchedSender", "TransferFailed", "check_fetch"]


class TransferFailed(Exception):
    """Blocks did not arrive whole.

    Attributes:
        reason: a stable word for programs, in UPPER_SNAKE_CASE.
        verified_blocks: so many of the ticket's blocks, from the first on, can be used all the same.
        source: the worker from which they were to come; empty if the ticket does not say.
    """

    def __init__(self, message: str, *, reason: str, verified_blocks: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.verified_blocks = verified_blocks
        self.source = ""


class BlockSender(Protocol):
    """The prefill worker's side.

    Attributes:
        max_event_bytes: so many bytes of blocks are best named by one event.
    """

    @property
    def max_event_bytes(self) -> int: ...

    def payload(self, block_ids: Sequence[int]) -> bytes:
        """The blocks' bytes for an event; empty if the receiver fetches them itself. May be called in a thread."""


class FetchedSender:
    """Sends nothing: the receiver reads for itself."""

    max_event_bytes = 16 << 20  # each event costs a round through two event loops, and its bytes nothing

    def payload(self, block_ids: Sequence[int]) -> bytes:
        return b""


def check_fetch(source_block_ids: Sequence[int], num_source_blocks: int, data: bytes) -> None:
    """What a receiver that reads the prefill worker's pool itself checks before it reads.

    Raises:
        TransferFailed: the event has a payload, or a block is not in the pool.
    """
    if data:
        raise TransferFailed("bytes came that nobody asked for", reason="WRONG_LENGTH")
    if not all(0 <= block_id < num_source_blocks for block_id in source_block_ids):
        raise TransferFailed("the ticket names blocks that the pool does not have", reason="BLOCK_OUT_OF_RANGE")


class BlockReceiver(Protocol):
    """The decode worker's side, for one prefill worker.

    Attributes:
        name: of the transport, as `PullRequest.transport` has it.
        usable: False once the way is broken for good, so that the pair needs a new one.
    """

    @property
    def name(self) -> str: ...

    @property
    def usable(self) -> bool: ...

    async def receive(self, source_block_ids: Sequence[int], destination_block_ids: Sequence[int], data: bytes) -> None:
        """Brings blocks of the prefill worker's pool into blocks of the own; when it returns, they are there.

        Also when it fails or is cancelled, nothing is written to the destination after it has ended.

        Args:
            data: the event's payload.

        Raises:
            TransferFailed: the destination's content is undefined.
        """

    async def probe(self, num_bytes: int) -> int:
        """Brings about so many bytes of the prefill worker's into memory that nobody uses; answers how many.

        Raises:
            TransferFailed, KvrelayError: the way does not work.
        """

    def close(self) -> None:
        """Frees what was opened, which takes its time: to be called in a thread. No `receive` may be in progress."""
