"""How large a step may be, from how long steps took: on numbers, on a scheduler, and on an engine with a clock."""

from collections.abc import Iterator
from collections.abc import Sequence as Items

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.engine.engine import Engine, Launched
from kvrelay.engine.sequence import Chunk, Role
from kvrelay.engine.step_budget import MEASURED_PROMPT_TOKENS, PrefillRate, StepBudget, StepTimes
from tests.unit.scheduling import Bench, ChunkShape, FakeModel, NewBench

FIXED, PER_TOKEN = 0.004, 0.0005
BLOCK_SIZE = 4

sizes = st.lists(st.integers(1, 512), min_size=1, max_size=50)


def seconds(num_tokens: int) -> float:
    return FIXED + PER_TOKEN * num_tokens


def observed(num_tokens: list[int], itl_limit: float = 0.1, max_tokens: int = 512) -> StepBudget:
    budget = StepBudget(max_tokens, itl_limit, BLOCK_SIZE)
    for count in num_tokens:
        budget.observe(count, count, seconds(count))
    return budget


def test_the_line_is_found_where_steps_differ() -> None:
    times = StepTimes()
    for count in [1, 40, 200, 512, 8] * 40:
        times.observe(count, seconds(count))
    fixed, per_token = times.line()
    assert fixed == pytest.approx(FIXED, rel=0.1)
    assert per_token == pytest.approx(PER_TOKEN, rel=0.02)
    assert times.num_tokens_within(seconds(100)) == pytest.approx(100, rel=0.05)


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    times = StepTimes()
    for factor in (1, 3):
        for count in [8, 64, 256] * 200:
            times.observe(count, factor * seconds(count))
    assert times.line()[1] == pytest.approx(3 * PER_TOKEN, rel=0.05)


def test_equal_steps_are_taken_to_cost_nothing_but_tokens() -> None:
    times = StepTimes()
    for _ in range(10):
        times.observe(8, 0.004)
    fixed, per_token = times.line()
    assert fixed == pytest.approx(0.0, abs=1e-9)
    assert per_token == pytest.approx(0.0005)


@given(sizes)
def test_a_step_without_a_fixed_part_is_a_line_through_the_origin(counts: list[int]) -> None:
    times = StepTimes()
    for count in counts:
        times.observe(count, PER_TOKEN * count)
    assert times.num_tokens_within(0.1) == pytest.approx(0.1 / PER_TOKEN, rel=1e-3)


@given(sizes, st.lists(st.floats(0.0, 10.0), min_size=1, max_size=50))
def test_whatever_was_observed_more_time_never_means_fewer_tokens(counts: list[int], durations: list[float]) -> None:
    times = StepTimes()
    for count, duration in zip(counts, durations, strict=False):
        times.observe(count, duration)
    fixed, per_token = times.line()
    assert fixed >= 0.0
    assert per_token >= 0.0
    assert 0.0 <= times.num_tokens_within(0.05) <= times.num_tokens_within(0.1)


@given(sizes, st.integers(0, 64), st.floats(0.001, 1.0))
def test_a_step_keeps_its_limits(counts: list[int], num_decoding: int, itl_limit: float) -> None:
    budget = observed(counts, itl_limit)
    allowed = budget.num_tokens(num_decoding)
    assert min(512, num_decoding + BLOCK_SIZE) <= allowed <= 512
    if num_decoding == 0:
        assert allowed == 512
    times = StepTimes()
    for count in counts:
        times.observe(count, seconds(count))
    if num_decoding and allowed > num_decoding + BLOCK_SIZE:
        assert allowed <= times.num_tokens_within(itl_limit)


def test_without_a_limit_or_without_decoding_sequences_a_step_may_be_full() -> None:
    assert observed([512] * 20, itl_limit=0.0).num_tokens(8) == 512
    assert observed([512] * 20).num_tokens(0) == 512
    assert observed([512] * 20).num_tokens(8) < 256


def test_steps_that_only_decode_do_not_make_prompts_seem_cheap() -> None:
    """A worker whose prompts are computed elsewhere sees nothing else, and chance says more than a token or two."""
    budget = StepBudget(512, 0.1, BLOCK_SIZE)
    for _ in range(20):
        budget.observe(512, 512, 0.4)
    for index in range(1000):
        budget.observe(2 + index % 3, 0, 0.016 - 0.001 * (index % 3))
    assert budget.num_tokens(3) == pytest.approx(3 + 128, abs=1)


def test_before_the_first_step_nothing_is_held_back() -> None:
    assert StepBudget(512, 0.1, BLOCK_SIZE).num_tokens(8) == 512


