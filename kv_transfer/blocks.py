"""Block tables as runs, and the bytes and checksums of blocks."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import xxhash

from kvrelay.engine.kv_cache import KvCache

__all__ = ["checksums", "contiguous_runs", "num_matching", "read_bytes"]


def contiguous_runs(*tables: Sequence[int]) -> Iterator[slice]:
    """The positions of each longest run in which every table counts up by one. The tables are equally long."""
    length = len(tables[0])
    ends = {length} if length else set()
    for table in tables:
        ends.update(end for end, (before, after) in enumerate(pairwise(table), 1) if after != before + 1)
    yield from (slice(start, end) for start, end in pairwise([0, *sorted(ends)]))


def read_bytes(cache: KvCache, block_ids: Sequence[int]) -> bytes:
    """The blocks' bytes, one block after another."""
    return b"".join(_views(cache, block_ids))


def checksums(cache: KvCache, block_ids: Sequence[int]) -> list[int]:
    """XXH3-64 of each block."""
    size = cache.layout.block_bytes
    return [
        xxhash.xxh3_64_intdigest(view[start : start + size])
        for view in _views(cache, block_ids)
        for start in range(0, len(view), size)
    ]


def num_matching(cache: KvCache, block_ids: Sequence[int], expected: Sequence[int]) -> int:
    """How many of the blocks, from the first on, have the checksums expected."""
    for index, (actual, wanted) in enumerate(zip(checksums(cache, block_ids), expected, strict=True)):
        if actual != wanted:
            return index
    return len(block_ids)


def _views(cache: KvCache, block_ids: Sequence[int]) -> Iterator[memoryview]:
    """The memory of each run of blocks; a copy of it where the CPU cannot reach it."""
    if cache.device.type != "cpu":
        yield cache.read_blocks(block_ids)
        return
    for run in contiguous_runs(block_ids):
        yield cache.block_view(block_ids[run.start], run.stop - run.start)
