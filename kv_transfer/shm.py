"""The transport within a host: the decode worker maps the prefill worker's pool, and copies from where it lies.

The pool is a memfd, which others open as `/proc/<pid>/fd/<n>`. That needs the same user, kernel and pid namespace.
Once mapped, the memory stays readable whatever becomes of the prefill worker: a memfd lives as long as a mapping, and
seals keep this one from being shortened.
"""

import fcntl
import functools
import mmap
import os
import stat
import time
from collections.abc import Sequence

import numpy

from kv_transfer.blocks import contiguous_runs
from kv_transfer.threads import run_on_blocks, run_to_end
from kv_transfer.transport import check_fetch
from kvrelay.control.registry import ShmOffer
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.pool_header import HEADER_BYTES, PoolHeader
from kvrelay.errors import FailedPrecondition
from kvrelay.host import host_id

__all__ = ["ShmReceiver", "offer_pool"]

UNMAPPED_AT_ONCE = 32 << 20  # bytes, in about 1 ms


def offer_pool(cache: KvCache) -> ShmOffer | None:
    """What the registry tells others of this process's pool; None if it is not in memory that can be shared."""
    if cache.fd is None:
        return None
    return ShmOffer(host_id(), os.getpid(), cache.fd, cache.size, cache.nonce.hex())


class ShmReceiver:
    """Reads another process's pool into the own. `open_pool` makes one."""

    name = "shm"
    usable = True

    def __init__(self, memory: mmap.mmap, cache: KvCache) -> None:
        """Takes over a mapped pool, whose blocks have the same layout as those of `cache`."""
        self._memory = memory
        self._source = numpy.frombuffer(memory, numpy.uint8, offset=HEADER_BYTES)
        self._num_source_blocks = len(self._source) // cache.layout.block_bytes
        self._cache = cache

    @classmethod
    def open_pool(cls, offer: ShmOffer | None, epoch: int, cache: KvCache) -> "ShmReceiver":
        """Maps the pool that a prefill worker of this epoch offers. Takes about 0.1 s for a GiB: call it in a thread.

        Raises:
            FailedPrecondition: it cannot be mapped, or is another pool than it should be; reason SHM_UNAVAILABLE.
        """
        if cache.device.type != "cpu":
            raise _unavailable("this worker's KV pool is not in the CPU's memory")
        if offer is None:
            raise _unavailable("the prefill worker does not offer its pool")
        if offer.host_id != host_id():
            raise _unavailable("the prefill worker is on another host")
        fd = _open(offer)
        try:
            _check_pool(fd, offer, epoch, cache)
            return cls(_map(fd, offer.size), cache)
        finally:
            os.close(fd)

    async def receive(self, source_block_ids: Sequence[int], destination_block_ids: Sequence[int], data: bytes) -> None:
        check_fetch(source_block_ids, self._num_source_blocks, data)
        copy = functools.partial(self._copy, source_block_ids, destination_block_ids)
        await run_on_blocks(self._cache, len(destination_block_ids), copy)

    async def probe(self, num_bytes: int) -> int:
        return len(await run_to_end(self._source[:num_bytes].copy))

    def close(self) -> None:
        """Unmaps the pool. Takes 0.05 s for a GiB, or 0.3 s if the prefill worker is gone: call it in a thread."""
        del self._source
        # In pieces, because no thread can map memory, as for each large tensor, while the kernel unmaps some.
        for start in range(0, len(self._memory), UNMAPPED_AT_ONCE):
            self._memory.madvise(mmap.MADV_DONTNEED, start, UNMAPPED_AT_ONCE)
            time.sleep(1e-4)  # passes on Python's lock, which `madvise` keeps
        del self._memory

    def _copy(self, source_block_ids: Sequence[int], destination_block_ids: Sequence[int]) -> None:
        for run in contiguous_runs(source_block_ids, destination_block_ids):
            view = self._cache.block_view(destination_block_ids[run.start], run.stop - run.start)
            start = source_block_ids[run.start] * self._cache.layout.block_bytes
            # NumPy copies with memmove, and without Python's lock.
            numpy.copyto(numpy.frombuffer(view, numpy.uint8), self._source[start : start + len(view)])


def _open(offer: ShmOffer) -> int:
    try:
        # The pid may mean another process by now: O_NONBLOCK lest opening its pipe waits for a writer.
        return os.open(f"/proc/{offer.pid}/fd/{offer.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _unavailable(f"the pool cannot be opened: {error.strerror}") from error


def _map(fd: int, size: int) -> mmap.mmap:
    """The file, read-only, and all of its pages: else the first transfer of each block takes twice as long."""
    try:
        memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except OSError as error:
        raise _unavailable(f"the pool cannot be mapped: {error.strerror}") from error
    # Touched by NumPy, which lets others run. `mmap` would keep Python's lock until MAP_POPULATE is done, 0.1 to 0.35 s
    # for a GiB, in which this worker would send no heartbeat and compute no step.
    numpy.frombuffer(memory, numpy.uint8)[:: mmap.PAGESIZE].max()
    return memory


def _check_pool(fd: int, offer: ShmOffer, epoch: int, cache: KvCache) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != offer.size:
        raise _unavailable("the pool has another size than was offered")
    if not _seals(fd) & fcntl.F_SEAL_SHRINK:
        raise _unavailable("the pool could be shortened while it is read")
    try:
        header = PoolHeader.unpack(os.pread(fd, HEADER_BYTES, 0))
    except ValueError as error:
        raise _unavailable(str(error)) from error
    if header.nonce.hex() != offer.nonce:
        raise _unavailable("the pool's nonce is another than was offered")
    if header.epoch != epoch:
        raise _unavailable(f"the pool is of epoch {header.epoch}, not {epoch}")
    if header.layout_digest != cache.layout.digest or header.block_bytes != cache.layout.block_bytes:
        raise _unavailable("the pool has another layout")
    if HEADER_BYTES + header.num_blocks * header.block_bytes != status.st_size:
        raise _unavailable("the pool has another size than its header says")


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # not every file can have them
        return 0


def _unavailable(problem: str) -> FailedPrecondition:
    return FailedPrecondition(f"shared memory cannot be used: {problem}", reason="SHM_UNAVAILABLE")
