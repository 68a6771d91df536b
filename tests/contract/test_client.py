"""One suite over both clients, against a real server that plays a script."""

import asyncio
import inspect
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from kvrelay import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    FieldViolation,
    FinishReason,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SamplingParams,
    Unavailable,
    rpc,
)
from kvrelay.request import (
    Chunk,
    ClusterStatus,
    GatewayStatus,
    HeldBlocks,
    LinkStatus,
    Model,
    QueueStatus,
    Timings,
    TokenLogprobs,
    Usage,
    WorkerRole,
    WorkerState,
    WorkerStatus,
)
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import inference_pb2_grpc

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
LOGPROBS = (TokenLogprobs(6, -0.5), TokenLogprobs(7, -1.0, ((8, -0.25),)))
USAGE, TIMINGS = Usage(4, 1, 3), Timings(prefill=0.5, total=2.0)


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
        return pb.GetClusterStatusResponse(
            workers=[worker, pb.WorkerStatus(id="of-the-future", role=99, state=99)],
            gateways=[pb.GatewayStatus(id="gateway-0", address="127.0.0.1:8", pid=6)],
            queue=pb.QueueStatus(waiting=1, running=2, capacity=3),
        )

    async def ListHeldBlocks(self, request: Any, context: Any) -> pb.ListHeldBlocksResponse:
        held = {"worker_id": "decode-0", "request_id": "r", "block_ids": [1, 2], "age_seconds": 0.5}
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
async def target(servicer: Servicer) -> AsyncIterator[str]:
    add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    server = rpc.Server("127.0.0.1", 0, [rpc.Service("kvrelay.v1.InferenceService", add, servicer)])
    port = await server.start()
    try:
        async with asyncio.timeout(20):
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


# What comes back


async def test_generate_gives_chunks(driver: Driver) -> None:
    assert await driver.chunks("x") == [
        Chunk("r", 1, "Once", (5,)),
        Chunk("r", 2, " upon", (6, 7), LOGPROBS, FinishReason.LENGTH, USAGE, TIMINGS),
    ]


async def test_complete_joins_them(driver: Driver) -> None:
    completion = await driver.call("complete", "x")
    assert (completion.request_id, completion.text, completion.token_ids) == ("r", "Once upon", (5, 6, 7))
    assert completion.finish_reason is FinishReason.LENGTH
    assert (completion.logprobs, completion.usage, completion.timings) == (LOGPROBS, USAGE, TIMINGS)


async def test_a_stream_without_an_end_is_no_completion(driver: Driver, servicer: Servicer) -> None:
    servicer.answer.pop()
    with pytest.raises(Internal, match="finish reason"):
        await driver.call("complete", "x")


async def test_the_cluster_is_described(driver: Driver) -> None:
    worker = WorkerStatus(
        id="decode-0",
        role=WorkerRole.DECODE,
        pid=7,
        address="127.0.0.1:9",
        epoch=3,
        state=WorkerState.DRAINING,
        running=1,
        waiting=2,
        blocks_total=10,
        blocks_free=6,
        blocks_held=4,
        memory_bytes=1 << 30,
        links=(LinkStatus("p", "grpc", bandwidth=2e9, latency=0.5, fallback="far"),),
    )
    status = await driver.call("status")
    assert isinstance(status, ClusterStatus)
    assert status.workers[0] == worker
    assert (status.workers[1].role, status.workers[1].state) == (WorkerRole.UNSPECIFIED, WorkerState.UNSPECIFIED)
    assert status.gateways == (GatewayStatus("gateway-0", "127.0.0.1:8", 6),)
    assert status.queue == QueueStatus(waiting=1, running=2, capacity=3)
    assert await driver.call("list_models") == (Model("demo", "LlamaForCausalLM", 512, 4096),)
    assert await driver.call("held_blocks") == (
        HeldBlocks("decode-0", "r", "running", (1, 2), 0.5, None),
        HeldBlocks("decode-0", "r", "held", (1, 2), 0.5, 0.0, "gateway-0"),
    )


# What is sent


