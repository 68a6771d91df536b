"""Which blocks a waiting sequence begins with, and whether there are enough. Policy without tensors."""

from dataclasses import dataclass

from kvrelay.engine.block_pool import BlockBooks
from kvrelay.engine.events import Admitted
from kvrelay.engine.limits import Limits
from kvrelay.engine.prefix_cache import PrefixCache
from kvrelay.engine.sequence import Sequence

__all__ = ["BlockAdmission"]


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Too few blocks were free for a sequence.

    Attributes:
        num_freed: what that of the pool must be for there to be enough, apart from the watermark.
        following: the digest that would make its cached prefix longer; empty if none can.
    """

    sequence: Sequence
    num_freed: int
    following: list[bytes]


class BlockAdmission:
    """Gives a waiting sequence blocks for all its tokens that are known, or none.

    They are those in which another worker has its KV cache, where it may borrow them; else those of its cached prefix,
    and fresh ones for the rest. Some free blocks are left to the sequences that run, which will grow.

    Where the pool is shared, the caller has locked its books.

    Looking up a long prompt takes milliseconds, at each step for as long as it waits, and others wait for the books of
    a shared pool meanwhile. So who was refused is not looked up before there may be another answer.
    """

    def __init__(self, pool: BlockBooks, prefixes: PrefixCache, limits: Limits) -> None:
        self._pool = pool
        self._prefixes = prefixes
        self._limits = limits
        self._refusal: _Refusal | None = None

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
        watermark = self._watermark(num_running)
        if self._is_refused_still(sequence, watermark):
            return False
        cached = self._prefixes.find(sequence)
        fresh = self._limits.blocks_for(len(sequence.token_ids)) - len(cached)
        missing = fresh + sum(map(self._pool.is_free, cached)) - self._pool.num_free
        if missing + watermark > 0:
            following = sequence.digests[len(cached) : len(cached) + 1]
            self._refusal = _Refusal(sequence, self._pool.num_freed + missing, following)
            return False
        self._refusal = None
        self._pool.share(cached)
        sequence.block_table = cached + self._pool.allocate(fresh)
        sequence.num_computed_tokens = len(cached) * self._limits.block_size
        return True

    def _is_refused_still(self, sequence: Sequence, watermark: int) -> bool:
        """Whether it was refused, and what has happened since cannot have changed that.

        It lacks fewer blocks only when others have become free, one for one, or when its cached prefix is longer.
        Whatever else becomes of free blocks and of those in its prefix changes nothing for the better.
        """
        refusal = self._refusal
        return (
            refusal is not None
            and refusal.sequence is sequence
            and refusal.num_freed + watermark > self._pool.num_freed
            and not self._pool.find(refusal.following)
        )

    def _watermark(self, num_running: int) -> int:
        """Blocks that admission leaves to sequences that already run, lest they be preempted at once."""
        return min(self._pool.expect_growth(num_running), self._pool.num_blocks // 16)
