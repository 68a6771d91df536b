"""The processes of a cluster as the kernel sees them, whatever the cluster itself says."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

__all__ = [
    "clean_environment",
    "descendants",
    "is_alive",
    "kvrelay",
    "private_redis",
    "silent",
    "worker_process",
]


def command_line(pid: int) -> str:
    """Empty for a process that is not there, or is dead and not waited for."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    return bool(command_line(pid))


def descendants(pid: int) -> list[int]:
    """The children of a process, theirs, and so on."""
    children = [child for child in _processes() if _parent(child) == pid]
    return children + [grandchild for child in children for grandchild in descendants(child)]


def worker_process(run_dir: Path, worker_id: str) -> int | None:
    """The process of a worker from its very start on; None while there is none."""
    wanted = f"--config {run_dir}/settings.toml --worker-id {worker_id} "
    return next((pid for pid in _processes() if wanted in command_line(pid)), None)


def private_redis(run_dir: Path) -> int | None:
    """The process of the cluster's own Redis; None while there is none."""
    return next(
        (pid for pid in _processes() if command_line(pid).strip().endswith(f"unixsocket:{run_dir}/redis/redis.sock")),
        None,
    )


@contextlib.contextmanager
def silent(*pids: int) -> Iterator[None]:
    """The processes do nothing inside, so what has come to them cannot end. Killed ones stay dead.

    To be left within a second, after which others take them for lost.
    """
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without kvrelay's own variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KVRELAY_")} | more


def kvrelay(
    *arguments: object, stdin: str = "", environment: Mapping[str, str] | None = None, seconds: float = 60.0
) -> "subprocess.CompletedProcess[str]":
    """Runs a command of the command line to its end."""
    command: Sequence[str] = [sys.executable, "-m", "kvrelay", *map(str, arguments)]
    variables = clean_environment(**(environment or {}))
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=variables, timeout=seconds)


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
