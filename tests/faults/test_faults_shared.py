"""As `test_faults`, with workers that share a pool: who dies in it, or stands still, costs the others nothing."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.faults.conftest import Stage
from tests.faults.play import play, record
from tests.faults.rig import SETTINGS, WORKERS, make_model, start_rig
from tests.faults.schedules import schedule

NUM_SEEDS, BATCH = 40, 20


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    folder = tmp_path_factory.mktemp("faults-shared")
    shared = {**SETTINGS, "shared_pool": folder / "pool"}
    async with start_rig(folder, make_model(folder), decode_settings={}, **shared) as rig:
        yield Stage(rig, await record(rig))


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("first", range(1000, 1000 + NUM_SEEDS, BATCH))
async def test_schedules_in_a_shared_pool(shared_stage: Stage, first: int) -> None:
    reports = []
    for seed in range(first, first + BATCH):
        reports.append(await play(shared_stage.rig, schedule(seed), shared_stage.references))
        print(reports[-1])
    bad = [report for report in reports if report.faults]
    assert not bad, "\n".join([*map(str, bad), shared_stage.rig.logs()])
    # No blocks travel, so that what strikes them on their way meets nobody.
    assert sum(report.struck for report in reports) > BATCH // 3
    await shared_stage.rig.wait_ready(*WORKERS)
    assert not await shared_stage.rig.what_is_left()
    status = await shared_stage.rig.status()
    assert status is not None
    assert {link.transport for worker in status.workers for link in worker.links} == {"pool"}