def test_the_prefill_rate_is_unknown_until_a_real_prompt_was_computed() -> None:
    rate = PrefillRate()
    rate.observe(0, 1.0)
    rate.observe(MEASURED_PROMPT_TOKENS - 1, 1.0)
    assert rate.tokens_per_second == 0.0
    rate.observe(500, 0.25)
    assert rate.tokens_per_second == pytest.approx(2000)


def test_the_prefill_rate_follows_what_is_measured() -> None:
    rate = PrefillRate()
    for tokens_per_second in (1000.0, 4000.0):
        for _ in range(200):
            rate.observe(512, 512 / tokens_per_second)
    assert rate.tokens_per_second == pytest.approx(4000, rel=0.01)


def slow_steps(house: Bench) -> list[list[ChunkShape]]:
    """Runs until idle; every step takes what `seconds` says."""
    steps: list[list[ChunkShape]] = []
    while True:
        chunks, _ = house.schedule()
        if not chunks:
            return steps
        house.commit(chunks)
        house.scheduler.observe(chunks, seconds(sum(chunk.length for chunk in chunks)))
        steps.append([(chunk.sequence.request_id, chunk.start, chunk.length) for chunk in chunks])


def test_prompts_beside_decoding_sequences_come_in_chunks_within_the_limit(bench: NewBench) -> None:
    limit = seconds(12)
    house = bench(256, max_batched_tokens=64, context_length=400, itl_limit=limit)
    house.add("teacher", range(500, 700), max_tokens=100)
    slow_steps(house)
    house.add("running", range(40), max_tokens=100)
    house.add("prompt", range(100, 300), max_tokens=1)
    steps = slow_steps(house)
    beside = [length for step in steps for name, _, length in step if name == "prompt"]
    mixed = [step for step in steps if {name for name, _, _ in step} == {"running", "prompt"} and step[0][2] == 1]
    assert sum(beside) == 200
    assert mixed
    assert all(seconds(sum(length for *_, length in step)) <= limit * 1.05 for step in mixed)
    assert house.got("running") == house.expected(house.sequences["running"])
    assert house.got("prompt") == house.expected(house.sequences["prompt"])


def test_a_limit_that_cannot_be_kept_still_lets_prompts_go_on(bench: NewBench) -> None:
    house = bench(256, max_batched_tokens=64, context_length=400, itl_limit=1e-6)
    house.add("running", range(40), max_tokens=60)
    slow_steps(house)
    house.add("other", range(50), max_tokens=60)
    house.schedule()
    assert house.scheduler.load().waiting == 0
    house.add("prompt", range(100, 140), max_tokens=1)
    slow_steps(house)
    assert house.got("prompt") == house.expected(house.sequences["prompt"])


def test_prompts_alone_and_prompts_to_be_handed_over_are_not_held_back(bench: NewBench) -> None:
    house = bench(256, max_batched_tokens=64, context_length=400, itl_limit=1e-6)
    house.add("a", range(129), Role.PREFILL)
    house.add("b", range(200, 328), Role.PREFILL)
    assert slow_steps(house) == [
        [("a", 0, 64)],
        [("a", 64, 64)],
        [("a", 128, 1), ("b", 0, 63)],
        [("b", 63, 64)],
        [("b", 127, 1)],
    ]


class Clock:
    """Moves when the model computes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SlowModel(FakeModel):
    clock = Clock()

    def launch(self, chunks: Items[Chunk]) -> Launched:
        self.clock.now += seconds(sum(chunk.length for chunk in chunks))
        return super().launch(chunks)


@pytest.fixture
def slow_engine() -> Iterator[tuple[Engine, Bench]]:
    house = Bench(1024, max_num_sequences=64, max_batched_tokens=160, context_length=400)
    model = SlowModel(1024, 4)
    model.clock = Clock()
    yield Engine(house.scheduler, model, model.clock), house
    house.close()


def test_an_engine_tells_its_prefill_rate(slow_engine: tuple[Engine, Bench]) -> None:
    engine, house = slow_engine
    assert house.scheduler.load().prefill_rate == 0.0
    num_sequences = 40  # so that a step of nothing but decoding has more tokens than a measured prompt needs
    for index in range(num_sequences):
        house.add(f"r{index}", range(index * 10, index * 10 + 4), max_tokens=30)
    output = engine.step()
    expected = pytest.approx(4 * num_sequences / seconds(4 * num_sequences))
    assert output.load.prefill_rate == expected
    while not (output := engine.step()).idle:
        assert output.load.prefill_rate == expected, "decode steps say nothing about prompts"
