"""The file of a shared pool: who makes it, who may join it, and who is refused."""

import contextlib
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvrelay.engine import pool_file
from kvrelay.engine.kv_layout import KvLayout
from kvrelay.engine.pool_file import PoolFile
from kvrelay.errors import ConfigurationError
from tests.unit.shared_pools import LAYOUT, joined, worker


def join(path: Path, layout: KvLayout = LAYOUT, num_blocks: int = 8) -> PoolFile:
    return PoolFile.join(str(path), layout, num_blocks, lambda num_bytes: None)


def refusal(path: Path, layout: KvLayout = LAYOUT, num_blocks: int = 8) -> str:
    with pytest.raises(ConfigurationError) as refused:
        join(path, layout, num_blocks)
    return str(refused.value)


def test_all_pages_are_there_from_the_start(tmp_path: Path) -> None:
    pool = join(tmp_path / "pool")
    status = os.stat(tmp_path / "pool")
    assert status.st_size == pool.blocks_offset + 8 * LAYOUT.block_bytes == len(pool.memory)
    assert status.st_blocks * 512 >= status.st_size
    assert status.st_mode & 0o777 == 0o600
    pool.close()


def test_who_joins_sees_the_same_blocks_and_nonce(tmp_path: Path) -> None:
    first, second = join(tmp_path / "pool"), join(tmp_path / "pool")
    first.memory[-1] = 42
    assert second.memory[-1] == 42
    assert first.nonce == second.nonce
    assert len(first.nonce) == 16
    assert (first.slot, second.slot) == (0, 1)
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        ({"model_digest": b"\1" * 32}, "has model_digest 0707"),
        ({"dtype": "bfloat16"}, "has dtype float32, not bfloat16"),
        ({"block_size": 8}, "has block_size 4, not 8"),
        ({"num_layers": 2}, "has num_layers 1, not 2"),
        ({"num_kv_heads": 2}, "has num_kv_heads 1, not 2"),
        ({"head_dim": 16}, "has head_dim 8, not 16"),
    ],
)
def test_another_layout_is_refused_by_name(tmp_path: Path, difference: dict[str, Any], text: str) -> None:
    with joined(tmp_path / "pool", 8):
        assert text in refusal(tmp_path / "pool", replace(LAYOUT, **difference))


def test_another_size_is_refused(tmp_path: Path) -> None:
    with joined(tmp_path / "pool", 8):
        assert "has num_blocks 8, not 9" in refusal(tmp_path / "pool", num_blocks=9)


def test_a_file_of_another_boot_or_pid_namespace_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    join(tmp_path / "pool").close()
    monkeypatch.setattr(pool_file, "host_id", lambda: "elsewhere")
    assert "has host" in refusal(tmp_path / "pool")


def test_what_is_no_pool_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear reader")
    assert "no KV pool of this version" in refusal(tmp_path / "letter")
    assert (tmp_path / "letter").read_text() == "dear reader"
    assert "Is a directory" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "nowhere" / "pool")
    os.mkfifo(tmp_path / "pipe")
    assert "not a file of this user" in refusal(tmp_path / "pipe")


def test_a_file_that_was_not_made_to_its_end_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "pool").write_bytes(bytes(4096) + b"\xff" * 10000)
    with joined(tmp_path / "pool", 8) as pool:
        assert pool.num_free == 8


def test_too_little_memory_is_said_before_it_is_taken(tmp_path: Path) -> None:
    def refuse(num_bytes: int) -> None:
        raise ConfigurationError(f"{num_bytes} are too many")

    with pytest.raises(ConfigurationError, match="are too many"):
        PoolFile.join(str(tmp_path / "pool"), LAYOUT, 8, refuse)
    assert os.stat(tmp_path / "pool").st_size == 0


def test_a_place_that_is_too_small_is_an_error_and_no_fault_later() -> None:
    """On a file system of limited size a missing page would be a SIGBUS when it is first touched."""
    fd = os.memfd_create("no room")
    try:
        num_blocks = (1 << 45) // LAYOUT.block_bytes
        assert "shared_pool: " in refusal(Path(f"/proc/self/fd/{fd}"), replace(LAYOUT, head_dim=1 << 32), num_blocks)
    finally:
        os.close(fd)


def test_there_are_as_many_slots_as_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_file, "NUM_SLOTS", 2)
    first, second = join(tmp_path / "pool"), join(tmp_path / "pool")
    assert "2 workers share it already" in refusal(tmp_path / "pool")
    first.close()
    third = join(tmp_path / "pool")
    assert third.slot == 0
    third.close()
    second.close()


def test_who_comes_while_the_file_is_made_waits_for_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as thread:
        other: list[Future[PoolFile]] = []

        def make(num_bytes: int) -> None:
            other.append(thread.submit(join, tmp_path / "pool"))
            wait(other, timeout=0.3)  # which gives it the time to do what it should not

        first = PoolFile.join(str(tmp_path / "pool"), LAYOUT, 8, make)
        second = other[0].result()
    assert (first.slot, second.slot) == (0, 1)
    assert first.nonce == second.nonce
    first.close()
    second.close()


def test_workers_that_start_at_once_make_one_pool(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(3) as threads:
        started = [threads.submit(lambda: stack.enter_context(worker(tmp_path / "pool", 64))) for _ in range(3)]
        workers = [each.result() for each in started]
        assert len({str(each.ask("pool._file.nonce")) for each in workers}) == 1
        assert sorted(str(each.ask("pool._file.slot")) for each in workers) == ["0", "1", "2"]
