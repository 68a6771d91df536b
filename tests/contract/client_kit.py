"""A real server that plays a script, and a driver of either client."""

import asyncio
import inspect
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvrelay import AsyncClient, Client, rpc
from kvrelay.request import Chunk
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import inference_pb2_grpc
from tests.patience import SOON

ANSWER = [
    pb.GenerateResponse(request_id="r", seq=1, text="Once", token_ids=[5]),
    pb.GenerateResponse(
        request_id="r",
        seq=2,
        text=" upon",
        token_ids=[6, 7],
        logprobs=[
            pb.TokenLogprobs(chosen=pb.TokenLogprob(token_id=6, logprob=-0.5)),
            pb.TokenLogprobs(
                chosen=pb.TokenLogprob(token_id=7, logprob=-1), top=[pb.TokenLogprob(token_id=8, logprob=-0.25)]
            ),
        ],
        finish_reason=pb.FINISH_REASON_LENGTH,
        usage=pb.Usage(prompt_tokens=4, cached_tokens=1, completion_tokens=3),
        timings=pb.Timings(prefill=0.5, total=2),
    ),
]


class Servicer(inference_pb2_grpc.InferenceServiceServicer):
    """Notes what it is asked, sends `answer`, and then waits, fails or ends."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: dict[str, str] = {}
        self.answer = list(ANSWER)
        self.error: Exception | None = None
        self.waits = False
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self._note(request, context)
        self.started.set()
        try:
            for response in self.answer:
                yield response
            if self.waits:
                await asyncio.Event().wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        self._fail()

    async def Abort(self, request: Any, context: Any) -> pb.AbortResponse:
        self._note(request, context)
        self._fail()
        return pb.AbortResponse()

    async def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:
        model = pb.Model(id="demo", architecture="LlamaForCausalLM", context_length=512, vocab_size=4096)
        return pb.ListModelsResponse(models=[model])

    async def GetClusterStatus(self, request: Any, context: Any) -> pb.GetClusterStatusResponse:
        worker = pb.WorkerStatus(
            id="decode-0",
            role=pb.WORKER_ROLE_DECODE,
            pid=7,
            address="127.0.0.1:9",
            epoch=3,
            state=pb.WORKER_STATE_DRAINING,
            running=1,
            waiting=2,
            blocks_total=10,
            blocks_free=6,
            blocks_held=4,
            memory_bytes=1 << 30,
            links=[pb.LinkStatus(prefill_worker_id="p", transport="grpc", bandwidth=2e9, latency=0.5, fallback="far")],
        )
        unknown: Any = 99
        return pb.GetClusterStatusResponse(
            workers=[worker, pb.WorkerStatus(id="of-the-future", role=unknown, state=unknown)],
            gateways=[pb.GatewayStatus(id="gateway-0", address="127.0.0.1:8", pid=6)],
            queue=pb.QueueStatus(waiting=1, running=2, capacity=3),
        )

    async def ListHeldBlocks(self, request: Any, context: Any) -> pb.ListHeldBlocksResponse:
        held: dict[str, Any] = {"worker_id": "decode-0", "request_id": "r", "block_ids": [1, 2], "age_seconds": 0.5}
        return pb.ListHeldBlocksResponse(
            held=[
                pb.HeldBlocks(**held, state="running"),
                pb.HeldBlocks(**held, state="held", lease_seconds=0.0, owner="gateway-0"),
            ]
        )

    def _note(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata = {entry[0]: entry[1] for entry in context.invocation_metadata()}

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
async def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
async def target(servicer: inference_pb2_grpc.InferenceServiceServicer) -> AsyncIterator[str]:
    """Where the servicer is served: the one above, or that of a test file with one of its own."""
    add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    server = rpc.Server("127.0.0.1", 0, [rpc.Service("kvrelay.v1.InferenceService", add, servicer)])
    port = await server.start()
    try:
        async with asyncio.timeout(SOON):
            yield f"127.0.0.1:{port}"
    finally:
        await server.stop()


class Driver:
    """Drives either client from a coroutine: the sync one in a thread."""

    def __init__(self, kind: type[Client] | type[AsyncClient], target: str | None, **options: Any) -> None:
        self.client: Any = kind(target, **options)

    async def __aenter__(self) -> "Driver":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.call("close")

    async def call(self, method: str, *args: Any, **options: Any) -> Any:
        if isinstance(self.client, Client):
            return await asyncio.to_thread(getattr(self.client, method), *args, **options)
        result = getattr(self.client, method)(*args, **options)
        return await result if inspect.isawaitable(result) else result

    async def chunks(self, *args: Any, **options: Any) -> list[Chunk]:
        if isinstance(self.client, Client):
            return await asyncio.to_thread(lambda: list(self.client.generate(*args, **options)))
        return [chunk async for chunk in self.client.generate(*args, **options)]

    async def break_after_the_first(self) -> None:
        """Leaves the loop and keeps the stream nowhere."""
        if isinstance(self.client, Client):
            await asyncio.to_thread(self._break_after_the_first)
            return
        async for chunk in self.client.generate("x"):
            assert chunk.seq == 1
            break

    def _break_after_the_first(self) -> None:
        for chunk in self.client.generate("x"):
            assert chunk.seq == 1
            break


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
async def driver(kind: Any, target: str) -> AsyncIterator[Driver]:
    async with Driver(kind, target) as driver:
        yield driver
