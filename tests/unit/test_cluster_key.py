import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvrelay.control.cluster_key import load_cluster_key
from kvrelay.errors import ConfigurationError

LOAD = "import sys, pathlib; from kvrelay.control.cluster_key import load_cluster_key as load; sys.stdin.readline(); "
LOAD += "print(load(pathlib.Path(sys.argv[1])).hex())"


def test_the_first_makes_the_key_and_the_others_read_it(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    key = load_cluster_key(path)
    assert len(key) == 32
    assert load_cluster_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["cluster.key"]
    assert load_cluster_key(tmp_path / "another.key") != key


def test_many_at_once_agree_on_one(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    command = [sys.executable, "-c", LOAD, str(path)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    keys = {process.communicate(timeout=30)[0].strip() for process in processes}
    assert keys == {path.read_text().strip()}
    assert os.listdir(tmp_path) == ["cluster.key"]


def test_containers_that_share_a_folder_have_equal_process_ids(tmp_path: Path) -> None:
    """What one of them left when it was killed is in nobody's way."""
    (tmp_path / f"cluster.key.{os.getpid()}").touch()
    assert len(load_cluster_key(tmp_path / "cluster.key")) == 32


@pytest.mark.parametrize(
    ("content", "problem"),
    [("", "0 bytes are too short"), ("ab" * 15, "15 bytes are too short; at least 16"), ("key", "not hexadecimal")],
)
def test_what_is_no_key(content: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=f"{path}: {problem}"):
        load_cluster_key(path)


def test_a_key_of_sixteen_bytes_is_enough(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("ab" * 16 + "\n")
    assert load_cluster_key(tmp_path / "key") == b"\xab" * 16


def test_places_where_no_key_can_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no/key: No such file or directory"):
        load_cluster_key(tmp_path / "no" / "key")
    with pytest.raises(ConfigurationError, match="Is a directory"):
        load_cluster_key(tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(os.urandom(32) + b"\xff")
    with pytest.raises(ConfigurationError, match="not hexadecimal"):
        load_cluster_key(tmp_path / "key")
