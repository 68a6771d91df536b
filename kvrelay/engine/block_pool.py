"""The pool of KV blocks: who holds which, and which prefix is cached where. Owned by one thread."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

__all__ = ["BlockPool", "OutOfBlocks"]


class OutOfBlocks(Exception):
    """Fewer blocks are free than were asked for. Callers ask `num_free` first, so this is a defect."""


class BlockPool:
    """Blocks are free or held by one or more sequences.

    A free block keeps its content and its name until it is allocated again, so a later request with the same prefix
    can take it back. Allocation takes the block that has been free for the longest time.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._generations = [0] * num_blocks
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def is_free(self, block_id: int) -> bool:
        return self._holders[block_id] == 0

    def generation(self, block_id: int) -> int:
        """How often the block has been allocated: tells whether it still holds what somebody once put there."""
        return self._generations[block_id]

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks, of undefined content.

        Raises:
            OutOfBlocks: nothing was taken.
        """
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks asked for, {len(self._free)} free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in blocks:
            self._forget(block_id)
            self._holders[block_id] = 1
            self._generations[block_id] += 1
        return blocks

    def share(self, block_ids: Iterable[int]) -> None:
        """Adds a holder to each block, with its content as it is."""
        for block_id in block_ids:
            if self._holders[block_id] == 0:
                del self._free[block_id]
            self._holders[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Takes a holder from each block. The last blocks of a prefix are reused before its first."""
        for block_id in reversed(block_ids):
            if self._holders[block_id] == 0:
                raise ValueError(f"block {block_id} is free already")
            self._holders[block_id] -= 1
            if self._holders[block_id] == 0:
                self._free[block_id] = None

    def name(self, block_id: int, digest: bytes) -> None:
        """Makes a full block findable under its digest. The first block of equal content keeps the name."""
        if digest not in self._block_of:
            self._forget(block_id)
            self._block_of[digest] = block_id
            self._digest_of[block_id] = digest

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of `digests`. They are not held until they are shared."""
        found = []
        for digest in digests:
            block_id = self._block_of.get(digest)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def check(self, held: Iterable[int]) -> None:
        """Compares the books with the blocks that are held in fact, each as often as it is held.

        Raises:
            RuntimeError: naming the first block that differs.
        """
        holders = [0] * self.num_blocks
        for block_id in held:
            holders[block_id] += 1
        for block_id, count in enumerate(holders):
            if count != self._holders[block_id] or (count == 0) != (block_id in self._free):
                raise RuntimeError(f"block {block_id}: {self._holders[block_id]} holders on the books, {count} in fact")

    def _forget(self, block_id: int) -> None:
        digest = self._digest_of[block_id]
        if digest is not None:
            del self._block_of[digest]
            self._digest_of[block_id] = None
