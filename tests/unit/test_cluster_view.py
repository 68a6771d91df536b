"""What the cluster's status makes of workers that do not answer."""

import asyncio
from typing import Any, cast

import pytest

from gateway.fleet import Connection
from gateway.status import _ask
from tests.patience import SOON


class Leaving:
    """A connection that is closed while it is asked: gRPC cancels its calls."""

    async def status(self, timeout: float) -> Any:
        raise asyncio.CancelledError


class Silent:
    async def status(self, timeout: float) -> Any:
        await asyncio.Event().wait()


async def test_a_worker_that_leaves_while_it_is_asked_has_not_answered() -> None:
    assert await _ask(cast(Connection, Leaving())) is None


async def test_who_asks_can_be_cancelled() -> None:
    asking = asyncio.create_task(_ask(cast(Connection, Silent())))
    await asyncio.sleep(0)
    asking.cancel()
    async with asyncio.timeout(SOON):
        with pytest.raises(asyncio.CancelledError):
            await asking
