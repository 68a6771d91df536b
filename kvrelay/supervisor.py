"""`kvrelay up`: a whole cluster on one machine, whose processes are restarted when they die and die with it."""

import asyncio
import contextlib
import ctypes
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from kvrelay.client import AsyncClient
from kvrelay.config import dump_toml, without_settings
from kvrelay.control.private_redis import PrivateRedis
from kvrelay.engine.checkpoint import model_name
from kvrelay.errors import ConfigurationError, KvrelayError
from kvrelay.request import WorkerState
from kvrelay.settings import AUTO, Settings
from kvrelay.shared_pool import make_pool_file

__all__ = ["Supervisor", "run_directory"]

log = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.5
LAST_BACKOFF_SECONDS = 8.0
STABLE_SECONDS = 30.0
CHECK_SECONDS = 0.1
CONFIGURATION_ERROR = 2
_COMPLAINT = "kvrelay: "

Report = Callable[[str], None]


@contextlib.contextmanager
def run_directory(name: str) -> Iterator[Path]:
    """The folder for sockets, logs and the key; a temporary one, removed at the end, if no name is given."""
    path = Path(name or tempfile.mkdtemp(prefix="kvrelay-")).absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        (path / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"run directory {path}: {error.strerror}") from error
    try:
        yield path
    finally:
        if not name:
            shutil.rmtree(path, ignore_errors=True)


