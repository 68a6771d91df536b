"""What the kernel knows of a process, and how a benchmark starts and ends its own."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvrelay import Client
from kvrelay.errors import KvrelayError
from kvrelay.request import WorkerState

__all__ = ["REPOSITORY", "cluster", "cpu_seconds", "resident_bytes", "spawn", "wait_until_served"]

REPOSITORY = Path(__file__).resolve().parent.parent
START_SECONDS = 120.0
STOP_SECONDS = 30.0


def cpu_seconds(pid: int) -> float:
    """Seconds of CPU, user and system, that all threads of a process have had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def spawn(module: str, arguments: Sequence[object], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A Python module in a process of its own, ended by SIGTERM; what it prints is appended to the log."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "GRPC_VERBOSITY": "NONE", "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=REPOSITORY, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def cluster(folder: Path, port: int, /, **settings: object) -> Iterator[str]:
    """`kvrelay up` with two workers, both of them ready; answers its target.

    Args:
        folder: of its run directory and its log.
        settings: more settings by their names in `kvrelay.settings`.

    Raises:
        TimeoutError: a worker is not ready in time.
        KvrelayError: no request is served.
    """
    flags = {"port": port, "prefill": 1, "decode": 1, "run_dir": folder / "run", **settings}
    words = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), value)]
    target = f"127.0.0.1:{port}"
    with spawn("kvrelay", ["up", *words], folder / "up.log"):
        wait_until_served(target, START_SECONDS)
        _wait_until_ready(target, 2, START_SECONDS)
        yield target


def _wait_until_ready(target: str, num_workers: int, seconds: float) -> None:
    # A request may be served while a worker that it does not need still loads its model.
    deadline = time.monotonic() + seconds
    with Client(target) as client:
        while sum(worker.state is WorkerState.READY for worker in client.status().workers) < num_workers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {seconds:g} s not all of {num_workers} workers are ready")
            time.sleep(0.1)


def wait_until_served(target: str, seconds: float) -> None:
    """Until a request gets its tokens.

    Raises:
        KvrelayError: none did in time.
    """
    deadline = time.monotonic() + seconds
    with Client(target, timeout=seconds) as client:
        while True:
            try:
                client.complete(token_ids=[5, 6, 7], max_tokens=2)
                return
            except KvrelayError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
