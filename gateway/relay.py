"""One request from the client's words to its last token: tokenize, queue, route, prefill, decode."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import replace
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context

from gateway.admission import Admission
from gateway.completion import Completion
from gateway.detokenizer import CompletionText
from gateway.dispatch import Dispatch, Placement
from gateway.requests import CancelHandle
from gateway.response_log import ResponseLog
from gateway.tokens import Tokenizer, TokenizerPool
from gateway.validation import GenerateCall, resolve
from kvrelay import telemetry, wire
from kvrelay.control.request_queue import Outcome, RequestState
from kvrelay.errors import Cancelled, DeadlineExceeded, FailedPrecondition, Internal, KvrelayError
from kvrelay.request import FinishReason, Request, Timings, Usage
from kvrelay.telemetry import Attribute, Metric, SpanName
from kvrelay.v1 import worker_pb2

__all__ = ["Relay"]

NO_TICKET = b""


class Relay:
    """Runs requests, each to its end in its own task."""

    def __init__(self, tokenizer: Tokenizer, pool: TokenizerPool, admission: Admission, dispatch: Dispatch) -> None:
        self.tokenizer = tokenizer
        self.pool = pool
        self.admission = admission
        self.dispatch = dispatch
        meter = telemetry.meter()
        self._requests = meter.create_counter(Metric.REQUESTS)
        self._completion_tokens = meter.create_counter(Metric.COMPLETION_TOKENS)
        self._first_token = meter.create_histogram(Metric.TIME_TO_FIRST_TOKEN, unit="s")

    async def run(
        self, call: GenerateCall, log: ResponseLog, handle: CancelHandle, context: Context, deadline: float | None
    ) -> None:
        """Runs a request; whatever becomes of it is written to the log.

        Args:
            handle: tells whether a cancellation is an abort.
            context: the client's trace.
            deadline: on the clock of `time.monotonic`.
        """
        run = _Run(self, call, log, handle, deadline)
        with telemetry.tracer().start_as_current_span(
            SpanName.GENERATE, context=context, kind=trace.SpanKind.SERVER, record_exception=False
        ) as span:
            span.set_attribute(Attribute.REQUEST_ID, call.request_id)
            try:
                async with asyncio.timeout_at(_on_loop_clock(deadline)):
                    reason = await run.to_the_end(span)
                self._finish(span, log, run, reason)
            except TimeoutError:
                self._give_up(span, log, run, DeadlineExceeded("the deadline passed before the request was done"))
            except KvrelayError as error:
                self._give_up(span, log, run, error)
            except asyncio.CancelledError:
                if handle.aborted:
                    self._finish(span, log, run, FinishReason.ABORT)
                else:
                    self._give_up(span, log, run, Cancelled("the client cancelled the request"))
                    raise
            except Exception:
                self._give_up(span, log, run, Internal("the gateway failed to run the request"))
                raise

    def _finish(self, span: trace.Span, log: ResponseLog, run: "_Run", reason: FinishReason) -> None:
        run.flush()
        self._account(span, run, reason.name.lower())
        log.finish(reason, run.usage(), run.timings())

    def _give_up(self, span: trace.Span, log: ResponseLog, run: "_Run", error: KvrelayError) -> None:
        span.set_attribute(Attribute.ERROR_REASON, error.reason)
        span.set_status(trace.StatusCode.ERROR, error.message)
        self._account(span, run, error.code.lower())
        log.fail(error)

    def _account(self, span: trace.Span, run: "_Run", outcome: str) -> None:
        usage, timings = run.usage(), run.timings()
        span.set_attribute(Attribute.PROMPT_TOKENS, usage.prompt_tokens)
        span.set_attribute(Attribute.COMPLETION_TOKENS, usage.completion_tokens)
        span.set_attribute(Attribute.FINISH_REASON, (outcome,))
        self._requests.add(1, {"outcome": outcome})
        self._completion_tokens.add(usage.completion_tokens)
        if usage.completion_tokens:
            self._first_token.record(timings.time_to_first_token)


def _on_loop_clock(deadline: float | None) -> float | None:
    return None if deadline is None else asyncio.get_running_loop().time() + deadline - time.monotonic()


class _Run:
    """The state of one request on its way."""

    def __init__(
        self, relay: Relay, call: GenerateCall, log: ResponseLog, handle: CancelHandle, deadline: float | None
    ) -> None:
        self._relay = relay
        self._call = call
        self._handle = handle
        self._deadline = deadline
        self._arrival = time.monotonic()
        self._timings = Timings()
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        text = CompletionText(relay.tokenizer.detokenizer(), call.sampling.stop)
        self._completion = Completion(text, log)

    def flush(self) -> None:
        """No token follows."""
        self._completion.finish_text()

    def usage(self) -> Usage:
        return Usage(self._num_prompt_tokens, self._num_cached_tokens, self._completion.num_tokens)

    def timings(self) -> Timings:
        return replace(self._timings, total=time.monotonic() - self._arrival)

    async def to_the_end(self, span: trace.Span) -> FinishReason:
        """Raises: KvrelayError if it cannot be done."""
        request = await self._tokenize()
        async with self._place_in_queue(request):
            with self._stage(SpanName.GATEWAY_QUEUE):
                await self._relay.admission.wait_for_turn(request.request_id)
                placement = await self._relay.dispatch.place(request)
            self._timings = replace(self._timings, gateway_queue=time.monotonic() - self._arrival)
            sequence = wire.request_to_proto(request, telemetry.traceparent(span))
            with placement:
                return await self._serve(sequence, placement)

    async def _tokenize(self) -> Request:
        with self._stage(SpanName.TOKENIZE):
            prompt = await self._relay.pool.encode_prompt(self._call.prompt)
        self._num_prompt_tokens = len(prompt)
        tokenizer = self._relay.tokenizer
        context_length = self._relay.dispatch.context_length(tokenizer.context_length)
        return resolve(self._call, prompt, tokenizer, min(tokenizer.context_length, context_length))

    @contextlib.asynccontextmanager
    async def _place_in_queue(self, request: Request) -> AsyncIterator[None]:
        """Holds a place from the entry to the end, whatever the end is."""
        deadline = None if self._deadline is None else self._deadline - time.monotonic() + time.time()
        admission, call = self._relay.admission, self._call
        existing = await admission.enter(request.request_id, call.body_digest, call.priority, deadline)
        if existing is not None:
            raise _cannot_replay(request.request_id, existing.state)
        outcome = Outcome.FAILED
        try:
            yield
            outcome = Outcome.COMPLETED
        except asyncio.CancelledError:
            # Only an abort leaves responses to replay; who lost its connection may send the same request again.
            outcome = Outcome.CANCELLED if self._handle.aborted else Outcome.FAILED
            raise
        finally:
            admission.leave(request.request_id, outcome)

    async def _serve(self, sequence: worker_pb2.SequenceSpec, placement: Placement) -> FinishReason:
        """Prefill and decode overlap: the decode worker is told once the ticket is there and blocks may be taken."""
        reservation = placement.reservation
        if placement.prefill is None:
            return await self._serve_whole(sequence, placement)
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

    async def _serve_whole(self, sequence: worker_pb2.SequenceSpec, placement: Placement) -> FinishReason:
        """The decode worker computes the prompt, too."""
        noting = asyncio.create_task(self._note_first_token(placement))
        try:
            return await self._decode(sequence, NO_TICKET, placement)
        finally:
            noting.cancel()
            await asyncio.wait([noting])

    async def _note_first_token(self, placement: Placement) -> None:
        await self._completion.wait_for(1)
        placement.prefill_done()
        self._timings = replace(self._timings, time_to_first_token=time.monotonic() - self._arrival)

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
        self._timings = replace(
            self._timings,
            time_to_first_token=time.monotonic() - self._arrival,
            prefill_queue=first.prefill_queue,
            prefill=first.prefill,
        )
        self._num_cached_tokens = first.cached_tokens
        self._completion.add(0, [wire.token_from_proto(first)])
        return FinishReason.STOP if self._completion.stopped else wire.finish_reason_from_proto(first.finish_reason)

    async def _decode(self, sequence: worker_pb2.SequenceSpec, ticket: bytes, placement: Placement) -> FinishReason:
        """To the last token, or to the first stop string."""
        await placement.reservation.wait()
        decoding = placement.decode.decode(sequence, ticket, self._remaining(), self._completion)
        response = await (self._unless_stopped(decoding) if self._call.sampling.stop else decoding)
        if response is not None:
            self._timings = replace(
                self._timings,
                transfer=response.transfer,
                decode_queue=response.decode_queue,
                first_decode_step=response.first_decode_step,
            )
            if response.HasField("cached_tokens"):
                self._num_cached_tokens = response.cached_tokens
                self._timings = replace(self._timings, prefill_queue=response.prefill_queue, prefill=response.prefill)
        if response is None or self._completion.stopped:
            return FinishReason.STOP
        return wire.finish_reason_from_proto(response.finish_reason) or FinishReason.ABORT

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

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        with telemetry.tracer().start_as_current_span(name):
            yield


def _raise_unless_explained_by_prefill(decoding: "asyncio.Task[FinishReason]") -> None:
    """Raises what stopped decoding before the first token, unless it was only that the prefill worker had ended."""
    error = decoding.exception()
    if error is not None and not (isinstance(error, FailedPrecondition) and error.reason == "HANDOVER_ENDED"):
        raise error


def _cannot_replay(request_id: str, state: RequestState) -> FailedPrecondition:
    where = "has ended" if state is RequestState.FINISHED else "runs elsewhere"
    return FailedPrecondition(
        f"request {request_id} {where}, and its responses are not held here; use another request_id to run it again",
        reason="RESPONSES_NOT_HELD",
    )
