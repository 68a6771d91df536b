"""The transport for any two hosts: the bytes ride in the events of the pull."""

import functools
from collections.abc import Sequence

from kv_transfer.blocks import read_bytes
from kv_transfer.threads import run_on_blocks
from kv_transfer.transport import TransferFailed
from kvrelay.engine.kv_cache import KvCache
from kvrelay.rpc import translated
from kvrelay.v1 import kv_pb2, kv_pb2_grpc

__all__ = ["GrpcReceiver", "GrpcSender"]

PROBE_SECONDS = 5.0


class GrpcSender:
    """Puts the blocks' bytes into the event."""

    # Several copies are made of a message; small ones are still in the cache, and both ends work at once.
    max_event_bytes = 512 << 10

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache

    def payload(self, block_ids: Sequence[int]) -> bytes:
        return read_bytes(self._cache, block_ids)


class GrpcReceiver:
    """Writes the event's bytes into the own pool."""

    name = "grpc"
    usable = True

    def __init__(self, cache: KvCache, stub: "kv_pb2_grpc.KvServiceAsyncStub") -> None:
        self._cache = cache
        self._stub = stub

    async def receive(self, source_block_ids: Sequence[int], destination_block_ids: Sequence[int], data: bytes) -> None:
        expected = len(destination_block_ids) * self._cache.layout.block_bytes
        if len(data) != expected:
            raise TransferFailed(f"{len(data)} bytes came instead of {expected}", reason="WRONG_LENGTH")
        write = functools.partial(self._cache.write_blocks, destination_block_ids, data)
        await run_on_blocks(self._cache, len(destination_block_ids), write)

    async def probe(self, num_bytes: int) -> int:
        received = 0
        with translated():
            async for part in self._stub.Probe(kv_pb2.ProbeRequest(num_bytes=num_bytes), timeout=PROBE_SECONDS):
                received += len(part.data)
        return received

    def close(self) -> None:
        """There is nothing to free: the channel is the link's."""
