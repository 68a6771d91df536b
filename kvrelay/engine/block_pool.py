"""The pool of KV blocks: who holds which, and which prefix is cached where. Owned by one thread."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

__all__ = ["BlockBooks", "BlockPool", "OutOfBlocks"]


class OutOfBlocks(Exception):
    """Fewer blocks are free than were asked for. Callers ask `num_free` first, so this is a defect."""


class BlockBooks(Protocol):
    """Blocks are free or held by one or more sequences.

    A free block keeps its content and its name until it is allocated again, so a later request with the same prefix
    can take it back. Allocation takes the block that has been free for the longest time.

    Attributes:
        shared: other processes take blocks from the same pool, and give some back.
    """

    @property
    def shared(self) -> bool: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_free(self) -> int: ...

    @property
    def num_held(self) -> int:
        """Blocks that are held by this process."""

    @property
    def num_freed(self) -> int:
        """How often a block has become free, whoever held it. Never falls, and never grows by too little."""

    def locked(self) -> AbstractContextManager[None]:
        """What was asked inside still holds when it is acted upon inside."""

    def expect_growth(self, num_sequences: int) -> int:
        """So many sequences of this process will want more blocks; answers how many of all who share the pool will."""

    def is_free(self, block_id: int) -> bool: ...

    def generation(self, block_id: int) -> int:
        """How often the block has been allocated: tells whether it still holds what somebody once put there."""

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks, of undefined content.

        Raises:
            OutOfBlocks: nothing was taken.
        """

    def share(self, block_ids: Iterable[int]) -> None:
        """Adds a holder to each block, with its content as it is."""

    def join(self, block_ids: Sequence[int], generations: Sequence[int]) -> bool:
        """As `share`, if all blocks are held by somebody, and none has been allocated anew; else nothing happens."""

    def release(self, block_ids: Sequence[int]) -> None:
        """Takes a holder from each block. The last blocks of a prefix are reused before its first.

        Raises:
            ValueError: a block is not held.
        """

    def name(self, block_id: int, digest: bytes) -> None:
        """Makes a full block findable under its digest. The first block of equal content keeps the name."""

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of `digests`. They are not held until they are shared."""

    def check(self, held: Iterable[int]) -> None:
        """Compares the books with the blocks that this process holds in fact, each as often as it is held.

        Raises:
            RuntimeError: naming the first block that differs.
        """


class BlockPool:
    """The `BlockBooks` of a pool that one process has for itself."""

    shared = False

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._generations = [0] * num_blocks
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.num_freed = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free)

    def locked(self) -> AbstractContextManager[None]:
        return nullcontext()

    def expect_growth(self, num_sequences: int) -> int:
        return num_sequences

    def is_free(self, block_id: int) -> bool:
        return self._holders[block_id] == 0

    def generation(self, block_id: int) -> int:
        return self._generations[block_id]

    def allocate(self, count: int) -> list[int]:
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks asked for, {len(self._free)} free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in blocks:
            self._forget(block_id)
            self._holders[block_id] = 1
            self._generations[block_id] += 1
        return blocks

    def share(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            if self._holders[block_id] == 0:
                del self._free[block_id]
            self._holders[block_id] += 1

    def join(self, block_ids: Sequence[int], generations: Sequence[int]) -> bool:
        for block_id, generation in zip(block_ids, generations, strict=True):
            if not 0 <= block_id < self.num_blocks or self._generations[block_id] != generation:
                return False
            if self._holders[block_id] == 0:
                return False
        self.share(block_ids)
        return True

    def release(self, block_ids: Sequence[int]) -> None:
        for block_id in reversed(block_ids):
            if self._holders[block_id] == 0:
                raise ValueError(f"block {block_id} is not held")
            self._holders[block_id] -= 1
            if self._holders[block_id] == 0:
                self._free[block_id] = None
                self.num_freed += 1

    def name(self, block_id: int, digest: bytes) -> None:
        if digest not in self._block_of:
            self._forget(block_id)
            self._block_of[digest] = block_id
            self._digest_of[block_id] = digest

    def find(self, digests: Iterable[bytes]) -> list[int]:
        found = []
        for digest in digests:
            block_id = self._block_of.get(digest)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def check(self, held: Iterable[int]) -> None:
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
