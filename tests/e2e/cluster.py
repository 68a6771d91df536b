"""A real cluster for a test: `kvrelay up` as a user would start it, in a folder and on a port of its own."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from kvrelay import Client
from kvrelay.errors import KvrelayError
from kvrelay.request import ClusterStatus, QueueStatus, WorkerState, WorkerStatus
from tests.e2e.processes import clean_environment
from tests.patience import eventually
from tests.ports import free_port

__all__ = ["Cluster", "start_cluster", "what_is_left"]

START_SECONDS = 120.0
STOP_SECONDS = 60.0


def what_is_left(workers: Iterable[WorkerStatus], queue: QueueStatus) -> list[str]:
    """What these workers still do and hold, and what still queues; empty if nothing runs and their pools are whole."""
    left = [
        f"{worker.id}: {worker.running} running, {worker.waiting} waiting, {worker.blocks_held} blocks held, "
        f"{worker.blocks_free} of {worker.blocks_total} free"
        for worker in workers
        if any((worker.running, worker.waiting, worker.blocks_held, worker.blocks_total - worker.blocks_free))
    ]
    return [*left, f"queue: {queue}"] if queue.running or queue.waiting else left


class Cluster:
    """A running `kvrelay up`."""

    def __init__(self, run_dir: Path, port: int, process: "subprocess.Popen[str]", num_workers: int) -> None:
        self.run_dir = run_dir
        self.target = f"127.0.0.1:{port}"
        self.process = process
        self.num_workers = num_workers

    def client(self, timeout: float = 120.0) -> Client:
        return Client(self.target, timeout=timeout)

    def status(self) -> ClusterStatus:
        with self.client(10.0) as client:
            return client.status()

    def pid(self, worker_id: str) -> int:
        return next(worker.pid for worker in self.status().workers if worker.id == worker_id)

    def kill(self, worker_id: str, number: int = signal.SIGKILL) -> int:
        """Sends a signal to a worker; answers its process id."""
        pid = self.pid(worker_id)
        os.kill(pid, number)
        return pid

    def is_ready(self) -> bool:
        try:
            status = self.status()
        except KvrelayError:
            return False
        return sum(worker.state is WorkerState.READY for worker in status.workers) == self.num_workers

    def is_whole(self) -> bool:
        """Nothing runs, and every pool is whole."""
        return not self.what_is_left()

    def what_is_left(self) -> list[str]:
        status = self.status()
        return what_is_left(status.workers, status.queue)

    def wait_ready(self) -> None:
        eventually(lambda: self.process.poll() is not None or self.is_ready(), START_SECONDS, "cluster ready")
        if self.process.poll() is not None:
            raise AssertionError(f"`kvrelay up` ended with {self.process.returncode}\n{self.logs()}")

    def wait_whole(self, seconds: float = 10.0) -> None:
        eventually(self.is_whole, seconds, lambda: f"all pools whole; left: {self.what_is_left()}")

    def logs(self) -> str:
        """The end of each process's log."""
        texts = []
        for path in sorted((self.run_dir / "logs").glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-15:]
            texts.append("\n".join([f"--- {path.name}", *tail]))
        return "\n".join(texts)

    def stop(self) -> int:
        """SIGTERM, as an operator would; answers the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


@contextlib.contextmanager
def start_cluster(
    run_dir: Path,
    model: Path | str,
    *,
    prefill: int = 1,
    decode: int = 1,
    environment: Mapping[str, str] | None = None,
    **settings: object,
) -> Iterator[Cluster]:
    """Starts a cluster and waits until it is ready; ends all of it, whatever happens.

    Args:
        environment: variables that `up` gets besides this process's own, of which those of kvrelay are left out.
        settings: more settings by their names in `kvrelay.settings`. All prompts go to the prefill workers unless these
            say otherwise, so that every test knows who computes what.
    """
    port = free_port()
    flags: dict[str, object] = {
        "model": model,
        "prefill": prefill,
        "decode": decode,
        "port": port,
        "run_dir": run_dir,
        "disaggregation": "always",
        **settings,
    }
    arguments = [text for name, value in flags.items() for text in _flag(name, value)]
    variables = clean_environment(**(environment or {}))
    with (run_dir.parent / f"{run_dir.name}.up.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvrelay", "up", *arguments], stdout=log, stderr=log, text=True, env=variables
        )
    cluster = Cluster(run_dir, port, process, prefill + decode)
    try:
        cluster.wait_ready()
        yield cluster
        assert cluster.stop() == 0, cluster.logs()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _flag(name: str, value: object) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag.removeprefix("--")]
    return [flag, str(value)]
