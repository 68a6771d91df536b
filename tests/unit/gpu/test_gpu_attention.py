"""The attention kernels against the reference, in caches where every slot that nobody wrote is NaN."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvrelay.engine.batch import Batch, make_batch
from kvrelay.engine.kernels.gpu.chunk_attention import chunk_attention
from kvrelay.engine.kernels.gpu.decode_attention import decode_attention
from kvrelay.engine.kernels.gpu.kernels import GpuKernels
from kvrelay.engine.kernels.reference import ReferenceKernels
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.kv_layout import KvLayout
from kvrelay.engine.sequence import Chunk, Sequence
from kvrelay.request import Request, Sampling

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter warns of infinities

LAYER = 1
SCALE = 0.15
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# (head_dim, query heads of a KV head, block size, softcap)
SHAPES = [
    (16, 1, 4, None),
    (16, 2, 1, 1.5),
    (64, 4, 16, None),
    (80, 7, 4, None),
    (128, 4, 16, 2.0),
    (128, 2, 7, None),
    (192, 1, 16, None),
    (256, 2, 32, None),
]


@pytest.fixture(scope="module", autouse=True)
def bfloat16_products() -> Iterator[None]:
    """Triton's interpreter keeps bfloat16 as 16 bits, which its matrix product takes for integers."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, bfloat16 = interpreter.InterpreterBuilder, interpreter.tl.bfloat16
    create_dot = builder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != bfloat16:
            return operand
        bits = operand.data.astype(numpy.uint32) << 16
        return interpreter.TensorHandle(bits.view(numpy.float32), interpreter.tl.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest))
        yield


def make_cache(head_dim: int, block_size: int, num_tokens: int, num_kv_heads: int, dtype: torch.dtype) -> KvCache:
    layout = KvLayout(b"", str(dtype).removeprefix("torch."), block_size, 3, num_kv_heads, head_dim)
    cache = KvCache(layout, num_tokens, DEVICE)
    cache.tensor.fill_(float("nan"))
    return cache


def make_batch_of(shapes: list[tuple[int, int]], cache: KvCache) -> Batch:
    """A step of chunks (tokens of the sequence up to the chunk's end, tokens of the chunk), all in the cache."""
    free = torch.randperm(cache.num_blocks).tolist()
    chunks = []
    for context, length in shapes:
        sequence = Sequence(Request("", (3,) * context, Sampling(max_tokens=1)))
        sequence.block_table = [free.pop() for _ in range(cache.layout.blocks_for(context))]
        slots = torch.arange(cache.layout.block_size)
        rows = (torch.tensor(sequence.block_table)[:, None] * cache.block_stride + slots).flatten()[:context]
        for states in (cache.keys[LAYER], cache.values[LAYER]):
            states[rows.to(DEVICE)] = torch.randn(context, *states.shape[1:], dtype=states.dtype, device=DEVICE)
        chunks.append(Chunk(sequence, context - length, length))
    return make_batch(chunks, cache)


