"""Two lists of blocks in arrays that processes share: the free ones by age, and the named ones by name."""

from collections.abc import Iterator

import numpy
from numpy.typing import NDArray

__all__ = ["DigestIndex", "FreeList"]

_NOWHERE = -1


class FreeList:
    """Blocks in the order in which they came, linked in both directions. The last entry of the arrays is the anchor.

    Args:
        counts: `[2]`, how many there are, and how often one has come.
        following, preceding: `[blocks + 1]`; a block that is not in the list has _NOWHERE in both.
    """

    def __init__(self, counts: NDArray[numpy.int64], following: NDArray[numpy.int32], preceding: NDArray[numpy.int32]):
        # Views, because one of their elements is read in half the time of an array's.
        self._counts, self._following, self._preceding = counts.data, following.data, preceding.data
        self._anchor = len(following) - 1
        self._links = preceding

    def __len__(self) -> int:
        return int(self._counts[0])

    @property
    def num_appended(self) -> int:
        """How often a block has come, from the making of the arrays on."""
        return int(self._counts[1])

    def __contains__(self, block_id: int) -> bool:
        return bool(self._preceding[block_id] != _NOWHERE)

    def __iter__(self) -> Iterator[int]:
        block_id = self._following[self._anchor]
        while block_id != self._anchor:
            yield block_id
            block_id = self._following[block_id]

    def members(self) -> NDArray[numpy.bool_]:
        """`[blocks]`, whether each is in the list."""
        return numpy.not_equal(self._links[: self._anchor], _NOWHERE)

    def clear(self) -> None:
        for links in (self._following, self._preceding):
            numpy.asarray(links)[:] = _NOWHERE
            links[self._anchor] = self._anchor
        self._counts[0] = 0

    def append(self, block_id: int) -> None:
        last = self._preceding[self._anchor]
        self._preceding[block_id], self._following[block_id] = last, self._anchor
        self._following[last] = self._preceding[self._anchor] = block_id
        self._counts[0] += 1
        self._counts[1] += 1

    def remove(self, block_id: int) -> None:
        before, after = self._preceding[block_id], self._following[block_id]
        self._following[before], self._preceding[after] = after, before
        self._following[block_id] = self._preceding[block_id] = _NOWHERE
        self._counts[0] -= 1

    def pop_first(self) -> int:
        first = int(self._following[self._anchor])
        self.remove(first)
        return first


class DigestIndex:
    """Digest -> block: a hash table with linear probing (Knuth, The Art of Computer Programming 3, 6.4, algorithm L).

    A digest is where it hashes to, or in the run of occupied places from there on. Removal moves the others of the run
    up (algorithm R), so no place is lost. Digests are hashes already; their first bytes will do.

    Args:
        table: `[a power of two, more than the blocks]`, the block at each place.
        places: `[blocks]`, the place of each block.
        digests: `[blocks, bytes]`.
    """

    def __init__(
        self, table: NDArray[numpy.int32], places: NDArray[numpy.int32], digests: NDArray[numpy.uint8]
    ) -> None:
        self._table, self._places, self._digests = table.data, places.data, digests.reshape(-1).data
        self._digest_bytes = digests.shape[1]
        self._mask = len(table) - 1

    def get(self, digest: bytes) -> int | None:
        place = self._home(digest)
        while (block_id := self._table[place]) != _NOWHERE:
            if self.digest_of(block_id) == digest:
                return int(block_id)
            place = (place + 1) & self._mask
        return None

    def digest_of(self, block_id: int) -> bytes:
        """Of a block that is in the index."""
        start = block_id * self._digest_bytes
        return bytes(self._digests[start : start + self._digest_bytes])

    def add(self, digest: bytes, block_id: int) -> None:
        """Neither of them is in the index yet.

        Raises:
            ValueError: the digest has another length.
        """
        if len(digest) != self._digest_bytes:
            raise ValueError(f"a digest of {len(digest)} bytes, not {self._digest_bytes}")
        start = block_id * self._digest_bytes
        self._digests[start : start + self._digest_bytes] = digest
        place = self._home(digest)
        while self._table[place] != _NOWHERE:
            place = (place + 1) & self._mask
        self._put(block_id, place)

    def remove(self, block_id: int) -> None:
        """A block that is not in the index is passed over."""
        gap = self._places[block_id]
        if gap == _NOWHERE:
            return
        self._places[block_id] = _NOWHERE
        place = gap
        while (candidate := self._table[place := (place + 1) & self._mask]) != _NOWHERE:
            home = self._home(self.digest_of(candidate))
            if (place - home) & self._mask >= (place - gap) & self._mask:
                self._put(candidate, gap)
                gap = place
        self._table[gap] = _NOWHERE

    def clear(self) -> None:
        numpy.asarray(self._table)[:] = _NOWHERE
        numpy.asarray(self._places)[:] = _NOWHERE

    def _home(self, digest: bytes) -> int:
        return int.from_bytes(digest[:8], "little") & self._mask

    def _put(self, block_id: int, place: int) -> None:
        self._table[place] = block_id
        self._places[block_id] = place
