"""A request on the workers: prefill and decode, and again elsewhere, from its tokens so far, when a worker fails it."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from opentelemetry import trace

from gateway.completion import Completion
from gateway.dispatch import Dispatch, Placement
from gateway.recovery import Recovery
from kvrelay import telemetry, wire
from kvrelay.errors import FailedPrecondition, KvrelayError
from kvrelay.request import FinishReason, Request, Timings
from kvrelay.telemetry import Attribute, EventName, Metric
from kvrelay.v1 import worker_pb2

__all__ = ["Account", "Serving"]

log = logging.getLogger(__name__)

NO_TICKET = b""


@dataclass(slots=True)
class Account:
    """Where a request's time went and what it took, as far as it has come.

    Attributes:
        arrival: on the clock of `time.monotonic`.
    """

    arrival: float = field(default_factory=time.monotonic)
    timings: Timings = field(default_factory=Timings)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0

    def left_queue(self) -> None:
        self.timings = replace(self.timings, gateway_queue=time.monotonic() - self.arrival)

    def first_token(self) -> None:
        """The first attempt's counts."""
        if not self.timings.time_to_first_token:
            self.timings = replace(self.timings, time_to_first_token=time.monotonic() - self.arrival)

    def prefilled(self, said: "worker_pb2.FirstToken | worker_pb2.DecodeResponse") -> None:
        """The first prefill counts; a later one only makes up for what was lost."""
        if not self.timings.prefill:
            self.timings = replace(self.timings, prefill_queue=said.prefill_queue, prefill=said.prefill)
            self.num_cached_tokens = said.cached_tokens

    def decoded(self, response: worker_pb2.DecodeResponse) -> None:
        if response.HasField("cached_tokens"):
            self.prefilled(response)
        self.timings = replace(
            self.timings,
            transfer=response.transfer,
            decode_queue=response.decode_queue,
            first_decode_step=response.first_decode_step,
        )


