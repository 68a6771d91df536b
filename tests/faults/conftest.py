"""What the fault tests share: one rig for all schedules, and what their requests bring without faults."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.faults.play import References, record
from tests.faults.rig import SETTINGS, Rig, make_model, start_rig


@dataclass(frozen=True)
class Stage:
    rig: Rig
    references: References


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    folder = tmp_path_factory.mktemp("faults")
    async with start_rig(folder, make_model(folder), **SETTINGS) as rig:
        yield Stage(rig, await record(rig))
