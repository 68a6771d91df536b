"""The transport between hosts and between GPUs: the decode worker reads the prefill worker's pool by NIXL, over UCX."""

import functools
from collections.abc import Sequence

import torch

from kv_transfer.blocks import contiguous_runs
from kv_transfer.nixl_agent import NixlAgent, NixlFailed, NixlTimedOut, unavailable
from kv_transfer.threads import run_to_end
from kv_transfer.transport import TransferFailed, check_fetch
from kvrelay.v1 import kv_pb2

__all__ = ["NixlReceiver"]

MAX_ADDRESS = 1 << 63


class NixlReceiver:
    """Reads another process's pool into the own. `open_pool` makes one.

    Attributes:
        usable: False after a transfer that had to be given up.
    """

    name = "nixl"

    def __init__(self, agent: NixlAgent, peer: str, export: kv_pb2.NixlExport) -> None:
        self.usable = True
        self._agent = agent
        self._peer = peer
        self._export = export
        self._cache = agent.cache
        self._segment = agent.segment_of(export)

    @classmethod
    def open_pool(cls, export: kv_pb2.NixlExport, agent: NixlAgent) -> "NixlReceiver":
        """Makes the prefill worker's agent known to the own, which the receiver takes over.

        Raises:
            FailedPrecondition: the export is malformed, or the agent cannot be reached; reason NIXL_UNAVAILABLE.
        """
        size = export.num_blocks * agent.cache.layout.block_bytes
        if export.num_blocks == 0 or not 0 < export.base_address < export.base_address + size < MAX_ADDRESS:
            raise unavailable("the prefill worker exports no pool")
        return cls(agent, agent.meet(export.metadata), export)

    async def receive(self, source_block_ids: Sequence[int], destination_block_ids: Sequence[int], data: bytes) -> None:
        check_fetch(source_block_ids, self._export.num_blocks, data)
        await run_to_end(functools.partial(self._fetch, source_block_ids, destination_block_ids))

    async def probe(self, num_bytes: int) -> int:
        return await run_to_end(functools.partial(self._fetch_into_scratch, num_bytes))

    def close(self) -> None:
        self._agent.close()

    def _fetch(self, source_block_ids: Sequence[int], destination_block_ids: Sequence[int]) -> None:
        size = self._cache.layout.block_bytes
        source, destination = [], []
        for run in contiguous_runs(source_block_ids, destination_block_ids):
            count = run.stop - run.start
            source.append((self._export.base_address + source_block_ids[run.start] * size, count * size))
            destination.append((self._cache.block_address(destination_block_ids[run.start], count), count * size))
        self._read(source, destination)

    def _fetch_into_scratch(self, num_bytes: int) -> int:
        num_bytes = min(num_bytes, self._export.num_blocks * self._cache.layout.block_bytes)
        scratch = torch.empty(num_bytes, dtype=torch.uint8, device=self._cache.device)
        with self._agent.registered(scratch.data_ptr(), num_bytes):
            self._read([(self._export.base_address, num_bytes)], [(scratch.data_ptr(), num_bytes)])
        return num_bytes

    def _read(self, source: Sequence[tuple[int, int]], destination: Sequence[tuple[int, int]]) -> None:
        try:
            self._agent.read(self._peer, source, destination, self._segment, self._export.device_index)
        except NixlFailed as error:
            self.usable = not isinstance(error, NixlTimedOut)
            raise TransferFailed(f"NIXL could not read the pool: {error}", reason="NIXL_FAILED") from error
