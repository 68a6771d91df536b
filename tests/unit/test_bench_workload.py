"""The benchmark's lengths, prompts and arrivals: their statistics, and that the same seed asks the same."""

import math
from itertools import islice, pairwise

import numpy as np
import pytest

from kvrelay.bench.arrivals import RandomArrivals, TraceArrivals
from kvrelay.bench.lengths import LengthDistribution
from kvrelay.bench.traces import Shape
from kvrelay.bench.workload import Job, Purpose, Synthetic, Workload, fit, generator
from kvrelay.errors import ConfigurationError

VOCAB, CONTEXT = 1000, 4096
NUM_DRAWS = 20_000


def distribution(text: str) -> LengthDistribution:
    return LengthDistribution.parse("--input-tokens", text)


def draws(text: str) -> np.ndarray:
    random = np.random.default_rng(1)
    return np.array([distribution(text).draw(random) for _ in range(NUM_DRAWS)])


def workload(source: Synthetic | list[Shape], seed: int = 0, context_length: int = CONTEXT) -> Workload:
    return Workload(source, VOCAB, context_length, seed)


def synthetic(input_tokens: str = "uniform:5,50", output_tokens: str = "uniform:1,9", prefix: int = 0) -> Synthetic:
    return Synthetic(distribution(input_tokens), distribution(output_tokens), prefix)


# lengths


@pytest.mark.parametrize(
    ("text", "mean", "deviation"),
    [
        ("fixed:37", 37, 0),
        ("37", 37, 0),
        ("lognormal:200,0.9", 200, 200 * math.sqrt(math.exp(0.9**2) - 1)),
        ("exponential:128", 128, 128),
        ("uniform:10,20", 15, math.sqrt((11**2 - 1) / 12)),
    ],
)
def test_mean_and_deviation(text: str, mean: float, deviation: float) -> None:
    values = draws(text)
    assert abs(values.mean() - mean) <= 4 * deviation / math.sqrt(NUM_DRAWS)
    assert values.std() == pytest.approx(deviation, rel=0.08)


def test_uniform_has_both_its_ends() -> None:
    values = draws("uniform:3,6")
    assert set(values) == {3, 4, 5, 6}


def test_the_median_of_a_lognormal() -> None:
    assert np.median(draws("lognormal:200,0.9")) == pytest.approx(200 * math.exp(-(0.9**2) / 2), rel=0.04)


def test_clipping() -> None:
    values = draws("lognormal:100,1,min=50,max=120")
    assert (values.min(), values.max()) == (50, 120)
    assert (values == 50).mean() > 0.3
    assert draws("exponential:1").min() == 1
    assert draws("lognormal:1000000,10").max() <= 1_000_000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gauss:3", "'gauss' is no distribution"),
        ("", "'' is not a number"),
        ("fixed:", "'' is not a number"),
        ("fixed:1.5", "1.5 is not a whole number"),
        ("fixed:0", "0 is not a whole number from 1"),
        ("0", "0 is not a whole number from 1"),
        ("fixed:1,2", "fixed takes N"),
        ("lognormal:100", "lognormal takes MEAN,SIGMA"),
        ("lognormal:100,-1", "SIGMA is from 0"),
        ("lognormal:100,nan", "SIGMA is from 0"),
        ("exponential:inf", "a mean is from 1"),
        ("exponential:nan", "a mean is from 1"),
        ("uniform:9,3", "A is above B"),
        ("uniform:1,inf", "inf is not a whole number"),
        ("fixed:5,min=9,max=3", "min is above max"),
        ("fixed:5,least=9", "'least' is neither min nor max"),
        ("fixed:5,min=x", "'x' is not a number"),
    ],
)
def test_a_distribution_that_is_none(text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        distribution(text)
    message = str(raised.value)
    assert message.startswith(f"--input-tokens: {text!r}: ")
    assert reason in message
    assert "valid are fixed:N, lognormal:MEAN,SIGMA" in message


# prompts


def test_the_same_seed_asks_the_same() -> None:
    first, second = (list(workload(synthetic(), seed=3).jobs(20)) for _ in range(2))
    assert first == second
    assert first != list(workload(synthetic(), seed=4).jobs(20))


def test_prompts_have_their_lengths_and_stay_in_the_vocabulary() -> None:
    jobs = list(workload(synthetic("fixed:300", "fixed:7")).jobs(30))
    assert [job.index for job in jobs] == list(range(30))
    assert {len(job.token_ids) for job in jobs} == {300}
    assert {job.output_tokens for job in jobs} == {7}
    seen = {token_id for job in jobs for token_id in job.token_ids}
    assert min(seen) >= 0
    assert VOCAB * 0.95 < max(seen) < VOCAB
    assert len({tuple(job.token_ids) for job in jobs}) == 30


def test_a_shared_prefix_comes_before_the_prompts_own_tokens() -> None:
    jobs = list(workload(synthetic("fixed:10", "fixed:1", prefix=32)).jobs(5))
    assert {len(job.token_ids) for job in jobs} == {42}
    assert len({tuple(job.token_ids[:32]) for job in jobs}) == 1
    assert len({tuple(job.token_ids[32:]) for job in jobs}) == 5


def test_a_shared_prefix_changes_no_length() -> None:
    with_prefix, without = (list(workload(synthetic(prefix=prefix)).jobs(20)) for prefix in (8, 0))
    assert [len(job.token_ids) - 8 for job in with_prefix] == [len(job.token_ids) for job in without]


def test_warm_up_is_as_long_and_shares_nothing() -> None:
    load = workload(synthetic("uniform:20,60", prefix=16))
    warmup, jobs = list(load.warmup(10)), list(load.jobs(10))
    assert [len(job.token_ids) for job in warmup] == [len(job.token_ids) for job in jobs]
    assert [job.output_tokens for job in warmup] == [job.output_tokens for job in jobs]
    assert {tuple(job.token_ids[:16]) for job in warmup}.isdisjoint(tuple(job.token_ids[:16]) for job in jobs)
    assert list(load.jobs(10)) == jobs


def test_equal_hash_ids_are_equal_blocks() -> None:
    shapes = [
        Shape(1200, 5, 0.0, hash_ids=(7, 8, 9)),
        Shape(1100, 5, 0.1, hash_ids=(7, 8, 10)),
        Shape(600, 5, 0.2, hash_ids=(8, 7)),
        Shape(700, 5, 0.3, hash_ids=(7,)),
    ]
    a, b, c, d = (job.token_ids for job in workload(shapes).jobs())
    assert [len(a), len(b), len(c), len(d)] == [1200, 1100, 600, 700]
    assert a[:1024] == b[:1024]
    assert a[1024:1100] != b[1024:]
    assert c[:512] == a[512:1024]
    assert c[512:] == a[:88]
    assert d[:512] == a[:512]
    assert d[512:600] != a[512:600]
    assert next(workload(shapes, seed=1).jobs()).token_ids != a


def test_warm_up_of_a_trace_leaves_no_blocks() -> None:
    load = workload([Shape(1024, 5, 0.0, hash_ids=(7, 8))])
    (warmup,), (job,) = load.warmup(3), load.jobs(3)
    assert len(warmup.token_ids) == 1024
    assert warmup.token_ids[:512] != job.token_ids[:512]


def test_recorded_prompts_are_sent_as_they_are() -> None:
    (job,) = workload([Shape(3, 5, token_ids=(1, 2, 999))]).jobs()
    assert list(job.token_ids) == [1, 2, 999]
    with pytest.raises(ConfigurationError, match="request 2: token id 1000 is outside"):
        workload([Shape(1, 5, token_ids=(1,)), Shape(2, 5, token_ids=(5, 1000))])


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ((60, 40), (60, 40)),
        ((99, 1), (99, 1)),
        ((500, 10), (90, 10)),
        ((10, 500), (10, 90)),
        ((70, 70), (50, 50)),
        ((60, 45), (55, 45)),
        ((1000, 1000), (50, 50)),
    ],
)
def test_what_is_longer_than_the_context_is_cut(asked: tuple[int, int], kept: tuple[int, int]) -> None:
    shape = Shape(*asked)
    fitting = fit(shape, 100)
    assert (fitting.input_tokens, fitting.output_tokens) == kept
    (job,) = workload([shape], context_length=100).jobs()
    assert (len(job.token_ids), job.output_tokens, job.was_cut) == (*kept, asked != kept)


