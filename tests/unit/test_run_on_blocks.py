"""Where work on blocks is done: at once if it is little, in a thread if it is much, and never abandoned half-way."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch

from kv_transfer import threads
from kv_transfer.threads import run_on_blocks
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.kv_layout import KvLayout
from tests.patience import SOON

LAYOUT = KvLayout(b"model", "float32", block_size=4, num_layers=1, num_kv_heads=1, head_dim=8)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[KvCache]:
    monkeypatch.setattr(threads, "INLINE_BYTES", 2 * LAYOUT.block_bytes)
    cache = KvCache(LAYOUT, 4, torch.device("cpu"))
    yield cache
    cache.close()


async def test_little_is_done_at_once_and_much_in_a_thread(cache: KvCache) -> None:
    here = threading.get_ident()
    assert await run_on_blocks(cache, 2, threading.get_ident) == here
    assert await run_on_blocks(cache, 3, threading.get_ident) != here


@pytest.mark.parametrize("num_blocks", [1, 4])
async def test_errors_come_back(cache: KvCache, num_blocks: int) -> None:
    with pytest.raises(ZeroDivisionError):
        await run_on_blocks(cache, num_blocks, lambda: 1 // 0)


async def test_a_cancelled_caller_waits_for_the_thread(cache: KvCache) -> None:
    begun, resume = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        resume.wait(SOON)

    task = asyncio.create_task(run_on_blocks(cache, 4, work))
    try:
        assert await asyncio.to_thread(begun.wait, SOON)
        task.cancel()
        await asyncio.wait([task], timeout=0.05)
        assert not task.done()
    finally:
        resume.set()
    with pytest.raises(asyncio.CancelledError):
        await task
