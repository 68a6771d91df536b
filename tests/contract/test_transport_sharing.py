"""One ticket and two decode workers, as when one of them is taken for lost: both read, and one gets it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest

from kv_transfer.transport import TransferFailed
from tests.contract.transport_kit import TRANSPORTS, Decode, Pair, decode_worker, pair
from tests.patience import until

NUM_BLOCKS = 10


@pytest.fixture(params=TRANSPORTS)
async def three(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Pair, Decode]]:
    """A prefill worker and two decode workers."""
    async with (
        pair(request.param) as workers,
        decode_worker(workers.decode.registry, request.param, worker_id="decode-1") as second,
    ):
        yield workers, second


def same(workers: Pair, decode: Decode, num_blocks: int) -> bool:
    return Pair(workers.prefill, decode).same(range(num_blocks), range(num_blocks))


async def cancelled(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_a_pull_that_broke_off_leaves_the_ticket_to_another(three: tuple[Pair, Decode]) -> None:
    workers, second = three
    leases = workers.prefill.leases
    handover, ticket = workers.prefill.grant(range(NUM_BLOCKS))
    assert leases.owner("r1") == "gateway-0"
    handover.advance(4)
    former = asyncio.create_task(workers.decode.puller.pull(ticket, range(NUM_BLOCKS), 0))
    await until(lambda: same(workers, workers.decode, 4))
    assert leases.owner("r1") == "decode-0"
    await cancelled(former)
    assert workers.prefill.freed == []
    handover.complete(7, workers.prefill.now)
    pulled = await second.puller.pull(ticket, range(NUM_BLOCKS), 0)
    assert pulled.first_token_id == 7
    assert same(workers, second, NUM_BLOCKS)
    assert workers.prefill.freed == ["r1"]


async def test_two_pulls_at_once_read_the_same_and_one_gets_it(three: tuple[Pair, Decode]) -> None:
    """The other, whether it is the one that was taken for lost or not, is told; what it has verified is right."""
    workers, second = three
    handover, ticket = workers.prefill.grant(range(NUM_BLOCKS))
    handover.advance(4)
    both = (workers.decode, second)
    pulls = [asyncio.create_task(decode.puller.pull(ticket, range(NUM_BLOCKS), 0)) for decode in both]
    for decode in both:
        await until(partial(same, workers, decode, 4))
    assert not any(pull.done() for pull in pulls)
    handover.complete(7, workers.prefill.now)
    outcomes = await asyncio.gather(*pulls, return_exceptions=True)
    assert workers.prefill.freed == ["r1"]
    ((loser, failure),) = [
        (decode, outcome) for decode, outcome in zip(both, outcomes, strict=True) if isinstance(outcome, TransferFailed)
    ]
    assert failure.reason == "TICKET_UNKNOWN"
    assert same(workers, loser, failure.verified_blocks)


async def test_the_lease_is_of_who_pulls_last(three: tuple[Pair, Decode]) -> None:
    workers, second = three
    _, ticket = workers.prefill.grant(range(NUM_BLOCKS))

    def is_of(decode: Decode) -> bool:
        return workers.prefill.leases.owner("r1") == decode.links.worker_id

    for decode in (workers.decode, second):
        pull = asyncio.create_task(decode.puller.pull(ticket, range(NUM_BLOCKS), 0))
        await until(partial(is_of, decode))
        await cancelled(pull)
