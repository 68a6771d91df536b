"""A decode worker's links: one to each prefill worker."""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from typing import Protocol

from grpc import aio

from kv_transfer.choice import Choice, choose_transport
from kv_transfer.layouts import PROTOCOL_VERSION, check_layouts, check_versions, layout_to_proto
from kv_transfer.rate import LinkRate, measure_bandwidth, measure_latency
from kv_transfer.receivers import Receivers
from kv_transfer.threads import run_to_end
from kvrelay.control.membership import WorkerEntry
from kvrelay.control.registry import WorkerRecord
from kvrelay.engine.kv_cache import KvCache
from kvrelay.errors import FailedPrecondition, KvrelayError, NotFound
from kvrelay.request import LinkStatus, WorkerRole
from kvrelay.rpc import open_channel, translated
from kvrelay.v1 import kv_pb2, kv_pb2_grpc

__all__ = ["Directory", "Link", "Links"]

log = logging.getLogger(__name__)

PAIR_SECONDS = 5.0
# The gateway may have seen a new worker in the registry a moment before this process does.
REGISTRY_LAG_SECONDS = 1.0


class Directory(Protocol):
    """What the links need of `kvrelay.control.directory.WorkerDirectory`."""

    def snapshot(self) -> Mapping[str, WorkerEntry]: ...

    async def wait_for(self, predicate: Callable[[Mapping[str, WorkerEntry]], bool], timeout: float) -> None: ...