def make_step(
    shapes: list[tuple[int, int]],
    head_dim: int = 16,
    group: int = 2,
    block_size: int = 4,
    num_kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, KvCache, Batch]:
    """Queries, which are a view into fused heads, and the cache and batch to which they belong."""
    torch.manual_seed(0)
    num_blocks = sum(-(-context // block_size) for context, _ in shapes)
    cache = make_cache(head_dim, block_size, num_blocks, num_kv_heads, dtype)
    batch = make_batch_of(shapes, cache)
    heads = torch.randn(len(batch.positions), (group + 2) * num_kv_heads, head_dim, dtype=dtype, device=DEVICE)
    return heads[:, : group * num_kv_heads], cache, batch


def expected_of(query: torch.Tensor, cache: KvCache, batch: Batch, softcap: float | None = None) -> torch.Tensor:
    return ReferenceKernels().attend(query, cache, LAYER, batch, SCALE, softcap)


def assert_equal(output: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCES[output.dtype]
    torch.testing.assert_close(output, expected.to(output.dtype), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("head_dim", "group", "block_size", "softcap"), SHAPES)
def test_decodes_match_the_reference(head_dim: int, group: int, block_size: int, softcap: float | None) -> None:
    contexts = [1, 32, block_size + 1, 101]  # within a piece, at the edges of tiles and blocks, over pieces
    query, cache, batch = make_step([(context, 1) for context in contexts], head_dim, group, block_size)
    output = torch.full(query.shape, float("nan"), device=DEVICE)
    decode_attention(query, cache, LAYER, batch, SCALE, softcap, output)
    assert_equal(output, expected_of(query, cache, batch, softcap))


@pytest.mark.parametrize(("head_dim", "group", "block_size", "softcap"), SHAPES)
def test_chunks_match_the_reference(head_dim: int, group: int, block_size: int, softcap: float | None) -> None:
    # A prompt; the end of one, over the edges of tiles; two tokens; one, which is no decode as it comes after others.
    shapes = [(19, 19), (37, 7), (2, 2), (9, 1)]
    query, cache, batch = make_step(shapes, head_dim, group, block_size)
    output = torch.full(query.shape, float("nan"), device=DEVICE)
    chunk_attention(query, cache, LAYER, batch, SCALE, softcap, output)
    assert_equal(output, expected_of(query, cache, batch, softcap))


@pytest.mark.parametrize(
    ("head_dim", "group", "dtype"),
    [(64, 7, torch.float16), (80, 2, torch.bfloat16), (128, 4, torch.bfloat16), (256, 1, torch.float16)],
)
def test_half_precision_is_within_its_rounding(head_dim: int, group: int, dtype: torch.dtype) -> None:
    shapes = [(1, 1), (300, 1), (40, 40), (200, 3)]
    query, cache, batch = make_step(shapes, head_dim, group, block_size=16, num_kv_heads=1, dtype=dtype)
    exact = make_cache(head_dim, 16, cache.num_blocks, 1, torch.float32)
    exact.tensor.copy_(cache.tensor)
    output = GpuKernels().attend(query, cache, LAYER, batch, SCALE)
    assert output.dtype == dtype
    assert_equal(output, expected_of(query.float(), exact, batch))


def test_a_batch_may_mix_decodes_and_chunks() -> None:
    query, cache, batch = make_step([(70, 1), (5, 1), (20, 20), (3, 1), (90, 7), (2, 2)], group=4)
    assert batch.num_decodes == 2
    output = GpuKernels().attend(query, cache, LAYER, batch, SCALE, softcap=3.0)
    assert output.is_contiguous()
    assert_equal(output, expected_of(query, cache, batch, softcap=3.0))


@pytest.mark.parametrize("max_context_length", [1, 1000])
def test_rows_that_fill_a_graph_are_zero_and_leave_the_others_alone(max_context_length: int) -> None:
    query, cache, batch = make_step([(3, 1), (130, 1)], num_kv_heads=1)
    rows = torch.tensor([0, 2], device=DEVICE)
    padded = dataclasses.replace(
        batch,
        context_lengths=torch.zeros(4, dtype=torch.int32, device=DEVICE).index_copy(0, rows, batch.context_lengths),
        block_tables=torch.full((4, batch.block_tables.shape[1]), 1 << 30, dtype=torch.int32, device=DEVICE).index_copy(
            0, rows, batch.block_tables
        ),
        num_decodes=4,
        max_context_length=max_context_length,
    )
    padded_query = torch.full((5, *query.shape[1:]), 7.0, device=DEVICE).index_copy(0, rows, query)
    output = torch.full_like(padded_query, 9.0)
    decode_attention(padded_query, cache, LAYER, padded, SCALE, None, output)
    assert_equal(output[rows], expected_of(query, cache, batch))
    assert not output[[1, 3]].any()
    assert (output[4] == 9.0).all()  # behind the decodes


def test_one_piece_and_many_give_the_same() -> None:
    query, cache, batch = make_step([(150, 1), (20, 1)], num_kv_heads=1)
    outputs = []
    for max_context_length in (1, 150, 2000):  # as the bound of a graph's contexts may differ
        outputs.append(torch.empty(query.shape, device=DEVICE))
        bounded = dataclasses.replace(batch, max_context_length=max_context_length)
        decode_attention(query, cache, LAYER, bounded, SCALE, None, outputs[-1])
    for output in outputs:
        assert_equal(output, expected_of(query, cache, batch))


def test_large_scores_neither_overflow_nor_vanish() -> None:
    query, cache, batch = make_step([(40, 1), (40, 10)])
    query *= 1000.0
    for softcap in (None, 30.0):
        output = GpuKernels().attend(query, cache, LAYER, batch, SCALE, softcap)
        torch.testing.assert_close(output, expected_of(query, cache, batch, softcap), atol=1e-3, rtol=1e-3)


def test_a_pool_may_have_more_elements_than_32_bits_count() -> None:
    """The pool is memory that is reserved and, but for two blocks, never touched."""
    query, small, batch = make_step([(8, 1), (8, 8)], num_kv_heads=1)
    elements = small.tensor[0].numel()
    far = 2**31 // elements
    pool = torch.empty((far + small.num_blocks) * elements, device=DEVICE, dtype=torch.float32)
    large = make_cache(16, 4, 1, 1, torch.float32)
    blocks = pool[far * elements :].view(small.tensor.shape)
    blocks.copy_(small.tensor)
    rows = pool.view(-1, 1, 16)
    large.keys = [rows[2 * layer * 4 :] for layer in range(3)]
    large.values = [keys[4:] for keys in large.keys]
    moved = dataclasses.replace(batch, block_tables=batch.block_tables + far)
    assert_equal(GpuKernels().attend(query, large, LAYER, moved, SCALE), expected_of(query, small, batch))


@settings(max_examples=8, phases=[Phase.generate])  # shrinking is slow
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), min_size=1, max_size=4),
    st.sampled_from([16, 48, 64]),
    st.integers(1, 5),
    st.integers(1, 9),
)
def test_any_batch_matches_the_reference(
    shapes: list[tuple[int, int]], head_dim: int, group: int, block_size: int
) -> None:
    steps = [(before + length, length) for before, length in shapes]
    query, cache, batch = make_step(steps, head_dim, group, block_size, num_kv_heads=1)
    assert_equal(GpuKernels().attend(query, cache, LAYER, batch, SCALE), expected_of(query, cache, batch))
