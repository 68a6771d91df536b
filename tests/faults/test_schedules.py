"""Schedules come from their seed alone, and those that run every time leave nothing out that can go wrong."""

from kvrelay.failpoints import ACTIONS, POINTS
from tests.faults.catalog import WIDE
from tests.faults.faults import Kind
from tests.faults.rig import DECODE, GATEWAYS, PREFILL, REDIS, WORKERS
from tests.faults.schedules import LAST_CHUNK_POINT, OUTSIDE, PAIRS, Schedule, schedule
from tests.faults.test_faults import NUM_SEEDS

SCHEDULES = [schedule(seed) for seed in range(NUM_SEEDS)]
FAULTS = [fault for each in SCHEDULES for fault in each.faults]
PAIRED = [each for each in SCHEDULES if len(each.faults) == 2]


def test_a_seed_says_everything() -> None:
    assert [schedule(seed) for seed in range(50)] == [schedule(seed) for seed in range(50)]
    assert len({str(schedule(seed)) for seed in range(50)}) == 50


def test_all_that_can_go_wrong_inside_goes_wrong() -> None:
    cases = {(each.failpoint.point, each.failpoint.action) for each in FAULTS if each.failpoint is not None}
    assert cases >= {(point, action) for point in POINTS for action in ACTIONS if action != "flip"}
    assert ("transfer.received", "flip") in cases


def test_all_that_can_go_wrong_outside_goes_wrong() -> None:
    assert {each.kind for each in FAULTS} == set(Kind)
    signalled = {
        (each.kind, _sort(each.target)) for each in FAULTS if each.kind in (Kind.KILL, Kind.DRAIN, Kind.FREEZE)
    }
    sorts = {"prefill", "decode", "gateway"}
    assert signalled == {
        *((kind, sort) for kind in (Kind.KILL, Kind.FREEZE) for sort in sorts | {REDIS}),
        *((Kind.DRAIN, sort) for sort in sorts),
    }
    assert {each.target for each in FAULTS if each.client} == {REDIS, *WORKERS}
    assert {each.client for each in FAULTS if each.client} == {*GATEWAYS, *WORKERS}


def _sort(target: str) -> str:
    return target.partition("-")[0]


def test_two_faults_strike_in_a_share_of_schedules() -> None:
    assert len(PAIRED) == NUM_SEEDS // 5 >= 2 * len(PAIRS)
    assert len(SCHEDULES) - len(PAIRED) >= 2 * len(OUTSIDE)


def test_all_workers_of_a_kind_are_lost_at_once() -> None:
    lost = [{fault.target for fault in each.faults if fault.takes_a_worker} for each in PAIRED]
    assert set(PREFILL) in lost
    assert set(DECODE) in lost


def test_each_gateway_is_asked_often() -> None:
    assert all(sum(each.gateway == name for each in SCHEDULES) > NUM_SEEDS // 10 for name in GATEWAYS)


def test_what_strikes_a_gateway_strikes_the_one_that_is_asked() -> None:
    for each in SCHEDULES:
        struck = {name for fault in each.faults for name in (fault.target, fault.client)}
        assert struck.isdisjoint({*GATEWAYS, "gateway"} - {each.gateway})


def test_what_is_announced_late_is_asked() -> None:
    def announces(each: Schedule) -> bool:
        return any(fault.failpoint is not None and fault.failpoint.point == LAST_CHUNK_POINT for fault in each.faults)

    assert all(set(each.asks) & set(WIDE) for each in SCHEDULES if announces(each))


def test_workers_are_restarted_seldom() -> None:
    """A worker's start takes seconds of CPU time, which all schedules share."""
    assert sum(each.restarts_a_worker for each in FAULTS) < 2 * NUM_SEEDS // 5
