"""Two workers without an engine: real pools, a real server on a loopback socket, real links."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from kv_transfer.handover import Handover
from kv_transfer.leases import LeaseTable
from kv_transfer.links import Links
from kv_transfer.nixl_agent import nixl_problem
from kv_transfer.puller import Puller
from kv_transfer.service import KvService
from kv_transfer.shm import offer_pool
from kv_transfer.tickets import sign_ticket
from kvrelay.control.membership import WorkerEntry
from kvrelay.control.registry import ModelInfo, ShmOffer, WorkerLoad, WorkerRecord
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.kv_layout import KvLayout
from kvrelay.engine.pool_file import PoolFile
from kvrelay.request import WorkerRole, WorkerState
from kvrelay.rpc import Server, Service
from kvrelay.v1 import kv_pb2, kv_pb2_grpc
from tests.patience import SOON

KEY = b"k" * 32
EPOCH = 7
LAYOUT = KvLayout(b"m" * 32, "float32", block_size=16, num_layers=2, num_kv_heads=2, head_dim=16)  # 8 KiB a block
NUM_BLOCKS = 64
TRANSPORTS = [
    "shm",
    "grpc",
    pytest.param("nixl", marks=pytest.mark.skipif(nixl_problem() is not None, reason=str(nixl_problem()))),
]
Tamper = Callable[[kv_pb2.PullResponse], Sequence[kv_pb2.PullResponse]]


def offered(cache: KvCache) -> ShmOffer:
    """What `offer_pool` says of a pool that others can map, as all pools on a CPU."""
    offer = offer_pool(cache)
    assert offer is not None
    return offer


def noting(note: Callable[[kv_pb2.PullResponse], object]) -> Tamper:
    """Leaves the events as they are."""

    def tamper(event: kv_pb2.PullResponse) -> Sequence[kv_pb2.PullResponse]:
        note(event)
        return [event]

    return tamper


class Prefill:
    """A prefill worker whose engine the test plays: it grants blocks and says which are final."""

    def __init__(self, layout: KvLayout = LAYOUT, num_blocks: int = NUM_BLOCKS, shared: PoolFile | None = None) -> None:
        self.now = 1000.0
        self.cache = KvCache(layout, num_blocks, torch.device("cpu"), shared)
        self.cache.tensor.copy_(torch.randn(self.cache.tensor.shape))
        self.cache.write_header(EPOCH)
        self.generations = [3] * num_blocks
        self.freed: list[str] = []
        self.leases = LeaseTable("prefill-0", 30.0, self.generations.__getitem__, self.freed.append)
        self.leases.epoch = EPOCH
        self.tamper: Tamper = lambda event: [event]
        self.num_pairings = 0
        self.port = 0

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        service = _TamperingService(self)
        server = Server(
            "127.0.0.1", 0, [Service("kvrelay.v1.KvService", kv_pb2_grpc.add_KvServiceServicer_to_server, service)]
        )
        self.port = await server.start()
        try:
            yield
        finally:
            await server.stop()
            self.cache.close()

    @property
    def record(self) -> WorkerRecord:
        model = ModelInfo("demo", "LlamaForCausalLM", 512, 100, self.cache.layout.block_size, "00")
        address = f"127.0.0.1:{self.port}"
        shm = offer_pool(self.cache)
        return WorkerRecord("prefill-0", WorkerRole.PREFILL, address, os.getpid(), model, shm, EPOCH)

    def grant(
        self, block_ids: Sequence[int], request_id: str = "r1", *, ends_with_call: bool = True
    ) -> tuple[Handover, bytes]:
        """Blocks of a prompt that is still being computed."""
        generations = tuple(self.generations[block_id] for block_id in block_ids)
        handover, ticket = self.leases.grant(
            request_id, "gateway-0", tuple(block_ids), generations, self.now, ends_with_call=ends_with_call
        )
        return handover, sign_ticket(ticket, KEY)

    def grant_complete(self, block_ids: Sequence[int], request_id: str = "r1") -> bytes:
        """Blocks as a worker that drains holds them: all are final, and no call is open."""
        handover, ticket = self.grant(block_ids, request_id, ends_with_call=False)
        handover.complete(42, self.now)
        return ticket


class _TamperingService(KvService):
    """What the network, or a defect, might make of the events."""

    def __init__(self, prefill: Prefill) -> None:
        super().__init__(prefill.leases, prefill.cache, KEY, lambda: prefill.now)
        self._prefill = prefill

    async def Pair(self, request: kv_pb2.PairRequest, context: Any) -> kv_pb2.PairResponse:
        self._prefill.num_pairings += 1
        return await super().Pair(request, context)

    async def Pull(self, request: kv_pb2.PullRequest, context: Any) -> AsyncIterator[kv_pb2.PullResponse]:
        pulled: Any = super().Pull(request, context)
        async with contextlib.aclosing(pulled) as events:
            async for event in events:
                for tampered in self._prefill.tamper(event):
                    yield tampered


class Registry:
    """A directory that says what the test tells it."""

    def __init__(self, *records: WorkerRecord) -> None:
        self._told = asyncio.Event()
        self.tell(*records)

    def tell(self, *records: WorkerRecord) -> None:
        self._told.set()
        self._told = asyncio.Event()
        load = WorkerLoad(WorkerState.READY, 0, 0, 1, 1, 0)
        self._workers = {record.worker_id: WorkerEntry(record, load, 0.0) for record in records}

    def snapshot(self) -> Mapping[str, WorkerEntry]:
        return self._workers

    async def wait_for(self, predicate: Callable[[Mapping[str, WorkerEntry]], bool], timeout: float) -> None:
        async with asyncio.timeout(timeout):
            while not predicate(self._workers):
                await self._told.wait()


class Decode:
    """A decode worker's pool, links and puller."""

    def __init__(
        self,
        registry: Registry,
        preference: str,
        layout: KvLayout = LAYOUT,
        checksum: str = "full",
        key: bytes = KEY,
        required: Sequence[str] = (),
        worker_id: str = "decode-0",
        shared: PoolFile | None = None,
    ) -> None:
        self.registry = registry
        self.cache = KvCache(layout, NUM_BLOCKS, torch.device("cpu"), shared)
        self.links = Links(registry, worker_id, self.cache, preference, required)
        self.puller = Puller(self.links, self.cache, key, checksum)

    def close(self) -> None:
        self.cache.close()


