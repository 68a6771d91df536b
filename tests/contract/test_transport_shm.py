"""Shared memory: what must be there before one process reads another's pool, and reading a process that dies."""

import asyncio
import contextlib
import fcntl
import mmap
import os
import struct
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kv_transfer.shm import ShmReceiver
from kv_transfer.transport import TransferFailed
from kvrelay.engine.kv_cache import KvCache
from kvrelay.errors import FailedPrecondition
from kvrelay.host import host_id
from kvrelay.wire import error_to_status
from kvrelay.worker import own_memory
from tests.contract.transport_kit import (
    EPOCH,
    LAYOUT,
    NUM_BLOCKS,
    TRANSPORTS,
    Prefill,
    Registry,
    decode_worker,
    offered,
    pair,
    prefill_process,
)
from tests.patience import SOON, until


@pytest.fixture
def prefill() -> Any:
    prefill = Prefill()
    yield prefill
    prefill.cache.close()


@pytest.fixture
def cache() -> Any:
    cache = KvCache(LAYOUT, 8, torch.device("cpu"))
    yield cache
    cache.close()


def _memfd(cache: KvCache) -> int:
    assert cache.fd is not None
    return cache.fd


def _overwrite(prefill: Prefill, offset: int, data: bytes) -> None:
    os.pwrite(_memfd(prefill.cache), data, offset)


SPOILED = {
    "magic": lambda prefill, offer: _overwrite(prefill, 0, b"kvrelay2"),
    "version": lambda prefill, offer: _overwrite(prefill, 8, struct.pack("<I", 9)),
    "nonce in the header": lambda prefill, offer: _overwrite(prefill, 12, b"\0" * 16),
    "nonce in the offer": lambda prefill, offer: replace(offer, nonce="00" * 16),
    "epoch": lambda prefill, offer: prefill.cache.write_header(EPOCH - 1),
    "layout digest": lambda prefill, offer: _overwrite(prefill, 36, b"\0" * 32),
    "number of blocks": lambda prefill, offer: _overwrite(prefill, 68, struct.pack("<Q", 1 << 40)),
    "size in the offer": lambda prefill, offer: replace(offer, size=offer.size + 1),
    "size in the header": lambda prefill, offer: _overwrite(prefill, 68, struct.pack("<Q", NUM_BLOCKS - 1)),
    "host": lambda prefill, offer: replace(offer, host_id="elsewhere"),
    "no such process": lambda prefill, offer: replace(offer, pid=2**22 + 1),
    "no such file": lambda prefill, offer: replace(offer, fd=9999),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_pool_that_is_not_what_was_offered(prefill: Prefill, cache: KvCache, spoil: Any) -> None:
    offer = offered(prefill.cache)
    ShmReceiver.open_pool(offer, EPOCH, cache).close()
    spoiled = spoil(prefill, offer)
    offer = spoiled if isinstance(spoiled, type(offer)) else offer
    num_open = _times_open(prefill.cache)
    with pytest.raises(FailedPrecondition) as caught:
        ShmReceiver.open_pool(offer, EPOCH, cache)
    assert caught.value.reason == "SHM_UNAVAILABLE"
    assert error_to_status(caught.value).code == 9
    assert _times_open(prefill.cache) == num_open


def test_offered_file_that_is_a_pipe(prefill: Prefill, cache: KvCache) -> None:
    reader, writer = os.pipe()
    try:
        offer = replace(offered(prefill.cache), fd=writer)
        with pytest.raises(FailedPrecondition, match="another size"):
            ShmReceiver.open_pool(offer, EPOCH, cache)
    finally:
        os.close(reader)
        os.close(writer)


def test_no_offer(cache: KvCache) -> None:
    with pytest.raises(FailedPrecondition, match="does not offer"):
        ShmReceiver.open_pool(None, EPOCH, cache)


def test_host_id_holds_boot_and_pid_namespace() -> None:
    assert host_id() == host_id()
    assert host_id().endswith(f":{os.stat('/proc/self/ns/pid').st_ino}")


@pytest.mark.parametrize("block_id", [-1, 64, 2**32 - 1])
async def test_block_out_of_range_is_not_read(prefill: Prefill, cache: KvCache, block_id: int) -> None:
    receiver = ShmReceiver.open_pool(offered(prefill.cache), EPOCH, cache)
    try:
        with pytest.raises(TransferFailed) as caught:
            await receiver.receive([0, block_id], [0, 1], b"")
        assert caught.value.reason == "BLOCK_OUT_OF_RANGE"
        assert not any(cache.read_blocks(range(8)))
    finally:
        receiver.close()


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL], ids=["none", "others"])
def test_a_pool_that_could_be_shortened_is_not_mapped(prefill: Prefill, cache: KvCache, seals: int) -> None:
    offer = offered(prefill.cache)
    fd = os.memfd_create("copy", os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, os.pread(_memfd(prefill.cache), offer.size, 0))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        with pytest.raises(FailedPrecondition, match="shortened") as caught:
            ShmReceiver.open_pool(replace(offer, fd=fd), EPOCH, cache)
        assert caught.value.reason == "SHM_UNAVAILABLE"
    finally:
        os.close(fd)


