"""Work in a thread that must be over before anybody goes on, even if it is cancelled."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from kvrelay.engine.kv_cache import KvCache

__all__ = ["INLINE_BYTES", "run_on_blocks", "run_to_end"]

T = TypeVar("T")

# A quarter of a millisecond of copying, while the way to a thread and back costs as much, and far more on busy cores.
INLINE_BYTES = 2 << 20


async def run_on_blocks(cache: KvCache, num_blocks: int, function: Callable[[], T]) -> T:
    """Runs a function that reads or writes so many blocks: at once if that is quick, else as `run_to_end`."""
    if cache.device.type == "cpu" and num_blocks * cache.layout.block_bytes <= INLINE_BYTES:
        return function()
    return await run_to_end(function)


async def run_to_end(function: Callable[[], T]) -> T:
    """Runs a function in a thread. Does not end before the function has, not even when it is cancelled."""
    future = asyncio.get_running_loop().run_in_executor(None, function)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                # A second cancellation must not free either what the thread still writes to.
                continue
        raise
