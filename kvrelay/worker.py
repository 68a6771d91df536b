"""What prefill and decode workers have in common: one engine, one registration, one server, one way to live and end."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvrelay import wire
from kvrelay.control.connection import connect
from kvrelay.control.directory import WorkerDirectory
from kvrelay.control.registration import Registration
from kvrelay.control.registry import LinkRecord, ModelInfo, ShmOffer, WorkerLoad, WorkerRecord
from kvrelay.engine.async_engine import AsyncEngine
from kvrelay.engine.block_pool import BlockBooks, BlockPool
from kvrelay.engine.checkpoint import check_checkpoint, model_name, resolve_checkpoint
from kvrelay.engine.engine import Engine
from kvrelay.engine.limits import Limits
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.shared_block_pool import SharedBlockPool
from kvrelay.errors import FailedPrecondition, Unavailable
from kvrelay.lifetime import StopRequest, settle
from kvrelay.request import HeldBlocks, LinkStatus, WorkerRole, WorkerState, WorkerStatus
from kvrelay.rpc import Server, Service
from kvrelay.settings import Settings
from kvrelay.shared_pool import check_shared_pool
from kvrelay.v1 import worker_pb2, worker_pb2_grpc

__all__ = ["Part", "Resources", "check_epoch", "run_worker"]

log = logging.getLogger(__name__)

# A worker that drains still takes what gateways send until they have looked into the registry again.
ANNOUNCE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Resources:
    """What a worker's own part is built from. The cluster's key signs tickets and registrations."""

    worker_id: str
    settings: Settings
    cluster_key: bytes
    engine: AsyncEngine
    runner: ModelRunner
    directory: WorkerDirectory


class Source(Protocol):
    """What a worker tells of the KV caches that it holds for others."""

    async def wait_released(self) -> None:
        """Until nothing is held for other workers."""

    def shared_memory(self) -> ShmOffer | None:
        """How other processes of this host reach the KV pool, if they are to."""

    def owner(self, request_id: str) -> str:
        """Who has to end what holds a request's blocks; empty for who has done so."""

    def lease_seconds(self, request_id: str) -> float | None:
        """Seconds until the lease on a request's blocks runs out; None if an open call holds them."""


class Part(Protocol):
    """What a prefill or a decode worker adds to what both have."""

    @property
    def services(self) -> Sequence[Service]:
        """Its gRPC services."""

    @property
    def source(self) -> Source:
        """What it holds for others."""

    def begin(self, epoch: int) -> None:
        """The worker is registered, under this epoch; calls come from now on.

        Begins again, under a higher epoch, when the worker was taken for lost; no call of the former one is left, and
        none has come since.
        """

    async def stop(self) -> None:
        """No call is left."""

    def leave(self) -> None:
        """The worker drains: calls in progress are to end soon, and no new ones come."""

    def links(self) -> Sequence[LinkStatus]:
        """How blocks reach this worker."""


