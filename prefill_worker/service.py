"""The prefill worker: computes prompts, holds their KV cache under leases, and hands it over."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from kv_transfer.handover import EndReason, Handover
from kv_transfer.source import HandoverSource
from kvrelay import failpoints, telemetry, wire
from kvrelay.engine.events import Admitted, Event, Failed, Finished, Progress, Sampled, StepOutput
from kvrelay.engine.sequence import Role
from kvrelay.engine.sequence import Sequence as EngineSequence
from kvrelay.errors import KvrelayError
from kvrelay.request import LinkStatus
from kvrelay.rpc import Service, deadline_of
from kvrelay.telemetry import Attribute, SpanName
from kvrelay.v1 import worker_pb2, worker_pb2_grpc
from kvrelay.worker import Resources, check_epoch

__all__ = ["PrefillWorker"]

_FAILPOINTS = {
    "admitted": "prefill.admitted",
    "last_chunk": "prefill.last_chunk",
    "first_token": "prefill.first_token",
}


class PrefillWorker(worker_pb2_grpc.PrefillServiceServicer):
    """Serves PrefillService to gateways and KvService to decode workers."""

    def __init__(self, resources: Resources) -> None:
        self.engine = resources.engine
        self.block_size = resources.runner.layout.block_size
        self.max_batched_tokens = resources.settings.engine.max_batched_tokens
        self.worker_id = resources.worker_id
        self._calls: dict[str, _PrefillCall] = {}  # by request id
        self.source = HandoverSource(
            self.worker_id,
            self.engine,
            resources.runner.cache,
            resources.cluster_key,
            resources.settings.transfer.lease_seconds,
            self._calls,
        )

    @property
    def services(self) -> Sequence[Service]:
        return (
            Service("kvrelay.v1.PrefillService", worker_pb2_grpc.add_PrefillServiceServicer_to_server, self),
            self.source.service,
        )

    def begin(self, epoch: int) -> None:
        self.source.begin(epoch)

    async def stop(self) -> None:
        self.source.stop()

    def leave(self) -> None:
        """The calls in progress end with their handovers, by themselves."""

    def links(self) -> Sequence[LinkStatus]:
        return ()

    async def Prefill(
        self, request: worker_pb2.PrefillRequest, context: Any
    ) -> AsyncIterator[worker_pb2.PrefillResponse]:
        check_epoch(request.worker_epoch, self.source.leases.epoch)
        call = _PrefillCall(self, request)
        sequence = EngineSequence(call.request, Role.PREFILL, arrival=call.arrival, deadline=deadline_of(context))
        try:
            await self.engine.submit(sequence, call.on_event)
        except asyncio.CancelledError:
            call.end_lease()  # the events of its first step may have overtaken the answer
            raise
        self._calls[call.request.request_id] = call
        try:
            async for response in call.responses():
                yield response
        finally:
            del self._calls[call.request.request_id]
            call.end_lease()
            self.engine.abort(call.request.request_id)


class _PrefillCall:
    """One Prefill call: turns the engine's events into responses and into the progress of the handover."""

    def __init__(self, worker: PrefillWorker, call: worker_pb2.PrefillRequest) -> None:
        self.request = wire.request_from_proto(call.sequence)
        self.arrival = time.monotonic()
        self._worker = worker
        self.gateway_id = call.gateway_id
        self._traceparent = call.sequence.traceparent
        self._announces_last_chunk = call.announce_last_chunk
        self._outbox: asyncio.Queue[worker_pb2.PrefillResponse | KvrelayError | None] = asyncio.Queue()
        self._handover: Handover | None = None
        self._admitted_at = self.arrival
        self._cached_tokens = 0

    async def responses(self) -> AsyncIterator[worker_pb2.PrefillResponse]:
        """The ticket, the last chunk and the first token; ends with the handover.

        Raises:
            KvrelayError: the engine could not do it.
        """
        while (response := await self._outbox.get()) is not None:
            if isinstance(response, KvrelayError):
                raise response
            await failpoints.reach(_FAILPOINTS[response.WhichOneof("event") or ""])
            yield response
            if response.HasField("first_token") and self._handover is not None:
                break
        if self._handover is not None:
            await self._handover.wait_ended()

    def end_lease(self) -> None:
        """Ends the lease that was granted to this call, if one was; another with its request's id may have one."""
        if self._handover is not None:
            self._worker.source.leases.end(self.request.request_id, EndReason.ABORTED)

    def on_event(self, event: Event, step: StepOutput) -> None:
        """Called by the engine, in order."""
        match event:
            case Admitted():
                self._admit(event, step)
            case Progress() if self._handover is not None:
                self._handover.advance(event.num_computed_tokens // self._worker.block_size)
                self._announce_last_chunk(event.num_computed_tokens)
                failpoints.reach_now("prefill.chunk")
            case Sampled():
                self._complete(event, step)
            case Finished():
                self._outbox.put_nowait(None)
            case Failed():
                self._worker.source.leases.end(event.request_id, EndReason.FAILED)
                self._outbox.put_nowait(event.error)

    def _admit(self, event: Admitted, step: StepOutput) -> None:
        self._admitted_at = step.started
        self._cached_tokens = event.num_cached_blocks * self._worker.block_size
        self._trace(SpanName.PREFILL_QUEUE, self.arrival, step.started)
        if len(self.request.completion_token_ids) + 1 == self.request.sampling.max_tokens:
            return  # nobody will come for the KV cache
        self._handover, ticket = self._worker.source.grant(
            event.request_id, self.gateway_id, event.block_ids, event.generations, ends_with_call=True
        )
        self._handover.advance(event.num_cached_blocks)
        self._outbox.put_nowait(worker_pb2.PrefillResponse(admitted=worker_pb2.Admitted(ticket=ticket)))
        self._announce_last_chunk(self._cached_tokens)

    def _announce_last_chunk(self, num_computed_tokens: int) -> None:
        num_left = len(self.request.token_ids) - num_computed_tokens
        if self._announces_last_chunk and num_left <= self._worker.max_batched_tokens:
            self._announces_last_chunk = False
            self._outbox.put_nowait(worker_pb2.PrefillResponse(last_chunk=worker_pb2.LastChunk()))

    def _complete(self, event: Sampled, step: StepOutput) -> None:
        self._trace(SpanName.PREFILL, self._admitted_at, step.ended)
        token = event.token
        first = worker_pb2.FirstToken(
            token_id=token.token_id,
            logprobs=None if token.logprobs is None else wire.logprobs_to_proto(token.logprobs),
            finish_reason=wire.finish_reason_to_proto(event.finish_reason),
            cached_tokens=self._cached_tokens,
            prefill_queue=self._admitted_at - self.arrival,
            prefill=step.ended - self._admitted_at,
        )
        if event.finish_reason is not None:
            self._worker.source.leases.end(event.request_id, EndReason.ABORTED)
            self._handover = None
        elif self._handover is not None:
            self._handover.complete(token.token_id, time.monotonic())
        self._outbox.put_nowait(worker_pb2.PrefillResponse(first_token=first))

    def _trace(self, name: str, started: float, ended: float) -> None:
        attributes: dict[str, str | int] = {
            Attribute.REQUEST_ID: self.request.request_id,
            Attribute.WORKER_ID: self._worker.worker_id,
            Attribute.PROMPT_TOKENS: len(self.request.prompt_token_ids),
            Attribute.CACHED_TOKENS: self._cached_tokens,
        }
        telemetry.record_stage(name, self._traceparent, started, ended, attributes)
