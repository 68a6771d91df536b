from hypothesis import given
from hypothesis import strategies as st

from kvrelay.control.queue_policy import rank, retry_after

PRIORITIES = st.integers(-(1 << 31), (1 << 31) - 1)
MILLISECONDS = st.integers(0, 4 * 10**12)
ARRIVALS = st.integers(0, 4 * 10**15)
REQUESTS = st.tuples(PRIORITIES, st.none() | MILLISECONDS, ARRIVALS)


def rank_of(request: tuple[int, int | None, int]) -> str:
    priority, deadline_ms, arrival_us = request
    return rank(priority, None if deadline_ms is None else deadline_ms / 1000, arrival_us / 1e6)


def order_of(request: tuple[int, int | None, int]) -> tuple[int, bool, int, int]:
    """As `rank` rounds: milliseconds and microseconds as floating point gives them."""
    priority, deadline_ms, arrival_us = request
    deadline = 0 if deadline_ms is None else int(deadline_ms / 1000 * 1000)
    return -priority, deadline_ms is None, deadline, int(arrival_us / 1e6 * 1_000_000)


@given(REQUESTS, REQUESTS)
def test_ranks_sort_by_priority_then_deadline_then_arrival(
    one: tuple[int, int | None, int], other: tuple[int, int | None, int]
) -> None:
    assert (rank_of(one) < rank_of(other)) == (order_of(one) < order_of(other))
    assert len(rank_of(one)) == len(rank_of(other)) == 34


@given(st.integers(), st.none() | st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_ranks_have_one_length_whatever_is_asked(priority: int, deadline: float | None, now: float) -> None:
    assert len(rank(priority, deadline, now)) == 34


def test_retry_after_is_the_mean_time_between_finishes() -> None:
    assert retry_after([], 100.0) == 1.0
    assert retry_after([100.0, 98.0, 96.0], 102.0) == 2.0
    assert retry_after([100.0] * 32, 100.0) == 0.1
    assert retry_after([10.0, 9.0], 1000.0) == 30.0
