"""What each command does to a sequence in each of its states."""

import dataclasses

import pytest

from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.events import Failed, Finished
from kvrelay.engine.limits import Limits
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import Role, Sequence, SequenceState
from kvrelay.errors import AlreadyExists, InvalidArgument, Unavailable
from kvrelay.request import FinishReason
from tests.unit.scheduling import GARBAGE, VOCABULARY, Bench, NewBench, whole

WAITING, TRANSFERRING, RUNNING, HELD, FINISHED = SequenceState


def test_whole_waits_runs_and_finishes(bench: NewBench) -> None:
    house = bench()
    sequence = house.add("a", range(10), max_tokens=3)
    assert sequence.state is WAITING
    house.step()
    assert sequence.state is RUNNING
    house.drain()
    assert sequence.state is FINISHED
    assert house.got("a") == house.expected(sequence)
    assert house.ends["a"] == [Finished("a", FinishReason.LENGTH, 3)]
    assert whole(house.scheduler.load())


def test_prefill_is_held_after_its_first_token_until_released(bench: NewBench) -> None:
    house = bench(max_batched_tokens=4)
    sequence = house.add("a", range(10), Role.PREFILL)
    house.drain()
    assert sequence.state is HELD
    assert house.got("a") == house.expected(sequence)[:1]
    assert house.progress("a") == [4, 8]
    assert house.ends["a"] == []
    [held] = house.scheduler.held()
    assert (held.request_id, held.state, held.block_ids) == ("a", "held", tuple(sequence.block_table))
    house.scheduler.forget("a")
    assert sequence.state is FINISHED
    house.step()
    assert house.ends["a"] == []
    assert whole(house.scheduler.load())


def test_a_prefill_that_ends_with_its_first_token_holds_nothing(bench: NewBench) -> None:
    house = bench()
    sequence = house.add("a", range(10), Role.PREFILL, max_tokens=1)
    house.drain()
    assert sequence.state is FINISHED
    assert house.ends["a"] == [Finished("a", FinishReason.LENGTH, 1)]
    assert whole(house.scheduler.load())


def test_decode_reserves_its_blocks_and_runs_once_adopted(bench: NewBench) -> None:
    house = bench()
    sequence = house.add("a", range(10), Role.DECODE)
    assert house.step() == []
    assert sequence.state is TRANSFERRING
    [admitted] = house.admissions("a")
    assert admitted.block_ids == tuple(sequence.block_table)
    assert admitted.generations == tuple(house.pool.generation(block) for block in admitted.block_ids)
    assert len(admitted.block_ids) == 3
    assert house.step() == []
    house.scheduler.adopt("a", house.transfer(sequence))
    assert sequence.state is RUNNING
    assert house.step() == [("a", 10, 1)]
    house.drain()
    assert house.tokens["a"] == dict(enumerate(house.expected(sequence)[1:], start=1))
    assert house.ends["a"] == [Finished("a", FinishReason.LENGTH, 4)]


def test_an_adopted_sequence_may_end_with_its_first_token(bench: NewBench) -> None:
    house = bench()
    sequence = house.add("a", range(10), Role.DECODE, stop=range(VOCABULARY))
    house.step()
    house.scheduler.adopt("a", house.transfer(sequence))
    assert house.step() == []
    assert house.ends["a"] == [Finished("a", FinishReason.STOP, 1)]
    assert whole(house.scheduler.load())


@pytest.mark.parametrize("num_valid_blocks", [0, 1, 2, 3])
def test_a_failed_transfer_is_recomputed_after_the_valid_blocks(bench: NewBench, num_valid_blocks: int) -> None:
    house = bench()
    sequence = house.add("a", range(10), Role.DECODE)
    house.step()
    house.model.write(sequence, 0, min(10, 4 * num_valid_blocks))
    house.model.write(sequence, min(10, 4 * num_valid_blocks), 10, GARBAGE)
    house.scheduler.recompute("a", num_valid_blocks)
    assert (sequence.state, sequence.role) == (WAITING, Role.WHOLE)
    start = 4 * min(num_valid_blocks, 2)
    assert house.step() == [("a", start, 10 - start)]
    house.drain()
    assert house.got("a") == house.expected(sequence)


def test_a_failed_transfer_goes_to_the_head_of_the_queue(bench: NewBench) -> None:
    house = bench(max_num_sequences=1)
    house.add("a", range(10), Role.DECODE)
    house.step()
    house.add("b", range(10))
    house.scheduler.recompute("a", 0)
    assert [shape[0] for shape in house.step()] == ["a"]


def bring_to(house: Bench, state: SequenceState) -> Sequence:
    role = {HELD: Role.PREFILL, TRANSFERRING: Role.DECODE}.get(state, Role.WHOLE)
    sequence = house.add("a", range(10), role)
    if state is not WAITING:
        house.step()
        house.settle()
    assert sequence.state is state
    return sequence


@pytest.mark.parametrize("state", [WAITING, TRANSFERRING, RUNNING, HELD])
@pytest.mark.parametrize("error", [None, Unavailable("gone")])
def test_abort_ends_a_sequence_in_every_state(bench: NewBench, state: SequenceState, error: Unavailable | None) -> None:
    house = bench()
    sequence = bring_to(house, state)
    produced = sequence.num_completion_tokens
    house.scheduler.abort("a", error)
    house.scheduler.abort("a", error)
    assert sequence.state is FINISHED
    assert whole(house.scheduler.load())
    assert house.step() == []
    assert house.ends["a"] == [Finished("a", FinishReason.ABORT, produced) if error is None else Failed("a", error)]


@pytest.mark.parametrize("state", [WAITING, RUNNING, HELD])
def test_adopt_and_recompute_concern_only_a_transfer(bench: NewBench, state: SequenceState) -> None:
    house = bench()
    sequence = bring_to(house, state)
    before = dataclasses.replace(house.scheduler.load())
    house.scheduler.adopt("a", 5)
    house.scheduler.recompute("a", 1)
    house.scheduler.adopt("unknown", 5)
    house.scheduler.recompute("unknown", 1)
    assert sequence.state is state
    assert house.scheduler.load() == before


def test_an_id_is_known_once(bench: NewBench) -> None:
    house = bench()
    for role in Role:
        house.add(role.value, range(10), role)
    for _ in range(2):
        for role in Role:
            with pytest.raises(AlreadyExists):
                house.add(role.value, range(10), role)
        house.step()
    assert house.scheduler.load().waiting == 0


@pytest.mark.parametrize("length", [0, 20, 21])
def test_a_prompt_that_leaves_no_room_in_the_context_is_refused(bench: NewBench, length: int) -> None:
    house = bench(context_length=20)
    with pytest.raises(InvalidArgument) as caught:
        house.add("a", [1] * length)
    assert caught.value.violations[0].field == "prompt"
    assert str(length) in caught.value.message
    assert whole(house.scheduler.load())


def test_a_context_larger_than_the_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="context"):
        Scheduler(BlockPool(4), Limits(8, 64, context_length=17, block_size=4))
    Scheduler(BlockPool(4), Limits(8, 64, context_length=16, block_size=4))
