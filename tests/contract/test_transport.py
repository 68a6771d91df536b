"""What every transport promises, tried over each."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from kv_transfer import threads
from kv_transfer.handover import EndReason
from kv_transfer.service import KvService
from kv_transfer.transport import TransferFailed
from kvrelay.engine.kv_cache import KvCache
from kvrelay.v1 import kv_pb2
from tests.contract.transport_kit import EPOCH, NUM_BLOCKS, TRANSPORTS, Pair, noting, pair
from tests.patience import SOON, until

TABLES = {
    "contiguous": (range(10, 30), range(5, 25)),
    "scattered": ([9, 3, 4, 5, 60, 1, 0, 63], [7, 8, 30, 31, 32, 2, 63, 11]),
    "one block": ([63], [0]),
}


@pytest.fixture(params=TRANSPORTS)
async def workers(request: pytest.FixtureRequest) -> Any:
    async with pair(request.param) as both:
        yield both


@pytest.mark.parametrize("tables", TABLES.values(), ids=TABLES.keys())
async def test_bytes_arrive(workers: Pair, tables: tuple[Sequence[int], Sequence[int]], request: Any) -> None:
    source, destination = tables
    untouched = sorted(set(range(NUM_BLOCKS)) - set(destination))
    pulled = await workers.decode.puller.pull(workers.prefill.grant_complete(source), destination, 0)
    assert workers.same(source, destination)
    assert not any(workers.decode.cache.read_blocks(untouched))
    assert (pulled.first_token_id, pulled.num_blocks) == (42, len(source))
    assert pulled.num_bytes == len(source) * workers.decode.cache.layout.block_bytes
    assert pulled.complete_at <= pulled.whole_at
    assert [(link.prefill_worker_id, link.transport) for link in workers.decode.links.status()] == [
        ("prefill-0", pulled.transport)
    ]
    assert workers.prefill.freed == ["r1"]
    assert len(workers.prefill.leases) == 0


@pytest.mark.parametrize("preference", TRANSPORTS)
async def test_large_run_comes_in_several_events(preference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.service.MAX_RUN_BYTES", 3 * 8192 + 1)
    async with pair(preference) as workers:
        counts: list[int] = []
        workers.prefill.tamper = noting(lambda event: counts.append(event.ready.count))
        await workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), 0)
        assert counts == [3, 3, 2, 0]
        assert workers.same(range(8), range(8))


async def test_blocks_move_before_the_prompt_is_done(workers: Pair) -> None:
    handover, ticket = workers.prefill.grant(range(10))
    task = asyncio.create_task(workers.decode.puller.pull(ticket, range(20, 30), 0))
    for num_final in (1, 4, 9):
        handover.advance(num_final)
        await until(partial(workers.same, range(num_final), range(20, 20 + num_final)))
        assert not task.done()
    handover.complete(5, workers.prefill.now)
    assert (await task).first_token_id == 5
    assert workers.same(range(10), range(20, 30))


@pytest.mark.parametrize("num_cached", [1, 7, 8])
async def test_cached_blocks_are_skipped(workers: Pair, num_cached: int) -> None:
    pulled = await workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), num_cached)
    assert pulled.num_blocks == 8 - num_cached
    assert not any(workers.decode.cache.read_blocks(range(num_cached)))
    assert workers.same(range(num_cached, 8), range(num_cached, 8))
    assert workers.prefill.freed == ["r1"]


async def test_many_pulls_at_once(workers: Pair) -> None:
    tickets = [workers.prefill.grant_complete(range(4 * n, 4 * n + 4), f"r{n}") for n in range(16)]
    pulls = (workers.decode.puller.pull(ticket, range(4 * n, 4 * n + 4), 0) for n, ticket in enumerate(tickets))
    await asyncio.gather(*pulls)
    assert workers.same(range(NUM_BLOCKS), range(NUM_BLOCKS))
    assert sorted(workers.prefill.freed) == sorted(f"r{n}" for n in range(16))


@pytest.mark.parametrize("preference", TRANSPORTS)
async def test_without_checksums(preference: str) -> None:
    async with pair(preference, checksum="off") as workers:
        await workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), 0)
        assert workers.same(range(8), range(8))


@pytest.mark.parametrize("preference", TRANSPORTS)
async def test_without_checksums_nothing_counts_before_the_release(preference: str) -> None:
    async with pair(preference, checksum="off") as workers:
        ticket = workers.prefill.grant_complete(range(8))
        workers.prefill.tamper = lambda event: [event] if event.HasField("ready") else []
        with pytest.raises(TransferFailed) as caught:
            await workers.decode.puller.pull(ticket, range(8), 3)
        assert (caught.value.reason, caught.value.verified_blocks) == ("TRUNCATED", 3)


@pytest.mark.parametrize(
    ("reason", "answer"),
    [
        (EndReason.ABORTED, "REQUEST_ABORTED"),
        (EndReason.FAILED, "PREFILL_FAILED"),
        (EndReason.EXPIRED, "TICKET_UNKNOWN"),
    ],
)
async def test_handover_ends_during_the_pull(workers: Pair, reason: EndReason, answer: str) -> None:
    handover, ticket = workers.prefill.grant(range(10))
    handover.advance(4)
    task = asyncio.create_task(workers.decode.puller.pull(ticket, range(10), 0))
    await until(lambda: workers.same(range(4), range(4)))
    workers.prefill.leases.end("r1", reason)
    with pytest.raises(TransferFailed) as caught:
        await task
    assert (caught.value.reason, caught.value.verified_blocks) == (answer, 4)


async def test_a_pull_keeps_the_lease(workers: Pair) -> None:
    handover, ticket = workers.prefill.grant(range(10))
    handover.advance(4)
    task = asyncio.create_task(workers.decode.puller.pull(ticket, range(10), 0))
    await until(lambda: workers.same(range(4), range(4)))
    workers.prefill.now += 1000
    assert workers.prefill.leases.expire(workers.prefill.now) == []
    handover.complete(1, workers.prefill.now)
    await task
    assert workers.prefill.freed == ["r1"]


@pytest.mark.parametrize("num_cached", [0, 8])
async def test_each_event_renews_the_lease(num_cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.service.MAX_RUN_BYTES", 1)
    async with pair("grpc") as workers:

        def pass_time(event: kv_pb2.PullResponse) -> None:
            workers.prefill.now += 29
            workers.prefill.leases.expire(workers.prefill.now)

        workers.prefill.tamper = noting(pass_time)
        ticket = workers.prefill.grant_complete(range(8))
        workers.prefill.now += 29
        await workers.decode.puller.pull(ticket, range(8), num_cached)
        assert workers.prefill.freed == ["r1"]


async def test_cancelled_while_it_waits(workers: Pair) -> None:
    handover, ticket = workers.prefill.grant(range(10))
    handover.advance(2)
    task = asyncio.create_task(workers.decode.puller.pull(ticket, range(10), 0))
    await until(lambda: workers.same(range(2), range(2)))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, SOON)
    # The lease is the prefill worker's own affair, and the link lives.
    handover.complete(1, workers.prefill.now)
    await workers.decode.puller.pull(ticket, range(10, 20), 0)
    assert workers.same(range(10), range(10, 20))


class Threads(ThreadPoolExecutor):
    """Knows whether anything runs in it."""

    def __init__(self) -> None:
        super().__init__()
        self._futures: list[Future[Any]] = []

    def submit(self, *arguments: Any, **more: Any) -> "Future[Any]":
        self._futures.append(super().submit(*arguments, **more))
        return self._futures[-1]

    @property
    def idle(self) -> bool:
        return all(future.done() for future in self._futures)


class Halt:
    """Stops the first write to a pool, which happens in a thread, until the test lets it go on."""

    def __init__(self, cache: KvCache, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "INLINE_BYTES", -1)
        self.entered, self.resume, self.left = threading.Event(), threading.Event(), threading.Event()
        self.threads = Threads()
        asyncio.get_running_loop().set_default_executor(self.threads)
        for name in ("block_view", "block_address", "write_blocks"):
            monkeypatch.setattr(cache, name, self._halting(getattr(cache, name)))

    def _halting(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.entered.set()
            self.resume.wait(SOON)
            self.left.set()
            return act(*arguments)

        return run


async def test_cancelled_in_the_middle_of_a_copy(workers: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = workers.decode.cache
    halt = Halt(cache, monkeypatch)
    task = asyncio.create_task(workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), 0))
    try:
        assert await asyncio.to_thread(halt.entered.wait, SOON)
        for _ in range(3):
            task.cancel()
            await asyncio.wait([task], timeout=0.05)
            assert not task.done()
            assert not halt.left.is_set()
    finally:
        halt.resume.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, SOON)
    assert halt.left.is_set()
    assert halt.threads.idle
    monkeypatch.undo()
    cache.write_blocks(range(8), bytes(8 * cache.layout.block_bytes))
    await asyncio.sleep(0.05)  # NIXL has threads of its own
    assert not any(cache.read_blocks(range(8)))


async def test_a_link_that_is_dropped_stays_open_under_a_copy(workers: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    halt = Halt(workers.decode.cache, monkeypatch)
    task = asyncio.create_task(workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), 0))
    try:
        assert await asyncio.to_thread(halt.entered.wait, SOON)
        workers.decode.registry.tell()
        workers.decode.links.drop_departed()
        await asyncio.wait([task], timeout=0.05)
        assert not task.done()
    finally:
        halt.resume.set()
    with pytest.raises(TransferFailed) as caught:
        await asyncio.wait_for(task, SOON)
    assert (caught.value.reason, caught.value.verified_blocks) == ("LINK_CLOSED", 8)
    assert workers.same(range(8), range(8))
    assert workers.decode.links.status() == []


@pytest.mark.parametrize("epoch", [None, EPOCH + 1])
async def test_a_pull_ends_when_the_registry_drops_a_worker_that_is_silent(workers: Pair, epoch: int | None) -> None:
    """As one is whose event loop stands still, while gRPC's threads go on and answer keepalives."""
    handover, ticket = workers.prefill.grant(range(10))
    handover.advance(4)
    task = asyncio.create_task(workers.decode.puller.pull(ticket, range(10), 0))
    await until(lambda: workers.same(range(4), range(4)))
    workers.decode.registry.tell(*([] if epoch is None else [replace(workers.prefill.record, epoch=epoch)]))
    workers.decode.links.follow()
    with pytest.raises(TransferFailed) as caught:
        await asyncio.wait_for(task, SOON)
    assert (caught.value.reason, caught.value.source, caught.value.verified_blocks) == ("LINK_CLOSED", "prefill-0", 4)


