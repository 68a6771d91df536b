"""Workers that share a pool: blocks are passed by their ids, and only between those that proved to be in one pool."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kv_transfer.handover import EndReason
from kv_transfer.service import KvService
from kv_transfer.transport import TransferFailed
from kvrelay.engine.pool_file import PoolFile
from kvrelay.engine.sequence import BorrowedBlocks
from kvrelay.v1 import kv_pb2
from tests.contract.transport_kit import LAYOUT, NUM_BLOCKS, Decode, Pair, Prefill, Registry, decode_worker
from tests.patience import until

BLOCKS = range(10, 18)


def joined(path: Path | None) -> PoolFile | None:
    return None if path is None else PoolFile.join(str(path), LAYOUT, NUM_BLOCKS, lambda num_bytes: None)


@contextlib.asynccontextmanager
async def two_workers(prefill_pool: Path | None, decode_pool: Path | None, preference: str) -> AsyncIterator[Pair]:
    prefill = Prefill(shared=joined(prefill_pool))
    async with (
        prefill.serving(),
        decode_worker(Registry(prefill.record), preference, shared=joined(decode_pool)) as decode,
    ):
        yield Pair(prefill, decode)


@pytest.fixture
async def workers(tmp_path: Path) -> Any:
    async with two_workers(tmp_path / "pool", tmp_path / "pool", "auto") as both:
        yield both


def transport(decode: Decode) -> tuple[str, str]:
    [link] = decode.links.status()
    return link.transport, link.fallback


async def test_a_borrowed_ticket_moves_nothing(workers: Pair) -> None:
    before = bytes(workers.decode.cache.read_blocks(range(NUM_BLOCKS)))
    ticket = workers.prefill.grant_complete(BLOCKS)
    borrowed = await workers.decode.puller.borrowed(ticket)
    assert borrowed == BorrowedBlocks(tuple(BLOCKS), (3,) * len(BLOCKS))
    pulled = await workers.decode.puller.pull(ticket, borrowed.block_ids, 0, borrowed=True)
    assert (pulled.first_token_id, pulled.num_blocks, pulled.num_bytes, pulled.transport) == (42, 0, 0, "pool")
    assert bytes(workers.decode.cache.read_blocks(range(NUM_BLOCKS))) == before
    assert workers.prefill.freed == ["r1"]
    assert transport(workers.decode) == ("pool", "")
    assert re.fullmatch(r"prefill-0 by pool, [\d.]+ ms", str(workers.decode.links.status()[0]))


async def test_it_ends_with_the_prompt(workers: Pair) -> None:
    handover, ticket = workers.prefill.grant(BLOCKS)
    task = asyncio.create_task(workers.decode.puller.pull(ticket, BLOCKS, 0, borrowed=True))
    handover.advance(7)
    await until(lambda: workers.prefill.leases.owner("r1") == workers.decode.links.worker_id)
    assert not task.done()
    assert workers.prefill.freed == []
    handover.complete(5, workers.prefill.now)
    assert (await task).first_token_id == 5
    assert workers.prefill.freed == ["r1"]


async def test_nothing_counts_before_the_prompt_is_done(workers: Pair) -> None:
    handover, ticket = workers.prefill.grant(BLOCKS)
    handover.advance(7)
    task = asyncio.create_task(workers.decode.puller.pull(ticket, BLOCKS, 0, borrowed=True))
    await until(lambda: workers.prefill.leases.owner("r1") == workers.decode.links.worker_id)
    workers.prefill.leases.end("r1", EndReason.FAILED)
    with pytest.raises(TransferFailed) as caught:
        await task
    assert (caught.value.reason, caught.value.verified_blocks) == ("PREFILL_FAILED", 0)


async def test_a_lease_that_ended_before_the_release_leaves_final_blocks_that_are_held_here(workers: Pair) -> None:
    def lose(event: kv_pb2.PullResponse) -> list[kv_pb2.PullResponse]:
        workers.prefill.leases.end("r1", EndReason.EXPIRED)
        return [event]

    workers.prefill.tamper = lose
    with pytest.raises(TransferFailed) as caught:
        await workers.decode.puller.pull(workers.prefill.grant_complete(BLOCKS), BLOCKS, 0, borrowed=True)
    assert (caught.value.reason, caught.value.verified_blocks) == ("TICKET_UNKNOWN", len(BLOCKS))


async def test_of_two_that_borrow_the_same_one_gets_it(workers: Pair) -> None:
    """The last block is half full, so that only one may write on in it."""
    ticket = workers.prefill.grant_complete(BLOCKS)
    pulls = (workers.decode.puller.pull(ticket, BLOCKS, 0, borrowed=True) for _ in range(2))
    results = await asyncio.gather(*pulls, return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["Pulled", "TransferFailed"]


async def test_a_sequence_with_blocks_of_its_own_gets_a_copy(workers: Pair) -> None:
    pulled = await workers.decode.puller.pull(workers.prefill.grant_complete(BLOCKS), range(40, 48), 2)
    assert (pulled.transport, pulled.num_blocks) == ("pool", 6)
    assert workers.same(BLOCKS[2:], range(42, 48))
    assert not workers.same(BLOCKS[:2], range(40, 42))


async def test_a_forged_ticket_lends_nothing(workers: Pair) -> None:
    ticket = bytearray(workers.prefill.grant_complete(BLOCKS))
    ticket[-1] ^= 1
    assert await workers.decode.puller.borrowed(bytes(ticket)) is None


async def test_a_worker_that_is_not_there_lends_nothing(workers: Pair) -> None:
    ticket = workers.prefill.grant_complete(BLOCKS)
    workers.decode.registry.tell()
    assert await workers.decode.puller.borrowed(ticket) is None


@pytest.mark.parametrize(("theirs", "mine"), [("a", "b"), ("a", None), (None, "b"), (None, None)])
async def test_blocks_of_other_pools_move(tmp_path: Path, theirs: str | None, mine: str | None) -> None:
    pools = (theirs and tmp_path / theirs, mine and tmp_path / mine)
    async with two_workers(pools[0] or None, pools[1] or None, "auto") as workers:
        ticket = workers.prefill.grant_complete(BLOCKS)
        assert await workers.decode.puller.borrowed(ticket) is None
        pulled = await workers.decode.puller.pull(ticket, range(8), 0)
        assert pulled.num_blocks == 8
        assert workers.same(BLOCKS, range(8))
        assert pulled.transport == transport(workers.decode)[0] != "pool"
        assert ("pool: the prefill worker does not offer it" in transport(workers.decode)[1]) is (mine is not None)


async def test_who_claims_to_be_in_the_pool_must_prove_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def pair(self: KvService, request: kv_pb2.PairRequest, context: Any) -> kv_pb2.PairResponse:
        answer = await honest(self, request, context)
        answer.transports.insert(0, "pool")
        return answer

    honest = KvService.Pair
    monkeypatch.setattr(KvService, "Pair", pair)
    async with two_workers(tmp_path / "a", tmp_path / "b", "auto") as workers:
        ticket = workers.prefill.grant_complete(BLOCKS)
        assert await workers.decode.puller.borrowed(ticket) is None
        assert "not in the same pool" in transport(workers.decode)[1]


async def test_a_forced_pool_is_not_replaced(tmp_path: Path) -> None:
    async with two_workers(tmp_path / "a", tmp_path / "b", "pool") as workers:
        with pytest.raises(TransferFailed) as caught:
            await workers.decode.puller.pull(workers.prefill.grant_complete(BLOCKS), range(8), 0)
        assert caught.value.reason == "TRANSPORT_REFUSED"
