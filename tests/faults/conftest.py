"""What the fault tests of a module share: one rig for all of them, and what their requests bring without faults.

A rig ends with its module, because only the module's event loop looks after it.
"""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.faults.play import References, record
from tests.faults.rig import Rig, start_rig


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    async with start_rig(tmp_path_factory.mktemp("faults")) as rig:
        yield rig


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def references(rig: Rig) -> References:
    return await record(rig)