class Link:
    """One start of a prefill worker, paired: both mean the same by a block and agree how blocks travel.

    Attributes:
        rate: how fast they travel; who pulls refines it.
    """

    def __init__(self, record: WorkerRecord, channel: aio.Channel, choice: Choice, latency: float) -> None:
        self.record = record
        self.channel = channel
        self.receiver = choice.receiver
        self.rate = LinkRate(choice.bandwidth, latency)
        self._fallback = choice.fallback
        self.stub = kv_pb2_grpc.KvServiceStub(channel)
        self._num_users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    def status(self) -> LinkStatus:
        return LinkStatus(
            prefill_worker_id=self.record.worker_id,
            transport=self.receiver.name,
            bandwidth=self.rate.bandwidth,
            latency=self.rate.latency,
            fallback=self._fallback,
        )

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps the receiver open inside."""
        self._num_users += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._num_users -= 1
            if self._num_users == 0:
                self._unused.set()

    async def close(self) -> None:
        """Ends the pulls that run. What they have begun to copy stays in memory until they have."""
        await self.channel.close(None)
        await self._unused.wait()
        await run_to_end(self.receiver.close)


class Links:
    """Prefill worker id -> link. Belongs to one event loop.

    Addresses and pools come from the registry alone. A link is made as soon as the registry tells of a prefill worker,
    lest the first request waits for it, or else when it is first used; and made anew when the worker has started anew.

    Args:
        preference: "auto" or a transport's name, as `kv_transfer.choice` has it.
        required: names of the transports that auto may choose; empty for any.

    Attributes:
        worker_id: this decode worker's. With the epoch it tells prefill workers who pairs and pulls.
        epoch: 0 until it has registered.
    """

    def __init__(
        self,
        directory: Directory,
        worker_id: str,
        cache: KvCache,
        preference: str = "auto",
        required: Collection[str] = (),
    ) -> None:
        self.epoch = 0
        self._directory = directory
        self.worker_id = worker_id
        self._cache = cache
        self._preference = preference
        self._required = required
        self._receivers = Receivers(cache)
        self._links: dict[str, Link] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._closing: set[asyncio.Task[None]] = set()
        self._pairing: dict[str, asyncio.Task[None]] = {}

    @contextlib.asynccontextmanager
    async def use(self, worker_id: str, epoch: int) -> AsyncIterator[Link]:
        """The link to this start of a prefill worker. Its receiver stays open inside; its calls end with the link.

        Raises:
            NotFound: the registry does not know the worker; reason WORKER_UNKNOWN.
            FailedPrecondition: it knows another epoch (STALE_EPOCH), the protocols or layouts differ
                (VERSION_MISMATCH, LAYOUT_MISMATCH), or no transport that may be used works (TRANSPORT_REFUSED).
            Unavailable, DeadlineExceeded: the worker does not answer.
        """
        link = await self._find(worker_id, epoch)
        with link.in_use():
            yield link

    def status(self) -> list[LinkStatus]:
        """Of each link, by prefill worker id."""
        return [link.status() for _, link in sorted(self._links.items())]

    def follow(self) -> None:
        """Drops the links to who departed, and pairs with who has come; for `WorkerDirectory.on_change`."""
        self.drop_departed()
        for entry in self._directory.snapshot().values():
            if self.epoch and entry.record.role is WorkerRole.PREFILL:
                self._pair_soon(entry.record)

    def drop_departed(self) -> None:
        """Closes the links to workers that have gone or started anew, which ends the pulls from them.

        Nothing else ends a pull from a worker whose event loop stands still: gRPC keeps its connection alive.
        """
        workers = self._directory.snapshot()
        for worker_id, link in list(self._links.items()):
            if worker_id not in workers or workers[worker_id].record.epoch != link.record.epoch:
                self._retire(worker_id)

    async def close(self) -> None:
        """Ends the pulls that run, and all links."""
        for task in list(self._pairing.values()):
            task.cancel()
        await asyncio.gather(*self._pairing.values(), return_exceptions=True)
        for worker_id in list(self._links):
            self._retire(worker_id)
        await asyncio.gather(*self._closing)

    def _pair_soon(self, record: WorkerRecord) -> None:
        worker_id = record.worker_id
        if worker_id not in self._links and worker_id not in self._pairing:
            task = asyncio.create_task(self._pair_ahead(record), name=f"pairing with {worker_id}")
            self._pairing[worker_id] = task
            task.add_done_callback(lambda _: self._pairing.pop(worker_id))

    async def _pair_ahead(self, record: WorkerRecord) -> None:
        try:
            await self._find(record.worker_id, record.epoch)
        except KvrelayError as error:
            # Whoever uses the link tries again, and is told.
            log.info("cannot pair with prefill worker %s yet: %s", record.worker_id, error.message)

    async def _find(self, worker_id: str, epoch: int) -> Link:
        await self._catch_up(worker_id, epoch)
        async with self._locks[worker_id]:
            record = self._record(worker_id, epoch)
            link = self._links.get(worker_id)
            if link is not None and link.record.epoch == epoch and link.receiver.usable:
                return link
            if link is not None:
                self._retire(worker_id)
            link = self._links[worker_id] = await self._connect(record)
            log.info("paired with prefill worker %s, epoch %d: %s", worker_id, epoch, _describe(link.status()))
            self.drop_departed()  # of one that went while it was paired with, no change is told any more
            return link

    async def _catch_up(self, worker_id: str, epoch: int) -> None:
        def seen(workers: Mapping[str, WorkerEntry]) -> bool:
            return worker_id in workers and workers[worker_id].record.epoch >= epoch

        if not seen(self._directory.snapshot()):
            with contextlib.suppress(TimeoutError):
                await self._directory.wait_for(seen, REGISTRY_LAG_SECONDS)

    def _record(self, worker_id: str, epoch: int) -> WorkerRecord:
        entry = self._directory.snapshot().get(worker_id)
        if entry is None:
            raise NotFound(f"no worker {worker_id} is registered", reason="WORKER_UNKNOWN")
        if entry.record.epoch != epoch:
            raise _stale_epoch(worker_id)
        return entry.record

    async def _connect(self, record: WorkerRecord) -> Link:
        channel = open_channel(record.address)
        async with contextlib.AsyncExitStack() as unless_paired:
            unless_paired.push_async_callback(channel.close, None)
            stub = kv_pb2_grpc.KvServiceStub(channel)
            answer = await self._pair(record, stub)
            latency = await measure_latency(lambda: _ping(stub))
            openers = self._receivers.openers(record, stub, answer.shared_pool)
            offered = tuple(answer.transports)
            choice = await choose_transport(self._preference, self._required, openers, offered, measure_bandwidth)
            unless_paired.pop_all()
        return Link(record, channel, choice, latency)

    async def _pair(self, record: WorkerRecord, stub: "kv_pb2_grpc.KvServiceAsyncStub") -> kv_pb2.PairResponse:
        layout = layout_to_proto(self._cache.layout)
        request = kv_pb2.PairRequest(
            decode_worker_id=self.worker_id,
            decode_epoch=self.epoch,
            layout=layout,
            protocol_version=PROTOCOL_VERSION,
            transports=self._receivers.names,
            shared_pool=b"" if self._cache.shared is None else self._cache.shared.nonce,
        )
        with translated():
            answer = await stub.Pair(request, timeout=PAIR_SECONDS)
        # Another process may have got the port of one that died.
        if (answer.prefill_worker_id, answer.prefill_epoch) != (record.worker_id, record.epoch):
            raise _stale_epoch(record.worker_id)
        check_versions(answer.protocol_version)
        check_layouts(layout, answer.layout)
        return answer

    def _retire(self, worker_id: str) -> None:
        task = asyncio.get_running_loop().create_task(self._links.pop(worker_id).close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _ping(stub: "kv_pb2_grpc.KvServiceAsyncStub") -> None:
    with translated():
        async for _ in stub.Probe(kv_pb2.ProbeRequest(), timeout=PAIR_SECONDS):
            pass


def _describe(status: LinkStatus) -> str:
    return f"{status}; no faster transport, because {status.fallback}" if status.fallback else str(status)


def _stale_epoch(worker_id: str) -> FailedPrecondition:
    return FailedPrecondition(f"worker {worker_id} has started anew since", reason="STALE_EPOCH")
