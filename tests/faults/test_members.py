"""A process of the rig that was killed or stopped is back after its time, and not before."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from tests.faults.process import RedisServer
from tests.patience import eventually

SECONDS = 10


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    try:
        yield server
    finally:
        server.end()


def keys(server: RedisServer) -> list[bytes]:
    with Redis(unix_socket_path=str(server.socket), socket_timeout=SECONDS) as redis:
        found: list[bytes] = redis.keys()
        return found


def fill(server: RedisServer) -> None:
    with Redis(unix_socket_path=str(server.socket)) as redis:
        redis.set("key", "value")
    assert keys(server) == [b"key"]


def test_a_killed_one_is_there_again_and_empty(server: RedisServer) -> None:
    fill(server)
    pid = server.pid
    server.signal(signal.SIGKILL)
    eventually(lambda: not server.alive, SECONDS, "it is dead")
    server.look_after()
    assert server.pid != pid
    assert keys(server) == []


def test_a_killed_one_stays_away_for_its_time(server: RedisServer) -> None:
    server.away_seconds = 60.0
    server.signal(signal.SIGKILL)
    eventually(lambda: not server.alive, SECONDS, "it is dead")
    server.look_after()
    server.look_after()
    assert not server.alive
    server.away_seconds = 0.0
    server.look_after()
    assert server.alive


def test_a_stopped_one_goes_on_with_what_it_had(server: RedisServer) -> None:
    fill(server)
    server.away_seconds = 60.0
    server.signal(signal.SIGSTOP)
    eventually(lambda: server.frozen, SECONDS, "it is stopped")
    server.look_after()
    assert server.frozen
    server.away_seconds = 0.0
    server.look_after()
    eventually(lambda: not server.frozen, SECONDS, "it goes on")
    assert keys(server) == [b"key"]


def test_a_wiped_one_runs_on(server: RedisServer) -> None:
    fill(server)
    pid = server.pid
    server.wipe()
    assert keys(server) == []
    assert server.pid == pid


def test_a_stopped_one_can_be_ended(server: RedisServer) -> None:
    server.signal(signal.SIGSTOP)
    eventually(lambda: server.frozen, SECONDS, "it is stopped")
    server.end()
    assert not server.alive