class Pair:
    """A prefill and a decode worker that know each other."""

    def __init__(self, prefill: Prefill, decode: Decode) -> None:
        self.prefill = prefill
        self.decode = decode

    def same(self, source: Sequence[int], destination: Sequence[int]) -> bool:
        """Whether these blocks hold the same bytes on both workers."""
        return bytes(self.prefill.cache.read_blocks(source)) == bytes(self.decode.cache.read_blocks(destination))


@contextlib.asynccontextmanager
async def decode_worker(registry: Registry, preference: str, **options: Any) -> AsyncIterator[Decode]:
    decode = Decode(registry, preference, **options)
    try:
        yield decode
    finally:
        await decode.links.close()
        decode.close()


@contextlib.asynccontextmanager
async def pair(preference: str, checksum: str = "full", num_blocks: int = NUM_BLOCKS) -> AsyncIterator[Pair]:
    prefill = Prefill(num_blocks=num_blocks)
    async with (
        prefill.serving(),
        decode_worker(Registry(prefill.record), preference, checksum=checksum) as decode,
    ):
        yield Pair(prefill, decode)


@contextlib.asynccontextmanager
async def prefill_process() -> AsyncIterator[tuple[asyncio.subprocess.Process, WorkerRecord, bytes]]:
    """It grants blocks 0 to 15, of which 8 are final, and completes the prompt at the first line it reads."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.contract.transport_process"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout is not None
        told = json.loads(await asyncio.wait_for(process.stdout.readline(), SOON))
        here = Prefill()
        here.port = told["port"]
        shm = replace(offered(here.cache), **told["shm"])
        here.cache.close()
        record = WorkerRecord(
            "prefill-0", WorkerRole.PREFILL, f"127.0.0.1:{told['port']}", process.pid, here.record.model, shm, EPOCH
        )
        yield process, record, bytes.fromhex(told["ticket"])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
