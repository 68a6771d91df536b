"""What a benchmark makes of its records, against examples computed by hand."""

from typing import Any

import numpy as np
import pytest

from kvrelay.bench.load import Outcome, Record
from kvrelay.bench.measure import Distribution, Goodput, GoodputLimits, Run, Summary, inter_token_gaps, summarise
from kvrelay.bench.timeline import timeline
from kvrelay.request import Timings
from tests.unit.bench_records import record


def summary(*records: Record, window: float = 10.0, limits: GoodputLimits | None = None) -> Summary:
    return summarise(Run(records, window, 0.25), limits or GoodputLimits())


def found(distribution: Distribution | None) -> Distribution:
    assert distribution is not None
    return distribution


def test_times_of_one_request() -> None:
    # Due at 1, tokens at 1.5, 1.7 and 2.1.
    result = summary(record([(1.5, 1), (1.7, 1), (2.1, 1)], due=1.0, sent=1.02))
    assert found(result.ttft).mean == pytest.approx(0.5)
    assert found(result.e2e).mean == pytest.approx(1.1)
    assert found(result.tpot).mean == pytest.approx((1.1 - 0.5) / 2)
    assert found(result.itl).count == 2
    assert found(result.itl).mean == pytest.approx(0.3)
    assert found(result.itl).maximum == pytest.approx(0.4)
    assert found(result.send_delay).mean == pytest.approx(0.02)


def test_a_response_of_several_tokens_shares_its_gap() -> None:
    one = record([(1.0, 1), (1.3, 3), (1.5, 1)])
    assert inter_token_gaps(one).tolist() == pytest.approx([0.1, 0.1, 0.1, 0.2])
    assert found(summary(one).response_gap).p50 == pytest.approx(0.25)


def test_tokens_that_come_with_the_first_have_no_gap() -> None:
    one = record([(1.0, 3), (1.4, 2)])
    assert inter_token_gaps(one).tolist() == pytest.approx([0.0, 0.0, 0.2, 0.2])


def test_gaps_add_up_to_the_time_from_the_first_token_to_the_last() -> None:
    one = record([(0.5, 2), (0.9, 1), (1.7, 5), (2.0, 1)])
    assert len(inter_token_gaps(one)) == 8
    assert inter_token_gaps(one).sum() == pytest.approx(1.5)
    assert found(summary(one).tpot).mean == pytest.approx(1.5 / 8)


def test_a_single_token_has_neither_gaps_nor_tpot() -> None:
    result = summary(record([(1.0, 1)]))
    assert (result.itl, result.tpot, result.response_gap) == (None, None, None)
    assert found(result.ttft).mean == 1.0


def test_percentiles() -> None:
    values = Distribution.of(np.arange(101.0))
    assert values == Distribution(101, 50.0, 50.0, 90.0, 95.0, 99.0, 100.0)
    assert found(Distribution.of(np.array([1.0, 2.0]))).p90 == pytest.approx(1.9)
    assert Distribution.of(np.empty(0)) is None


def test_throughput_counts_what_comes_within_the_window() -> None:
    within = record([(1.0, 1), (2.0, 3)], input_tokens=100, cached_tokens=64)
    beyond = record([(3.0, 2), (5.0, 4)], input_tokens=10)
    later = record([(4.5, 1), (5.0, 4)], input_tokens=1000)
    result = summary(within, beyond, later, window=4.0)
    assert (result.output_tokens, result.input_tokens, result.cached_tokens) == (6, 110, 64)
    assert result.output_tokens_per_second == pytest.approx(6 / 4)
    assert result.total_tokens_per_second == pytest.approx(116 / 4)
    assert result.requests_per_second == pytest.approx(1 / 4)
    assert result.completed == 3
    assert found(result.e2e).count == 3


def test_failed_and_interrupted_requests() -> None:
    result = summary(
        record([(1.0, 2), (2.0, 2)]),
        record([(1.0, 7)], outcome=Outcome.FAILED, error="UNAVAILABLE", ended=1.5),
        record([], outcome=Outcome.FAILED, error="RESOURCE_EXHAUSTED", ended=0.1),
        record([], outcome=Outcome.FAILED, error="UNAVAILABLE", ended=0.1),
        record([(3.0, 5)], outcome=Outcome.INTERRUPTED),
    )
    assert (result.completed, result.failed, result.interrupted) == (1, 3, 1)
    assert result.errors == {"UNAVAILABLE": 2, "RESOURCE_EXHAUSTED": 1}
    # What has come of a failed request is of no use; what has come before an interrupt is work done.
    assert result.output_tokens == 4 + 5
    assert found(result.ttft).count == 1


