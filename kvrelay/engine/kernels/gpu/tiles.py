"""How the attention kernels cut their work: a small table, so that nothing is tuned while requests wait.

It comes from the code that Triton makes for sm_90 (registers, spills and shared memory of each entry), not from
measured times.
"""

from dataclasses import dataclass

import torch

__all__ = ["Tiles", "chunk_tiles", "decode_tiles"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """One entry of the table.

    Attributes:
        query: rows of queries (tokens times query heads of one KV head) in a tile.
        context: positions of the context in a tile.
        num_warps: warps that share a program.
        num_stages: of the software pipeline. Keys wait for the block table, so that each two stages beyond the
            first hold one more tile of the context in flight.
    """

    query: int
    context: int
    num_warps: int
    num_stages: int


def decode_tiles(head_width: int, dtype: torch.dtype) -> Tiles:
    """For decode attention, which memory bounds.

    By Little's law, 4.3 TB/s at a latency of 0.8 microseconds takes 26 KiB in flight on each of 132 multiprocessors.
    A tile of keys and one of values are 16 KiB each, two of both are in flight, and three programs fit beside one
    another in 228 KiB of shared memory: one alone suffices, the others hide its arithmetic. 16 rows are the least
    that a matrix instruction takes.

    Args:
        head_width: elements of a head, up to the next power of two.
    """
    if dtype == torch.float32:
        return Tiles(16, _within(2048 // head_width, 16, 32), num_warps=4, num_stages=3)
    return Tiles(16, _within(8192 // head_width, 16, 128), num_warps=4, num_stages=5)


def chunk_tiles(head_width: int, dtype: torch.dtype) -> Tiles:
    """For chunk attention, which arithmetic bounds.

    128 rows by 8 warps are two warpgroups with a wgmma of 64 rows each. 128 positions are what registers hold beside
    an accumulator of 128 elements a head, 64 beside one of 256. Products in float32 run without tensor cores, and
    spill registers on larger tiles than these.

    Args:
        head_width: elements of a head, up to the next power of two.
    """
    if dtype == torch.float32:
        return Tiles(32 if head_width <= 128 else 16, _within(2048 // head_width, 16, 32), num_warps=4, num_stages=3)
    return Tiles(128, 128 if head_width <= 128 else 64, num_warps=8, num_stages=3)


def _within(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))
