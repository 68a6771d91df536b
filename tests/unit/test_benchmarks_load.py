"""What the benchmarks of the cluster ask, and how they count what came."""

import random
from pathlib import Path

import pytest

from benchmarks.disaggregation import LONG_EVERY, LONG_TOKENS, SHORT_TOKENS, TRAFFIC, write_trace
from benchmarks.storm import tokens_per_second
from kvrelay.bench.load import Outcome
from kvrelay.bench.measure import GoodputLimits
from kvrelay.bench.traces import read_trace
from tests.unit.bench_records import record


@pytest.mark.parametrize("name", TRAFFIC)
def test_a_trace_is_what_the_load_generator_reads(name: str, tmp_path: Path) -> None:
    first, again, other = (
        read_trace(write_trace(tmp_path / "trace", TRAFFIC[name], 24, seed), "mooncake") for seed in (1, 1, 2)
    )
    assert len(first) == 24
    assert first == again
    assert (first == other) is (name != "prefixes")  # of which each request draws one
    assert len({shape.hash_ids for shape in first}) == (4 if name == "prefixes" else 1)


def test_long_prompts_come_among_short_ones() -> None:
    rng = random.Random(0)
    lengths = [TRAFFIC["long"].request(rng, index)["input_length"] for index in range(2 * LONG_EVERY)]
    assert sorted(lengths) == [SHORT_TOKENS] * (2 * LONG_EVERY - 2) + [LONG_TOKENS] * 2


def test_goodput_counts_tokens_when_they_come_of_requests_within_the_limits() -> None:
    limits = GoodputLimits(ttft=1.0, tpot=0.5)
    records = [
        record([(0.9, 1), (1.1, 2), (1.9, 3)]),
        record([(2.5, 4)], due=2.0),
        record([(1.5, 10)]),  # too late
        record([(0.1, 1), (2.9, 2)]),  # too slow
        record([(0.5, 10)], outcome=Outcome.FAILED),
        record([(0.5, 10)], outcome=Outcome.INTERRUPTED),
    ]
    assert tokens_per_second(records, limits, 4).tolist() == [1, 5, 4, 0]
    assert tokens_per_second(records, limits, 2).tolist() == [1, 5]
    assert tokens_per_second([], limits, 2).tolist() == [0, 0]
