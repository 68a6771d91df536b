"""A cluster of real processes in which everything can go wrong.

Every link runs through a proxy, every kvrelay process has a file of failpoints; who dies is started again while others
go on. Three gateways share the workers, so that each schedule can have prompts computed where it wants.
"""

import asyncio
import contextlib
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvrelay.client import AsyncClient
from kvrelay.errors import KvrelayError
from kvrelay.request import ClusterStatus, WorkerState, WorkerStatus
from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import what_is_left
from tests.faults.process import Member, Process, RedisServer
from tests.faults.proxy import Link, Proxy
from tests.faults.spans import SpanCollector
from tests.patience import until
from tests.ports import free_port

__all__ = [
    "DECODE",
    "GATEWAY",
    "GATEWAYS",
    "PREFILL",
    "REDIS",
    "WORKERS",
    "Rig",
    "start_rig",
]

# By what they do with prompts.
GATEWAYS = ("gateway-always", "gateway-auto", "gateway-never")
GATEWAY = GATEWAYS[0]  # that is asked if nothing else is said
PREFILL, DECODE = ("prefill-0", "prefill-1"), ("decode-0", "decode-1")
WORKERS = PREFILL + DECODE
REDIS = "redis"
START_SECONDS = 120.0
WHOLE_SECONDS = 20.0
POLL_SECONDS = 0.1
# Killed, asked to end, or not begun because Redis was away.
EXPLAINED_CODES = (-signal.SIGKILL, 0, 2)
# Many small blocks, chunks and steps, so that a fault has many moments to strike; leases end soon after a lost Release.
SETTINGS: dict[str, Any] = {
    "block_size": 4,
    "num_blocks": 512,
    "max_batched_tokens": 16,
    "threads": 1,
    "lease_seconds": 2.0,
    "drain_seconds": 5.0,
}
# What each decode worker has of its own. Blocks are few enough that those of a wide prompt are taken late, and that
# sequences are evicted now and then. Bytes may flip on the way to the first worker, which looks at each block.
DECODE_SETTINGS: dict[str, dict[str, Any]] = {
    "decode-0": {"num_blocks": 256, "transport": "grpc", "checksum": "full"},
    "decode-1": {"num_blocks": 256, "transport": "auto", "checksum": "sampled"},
}
MAX_CONTEXT = 1024  # takes the longest of requests


@dataclass(eq=False)
class Rig:
    """The cluster and what can be done to it. Belongs to one event loop.

    Attributes:
        shares_pool: all workers have one pool; else each has its own.
        gateway: through which everything is asked.
    """

    folder: Path
    redis: RedisServer
    spans: SpanCollector
    shares_pool: bool
    clients: dict[str, AsyncClient] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)
    worker_proxies: dict[str, Proxy] = field(default_factory=dict)
    redis_proxies: dict[str, Proxy] = field(default_factory=dict)
    gateway: str = GATEWAY
    _num_seen_ends: Counter[str] = field(default_factory=Counter)

    @property
    def client(self) -> AsyncClient:
        return self.clients[self.gateway]

    @contextlib.contextmanager
    def asking(self, gateway: str) -> Iterator[None]:
        """Inside, everything goes through this gateway."""
        before, self.gateway = self.gateway, gateway
        try:
            yield
        finally:
            self.gateway = before

    def member(self, name: str) -> Member:
        """A process by its name, "redis" among them."""
        return self.redis if name == REDIS else self.processes[name]

    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self.processes.items() if process.alive}

    def link(self, client: str, server: str) -> Link:
        """From a process to a worker, or to "redis"."""
        proxy = self.redis_proxies[client] if server == REDIS else self.worker_proxies[server]
        return proxy.link(client)

    def met(self) -> Counter[str]:
        """Failpoints that have been met since the start, and how often."""
        return sum((process.met() for process in self.processes.values()), Counter[str]())

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

    async def workers(self) -> dict[str, WorkerStatus]:
        """Raises: KvrelayError if the gateway does not answer."""
        return {worker.id: worker for worker in (await self.client.status()).workers}

    async def are_ready(self, *names: str) -> bool:
        """Whether these workers, in their last start, can be used."""
        status = await self.status()
        if status is None:
            return False
        ready = {worker.pid for worker in status.workers if worker.state is WorkerState.READY}
        return all(self.processes[name].pid in ready for name in names)

    async def wait_ready(self, *names: str) -> None:
        await self.eventually(lambda: self.are_ready(*names), START_SECONDS, f"{', '.join(names)} ready")

    async def wait_whole(self) -> None:
        async def is_whole() -> bool:
            return not await self.what_is_left()

        await self.eventually(is_whole, WHOLE_SECONDS, "all pools whole")

    async def what_is_left(self) -> str:
        """What idle workers still hold, and what still queues; empty if nothing. Workers that start are passed over."""
        status = await self.status()
        if status is None:
            return f"{self.gateway} does not answer"
        ready = (worker for worker in status.workers if worker.state is WorkerState.READY)
        left = what_is_left(ready, status.queue)
        try:
            left += [f"held: {entry}" for entry in await self.client.held_blocks()]
        except KvrelayError:
            return f"{self.gateway} does not answer"
        return "; ".join(left)

    def unexplained_ends(self) -> list[tuple[str, int]]:
        """Who neither was killed, nor asked to end, nor could not begin, since this was last asked; with exit codes."""
        found = []
        for name, process in self.processes.items():
            first, self._num_seen_ends[name] = self._num_seen_ends[name], len(process.exit_codes)
            found += [(name, code) for code in process.exit_codes[first:] if code not in EXPLAINED_CODES]
        return found

    async def eventually(self, condition: Callable[[], Awaitable[object]], seconds: float, what: str) -> None:
        """Raises: AssertionError if the condition does not hold in time."""
        await until(condition, seconds, lambda: f"{what}\n{self.logs()}", pause=POLL_SECONDS)

    def logs(self) -> str:
        tails = []
        for process in self.processes.values():
            lines = process.log.read_text(errors="replace").splitlines()[-12:] if process.log.exists() else []
            tails.append("\n".join([f"--- {process.name}", *lines]))
        return "\n".join(tails)

    async def look_after(self) -> None:
        """Starts again who has ended, and thaws who has been frozen for long enough; for ever."""
        while True:
            for member in (self.redis, *self.processes.values()):
                member.look_after()
            await asyncio.sleep(POLL_SECONDS)


