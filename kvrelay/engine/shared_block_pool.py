"""The books of a KV pool that several workers of one host share.

Each worker writes to one row of holds, its own; a block is free when nobody's row has it. So what a dead worker held is
known exactly, and free as soon as somebody sees that it is dead: its row's lock can be taken. Names and generations
are the blocks' and stay, so that others find what it had computed. All else (the free blocks in their order, the index
of names) follows from these, and is made anew after a worker that died while it changed the books.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import numpy

from kvrelay.engine.block_pool import OutOfBlocks
from kvrelay.engine.file_locks import Mutex
from kvrelay.engine.pool_file import MUTEX_BYTE, PoolFile
from kvrelay.engine.shared_lists import DigestIndex, FreeList

__all__ = ["SharedBlockPool"]

# How often who is at the books looks for workers that have died.
RECLAIM_SECONDS = 0.25


class SharedBlockPool:
    """A `kvrelay.engine.block_pool.BlockBooks` for one worker of those that have joined a pool file.

    One thread owns it, which may ask and act in several steps inside `locked`. `generation` and `num_free` may be asked
    from any thread.

    Args:
        patience: seconds after which a process that stands still at the books is killed by who waits for it.
    """

    shared = True

    def __init__(self, file: PoolFile, patience: float = 5.0) -> None:
        books = file.books
        self.num_blocks = file.num_blocks
        self._file = file
        self._books = books
        self._own = books.holds[file.slot]
        self._own_counts = self._own.data  # the same, for one block at a time
        self._free = FreeList(books.num_free, books.following, books.preceding)
        self._index = DigestIndex(books.table, books.places, books.digests)
        self._mutex = Mutex(file.fd, MUTEX_BYTE, books.mutex, self._arrive, patience)
        self._reclaimed_at = 0.0
        with self._mutex:
            self._empty(file.slot)  # of who had it before
            books.claims[file.slot] = 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return int(numpy.count_nonzero(self._own))

    @property
    def num_freed(self) -> int:
        return self._free.num_appended

    def locked(self) -> AbstractContextManager[None]:
        """Nobody else changes the books inside."""
        return self._mutex

    def expect_growth(self, num_sequences: int) -> int:
        """So many sequences of this worker will want more blocks; answers how many of all workers will."""
        self._books.growing[self._file.slot] = num_sequences
        return int(self._books.growing.sum())

    def is_free(self, block_id: int) -> bool:
        return block_id in self._free

    def generation(self, block_id: int) -> int:
        return int(self._books.generations[block_id])

    def allocate(self, count: int) -> list[int]:
        with self._mutex:
            if count > len(self._free):
                raise OutOfBlocks(f"{count} blocks asked for, {len(self._free)} free")
            blocks = [self._free.pop_first() for _ in range(count)]
            for block_id in blocks:
                self._index.remove(block_id)
            self._books.generations[blocks] += 1
            self._own[blocks] = 1
        return blocks

    def share(self, block_ids: Iterable[int]) -> None:
        with self._mutex:
            for block_id in block_ids:
                if block_id in self._free:
                    self._free.remove(block_id)
                self._own_counts[block_id] += 1

    def join(self, block_ids: Sequence[int], generations: Sequence[int]) -> bool:
        with self._mutex:
            for block_id, generation in zip(block_ids, generations, strict=True):
                if not 0 <= block_id < self.num_blocks or self.generation(block_id) != generation:
                    return False
                if block_id in self._free:
                    return False
            self.share(block_ids)
        return True

    def release(self, block_ids: Sequence[int]) -> None:
        with self._mutex:
            given_up = []
            for block_id in reversed(block_ids):
                if self._own_counts[block_id] == 0:
                    raise ValueError(f"block {block_id} is not held")
                self._own_counts[block_id] -= 1
                if self._own_counts[block_id] == 0:
                    given_up.append(block_id)
            self._free_those_nobody_holds(given_up)

    def name(self, block_id: int, digest: bytes) -> None:
        with self._mutex:
            if self._index.get(digest) is None:
                self._index.remove(block_id)
                self._index.add(digest, block_id)

    def find(self, digests: Iterable[bytes]) -> list[int]:
        found = []
        with self._mutex:
            for digest in digests:
                block_id = self._index.get(digest)
                if block_id is None:
                    break
                found.append(block_id)
        return found

    def check(self, held: Iterable[int]) -> None:
        in_fact = numpy.bincount(numpy.fromiter(held, numpy.int64), minlength=self.num_blocks)
        with self._mutex:
            for block_id in numpy.flatnonzero(in_fact != self._own):
                booked = self._own[block_id]
                raise RuntimeError(f"block {block_id}: {booked} holders on the books, {in_fact[block_id]} in fact")
            for block_id in numpy.flatnonzero(self._free.members() == self._books.holds.any(axis=0)):
                raise RuntimeError(f"block {block_id}: on the books it is free and held, or neither")

    def check_all(self) -> None:
        """Compares all that can be told from something else in the books. For tests; takes its time.

        Raises:
            RuntimeError: saying what is wrong.
        """
        with self._mutex:
            self._reclaim()
            free, is_held = list(self._free), self._books.holds.any(axis=0)
            if sorted(free) != numpy.flatnonzero(~is_held).tolist() or len(free) != len(self._free):
                raise RuntimeError(f"{len(self._free)} blocks are free, {len(free)} in the list")
            named = numpy.flatnonzero(self._books.places >= 0).tolist()
            if any(self._index.get(self._index.digest_of(block_id)) != block_id for block_id in named):
                raise RuntimeError("a name leads to another block")
            if sorted(filter(lambda block_id: block_id >= 0, self._books.table.tolist())) != named:
                raise RuntimeError("the index has blocks without a name")

    def _arrive(self, is_torn: bool) -> None:
        if is_torn:
            self._rebuild()
        if time.monotonic() - self._reclaimed_at >= RECLAIM_SECONDS:
            self._reclaim()

    def _reclaim(self) -> None:
        """Frees what dead workers hold."""
        self._reclaimed_at = time.monotonic()
        for slot in numpy.flatnonzero(self._books.claims).tolist():
            if slot != self._file.slot and not self._file.lives(slot):
                self._empty(slot)
                self._books.claims[slot] = 0

    def _empty(self, slot: int) -> None:
        row = self._books.holds[slot]
        blocks = numpy.flatnonzero(row)
        row[:] = 0
        self._books.growing[slot] = 0
        self._free_those_nobody_holds(blocks[::-1].tolist())

    def _free_those_nobody_holds(self, block_ids: Sequence[int]) -> None:
        is_held = self._books.holds[:, block_ids].any(axis=0)
        for position in numpy.flatnonzero(~is_held).tolist():
            self._free.append(block_ids[position])

    def _rebuild(self) -> None:
        """Lists anew, from who holds what. No name is trusted."""
        self._index.clear()
        self._free.clear()
        for block_id in numpy.flatnonzero(~self._books.holds.any(axis=0)).tolist():
            self._free.append(block_id)