async def run_worker(
    role: WorkerRole, settings: Settings, cluster_key: bytes, build: Callable[[Resources], Part]
) -> int:
    """Serves until SIGTERM or SIGINT, then drains. Answers the process's exit code.

    Raises:
        ConfigurationError: before anything was served.
    """
    stopping = StopRequest()
    check_shared_pool(settings)
    path = resolve_checkpoint(settings.engine.model)
    check_checkpoint(path)
    redis = await connect(settings.cluster.redis)
    started = time.monotonic()
    runner = await asyncio.to_thread(ModelRunner.load, path, settings.engine)
    log.info("loaded %s in %.1f s", path, time.monotonic() - started)
    log.info("contexts of up to %d tokens; %s", runner.context_length, runner.spec.context_limit)
    engine = AsyncEngine(Engine(_scheduler(role, runner, settings), runner))
    lease_seconds, interval = settings.cluster.heartbeat_lease_seconds, settings.cluster.heartbeat_seconds
    directory = WorkerDirectory(redis, cluster_key, lease_seconds=lease_seconds, interval=interval)
    worker_id = settings.worker.id_of(role.value)
    part = build(Resources(worker_id, settings, cluster_key, engine, runner, directory))
    worker = _Worker(worker_id, role, settings, runner, engine, part)
    async with contextlib.AsyncExitStack() as cleanup:
        cleanup.push_async_callback(redis.aclose)
        server = Server(settings.cluster.host, settings.worker.worker_port, [*part.services, worker.service()])
        port = await server.start()
        cleanup.push_async_callback(server.stop)
        engine.start()
        cleanup.callback(engine.stop)
        await directory.start()
        cleanup.push_async_callback(directory.stop)

        def begin_anew(epoch: int) -> None:
            worker.begin(epoch)
            server.unfence()

        registration = Registration(
            redis,
            cluster_key,
            worker.load,
            on_lapse=lambda: server.fence(_taken_for_lost()),
            on_new_epoch=begin_anew,
            lease_seconds=lease_seconds,
            interval=interval,
        )
        worker.register_at(settings.worker.advertise_port or port)
        try:
            epoch = await registration.start(worker.record(), stopping)
        except Unavailable:
            return 0  # it was stopped as it waited for Redis
        worker.begin(epoch)
        cleanup.push_async_callback(registration.withdraw)
        cleanup.push_async_callback(part.stop)
        settle()
        await server.set_serving(True)
        log.info("%s serves at %s, epoch %d", worker_id, worker.address, worker.epoch)
        await _until_stopped(stopping, engine, worker, server)
        worker.state = WorkerState.DRAINING
        with contextlib.suppress(Exception):
            await registration.heartbeat(worker.load())
            await asyncio.sleep(ANNOUNCE_SECONDS)
        part.leave()
        await server.drain(settings.worker.drain_seconds if engine.alive else 0.0, until=part.source.wait_released)
    return 0 if stopping.is_set() else 1


async def _until_stopped(stopping: asyncio.Event, engine: AsyncEngine, worker: "_Worker", server: Server) -> None:
    """Also follows the engine: a worker that is stuck in a step is not ready, and takes no new requests."""
    while engine.alive and not stopping.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), timeout=0.25)
        if worker.follow_engine():
            log.warning("%s is %s", worker.worker_id, worker.state.value)
            await server.set_serving(worker.state is WorkerState.READY)


def check_epoch(meant: int, own: int) -> None:
    """Raises: FailedPrecondition, reason STALE_EPOCH, for a call that is meant for another start of this worker."""
    if meant != own:
        raise FailedPrecondition("another start of this worker is meant", reason="STALE_EPOCH")


def _taken_for_lost() -> Unavailable:
    return Unavailable("this worker was silent for too long, and begins anew", reason="FENCED")


def _scheduler(role: WorkerRole, runner: ModelRunner, settings: Settings) -> Scheduler:
    limits = Limits(
        max_num_sequences=settings.engine.max_num_sequences,
        max_batched_tokens=settings.engine.max_batched_tokens,
        context_length=runner.context_length,
        block_size=runner.layout.block_size,
        model_digest=runner.layout.model_digest,
        prefix_caching=settings.engine.prefix_caching,
        evicts=role is WorkerRole.DECODE,
        itl_limit=settings.engine.itl_limit,
    )
    shared = runner.cache.shared
    pool: BlockBooks = BlockPool(runner.num_blocks) if shared is None else SharedBlockPool(shared)
    return Scheduler(pool, limits)


