"""Which blocks a waiting sequence begins with, and whether there are enough. Policy without tensors."""

from kvrelay.engine.block_pool import BlockBooks
from kvrelay.engine.events import Admitted
from kvrelay.engine.limits import Limits
from kvrelay.engine.prefix_cache import PrefixCache
from kvrelay.engine.sequence import Sequence

__all__ = ["BlockAdmission"]


class BlockAdmission:
    """Gives a waiting sequence blocks for all its tokens that are known, or none.

    They are those in which another worker has its KV cache, where it may borrow them; else those of its cached prefix,
    and fresh ones for the rest. Some free blocks are left to the sequences that run, which will grow.

    Where the pool is shared, the caller has locked its books.
    """

    def __init__(self, pool: BlockBooks, prefixes: PrefixCache, limits: Limits) -> None:
        self._pool = pool
        self._prefixes = prefixes
        self._limits = limits

    def admit(self, sequence: Sequence, num_running: int) -> Admitted | None:
        """Answers with the blocks that the sequence has got; None if too few are free.

        Args:
            num_running: sequences of this process that will want more blocks.
        """
        borrowed = self._borrow(sequence)
        if not borrowed and not self._reserve(sequence, num_running):
            return None
        blocks, num_cached = tuple(sequence.block_table), sequence.num_computed_tokens // self._limits.block_size
        generations = tuple(map(self._pool.generation, blocks))
        return Admitted(sequence.request_id, blocks, generations, num_cached, borrowed)

    def _borrow(self, sequence: Sequence) -> bool:
        """Holds the blocks in which another worker has its KV cache, if it may have them, and they are still that."""
        borrowed, sequence.borrowed = sequence.borrowed, None
        if borrowed is None or len(borrowed.block_ids) != self._limits.blocks_for(len(sequence.token_ids)):
            return False
        if not self._pool.join(borrowed.block_ids, borrowed.generations):
            return False
        sequence.block_table = list(borrowed.block_ids)
        return True

    def _reserve(self, sequence: Sequence, num_running: int) -> bool:
        """Holds the blocks of its cached prefix, and takes fresh ones for the rest."""
        cached = self._prefixes.find(sequence)
        idle = sum(self._pool.is_free(block) for block in cached)
        fresh = self._limits.blocks_for(len(sequence.token_ids)) - len(cached)
        if fresh + idle + self._watermark(num_running) > self._pool.num_free:
            return False
        self._pool.share(cached)
        sequence.block_table = cached + self._pool.allocate(fresh)
        sequence.num_computed_tokens = len(cached) * self._limits.block_size
        return True

    def _watermark(self, num_running: int) -> int:
        """Blocks that admission leaves to sequences that already run, lest they be preempted at once."""
        return min(self._pool.expect_growth(num_running), self._pool.num_blocks // 16)
