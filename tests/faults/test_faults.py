"""Whatever goes wrong, and whenever: requests bring what they bring without faults, and nothing is left behind.

A schedule that fails is played again by `scripts/faults --seed N`.
"""

import pytest

from tests.faults.conftest import Stage
from tests.faults.play import play
from tests.faults.rig import WORKERS
from tests.faults.schedules import schedule

NUM_SEEDS, BATCH = 200, 20


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("first", range(0, NUM_SEEDS, BATCH))
async def test_schedules(stage: Stage, first: int) -> None:
    reports = []
    for seed in range(first, first + BATCH):
        reports.append(await play(stage.rig, schedule(seed), stage.references))
        print(reports[-1])
    bad = [report for report in reports if report.faults]
    assert not bad, "\n".join([*map(str, bad), stage.rig.logs()])
    # Not each fault meets a request, but a rig of which none does would prove nothing.
    assert sum(report.struck for report in reports) > BATCH // 2
    await stage.rig.wait_ready(*WORKERS)
    assert not await stage.rig.what_is_left()
