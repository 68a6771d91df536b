from collections.abc import Iterator
from collections.abc import Sequence as Items

import pytest

from kvrelay.engine.engine import Engine, Launched
from kvrelay.engine.events import Admitted, Failed, Finished, Sampled, StepOutput
from kvrelay.engine.sequence import Chunk
from kvrelay.request import FinishReason, Token
from tests.unit.scheduling import Bench, FakeModel, Input


class BrokenModel(FakeModel):
    """Fails on the steps that compute something of a request whose id begins with `bad`."""

    at_launch = False

    def launch(self, chunks: Items[Chunk]) -> Launched:
        if self.at_launch and any(chunk.sequence.request_id.startswith("bad") for chunk in chunks):
            raise MemoryError("0xdeadbeef")
        return super().launch(chunks)

    def compute(self, inputs: Items[Input]) -> list[Token]:
        tokens = super().compute(inputs)
        if any(each.request.request_id.startswith("bad") for each in inputs):
            raise MemoryError("0xdeadbeef")
        return tokens


class CountingModel(FakeModel):
    num_runs = 0

    def compute(self, inputs: Items[Input]) -> list[Token]:
        self.num_runs += 1
        return super().compute(inputs)


class ForgetfulModel(FakeModel):
    """Returns one token too few."""

    def compute(self, inputs: Items[Input]) -> list[Token]:
        return super().compute(inputs)[:-1]


@pytest.fixture
def bench() -> Iterator[Bench]:
    house = Bench(max_num_sequences=2)
    yield house
    house.close()


@pytest.fixture(params=[False, True], ids=["alone", "overlap"])
def overlaps(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def clock_of(*times: float) -> Iterator[float]:
    yield from times


def test_a_step_says_what_happened_when_and_what_is_left(bench: Bench) -> None:
    times = clock_of(10.0, 10.5)
    engine = Engine(bench.scheduler, bench.model, lambda: next(times))
    sequence = bench.add("a", range(10), max_tokens=2)
    bench.add("b", range(20, 30), max_tokens=1)
    bench.add("c", range(30, 40))
    output = engine.step()
    assert [type(event) for event in output.events] == [Admitted, Admitted, Sampled, Sampled, Finished]
    assert output.events[2] == Sampled("a", 0, Token(bench.expected(sequence)[0]))
    assert output.events[4] == Finished("b", FinishReason.LENGTH, 1)
    assert (output.num_tokens, output.started, output.ended) == (20, 10.0, 10.5)
    assert output.load == bench.scheduler.load()
    assert (output.load.running, output.load.waiting, output.load.waiting_tokens) == (1, 1, 11)


def test_a_step_without_work_does_not_run_the_model(bench: Bench) -> None:
    model = CountingModel(64, 4)
    engine = Engine(bench.scheduler, model)
    assert engine.step().num_tokens == 0
    bench.add("a", range(10))
    bench.scheduler.abort("a")
    assert engine.step().events == (Finished("a", FinishReason.ABORT, 0),)
    assert model.num_runs == 0


def run_until_idle(engine: Engine) -> list[StepOutput]:
    outputs = [engine.step()]
    while not outputs[-1].idle:
        outputs.append(engine.step())
    return outputs


@pytest.mark.parametrize("at_launch", [False, True])
def test_a_batch_that_cannot_be_computed_fails_alone(bench: Bench, overlaps: bool, at_launch: bool) -> None:
    model = BrokenModel(64, 4, overlaps)
    model.at_launch = at_launch
    engine = Engine(bench.scheduler, model)
    good = bench.add("good", range(10), max_tokens=9)
    engine.step()
    bench.add("bad", range(20, 30))
    bench.add("next", range(40, 50))
    outputs = run_until_idle(engine)
    ends = {e.request_id: e for output in outputs for e in output.events if isinstance(e, Finished | Failed)}
    assert isinstance(ends["next"], Finished)
    for name in ("good", "bad"):
        end = ends[name]
        assert isinstance(end, Failed)
        assert (end.error.code, end.error.reason) == ("INTERNAL", "ENGINE_STEP_FAILED")
        assert "0xdeadbeef" not in end.error.message
    assert good.block_table == []
    sampled = [event for output in outputs for event in output.events if isinstance(event, Sampled)]
    # Only what was committed before the failure is told: with overlap the step before, without it an earlier one.
    assert [event.index for event in sampled if event.request_id == "good"] == ([0] if overlaps else [])
    assert outputs[-1].load.blocks_free == outputs[-1].load.blocks_total


def test_a_step_of_a_failed_sequence_in_flight_leaves_its_neighbours_alone(bench: Bench) -> None:
    """The step after the failed one is launched already, with a newcomer in it."""
    engine = Engine(bench.scheduler, BrokenModel(64, 4, overlaps=True))
    bench.add("bad", range(20, 30), max_tokens=9)
    engine.step()
    newcomer = bench.add("newcomer", range(40, 50), max_tokens=3)
    outputs = [engine.step()]
    assert [type(event) for event in outputs[0].events] == [Admitted, Failed]
    assert bench.scheduler.load().blocks_free == 64 - 3 - 3, "the device still writes into the failed one's blocks"
    outputs += run_until_idle(engine)
    ends = {e.request_id: type(e) for output in outputs for e in output.events if isinstance(e, Finished | Failed)}
    # The step in flight had a chunk of the bad one in it, so that it failed, too.
    assert ends == {"bad": Failed, "newcomer": Failed}
    assert newcomer.block_table == []
    assert outputs[-1].load.blocks_free == outputs[-1].load.blocks_total


def test_overlapping_steps_are_committed_one_behind(bench: Bench) -> None:
    engine = Engine(bench.scheduler, FakeModel(64, 4, overlaps=True))
    sequence = bench.add("a", range(10), max_tokens=2)
    outputs = run_until_idle(engine)
    first, second = bench.expected(sequence)
    assert [[event for event in output.events if not isinstance(event, Admitted)] for output in outputs] == [
        [],
        [Sampled("a", 0, Token(first))],
        [Sampled("a", 1, Token(second), FinishReason.LENGTH), Finished("a", FinishReason.LENGTH, 2)],
        [],
    ]
    assert [(output.num_tokens, output.idle) for output in outputs] == [(10, False), (1, False), (0, False), (0, True)]


def test_finish_collects_what_is_in_flight(bench: Bench) -> None:
    model = CountingModel(64, 4, overlaps=True)
    engine = Engine(bench.scheduler, model)
    bench.add("a", range(10))
    engine.step()
    assert model.num_runs == 0
    assert [type(event) for event in engine.finish().events] == [Sampled]
    assert engine.finish().events == ()
    bench.scheduler.check_integrity()


def test_a_model_that_returns_too_few_tokens_fails_its_batch_once(bench: Bench, overlaps: bool) -> None:
    engine = Engine(bench.scheduler, ForgetfulModel(64, 4, overlaps))
    bench.add("a", range(10), max_tokens=1)
    bench.add("b", range(20, 30), max_tokens=1)
    outputs = run_until_idle(engine)
    events = [event for output in outputs for event in output.events if not isinstance(event, Admitted)]
    assert [(type(event), event.request_id) for event in events] == [(Sampled, "a"), (Finished, "a"), (Failed, "b")]
    assert outputs[-1].load.blocks_free == outputs[-1].load.blocks_total