async def test_every_option_arrives(driver: Driver, servicer: Servicer) -> None:
    sampling: dict[str, Any] = {
        "max_tokens": 9,
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 0,
        "min_p": 0.25,
        "seed": 2**64 - 1,
        "stop": ["a", "b"],
        "stop_token_ids": [3, 4],
        "ignore_eos": False,
        "logprobs": 0,
    }
    others: dict[str, Any] = {"model": "demo", "cache_salt": "s", "priority": -1, "resume_after_seq": 0}
    await driver.chunks("x", request_id="mine", metadata={"traceparent": "00-1"}, **sampling, **others)
    assert servicer.requests == [
        pb.GenerateRequest(request_id="mine", text="x", sampling=pb.SamplingParams(**sampling), **others)
    ]
    assert servicer.metadata["traceparent"] == "00-1"


async def test_what_is_left_out_stays_unset(driver: Driver, servicer: Servicer) -> None:
    await driver.chunks("x", temperature=None, stop=None)
    [request] = servicer.requests
    assert request.sampling == pb.SamplingParams()
    assert not request.HasField("priority")
    assert not request.HasField("resume_after_seq")


async def test_the_prompt_may_be_tokens_or_messages(driver: Driver, servicer: Servicer) -> None:
    await driver.chunks(token_ids=[1, 2])
    await driver.chunks(token_ids=[])
    await driver.chunks(messages=[{"role": "user", "content": "hi"}])
    tokens, empty, chat = servicer.requests
    assert list(tokens.token_ids.ids) == [1, 2]
    assert empty.WhichOneof("prompt") == "token_ids"
    assert list(chat.chat.messages) == [pb.ChatMessage(role="user", content="hi")]


async def test_stop_may_be_one_string_and_keywords_beat_the_params_given(driver: Driver, servicer: Servicer) -> None:
    await driver.chunks("x", stop="end", seed=1, sampling=SamplingParams(seed=2, top_k=5))
    assert servicer.requests[0].sampling == pb.SamplingParams(stop=["end"], seed=1, top_k=5)