def die_with_parent() -> None:
    """In a new process: the kernel kills it when its parent dies. Elsewhere than on Linux it does nothing."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@dataclass(slots=True)
class _Child:
    """One process of the cluster, under all of its process ids."""

    name: str
    arguments: Sequence[str]
    log_path: Path
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    backoff: float = FIRST_BACKOFF_SECONDS
    restart_at: float = 0.0

    def start(self) -> None:
        with self.log_path.open("ab") as stream:
            self.process = _spawn([sys.executable, "-m", "kvrelay", *self.arguments], stream)
        self.started_at = time.monotonic()

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return None if self.process is None else self.process.poll()

    @property
    def restarted(self) -> bool:
        return self.restart_at > 0.0

    def signal(self, number: int) -> None:
        if self.alive and self.process is not None:
            self.process.send_signal(number)

    def last_words(self) -> str:
        """What the command line said last in the log, which is why the process ended."""
        words = self.log_path.read_text(errors="replace").rpartition(f"\n{_COMPLAINT}")[2]
        return words.removeprefix(_COMPLAINT).strip() or "no log"


def _spawn(command: Sequence[str], stream: BinaryIO) -> "subprocess.Popen[bytes]":
    environment = {"GRPC_VERBOSITY": "NONE", **without_settings(os.environ), "PYTHONUNBUFFERED": "1"}
    # A session of its own keeps Ctrl-C from reaching it before the supervisor has decided on the order of the end.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=stream,
        env=environment,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


class Supervisor:
    """Starts Redis, a gateway and the workers, and keeps them alive until it is told to stop.

    Args:
        report: takes a line for the user.
    """

    def __init__(self, settings: Settings, run_dir: Path, report: Report) -> None:
        self._run_dir = run_dir
        self._report = report
        self._redis = None if settings.cluster.redis else PrivateRedis(run_dir / "redis", preexec_fn=die_with_parent)
        # Held open here: what workers leave in it is there for those that are started anew, and goes with this process.
        self._pool_fd = make_pool_file() if settings.engine.shared_pool == AUTO else None
        self._settings = self._resolve(settings)
        self._children: list[_Child] = []

    async def run(self, stopping: asyncio.Event) -> int:
        """Until `stopping` is set. Answers the exit code.

        Raises:
            ConfigurationError: a process could not be started with these settings.
        """
        try:
            self._start()
            watch = asyncio.create_task(self._watch(stopping))
            ready = asyncio.create_task(self._announce_when_ready())
            try:
                await watch
            finally:
                ready.cancel()
                await asyncio.wait([ready])
        finally:
            await asyncio.to_thread(self._stop)
        return 0

    def _resolve(self, settings: Settings) -> Settings:
        """The settings that all children share: nothing is left to each of them to find out."""
        cluster, gateway, engine = settings.cluster, settings.gateway, settings.engine
        num_workers = cluster.prefill + cluster.decode
        return replace(
            settings,
            cluster=replace(
                cluster,
                redis=self._redis.url if self._redis else cluster.redis,
                run_dir=str(self._run_dir),
                key_file=cluster.key_file or str(self._run_dir / "cluster.key"),
            ),
            gateway=replace(gateway, port=gateway.port or _free_port(cluster.host)),
            # Two processes cannot have one name or one port.
            worker=replace(settings.worker, worker_id="", worker_port=0, advertise_port=0),
            engine=replace(
                engine,
                threads=engine.threads or _threads_each(num_workers),
                shared_pool=engine.shared_pool if self._pool_fd is None else f"/proc/{os.getpid()}/fd/{self._pool_fd}",
            ),
        )

    def _start(self) -> None:
        if self._redis is not None:
            self._redis.start()
        config = self._run_dir / "settings.toml"
        config.write_text(dump_toml(self._settings))
        num_prefill, num_decode = self._num_workers()
        names = [("prefill", index) for index in range(num_prefill)]
        names += [("decode", index) for index in range(num_decode)]
        self._add("gateway", ["gateway", "--config", str(config)])
        for rank, (role, index) in enumerate(names):
            name = f"{role}-{index}"
            place = ["--local-rank", str(rank), "--local-size", str(len(names))]
            self._add(name, [role, "--config", str(config), "--worker-id", name, *place])
        for child in self._children:
            child.start()
        redis = "Redis, " if self._redis is not None else ""
        workers = f"{num_prefill} prefill and {num_decode} decode workers"
        self._report(f"starting {redis}a gateway, {workers}; logs are in {self._run_dir}/logs")

    def _num_workers(self) -> tuple[int, int]:
        """Prefill and decode workers. Where prompts are never moved all are decode workers, on the same machines."""
        cluster = self._settings.cluster
        if self._settings.gateway.disaggregation == "never":
            return 0, cluster.prefill + cluster.decode
        return cluster.prefill, cluster.decode

    def _add(self, name: str, arguments: Sequence[str]) -> None:
        self._children.append(_Child(name, arguments, self._run_dir / "logs" / f"{name}.log"))

    async def _watch(self, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            if self._redis is not None and not self._redis.alive:
                self._report("Redis died; starting it again")
                self._redis.start()  # on this thread, with whose end the kernel would end it
            for child in self._children:
                self._look_after(child)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), CHECK_SECONDS)

    def _look_after(self, child: _Child) -> None:
        now = time.monotonic()
        if child.alive:
            if now - child.started_at > STABLE_SECONDS:
                child.backoff = FIRST_BACKOFF_SECONDS
            return
        if child.exit_code == CONFIGURATION_ERROR and not child.restarted:
            for other in self._children:
                other.signal(signal.SIGKILL)  # rather than let it read a large model to its end
            raise ConfigurationError(child.last_words())
        if child.restart_at <= child.started_at:
            if child.exit_code == 0:  # somebody asked it to drain
                child.restart_at = now
                self._report(f"{child.name} has drained and starts anew")
                return
            child.restart_at = now + child.backoff
            self._report(f"{child.name} ended ({_cause(child.exit_code)}); again in {child.backoff:.1f} s")
            child.backoff = min(2 * child.backoff, LAST_BACKOFF_SECONDS)
        elif now >= child.restart_at:
            child.start()

    async def _announce_when_ready(self) -> None:
        started = time.monotonic()
        cluster = self._settings.cluster
        target = cluster.address(self._settings.gateway.port)
        async with AsyncClient(target, timeout=2.0) as client:
            ready = False
            while not ready:
                await asyncio.sleep(CHECK_SECONDS)
                ready = await _all_ready(client, cluster.prefill + cluster.decode)
        name = model_name(self._settings.engine)
        self._report(f"ready after {time.monotonic() - started:.1f} s: {target} serves {name}")
        option = "" if target == "127.0.0.1:50051" else f" --target {target}"
        self._report(f'try in another terminal: kvrelay generate "Once upon a time"{option}')
        self._report(f"and: kvrelay status{option}; Ctrl-C here ends the cluster")

    def _stop(self) -> None:
        """The gateway first, so that its requests end while the workers are there."""
        patience = self._settings.worker.drain_seconds + 10.0
        for group in ([c for c in self._children if c.name == "gateway"], self._children):
            for child in group:
                child.signal(signal.SIGTERM)
            deadline = time.monotonic() + patience
            for child in group:
                _await_end(child, deadline)
        if self._redis is not None:
            self._redis.stop()
        if self._pool_fd is not None:
            os.close(self._pool_fd)


def _free_port(host: str) -> int:
    """One that was free a moment ago, for `up` must know where the gateway will be."""
    try:
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            port: int = probe.getsockname()[1]
    except OSError as error:
        raise ConfigurationError(f"--host {host}: cannot listen here: {error.strerror}") from error
    return port


async def _all_ready(client: AsyncClient, num_workers: int) -> bool:
    try:
        status = await client.status()
    except KvrelayError:
        return False
    return sum(worker.state is WorkerState.READY for worker in status.workers) >= num_workers


def _await_end(child: _Child, deadline: float) -> None:
    if child.process is None:
        return
    try:
        child.process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        log.warning("%s does not end; killing it", child.name)
        child.process.kill()
        child.process.wait()


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def _threads_each(num_workers: int) -> int:
    """Twice a worker's share of the cores: prefill and decode are seldom busy at once, and idle threads are free."""
    cores = os.cpu_count() or 1
    return max(1, min(cores, 2 * cores // num_workers))
