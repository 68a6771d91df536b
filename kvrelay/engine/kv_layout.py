"""What the bytes of a KV block mean. Two workers may exchange blocks only if their layouts are equal."""

import hashlib
from dataclasses import dataclass

__all__ = ["LAYOUT_VERSION", "KvLayout", "blocks_for"]

LAYOUT_VERSION = 1
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def blocks_for(num_tokens: int, block_size: int) -> int:
    """How many blocks hold this many tokens."""
    return -(-num_tokens // block_size)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Block-major: `[block, layer, k|v, slot, kv_head, head_dim]`, so that a block is one contiguous piece of memory.

    Attributes:
        model_digest: SHA-256 over the checkpoint's configuration and weights.
        dtype: name of a torch dtype.
        block_size: slots (tokens) in a block.
        head_dim: elements of one head's key, and of its value.
    """

    model_digest: bytes
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """Of one block: `(layer, k|v, slot, kv_head, head_dim)`."""
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def token_bytes(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * _ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    @property
    def digest(self) -> str:
        """Fingerprint by which the registry shows which workers can be paired."""
        return hashlib.sha256(repr((LAYOUT_VERSION, self)).encode()).hexdigest()

    def blocks_for(self, num_tokens: int) -> int:
        return blocks_for(num_tokens, self.block_size)