def test_a_file_without_seals_is_not_mapped(prefill: Prefill, cache: KvCache, tmp_path: Path) -> None:
    offer = offered(prefill.cache)
    (tmp_path / "pool").write_bytes(os.pread(_memfd(prefill.cache), offer.size, 0))
    with open(tmp_path / "pool", "rb") as pool, pytest.raises(FailedPrecondition, match="shortened"):
        ShmReceiver.open_pool(replace(offer, fd=pool.fileno()), EPOCH, cache)


async def test_nobody_can_shorten_a_pool_that_is_read(prefill: Prefill, cache: KvCache) -> None:
    receiver = ShmReceiver.open_pool(offered(prefill.cache), EPOCH, cache)
    try:
        for size in (0, 4096 + 3 * 8192 + 100, 2 * prefill.cache.size):
            with pytest.raises(PermissionError):
                os.ftruncate(_memfd(prefill.cache), size)
        await receiver.receive([2, 3], [2, 3], b"")
        assert bytes(cache.read_blocks([2, 3])) == bytes(prefill.cache.read_blocks([2, 3]))
    finally:
        receiver.close()


def test_a_mapped_pool_is_resident_at_once_and_counts_as_the_owners(cache: KvCache) -> None:
    prefill = Prefill(num_blocks=(32 << 20) // LAYOUT.block_bytes)
    try:
        shared, own = _shared_memory(), own_memory(cache.size)
        receiver = ShmReceiver.open_pool(offered(prefill.cache), EPOCH, cache)
        assert _shared_memory() - shared >= 32 << 20
        assert abs(own_memory(cache.size) - own) < 4 << 20
        receiver.close()
        assert abs(_shared_memory() - shared) < 4 << 20
    finally:
        prefill.cache.close()


async def test_the_event_loop_goes_on_while_a_pool_is_mapped(cache: KvCache) -> None:
    """Counted in the thread that maps, from before it begins to after its end: Python's lock would leave a few."""
    source = KvCache(LAYOUT, (512 << 20) // LAYOUT.block_bytes, torch.device("cpu"))
    source.write_header(EPOCH)
    num_ticks = 0

    async def tick() -> None:
        nonlocal num_ticks
        while True:
            await asyncio.sleep(1e-4)
            num_ticks += 1

    def map_it() -> int:
        before = num_ticks
        receiver = ShmReceiver.open_pool(offered(source), EPOCH, cache)
        after = num_ticks
        receiver.close()
        return after - before

    ticking = asyncio.create_task(tick())
    try:
        assert await asyncio.to_thread(map_it) > 8
    finally:
        ticking.cancel()
        source.close()


def test_nothing_is_resident_before_pages_are_touched(
    prefill: Prefill, cache: KvCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that none is made resident by `mmap` itself, which would keep Python's lock meanwhile."""
    resident: list[int] = []

    def mapped(*arguments: Any, **options: Any) -> mmap.mmap:
        before = _shared_memory()
        memory = mmap.mmap(*arguments, **options)
        resident.append(_shared_memory() - before)
        return memory

    monkeypatch.setattr("kv_transfer.shm.mmap", SimpleNamespace(**{**vars(mmap), "mmap": mapped}))
    ShmReceiver.open_pool(offered(prefill.cache), EPOCH, cache).close()
    assert resident == [0]


async def test_a_pool_is_unmapped_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    close = ShmReceiver.close

    def noting_close(self: ShmReceiver) -> None:
        threads.append(threading.get_ident())
        close(self)

    monkeypatch.setattr(ShmReceiver, "close", noting_close)
    async with pair("shm") as workers:
        await workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), 0)
        await workers.decode.links.close()
        assert len(threads) == 1
        assert threads[0] != threading.get_ident()


def test_own_memory_has_the_own_pool_in_it() -> None:
    assert own_memory(1 << 30) == pytest.approx(own_memory(0) + (1 << 30), abs=4 << 20)
    assert own_memory(0) > 10 << 20


async def test_forced_transport_that_cannot_work_fails_the_pull() -> None:
    async with pair("shm") as workers:
        workers.decode.registry.tell(replace(workers.prefill.record, shm=None))
        with pytest.raises(TransferFailed) as caught:
            await workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), 0)
        assert caught.value.reason == "SHM_UNAVAILABLE"


