"""Prefill calls that end at awkward moments: what they were granted ends with them, and nothing that is another's."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from kvrelay.engine.events import Admitted, StepOutput
from kvrelay.errors import AlreadyExists
from kvrelay.request import WorkerRole
from kvrelay.v1 import worker_pb2
from prefill_worker.service import PrefillWorker
from tests.patience import SOON
from tests.played_workers import EPOCH, Directory, played_worker


@pytest.fixture
async def worker() -> AsyncIterator[PrefillWorker]:
    async with played_worker(PrefillWorker, WorkerRole.PREFILL, Directory()) as worker:
        yield worker
        assert len(worker.source.leases) == 0
        async with asyncio.timeout(SOON):
            while await worker.engine.ask(lambda scheduler: scheduler.held()):
                pass


async def prefill(worker: PrefillWorker, request_id: str = "r", prompt_done: asyncio.Event | None = None) -> None:
    """A call that nobody pulls from, so that it lasts until it is cancelled."""
    sequence = worker_pb2.SequenceSpec(
        request_id=request_id, prompt_token_ids=range(20), sampling=worker_pb2.Sampling(max_tokens=8)
    )
    request = worker_pb2.PrefillRequest(sequence=sequence, worker_epoch=EPOCH, gateway_id="gateway")
    context: Any = SimpleNamespace(time_remaining=lambda: None)
    async for response in worker.Prefill(request, context):
        if prompt_done is not None and response.HasField("first_token"):
            prompt_done.set()


async def cancelled(*calls: "asyncio.Task[None]") -> None:
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)


def stand_still(seconds: float) -> None:
    """For so long the event loop does nothing else, as it does for a copy or a garbage collection."""
    time.sleep(seconds)


def stand_still_until_admission_is_told(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Keeps the event loop until the engine has told of an admission, which the loop then finds together with what is
    scheduled next."""
    loop, told = asyncio.get_running_loop(), list[object]()
    call_soon_threadsafe = loop.call_soon_threadsafe

    def note(callback: Any, *arguments: Any, **options: Any) -> Any:
        handle = call_soon_threadsafe(callback, *arguments, **options)
        told.extend(event for output in arguments if isinstance(output, StepOutput) for event in output.events)
        return handle

    def stand_still_until_then() -> None:
        deadline = time.monotonic() + SOON
        while not any(isinstance(event, Admitted) for event in told):
            assert time.monotonic() < deadline
            stand_still(0.001)

    monkeypatch.setattr(loop, "call_soon_threadsafe", note)
    return stand_still_until_then


async def test_a_call_that_is_cancelled_as_it_is_admitted_leaves_no_lease(
    worker: PrefillWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_still_until_then = stand_still_until_admission_is_told(monkeypatch)
    call = asyncio.create_task(prefill(worker))
    await asyncio.sleep(0)
    stand_still_until_then()
    asyncio.get_running_loop().call_soon(call.cancel)
    await asyncio.wait([call])
    assert call.cancelled()


async def test_calls_that_are_cancelled_at_any_moment_leave_no_lease(worker: PrefillWorker) -> None:
    random = Random(0)
    calls = []
    for number in range(400):
        calls.append(asyncio.create_task(prefill(worker, f"r{number}")))
        for _ in range(random.randrange(4)):
            await asyncio.sleep(random.choice([0.0, 0.0, 0.001]))
        stand_still(random.choice([0.0, 0.002]))
        random.choice(calls).cancel()
    await cancelled(*calls)


async def test_a_second_call_with_the_same_id_leaves_the_lease_of_the_first(worker: PrefillWorker) -> None:
    prompt_done = asyncio.Event()
    first = asyncio.create_task(prefill(worker, "r", prompt_done))
    await asyncio.wait_for(prompt_done.wait(), SOON)
    with pytest.raises(AlreadyExists):
        await prefill(worker, "r")
    assert len(worker.source.leases) == 1
    await cancelled(first)
