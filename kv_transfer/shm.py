"""The transport within a host: the decode worker reads the prefill worker's pool where it lies, one copy a run.

The pool is a memfd, which others open as `/proc/<pid>/fd/<n>`. That needs the same user, kernel and pid namespace.
Once opened, the memory stays readable even if the prefill worker dies.
"""

import contextlib
import functools
import os
import stat
from collections.abc import Sequence

from kv_transfer.blocks import contiguous_runs
from kv_transfer.threads import run_on_blocks, run_to_end
from kv_transfer.transport import TransferFailed, check_fetch
from kvrelay.control.registry import ShmOffer
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.pool_header import HEADER_BYTES, PoolHeader
from kvrelay.errors import FailedPrecondition
from kvrelay.host import host_id

__all__ = ["ShmReceiver", "offer_pool"]


def offer_pool(cache: KvCache) -> ShmOffer | None:
    """What the registry tells others of this process's pool; None if it is not in memory that can be shared."""
    if cache.fd is None:
        return None
    return ShmOffer(host_id(), os.getpid(), cache.fd, cache.size, cache.nonce.hex())


class ShmReceiver:
    """Reads another process's pool into the own. `open_pool` makes one."""

    name = "shm"
    usable = True

    def __init__(self, fd: int, num_source_blocks: int, cache: KvCache) -> None:
        """Takes over `fd`, an open pool of `num_source_blocks` blocks of the same layout as `cache`."""
        self._fd = fd
        self._num_source_blocks = num_source_blocks
        self._cache = cache

    @classmethod
    def open_pool(cls, offer: ShmOffer | None, epoch: int, cache: KvCache) -> "ShmReceiver":
        """Opens the pool that a prefill worker of this epoch offers.

        Raises:
            FailedPrecondition: it cannot be opened, or is another pool than it should be; reason SHM_UNAVAILABLE.
        """
        if cache.device.type != "cpu":
            raise _unavailable("this worker's KV pool is not in the CPU's memory")
        if offer is None:
            raise _unavailable("the prefill worker does not offer its pool")
        if offer.host_id != host_id():
            raise _unavailable("the prefill worker is on another host")
        fd = _open(offer)
        with contextlib.ExitStack() as unless_right:
            unless_right.callback(os.close, fd)
            header = _check_header(fd, offer, epoch, cache)
            unless_right.pop_all()
        return cls(fd, header.num_blocks, cache)

    async def receive(self, source_block_ids: Sequence[int], destination_block_ids: Sequence[int], data: bytes) -> None:
        check_fetch(source_block_ids, self._num_source_blocks, data)
        copy = functools.partial(self._copy, source_block_ids, destination_block_ids)
        await run_on_blocks(self._cache, len(destination_block_ids), copy)

    async def probe(self, num_bytes: int) -> int:
        return await run_to_end(functools.partial(self._read_into_scratch, num_bytes))

    def close(self) -> None:
        os.close(self._fd)

    def _read_into_scratch(self, num_bytes: int) -> int:
        scratch = memoryview(bytearray(min(num_bytes, self._num_source_blocks * self._cache.layout.block_bytes)))
        return os.preadv(self._fd, [scratch], HEADER_BYTES)

    def _copy(self, source_block_ids: Sequence[int], destination_block_ids: Sequence[int]) -> None:
        block_bytes = self._cache.layout.block_bytes
        for run in contiguous_runs(source_block_ids, destination_block_ids):
            count = run.stop - run.start
            view = self._cache.block_view(destination_block_ids[run.start], count)
            offset = HEADER_BYTES + source_block_ids[run.start] * block_bytes
            try:
                num_read = os.preadv(self._fd, [view], offset)
            except OSError as error:
                raise TransferFailed(f"the pool cannot be read: {error.strerror}", reason="SHM_UNREADABLE") from error
            if num_read != len(view):
                raise TransferFailed(f"{num_read} bytes read instead of {len(view)}", reason="SHORT_READ")


def _open(offer: ShmOffer) -> int:
    try:
        # The pid may mean another process by now: O_NONBLOCK lest opening its pipe waits for a writer.
        return os.open(f"/proc/{offer.pid}/fd/{offer.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _unavailable(f"the pool cannot be opened: {error.strerror}") from error


def _check_header(fd: int, offer: ShmOffer, epoch: int, cache: KvCache) -> PoolHeader:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != offer.size:
        raise _unavailable("the pool has another size than was offered")
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
    return header


def _unavailable(problem: str) -> FailedPrecondition:
    return FailedPrecondition(f"shared memory cannot be used: {problem}", reason="SHM_UNAVAILABLE")
