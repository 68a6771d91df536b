"""The file that workers of one host map as their common KV pool: what it is, the books, then the blocks.

    page 0      what the pool is, as JSON; empty until the rest of the file has been made
    books       the arrays of `Books`, each on a page of its own
    blocks      `[block, layer, k|v, slot, kv_head, head_dim]`, as in a pool of one worker

The first to come makes it. Whoever joins takes a slot: a byte of the file that it keeps locked for as long as it lives,
and a row of the books that nobody else writes to.
"""

import contextlib
import json
import math
import mmap
import os
import stat
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from kvrelay.engine.file_locks import is_locked, lock, try_lock, unlock
from kvrelay.engine.kv_layout import LAYOUT_VERSION, KvLayout
from kvrelay.errors import ConfigurationError
from kvrelay.host import host_id

__all__ = ["DIGEST_BYTES", "MUTEX_BYTE", "NUM_SLOTS", "Books", "PoolFile"]

NUM_SLOTS = 64
DIGEST_BYTES = 32
MUTEX_BYTE = 0  # of those that are locked; they need not hold anything
_JOINING_BYTE = 1
_FIRST_SLOT_BYTE = 2
_PAGE = 4096
_MAGIC = b"kvrelay shared pool 2\0\0\0"
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Books:
    """Who holds which block, and what the blocks are. Arrays in the memory that all workers map, zero at first.

    Attributes:
        mutex: `[2]`, the words of the `Mutex` that guards the rest.
        num_free: `[2]`, the counts of the `FreeList`.
        claims: `[slot]`, the process that writes to a slot's row; 0 for none.
        growing: `[slot]`, sequences of this worker that will want more blocks.
        holds: `[slot, block]`, how often the worker holds the block. Free is what nobody holds.
        generations: `[block]`.
        following, preceding: `[block + 1]`, the links of the `FreeList`.
        table: `[a power of two]` of the `DigestIndex`.
        places: `[block]` of the `DigestIndex`.
        digests: `[block, DIGEST_BYTES]` of the `DigestIndex`.
    """

    mutex: NDArray[numpy.int64]
    num_free: NDArray[numpy.int64]
    claims: NDArray[numpy.int64]
    growing: NDArray[numpy.int64]
    holds: NDArray[numpy.int32]
    generations: NDArray[numpy.int64]
    following: NDArray[numpy.int32]
    preceding: NDArray[numpy.int32]
    table: NDArray[numpy.int32]
    places: NDArray[numpy.int32]
    digests: NDArray[numpy.uint8]


