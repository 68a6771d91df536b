"""Fixtures of the policy tests."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.scheduling import Bench, NewBench


@pytest.fixture(params=[False, True], ids=["alone", "overlap"])
def bench(request: pytest.FixtureRequest) -> Iterator[NewBench]:
    """Makes benches; after the test their books are right, and with everything aborted their pools are whole.

    Each test runs twice: with steps that are committed at once, and one step behind.
    """
    benches: list[Bench] = []

    def new(num_blocks: int = 64, **limits: Any) -> Bench:
        benches.append(Bench(num_blocks, **{"overlap": request.param, **limits}))
        return benches[-1]

    yield new
    for each in benches:
        each.close()
