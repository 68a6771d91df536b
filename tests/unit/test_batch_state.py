"""What stays on the device is, at each decode step, what a batch made from scratch would be."""

from collections.abc import Sequence as Items
from random import Random
from typing import Any

import numpy
import pytest
import torch
from numpy.typing import NDArray

from kvrelay.engine import batch_state
from kvrelay.engine.batch import make_input
from kvrelay.engine.batch_state import BatchState
from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.engine import Engine
from kvrelay.engine.events import Failed, StepOutput
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.kv_layout import KvLayout
from kvrelay.engine.limits import Limits
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import Chunk, Sequence
from kvrelay.engine.staging import upload
from kvrelay.request import Request, Sampling, Token

BLOCK_SIZE, NUM_BLOCKS, MAX_ROWS, CONTEXT_LENGTH = 3, 40, 6, 60
LAYOUT = KvLayout(b"model", "float32", BLOCK_SIZE, num_layers=1, num_kv_heads=1, head_dim=8)


class Step:
    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def tokens(self) -> list[Token]:
        return [Token(token) for token in self._tokens]


class StateRunner:
    """Computes nothing; keeps the state as a decoder does, and compares it with the batch made anew."""

    def __init__(self, random: Random, overlaps: bool) -> None:
        self.overlaps = overlaps
        self.state = BatchState(MAX_ROWS, -(-CONTEXT_LENGTH // BLOCK_SIZE), torch.device("cpu"))
        self.cache = KvCache(LAYOUT, NUM_BLOCKS, torch.device("cpu"))
        self.num_decode_steps = 0
        self._random = random
        self._last_tokens: dict[Sequence, int] = {}

    def launch(self, chunks: Items[Chunk]) -> Step:
        tokens = [self._random.randrange(100) for chunk in chunks if chunk.samples]
        if all(chunk.length == 1 and chunk.samples for chunk in chunks):
            self._decode(chunks, tokens)
        else:
            slots = make_input(chunks, self.cache).sampling_slots
            self.state.last_tokens[slots] = torch.tensor(tokens, dtype=torch.int64)
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        self._last_tokens.update(zip(sampling, tokens, strict=True))
        return Step(tokens)

    def _decode(self, chunks: Items[Chunk], tokens: list[int]) -> None:
        self.num_decode_steps += 1
        order = self.state.update(chunks)
        assert sorted(order) == list(range(self.state.num_rows)) == list(range(len(chunks)))
        rows, expected = self.state.view(len(chunks)), make_input(chunks, self.cache)
        assert rows.positions[order].tolist() == expected.batch.positions.tolist()
        assert rows.context_lengths[order].tolist() == expected.batch.context_lengths.tolist()
        assert rows.slots[order].tolist() == [chunk.sequence.slot for chunk in chunks]
        for row, chunk in zip(order, chunks, strict=True):
            sequence, sampling = chunk.sequence, chunk.sequence.request.sampling
            assert rows.block_tables[row, : len(sequence.block_table)].tolist() == sequence.block_table
            found = (rows.temperature[row], rows.top_p[row], rows.min_p[row], rows.top_k[row], rows.seeds[row])
            assert [value.item() for value in found[:3]] == [
                numpy.float32(value) for value in (sampling.temperature, sampling.top_p, sampling.min_p)
            ]
            assert (found[3].item(), found[4].item() % 2**64) == (sampling.top_k, sampling.seed)
            known = sequence.token_ids[chunk.start] if chunk.start < len(sequence.token_ids) else None
            fed = self.state.last_tokens[sequence.slot].item()
            assert fed == (self._last_tokens[sequence] if known is None else known)
        unused = self.state.rows
        assert not unused.context_lengths[len(chunks) :].any()
        assert set(unused.slots[len(chunks) :].tolist()) <= {MAX_ROWS}
        # What the step does on the device.
        rows.positions.add_(1)
        rows.context_lengths.add_(1)
        self.state.last_tokens[rows.slots[order]] = torch.tensor(tokens)
        self.state.advance()


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_the_state_is_what_a_new_batch_would_be(seed: int, overlaps: bool) -> None:
    random = Random(seed)
    runner = StateRunner(random, overlaps)
    limits = Limits(MAX_ROWS, random.choice((5, 20)), CONTEXT_LENGTH, BLOCK_SIZE)
    scheduler = Scheduler(BlockPool(NUM_BLOCKS), limits)
    engine = Engine(scheduler, runner)
    num_added = 0
    for _ in range(200):
        if random.random() < 0.15 and num_added < 30:
            sampling = Sampling(
                max_tokens=random.randrange(1, 40),
                temperature=random.random(),
                top_p=random.random(),
                top_k=random.randrange(100),
                min_p=random.random(),
                seed=random.randrange(2**64),
                stop_token_ids=frozenset(random.sample(range(100), 2)),
            )
            prompt = tuple(random.randrange(3) for _ in range(random.randrange(1, 20)))
            scheduler.add(Sequence(Request(str(num_added), prompt, sampling), arrival=float(num_added)))
            num_added += 1
        if random.random() < 0.03:
            scheduler.abort(str(random.randrange(30)))
        step(engine)
    while not step(engine).idle:
        pass
    scheduler.check_integrity()
    assert runner.num_decode_steps > 30


def step(engine: Engine) -> StepOutput:
    """The engine catches what a runner raises."""
    output = engine.step()
    assert not any(isinstance(event, Failed) for event in output.events), "see the log"
    return output


def test_other_blocks_are_sent_although_all_else_is_as_before() -> None:
    """As of a sequence that was preempted and came back, with all but its last token found in the cache."""
    state = BatchState(MAX_ROWS, 20, torch.device("cpu"))
    sequence = Sequence(Request("a", (1, 2, 3, 4), Sampling(9)), slot=0)
    sequence.block_table = [5, 6]
    state.update([Chunk(sequence, 3, 1)])
    sequence.block_table = [5, 7]
    assert state.update([Chunk(sequence, 3, 1)]) == [0]
    assert state.rows.block_tables[0, :2].tolist() == [5, 7]


def test_a_step_like_the_one_before_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def noted(arrays: Items[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
        sent.append(len(arrays[0]))
        return upload(arrays, device)

    monkeypatch.setattr(batch_state, "upload", noted)
    runner = StateRunner(Random(0), overlaps=True)
    scheduler = Scheduler(BlockPool(NUM_BLOCKS), Limits(MAX_ROWS, 50, CONTEXT_LENGTH, BLOCK_SIZE))
    engine = Engine(scheduler, runner)
    for name in "ab":
        scheduler.add(Sequence(Request(name, (1, 2, 3), Sampling(max_tokens=10))))
    while not step(engine).idle:
        pass
    assert runner.num_decode_steps == 9
    # First two rows, then in every third step a block for each of them.
    assert sent[1:] == [2, 2]
