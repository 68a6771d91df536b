"""Peers that fall silent, start anew or talk nonsense, over a real socket."""

import asyncio
import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrelay import rpc
from kvrelay.errors import Cancelled, KvrelayError, Unavailable
from kvrelay.v1 import inference_pb2, inference_pb2_grpc
from tests.contract.rpc_kit import NOT_SERVING, Running, running
from tests.patience import SOON

__all__ = ["running"]


class Relay:
    """Forwards bytes to a port until it is frozen; then it holds the connections open and says nothing."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Relay":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def freeze(self) -> None:
        self._flowing.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.create_task(self._forward(source, sink)))

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.closing(sink):
            while data := await source.read(1 << 16):
                await self._flowing.wait()
                sink.write(data)


async def test_a_silent_peer_is_noticed(running: Running) -> None:
    running.servicer.count, running.servicer.ending = 1, asyncio.Event().wait
    async with Relay(running.port) as relay, rpc.open_channel(f"127.0.0.1:{relay.port}") as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(inference_pb2.GenerateRequest())
        await call.read()
        relay.freeze()
        with pytest.raises(Unavailable), rpc.translated():
            async with asyncio.timeout(SOON / 2):  # by itself, gRPC would notice after a minute
                await call.read()


async def test_a_channel_finds_a_restarted_server(running: Running) -> None:
    await running.server.stop()
    with pytest.raises(Unavailable), rpc.translated():
        await running.health_of("")
    again = rpc.Server("127.0.0.1", running.port, [])
    await again.start()
    try:
        async with asyncio.timeout(SOON):
            request = health_pb2.HealthCheckRequest()
            assert (await running.health.Check(request, wait_for_ready=True)).status == NOT_SERVING
    finally:
        await again.stop()


async def test_noise_on_the_port_harms_nobody(running: Running) -> None:
    for noise in (b"\x00" * 100, b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64):
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall(noise)
    assert await running.seqs() == []


async def ends_of_calls(seconds: float) -> list[KvrelayError | None]:
    """Of calls that come to a server whose event loop stands still for so long, and then stops it."""
    server = rpc.Server("127.0.0.1", 0, [])
    port = await server.start()

    def call() -> KvrelayError | None:
        with rpc.open_sync_channel(f"127.0.0.1:{port}") as channel:
            try:
                with rpc.translated():
                    health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            except KvrelayError as error:
                return error
        return None

    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(call) for _ in range(4)]
        time.sleep(seconds)  # noqa: ASYNC251
        await server.stop()
        return await asyncio.gather(*map(asyncio.wrap_future, calls))


async def test_calls_that_a_server_never_took_up_before_it_stopped_can_be_sent_again() -> None:
    """gRPC drops them with a bare CANCELLED, though nobody has cancelled them."""
    for seconds in (0.2, 1.0, 5.0, 20.0):  # nobody is told when a call has come; on a busy machine it takes its time
        ends = await ends_of_calls(seconds)
        assert all(isinstance(error, Unavailable) for error in ends)
        if any("before it took the call up" in str(error) for error in ends):
            return
    pytest.fail("no call came before its server stopped")


async def test_what_a_client_cancelled_is_no_loss(running: Running) -> None:
    running.servicer.count, running.servicer.ending = 1, asyncio.Event().wait
    with rpc.open_sync_channel(f"127.0.0.1:{running.port}") as channel:
        call: Any = inference_pb2_grpc.InferenceServiceStub(channel).Generate(inference_pb2.GenerateRequest())
        call.cancel()
        with pytest.raises(Cancelled), rpc.translated():
            await asyncio.to_thread(next, call)