class Serving:
    """Serves one request in as many attempts as it takes.

    What the client was told stays: an attempt goes on from the tokens of the former ones. As the sampler's state is
    the seed and the position, any worker draws the tokens that the first one would have drawn.

    Args:
        stoppable: whether the request has stop strings.
        deadline: on the clock of `time.monotonic`.
        span: of the request, to which recoveries are added as events.
    """

    def __init__(
        self,
        request: Request,
        completion: Completion,
        account: Account,
        dispatch: Dispatch,
        recovery: Recovery,
        *,
        stoppable: bool,
        deadline: float | None,
        span: trace.Span,
    ) -> None:
        self._request = request
        self._completion = completion
        self._account = account
        self._dispatch = dispatch
        self._recovery = recovery
        self._stoppable = stoppable
        self._deadline = deadline
        self._span = span
        self._num_starts = 0
        self._recoveries = telemetry.meter().create_counter(Metric.RECOVERIES)

    async def to_the_end(self, placement: Placement) -> FinishReason:
        """Raises: KvrelayError if it cannot be done."""
        while True:
            try:
                with placement:
                    return await self._attempt(placement)
            except KvrelayError as error:
                if (reason := self._ended()) is not None:
                    return reason  # all that failed is the answer after the last token
                self._note(error, placement)
            await asyncio.sleep(self._recovery.delay)
            placement = await self._dispatch.place(self._so_far(), self._recovery.avoided)

    def _ended(self) -> FinishReason | None:
        """Why no token follows those that are here, if none does."""
        token_ids, sampling = self._completion.token_ids, self._request.sampling
        if self._completion.stopped or (token_ids and token_ids[-1] in sampling.stop_token_ids):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(token_ids) >= sampling.max_tokens else None

    def _note(self, error: KvrelayError, placement: Placement) -> None:
        """Raises: the error, if the request does not go on."""
        worker_id = error.metadata.get("worker", "")
        self._recovery.note(error, placement.start_of(worker_id))
        attributes = {Attribute.WORKER_ID: worker_id, Attribute.ERROR_REASON: error.reason}
        self._recoveries.add(1, {Attribute.ERROR_REASON: error.reason})
        self._span.add_event(EventName.RECOVERED, attributes)
        num_tokens = self._completion.num_tokens
        log.info("request %s goes on after %d tokens: %s", self._request.request_id, num_tokens, error.message)

    def _so_far(self, num_left_out: int = 0) -> Request:
        """The request with its tokens so far, but for the last few; under an id that no worker has had yet."""
        request_id, token_ids = self._request.request_id, self._completion.token_ids
        self._num_starts += 1
        return replace(
            self._request,
            request_id=request_id if self._num_starts == 1 else f"{request_id}#{self._num_starts}",
            completion_token_ids=tuple(token_ids[: len(token_ids) - num_left_out]),
        )

    def _sequence(self, num_left_out: int = 0) -> worker_pb2.SequenceSpec:
        return wire.request_to_proto(self._so_far(num_left_out), telemetry.traceparent(self._span))

    async def _attempt(self, placement: Placement) -> FinishReason:
        """Prefill and decode overlap: the decode worker is told once the ticket is there and blocks may be taken."""
        self._completion.forget_early()
        sequence, reservation = self._sequence(), placement.reservation
        if placement.prefill is None:
            return await self._attempt_whole(sequence, placement)
        async with placement.prefill.prefill(sequence, self._remaining(), reservation.late) as responses:
            first_response = await anext(responses)
            if first_response.HasField("first_token"):
                return self._take_first_token(first_response.first_token, placement) or FinishReason.LENGTH
            ticket = first_response.admitted.ticket
            decoding = asyncio.create_task(self._decode(sequence, ticket, placement))
            try:
                return await self._follow(reservation.watch(responses), decoding, placement)
            finally:
                decoding.cancel()
                await asyncio.wait([decoding])

    async def _attempt_whole(self, sequence: worker_pb2.SequenceSpec, placement: Placement) -> FinishReason:
        """The decode worker computes the prompt, too."""
        noting = asyncio.create_task(self._note_first_token(placement, self._completion.num_tokens + 1))
        try:
            return await self._decode(sequence, NO_TICKET, placement)
        finally:
            noting.cancel()
            await asyncio.wait([noting])

    async def _note_first_token(self, placement: Placement, num_tokens: int) -> None:
        await self._completion.wait_for(num_tokens)
        placement.prefill_done()
        self._account.first_token()

    async def _follow(
        self,
        responses: AsyncIterator[worker_pb2.PrefillResponse],
        decoding: "asyncio.Task[FinishReason]",
        placement: Placement,
    ) -> FinishReason:
        prefilling = asyncio.ensure_future(anext(responses))
        try:
            await asyncio.wait([prefilling, decoding], return_when=asyncio.FIRST_COMPLETED)
            if not prefilling.done():
                _raise_unless_explained_by_prefill(decoding)
            reason = self._take_first_token((await prefilling).first_token, placement)
        finally:
            prefilling.cancel()
        return reason or await decoding

    def _take_first_token(self, first: worker_pb2.FirstToken, placement: Placement) -> FinishReason | None:
        placement.prefill_done()
        self._account.first_token()
        self._account.prefilled(first)
        self._completion.add(self._completion.num_tokens, [wire.token_from_proto(first)])
        return FinishReason.STOP if self._completion.stopped else wire.finish_reason_from_proto(first.finish_reason)

    async def _decode(self, sequence: worker_pb2.SequenceSpec, ticket: bytes, placement: Placement) -> FinishReason:
        """To the last token, or to the first stop string; from worker to worker as they drain."""
        await placement.reservation.wait()
        response = await self._decode_on_one(sequence, ticket, placement)
        while response is not None and response.ticket and not self._completion.stopped:
            ticket = response.ticket
            self._dispatch.move(placement, self._request)
            self._span.add_event(EventName.MOVED, {Attribute.WORKER_ID: placement.decode.record.worker_id})
            # The KV cache that moves lacks the last token's, which the new worker gets with it.
            response = await self._decode_on_one(self._sequence(num_left_out=1), ticket, placement)
        if response is not None:
            self._account.decoded(response)
        if response is None or self._completion.stopped:
            return FinishReason.STOP
        return wire.finish_reason_from_proto(response.finish_reason) or FinishReason.ABORT

    async def _decode_on_one(
        self, sequence: worker_pb2.SequenceSpec, ticket: bytes, placement: Placement
    ) -> worker_pb2.DecodeResponse | None:
        decoding = placement.decode.decode(sequence, ticket, self._remaining(), self._completion)
        return await (self._unless_stopped(decoding) if self._stoppable else decoding)

    async def _unless_stopped(
        self, decoding: Coroutine[Any, Any, worker_pb2.DecodeResponse]
    ) -> worker_pb2.DecodeResponse | None:
        """The answer; None if a stop string comes first, which ends the call."""
        answer = asyncio.create_task(decoding)
        stopped = asyncio.create_task(self._completion.wait_for_stop())
        try:
            await asyncio.wait([answer, stopped], return_when=asyncio.FIRST_COMPLETED)
            return None if self._completion.stopped else answer.result()
        finally:
            answer.cancel()
            stopped.cancel()
            await asyncio.wait([answer, stopped])

    def _remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())


def _raise_unless_explained_by_prefill(decoding: "asyncio.Task[FinishReason]") -> None:
    """Raises what stopped decoding before the first token, unless it was only that the prefill worker had ended."""
    error = decoding.exception()
    if error is not None and not (isinstance(error, FailedPrecondition) and error.reason == "HANDOVER_ENDED"):
        raise error