@contextlib.asynccontextmanager
async def start_rig(folder: Path, *, shares_pool: bool = False, **more: Any) -> AsyncIterator[Rig]:
    """Two workers of each kind and three gateways; ends all of it, whatever happens.

    Args:
        more: settings of all workers, by their names in `kvrelay.settings`.
    """
    model = make_checkpoint(folder / "model", "llama", num_hidden_layers=1, max_position_embeddings=MAX_CONTEXT)
    async with contextlib.AsyncExitStack() as cleanup:
        rig = Rig(folder, RedisServer(folder / "redis"), SpanCollector(), shares_pool)
        cleanup.callback(rig.redis.end)
        rig.redis.start()
        rig.spans.start()
        cleanup.callback(rig.spans.stop)
        ports = _free_ports((*GATEWAYS, *WORKERS))
        for name in GATEWAYS:
            client = AsyncClient(f"127.0.0.1:{ports[name]}", timeout=30.0)
            rig.clients[name] = await cleanup.enter_async_context(client)
        rig.redis_proxies = {name: Proxy(rig.redis.socket, rig.pids) for name in (*GATEWAYS, *WORKERS)}
        rig.worker_proxies = {name: Proxy(ports[name], rig.pids) for name in WORKERS}
        for proxy in (*rig.redis_proxies.values(), *rig.worker_proxies.values()):
            await proxy.start()
            cleanup.push_async_callback(proxy.stop)
        for process in _processes(rig, ports, {"model": model, "run_dir": folder}, more):
            rig.processes[process.name] = process
            process.start()
            cleanup.callback(process.end)
        for name in GATEWAYS:
            with rig.asking(name):
                await rig.wait_ready(*WORKERS)
        keeper = asyncio.create_task(rig.look_after())
        cleanup.callback(keeper.cancel)
        yield rig


def _free_ports(names: Sequence[str]) -> dict[str, int]:
    """A port for each that was free a moment ago."""
    ports: set[int] = set()
    while len(ports) < len(names):
        ports.add(free_port())
    return dict(zip(names, ports, strict=True))


def _processes(
    rig: Rig, ports: dict[str, int], shared: dict[str, Any], of_workers: dict[str, Any]
) -> Iterator[Process]:
    def process(name: str, own: dict[str, Any], environment: dict[str, str]) -> Process:
        redis = f"redis://127.0.0.1:{rig.redis_proxies[name].port}"
        flags = _flags({**shared, "redis": redis, "worker_id": name, **own})
        return Process(name, [name.partition("-")[0], *flags], rig.folder, environment)

    for name in GATEWAYS:
        own = {"port": ports[name], "disaggregation": name.partition("-")[2]}
        yield process(name, own, rig.spans.environment)
    for name in WORKERS:
        address = {"worker_port": ports[name], "advertise_port": rig.worker_proxies[name].port}
        apart = {"shared_pool": rig.folder / "pool"} if rig.shares_pool else DECODE_SETTINGS.get(name, {})
        yield process(name, {**SETTINGS, **apart, **of_workers, **address}, {})


def _flags(settings: dict[str, object]) -> list[str]:
    return [text for name, value in settings.items() for text in ("--" + name.replace("_", "-"), str(value))]
