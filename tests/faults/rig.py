"""A cluster of real processes in which everything can go wrong.

Every link runs through a proxy, every worker has a file of failpoints; who dies is started again while others go on.
"""

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvrelay.client import AsyncClient
from kvrelay.control.private_redis import PrivateRedis
from kvrelay.errors import KvrelayError
from kvrelay.failpoints import VARIABLE
from kvrelay.request import ClusterStatus, WorkerState
from tests.e2e.cluster import free_port
from tests.e2e.processes import clean_environment
from tests.faults.proxy import Link, Proxy
from tests.faults.spans import SpanCollector

__all__ = ["GATEWAY", "SETTINGS", "WORKERS", "Process", "Rig", "start_rig"]

GATEWAY = "gateway"
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
START_SECONDS = 120.0
# A function to run in the child would need a fork, which may hang where gRPC has threads.
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
POLL_SECONDS = 0.1
# Many small blocks, chunks and steps, so that a fault has many moments to strike; leases end soon after a lost Release.
SETTINGS = {
    "block_size": 4,
    "num_blocks": 512,
    "max_batched_tokens": 16,
    "threads": 1,
    "lease_seconds": 2.0,
    "drain_seconds": 5.0,
}


@dataclass(eq=False)
class Process:
    """One process of the cluster, under all of its process ids."""

    name: str
    arguments: list[str]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    popen: "subprocess.Popen[bytes] | None" = None
    num_starts: int = 0
    frozen_since: float | None = None

    @property
    def failpoints(self) -> Path:
        return self.folder / f"{self.name}.failpoints"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int:
        return 0 if self.popen is None else self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    @property
    def frozen(self) -> bool:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        return False

    def start(self, place: Callable[..., list[str]] = lambda *command: list(command)) -> None:
        """Starts it; `place` makes the command that runs a command where it belongs."""
        self.arm("")  # else the next start would meet what ended this one
        self.num_starts += 1
        environment = clean_environment(
            **{VARIABLE: f"@{self.failpoints}", "GRPC_VERBOSITY": "NONE"}, **self.environment
        )
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [*DIE_WITH_PARENT, *place(sys.executable, "-m", "kvrelay", *self.arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )

    def arm(self, text: str) -> None:
        """Puts failpoints in force, in a running process too."""
        new = self.failpoints.with_suffix(".new")
        new.write_text(text)
        new.replace(self.failpoints)

    def num_fired(self) -> int:
        """Failpoints that have been met since the first start."""
        return self.log.read_bytes().count(b"failpoint ") if self.log.exists() else 0

    def end(self) -> None:
        if self.popen is not None:
            self.popen.kill()
            self.popen.wait()

    def signal(self, number: int) -> None:
        if self.popen is not None and self.alive:
            self.popen.send_signal(number)


@dataclass(eq=False)
class Rig:
    """The cluster and what can be done to it. Belongs to one event loop.

    Attributes:
        freeze_seconds: after which a process that was stopped goes on.
    """

    folder: Path
    redis: PrivateRedis
    client: AsyncClient
    spans: SpanCollector
    processes: dict[str, Process] = field(default_factory=dict)
    worker_proxies: dict[str, Proxy] = field(default_factory=dict)
    redis_proxies: dict[str, Proxy] = field(default_factory=dict)
    freeze_seconds: float = 0.5

    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self.processes.items() if process.alive}

    def link(self, client: str, server: str) -> Link:
        """From a process to a worker, or to "redis"."""
        proxy = self.redis_proxies[client] if server == "redis" else self.worker_proxies[server]
        return proxy.link(client)

    def heal(self) -> None:
        """No fault is left but those that have struck."""
        for proxy in (*self.worker_proxies.values(), *self.redis_proxies.values()):
            for link in proxy.links:
                link.heal()
        for process in self.processes.values():
            process.arm("")

    async def status(self) -> ClusterStatus | None:
        try:
            return await self.client.status()
        except KvrelayError:
            return None

    async def are_ready(self, *names: str) -> bool:
        """Whether these workers, in their last start, can be used."""
        status = await self.status()
        if status is None:
            return False
        ready = {worker.pid for worker in status.workers if worker.state is WorkerState.READY}
        return all(self.processes[name].pid in ready for name in names)

    async def wait_ready(self, *names: str) -> None:
        await self.eventually(lambda: self.are_ready(*names), START_SECONDS, f"{', '.join(names)} ready")

    async def what_is_left(self) -> str:
        """What idle workers still hold, and what still queues; empty if nothing. Workers that start are passed over."""
        status = await self.status()
        if status is None:
            return "the gateway does not answer"
        left = [
            f"{worker.id}: {worker.running} running, {worker.waiting} waiting, {worker.blocks_held} blocks held"
            for worker in status.workers
            if worker.state is WorkerState.READY
            and (worker.running, worker.waiting, worker.blocks_total - worker.blocks_free) != (0, 0, 0)
        ]
        left += [f"held: {entry}" for entry in await self.client.held_blocks()]
        if (status.queue.running, status.queue.waiting) != (0, 0):
            left.append(f"queue: {status.queue}")
        return "; ".join(left)

    async def eventually(self, condition: Callable[[], Awaitable[object]], seconds: float, what: str) -> None:
        """Raises: AssertionError if the condition does not hold in time."""
        deadline = time.monotonic() + seconds
        while not await condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds:g} s: {what}\n{self.logs()}")
            await asyncio.sleep(POLL_SECONDS)

    def logs(self) -> str:
        tails = []
        for process in self.processes.values():
            lines = process.log.read_text(errors="replace").splitlines()[-12:] if process.log.exists() else []
            tails.append("\n".join([f"--- {process.name}", *lines]))
        return "\n".join(tails)

    async def look_after(self) -> None:
        """Starts again who has died, and thaws who has been frozen for long enough; for ever."""
        while True:
            now = time.monotonic()
            for process in self.processes.values():
                if not process.alive:
                    process.start()
                elif not process.frozen:
                    process.frozen_since = None
                elif process.frozen_since is None:
                    process.frozen_since = now
                elif now - process.frozen_since > self.freeze_seconds:
                    process.signal(signal.SIGCONT)
            await asyncio.sleep(POLL_SECONDS)


