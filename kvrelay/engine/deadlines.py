"""Whose time is up, without a look at all who have time left."""

import heapq
from collections.abc import Iterator, Mapping

from kvrelay.engine.sequence import Sequence

__all__ = ["Deadlines"]


class Deadlines:
    """The deadlines of sequences, the earliest first; in seconds on the engine's clock.

    What has ended is not searched for: its entry is passed over when its time comes, or thrown out with others once
    they are more than what is alive.

    Args:
        sequences: those that are alive, by id; whoever calls keeps it up to date.
    """

    def __init__(self, sequences: Mapping[str, Sequence]) -> None:
        self._sequences = sequences
        self._entries: list[tuple[float, str]] = []

    def __len__(self) -> int:
        """Entries, also those of sequences that have ended."""
        return len(self._entries)

    @property
    def earliest(self) -> float | None:
        return self._entries[0][0] if self._entries else None

    def watch(self, sequence: Sequence) -> None:
        """`expired` will name the sequence, once. Watching one again that was named has it named again."""
        if sequence.deadline is None:
            return
        heapq.heappush(self._entries, (sequence.deadline, sequence.request_id))
        if len(self._entries) > 2 * len(self._sequences) + 64:
            self._entries = [(s.deadline, s.request_id) for s in self._sequences.values() if s.deadline is not None]
            heapq.heapify(self._entries)

    def expired(self, now: float) -> Iterator[Sequence]:
        """Takes out the sequences whose deadline has passed. Those it names may be ended meanwhile."""
        while self._entries and self._entries[0][0] <= now:
            _, request_id = heapq.heappop(self._entries)
            sequence = self._sequences.get(request_id)
            # The entry may be of an earlier request with the same id.
            if sequence is not None and sequence.deadline is not None and sequence.deadline <= now:
                yield sequence
