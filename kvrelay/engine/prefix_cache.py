"""Which blocks of a sequence others may share, and which of others' blocks it may."""

from kvrelay.engine.block_pool import BlockBooks
from kvrelay.engine.prefix import block_digests, root_digest
from kvrelay.engine.sequence import Role, Sequence

__all__ = ["PrefixCache"]


class PrefixCache:
    """Names the full blocks of sequences in the pool, and finds those that are named already.

    Args:
        block_size: tokens in a block.
        model_digest: where the names begin.
        enabled: if not, nothing is named, and nothing found.
    """

    def __init__(self, pool: BlockBooks, block_size: int, model_digest: bytes, enabled: bool) -> None:
        self._pool = pool
        self._block_size = block_size
        self._model_digest = model_digest
        self._enabled = enabled

    def find(self, sequence: Sequence) -> list[int]:
        """The blocks of its longest cached prefix. They are not held until they are shared."""
        if not self._enabled:
            return []
        # Who samples here must compute its last token, also if that one is cached.
        num_usable = len(sequence.token_ids) - (sequence.role is not Role.DECODE)
        self._extend_digests(sequence, num_usable)
        return self._pool.find(sequence.digests[: num_usable // self._block_size])

    def advance(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """The KV cache is final up to here; full blocks can be found from now on."""
        first = sequence.num_computed_tokens // self._block_size
        end = num_computed_tokens // self._block_size
        sequence.num_computed_tokens = num_computed_tokens
        if self._enabled and end > first:
            self._extend_digests(sequence, num_computed_tokens)
            with self._pool.locked():
                for index in range(first, end):
                    self._pool.name(sequence.block_table[index], sequence.digests[index])

    def _extend_digests(self, sequence: Sequence, num_tokens: int) -> None:
        """Extends the sequence's digests to all full blocks of its first `num_tokens` tokens."""
        size, known = self._block_size, len(sequence.digests)
        if num_tokens // size > known:
            root = sequence.digests[-1] if known else root_digest(self._model_digest, sequence.request.cache_salt)
            sequence.digests += block_digests(root, sequence.token_ids[known * size : num_tokens], size)
