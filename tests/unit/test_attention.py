import math
import random

import pytest
import torch

from kvrelay.engine.attention import PagedAttention
from kvrelay.engine.batch import make_batch
from kvrelay.engine.kernels.reference import ReferenceKernels
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.sequence import Chunk, Sequence
from kvrelay.request import Request, Sampling
from tests.unit.kernel_cases import make_cache

NUM_BLOCKS = 40
LAYER = 1


def attention(cache: KvCache, chunks: list[Chunk]) -> PagedAttention:
    return PagedAttention(cache, make_batch(chunks, cache), ReferenceKernels())


def make_sequences(cache: KvCache, lengths: list[int]) -> list[Sequence]:
    blocks = list(range(NUM_BLOCKS))
    random.Random(5).shuffle(blocks)
    sequences = []
    for index, length in enumerate(lengths):
        sequence = Sequence(Request(str(index), (3,) * length, Sampling(max_tokens=1)))
        sequence.block_table = [blocks.pop() for _ in range(cache.layout.blocks_for(length))]
        sequences.append(sequence)
    return sequences


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """Causal attention of a whole sequence, one head and one token at a time, in float64."""
    length, num_heads, _ = query.shape
    query, key, value = query.double(), key.double(), value.double()
    output = torch.empty_like(query)
    group = num_heads // key.shape[1]
    for head in range(num_heads):
        for token in range(length):
            scores = key[: token + 1, head // group] @ query[token, head] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            output[token, head] = scores.softmax(0) @ value[: token + 1, head // group]
    return output.float()


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("block_size", [1, 4, 7])
def test_chunks_of_several_sequences_match_the_reference(
    block_size: int, num_heads: int, num_kv_heads: int, softcap: float | None
) -> None:
    cache = make_cache(block_size, num_kv_heads)
    lengths = [1, 9, 12, 5]
    sequences = make_sequences(cache, lengths)
    torch.manual_seed(0)
    query, key, value = (
        [torch.randn(length, heads, 8) for length in lengths] for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    scale = 1 / math.sqrt(8)
    outputs: list[list[torch.Tensor]] = [[] for _ in sequences]
    # Each step: (sequence, start, length), as a scheduler might mix them.
    for step in [[(1, 0, 4), (0, 0, 1)], [(2, 0, 12), (1, 4, 1), (3, 0, 3)], [(3, 3, 2), (1, 5, 4)]]:
        chunks = [Chunk(sequences[index], start, length) for index, start, length in step]
        parts = [
            torch.cat([states[index][start : start + length] for index, start, length in step])
            for states in (query, key, value)
        ]
        attended = attention(cache, chunks).attend(LAYER, parts[0], parts[1], parts[2], scale, softcap)
        for (index, _, _), output in zip(step, torch.split(attended, [chunk.length for chunk in chunks]), strict=True):
            outputs[index].append(output)
    for index in range(len(sequences)):
        expected = reference(query[index], key[index], value[index], scale, softcap)
        torch.testing.assert_close(torch.cat(outputs[index]), expected, atol=1e-5, rtol=1e-5)


def test_keys_and_values_lie_where_the_layout_says() -> None:
    cache = make_cache()
    sequence = make_sequences(cache, [6])[0]
    key, value = torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    attention(cache, [Chunk(sequence, 0, 6)]).attend(LAYER, torch.randn(6, 2, 8), key, value, 1.0)
    expected = torch.full_like(cache.tensor, float("nan"))
    for token in range(6):
        block, slot = sequence.block_table[token // 4], token % 4
        expected[block, LAYER, 0, slot] = key[token]
        expected[block, LAYER, 1, slot] = value[token]
    torch.testing.assert_close(cache.tensor, expected, equal_nan=True, atol=0, rtol=0)


def test_the_output_does_not_depend_on_what_else_is_in_the_batch() -> None:
    torch.manual_seed(1)
    query, key, value = torch.randn(10, 4, 8), torch.randn(10, 2, 8), torch.randn(10, 2, 8)
    alone, together = make_cache(), make_cache()
    one = make_sequences(alone, [10])[0]
    first = attention(alone, [Chunk(one, 0, 10)]).attend(LAYER, query, key, value, 0.3)
    other, same = make_sequences(together, [7, 10])
    parts = [torch.cat((torch.randn(7, *states.shape[1:]), states)) for states in (query, key, value)]
    chunks = [Chunk(other, 0, 7), Chunk(same, 0, 10)]
    second = attention(together, chunks).attend(LAYER, parts[0], parts[1], parts[2], 0.3)
    torch.testing.assert_close(second[7:], first, atol=1e-6, rtol=1e-6)