class _Worker(worker_pb2_grpc.WorkerServiceServicer):
    """A worker as others see it: its record, its load and its status."""

    def __init__(
        self,
        worker_id: str,
        role: WorkerRole,
        settings: Settings,
        runner: ModelRunner,
        engine: AsyncEngine,
        part: Part,
    ) -> None:
        self.state = WorkerState.READY
        self.address = ""
        self.epoch = 0
        self.worker_id = worker_id
        self._role = role
        self._settings = settings
        self._runner = runner
        self._engine = engine
        self._part = part

    def service(self) -> Service:
        add = worker_pb2_grpc.add_WorkerServiceServicer_to_server
        return Service("kvrelay.v1.WorkerService", add, self, work=())

    def begin(self, epoch: int) -> None:
        """The worker is registered under this epoch."""
        self.epoch = epoch
        self._runner.cache.write_header(epoch)
        self._part.begin(epoch)

    def follow_engine(self) -> bool:
        """Whether the engine got stuck in a step, or went on, since the last call."""
        limit = self._settings.worker.stuck_seconds
        stuck = bool(limit) and self._engine.step_seconds() > limit
        state = WorkerState.STUCK if stuck else WorkerState.READY
        changed, self.state = state is not self.state, state
        return changed

    def register_at(self, port: int) -> None:
        self.address = self._settings.cluster.address(port)

    def record(self) -> WorkerRecord:
        runner = self._runner
        return WorkerRecord(
            worker_id=self.worker_id,
            role=self._role,
            address=self.address,
            pid=os.getpid(),
            model=ModelInfo(
                id=model_name(self._settings.engine),
                architecture=runner.spec.architecture,
                context_length=runner.context_length,
                vocab_size=runner.spec.vocab_size,
                block_size=runner.layout.block_size,
                model_digest=runner.layout.model_digest.hex(),
                block_bytes=runner.layout.block_bytes,
            ),
            shm=self._part.source.shared_memory(),
            max_batched_tokens=self._settings.engine.max_batched_tokens,
            itl_limit=self._settings.engine.itl_limit,
        )

    def load(self) -> WorkerLoad:
        load = self._engine.load
        return WorkerLoad(
            state=self.state,
            running=load.running,
            waiting=load.waiting,
            blocks_total=load.blocks_total,
            blocks_free=load.blocks_free,
            waiting_tokens=load.waiting_tokens,
            prefill_rate=load.prefill_rate,
            links=tuple(
                LinkRecord(link.prefill_worker_id, link.transport, link.bandwidth, link.latency)
                for link in self._part.links()
            ),
        )

    async def GetStatus(self, request: worker_pb2.GetStatusRequest, context: Any) -> worker_pb2.GetStatusResponse:
        load, held = await self._engine.ask(lambda scheduler: (scheduler.load(), scheduler.held()))
        status = WorkerStatus(
            id=self.worker_id,
            role=self._role,
            pid=os.getpid(),
            address=self.address,
            epoch=self.epoch,
            state=self.state,
            running=load.running,
            waiting=load.waiting,
            blocks_total=load.blocks_total,
            blocks_free=load.blocks_free,
            blocks_held=load.blocks_held,
            memory_bytes=own_memory(self._runner.cache.size),
            links=tuple(self._part.links()),
            preemptions=load.preemptions,
        )
        now = time.monotonic()
        blocks = [
            HeldBlocks(
                worker_id=self.worker_id,
                request_id=entry.request_id,
                state=entry.state,
                block_ids=entry.block_ids,
                age_seconds=now - entry.since,
                lease_seconds=self._part.source.lease_seconds(entry.request_id),
                owner=self._part.source.owner(entry.request_id),
            )
            for entry in held
        ]
        return worker_pb2.GetStatusResponse(
            status=wire.worker_status_to_proto(status), held=[wire.held_blocks_to_proto(entry) for entry in blocks]
        )


def own_memory(pool_bytes: int) -> int:
    """Bytes of this process that are in memory; 0 where the system does not tell.

    Of shared memory it counts the own KV pool alone: not what a decode worker has mapped of others, nor a shared pool.
    """
    try:
        with open("/proc/self/status") as status:
            resident = dict(line.split(":", 1) for line in status)
        return sum(int(resident[name].split()[0]) << 10 for name in ("RssAnon", "RssFile")) + pool_bytes
    except OSError:
        return 0