def _shapes(num_blocks: int) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Of the books, in their order."""
    # At most half full, so that a search ends soon.
    table_size = 1 << (2 * num_blocks).bit_length()
    return {
        "mutex": (numpy.int64, (2,)),
        "num_free": (numpy.int64, (2,)),
        "claims": (numpy.int64, (NUM_SLOTS,)),
        "growing": (numpy.int64, (NUM_SLOTS,)),
        "holds": (numpy.int32, (NUM_SLOTS, num_blocks)),
        "generations": (numpy.int64, (num_blocks,)),
        "following": (numpy.int32, (num_blocks + 1,)),
        "preceding": (numpy.int32, (num_blocks + 1,)),
        "table": (numpy.int32, (table_size,)),
        "places": (numpy.int32, (num_blocks,)),
        "digests": (numpy.uint8, (num_blocks, DIGEST_BYTES)),
    }


class PoolFile:
    """A pool file that this process has joined.

    Attributes:
        fd: of the file. No other descriptor of it may be closed by this process.
        memory: the whole file, mapped.
        blocks_offset: where the first block begins.
        nonce: 16 random bytes, other for each pool, which only those know who have it open.
        slot: this process's.
        books: see there.
    """

    def __init__(self, fd: int, num_blocks: int, nonce: bytes, slot: int, size: int) -> None:
        """Takes `fd` over. `PoolFile.join` makes one."""
        self.fd = fd
        self.num_blocks = num_blocks
        self.nonce = nonce
        self.slot = slot
        self.memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.blocks_offset = _blocks_offset(num_blocks)
        self.books = _books(self.memory, num_blocks)

    @classmethod
    def join(cls, path: str, layout: KvLayout, num_blocks: int, check_memory: Callable[[int], None]) -> "PoolFile":
        """Opens the file, or makes it where there is none, and takes a slot.

        Args:
            check_memory: raises ConfigurationError if so many bytes of memory are not there.

        Raises:
            ConfigurationError: it cannot be made, or is not the pool that is wanted; naming what differs.
        """
        if sys.platform != "linux":
            raise ConfigurationError("shared_pool: only Linux has the locks that it needs")
        size = _blocks_offset(num_blocks) + num_blocks * layout.block_bytes
        wanted = {**_description(layout, num_blocks), "nonce": os.urandom(16).hex()}
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(f"shared_pool: {path}: {error.strerror}") from error
        with contextlib.ExitStack() as unless_joined:
            unless_joined.callback(os.close, fd)
            _check_file(path, fd)
            try:
                lock(fd, _JOINING_BYTE)
                found = _read_description(fd)
                if found is None:
                    check_memory(size)
                    _make(fd, size, num_blocks, wanted)
                    found = wanted
                _check_equal(path, found, wanted)
                pool = cls(fd, num_blocks, bytes.fromhex(found["nonce"]), _claim_slot(path, fd), size)
                unlock(fd, _JOINING_BYTE)
            except (OSError, OverflowError) as error:
                raise ConfigurationError(f"shared_pool: {path}: no {size >> 20} MiB for it: {error}") from error
            unless_joined.pop_all()
        return pool

    def lives(self, slot: int) -> bool:
        """Whether the process of a slot, another than the own, is there."""
        return is_locked(self.fd, _FIRST_SLOT_BYTE + slot)

    def close(self) -> None:
        """Gives the slot back, with which all that its row says is void. The mapping goes when nobody uses it."""
        if self.fd >= 0:
            unlock(self.fd, _FIRST_SLOT_BYTE + self.slot)  # which the mapping would keep; it has a descriptor, too
            os.close(self.fd)
            self.fd = -1


def _description(layout: KvLayout, num_blocks: int) -> dict[str, str]:
    """What must be equal for two workers to use one pool; the words are for people, too."""
    fields = {**asdict(layout), "model_digest": layout.model_digest.hex()}
    described = {"layout_version": LAYOUT_VERSION, **fields, "num_blocks": num_blocks, "host": host_id()}
    return {name: str(value) for name, value in described.items()}


def _check_file(path: str, fd: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise ConfigurationError(f"shared_pool: {path}: not a file of this user")


def _read_description(fd: int) -> dict[str, str] | None:
    """None for a file that was not made, or not to its end.

    Raises:
        ConfigurationError: it is a file of something else.
    """
    page = os.pread(fd, _PAGE, 0)
    if not page.strip(b"\0"):
        return None
    try:
        if not page.startswith(_MAGIC):
            raise ValueError
        [length] = _LENGTH.unpack_from(page, len(_MAGIC))
        start = len(_MAGIC) + _LENGTH.size
        found: dict[str, str] = json.loads(page[start : start + length])
    except (ValueError, struct.error):
        raise ConfigurationError("shared_pool: the file is no KV pool of this version") from None
    return found


def _check_equal(path: str, found: dict[str, str], wanted: dict[str, str]) -> None:
    for name, value in wanted.items():
        if name != "nonce" and found.get(name) != value:
            raise ConfigurationError(
                f"shared_pool: {path} has {name} {found.get(name)}, not {value}; all who share it need the same"
            )


def _make(fd: int, size: int, num_blocks: int, description: dict[str, str]) -> None:
    """The description comes last, so that a file that has one is whole."""
    os.ftruncate(fd, 0)
    os.posix_fallocate(fd, 0, size)  # all of its pages, or an error; a page that is missing later would be a SIGBUS
    with mmap.mmap(fd, size) as memory:
        _books(memory, num_blocks).mutex[0] = 1  # as if torn: whoever enters first makes the lists
    text = json.dumps(description).encode()
    os.pwrite(fd, _MAGIC + _LENGTH.pack(len(text)) + text, 0)


def _claim_slot(path: str, fd: int) -> int:
    for slot in range(NUM_SLOTS):
        if try_lock(fd, _FIRST_SLOT_BYTE + slot):
            return slot
    raise ConfigurationError(f"shared_pool: {path}: {NUM_SLOTS} workers share it already")


def _books(memory: mmap.mmap, num_blocks: int) -> Books:
    arrays: dict[str, Any] = {}
    offset = _PAGE
    for name, (kind, shape) in _shapes(num_blocks).items():
        arrays[name] = numpy.frombuffer(memory, kind, math.prod(shape), offset).reshape(shape)
        offset += _num_bytes(kind, shape)
    return Books(**arrays)


def _blocks_offset(num_blocks: int) -> int:
    return _PAGE + sum(_num_bytes(kind, shape) for kind, shape in _shapes(num_blocks).values())


def _num_bytes(kind: type, shape: tuple[int, ...]) -> int:
    """Of an array, to the end of its last page."""
    return -(-math.prod(shape) * numpy.dtype(kind).itemsize // _PAGE) * _PAGE
