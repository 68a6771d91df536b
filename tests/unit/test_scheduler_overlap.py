"""Steps that are scheduled while the one before is in flight: what is assumed, and what waits for the commit."""

import pytest

from kvrelay.engine.events import Failed, Finished, Progress, Sampled
from kvrelay.engine.sequence import Role, Sequence, SequenceState
from kvrelay.errors import Internal, Unavailable
from kvrelay.request import FinishReason
from tests.unit.scheduling import Bench, NewBench, whole

WAITING, TRANSFERRING, RUNNING, HELD, FINISHED = SequenceState

pytestmark = pytest.mark.parametrize("bench", [True], indirect=True, ids=["overlap"])


def launch(house: Bench) -> list[tuple[str, int, int]]:
    """One step without the commit of another."""
    chunks, _ = house.schedule()
    house.launch(chunks)
    return [(chunk.sequence.request_id, chunk.start, chunk.length) for chunk in chunks]


def test_the_token_in_flight_is_computed_before_its_id_is_known(bench: NewBench) -> None:
    house = bench()
    sequence = house.add("a", range(10), max_tokens=9)
    assert launch(house) == [("a", 0, 10)]
    assert launch(house) == [("a", 10, 1)]
    assert list(sequence.token_ids) == list(range(10))
    assert (sequence.num_computed_tokens, sequence.num_computing_tokens, sequence.num_sampling_tokens) == (0, 11, 2)
    house.settle(keep=1)
    assert sequence.token_ids == [*range(10), house.expected(sequence)[0]]
    assert (sequence.num_computed_tokens, sequence.num_computing_tokens, sequence.num_sampling_tokens) == (10, 1, 1)


@pytest.mark.parametrize(("limit", "value"), [("max_tokens", 2), ("context_length", 12)])
def test_nothing_is_scheduled_beyond_the_last_token(bench: NewBench, limit: str, value: int) -> None:
    house = bench(context_length=value if limit == "context_length" else 100)
    sequence = house.add("a", range(10), max_tokens=value if limit == "max_tokens" else 50)
    assert house.drain() == [[("a", 0, 10)], [("a", 10, 1)]]
    assert house.got("a") == house.expected(sequence)
    assert house.ends["a"] == [Finished("a", FinishReason.LENGTH, 2)]


def test_a_prefill_is_not_scheduled_beyond_its_first_token(bench: NewBench) -> None:
    house = bench(max_batched_tokens=6)
    house.add("a", range(10), Role.PREFILL)
    assert house.drain() == [[("a", 0, 6)], [("a", 6, 4)]]


def test_the_token_after_a_stop_is_dropped(bench: NewBench) -> None:
    house = bench()
    tokens = house.expected(house.add("probe", range(10), max_tokens=8))
    stop = next(token for token in tokens if token != tokens[0])
    house.add("a", range(10), max_tokens=8, stop=[stop])
    steps = house.drain()
    count = tokens.index(stop) + 1
    assert house.got("a") == tokens[:count]
    assert house.ends["a"] == [Finished("a", FinishReason.STOP, count)]
    assert sum(shape[0] == "a" for step in steps for shape in step) == count + 1


def test_what_others_are_told_waits_for_the_commit(bench: NewBench) -> None:
    """A decode worker copies blocks on Progress and on the first token, so they must be final then."""
    house = bench(max_batched_tokens=4)
    sequence = house.add("a", range(8), Role.PREFILL)
    launch(house)
    launch(house)
    assert [type(event) for event in house.events if isinstance(event, Progress | Sampled)] == []
    assert sequence.state is RUNNING
    assert house.settle(keep=1) == [Progress("a", 4)]
    house.model.check(sequence, 4)
    assert [type(event) for event in house.settle()] == [Sampled]
    assert sequence.state is HELD
    house.model.check(sequence, 8)


def test_blocks_in_flight_are_found_by_nobody(bench: NewBench) -> None:
    house = bench()
    first = house.add("first", range(12), max_tokens=9)
    launch(house)
    house.add("second", range(12), Role.DECODE)
    launch(house)
    assert house.admissions("second")[0].num_cached_blocks == 0, "their content would be copied before it is there"
    house.settle(keep=1)
    house.add("third", range(12), Role.DECODE)
    house.schedule()
    assert house.admissions("third")[0].block_ids == tuple(first.block_table[:3])