async def test_closed_links_leave_no_file_open() -> None:
    async with pair("shm") as workers:
        num_own = _times_open(workers.prefill.cache)
        for _ in range(5):
            await workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), 0)
            assert _times_open(workers.prefill.cache) == num_own + 1
            await workers.decode.links.close()
            assert _times_open(workers.prefill.cache) == num_own


# A prefill worker in a process of its own


def _times_open(cache: KvCache) -> int:
    """How many of this process's descriptors are the pool; each of Python's mappings is one."""
    inode = os.fstat(_memfd(cache)).st_ino
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.fstat(int(name)).st_ino == inode
    return count


def _shared_memory() -> int:
    """Bytes of shared memory that are resident in this process; the same page twice, if it is mapped twice."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssShmem"))
    return int(line.split()[1]) << 10


def _expected(block_ids: range) -> bytes:
    return b"".join(bytes([block_id + 1]) * LAYOUT.block_bytes for block_id in block_ids)


@pytest.mark.parametrize("preference", TRANSPORTS)
async def test_another_process(preference: str) -> None:
    async with prefill_process() as (process, record, ticket), decode_worker(Registry(record), preference) as decode:
        task = asyncio.create_task(decode.puller.pull(ticket, range(16), 0))
        await until(lambda: decode.cache.read_blocks(range(8)) == _expected(range(8)))
        assert process.stdin is not None
        process.stdin.write(b"\n")
        pulled = await asyncio.wait_for(task, SOON)
        assert (pulled.transport, pulled.first_token_id) == (preference, 42)
        assert decode.cache.read_blocks(range(16)) == _expected(range(16))


@pytest.mark.parametrize("preference", TRANSPORTS)
async def test_process_killed_during_a_pull(preference: str) -> None:
    async with prefill_process() as (process, record, ticket), decode_worker(Registry(record), preference) as decode:
        task = asyncio.create_task(decode.puller.pull(ticket, range(16), 0))
        await until(lambda: decode.cache.read_blocks(range(8)) == _expected(range(8)))
        process.kill()
        with pytest.raises(TransferFailed) as caught:
            await asyncio.wait_for(task, SOON)
        assert caught.value.verified_blocks == 8
        assert decode.cache.read_blocks(range(8)) == _expected(range(8))


async def test_the_pool_of_a_dead_process_stays_readable() -> None:
    async with (
        prefill_process() as (process, record, _),
        decode_worker(Registry(record), "shm") as decode,
        decode.links.use("prefill-0", EPOCH) as link,
    ):
        await link.receiver.receive(range(8), range(8), b"")
        process.kill()
        await process.wait()
        await link.receiver.receive(range(8, 16), range(8, 16), b"")
        assert decode.cache.read_blocks(range(16)) == _expected(range(16))
