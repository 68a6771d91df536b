"""The decode worker's end of the handover: brings the blocks of a ticket into the own pool, and verifies them."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from grpc import aio

from kv_transfer.blocks import num_matching
from kv_transfer.links import Link, Links
from kv_transfer.sampling import CHECKSUM_MODES, verified_positions
from kv_transfer.threads import run_on_blocks
from kv_transfer.tickets import Ticket, open_ticket
from kv_transfer.transport import TransferFailed
from kvrelay import failpoints, telemetry
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.sequence import BorrowedBlocks
from kvrelay.errors import FailedPrecondition, KvrelayError, NotFound
from kvrelay.rpc import is_being_cancelled, translated
from kvrelay.v1 import kv_pb2

__all__ = ["Pulled", "Puller"]

log = logging.getLogger(__name__)

RELEASE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Pulled:
    """What came of a pull. The blocks are whole, and the prefill worker holds nothing for them any more.

    Attributes:
        num_blocks: how many were moved; those that were cached here are not among them.
        complete_at: when the prompt was done; seconds on the puller's clock.
        whole_at: when the last block was verified and the lease released, on the same clock.
    """

    first_token_id: int
    num_bytes: int
    num_blocks: int
    transport: str
    complete_at: float
    whole_at: float


class Puller:
    """Pulls tickets.

    Args:
        key: the cluster's, which authenticates tickets.
        checksum: "full" insists on a checksum of each block, and verifies it; "sampled" of about one in eight, and
            then trusts no block of a pull in which one was wrong; "off" of none.
        clock: seconds.
    """

    def __init__(
        self,
        links: Links,
        cache: KvCache,
        key: bytes,
        checksum: str = "full",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._links = links
        self._cache = cache
        self._key = key
        self._checksum = checksum
        self._clock = clock
        self._bytes = telemetry.meter().create_counter(telemetry.Metric.TRANSFER_BYTES, unit="By")
        self._mismatches = telemetry.meter().create_counter(telemetry.Metric.CHECKSUM_MISMATCHES)

    async def borrowed(self, ticket: bytes) -> BorrowedBlocks | None:
        """The ticket's blocks, if they lie in the pool that both workers share; None if they must be moved.

        Also None for a ticket that cannot be pulled; `pull` says why.
        """
        if self._cache.shared is None:
            return None
        try:
            opened = open_ticket(ticket, self._key)
            async with self._links.use(opened.worker_id, opened.epoch) as link:
                if link.receiver.name == "pool":
                    return BorrowedBlocks(opened.block_ids, opened.generations)
        except KvrelayError as error:
            log.info("blocks of a ticket cannot be borrowed: %s", error.message)
        return None

    async def pull(
        self, ticket: bytes, destination: Sequence[int], num_cached_blocks: int, borrowed: bool = False
    ) -> Pulled:
        """Brings the ticket's blocks into the blocks `destination`, the first `num_cached_blocks` of which are there.

        When it ends, however it does, nothing writes to these blocks any more; but the prefill worker may, if they are
        borrowed and it fails.

        Args:
            borrowed: `destination` are the ticket's own blocks, held here too. Nothing is moved; they are whole when
                prefill has ended, and this worker's to write to when the lease has.

        Raises:
            TransferFailed: for whatever reason; it says how many blocks can be used all the same.
        """
        transfer = _Transfer(self._cache, destination, num_cached_blocks, borrowed, self._checksum, self._clock)
        source = ""
        try:
            with _translated():
                opened = open_ticket(ticket, self._key)
                source = opened.worker_id
                transfer.check(opened)
                async with self._links.use(opened.worker_id, opened.epoch) as link:
                    pulled = await transfer.run(link, ticket, opened, self._links.worker_id)
        except TransferFailed as failure:
            failure.source, failure.verified_blocks = source, transfer.num_verified
            if failure.reason == "CHECKSUM_MISMATCH":
                self._mismatches.add(1)
                log.warning("from prefill worker %s: %s", source, failure.message)
            raise
        self._bytes.add(pulled.num_bytes, {telemetry.Attribute.TRANSPORT: pulled.transport})
        return pulled


class _Transfer:
    """One pull in progress: the events must name the ticket's blocks in order, each once, and then the first token.

    Attributes:
        num_verified: blocks, from the first on, whose content is known to be right.
    """

    def __init__(
        self,
        cache: KvCache,
        destination: Sequence[int],
        num_cached_blocks: int,
        borrowed: bool,
        checksum: str,
        clock: Callable[[], float],
    ) -> None:
        self._cache = cache
        self._destination = destination
        self._num_skipped = len(destination) if borrowed else num_cached_blocks
        self._borrowed = borrowed
        self._checksum = checksum
        self._clock = clock
        self._num_arrived = self._num_skipped
        self._first_token_id: int | None = None
        self._complete_at = 0.0
        self._taken_at = 0.0
        self._bytes_timed = 0
        self._seconds_receiving = 0.0
        self.num_verified = num_cached_blocks

    def check(self, ticket: Ticket) -> None:
        if not self._num_skipped <= len(self._destination) == len(ticket.block_ids):
            raise TransferFailed(
                f"the ticket has {len(ticket.block_ids)} blocks, {len(self._destination)} are wanted",
                reason="WRONG_COUNT",
            )

    async def run(self, link: Link, data: bytes, ticket: Ticket, worker_id: str) -> Pulled:
        transport = link.receiver.name
        request = kv_pb2.PullRequest(
            ticket=data,
            skip_blocks=self._num_skipped,
            transport=transport,
            checksum=CHECKSUM_MODES[self._checksum],
            decode_worker_id=worker_id,
        )
        await failpoints.reach("transfer.before_pull")
        call = link.stub.Pull(request)
        try:
            with translated():
                async for event in call:
                    await self._take(event, link, data, ticket)
        finally:
            call.cancel()
        if self._first_token_id is None:
            raise TransferFailed("the stream ended before the first token", reason="TRUNCATED")
        await failpoints.reach("transfer.before_release")
        await self._release(link, data)
        link.rate.add(self._bytes_timed, self._seconds_receiving)
        await failpoints.reach("transfer.after_release")
        num_moved = len(self._destination) - self._num_skipped
        num_bytes = num_moved * self._cache.layout.block_bytes
        return Pulled(self._first_token_id, num_bytes, num_moved, transport, self._complete_at, self._clock())

    async def _take(self, event: kv_pb2.PullResponse, link: Link, data: bytes, ticket: Ticket) -> None:
        if self._first_token_id is not None:
            raise _unexpected("an event after the first token")
        kind = event.WhichOneof("event")
        if kind == "ready":
            await self._take_blocks(event.ready, link, data, ticket)
        elif kind == "complete":
            self._take_first_token(event.complete)
        else:
            raise _unexpected("an event without content")

    async def _take_blocks(self, ready: kv_pb2.ReadyBlocks, link: Link, data: bytes, ticket: Ticket) -> None:
        total = len(self._destination)
        if ready.first != self._num_arrived or not 0 < ready.count <= total - self._num_arrived:
            raise _unexpected(f"{ready.count} blocks from {ready.first} on, with {self._num_arrived} of {total} here")
        mode = CHECKSUM_MODES[self._checksum]
        verified = verified_positions(mode, data, ready.first, ready.count, total)
        if len(ready.checksums) != len(verified):
            raise _unexpected(f"{len(ready.checksums)} checksums for {ready.count} blocks, not {len(verified)}")
        end = ready.first + ready.count
        target = self._destination[ready.first : end]
        started, payload = self._clock(), ready.data  # read once: each time the bytes are copied
        await link.receiver.receive(ticket.block_ids[ready.first : end], target, payload)
        self._note_time(ready, bool(payload), started)
        await failpoints.flip("transfer.received", lambda: self._cache.block_view(target[-1], 1))
        await self._verify(verified, ready.checksums)
        await failpoints.reach("transfer.verified")
        self._num_arrived = end

    async def _verify(self, positions: Sequence[int], expected: Sequence[int]) -> None:
        target = [self._destination[position] for position in positions]
        verify = functools.partial(num_matching, self._cache, target, expected)
        num_right = await run_on_blocks(self._cache, len(target), verify)
        if self._checksum == "full":  # else what lies between verified blocks may be wrong
            self.num_verified += num_right
        if num_right < len(target):
            raise TransferFailed(
                f"block {positions[num_right]} of the ticket arrived with another checksum", reason="CHECKSUM_MISMATCH"
            )

    def _note_time(self, ready: kv_pb2.ReadyBlocks, came_along: bool, started: float) -> None:
        """Counts the time in which a run was received, and none in which it was waited for.

        What the receiver fetches is timed there. What came in an event was on its way since the one before, if it did
        not have to wait for prefill.
        """
        now, before = self._clock(), self._taken_at
        self._taken_at = now
        if came_along and not (before and ready.followed_at_once):
            return
        self._seconds_receiving += now - (before if came_along else started)
        self._bytes_timed += ready.count * self._cache.layout.block_bytes

    def _take_first_token(self, complete: kv_pb2.PrefillComplete) -> None:
        if self._num_arrived != len(self._destination):
            raise _unexpected(f"the first token, with {self._num_arrived} of {len(self._destination)} blocks here")
        self._complete_at = self._clock() - complete.seconds_since_done
        self._first_token_id = complete.first_token_id
        if self._borrowed:
            self.num_verified = len(self._destination)

    async def _release(self, link: Link, data: bytes) -> None:
        """Ends the lease, which proves that its blocks were held, and unchanged, until they had been copied."""
        try:
            with translated():
                await link.stub.Release(kv_pb2.ReleaseRequest(ticket=data), timeout=RELEASE_SECONDS)
        except (NotFound, FailedPrecondition):
            # Copies may be of something else; borrowed blocks are held here, too, so that they are what they were.
            self.num_verified = self._num_skipped
            raise


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Inside, whatever a pull ends with, but for the puller's own cancellation, is a TransferFailed."""
    try:
        yield
    except KvrelayError as error:
        raise TransferFailed(error.message, reason=error.reason) from error
    except (asyncio.CancelledError, aio.BaseError) as error:
        if isinstance(error, asyncio.CancelledError) and is_being_cancelled():
            raise
        raise TransferFailed("the link was closed", reason="LINK_CLOSED") from error


def _unexpected(what: str) -> TransferFailed:
    return TransferFailed(f"the prefill worker sent {what}", reason="UNEXPECTED_EVENT")
