"""The decode worker: takes KV caches over and batches their sequences continuously."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from decode_worker.frames import FrameStreams
from decode_worker.intake import Intake, TakenOver
from kv_transfer.choice import parse_required
from kv_transfer.links import Links
from kv_transfer.puller import Puller
from kvrelay import telemetry, wire
from kvrelay.control.registry import ShmOffer
from kvrelay.engine.events import Admitted, Event, Failed, Finished, Sampled, StepOutput
from kvrelay.engine.sequence import Role
from kvrelay.engine.sequence import Sequence as EngineSequence
from kvrelay.request import LinkStatus
from kvrelay.rpc import Service, deadline_of
from kvrelay.telemetry import Attribute, SpanName
from kvrelay.v1 import worker_pb2, worker_pb2_grpc
from kvrelay.worker import Resources

__all__ = ["DecodeWorker"]


class DecodeWorker(worker_pb2_grpc.DecodeServiceServicer):
    """Serves DecodeService to gateways."""

    def __init__(self, resources: Resources) -> None:
        transfer = resources.settings.transfer
        self.engine = resources.engine
        self.frames = FrameStreams()
        self.worker_id = resources.worker_id
        cache = resources.runner.cache
        required = parse_required(transfer.require_transport)
        self._links = Links(resources.directory, self.worker_id, cache, transfer.transport, required)
        resources.directory.on_change(self._links.follow)
        self.intake = Intake(self.engine, Puller(self._links, cache, resources.cluster_key, transfer.checksum))
        self.engine.on_step = self.frames.flush

    @property
    def services(self) -> Sequence[Service]:
        add = worker_pb2_grpc.add_DecodeServiceServicer_to_server
        return (Service("kvrelay.v1.DecodeService", add, self, work=("Decode",)),)

    async def start(self, epoch: int) -> None:
        self._links.epoch = epoch
        self._links.follow()

    async def stop(self) -> None:
        await self._links.close()

    def shared_memory(self) -> ShmOffer | None:
        return None

    def links(self) -> Sequence[LinkStatus]:
        return self._links.status()

    def lease_seconds(self, request_id: str) -> float | None:
        return None

    async def Decode(self, request: worker_pb2.DecodeRequest, context: Any) -> worker_pb2.DecodeResponse:
        self.frames.check(request.gateway_id)
        call = _DecodeCall(self, request)
        sequence = EngineSequence(call.request, Role.DECODE, arrival=call.arrival, deadline=deadline_of(context))
        await self.engine.submit(sequence, call.on_event)
        try:
            return await call.run()
        finally:
            self.engine.abort(call.request.request_id)

    async def StreamFrames(
        self, request: worker_pb2.StreamFramesRequest, context: Any
    ) -> AsyncIterator[worker_pb2.StreamFramesResponse]:
        async for frame in self.frames.stream(request.gateway_id):
            yield frame


class _DecodeCall:
    """One Decode call: reserved, transferred, running, done."""

    def __init__(self, worker: DecodeWorker, call: worker_pb2.DecodeRequest) -> None:
        self.request = wire.request_from_proto(call.sequence)
        self.arrival = time.monotonic()
        self._worker = worker
        self._call = call
        loop = asyncio.get_running_loop()
        self._admitted: asyncio.Future[tuple[Admitted, float]] = loop.create_future()
        self._finished: asyncio.Future[Finished] = loop.create_future()
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
        admitted, reserved_at = self._admitted.result()
        self._trace(SpanName.DECODE_QUEUE, self.arrival, reserved_at, {})
        taken = await self._worker.intake.take_over(self._call.ticket, admitted, self._call.sequence.traceparent)
        try:
            finished = await self._finished
        finally:  # also where the gateway found a stop string, and cancels the call
            tokens = {Attribute.COMPLETION_TOKENS: self._num_tokens}
            self._trace(SpanName.DECODE, taken.at, time.monotonic(), tokens)
        return self._response(finished, reserved_at, taken)

    def on_event(self, event: Event, step: StepOutput) -> None:
        """Called by the engine, in order."""
        match event:
            case Admitted() if not self._admitted.done():
                self._admitted.set_result((event, step.started))
            case Sampled():
                if self._first_step is None:
                    self._first_step = (step.started, step.ended)
                self._num_tokens = event.index + 1
                self._worker.frames.add(self._call.gateway_id, self._call.handle, event.index, event.token)
            case Finished() if not self._finished.done():
                self._finished.set_result(event)
            case Failed() if not self._finished.done():
                self._finished.set_exception(event.error)

    def _response(self, finished: Finished, reserved_at: float, taken: TakenOver) -> worker_pb2.DecodeResponse:
        step_started, step_ended = self._first_step or (taken.at, taken.at)
        return worker_pb2.DecodeResponse(
            finish_reason=wire.finish_reason_to_proto(finished.reason),
            completion_tokens=finished.num_completion_tokens,
            transfer=taken.transfer,
            decode_queue=(reserved_at - self.arrival) + max(0.0, step_started - taken.at),
            first_decode_step=step_ended - step_started,
        )

    def _trace(self, name: str, started: float, ended: float, more: Mapping[str, int]) -> None:
        attributes: dict[str, str | int] = {
            Attribute.REQUEST_ID: self.request.request_id,
            Attribute.WORKER_ID: self._worker.worker_id,
            **more,
        }
        telemetry.record_stage(name, self._call.sequence.traceparent, started, ended, attributes)
