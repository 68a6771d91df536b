"""Schedules come from their seed alone, and those that run every time leave no state of the handover out."""

from kvrelay.failpoints import ACTIONS, POINTS
from tests.faults.schedules import Kind, schedule
from tests.faults.test_faults import NUM_SEEDS

FAULTS = [schedule(seed).fault for seed in range(NUM_SEEDS)]


def test_a_seed_says_everything() -> None:
    assert [schedule(seed) for seed in range(50)] == [schedule(seed) for seed in range(50)]
    assert len({str(schedule(seed)) for seed in range(50)}) == 50


def test_all_that_can_go_wrong_inside_goes_wrong() -> None:
    cases = {(each.failpoint.point, each.failpoint.action) for each in FAULTS if each.failpoint is not None}
    assert cases >= {(point, action) for point in POINTS for action in ACTIONS if action != "flip"}
    assert ("transfer.received", "flip") in cases


def test_all_that_can_go_wrong_outside_goes_wrong() -> None:
    assert {each.kind for each in FAULTS} == set(Kind)
    assert {each.target for each in FAULTS if each.client} >= {
        "redis",
        "prefill-0",
        "prefill-1",
        "decode-0",
        "decode-1",
    }


def test_workers_are_killed_seldom() -> None:
    """A worker's start takes seconds of CPU time, which all schedules share."""
    assert sum(each.action == "kill" for each in FAULTS) < NUM_SEEDS // 6