@contextlib.asynccontextmanager
async def start_rig(folder: Path, model: Path, **settings: object) -> AsyncIterator[Rig]:
    """Two workers of each kind and a gateway; ends all of it, whatever happens.

    Args:
        settings: of the workers, by their names in `kvrelay.config`. Blocks reach decode-0 by gRPC always, unless a
            pool is shared.
    """
    redis = PrivateRedis(folder / "redis")
    redis.start()
    port = free_port()
    async with contextlib.AsyncExitStack() as cleanup:
        cleanup.callback(redis.stop)
        client = await cleanup.enter_async_context(AsyncClient(f"127.0.0.1:{port}", timeout=30.0))
        spans = SpanCollector()
        await spans.start()
        cleanup.push_async_callback(spans.stop)
        rig = Rig(folder, redis, client, spans)
        for name in (GATEWAY, *WORKERS):
            rig.redis_proxies[name] = Proxy(folder / "redis" / "redis.sock", rig.pids)
        ports = {name: free_port() for name in WORKERS}
        for name in WORKERS:
            rig.worker_proxies[name] = Proxy(ports[name], rig.pids)
        for proxy in (*rig.redis_proxies.values(), *rig.worker_proxies.values()):
            await proxy.start()
            cleanup.push_async_callback(proxy.stop)
        shared = {"model": model, "run_dir": folder, **settings}
        gateway = {"port": port, "worker_id": GATEWAY, "redis": _url(rig, GATEWAY), "model": model, "run_dir": folder}
        rig.processes[GATEWAY] = Process(GATEWAY, [GATEWAY, *_flags(gateway)], folder, spans.environment)
        for name in WORKERS:
            own = {
                "worker_id": name,
                "worker_port": ports[name],
                "advertise_port": rig.worker_proxies[name].port,
                "redis": _url(rig, name),
                "transport": "grpc" if name == "decode-0" and "shared_pool" not in settings else "auto",
            }
            rig.processes[name] = Process(name, [name.partition("-")[0], *_flags(shared | own)], folder)
        for process in rig.processes.values():
            process.start()
            cleanup.callback(process.end)
        await rig.wait_ready(*WORKERS)
        keeper = asyncio.create_task(rig.look_after())
        cleanup.callback(keeper.cancel)
        yield rig


def _url(rig: Rig, name: str) -> str:
    return f"redis://127.0.0.1:{rig.redis_proxies[name].port}"


def _flags(settings: dict[str, object]) -> list[str]:
    return [text for name, value in settings.items() for text in ("--" + name.replace("_", "-"), str(value))]