def test_goodput() -> None:
    about: Any = pytest.approx  # stands for a number
    good = record([(0.1, 1), (0.3, 2)])  # TPOT 0.1
    slow_start = record([(0.9, 1), (1.0, 1)])
    slow_pace = record([(0.1, 1), (1.1, 2)])  # TPOT 0.5
    one_token = record([(0.2, 1)])
    failed = record([], outcome=Outcome.FAILED, error="UNAVAILABLE", ended=0.1)
    records = (good, slow_start, slow_pace, one_token, failed)
    both = GoodputLimits(ttft=0.2, tpot=0.1 + 1e-9)
    assert summary(*records, limits=both).goodput == Goodput(both, about(0.2), about(2 / 5))
    only_ttft = GoodputLimits(ttft=0.2)
    assert summary(*records, limits=only_ttft).goodput == Goodput(only_ttft, about(0.3), about(3 / 5))
    only_tpot = GoodputLimits(tpot=0.2)
    assert summary(*records, limits=only_tpot).goodput == Goodput(only_tpot, about(0.3), about(3 / 5))
    assert summary(*records).goodput is None


def test_goodput_sees_one_long_gap_that_a_mean_hides() -> None:
    stalled = record([(0.1, 1), (0.2, 1), (0.7, 8)])  # TPOT 0.067
    assert not GoodputLimits(tpot=0.1, gap=0.4).kept_by(stalled)
    assert GoodputLimits(tpot=0.1, gap=0.5 + 1e-9).kept_by(stalled)
    for without_gaps in (record([(0.1, 3)]), record([(0.1, 1)])):
        assert GoodputLimits(gap=0.0).kept_by(without_gaps)


def test_goodput_counts_the_wait_for_a_late_load_generator() -> None:
    late = record([(1.0, 1)], due=0.0, sent=0.95)
    result = summary(late, limits=GoodputLimits(ttft=0.5))
    assert result.goodput is not None
    assert result.goodput.share == 0


def test_stages() -> None:
    timings = Timings(
        gateway_queue=0.1,
        prefill_queue=0.2,
        prefill=0.3,
        transfer=0.05,
        decode_queue=0.1,
        time_to_first_token=0.65,
        total=2.0,
    )
    stages = summary(record([(1.0, 1)], timings=timings)).stages
    means = {name: stage.mean for name, stage in stages.items()}
    assert means == pytest.approx({"queue": 0.4, "prefill": 0.3, "transfer": 0.05, "decode": 1.2, "other": 0.05})
    assert sum(stage.share for stage in stages.values()) == pytest.approx(1)
    assert stages["decode"].share == pytest.approx(0.6)


def test_short_and_cut_requests_are_counted() -> None:
    result = summary(record([(1.0, 3)], asked=5), record([(1.0, 3)], was_cut=True), record([(1.0, 3)]))
    assert (result.short, result.cut) == (1, 1)


def test_nothing_has_come() -> None:
    result = summary(window=0.0, limits=GoodputLimits(ttft=1.0))
    assert (result.completed, result.output_tokens_per_second, result.ttft, dict(result.stages)) == (0, 0, None, {})
    assert result.goodput == Goodput(GoodputLimits(ttft=1.0), 0.0, 0.0)


def test_timeline() -> None:
    first = record([(1.0, 4), (2.0, 8)])
    second = record([(5.5, 6)], due=5.0)
    running = record([(5.9, 1)], due=5.5, outcome=Outcome.INTERRUPTED)
    line = timeline(Run([first, second, running], 6.0, 0.0))
    assert (line.edges[0], line.edges[-1]) == (0.0, 6.0)
    assert (line.tokens_per_second * np.diff(line.edges)).sum() == pytest.approx(19)
    at = dict(zip(line.moments.round(2).tolist(), line.running.tolist(), strict=True))
    counts = [next(count for moment, count in at.items() if moment >= wanted) for wanted in (0.5, 3.0, 5.2, 5.7)]
    assert counts == [1, 0, 1, 1]
