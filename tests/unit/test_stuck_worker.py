"""A worker whose engine hangs in a step is not ready, and is again when the step ends."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvrelay.errors import FailedPrecondition
from kvrelay.request import WorkerRole, WorkerState
from kvrelay.settings import Settings, WorkerSettings
from kvrelay.worker import _Worker, check_epoch


class Engine:
    seconds = 0.0

    def step_seconds(self) -> float:
        return self.seconds


def worker_over(engine: Any, stuck_seconds: float) -> _Worker:
    settings = Settings(worker=WorkerSettings(stuck_seconds=stuck_seconds))
    nothing: Any = SimpleNamespace()
    return _Worker("prefill-0", WorkerRole.PREFILL, settings, nothing, engine, nothing)


def test_a_step_that_takes_too_long_makes_it_stuck_until_it_ends() -> None:
    engine = Engine()
    worker = worker_over(engine, stuck_seconds=5.0)
    states = []
    for engine.seconds in (0.0, 4.9, 5.1, 9.0, 0.0, 0.1):
        states.append((worker.follow_engine(), worker.state))
    ready, stuck = WorkerState.READY, WorkerState.STUCK
    assert states == [(False, ready), (False, ready), (True, stuck), (False, stuck), (True, ready), (False, ready)]


def test_zero_allows_any_time() -> None:
    engine = Engine()
    engine.seconds = 1e6
    worker = worker_over(engine, stuck_seconds=0.0)
    assert not worker.follow_engine()
    assert worker.state is WorkerState.READY


def test_a_call_for_another_start_is_refused() -> None:
    check_epoch(7, 7)
    for meant in (0, 6, 8):
        with pytest.raises(FailedPrecondition) as caught:
            check_epoch(meant, 7)
        assert caught.value.reason == "STALE_EPOCH"
