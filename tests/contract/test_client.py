"""One suite over both clients: what is sent and what comes back."""

import asyncio
from typing import Any

import pytest

from kvrelay import AsyncClient, FinishReason, Internal, InvalidArgument, SamplingParams, Unavailable
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
from tests.contract.client_kit import Driver, Servicer

pytest_plugins = ["tests.contract.client_kit"]

LOGPROBS = (TokenLogprobs(6, -0.5), TokenLogprobs(7, -1.0, ((8, -0.25),)))
USAGE, TIMINGS = Usage(4, 1, 3), Timings(prefill=0.5, total=2.0)


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


async def test_an_async_stream_may_be_awaited(target: str) -> None:
    async with AsyncClient(target) as client:
        assert [chunk.seq async for chunk in await client.generate("x")] == [1, 2]


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


# How a client is made


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


def test_an_async_client_may_be_made_before_its_loop() -> None:
    client = AsyncClient("127.0.0.1:1")

    async def use() -> None:
        async with client:
            with pytest.raises(Unavailable):
                await client.status()

    asyncio.run(use())
