"""A decode worker's calls, over an engine whose steps a test holds up: what ends them, and where they go."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from decode_worker.service import DecodeWorker
from kvrelay.control.membership import WorkerEntry
from kvrelay.control.registry import ModelInfo, WorkerLoad, WorkerRecord
from kvrelay.engine.async_engine import AsyncEngine
from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.engine import Engine
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.kv_layout import KvLayout
from kvrelay.engine.limits import Limits
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import Chunk
from kvrelay.errors import FailedPrecondition, Unavailable
from kvrelay.request import Token, WorkerRole, WorkerState
from kvrelay.settings import Settings
from kvrelay.v1 import worker_pb2
from tests.patience import SOON

NUM_BLOCKS = 64
MODEL = ModelInfo("model", "llama", 512, 100, 16, "00")
OTHER = WorkerEntry(
    WorkerRecord("d2", WorkerRole.DECODE, "host:1", 1, MODEL, epoch=1),
    WorkerLoad(WorkerState.READY, 0, 0, NUM_BLOCKS, NUM_BLOCKS, 0),
    0.0,
)


class Runner:
    """Draws the same token always. Each step waits until it may be computed."""

    overlaps = False

    def __init__(self) -> None:
        self._begun, self._allowed = threading.Semaphore(0), threading.Semaphore(0)
        self._unattended = False

    def launch(self, chunks: Sequence[Chunk]) -> Any:
        self._begun.release()
        assert self._unattended or self._allowed.acquire(timeout=SOON)
        num_tokens = sum(chunk.samples for chunk in chunks)
        return SimpleNamespace(tokens=lambda: [Token(5)] * num_tokens)

    async def wait_for_step(self) -> None:
        """Returns in the middle of the next step."""
        assert await asyncio.to_thread(self._begun.acquire, timeout=SOON)

    def end_step(self) -> None:
        self._allowed.release()

    async def step(self) -> None:
        await self.wait_for_step()
        self.end_step()

    def run_on(self) -> None:
        """No step waits any more."""
        self._unattended = True
        self._allowed.release()


class Bench:
    """A worker that knows of another."""

    def __init__(self) -> None:
        self.runner = Runner()
        self.scheduler = Scheduler(BlockPool(NUM_BLOCKS), Limits(8, 64, 512, 16, evicts=True))
        self.engine = AsyncEngine(Engine(self.scheduler, self.runner))
        layout = KvLayout(b"model", "float32", 16, 1, 1, 8)
        cache = KvCache(layout, NUM_BLOCKS, torch.device("cpu"))
        resources: Any = SimpleNamespace(
            engine=self.engine,
            worker_id="d1",
            cluster_key=b"k" * 32,
            settings=Settings(),
            directory=SimpleNamespace(snapshot=lambda: {"d2": OTHER}, on_change=lambda listener: None),
            runner=SimpleNamespace(layout=layout, cache=cache),
        )
        self.worker = DecodeWorker(resources)

    async def stop(self) -> None:
        self.runner.run_on()
        await self.worker.stop()
        self.engine.stop()

    def decode(self, request_id: str, max_tokens: int = 400) -> "asyncio.Task[worker_pb2.DecodeResponse]":
        sampling = worker_pb2.Sampling(max_tokens=max_tokens)
        sequence = worker_pb2.SequenceSpec(request_id=request_id, prompt_token_ids=[1, 2, 3], sampling=sampling)
        request = worker_pb2.DecodeRequest(worker_epoch=1, gateway_id="g", handle=1, sequence=sequence)
        return asyncio.create_task(self.worker.Decode(request, SimpleNamespace(time_remaining=lambda: None)))

    async def wait_whole(self) -> None:
        async with asyncio.timeout(SOON):
            while await self.engine.ask(lambda scheduler: scheduler.pool.num_free) != NUM_BLOCKS:
                pass


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    made.engine.start()
    made.worker.begin(1)
    yield made
    await made.stop()


Frames = AsyncIterator[worker_pb2.StreamFramesResponse]


@contextlib.asynccontextmanager
async def frames_of(bench: Bench) -> AsyncIterator[Frames]:
    async with contextlib.aclosing(bench.worker.frames.stream("g")) as frames:
        await anext(frames)
        yield frames


async def test_a_call_without_a_stream_of_frames_is_refused(bench: Bench) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        await bench.decode("a")
    assert caught.value.reason == "NO_FRAME_STREAM"


async def test_a_call_ends_with_the_stream_that_stood_when_it_came(bench: Bench) -> None:
    """A gateway that connects anew has given up what it asked before, whose tokens are no other request's."""
    async with asyncio.timeout(SOON), frames_of(bench) as former:
        call = bench.decode("a")
        await bench.runner.step()
        assert [tokens.first_index for tokens in (await anext(former)).sequences] == [0]
        await bench.runner.wait_for_step()
        async with frames_of(bench) as frames:
            bench.runner.run_on()
            with pytest.raises(FailedPrecondition) as caught:
                await call
            assert caught.value.reason == "NO_FRAME_STREAM"
            await bench.wait_whole()
            again = bench.decode("b", max_tokens=1)
            (tokens,) = (await anext(frames)).sequences
            assert (tokens.first_index, list(tokens.token_ids)) == (0, [5])
            await again


async def test_a_call_ends_with_its_gateway_s_stream(bench: Bench) -> None:
    async with asyncio.timeout(SOON):
        async with frames_of(bench) as frames:
            call = bench.decode("a")
            await bench.runner.step()
            await anext(frames)
        bench.runner.run_on()
        with pytest.raises(FailedPrecondition):
            await call
        await bench.wait_whole()


async def test_a_cancelled_call_is_cancelled_also_where_the_stream_ends(bench: Bench) -> None:
    async with asyncio.timeout(SOON):
        async with frames_of(bench) as frames:
            call = bench.decode("a")
            await bench.runner.step()
            await anext(frames)
            call.cancel()
        bench.runner.run_on()
        with pytest.raises(asyncio.CancelledError):
            await call
        await bench.wait_whole()


async def goes_on_elsewhere(call: "asyncio.Task[worker_pb2.DecodeResponse]") -> bool:
    """With its KV cache, if it has any."""
    try:
        return bool((await call).ticket)
    except Unavailable as error:
        return error.reason == "DRAINING"


async def test_a_worker_that_leaves_hands_over_also_what_is_only_coming(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    coming, submit = asyncio.Event(), bench.engine.submit

    async def submit_and_tell(*arguments: Any) -> None:
        coming.set()
        await submit(*arguments)

    async with asyncio.timeout(SOON), frames_of(bench) as frames:
        running = bench.decode("running")
        await bench.runner.step()
        await anext(frames)
        await bench.runner.wait_for_step()
        monkeypatch.setattr(bench.engine, "submit", submit_and_tell)
        late = bench.decode("late")
        await coming.wait()
        bench.worker.leave()
        bench.runner.end_step()
        # One step after the other, so that the call is told to leave before its sequence can have come to its end.
        while not late.done():
            await asyncio.wait([late], timeout=0.02)
            bench.runner.end_step()
        bench.runner.run_on()
        assert (await running).ticket
        assert await goes_on_elsewhere(late)
