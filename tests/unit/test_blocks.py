"""Block tables as runs."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.blocks import contiguous_runs

Tables = Sequence[Sequence[int]]


@st.composite
def tables(draw: st.DrawFn) -> Tables:
    """Few different numbers, so that there are runs."""
    length = draw(st.integers(0, 12))
    return draw(st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length), min_size=1, max_size=3))


def counts_up(found: Tables, end: int) -> bool:
    return all(table[end] == table[end - 1] + 1 for table in found)


@given(tables())
def test_runs_are_all_positions_in_order_and_end_only_where_a_table_does_not_count_up(found: Tables) -> None:
    runs = list(contiguous_runs(*found))
    positions = [position for run in runs for position in range(run.start, run.stop)]
    assert positions == list(range(len(found[0])))
    for run in runs:
        assert run.start < run.stop
        assert all(counts_up(found, end) for end in range(run.start + 1, run.stop))
    assert not any(counts_up(found, after.start) for _, after in pairwise(runs))


@pytest.mark.parametrize(
    ("found", "runs"),
    [
        (([4, 5, 6, 9, 10], [1, 2, 3, 4, 5]), [slice(0, 3), slice(3, 5)]),
        (([4, 5, 6], [7, 8, 3]), [slice(0, 2), slice(2, 3)]),
        ((range(5),), [slice(0, 5)]),
        (([], []), []),
    ],
)
def test_examples(found: Tables, runs: list[slice]) -> None:
    assert list(contiguous_runs(*found)) == runs
