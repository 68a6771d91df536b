"""Who gives blocks back when they run out, and what becomes of it."""

import pytest

from kvrelay.engine.events import Admitted
from kvrelay.engine.sequence import Role, SequenceState
from tests.unit.scheduling import NewBench, whole

WAITING, TRANSFERRING, RUNNING, HELD, FINISHED = SequenceState


def test_the_youngest_gives_way_and_comes_back_first(bench: NewBench) -> None:
    house = bench(6, prefix_caching=False)
    old = house.add("old", range(8), max_tokens=12)
    young = house.add("young", range(20, 28), max_tokens=12)
    house.step()
    house.add("late", range(40, 48), max_tokens=2)
    while young.state is RUNNING:
        house.step()
        house.scheduler.check_integrity()
    assert (young.state, young.block_table, young.num_computed_tokens) == (WAITING, [], 0)
    assert old.state is RUNNING
    house.drain()
    for sequence in house.sequences.values():
        assert house.got(sequence.request_id) == house.expected(sequence)
    admitted = [event.request_id for event in house.events if isinstance(event, Admitted)]
    assert admitted[:4] == ["old", "young", "young", "late"]
    assert admitted.count("old") == 1


def test_an_older_prompt_does_not_give_way_to_a_younger_decode(bench: NewBench) -> None:
    house = bench(8, max_batched_tokens=2, prefix_caching=False)
    old = house.add("old", range(20), max_tokens=2, arrival=0)
    house.step()
    young = house.add("young", range(50, 58), Role.DECODE, max_tokens=20, arrival=1)
    house.step()
    house.scheduler.adopt("young", house.transfer(young))
    other = house.add("other", range(70, 74), Role.DECODE, max_tokens=20, arrival=2)
    assert house.pool.num_free == 1
    while old.num_computed_tokens < 20:
        house.step()
        assert old.state is not WAITING
    house.drain()
    assert len(house.admissions("old")) == 1
    assert house.got("old") == house.expected(old)
    assert other.state is TRANSFERRING


def test_a_sequence_without_younger_ones_gives_way_itself(bench: NewBench) -> None:
    house = bench(4, prefix_caching=False)
    house.add("held", range(20, 28), Role.PREFILL)
    house.step()
    sequence = house.add("a", range(8), max_tokens=4)
    house.drain()
    assert (sequence.state, house.sequences["held"].state) == (WAITING, HELD)
    house.scheduler.forget("held")
    house.drain()
    assert house.got("a") == house.expected(sequence)


@pytest.mark.parametrize("role", [Role.WHOLE, Role.DECODE])
def test_a_preempted_sequence_goes_on_as_whole(bench: NewBench, role: Role) -> None:
    house = bench(5, prefix_caching=False)
    old = house.add("old", range(7), max_tokens=12)
    young = house.add("young", range(20, 32), role, max_tokens=4)
    house.step()
    if role is Role.DECODE:
        house.scheduler.adopt("young", house.transfer(young))
    while young.state is RUNNING:
        house.step()
    assert (young.state, young.role) == (WAITING, Role.WHOLE)
    house.drain()
    assert house.got("old") == house.expected(old)
    assert house.got("young") == house.expected(young)[role is Role.DECODE :]
    assert [len(house.ends[name]) for name in ("old", "young")] == [1, 1]


def test_blocks_promised_to_a_decode_worker_are_not_taken(bench: NewBench) -> None:
    house = bench(8, max_batched_tokens=4, prefix_caching=False)
    old = house.add("old", range(4), max_tokens=16)
    house.step()
    promised = house.add("promised", range(20, 44), Role.PREFILL)
    house.drain()
    assert (old.state, promised.state) == (WAITING, HELD)
    assert len(house.admissions("promised")) == 1
    house.model.check(promised, 24)
    house.scheduler.forget("promised")
    house.drain()
    assert house.got("old") == house.expected(old)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_whatever_fits_the_pool_finishes(bench: NewBench, prefix_caching: bool) -> None:
    house = bench(8, max_batched_tokens=5, prefix_caching=prefix_caching)
    for number in range(40):
        house.add(str(number), range(number % 3, number % 3 + 1 + number % 17), max_tokens=1 + number * 7 % 30)
    steps = house.drain(5000)
    assert all(sum(length for _, _, length in step) <= 5 for step in steps)
    for name, sequence in house.sequences.items():
        assert house.got(name) == house.expected(sequence)
        assert len(house.ends[name]) == 1
    assert max(len(house.admissions(name)) for name in house.sequences) > 1, "nothing was preempted"
    assert whole(house.scheduler.load())
