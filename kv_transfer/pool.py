"""The transport of workers that share their KV pool: a handover passes the blocks themselves, and moves no bytes."""

import functools
from collections.abc import Sequence

from kv_transfer.blocks import contiguous_runs
from kv_transfer.threads import run_on_blocks
from kv_transfer.transport import check_fetch
from kvrelay.engine.kv_cache import KvCache
from kvrelay.errors import FailedPrecondition

__all__ = ["PoolReceiver", "shares_pool"]


def shares_pool(cache: KvCache, nonce: bytes) -> bool:
    """Whether the nonce, which only who has a pool open can know, is that of this worker's shared pool."""
    return cache.shared is not None and cache.shared.nonce == nonce


class PoolReceiver:
    """Has all blocks already. Only a sequence that could not borrow them, and has its own, gets a copy."""

    name = "pool"
    usable = True

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache

    @classmethod
    def open_pool(cls, nonce: bytes, cache: KvCache) -> "PoolReceiver":
        """Proves that the pool of a prefill worker is this one.

        Raises:
            FailedPrecondition: it is not; reason POOL_NOT_SHARED.
        """
        if not shares_pool(cache, nonce):
            raise FailedPrecondition("the prefill worker is not in the same pool", reason="POOL_NOT_SHARED")
        return cls(cache)

    async def receive(self, source_block_ids: Sequence[int], destination_block_ids: Sequence[int], data: bytes) -> None:
        check_fetch(source_block_ids, self._cache.num_blocks, data)
        copy = functools.partial(self._copy, source_block_ids, destination_block_ids)
        await run_on_blocks(self._cache, len(destination_block_ids), copy)

    async def probe(self, num_bytes: int) -> int:
        return num_bytes

    def close(self) -> None:
        """There is nothing to free: the pool is the worker's own."""

    def _copy(self, source_block_ids: Sequence[int], destination_block_ids: Sequence[int]) -> None:
        for run in contiguous_runs(source_block_ids, destination_block_ids):
            count = run.stop - run.start
            source = self._cache.block_view(source_block_ids[run.start], count)
            self._cache.block_view(destination_block_ids[run.start], count)[:] = source
