"""The decode worker's transports: which its pool can use, and how a receiver for one prefill worker is made."""

import asyncio
from collections.abc import Mapping

from kv_transfer.choice import Opener
from kv_transfer.cuda_ipc import CudaIpcReceiver
from kv_transfer.grpc_stream import GrpcReceiver
from kv_transfer.nixl import NixlReceiver
from kv_transfer.nixl_agent import NixlAgent, nixl_problem
from kv_transfer.pool import PoolReceiver
from kv_transfer.shm import ShmReceiver
from kv_transfer.transport import BlockReceiver
from kvrelay.control.registry import WorkerRecord
from kvrelay.engine.kv_cache import KvCache
from kvrelay.rpc import translated
from kvrelay.v1 import kv_pb2, kv_pb2_grpc

__all__ = ["Receivers"]

EXPORT_SECONDS = 10.0  # a NIXL agent may have to be started


class Receivers:
    """Makes receivers into one pool. Belongs to one event loop."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache

    @property
    def names(self) -> list[str]:
        """Of the transports that this process can do."""
        within_host = ["cuda_ipc"] if self._cache.device.type == "cuda" else ["shm"]
        shared = ["pool"] if self._cache.shared is not None else []
        return [*shared, *within_host, *(["nixl"] if nixl_problem() is None else []), "grpc"]

    def openers(
        self, record: WorkerRecord, stub: "kv_pb2_grpc.KvServiceAsyncStub", shared_pool: bytes
    ) -> Mapping[str, Opener | str]:
        """As `kv_transfer.choice.choose_transport` takes them, for one prefill worker.

        Args:
            shared_pool: as it has answered to Pair.
        """

        async def pool() -> BlockReceiver:
            return PoolReceiver.open_pool(shared_pool, self._cache)

        async def shm() -> BlockReceiver:
            return await asyncio.to_thread(ShmReceiver.open_pool, record.shm, record.epoch, self._cache)

        async def cuda_ipc() -> BlockReceiver:
            export = (await _export("cuda_ipc", stub)).cuda_ipc
            return await asyncio.to_thread(CudaIpcReceiver.open_pool, export, self._cache)

        async def nixl() -> BlockReceiver:
            export = (await _export("nixl", stub)).nixl
            return await asyncio.to_thread(_open_nixl, export, self._cache)

        async def grpc() -> BlockReceiver:
            return GrpcReceiver(self._cache, stub)

        within_host: dict[str, Opener | str] = (
            {"cuda_ipc": cuda_ipc} if self._cache.device.type == "cuda" else {"shm": shm}
        )
        shared: dict[str, Opener | str] = {"pool": pool} if self._cache.shared is not None else {}
        return {**shared, **within_host, "nixl": nixl_problem() or nixl, "grpc": grpc}


def _open_nixl(export: kv_pb2.NixlExport, cache: KvCache) -> NixlReceiver:
    return NixlReceiver.open_pool(export, NixlAgent(cache))


async def _export(name: str, stub: "kv_pb2_grpc.KvServiceAsyncStub") -> kv_pb2.ExportResponse:
    with translated():
        return await stub.Export(kv_pb2.ExportRequest(transport=name), timeout=EXPORT_SECONDS)
