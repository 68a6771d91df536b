"""Deadlines, and what a step and its books cost."""

import sys
from collections.abc import Callable

import pytest

from kvrelay.engine.events import Failed
from kvrelay.engine.sequence import Role, Sequence, SequenceState
from kvrelay.errors import DeadlineExceeded
from kvrelay.request import Request, Sampling
from tests.unit.scheduling import NewBench, whole

WAITING, TRANSFERRING, RUNNING, HELD, FINISHED = SequenceState


def test_expired_work_never_starts(bench: NewBench) -> None:
    house = bench()
    for role in Role:
        house.add(role.value, range(10), role, deadline=5.0)
    house.now = 5.0
    assert house.step() == []
    for role in Role:
        assert house.admissions(role.value) == []
        [end] = house.ends[role.value]
        assert isinstance(end, Failed)
        assert isinstance(end.error, DeadlineExceeded)
    assert whole(house.scheduler.load())


@pytest.mark.parametrize("state", [RUNNING, HELD])
def test_work_does_not_go_on_after_its_deadline(bench: NewBench, state: SequenceState) -> None:
    house = bench()
    role = Role.PREFILL if state is HELD else Role.WHOLE
    sequence = house.add("a", range(10), role, deadline=5.0)
    house.add("b", range(20, 30), deadline=6.0)
    house.now = 4.9
    house.step()
    house.settle()
    assert sequence.state is state
    assert house.scheduler.next_deadline == 5.0
    house.now = 5.0
    assert [shape[0] for shape in house.step()] == ["b"]
    assert sequence.state is FINISHED
    assert house.scheduler.next_deadline == 6.0


def test_a_deadline_does_not_end_a_transfer_but_what_follows_it(bench: NewBench) -> None:
    house = bench()
    for name in ("adopted", "failed"):
        house.add(name, range(10), Role.DECODE, deadline=5.0)
    house.step()
    house.now = 6.0
    house.step()
    assert [s.state for s in house.sequences.values()] == [TRANSFERRING] * 2
    assert house.scheduler.next_deadline is None, "the engine's loop would spin"
    house.scheduler.adopt("adopted", house.transfer(house.sequences["adopted"]))
    house.scheduler.recompute("failed", 0)
    assert house.step() == []
    assert [s.state for s in house.sequences.values()] == [FINISHED] * 2
    assert [len(house.ends[name]) for name in house.sequences] == [1, 1]


def test_an_id_that_comes_again_has_its_own_deadline(bench: NewBench) -> None:
    house = bench()
    house.add("a", range(10), deadline=5.0)
    house.scheduler.abort("a")
    house.step()
    again = house.add("a", range(10), deadline=50.0, max_tokens=20)
    house.now = 6.0
    house.step()
    assert again.state is RUNNING
    house.now = 50.0
    house.step()
    assert again.state is FINISHED


@pytest.mark.parametrize("names", ["{}", "same"])
def test_the_deadlines_of_what_has_ended_are_forgotten(bench: NewBench, names: str) -> None:
    house = bench()
    house.add("long", range(10), deadline=1e9)
    for number in range(2000):
        name = names.format(number)
        house.scheduler.add(Sequence(Request(name, (1, 2), Sampling(1)), deadline=1e6 + number))
        house.scheduler.abort(name)
        assert len(house.scheduler._deadlines) <= 2 * 2 + 65
    house.now = 1e9
    house.step()
    assert [type(end) for end in house.ends["long"]] == [Failed]
    assert house.scheduler.next_deadline is None


def count_calls(function: Callable[[], object]) -> int:
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("blocked_by", ["places", "blocks", "budget"])
def test_a_step_costs_the_same_however_many_wait(bench: NewBench, blocked_by: str) -> None:
    def cost(num_waiting: int) -> int:
        house = bench(
            8 if blocked_by == "blocks" else 64,
            max_num_sequences=2 if blocked_by == "places" else 8,
            max_batched_tokens=2 if blocked_by == "budget" else 64,
        )
        house.add("a", range(10), max_tokens=50)
        house.add("b", range(20, 30), max_tokens=50)
        house.step()
        for number in range(num_waiting):
            house.add(str(number), range(30, 50), deadline=1000.0 + number)
        return count_calls(lambda: house.scheduler.schedule(0.0))

    assert cost(10) == cost(500)


def test_load_counts_what_is_there(bench: NewBench) -> None:
    house = bench(8, max_num_sequences=3, max_batched_tokens=6)
    house.add("a", range(10), max_tokens=9)
    house.add("handover", range(20, 30), Role.DECODE)
    house.add("b", range(40, 50))
    load = house.scheduler.load()
    assert (load.running, load.waiting, load.waiting_tokens, load.blocks_free) == (0, 3, 20, 8)
    house.step()
    load = house.scheduler.load()
    # Of a, 4 tokens are left; nothing is to be computed for the handover.
    assert (load.running, load.waiting, load.waiting_tokens, load.blocks_free) == (2, 1, 14, 2)
    house.scheduler.recompute("handover", 0)
    assert house.scheduler.load().waiting_tokens == 24
    house.drain()
    assert whole(house.scheduler.load())
