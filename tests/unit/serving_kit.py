"""A request's serving between workers that a test plays: the gateway's own dispatch and router, and no sockets."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import trace

from gateway.account import Account
from gateway.completion import Completion
from gateway.detokenizer import CompletionText
from gateway.disaggregation import Disaggregation
from gateway.dispatch import Dispatch
from gateway.fleet import TokenSink
from gateway.recovery import Recovery
from gateway.response_log import ResponseLog
from gateway.serving import Serving
from kvrelay.control.membership import WorkerEntry
from kvrelay.control.registry import ModelInfo, WorkerLoad, WorkerRecord
from kvrelay.errors import KvrelayError, Unavailable
from kvrelay.request import FinishReason, Request, Sampling, WorkerRole, WorkerState
from kvrelay.v1 import inference_pb2, worker_pb2

__all__ = ["MAX_TOKENS", "Act", "DecodeCall", "DecodeWorker", "PrefillWorker", "Run", "lost", "token_at"]

PROMPT = (1, 2, 3)
MAX_TOKENS = 6
MODEL = ModelInfo("model", "llama", 100, 100, 16, "00")


def token_at(position: int) -> int:
    """The token that every worker draws at this position of the completion."""
    return 10 + position


def lost(worker_id: str, reason: str = "WORKER_LOST") -> KvrelayError:
    return Unavailable("lost", reason=reason, metadata={"stage": "decode", "worker": worker_id})


@dataclass
class Worker:
    """What a test's worker has in common with a `Connection`."""

    worker_id: str
    role: WorkerRole
    blocks_free: int = 100

    @property
    def record(self) -> WorkerRecord:
        return WorkerRecord(self.worker_id, self.role, "host:1", 1, MODEL, epoch=1)

    @property
    def start(self) -> tuple[str, int]:
        return self.worker_id, 1


class PrefillWorker(Worker):
    """Gives a ticket at once, the token after `prompt_done`, and ends the call after `released`.

    The last chunk, if it is to be announced, is so after `nearly_done`.

    Attributes:
        sequences: those it was sent.
        ended: set when a call has, by itself or by the gateway.
        reason: why the request ends with its first token, if it does.
    """

    reason = inference_pb2.FINISH_REASON_UNSPECIFIED

    def __init__(self) -> None:
        super().__init__("prefill", WorkerRole.PREFILL)
        self.sequences: list[worker_pb2.SequenceSpec] = []
        self.nearly_done = asyncio.Event()
        self.prompt_done = asyncio.Event()
        self.released = asyncio.Event()
        self.ended = asyncio.Event()

    @contextlib.asynccontextmanager
    async def prefill(
        self, sequence: worker_pb2.SequenceSpec, timeout: float | None, announce_last_chunk: bool = False
    ) -> AsyncIterator[AsyncIterator[worker_pb2.PrefillResponse]]:
        self.sequences.append(sequence)
        yield self._responses(sequence, b"ticket-%d" % len(self.sequences), announce_last_chunk)

    async def _responses(
        self, sequence: worker_pb2.SequenceSpec, ticket: bytes, announce_last_chunk: bool
    ) -> AsyncIterator[worker_pb2.PrefillResponse]:
        yield worker_pb2.PrefillResponse(admitted=worker_pb2.Admitted(ticket=ticket))
        if announce_last_chunk:
            await self.nearly_done.wait()
            yield worker_pb2.PrefillResponse(last_chunk=worker_pb2.LastChunk())
        await self.prompt_done.wait()
        token_id = token_at(len(sequence.completion_token_ids))
        first = worker_pb2.FirstToken(token_id=token_id, finish_reason=self.reason)
        yield worker_pb2.PrefillResponse(first_token=first)
        try:
            await self.released.wait()
        finally:
            self.ended.set()


@dataclass
class DecodeCall:
    """A Decode call that has come, and what a worker may do with it."""

    sequence: worker_pb2.SequenceSpec
    ticket: bytes
    sink: TokenSink

    def tell(self, first: int, end: int) -> None:
        """A frame with the tokens at these positions."""
        token_ids = [token_at(position) for position in range(first, end)]
        self.sink.take(worker_pb2.SequenceTokens(first_index=first, token_ids=token_ids))

    async def finish(self) -> worker_pb2.DecodeResponse:
        """Takes the KV cache over and tells all tokens that follow the prefill worker's."""
        self.tell(len(self.sequence.completion_token_ids) + 1, MAX_TOKENS)
        await self.sink.wait_for(MAX_TOKENS)
        return worker_pb2.DecodeResponse(finish_reason=inference_pb2.FINISH_REASON_LENGTH)


Act = Callable[[DecodeCall], Awaitable[worker_pb2.DecodeResponse]]


class DecodeWorker(Worker):
    """Does one act with each call; the last act also with those that follow."""

    def __init__(self, worker_id: str, *acts: Act) -> None:
        super().__init__(worker_id, WorkerRole.DECODE)
        self.calls: list[DecodeCall] = []
        self._acts = acts or (DecodeCall.finish,)

    async def decode(
        self, sequence: worker_pb2.SequenceSpec, ticket: bytes, timeout: float | None, sink: TokenSink
    ) -> worker_pb2.DecodeResponse:
        call = DecodeCall(sequence, ticket, sink)
        self.calls.append(call)
        return await self._acts[min(len(self.calls), len(self._acts)) - 1](call)


class Workers:
    """What a `Dispatch` asks of a `Fleet`."""

    def __init__(self, workers: list[Any]) -> None:
        self._workers = {worker.worker_id: worker for worker in workers}

    def entries(self) -> list[WorkerEntry]:
        loads = [WorkerLoad(WorkerState.READY, 0, 0, 100, each.blocks_free, 0) for each in self._workers.values()]
        records = [each.record for each in self._workers.values()]
        return [WorkerEntry(record, load, 0.0) for record, load in zip(records, loads, strict=True)]

    def connection(self, worker_id: str) -> Any:
        return self._workers[worker_id]


@dataclass
class Run:
    """One request among these workers."""

    workers: list[Any]
    max_failures: int = 4
    log: ResponseLog = field(default_factory=lambda: ResponseLog("request"))
    account: Account = field(default_factory=Account)
    stop: tuple[str, ...] = ()
    mode: Disaggregation = Disaggregation.ALWAYS
    request_id: str = "request"

    def __post_init__(self) -> None:
        text: Any = _Words()
        self.completion = Completion(CompletionText(text, self.stop), self.log)
        self.span = _Span()

    async def to_the_end(self) -> FinishReason:
        fleet: Any = Workers(self.workers)
        span: Any = self.span
        dispatch = Dispatch(fleet, wait_seconds=0.0, mode=self.mode)
        request = Request(self.request_id, PROMPT, Sampling(max_tokens=MAX_TOKENS))
        serving = Serving(
            request,
            self.completion,
            self.account,
            dispatch,
            Recovery(self.max_failures),
            stoppable=bool(self.stop),
            deadline=None,
            span=span,
        )
        return await serving.to_the_end(await dispatch.place(request))

    @property
    def token_ids(self) -> list[int]:
        return list(self.completion.token_ids)


class _Words:
    """A detokenizer: a token's text is its number between dots."""

    def push(self, token_ids: list[int]) -> str:
        return "".join(f".{token_id}." for token_id in token_ids)

    def flush(self) -> str:
        return ""


class _Span(trace.NonRecordingSpan):
    """A span that keeps its events."""

    def __init__(self) -> None:
        super().__init__(trace.INVALID_SPAN_CONTEXT)
        self.events: list[tuple[str, dict[str, Any]]] = []

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        self.events.append((name, dict(attributes)))
