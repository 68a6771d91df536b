"""What the fault tests share: one rig for all schedules, and what their requests bring without faults."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.checkpoints import make_checkpoint
from tests.faults.play import References, record
from tests.faults.rig import MAX_CONTEXT, SETTINGS, Rig, start_rig


@dataclass(frozen=True)
class Stage:
    rig: Rig
    references: References


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    folder = tmp_path_factory.mktemp("faults")
    model = make_checkpoint(folder / "model", "llama", num_hidden_layers=1, max_position_embeddings=MAX_CONTEXT)
    async with start_rig(folder, model, **SETTINGS) as rig:
        yield Stage(rig, await record(rig))
