"""The gateway's parts that meet gRPC and the event loop: what a request's bytes hide, and how a request ends."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.request_bytes import generate_request_from_bytes
from gateway.requests import CancelHandle, Requests
from gateway.response_log import ResponseHistory, ResponseLog
from gateway.validation import GenerateCall, parse_generate
from kvrelay import rpc
from kvrelay.errors import Internal, InvalidArgument, KvrelayError, NotFound
from kvrelay.request import Chunk, FinishReason
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import inference_pb2_grpc
from tests.patience import SOON

NAME = "kvrelay.v1.InferenceService"


class Servicer(inference_pb2_grpc.InferenceServiceServicer):
    """Says what it was asked."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(text=request.text)

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        return pb.AbortResponse()


async def test_a_parser_stands_in_for_the_deserializer_of_its_method() -> None:
    add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    parsers = {"Generate": generate_request_from_bytes}
    servicer = Servicer()  # type: ignore[abstract]  # what is left out is unimplemented
    server = rpc.Server("127.0.0.1", 0, [rpc.Service(NAME, add, servicer, parsers=parsers)])
    port = await server.start()
    text = pb.GenerateRequest(text="Once").SerializeToString()
    both = text + pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5])).SerializeToString()
    try:
        async with rpc.open_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(SOON):
            call = channel.unary_stream(f"/{NAME}/Generate", None, pb.GenerateResponse.FromString)
            assert [response.text async for response in call(text)] == ["Once"]
            with pytest.raises(InvalidArgument) as caught, rpc.translated():
                _ = [response async for response in call(both)]
            assert [violation.field for violation in caught.value.violations] == ["prompt"]
            with pytest.raises(InvalidArgument, match="malformed"), rpc.translated():
                _ = [response async for response in call(b"\xff")]
            await channel.unary_unary(f"/{NAME}/Abort", None, None)(both)  # read by its own deserializer
    finally:
        await server.stop()


def call(request_id: str) -> GenerateCall:
    proto = pb.GenerateRequest(request_id=request_id, text="Once")
    return parse_generate(proto, model="tiny", vocab_size=512, context_length=64)


async def never(call: GenerateCall, log: ResponseLog, handle: CancelHandle) -> None:
    await asyncio.Event().wait()


async def read(log: ResponseLog) -> list[Chunk]:
    async with asyncio.timeout(SOON):
        return [chunk async for chunk in log.read()]


async def test_an_abort_before_the_request_has_begun() -> None:
    requests = Requests(ResponseHistory(60.0, 8))
    log = requests.begin(call("early"), never)
    requests.abort("early")  # its task has not had its first step yet
    (last,) = await read(log)
    assert last.finish_reason is FinishReason.ABORT


async def test_a_defect_is_an_answer_too() -> None:
    async def fail(call: GenerateCall, log: ResponseLog, handle: CancelHandle) -> None:
        raise ZeroDivisionError("a detail that is nobody's business")

    requests = Requests(ResponseHistory(60.0, 8))
    log = requests.begin(call("defect"), fail)
    with pytest.raises(Internal) as caught:
        await read(log)
    assert "detail" not in caught.value.message
    with pytest.raises(NotFound):
        requests.abort("defect")


async def test_the_last_reader_who_leaves_ends_the_request() -> None:
    ended = asyncio.Event()

    async def run(call: GenerateCall, log: ResponseLog, handle: CancelHandle) -> None:
        try:
            log.append("a", ())
            await asyncio.Event().wait()
        finally:
            log.fail(KvrelayError("the client left"))
            asyncio.get_running_loop().call_soon(ended.set)

    requests = Requests(ResponseHistory(60.0, 8))
    log = requests.begin(call("left"), run)
    readers = [log.read(), log.read()]
    for reader in readers:
        assert (await anext(reader)).text == "a"
    await readers[0].aclose()
    assert requests.find(call("left")) is log
    await readers[1].aclose()
    async with asyncio.timeout(SOON):
        await ended.wait()
    assert requests.find(call("left")) is None  # the same id may run again
