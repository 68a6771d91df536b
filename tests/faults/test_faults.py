"""Whatever goes wrong, and whenever: requests bring what they bring without faults, and nothing is left behind."""

import pytest

from kvrelay.failpoints import POINTS
from tests.faults.play import References, check_promises, play
from tests.faults.rig import WORKERS, Rig
from tests.faults.schedules import schedule

NUM_SEEDS, BATCH = 200, 20


def seeds_of(point: str) -> list[int]:
    faults = {seed: schedule(seed).faults[0].failpoint for seed in range(NUM_SEEDS)}
    return [seed for seed, failpoint in faults.items() if failpoint is not None and failpoint.point == point]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("first", range(0, NUM_SEEDS, BATCH))
async def test_schedules(rig: Rig, references: References, first: int) -> None:
    reports = []
    for seed in range(first, first + BATCH):
        reports.append(await play(rig, schedule(seed), references))
        print(reports[-1])
    check_promises(rig, reports)
    # Not each fault meets a request, but a rig of which none does would prove nothing.
    assert sum(report.struck for report in reports) > BATCH // 2
    await rig.wait_ready(*WORKERS)
    assert not await rig.what_is_left()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("point", POINTS)
async def test_each_failpoint_is_met(rig: Rig, references: References, point: str) -> None:
    """By the schedules above; where this test runs alone, by as many of them as it takes."""
    for seed in seeds_of(point):
        if rig.met()[point]:
            break
        await play(rig, schedule(seed), references, run="-again")
    assert rig.met()[point]
