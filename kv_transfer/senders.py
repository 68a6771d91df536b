"""The prefill worker's transports: what it offers, what it exports to who reads its pool, what it puts into events."""

import asyncio
from collections.abc import Mapping

from kv_transfer import cuda_ipc
from kv_transfer.grpc_stream import GrpcSender
from kv_transfer.nixl_agent import NixlAgent, nixl_problem
from kv_transfer.pool import shares_pool
from kv_transfer.transport import BlockSender, FetchedSender
from kvrelay.engine.kv_cache import KvCache
from kvrelay.errors import FailedPrecondition, InvalidArgument
from kvrelay.v1 import kv_pb2

__all__ = ["Senders"]


class Senders:
    """By the names of the transports that this worker's pool can use.

    A NIXL agent has threads and takes its time to start, so there is none before a decode worker wants it.
    """

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache
        self._agent: NixlAgent | None = None
        self._lock = asyncio.Lock()
        self._by_name: Mapping[str, BlockSender] = {
            **({"pool": FetchedSender()} if cache.shared is not None else {}),
            **({"cuda_ipc": FetchedSender()} if cache.device.type == "cuda" else {}),
            **({"shm": FetchedSender()} if cache.fd is not None else {}),
            **({"nixl": FetchedSender()} if nixl_problem() is None else {}),
            "grpc": GrpcSender(cache),
        }

    def names(self, shared_pool: bytes) -> list[str]:
        """Of those that are offered to a decode worker, which is in this shared pool."""
        return [name for name in self._by_name if name != "pool" or shares_pool(self._cache, shared_pool)]

    def find(self, name: str) -> BlockSender:
        """Raises: InvalidArgument for a transport that is not offered."""
        if name not in self._by_name:
            raise InvalidArgument.field("transport", f"must be one of {', '.join(self._by_name)}")
        return self._by_name[name]

    async def export(self, name: str) -> kv_pb2.ExportResponse:
        """What a decode worker needs to read this pool by that transport.

        Raises:
            InvalidArgument: it is not offered.
            FailedPrecondition: it cannot be prepared, or needs nothing; reasons NIXL_UNAVAILABLE, CUDA_IPC_UNAVAILABLE,
                NOTHING_TO_EXPORT.
        """
        self.find(name)
        if name == "nixl":
            return kv_pb2.ExportResponse(nixl=(await self._start_agent()).export())
        if name == "cuda_ipc":
            return kv_pb2.ExportResponse(cuda_ipc=await asyncio.to_thread(cuda_ipc.export_pool, self._cache))
        raise FailedPrecondition(f"the {name} transport needs no export", reason="NOTHING_TO_EXPORT")

    async def _start_agent(self) -> NixlAgent:
        async with self._lock:
            if self._agent is None:
                self._agent = await asyncio.to_thread(NixlAgent, self._cache)
            return self._agent
