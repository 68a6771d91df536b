"""The tensor that holds all KV blocks of a worker; on a CPU in memory that other processes can map."""

import fcntl
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch

from kvrelay.engine.device import default_kv_memory
from kvrelay.engine.kv_layout import KvLayout
from kvrelay.engine.pool_file import PoolFile
from kvrelay.engine.pool_header import HEADER_BYTES, PoolHeader
from kvrelay.errors import ConfigurationError
from kvrelay.settings import EngineSettings

__all__ = ["HEADER_BYTES", "KvCache", "join_shared_pool", "num_blocks_for"]


class KvCache:
    """Blocks `[layer, k|v, slot, kv_head, head_dim]`, one after another.

    On a CPU the pool is a memfd: a header page, then the blocks. All of its pages exist from the start, so that
    resident memory does not grow while the worker serves. Its size is sealed, so that others can map it without fear.
    On CUDA it is an ordinary device tensor without header. Of a pool that workers share it is the blocks in their
    common file.

    Attributes:
        tensor: `[num_blocks, layer, 2, slot, kv_head, head_dim]`.
        keys: for each layer the pool as rows `[?, kv_head, head_dim]`; the key of slot s in block b is row
            `b * block_stride + s`.
        values: the same for values.
        block_stride: rows from one block to the next.
        shared: the file that other workers map too; None if the pool is this worker's own.
        fd: the own pool's memfd; None on CUDA and where the system has none.
        size: bytes behind `fd`, the header included; 0 without fd.
        nonce: 16 random bytes that the header repeats.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device, shared: PoolFile | None = None) -> None:
        """Allocates the pool, all zero; or takes the blocks of `shared`, which is of this layout and size.

        Raises:
            ConfigurationError: there is not enough memory.
        """
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        self.shared = shared
        self.nonce = os.urandom(16)
        self.fd: int | None = None
        self.size = 0
        self._memory: mmap.mmap | None = None
        self._offset = HEADER_BYTES  # of the first block
        self._bytes = self._allocate(num_blocks * layout.block_bytes).view(num_blocks, layout.block_bytes)
        dtype: torch.dtype = getattr(torch, layout.dtype)
        self.tensor = self._bytes.view(dtype).view(num_blocks, *layout.block_shape)
        self.block_stride = layout.num_layers * 2 * layout.block_size
        rows = self.tensor.view(-1, layout.num_kv_heads, layout.head_dim)
        self.keys = [rows[2 * layer * layout.block_size :] for layer in range(layout.num_layers)]
        self.values = [rows[layout.block_size :] for rows in self.keys]
        self.write_header(epoch=0)

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        if self.shared is not None:
            self._memory, self._offset = self.shared.memory, self.shared.blocks_offset
            return torch.frombuffer(self._memory, dtype=torch.uint8, offset=self._offset)
        try:
            if self.device.type != "cpu":
                return torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
            # Linux would promise more memory than it has, and later kill whom it likes.
            _check_available(num_bytes)
            self._memory = self._map(HEADER_BYTES + num_bytes)
        except (OSError, OverflowError, MemoryError, torch.OutOfMemoryError) as error:
            raise ConfigurationError(f"kv_cache_memory: no memory for a pool of {num_bytes >> 20} MiB") from error
        return torch.frombuffer(self._memory, dtype=torch.uint8, offset=self._offset)

    def _map(self, size: int) -> mmap.mmap:
        if sys.platform != "linux":
            return mmap.mmap(-1, size)
        self.fd = os.memfd_create("kvrelay-kv-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.size = size
        os.ftruncate(self.fd, size)
        # Who reads a mapping behind the end of its file is killed (SIGBUS), so nobody may ever shorten the pool.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return mmap.mmap(self.fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)

    def write_header(self, epoch: int) -> None:
        """Writes the first page of a pool of one's own, where there is one."""
        if self._memory is not None and self.shared is None:
            header = PoolHeader(self.nonce, epoch, self.layout.digest, self.num_blocks, self.layout.block_bytes)
            packed = header.pack()
            self._memory[: len(packed)] = packed

    def read_blocks(self, block_ids: Sequence[int]) -> memoryview:
        """A copy of the blocks' bytes, in the order asked for."""
        chosen = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        return self._bytes.index_select(0, chosen).cpu().numpy().reshape(-1).data

    def write_blocks(self, block_ids: Sequence[int], data: bytes | bytearray | memoryview) -> None:
        """Overwrites blocks with `data`, which holds one after another.

        Raises:
            ValueError: `data` has another length than the blocks.
        """
        source = numpy.frombuffer(data, dtype=numpy.uint8).reshape(len(block_ids), self.layout.block_bytes)
        if self.device.type == "cpu":
            self._bytes.numpy()[list(block_ids)] = source
        else:
            chosen = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
            self._bytes.index_copy_(0, chosen, torch.tensor(source).to(self.device))

    def block_view(self, first: int, count: int) -> memoryview:
        """The memory itself of `count` blocks from `first` on, writable.

        Raises:
            ValueError: the pool is not in the memory of the CPU, or has no such blocks.
        """
        if self._memory is None:
            raise ValueError("the KV pool is not in the CPU's memory")
        self._check_range(first, count)
        start = self._offset + first * self.layout.block_bytes
        return memoryview(self._memory)[start : start + count * self.layout.block_bytes]

    @property
    def block_bytes(self) -> torch.Tensor:
        """The pool as bytes, `[num_blocks, layout.block_bytes]`."""
        return self._bytes

    def block_address(self, first: int, count: int) -> int:
        """Where `count` blocks from `first` on begin, for who copies by address.

        Raises:
            ValueError: the pool has no such blocks.
        """
        self._check_range(first, count)
        return self._bytes.data_ptr() + first * self.layout.block_bytes

    def _check_range(self, first: int, count: int) -> None:
        if first < 0 or count < 0 or first + count > self.num_blocks:
            raise ValueError(f"no blocks {first} to {first + count} in a pool of {self.num_blocks}")

    def close(self) -> None:
        """Closes the memfd, or leaves the shared pool. The mapping goes when nobody uses its tensors and views."""
        if self.shared is not None:
            self.shared.close()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def join_shared_pool(settings: EngineSettings, layout: KvLayout, device: torch.device) -> PoolFile | None:
    """The file of the pool that this worker shares with others of its host; None if it is to have its own.

    Raises:
        ConfigurationError: as `PoolFile.join`, or it is not in the CPU's memory.
    """
    if not settings.shared_pool:
        return None
    if device.type != "cpu":
        raise ConfigurationError(f"shared_pool: only workers on a CPU can share a pool, not on {device.type}")
    return PoolFile.join(settings.shared_pool, layout, num_blocks_for(settings, layout, device), _check_available)


