"""When a prefill worker says that no more of a prompt is left than one step computes."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from kv_transfer.handover import Handover
from kv_transfer.leases import LeaseTable
from kvrelay import wire
from kvrelay.engine.events import Admitted, EngineLoad, Event, Progress, Sampled, StepOutput
from kvrelay.request import Request, Sampling, Token
from kvrelay.v1 import worker_pb2
from prefill_worker.service import _PrefillCall
from tests.patience import SOON

BLOCK_SIZE = 4
STEP = StepOutput((), 1, 0.0, 0.0, EngineLoad(1, 0, 0, 16, 8), idle=False)


async def answers(events: list[Event], *, ask: bool, max_batched_tokens: int = 8) -> list[str]:
    """Which responses a prompt of 20 tokens gets, in order."""
    leases = LeaseTable("prefill-0", 30.0, lambda block_id: 1, lambda request_id: None)
    leases.epoch = 1

    def grant(
        request_id: str, owner: str, blocks: tuple[int, ...], generations: tuple[int, ...], *, ends_with_call: bool
    ) -> tuple[Handover, bytes]:
        assert ends_with_call
        return leases.grant(request_id, owner, blocks, generations, 0.0, ends_with_call=True)[0], b"ticket"

    worker: Any = SimpleNamespace(
        source=SimpleNamespace(leases=leases, grant=grant),
        block_size=BLOCK_SIZE,
        max_batched_tokens=max_batched_tokens,
        worker_id="prefill-0",
    )
    sequence = wire.request_to_proto(Request("r", tuple(range(20)), Sampling(max_tokens=4)))
    request = worker_pb2.PrefillRequest(sequence=sequence, announce_last_chunk=ask)
    call = _PrefillCall(worker, request)
    for event in events:
        call.on_event(event, STEP)
    kinds = []
    async with asyncio.timeout(SOON):
        async for response in call.responses():
            kinds.append(str(response.WhichOneof("event")))
            if kinds[-1] == "first_token":
                break
    return kinds


def admitted(num_cached_blocks: int = 0) -> Admitted:
    return Admitted("r", (0, 1, 2, 3, 4), (1, 1, 1, 1, 1), num_cached_blocks)


CHUNKS: list[Event] = [Progress("r", 8), Progress("r", 16), Progress("r", 18)]
DONE = Sampled("r", 0, Token(5))


async def test_the_last_chunk_is_announced_once_when_it_is_next() -> None:
    assert await answers([admitted(), *CHUNKS, DONE], ask=True) == ["admitted", "last_chunk", "first_token"]


@pytest.mark.parametrize("num_left", [7, 12])
async def test_it_is_announced_no_earlier(num_left: int) -> None:
    kinds = await answers([admitted(), Progress("r", 20 - num_left), DONE], ask=True, max_batched_tokens=num_left)
    assert kinds == ["admitted", "last_chunk", "first_token"]
    kinds = await answers([admitted(), Progress("r", 20 - num_left), DONE], ask=True, max_batched_tokens=num_left - 1)
    assert kinds == ["admitted", "first_token"]


async def test_a_prompt_that_is_short_or_cached_is_at_its_last_chunk_from_the_start() -> None:
    expected = ["admitted", "last_chunk", "first_token"]
    assert await answers([admitted(), DONE], ask=True, max_batched_tokens=20) == expected
    assert await answers([admitted(num_cached_blocks=3), DONE], ask=True) == expected
    assert await answers([admitted(num_cached_blocks=2), DONE], ask=True) == ["admitted", "first_token"]


async def test_nothing_is_announced_to_who_did_not_ask() -> None:
    assert await answers([admitted(), *CHUNKS, DONE], ask=False) == ["admitted", "first_token"]
