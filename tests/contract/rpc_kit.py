"""A server that does as it is told, and a channel to it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrelay import rpc
from kvrelay.v1 import inference_pb2, inference_pb2_grpc
from tests.patience import SOON

NAME = "kvrelay.v1.InferenceService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Servicer(inference_pb2_grpc.InferenceServiceServicer):
    """Generate sends `count` responses and then does what `ending` does; so does Abort. The rest is left out."""

    def __init__(self) -> None:
        self.count = 0
        self.ending: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0)
        self.running = asyncio.Event()
        self.cleaned_up = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        try:
            for seq in range(1, self.count + 1):
                yield inference_pb2.GenerateResponse(seq=seq)
            self.running.set()
            await self.ending()
        finally:
            self.cleaned_up.set()

    async def Abort(self, request: Any, context: Any) -> inference_pb2.AbortResponse:
        await self.ending()
        return inference_pb2.AbortResponse()

    def fail_with(self, error: BaseException) -> None:
        async def fail() -> None:
            raise error

        self.ending = fail


class Running:
    """A server with its servicer, a channel to it, and that channel's stub."""

    def __init__(self, server: rpc.Server, servicer: Servicer, channel: grpc.aio.Channel, port: int) -> None:
        self.server, self.servicer, self.channel, self.port = server, servicer, channel, port
        self.stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    async def seqs(self) -> list[int]:
        return [response.seq async for response in self.stub.Generate(inference_pb2.GenerateRequest())]

    async def send(self, method: str, message: bytes) -> None:
        with rpc.translated():
            await self.channel.unary_unary(method, None, None)(message)

    async def health_of(self, service: str) -> int:
        status: int = (await self.health.Check(health_pb2.HealthCheckRequest(service=service))).status
        return status


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    servicer = Servicer()  # type: ignore[abstract]  # what is left out is unimplemented
    add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    server = rpc.Server("127.0.0.1", 0, [rpc.Service(NAME, add, servicer, work={"Generate"})])
    port = await server.start()
    try:
        async with rpc.open_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(SOON):
            yield Running(server, servicer, channel, port)
    finally:
        await server.stop()
