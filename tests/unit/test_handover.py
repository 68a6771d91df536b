"""A handover: its blocks become final, never the other way, until it ends."""

import asyncio

import pytest

from kv_transfer.handover import EndReason, Handover
from kvrelay.errors import Cancelled, KvrelayError, NotFound, Unavailable
from tests.patience import SOON


@pytest.fixture
def handover() -> Handover:
    return Handover("r1", (4, 5, 6, 7), (1, 1, 1, 1))


def test_final_blocks_never_shrink(handover: Handover) -> None:
    handover.advance(3)
    handover.advance(1)
    assert handover.num_final_blocks == 3
    assert handover.first_token_id is None


def test_more_final_blocks_than_there_are(handover: Handover) -> None:
    with pytest.raises(ValueError, match="5 blocks"):
        handover.advance(5)


def test_the_first_token_makes_all_blocks_final(handover: Handover) -> None:
    handover.complete(0, 12.0)
    handover.complete(9, 13.0)
    assert (handover.num_final_blocks, handover.first_token_id, handover.completed_at) == (4, 0, 12.0)


def test_nothing_changes_after_the_end(handover: Handover) -> None:
    handover.advance(1)
    handover.end(EndReason.RELEASED)
    handover.end(EndReason.FAILED)
    handover.advance(2)
    handover.complete(9, 12.0)
    assert (handover.num_final_blocks, handover.first_token_id, handover.end_reason) == (1, None, EndReason.RELEASED)


async def test_readers_wake_as_blocks_become_final(handover: Handover) -> None:
    one, three = (asyncio.create_task(handover.wait_beyond(n)) for n in (0, 2))
    done = asyncio.create_task(handover.wait_complete())
    handover.advance(1)
    assert await asyncio.wait_for(one, SOON) == 1
    handover.advance(2)
    await asyncio.sleep(0)
    assert not three.done()
    handover.complete(0, 12.0)
    assert await asyncio.wait_for(three, SOON) == 4
    assert await asyncio.wait_for(done, SOON) == 0


async def test_the_end_is_waited_for(handover: Handover) -> None:
    task = asyncio.create_task(handover.wait_ended())
    handover.complete(0, 12.0)
    await asyncio.sleep(0)
    assert not task.done()
    handover.end(EndReason.EXPIRED)
    assert await asyncio.wait_for(task, SOON) is EndReason.EXPIRED


async def test_what_is_final_already_is_not_waited_for(handover: Handover) -> None:
    handover.advance(2)
    assert await asyncio.wait_for(handover.wait_beyond(0), SOON) == 2


async def test_blocks_that_will_never_be(handover: Handover) -> None:
    with pytest.raises(ValueError, match="4 are too many"):
        await handover.wait_beyond(4)


@pytest.mark.parametrize("num_final", [0, 4])
@pytest.mark.parametrize(
    ("reason", "error"),
    [
        (EndReason.ABORTED, Cancelled),
        (EndReason.FAILED, Unavailable),
        (EndReason.RELEASED, NotFound),
        (EndReason.EXPIRED, NotFound),
    ],
)
async def test_the_end_reaches_every_reader(
    handover: Handover, num_final: int, reason: EndReason, error: type[KvrelayError]
) -> None:
    handover.advance(num_final)
    tasks = [asyncio.create_task(handover.wait_complete()), asyncio.create_task(handover.wait_beyond(3))]
    handover.end(reason)
    for task in tasks:
        with pytest.raises(error):
            await asyncio.wait_for(task, SOON)
    with pytest.raises(error):
        handover.check()
