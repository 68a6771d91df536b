"""One request from the client's words to its last token: tokenize, queue, route, serve."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

from opentelemetry import trace
from opentelemetry.context import Context

from gateway.account import Account
from gateway.admission import Admission
from gateway.completion import Completion
from gateway.detokenizer import CompletionText
from gateway.dispatch import Dispatch
from gateway.recovery import Recovery
from gateway.requests import CancelHandle
from gateway.response_log import ResponseLog
from gateway.serving import Serving
from gateway.tokens import Tokenizer, TokenizerPool
from gateway.validation import GenerateCall, resolve
from kvrelay import telemetry
from kvrelay.control.request_queue import Outcome, RequestState
from kvrelay.errors import Cancelled, DeadlineExceeded, FailedPrecondition, Internal, KvrelayError
from kvrelay.request import FinishReason, Request, Timings, Usage
from kvrelay.telemetry import Attribute, Metric, SpanName

__all__ = ["Relay"]


class Relay:
    """Runs requests, each to its end in its own task.

    Args:
        max_failures: so many workers may fail a request; the next failure ends it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        pool: TokenizerPool,
        admission: Admission,
        dispatch: Dispatch,
        max_failures: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.pool = pool
        self.admission = admission
        self.dispatch = dispatch
        self.max_failures = max_failures
        meter = telemetry.meter()
        self._requests = meter.create_counter(Metric.REQUESTS)
        self._completion_tokens = meter.create_counter(Metric.COMPLETION_TOKENS)
        self._first_token = telemetry.seconds_histogram(Metric.TIME_TO_FIRST_TOKEN)

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
        with _span(SpanName.GENERATE, context, trace.SpanKind.SERVER) as span:
            span.set_attributes({Attribute.REQUEST_ID: call.request_id, Attribute.MODEL: call.model})
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
        span.set_status(trace.StatusCode.ERROR, error.reason)  # the message may quote the client
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
    """One request on its way: into the queue, to the workers, to its end."""

    def __init__(
        self, relay: Relay, call: GenerateCall, log: ResponseLog, handle: CancelHandle, deadline: float | None
    ) -> None:
        self._relay = relay
        self._call = call
        self._handle = handle
        self._deadline = deadline
        self._account = Account()
        text = CompletionText(relay.tokenizer.detokenizer(), call.sampling.stop)
        self._completion = Completion(text, log)

    def flush(self) -> None:
        """No token follows."""
        self._completion.finish_text()

    def usage(self) -> Usage:
        account = self._account
        return Usage(account.num_prompt_tokens, account.num_cached_tokens, self._completion.num_tokens)

    def timings(self) -> Timings:
        return replace(self._account.timings, total=time.monotonic() - self._account.arrival)

    async def to_the_end(self, span: trace.Span) -> FinishReason:
        """Raises: KvrelayError if it cannot be done."""
        relay = self._relay
        request = await self._tokenize()
        async with self._place_in_queue(request):
            with _span(SpanName.GATEWAY_QUEUE):
                await relay.admission.wait_for_turn(request.request_id)
                placement = await relay.dispatch.place(request)
            self._account.left_queue()
            serving = Serving(
                request,
                self._completion,
                self._account,
                relay.dispatch,
                Recovery(relay.max_failures),
                stoppable=bool(self._call.sampling.stop),
                deadline=self._deadline,
                span=span,
            )
            return await serving.to_the_end(placement)

    async def _tokenize(self) -> Request:
        with _span(SpanName.TOKENIZE):
            prompt = await self._relay.pool.encode_prompt(self._call.prompt)
        self._account.num_prompt_tokens = len(prompt)
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


@contextlib.contextmanager
def _span(
    name: str, context: Context | None = None, kind: trace.SpanKind = trace.SpanKind.INTERNAL
) -> Iterator[trace.Span]:
    """A span that notes nothing of an exception by itself: the text of any may quote the client."""
    with telemetry.tracer().start_as_current_span(
        name, context, kind, record_exception=False, set_status_on_exception=False
    ) as span:
        yield span


def _cannot_replay(request_id: str, state: RequestState) -> FailedPrecondition:
    where = "has ended" if state is RequestState.FINISHED else "runs elsewhere"
    return FailedPrecondition(
        f"request {request_id} {where}, and its responses are not held here; use another request_id to run it again",
        reason="RESPONSES_NOT_HELD",
    )