def end_by_abort(house: Bench, sequence: Sequence) -> None:
    house.scheduler.abort(sequence.request_id)


def end_by_error(house: Bench, sequence: Sequence) -> None:
    house.scheduler.abort(sequence.request_id, Unavailable("gone"))


def end_by_deadline(house: Bench, sequence: Sequence) -> None:
    house.now = 100.0
    house.schedule()


@pytest.mark.parametrize("end", [end_by_abort, end_by_error, end_by_deadline])
def test_blocks_are_free_only_when_the_device_has_written_them(bench: NewBench, end: object) -> None:
    assert callable(end)
    house = bench(4, prefix_caching=False)
    sequence = house.add("a", range(12), max_tokens=9, deadline=50.0)
    launch(house)
    launch(house)
    blocks = list(sequence.block_table)
    end(house, sequence)
    assert sequence.state is FINISHED
    house.add("b", range(20, 36)[:15], Role.DECODE)
    for num_in_flight in (2, 1):
        assert len(house.in_flight) == num_in_flight
        assert house.schedule()[0] == []
        assert house.admissions("b") == [], "its blocks are still going to be written by the device"
        house.scheduler.check_integrity()
        [held] = house.scheduler.held()
        assert (held.request_id, held.state, held.block_ids) == ("a", "finished", tuple(blocks))
        house.settle(keep=num_in_flight - 1)
    house.schedule()
    assert set(blocks) <= set(house.admissions("b")[0].block_ids)
    assert len(house.ends["a"]) == 1


def test_an_id_that_comes_again_is_not_confused_with_the_one_in_flight(bench: NewBench) -> None:
    house = bench()
    house.add("a", range(10), max_tokens=9)
    launch(house)
    house.scheduler.abort("a")
    again = house.add("a", range(20, 30), max_tokens=2)
    launch(house)
    chunks, launched = house.in_flight.popleft()
    launched.tokens()
    assert house.scheduler.fail(chunks, Internal("defect")) == []
    house.drain()
    assert house.got("a") == house.expected(again)


def test_nobody_gives_way_while_the_step_in_flight_may_free_blocks(bench: NewBench) -> None:
    house = bench(6, prefix_caching=False)
    house.add("old", range(12), max_tokens=1)
    young = house.add("young", range(20, 32), max_tokens=9)
    assert house.drain()[:2] == [[("old", 0, 12), ("young", 0, 12)], [("young", 12, 1)]]
    assert house.got("young") == house.expected(young)
    assert len(house.admissions("young")) == 1, "it was preempted for a block that the old one was about to free"
    assert house.scheduler.load().preemptions == 0


def test_a_preempted_sequence_loses_no_token_in_flight(bench: NewBench) -> None:
    costs = []
    for overlap in (False, True):
        house = bench(6, prefix_caching=False, overlap=overlap)
        for name, start in (("old", 0), ("young", 20)):
            house.add(name, range(start, start + 8), max_tokens=12)
        house.drain()
        for name, sequence in house.sequences.items():
            assert house.got(name) == house.expected(sequence)
        assert house.scheduler.load().preemptions == 1
        costs.append(house.model.num_computed)
    assert costs[0] == costs[1]


def test_a_failed_step_fails_its_sequences_and_their_next_step(bench: NewBench) -> None:
    house = bench()
    house.add("a", range(10), max_tokens=9)
    launch(house)
    other = house.add("b", range(20, 30), max_tokens=3)
    launch(house)
    chunks, launched = house.in_flight.popleft()
    launched.tokens()
    error = Internal("defect")
    assert house.scheduler.fail(chunks, error) == [Failed("a", error)]
    assert house.pool.num_free == 64 - 3 - 3, "the step in flight still writes into its blocks"
    house.drain()
    assert house.got("b") == house.expected(other)
    assert whole(house.scheduler.load())


def test_a_slot_is_had_by_one_running_sequence(bench: NewBench) -> None:
    house = bench(max_num_sequences=3)
    for number in range(12):
        house.add(str(number), [number], max_tokens=1 + number % 4)
    while house.step() or house.in_flight:
        running = [sequence.slot for sequence in house.sequences.values() if sequence.state is RUNNING]
        assert len(set(running)) == len(running)
        assert set(running) <= {0, 1, 2}
        assert all(s.slot == -1 for s in house.sequences.values() if s.state is not RUNNING)
