"""The machine's clock is set while KV caches are held and handed over: nothing ends earlier or later."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from decode_worker.service import DecodeWorker
from kv_transfer.source import HandoverSource
from kv_transfer.tickets import TICKET_SECONDS
from kvrelay.errors import FailedPrecondition
from kvrelay.request import WorkerRole
from kvrelay.v1 import kv_pb2, worker_pb2
from prefill_worker.service import PrefillWorker
from tests.patience import SOON
from tests.played_workers import EPOCH, Directory, played_worker

CONTEXT: Any = SimpleNamespace(time_remaining=lambda: None)
SEQUENCE = worker_pb2.SequenceSpec(
    request_id="r", prompt_token_ids=range(20), sampling=worker_pb2.Sampling(max_tokens=100)
)
PAUSE = 0.1
SetClock = Callable[[float], None]


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """Sets it forward by so many seconds."""
    monkeypatch.setattr("kv_transfer.source.LEASE_CHECK_SECONDS", 0.01)
    before = time.time
    return lambda seconds: monkeypatch.setattr(time, "time", lambda: before() + seconds)


@pytest.mark.parametrize("seconds", [1e6, -1e6])
async def test_a_lease_runs_out_when_it_would_have(set_clock: SetClock, seconds: float) -> None:
    async with played_worker(PrefillWorker, WorkerRole.PREFILL, Directory(), lease_seconds=PAUSE) as worker:
        granted_at = time.monotonic()
        handover, _ = worker.source.grant("r", "gateway", (0, 1), (0, 0), ends_with_call=False)
        set_clock(seconds)
        seconds_left = worker.source.lease_seconds("r")
        assert seconds_left is not None
        assert seconds_left <= PAUSE
        await asyncio.wait_for(handover.wait_ended(), SOON)
        assert time.monotonic() - granted_at >= PAUSE


async def test_a_ticket_that_is_too_old_opens_nothing(set_clock: SetClock) -> None:
    async with played_worker(PrefillWorker, WorkerRole.PREFILL, Directory()) as worker:
        _, ticket = worker.source.grant("r", "gateway", (0, 1), (0, 0), ends_with_call=True)
        set_clock(TICKET_SECONDS + 1)
        with pytest.raises(FailedPrecondition) as caught:
            await seconds_since_done(worker.source, ticket)
        assert caught.value.reason == "TICKET_EXPIRED"


async def seconds_since_done(source: HandoverSource, ticket: bytes) -> float:
    """As a pull that begins after a pause is told."""
    await asyncio.sleep(PAUSE)
    request = kv_pb2.PullRequest(ticket=ticket, transport="grpc", decode_worker_id="decode-1")
    servicer: Any = source.service.servicer
    *_, last = [event async for event in servicer.Pull(request, CONTEXT)]
    seconds: float = last.complete.seconds_since_done
    return seconds


async def test_a_prompt_was_done_when_it_was(set_clock: SetClock) -> None:
    async with played_worker(PrefillWorker, WorkerRole.PREFILL, Directory()) as worker:
        request = worker_pb2.PrefillRequest(sequence=SEQUENCE, worker_epoch=EPOCH)
        responses = worker.Prefill(request, CONTEXT)
        ticket = (await anext(responses)).admitted.ticket
        set_clock(-1e6)
        await anext(responses)
        assert PAUSE <= await seconds_since_done(worker.source, ticket) < SOON
        await responses.aclose()  # type: ignore[attr-defined]


async def test_a_sequence_left_its_worker_when_it_did(set_clock: SetClock) -> None:
    directory = Directory()
    async with played_worker(DecodeWorker, WorkerRole.DECODE, directory, step_seconds=0.02) as worker:
        entry = directory.entries["decode"]
        directory.entries["decode-1"] = replace(entry, record=replace(entry.record, worker_id="decode-1"))
        frames = worker.frames.stream("gateway")
        await anext(frames)
        request = worker_pb2.DecodeRequest(sequence=SEQUENCE, gateway_id="gateway", worker_epoch=EPOCH)
        call = asyncio.create_task(worker.Decode(request, CONTEXT))
        await asyncio.wait_for(anext(frames), SOON)
        set_clock(-1e6)
        worker.leave()
        ticket = (await asyncio.wait_for(call, SOON)).ticket
        assert PAUSE <= await seconds_since_done(worker.source, ticket) < SOON
        await frames.aclose()
