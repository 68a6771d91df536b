"""How a request ends that does not end well, in both clients: errors, timeouts, closing and leaving early."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvrelay import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    FieldViolation,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from kvrelay.request import Chunk
from tests.contract.client_kit import ANSWER, Driver, Servicer
from tests.patience import SOON

pytest_plugins = ["tests.contract.client_kit"]


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
        async with Driver(kind, f"127.0.0.1:{reserved.getsockname()[1]}") as driver, asyncio.timeout(SOON):
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


# Leaving early


async def test_leaving_the_loop_cancels(driver: Driver, servicer: Servicer) -> None:
    servicer.waits = True
    await driver.break_after_the_first()
    async with asyncio.timeout(SOON):
        await servicer.cancelled.wait()


async def test_closing_the_client_cancels(kind: Any, target: str, servicer: Servicer) -> None:
    servicer.waits = True
    async with Driver(kind, target) as driver:
        stream = await driver.call("generate", "x")
        await servicer.started.wait()
    async with asyncio.timeout(SOON):
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
        assert await asyncio.to_thread(seen.wait, SOON)
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
