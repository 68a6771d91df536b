"""As `test_faults`, with workers that share a pool: who dies in it, or stands still, costs the others nothing."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.faults.play import References, check_promises, play
from tests.faults.rig import WORKERS, Rig, start_rig
from tests.faults.schedules import schedule

SEEDS = range(1000, 1020)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    async with start_rig(tmp_path_factory.mktemp("faults-shared"), shares_pool=True) as rig:
        yield rig


@pytest.mark.asyncio(loop_scope="module")
async def test_schedules_in_a_shared_pool(rig: Rig, references: References) -> None:
    reports = []
    for seed in SEEDS:
        reports.append(await play(rig, schedule(seed), references))
        print(reports[-1])
    check_promises(rig, reports)
    # No blocks travel, so that what strikes them on their way meets nobody.
    assert sum(report.struck for report in reports) > len(SEEDS) // 3
    await rig.wait_ready(*WORKERS)
    assert not await rig.what_is_left()
    status = await rig.status()
    assert status is not None
    assert {link.transport for worker in status.workers for link in worker.links} == {"pool"}
