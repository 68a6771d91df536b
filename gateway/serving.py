"""A request on the workers: prefill and decode, and again elsewhere, from its tokens so far, when a worker fails it."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from opentelemetry import trace

from gateway.account import Account
from gateway.completion import Completion
from gateway.dispatch import Dispatch, Placement
from gateway.fleet import TokenSink
from gateway.prefilling import Prefilling
from gateway.recovery import Recovery, broken_from, leaves_the_ticket
from kvrelay import telemetry, wire
from kvrelay.errors import KvrelayError
from kvrelay.request import FinishReason, Request
from kvrelay.telemetry import Attribute, EventName, Metric
from kvrelay.v1 import worker_pb2

__all__ = ["Serving"]

log = logging.getLogger(__name__)

NO_TICKET = b""


class Serving:
    """Serves one request in as many attempts as it takes.

    What the client was told stays: an attempt goes on from the tokens of the former ones. As the sampler's state is
    the seed and the position, any worker draws the tokens that the first one would have drawn. A decode worker that is
    lost before the KV cache has moved costs no attempt: the ticket goes to another.

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
        self._num_starts = 1
        self._recoveries = telemetry.meter().create_counter(Metric.RECOVERIES)

    async def to_the_end(self, placement: Placement) -> FinishReason:
        """Raises: KvrelayError if it cannot be done."""
        request = self._request
        while True:
            try:
                with placement:
                    return await self._attempt(request, placement)
            except KvrelayError as error:
                if (reason := self._ended()) is not None:
                    return reason  # all that failed is the answer after the last token
                await self._recover(error, placement)
            request = self._so_far()
            placement = await self._dispatch.place(request, self._recovery.avoided)

    def _ended(self) -> FinishReason | None:
        """Why no token follows those that are here, if none does."""
        token_ids, sampling = self._completion.token_ids, self._request.sampling
        if self._completion.stopped or (token_ids and token_ids[-1] in sampling.stop_token_ids):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(token_ids) >= sampling.max_tokens else None

    async def _recover(self, error: KvrelayError, placement: Placement) -> None:
        """Until the request may go on.

        Raises:
            KvrelayError: it does not.
        """
        worker_id = error.metadata.get("worker", "")
        self._dispatch.link_broke(placement, broken_from(error))
        self._recovery.note(error, placement.start_of(worker_id))
        attributes = {Attribute.WORKER_ID: worker_id, Attribute.ERROR_REASON: error.reason}
        self._recoveries.add(1, {Attribute.ERROR_REASON: error.reason})
        self._span.add_event(EventName.RECOVERED, attributes)
        num_tokens = self._completion.num_tokens
        log.info("request %s goes on after %d tokens: %s", self._request.request_id, num_tokens, error.message)
        await asyncio.sleep(self._recovery.delay)

    def _so_far(self, num_left_out: int = 0) -> Request:
        """The request with its tokens so far, but for the last few; under an id that no worker has had yet."""
        token_ids = self._completion.token_ids
        completion_token_ids = tuple(token_ids[: len(token_ids) - num_left_out])
        return replace(self._request, request_id=self._new_id(), completion_token_ids=completion_token_ids)

    def _new_id(self) -> str:
        self._num_starts += 1
        return f"{self._request.request_id}#{self._num_starts}"

    def _sequence(self, request: Request) -> worker_pb2.SequenceSpec:
        return wire.request_to_proto(request, telemetry.traceparent(self._span))

    async def _attempt(self, request: Request, placement: Placement) -> FinishReason:
        """Prefill and decode overlap: the decode worker is told once the ticket is there and blocks may be taken."""
        self._completion.forget_early()
        if placement.prefill is None:
            return await self._attempt_whole(request, placement)
        reservation = placement.reservation
        prefill = placement.prefill.prefill(self._sequence(request), self._remaining(), reservation.late)
        async with prefill as responses:
            first_response = await anext(responses)
            if first_response.HasField("first_token"):
                reason = self._take_first_token(first_response.first_token, request, placement)
                return reason or FinishReason.LENGTH
            async with Prefilling(first_response.admitted.ticket, responses, reservation) as prefilling:
                decoding = asyncio.create_task(self._decode(request, prefilling, placement))
                try:
                    return await self._follow(request, prefilling, decoding, placement)
                finally:
                    decoding.cancel()
                    await asyncio.wait([decoding])

    async def _attempt_whole(self, request: Request, placement: Placement) -> FinishReason:
        """The decode worker computes the prompt, too."""

        def note(local_prompt: worker_pb2.LocalPrompt) -> None:
            placement.prefill_done()
            self._account.prefilled(local_prompt)

        sink = _LocalTokens(self._completion, note)
        answer = await self._decode_on_one(request, NO_TICKET, placement, sink)
        return await self._to_the_last_token(answer, placement)

    async def _follow(
        self, request: Request, prefilling: Prefilling, decoding: "asyncio.Task[FinishReason]", placement: Placement
    ) -> FinishReason:
        first_token = prefilling.first_token
        either: list[asyncio.Future[Any]] = [first_token, decoding]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not first_token.done():
            _raise_unless_explained_by_prefill(decoding)
            await asyncio.wait([first_token])
        reason = self._take_first_token(first_token.result(), request, placement)
        if reason is not None:
            return reason
        await self._until_beyond_first_token(request, decoding)
        prefilling.give_back()  # a decode worker that did without it releases nothing
        return await decoding

    async def _until_beyond_first_token(self, request: Request, decoding: "asyncio.Task[FinishReason]") -> None:
        """Until a decode worker has what it needs, taken over or computed again, or is done."""
        beyond = asyncio.create_task(self._completion.wait_for(len(request.completion_token_ids) + 2))
        try:
            await asyncio.wait([beyond, decoding], return_when=asyncio.FIRST_COMPLETED)
        finally:
            beyond.cancel()

    def _take_first_token(
        self, first: worker_pb2.FirstToken, request: Request, placement: Placement
    ) -> FinishReason | None:
        placement.prefill_done()
        self._account.prefilled(first)
        # By its position, for a decode worker that computed a prompt again may have told it before.
        self._completion.add(len(request.completion_token_ids), [wire.token_from_proto(first)])
        return FinishReason.STOP if self._completion.stopped else wire.finish_reason_from_proto(first.finish_reason)

    async def _decode(self, request: Request, prefilling: Prefilling, placement: Placement) -> FinishReason:
        """To the end, by whichever decode worker gets the KV cache: prefill goes on untouched when one is lost."""
        await placement.reservation.wait()
        while True:
            try:
                answer = await self._decode_on_one(request, prefilling.ticket, placement, self._completion)
            except KvrelayError as error:
                if not (self._can_move_still(request, prefilling, error) and self._dispatch.can_move(placement)):
                    raise
                await self._recover(error, placement)
            else:
                return await self._to_the_last_token(answer, placement)
            self._completion.forget_early()
            request = replace(request, request_id=self._new_id())
            self._dispatch.move(placement, request, self._recovery.avoided)

    def _can_move_still(self, request: Request, prefilling: Prefilling, error: KvrelayError) -> bool:
        """Whether the KV cache is where it was, after a decode worker's error."""
        num_new = self._completion.num_tokens - len(request.completion_token_ids)
        # Who got it has told more than the prefill worker's token, whose call may end a moment later.
        return prefilling.held and num_new <= 1 and leaves_the_ticket(error)

    async def _to_the_last_token(self, answer: worker_pb2.DecodeResponse | None, placement: Placement) -> FinishReason:
        """After a decode worker's answer, None being a stop string: from worker to worker as they drain."""
        while answer is not None and answer.ticket and not self._completion.stopped:
            self._dispatch.move(placement, self._request, self._recovery.avoided)
            self._span.add_event(EventName.MOVED, {Attribute.WORKER_ID: placement.decode.record.worker_id})
            # The KV cache that moves lacks the last token's, which the new worker gets with it.
            request = self._so_far(num_left_out=1)
            answer = await self._decode_on_one(request, answer.ticket, placement, self._completion)
        if answer is not None:
            self._account.decoded(answer)
        if answer is None or self._completion.stopped:
            return FinishReason.STOP
        return wire.finish_reason_from_proto(answer.finish_reason) or FinishReason.ABORT

    async def _decode_on_one(
        self, request: Request, ticket: bytes, placement: Placement, sink: TokenSink
    ) -> worker_pb2.DecodeResponse | None:
        """The answer; None if a stop string comes first."""
        decoding = placement.decode.decode(self._sequence(request), ticket, self._remaining(), sink)
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


class _LocalTokens:
    """The tokens of a sequence whose prompt the decode worker computes: with the first it says how.

    Args:
        note: called with what it says.
    """

    def __init__(self, completion: Completion, note: Callable[[worker_pb2.LocalPrompt], None]) -> None:
        self._completion = completion
        self._note = note

    def take(self, tokens: worker_pb2.SequenceTokens) -> None:
        if tokens.HasField("local_prompt"):
            self._note(tokens.local_prompt)
        self._completion.take(tokens)

    async def wait_for(self, num_tokens: int) -> None:
        await self._completion.wait_for(num_tokens)


def _raise_unless_explained_by_prefill(decoding: "asyncio.Task[FinishReason]") -> None:
    """Raises what stopped decoding before the first token, unless it was only that the prefill worker had ended."""
    error = decoding.exception()
    if error is not None and not (isinstance(error, KvrelayError) and error.reason == "HANDOVER_ENDED"):
        raise error
