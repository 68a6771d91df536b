"""How a KV cache comes in: the sequence has its blocks reserved, the bytes follow, then it joins the running batch."""

import logging
import time
from dataclasses import dataclass

from kv_transfer.puller import Pulled, Puller
from kv_transfer.transport import TransferFailed
from kvrelay import failpoints, telemetry
from kvrelay.engine.async_engine import AsyncEngine
from kvrelay.engine.events import Admitted
from kvrelay.engine.sequence import BorrowedBlocks
from kvrelay.errors import FailedPrecondition
from kvrelay.telemetry import Attribute, Metric, SpanName

__all__ = ["Intake", "TakenOver"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TakenOver:
    """When the KV cache was there, on the clock of `time.monotonic`, and how long its bytes kept the request waiting.

    Attributes:
        transfer: seconds from the end of prefill; what the overlap with prefill hides is not in it.
    """

    at: float
    transfer: float


class Intake:
    """Pulls KV caches for sequences in transfer and tells the engine what came of it.

    Args:
        block_size: tokens in a block.
        max_recomputed_tokens: what a transfer that failed may leave to compute here, beside the running streams.
    """

    def __init__(self, engine: AsyncEngine, puller: Puller, block_size: int, max_recomputed_tokens: int) -> None:
        self._engine = engine
        self._puller = puller
        self._block_size = block_size
        self._max_recomputed_tokens = max_recomputed_tokens
        self._recomputed = telemetry.meter().create_counter(Metric.RECOMPUTED)

    async def borrowed(self, ticket: bytes) -> BorrowedBlocks | None:
        """As `Puller.borrowed`: what a sequence may hold instead of blocks of its own."""
        return await self._puller.borrowed(ticket)

    async def take_over(self, ticket: bytes, admitted: Admitted, traceparent: str) -> TakenOver:
        """Fills the sequence's blocks or, if they are borrowed, waits until the other worker has.

        A transfer that fails costs time, never the request: it is computed again. What is left to compute is computed
        here if it is short, else elsewhere, lest it delays the running streams.

        When it ends, however it does, nothing writes to the sequence's own blocks any more.

        Raises:
            FailedPrecondition: the prefill worker has ended the request, reason HANDOVER_ENDED; or the KV cache is to
                be computed elsewhere, reason TRANSFER_FAILED, and metadata says the cause and the source.
        """
        started = time.monotonic()
        request_id = admitted.request_id
        try:
            pulled = await self._puller.pull(ticket, admitted.block_ids, admitted.num_cached_blocks, admitted.borrowed)
        except TransferFailed as failure:
            if failure.reason == "REQUEST_ABORTED":
                raise FailedPrecondition(failure.message, reason="HANDOVER_ENDED") from failure
            attributes = {Attribute.REQUEST_ID: request_id, Attribute.ERROR_REASON: failure.reason}
            telemetry.record_stage(SpanName.TRANSFER, traceparent, started, time.monotonic(), attributes)
            return self._recompute(admitted, failure)
        self._engine.tell(lambda scheduler: scheduler.adopt(request_id, pulled.first_token_id))
        await failpoints.reach("decode.adopted")
        telemetry.record_stage(
            SpanName.TRANSFER, traceparent, started, pulled.whole_at, _attributes(request_id, pulled)
        )
        return TakenOver(at=pulled.whole_at, transfer=max(0.0, pulled.whole_at - pulled.complete_at))

    def _recompute(self, admitted: Admitted, failure: TransferFailed) -> TakenOver:
        request_id = admitted.request_id
        log.warning("transfer for request %s failed, computing it again: %s", request_id, failure.message)
        self._recomputed.add(1, {Attribute.ERROR_REASON: failure.reason})
        num_tokens = (len(admitted.block_ids) - failure.verified_blocks) * self._block_size
        if num_tokens > self._max_recomputed_tokens:
            source = failure.source or "its worker"
            message = f"the KV cache did not arrive whole from {source}; the request can go on from its tokens"
            metadata = {"cause": failure.reason, "source": failure.source}
            raise FailedPrecondition(message, reason="TRANSFER_FAILED", metadata=metadata)
        self._engine.tell(lambda scheduler: scheduler.recompute(request_id, failure.verified_blocks))
        return TakenOver(at=time.monotonic(), transfer=0.0)


def _attributes(request_id: str, pulled: Pulled) -> dict[str, str | int]:
    return {
        Attribute.REQUEST_ID: request_id,
        Attribute.TRANSPORT: pulled.transport,
        Attribute.TRANSFER_BLOCKS: pulled.num_blocks,
        Attribute.TRANSFER_BYTES: pulled.num_bytes,
    }
