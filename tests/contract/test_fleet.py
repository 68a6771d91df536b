"""The gateway's connection to a worker: answers and frames that come in any order, and a connection that ends."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from gateway.fleet import Connection
from kvrelay.control.registry import ModelInfo, WorkerRecord
from kvrelay.errors import Internal, Unavailable
from kvrelay.request import WorkerRole
from kvrelay.rpc import Server, Service
from kvrelay.v1 import inference_pb2, worker_pb2, worker_pb2_grpc
from tests.patience import SOON, until

MODEL = ModelInfo("model", "Llama", 64, 512, 16, "cd")
NUM_TOKENS = 3


class DecodeWorker(worker_pb2_grpc.DecodeServiceServicer):
    """Sends its tokens in one frame, and ends the frames before it answers, as a worker that drains may."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.frames_ended = asyncio.Event()
        self._handle = asyncio.get_running_loop().create_future()

    async def Decode(self, request: worker_pb2.DecodeRequest, context: Any) -> worker_pb2.DecodeResponse:
        self._handle.set_result(request.handle)
        await self.may_answer.wait()
        return worker_pb2.DecodeResponse(finish_reason=inference_pb2.FINISH_REASON_LENGTH, completion_tokens=NUM_TOKENS)

    async def StreamFrames(
        self, request: worker_pb2.StreamFramesRequest, context: Any
    ) -> AsyncIterator[worker_pb2.StreamFramesResponse]:
        yield worker_pb2.StreamFramesResponse()
        tokens = worker_pb2.SequenceTokens(handle=await self._handle, first_index=0, token_ids=[7] * NUM_TOKENS)
        yield worker_pb2.StreamFramesResponse(sequences=[tokens])
        self.frames_ended.set()


class GenerousDecodeWorker(worker_pb2_grpc.DecodeServiceServicer):
    """Tells the tokens of all calls, in the order in which they came, as soon as so many have come."""

    def __init__(self, num_calls: int) -> None:
        self.handles: list[int] = []
        self.may_stream = True
        self._num_calls = num_calls
        self._all_here = asyncio.Event()

    async def Decode(self, request: worker_pb2.DecodeRequest, context: Any) -> worker_pb2.DecodeResponse:
        self.handles.append(request.handle)
        if len(self.handles) == self._num_calls:
            self._all_here.set()
        return worker_pb2.DecodeResponse(finish_reason=inference_pb2.FINISH_REASON_LENGTH, completion_tokens=NUM_TOKENS)

    async def StreamFrames(
        self, request: worker_pb2.StreamFramesRequest, context: Any
    ) -> AsyncIterator[worker_pb2.StreamFramesResponse]:
        if not self.may_stream:
            raise Unavailable("not now")
        yield worker_pb2.StreamFramesResponse()
        await self._all_here.wait()
        if not self.may_stream:
            return
        for handle in self.handles:
            tokens = worker_pb2.SequenceTokens(handle=handle, first_index=0, token_ids=[7] * NUM_TOKENS)
            yield worker_pb2.StreamFramesResponse(sequences=[tokens])
        await asyncio.Event().wait()

    def end_frames(self) -> None:
        """For good, though calls are answered."""
        self.may_stream = False
        self._all_here.set()


class PrefillWorker(worker_pb2_grpc.PrefillServiceServicer):
    """Takes the request, and says no more."""

    async def Prefill(
        self, request: worker_pb2.PrefillRequest, context: Any
    ) -> AsyncIterator[worker_pb2.PrefillResponse]:
        yield worker_pb2.PrefillResponse(admitted=worker_pb2.Admitted(ticket=b"ticket"))
        await asyncio.Event().wait()


class Sink:
    def __init__(self) -> None:
        self.num_tokens = 0
        self._more = asyncio.Event()

    def take(self, tokens: worker_pb2.SequenceTokens) -> None:
        self.num_tokens += len(tokens.token_ids)
        self._more.set()

    async def wait_for(self, num_tokens: int) -> None:
        while self.num_tokens < num_tokens:
            await self._more.wait()


@pytest.fixture
async def worker() -> DecodeWorker:
    return DecodeWorker()


@pytest.fixture
async def went_down() -> asyncio.Event:
    return asyncio.Event()


@pytest.fixture
async def connection(worker: DecodeWorker, went_down: asyncio.Event) -> AsyncIterator[Connection]:
    async with decode_connection(worker, went_down) as made:
        yield made


@contextlib.asynccontextmanager
async def decode_connection(
    worker: worker_pb2_grpc.DecodeServiceServicer, went_down: asyncio.Event | None = None
) -> AsyncIterator[Connection]:
    add: Callable[..., None] = worker_pb2_grpc.add_DecodeServiceServicer_to_server
    service = Service("kvrelay.v1.DecodeService", add, worker)
    async with connection_to("decode-0", WorkerRole.DECODE, service, went_down) as made:
        yield made


@contextlib.asynccontextmanager
async def connection_to(
    worker_id: str, role: WorkerRole, service: Service, went_down: asyncio.Event | None = None
) -> AsyncIterator[Connection]:
    """A connection that is up, to a server of this service."""
    server = Server("127.0.0.1", 0, [service])
    port = await server.start()
    record = WorkerRecord(worker_id, role, f"127.0.0.1:{port}", os.getpid(), MODEL, epoch=1)
    made = Connection(record, "gateway-0", lambda: None if made.up or went_down is None else went_down.set())
    try:
        await until(lambda: made.up)
        yield made
    finally:
        await made.close()
        await server.stop()


