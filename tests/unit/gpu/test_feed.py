"""The two halves of a decode step around the model: Triton against torch."""

from pathlib import Path
from random import Random

import pytest
import torch

from kvrelay.engine.batch_state import BatchState
from kvrelay.engine.feed import Feed, TorchFeed
from kvrelay.engine.kernels.gpu.feed import GpuFeed
from kvrelay.engine.sequence import Chunk, Sequence
from kvrelay.request import Request, Sampling
from tests.unit.gpu.compiling import compiled_by

BLOCK_SIZE, WIDTH = 5, 12
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_state(num_used: int, max_rows: int) -> BatchState:
    """Rows of random sequences at random positions, with slots that are not the rows."""
    random = Random(num_used)
    state = BatchState(max_rows, WIDTH, DEVICE)
    slots = random.sample(range(max_rows), num_used)
    chunks = []
    for number, slot in enumerate(slots):
        tokens = tuple(random.randrange(100) for _ in range(random.randrange(1, BLOCK_SIZE * WIDTH)))
        sequence = Sequence(Request(str(number), tokens, Sampling(9)), slot=slot)
        sequence.block_table = [random.randrange(1000) for _ in range(-(-len(tokens) // BLOCK_SIZE))]
        chunks.append(Chunk(sequence, len(tokens) - 1, 1))
    state.update(chunks)
    return state


@pytest.mark.parametrize(("num_used", "num_rows", "max_rows"), [(1, 1, 1), (3, 8, 8), (5, 8, 20), (130, 136, 300)])
def test_both_halves(num_used: int, num_rows: int, max_rows: int) -> None:
    states = [make_state(num_used, max_rows) for _ in range(2)]
    feeds: list[Feed] = [TorchFeed(), GpuFeed()]
    results = []
    for state, feed in zip(states, feeds, strict=True):
        kept = torch.zeros(2, max_rows, dtype=torch.int64, device=DEVICE)
        turn = torch.ones(1, dtype=torch.int64, device=DEVICE)
        rows = state.view(num_rows)
        token_ids, cache_rows = feed.begin(rows, state.last_tokens, BLOCK_SIZE, 2**33)
        assert (cache_rows[:num_used] >= 0).all()
        assert (cache_rows[num_used:] == -1).all()
        feed.end(rows, state.last_tokens, torch.arange(num_rows, device=DEVICE) + 500, kept, turn)
        results.append((token_ids, cache_rows, kept, rows.positions, rows.context_lengths, state.last_tokens[:-1]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    used = states[0].view(num_used)
    assert torch.equal(used.positions + 1, used.context_lengths.long())


COMPILE = """
import torch
from tests.unit.gpu.compile_kernels import compile_instead_of_launching
from kvrelay.engine.batch_state import BatchState
from kvrelay.engine.kernels.gpu.feed import GpuFeed

compile_instead_of_launching()
state, numbers = BatchState(8, 12, torch.device("cpu")), torch.zeros(8, dtype=torch.int64)
GpuFeed().begin(state.view(4), state.last_tokens, 16, 2**33)
GpuFeed().end(state.view(4), state.last_tokens, numbers[:4], numbers[None], numbers[:1])
"""


def test_both_halves_compile_for_hopper(tmp_path: Path) -> None:
    """The interpreter accepts what the compiler does not; compiling takes no GPU."""
    assert [line[:2] for line in compiled_by(tmp_path, "-c", COMPILE)] == [["feed", "_begin"], ["feed", "_end"]]