def test_a_cut_prompt_keeps_its_beginning() -> None:
    shapes = [Shape(100_000, 5, 0.0, tuple(range(196))), Shape(1024, 5, 0.0, (0, 1))]
    cut, whole = workload(shapes, context_length=2000).jobs()
    assert len(cut.token_ids) == 1995
    assert cut.token_ids[:1024] == whole.token_ids
    (recorded,) = workload([Shape(300, 5, token_ids=tuple(range(300)))], context_length=20).jobs()
    assert list(recorded.token_ids) == list(range(15))


# arrivals


def jobs_at(*timestamps: float) -> list[Job]:
    return [Job(index, [1], 1, timestamp, False) for index, timestamp in enumerate(timestamps)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_of_random_arrivals(burstiness: float) -> None:
    jobs = jobs_at(*[0.0] * NUM_DRAWS)
    random = generator(5, Purpose.ARRIVALS)
    scheduled = list(RandomArrivals(50.0, burstiness).schedule(jobs, random))
    assert [job for _, job in scheduled] == jobs
    gaps = np.diff([0.0] + [moment for moment, _ in scheduled])
    assert gaps.min() >= 0
    variation = 1 / math.sqrt(burstiness)
    assert abs(gaps.mean() * 50 - 1) < 4 * variation / math.sqrt(NUM_DRAWS)
    assert gaps.std() * 50 == pytest.approx(variation, rel=0.06)


def test_poisson_gaps_are_exponential() -> None:
    schedule = RandomArrivals(10.0).schedule(jobs_at(*[0.0] * NUM_DRAWS), generator(5, Purpose.ARRIVALS))
    moments = [moment for moment, _ in schedule]
    gaps = np.array([after - before for before, after in pairwise(moments)])
    for share in (0.1, 0.5, 0.9):
        assert (gaps < -math.log(1 - share) / 10).mean() == pytest.approx(share, abs=0.015)


def test_the_rate_does_not_change_what_is_asked() -> None:
    slow, fast = (
        [
            job
            for _, job in RandomArrivals(rate).schedule(workload(synthetic()).jobs(10), generator(0, Purpose.ARRIVALS))
        ]
        for rate in (1.0, 100.0)
    )
    assert slow == fast


def test_a_trace_keeps_its_timestamps() -> None:
    schedule = TraceArrivals(speed=4.0).schedule(jobs_at(0.0, 1.0, 1.0, 10.0), generator(0, Purpose.ARRIVALS))
    assert [moment for moment, _ in schedule] == [0.0, 0.25, 0.25, 2.5]


def test_an_endless_load_is_drawn_as_it_is_needed() -> None:
    schedule = RandomArrivals(10.0).schedule(workload(synthetic()).jobs(), generator(0, Purpose.ARRIVALS))
    assert len(list(islice(schedule, 50))) == 50
