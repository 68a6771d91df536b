"""The decode worker: takes KV caches over, or computes prompts itself, and batches their sequences continuously."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from decode_worker.frames import FrameStream, FrameStreams
from decode_worker.intake import Intake
from kv_transfer.choice import parse_required
from kv_transfer.links import Links
from kv_transfer.puller import Puller
from kv_transfer.source import HandoverSource
from kvrelay import failpoints, telemetry, wire
from kvrelay.engine.events import Admitted, Event, Failed, Finished, HandedOver, Sampled, StepOutput
from kvrelay.engine.sequence import Role
from kvrelay.engine.sequence import Sequence as EngineSequence
from kvrelay.errors import Unavailable
from kvrelay.request import LinkStatus, WorkerRole, WorkerState
from kvrelay.rpc import Service, deadline_of
from kvrelay.telemetry import Attribute, SpanName
from kvrelay.v1 import worker_pb2, worker_pb2_grpc
from kvrelay.worker import Resources, check_epoch

__all__ = ["DecodeWorker"]


class DecodeWorker(worker_pb2_grpc.DecodeServiceServicer):
    """Serves DecodeService to gateways."""

    def __init__(self, resources: Resources) -> None:
        transfer, engine = resources.settings.transfer, resources.settings.engine
        self.engine = resources.engine
        self.frames = FrameStreams()
        self.worker_id = resources.worker_id
        self.block_size = resources.runner.layout.block_size
        self._calls: dict[str, _DecodeCall] = {}  # by request id
        key, cache = resources.cluster_key, resources.runner.cache
        self.source = HandoverSource(self.worker_id, self.engine, cache, key, transfer.lease_seconds, self._calls)
        self._directory = resources.directory
        required = parse_required(transfer.require_transport)
        self._links = Links(resources.directory, self.worker_id, cache, transfer.transport, required)
        resources.directory.on_change(self._links.follow)
        puller = Puller(self._links, cache, key, transfer.checksum)
        self.intake = Intake(self.engine, puller, engine.block_size, engine.max_batched_tokens)
        self.engine.on_step = self.frames.flush
        self._leaving = False

    @property
    def services(self) -> Sequence[Service]:
        add = worker_pb2_grpc.add_DecodeServiceServicer_to_server
        return (
            Service("kvrelay.v1.DecodeService", add, self, work=("Decode",)),
            self.source.service,
        )

    def begin(self, epoch: int) -> None:
        self.source.begin(epoch)
        self._links.epoch = epoch
        self._links.follow()

    async def stop(self) -> None:
        self.source.stop()
        await self._links.close()

    def leave(self) -> None:
        """Hands the running sequences over if another decode worker can take them; else they may finish."""
        self._leaving = self._another_is_ready()
        if self._leaving:
            for call in self._calls.values():
                call.leave()

    def _another_is_ready(self) -> bool:
        return any(
            entry.record.role is WorkerRole.DECODE
            and entry.record.worker_id != self.worker_id
            and entry.load.state is WorkerState.READY
            for entry in self._directory.snapshot().values()
        )

    def links(self) -> Sequence[LinkStatus]:
        return self._links.status()

    async def Decode(self, request: worker_pb2.DecodeRequest, context: Any) -> worker_pb2.DecodeResponse:
        check_epoch(request.worker_epoch, self._links.epoch)
        stream = self.frames.standing(request.gateway_id)
        with stream.carrying():
            await failpoints.reach("decode.received")
            return await self._run(_DecodeCall(self, request, stream), deadline_of(context))

    async def _run(self, call: "_DecodeCall", deadline: float | None) -> worker_pb2.DecodeResponse:
        request_id, ticket = call.request.request_id, call.ticket
        role = Role.DECODE if ticket else Role.WHOLE
        sequence = EngineSequence(call.request, role, arrival=call.arrival, deadline=deadline)
        if ticket:
            sequence.borrowed = await self.intake.borrowed(ticket)
        await self.engine.submit(sequence, call.on_event)
        self._calls[request_id] = call
        try:
            if self._leaving:  # since it came
                call.leave()
            return await call.run()
        finally:
            del self._calls[request_id]
            if not call.left:  # else its blocks are held under a lease
                self.engine.abort(request_id)

    async def StreamFrames(
        self, request: worker_pb2.StreamFramesRequest, context: Any
    ) -> AsyncIterator[worker_pb2.StreamFramesResponse]:
        check_epoch(request.worker_epoch, self._links.epoch)
        async for frame in self.frames.stream(request.gateway_id):
            yield frame


class _DecodeCall:
    """One Decode call: reserved; transferred, or prefilled here; running; done, or handed over to another worker.

    Args:
        stream: where its tokens go.

    Attributes:
        ticket: empty where the prompt is computed here.
        left: the sequence's blocks are held under a lease, for another decode worker.
    """

    def __init__(self, worker: DecodeWorker, call: worker_pb2.DecodeRequest, stream: FrameStream) -> None:
        self.request = wire.request_from_proto(call.sequence)
        self.gateway_id = call.gateway_id
        self.ticket = call.ticket
        self.arrival = time.monotonic()
        self._worker = worker
        self._call = call
        self._stream = stream
        loop = asyncio.get_running_loop()
        self._admitted: asyncio.Future[tuple[Admitted, float]] = loop.create_future()
        self._finished: asyncio.Future[Finished | HandedOver] = loop.create_future()
        self._prompt_done: asyncio.Future[float] = loop.create_future()
        self.left = False
        self._first_step: tuple[float, float] | None = None
        self._num_tokens = 0

    async def run(self) -> worker_pb2.DecodeResponse:
        """From the reservation of blocks to the last token.

        Raises:
            KvrelayError: the engine could not do it.
        """
        await asyncio.wait((self._admitted, self._finished), return_when=asyncio.FIRST_COMPLETED)
        if not self._admitted.done():
            await self._finished  # failed, before it had blocks
        if self.ticket:
            return await self._run_after_handover(*self._admitted.result())
        return await self._run_whole(*self._admitted.result())

    async def _run_after_handover(self, admitted: Admitted, reserved_at: float) -> worker_pb2.DecodeResponse:
        self._trace(SpanName.DECODE_QUEUE, self.arrival, reserved_at, {})
        await failpoints.reach("decode.reserved")
        taken = await self._worker.intake.take_over(self.ticket, admitted, self._call.sequence.traceparent)
        finished = await self._to_the_end(taken.at)
        step_started, step_ended = self._first_step or (taken.at, taken.at)
        response = self._response(finished, step_ended - step_started)
        response.transfer = taken.transfer
        response.decode_queue = (reserved_at - self.arrival) + max(0.0, step_started - taken.at)
        return response

    async def _run_whole(self, admitted: Admitted, admitted_at: float) -> worker_pb2.DecodeResponse:
        cached = {
            Attribute.PROMPT_TOKENS: len(self.request.prompt_token_ids),
            Attribute.CACHED_TOKENS: self._num_cached_tokens(admitted),
        }
        self._trace(SpanName.PREFILL_QUEUE, self.arrival, admitted_at, cached)
        await asyncio.wait((self._prompt_done, self._finished), return_when=asyncio.FIRST_COMPLETED)
        if not self._prompt_done.done():
            await self._finished  # failed, before the first token
        prompt_done_at = self._prompt_done.result()
        self._trace(SpanName.PREFILL, admitted_at, prompt_done_at, cached)
        finished = await self._to_the_end(prompt_done_at)
        step_started, step_ended = self._first_step or (prompt_done_at, prompt_done_at)
        return self._response(finished, step_ended - step_started)

    async def _to_the_end(self, started: float) -> Finished | HandedOver:
        """The last token. The time from `started` to then is the decode span."""
        try:
            return await self._finished
        finally:  # also where the gateway found a stop string, and cancels the call
            tokens = {Attribute.COMPLETION_TOKENS: self._num_tokens}
            self._trace(SpanName.DECODE, started, time.monotonic(), tokens)

    def leave(self) -> None:
        """Ends the call as soon as another decode worker can go on, or at once if it has not begun here."""
        request_id = self.request.request_id
        if self._admitted.done():
            self._worker.engine.tell(lambda scheduler: scheduler.hand_over(request_id))
        elif not self._finished.done():
            self._finished.set_exception(Unavailable("the worker drains", reason="DRAINING"))

    def on_event(self, event: Event, step: StepOutput) -> None:
        """Called by the engine, in order."""
        match event:
            case Admitted() if not self._admitted.done():
                self._admitted.set_result((event, step.started))
            case Sampled():
                self._sampled(event, step)
            case HandedOver() if not self._finished.done():
                self._finished.set_result(event)
            case Finished() if not self._finished.done():
                self._finished.set_result(event)
            case Failed() if not self._finished.done():
                self._finished.set_exception(event.error)

    def _sampled(self, event: Sampled, step: StepOutput) -> None:
        local_prompt = None
        if not self.ticket and not self._prompt_done.done():
            self._prompt_done.set_result(step.ended)
            local_prompt = self._local_prompt(step.ended, *self._admitted.result())
        elif self._first_step is None:
            self._first_step = (step.started, step.ended)
        self._num_tokens = event.index + 1
        self._stream.add(self._call.handle, event.index, event.token, local_prompt)

    def _local_prompt(self, done_at: float, admitted: Admitted, admitted_at: float) -> worker_pb2.LocalPrompt:
        return worker_pb2.LocalPrompt(
            cached_tokens=self._num_cached_tokens(admitted),
            prefill_queue=admitted_at - self.arrival,
            prefill=done_at - admitted_at,
        )

    def _num_cached_tokens(self, admitted: Admitted) -> int:
        return admitted.num_cached_blocks * self._worker.block_size

    def _response(self, end: Finished | HandedOver, first_decode_step: float) -> worker_pb2.DecodeResponse:
        return worker_pb2.DecodeResponse(
            finish_reason=wire.finish_reason_to_proto(end.reason if isinstance(end, Finished) else None),
            ticket=b"" if isinstance(end, Finished) else self._hold(end),
            completion_tokens=end.num_completion_tokens,
            first_decode_step=first_decode_step,
        )

    def _hold(self, end: HandedOver) -> bytes:
        """Puts the blocks under a lease; the ticket for whoever goes on."""
        handover, ticket = self._worker.source.grant(
            end.request_id, self.gateway_id, end.block_ids, end.generations, ends_with_call=False
        )
        self.left = True
        handover.complete(end.last_token_id, time.monotonic())
        return ticket

    def _trace(self, name: str, started: float, ended: float, more: Mapping[str, int]) -> None:
        attributes: dict[str, str | int] = {
            Attribute.REQUEST_ID: self.request.request_id,
            Attribute.WORKER_ID: self._worker.worker_id,
            **more,
        }
        telemetry.record_stage(name, self._call.sequence.traceparent, started, ended, attributes)
