"""When decode blocks are reserved: the policy, the router that asks it, and the call that waits for it."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.prefilling import Prefilling
from gateway.reservation import Reservation, reserves_late
from gateway.route import Prompt, WorkerView
from gateway.router import Router
from kvrelay.request import WorkerRole
from kvrelay.v1 import worker_pb2
from tests.patience import SOON

ANNOUNCEMENT = worker_pb2.PrefillResponse(last_chunk=worker_pb2.LastChunk())
FIRST_TOKEN = worker_pb2.PrefillResponse(first_token=worker_pb2.FirstToken(token_id=7))
counts = st.integers(0, 10_000)


@pytest.mark.parametrize(
    ("num_blocks", "blocks_free", "blocks_promised", "late"),
    [
        (10, 1000, 0, False),
        (10, 20, 0, False),
        (10, 19, 0, True),
        (10, 1000, 990, True),
        (10, 0, 0, True),
        (600, 1000, 0, True),
    ],
)
def test_scarce_blocks_are_reserved_late(num_blocks: int, blocks_free: int, blocks_promised: int, late: bool) -> None:
    assert reserves_late(num_blocks, blocks_free, blocks_promised) is late


@given(st.integers(1, 10_000), counts, counts, counts)
def test_more_need_or_less_room_never_makes_it_early(need: int, free: int, promised: int, more: int) -> None:
    if reserves_late(need, free, promised):
        assert reserves_late(need + more, free, promised)
        assert reserves_late(need, max(0, free - more), promised)
        assert reserves_late(need, free, promised + more)
    if need > free:
        assert reserves_late(need, free, promised)


def late_for(num_tokens: int, blocks_free: int, waiting: int = 0, sent_before: int = 0, seen_at: float = 0.0) -> bool:
    router, prompt = Router(), Prompt(num_tokens, {16: []})
    workers = [
        WorkerView("p", WorkerRole.PREFILL, 0, 0, 0, 100, seen_at, 16, 512, 0.1),
        WorkerView("d", WorkerRole.DECODE, 0, waiting, 0, blocks_free, seen_at, 16, 512, 0.1),
    ]
    for index in range(sent_before):
        router.choose(f"r{index}", prompt, workers, now=1.0)
    return router.choose("last", prompt, workers, now=1.0).reserves_late


def test_the_router_compares_the_prompt_with_what_is_free_waits_and_was_sent() -> None:
    assert not late_for(160, blocks_free=20)
    assert late_for(161, blocks_free=20)
    assert late_for(160, blocks_free=20, waiting=1)
    assert not late_for(160, blocks_free=40, sent_before=2)
    assert late_for(160, blocks_free=40, sent_before=3)
    assert not late_for(160, blocks_free=40, sent_before=3, seen_at=2.0), "the heartbeat has those sent before"


async def test_an_early_reservation_waits_for_nothing() -> None:
    async with asyncio.timeout(SOON):
        await Reservation(late=False).wait()


@pytest.mark.parametrize("first", [ANNOUNCEMENT, FIRST_TOKEN])
async def test_a_late_reservation_waits_for_the_last_chunk_or_for_the_first_token(
    first: worker_pb2.PrefillResponse,
) -> None:
    reservation = Reservation(late=True)
    goes_on = asyncio.Event()

    async def responses() -> AsyncIterator[worker_pb2.PrefillResponse]:
        await goes_on.wait()
        yield first
        await asyncio.Event().wait()

    async with asyncio.timeout(SOON), Prefilling(b"ticket", responses(), reservation) as prefilling:
        waiting = asyncio.create_task(reservation.wait())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        goes_on.set()
        await waiting
        assert prefilling.first_token.done() is first.HasField("first_token")