async def test_a_request_id_is_known_before_the_first_chunk(driver: Driver, servicer: Servicer) -> None:
    stream = await driver.call("generate", "x")
    other = await driver.call("generate", "x", request_id="mine")
    assert len(stream.request_id) >= 32
    assert other.request_id == "mine"
    await driver.call("abort", stream.request_id)
    assert pb.AbortRequest(request_id=stream.request_id) in servicer.requests


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("max_tokens", {"max_tokens": -1}),
        ("top_k", {"top_k": 2**32}),
        ("seed", {"seed": 1.5}),
        ("temperature", {"temperature": "hot"}),
        ("stop", {"stop": ["\ud800"]}),
        ("stop_token_ids", {"stop_token_ids": [1, -1]}),
        ("token_ids", {"token_ids": [2**32]}),
        ("messages[0]", {"messages": [{"role": "user"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
        ("prompt", {"prompt": "x", "token_ids": [1]}),
        ("request_id", {"request_id": 5}),
        ("metadata", {"metadata": {"a b": "c"}}),
        ("metadata", {"metadata": {"a": "\n"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_value_that_fits_no_field_is_named(driver: Driver, field: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await driver.chunks(**options)
    assert [violation.field for violation in caught.value.violations] == [field]


async def test_an_unknown_keyword_is_a_type_error(driver: Driver) -> None:
    with pytest.raises(TypeError, match="max_token"):
        await driver.chunks("x", max_token=1)


# Errors


async def test_errors_are_kvrelays_own(driver: Driver, servicer: Servicer) -> None:
    servicer.error = ResourceExhausted("full", reason="QUEUE_FULL", retry_after=1.5)
    for method in ("complete", "abort"):
        with pytest.raises(ResourceExhausted) as caught:
            await driver.call(method, "x")
        assert (caught.value.message, caught.value.reason, caught.value.retry_after) == ("full", "QUEUE_FULL", 1.5)
    servicer.error = NotFound("no such", violations=[FieldViolation("model", "unknown")])
    with pytest.raises(NotFound) as found:
        await driver.chunks("x")
    assert found.value.violations == (FieldViolation("model", "unknown"),)


async def test_a_connection_that_breaks_after_the_last_response_took_nothing_away(
    driver: Driver, servicer: Servicer
) -> None:
    servicer.error = Unavailable("the connection broke")
    assert [chunk.seq for chunk in await driver.chunks("x")] == [1, 2]
    servicer.answer = ANSWER[:1]
    with pytest.raises(Unavailable):
        await driver.chunks("x")


async def test_nobody_listening_is_unavailable_at_once(kind: Any) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        async with Driver(kind, f"127.0.0.1:{reserved.getsockname()[1]}") as driver, asyncio.timeout(5):
            for method in ("complete", "abort"):
                with pytest.raises(Unavailable):
                    await driver.call(method, "x")


@pytest.mark.parametrize(("of_client", "of_call"), [(0.1, None), (60, 0.1)])
async def test_a_timeout_is_deadline_exceeded(
    kind: Any, target: str, servicer: Servicer, of_client: float, of_call: float | None
) -> None:
    servicer.waits = True
    async with Driver(kind, target, timeout=of_client) as driver:
        with pytest.raises(DeadlineExceeded):
            await driver.call("complete", "x", timeout=of_call)
    await servicer.cancelled.wait()


async def test_a_closed_client_says_so(kind: Any, target: str) -> None:
    driver = Driver(kind, target)
    await driver.call("close")
    for method in ("generate", "status"):
        with pytest.raises(RuntimeError, match="closed"):
            await driver.call(method)


async def test_the_target_comes_from_the_environment(
    kind: Any, target: str, monkeypatch: pytest.MonkeyPatch, servicer: Servicer
) -> None:
    monkeypatch.setenv("KVRELAY_TARGET", target)
    async with Driver(kind, None) as driver:
        await driver.call("abort", "x")
    assert servicer.requests
    monkeypatch.delenv("KVRELAY_TARGET")
    async with Driver(kind, None) as driver:
        assert driver.client.target == "localhost:50051"


# Leaving early


async def test_leaving_the_loop_cancels(driver: Driver, servicer: Servicer) -> None:
    servicer.waits = True
    await driver.break_after_the_first()
    async with asyncio.timeout(2):
        await servicer.cancelled.wait()


async def test_closing_the_client_cancels(kind: Any, target: str, servicer: Servicer) -> None:
    servicer.waits = True
    async with Driver(kind, target) as driver:
        stream = await driver.call("generate", "x")
        await servicer.started.wait()
    async with asyncio.timeout(2):
        await servicer.cancelled.wait()
    del stream  # so long it was kept


async def test_closing_a_stream_ends_whoever_reads_it_elsewhere_sync(target: str, servicer: Servicer) -> None:
    servicer.waits = True
    seen = threading.Event()

    def read(stream: Iterator[Chunk]) -> list[int]:
        seqs = []
        for chunk in stream:
            seqs.append(chunk.seq)
            if len(seqs) == len(ANSWER):
                seen.set()
        return seqs

    with Client(target) as client, client.generate("x") as stream:
        reading = asyncio.create_task(asyncio.to_thread(read, stream))
        assert await asyncio.to_thread(seen.wait, 5)
        stream.close()
        assert await reading == [1, 2]
        assert list(stream) == []
    await servicer.cancelled.wait()


async def test_closing_a_stream_ends_whoever_reads_it_elsewhere_async(target: str, servicer: Servicer) -> None:
    servicer.waits = True
    async with AsyncClient(target) as client, client.generate("x") as stream:
        assert [(await anext(stream)).seq for _ in ANSWER] == [1, 2]
        reading = asyncio.create_task(anext(stream, None))
        await asyncio.sleep(0)
        await stream.close()
        assert await reading is None
        assert [chunk async for chunk in stream] == []
    await servicer.cancelled.wait()


async def test_a_cancelled_task_cancels_its_request(target: str, servicer: Servicer) -> None:
    servicer.waits = True
    async with AsyncClient(target) as client:
        task = asyncio.create_task(client.complete("x"))
        await servicer.started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await servicer.cancelled.wait()


async def test_an_async_stream_may_be_awaited(target: str) -> None:
    async with AsyncClient(target) as client:
        assert [chunk.seq async for chunk in await client.generate("x")] == [1, 2]


def test_an_async_client_may_be_made_before_its_loop() -> None:
    client = AsyncClient("127.0.0.1:1")

    async def use() -> None:
        async with client:
            with pytest.raises(Unavailable):
                await client.status()

    asyncio.run(use())