async def test_a_worker_that_goes_while_it_is_paired_with(workers: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    async def pair_and_go(self: KvService, request: kv_pb2.PairRequest, context: Any) -> kv_pb2.PairResponse:
        workers.decode.registry.tell()
        workers.decode.links.follow()
        return await paired(self, request, context)

    paired = KvService.Pair
    monkeypatch.setattr(KvService, "Pair", pair_and_go)
    _, ticket = workers.prefill.grant(range(10))
    with pytest.raises(TransferFailed) as caught:
        await asyncio.wait_for(workers.decode.puller.pull(ticket, range(10), 0), SOON)
    assert caught.value.reason == "LINK_CLOSED"
    assert workers.decode.links.status() == []


async def test_closing_the_links_ends_a_pull(workers: Pair) -> None:
    _, ticket = workers.prefill.grant(range(10))
    task = asyncio.create_task(workers.decode.puller.pull(ticket, range(10), 0))
    await until(lambda: bool(workers.decode.links.status()))
    await workers.decode.links.close()
    with pytest.raises(TransferFailed):
        await asyncio.wait_for(task, SOON)
    assert workers.decode.links.status() == []


@pytest.mark.parametrize("told", [True, False])
async def test_a_new_start_is_paired_anew(workers: Pair, told: bool) -> None:
    prefill, decode = workers.prefill, workers.decode
    old = prefill.grant_complete(range(4), "old")
    await decode.puller.pull(prefill.grant_complete(range(4)), range(4), 0)
    prefill.leases.epoch = EPOCH + 1
    prefill.cache.write_header(EPOCH + 1)
    decode.registry.tell(replace(prefill.record, epoch=EPOCH + 1))
    if told:
        decode.links.drop_departed()
        assert decode.links.status() == []
    await decode.puller.pull(prefill.grant_complete(range(8, 12), "new"), range(8, 12), 0)
    assert workers.same(range(8, 12), range(8, 12))
    async with decode.links.use("prefill-0", EPOCH + 1) as link:
        assert link.record.epoch == EPOCH + 1
    with pytest.raises(TransferFailed) as caught:
        await decode.puller.pull(old, range(4), 0)
    assert caught.value.reason == "STALE_EPOCH"


async def test_a_worker_that_comes_is_paired_with_before_anybody_asks(workers: Pair) -> None:
    prefill, decode = workers.prefill, workers.decode
    decode.links.follow()
    assert not decode.links.status()  # a worker without an epoch pairs with nobody
    decode.links.epoch = EPOCH
    decode.links.follow()
    decode.links.follow()
    await until(lambda: [link.prefill_worker_id for link in decode.links.status()] == ["prefill-0"])
    assert prefill.num_pairings == 1
    await decode.puller.pull(prefill.grant_complete(range(4)), range(4), 0)
    assert prefill.num_pairings == 1
    prefill.leases.epoch = EPOCH + 1
    prefill.cache.write_header(EPOCH + 1)
    decode.registry.tell(replace(prefill.record, epoch=EPOCH + 1))
    decode.links.follow()
    await until(lambda: bool(decode.links.status()))
    assert prefill.num_pairings == 2


async def test_who_cannot_be_paired_with_is_asked_again_by_who_uses_the_link(workers: Pair) -> None:
    prefill, decode = workers.prefill, workers.decode
    decode.links.epoch = EPOCH
    prefill.leases.epoch = EPOCH + 1  # not what the registry says
    decode.links.follow()
    await until(lambda: prefill.num_pairings == 1)
    assert not decode.links.status()
    prefill.leases.epoch = EPOCH
    await decode.puller.pull(prefill.grant_complete(range(4)), range(4), 0)
    assert workers.same(range(4), range(4))
