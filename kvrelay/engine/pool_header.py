"""The page in front of a KV pool in shared memory, by which a reader knows that it opened the right pool."""

import struct
from dataclasses import dataclass

__all__ = ["HEADER_BYTES", "PoolHeader"]

HEADER_BYTES = 4096
_MAGIC = b"kvrelay1"
_VERSION = 1
_FIELDS = struct.Struct("<8sI16sQ32sQQ")


@dataclass(frozen=True, slots=True)
class PoolHeader:
    """What the first page says; the blocks follow at `HEADER_BYTES`, one after another.

    Attributes:
        nonce: 16 random bytes, other for each pool.
        epoch: which start of the worker the pool belongs to; 0 until the worker knows it.
        layout_digest: `KvLayout.digest`.
    """

    nonce: bytes
    epoch: int
    layout_digest: str
    num_blocks: int
    block_bytes: int

    def pack(self) -> bytes:
        digest = bytes.fromhex(self.layout_digest)
        return _FIELDS.pack(_MAGIC, _VERSION, self.nonce, self.epoch, digest, self.num_blocks, self.block_bytes)

    @classmethod
    def unpack(cls, page: bytes | memoryview) -> "PoolHeader":
        """Reads a first page.

        Raises:
            ValueError: it is not one of this version.
        """
        if len(page) < _FIELDS.size:
            raise ValueError("too short for the header of a KV pool")
        magic, version, nonce, epoch, digest, num_blocks, block_bytes = _FIELDS.unpack_from(page)
        if magic != _MAGIC or version != _VERSION:
            raise ValueError("not the header of a KV pool of this version")
        return cls(nonce, epoch, digest.hex(), num_blocks, block_bytes)
