"""What goes with the setting `shared_pool`, and what does not."""

import argparse
import os
from dataclasses import replace

import pytest
import torch

from kvrelay import config
from kvrelay.engine.kv_cache import KvCache, join_shared_pool
from kvrelay.errors import ConfigurationError
from kvrelay.settings import EngineSettings, Settings, TransferSettings
from kvrelay.shared_pool import check_shared_pool, make_pool_file
from tests.unit.shared_pools import LAYOUT

CPU = torch.device("cpu")


def settings(shared_pool: str, transport: str) -> Settings:
    return Settings(engine=EngineSettings(shared_pool=shared_pool), transfer=TransferSettings(transport=transport))


def test_the_flag_may_stand_alone() -> None:
    parser = argparse.ArgumentParser()
    config.add_flags(parser, ["engine"])
    for arguments, path in (([], ""), (["--shared-pool"], "auto"), (["--shared-pool", "/a/file"], "/a/file")):
        assert config.load(vars(parser.parse_args(arguments)), {}).engine.shared_pool == path
    assert config.load({}, {"KVRELAY_SHARED_POOL": "/a/file"}).engine.shared_pool == "/a/file"


@pytest.mark.parametrize(("path", "transport"), [("", "auto"), ("", "grpc"), ("/a/file", "auto"), ("/a/file", "pool")])
def test_what_goes_together(path: str, transport: str) -> None:
    check_shared_pool(settings(path, transport))


@pytest.mark.parametrize(
    ("path", "transport", "message"),
    [
        ("auto", "auto", "shared_pool: a single worker needs the name of the file"),
        ("/a/file", "shm", "transport: shm moves blocks"),
        ("/a/file", "grpc", "transport: grpc moves blocks"),
        ("", "pool", "transport: pool is for workers that share a pool"),
    ],
)
def test_what_does_not_go_together(path: str, transport: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_shared_pool(settings(path, transport))


def test_only_workers_on_a_cpu_share_a_pool() -> None:
    wanted = EngineSettings(shared_pool="/nowhere/pool", num_blocks=8)
    with pytest.raises(ConfigurationError, match="only workers on a CPU"):
        join_shared_pool(wanted, LAYOUT, torch.device("cuda"))
    assert join_shared_pool(replace(wanted, shared_pool=""), LAYOUT, CPU) is None


def test_caches_over_one_file_hold_the_same_blocks() -> None:
    """The file has no name, and is gone with the last who has it open."""
    fd = make_pool_file()
    wanted = EngineSettings(shared_pool=f"/proc/{os.getpid()}/fd/{fd}", num_blocks=8)
    one, other = (KvCache(LAYOUT, 8, CPU, join_shared_pool(wanted, LAYOUT, CPU)) for _ in range(2))
    os.close(fd)
    one.tensor[3] = 7.0
    assert (other.tensor[3] == 7.0).all()
    assert not other.tensor[[0, 1, 2, 4, 5, 6, 7]].any()
    assert bytes(other.block_view(3, 1)) == bytes(one.read_blocks([3]))
    one.write_header(epoch=5)
    assert one.shared is not None
    assert one.shared.memory[:16].startswith(b"kvrelay shared"), "whose header is not a worker's"
    assert (one.fd, one.size) == (None, 0), "nobody else is to open it as this worker's own"
    for cache in (one, other):
        cache.close()


def test_a_pool_that_does_not_fit_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvrelay.engine.kv_cache._available_memory", lambda: 1000)
    fd = make_pool_file()
    wanted = EngineSettings(shared_pool=f"/proc/{os.getpid()}/fd/{fd}", num_blocks=8)
    with pytest.raises(ConfigurationError, match="kv_cache_memory"):
        join_shared_pool(wanted, LAYOUT, CPU)
    os.close(fd)