def num_blocks_for(settings: EngineSettings, layout: KvLayout, device: torch.device) -> int:
    """How many blocks the pool gets. On CUDA, call it when the weights are on the device.

    Raises:
        ConfigurationError: not one block fits.
    """
    if settings.num_blocks:
        return settings.num_blocks
    memory = settings.kv_cache_memory or default_kv_memory(settings, device)
    if memory < layout.block_bytes:
        raise ConfigurationError(f"kv_cache_memory: {memory} bytes, but one block takes {layout.block_bytes}")
    return memory // layout.block_bytes


def _check_available(num_bytes: int) -> None:
    available = _available_memory()
    if num_bytes > available:
        raise ConfigurationError(
            f"kv_cache_memory: a pool of {num_bytes >> 20} MiB (which num_blocks may set too) does not fit; "
            f"{available >> 20} MiB of memory are available"
        )


def _available_memory() -> int:
    """Bytes that this process may still allocate in the CPU's memory, by the machine and by its control group."""
    limits = [sys.maxsize]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        limits.append(int(fields["MemAvailable"].split()[0]) << 10)
    group = Path("/sys/fs/cgroup")
    limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
    if limit != "max":
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        reclaimable = int(used["active_file"]) + int(used["inactive_file"])
        limits.append(int(limit) - int((group / "memory.current").read_text()) + reclaimable)
    return min(limits)
