"""For kernels: logits, a cache in which nobody wrote what may not be read, and chunks of sequences in any mixture."""

import random
from collections.abc import Sequence as Items

import torch

from kvrelay.engine.batch import Batch, make_batch
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.kv_layout import KvLayout
from kvrelay.engine.sequence import Chunk, Sequence
from kvrelay.request import Request, Sampling

__all__ = ["filled_case", "make_cache", "make_chunks", "random_logits"]

CPU = torch.device("cpu")


def random_logits(rows: int, vocabulary: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def make_cache(block_size: int = 4, num_kv_heads: int = 2, head_dim: int = 8, num_blocks: int = 40) -> KvCache:
    layout = KvLayout(b"", "float32", block_size, num_layers=3, num_kv_heads=num_kv_heads, head_dim=head_dim)
    cache = KvCache(layout, num_blocks, CPU)
    cache.tensor.fill_(float("nan"))  # whoever reads what nobody wrote will show it
    return cache


def make_chunks(cache: KvCache, ranges: Items[tuple[int, int]], seed: int = 5) -> list[Chunk]:
    """One chunk of a sequence of its own for each `(start, end)`; the sequences' blocks lie anywhere in the pool."""
    blocks = list(range(cache.num_blocks))
    random.Random(seed).shuffle(blocks)
    chunks = []
    for index, (start, end) in enumerate(ranges):
        sequence = Sequence(Request(str(index), (3,) * end, Sampling(max_tokens=1)))
        sequence.block_table = [blocks.pop() for _ in range(cache.layout.blocks_for(end))]
        chunks.append(Chunk(sequence, start, end - start))
    return chunks


def filled_case(
    ranges: Items[tuple[int, int]], *, block_size: int, num_kv_heads: int, head_dim: int, layer: int
) -> tuple[KvCache, Batch]:
    """A cache that holds random keys and values for all tokens of the chunks, those to be computed included."""
    num_blocks = sum(-(-end // block_size) for _, end in ranges) + 3
    cache = make_cache(block_size, num_kv_heads, head_dim, num_blocks)
    chunks = make_chunks(cache, ranges)
    for chunk in chunks:
        blocks = torch.tensor(chunk.sequence.block_table)
        rows = (blocks[:, None] * cache.block_stride + torch.arange(block_size)).flatten()[: chunk.end]
        cache.keys[layer][rows] = torch.randn(chunk.end, num_kv_heads, head_dim)
        cache.values[layer][rows] = torch.randn(chunk.end, num_kv_heads, head_dim)
    return cache, make_batch(chunks, cache)
