"""Requests given up at random moments leave nothing behind; `scripts/faults --cancels 10000` gives more of them up."""

import pytest

from tests.faults.cancels import WAYS, cancel_many
from tests.faults.rig import WORKERS, Rig

NUM_CANCELS = 500


@pytest.mark.asyncio(loop_scope="module")
async def test_pools_are_whole_after_random_cancels(rig: Rig) -> None:
    await rig.wait_ready(*WORKERS)
    report = await cancel_many(rig, NUM_CANCELS, seed=0)
    print(report)
    assert not report.violations, f"{report}\n{rig.logs()}"
    assert report.num_given_up >= NUM_CANCELS
    assert all(report.ends[way] > NUM_CANCELS // 10 for way in WAYS)