def decode(connection: Connection, sink: Sink) -> "asyncio.Task[worker_pb2.DecodeResponse]":
    return asyncio.create_task(connection.decode(worker_pb2.SequenceSpec(), b"ticket", 10.0, sink))


async def test_an_answer_after_the_end_of_the_frames_counts(
    worker: DecodeWorker, went_down: asyncio.Event, connection: Connection
) -> None:
    sink = Sink()
    task = decode(connection, sink)
    async with asyncio.timeout(SOON):
        await worker.frames_ended.wait()
        await went_down.wait()
        worker.may_answer.set()
        response = await task
    assert response.completion_tokens == sink.num_tokens == NUM_TOKENS


async def test_without_frames_a_worker_that_does_not_answer_is_lost(connection: Connection) -> None:
    with pytest.raises(Unavailable) as caught:
        await asyncio.wait_for(decode(connection, Sink()), SOON)
    assert caught.value.reason == "WORKER_LOST"
    assert caught.value.metadata == {"stage": "decode", "worker": "decode-0"}


@contextlib.asynccontextmanager
async def prefill_connection() -> AsyncIterator[Connection]:
    add: Callable[..., None] = worker_pb2_grpc.add_PrefillServiceServicer_to_server
    service = Service("kvrelay.v1.PrefillService", add, PrefillWorker())
    async with connection_to("prefill-0", WorkerRole.PREFILL, service) as made:
        yield made


async def next_response(responses: AsyncIterator[worker_pb2.PrefillResponse]) -> worker_pb2.PrefillResponse:
    return await anext(responses)


async def test_a_prefill_worker_that_leaves_the_registry_is_lost() -> None:
    """Closing the channel cancels its calls, which must not look as if the client had cancelled the request."""
    async with (
        asyncio.timeout(SOON),
        prefill_connection() as connection,
        connection.prefill(worker_pb2.SequenceSpec(), None) as responses,
    ):
        assert (await next_response(responses)).admitted.ticket == b"ticket"
        waiting = asyncio.create_task(next_response(responses))
        await asyncio.sleep(0)
        await connection.close()
        with pytest.raises(Unavailable) as caught:
            await waiting
    assert caught.value.reason == "WORKER_LOST"
    assert caught.value.metadata == {"stage": "prefill", "worker": "prefill-0"}


async def test_a_cancelled_wait_for_a_prefill_worker_is_a_cancellation() -> None:
    async with (
        asyncio.timeout(SOON),
        prefill_connection() as connection,
        connection.prefill(worker_pb2.SequenceSpec(), None) as responses,
    ):
        assert (await next_response(responses)).admitted.ticket == b"ticket"
        waiting = asyncio.create_task(next_response(responses))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_a_decode_worker_that_leaves_the_registry_is_lost(worker: DecodeWorker, connection: Connection) -> None:
    """As a prefill worker that does; the request goes on elsewhere only if nobody seems to have cancelled it."""
    async with asyncio.timeout(SOON):
        task = decode(connection, Sink())
        await worker.frames_ended.wait()
        await connection.close()
        with pytest.raises(Unavailable) as caught:
            await task
    assert caught.value.reason == "WORKER_LOST"
    assert caught.value.metadata == {"stage": "decode", "worker": "decode-0"}


async def test_a_call_of_a_connection_that_was_closed_finds_its_worker_lost() -> None:
    """Between the placement of a request and its call the worker may have left."""
    async with prefill_connection() as connection:
        await connection.close()
        with pytest.raises(Unavailable) as caught:
            async with connection.prefill(worker_pb2.SequenceSpec(), None):
                pass
        assert caught.value.reason == "WORKER_LOST"
        with pytest.raises(Unavailable):
            await connection.status(1.0)


async def test_a_call_for_which_no_frames_would_come_finds_its_worker_lost() -> None:
    """Else it would wait for ever, on a connection that looks whole: the stream opens again a moment later."""
    worker = GenerousDecodeWorker(num_calls=1)
    async with decode_connection(worker) as connection:
        worker.end_frames()
        await until(lambda: not connection.up)
        with pytest.raises(Unavailable) as caught:
            await decode(connection, Sink())
        assert caught.value.reason == "WORKER_LOST"
        assert worker.handles == []
        await connection.close()
        with pytest.raises(Unavailable) as caught:
            await decode(connection, Sink())
        assert caught.value.reason == "WORKER_LOST"


async def test_no_two_connections_call_anything_by_the_same_number() -> None:
    """What is under way from a worker that was given up, and is there again, must name nothing of the new one."""
    handles: list[int] = []
    for _ in range(2):
        worker = GenerousDecodeWorker(num_calls=2)
        async with asyncio.timeout(SOON), decode_connection(worker) as connection:
            await asyncio.gather(decode(connection, Sink()), decode(connection, Sink()))
        handles += worker.handles
    assert len(set(handles)) == 4


class BrokenSink(Sink):
    def take(self, tokens: worker_pb2.SequenceTokens) -> None:
        raise ValueError("a defect")


async def test_a_defect_of_one_request_is_no_other_s() -> None:
    worker = GenerousDecodeWorker(num_calls=2)
    async with asyncio.timeout(SOON), decode_connection(worker) as connection:
        broken, sink = decode(connection, BrokenSink()), Sink()
        assert (await decode(connection, sink)).completion_tokens == sink.num_tokens == NUM_TOKENS
        with pytest.raises(Internal):
            await broken
        assert connection.up
