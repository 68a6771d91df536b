"""What the router remembers: amounts sent, until a heartbeat tells of them; prefixes, until they age; broken links."""

import bisect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

__all__ = ["BrokenLinks", "PrefixIndex", "Sent", "WorkerStart"]

WorkerStart = tuple[str, int]  # worker id and epoch


class Worker(Protocol):
    """One start of one worker."""

    @property
    def worker_id(self) -> str: ...

    @property
    def epoch(self) -> int: ...


class Sent:
    """Amounts (prompt tokens, or blocks) that were sent to one worker and that its next heartbeat will tell of."""

    def __init__(self) -> None:
        self._sent: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._total = 0

    def add(self, request_id: str, amount: int, now: float) -> None:
        self._sent[request_id] = now, amount
        self._total += amount

    def remove(self, request_id: str) -> None:
        _, amount = self._sent.pop(request_id, (0.0, 0))
        self._total -= amount

    def since(self, seen_at: float) -> int:
        """Forgets what was sent before this heartbeat, and returns the sum of the rest."""
        while self._sent:
            request_id, (sent_at, _) = next(iter(self._sent.items()))
            if sent_at > seen_at:
                break
            self.remove(request_id)
        return self._total


class PrefixIndex:
    """Which workers probably hold which blocks: bounded, and forgetful of the least recently used."""

    def __init__(self, max_digests: int) -> None:
        self._max_digests = max_digests
        self._epochs: OrderedDict[bytes, dict[str, int]] = OrderedDict()  # by digest and worker id

    def record(self, worker: Worker, digests: Sequence[bytes]) -> None:
        """The worker computes or receives these blocks. A prefix is used more recently than what follows it."""
        for digest in reversed(digests):
            self._epochs.setdefault(digest, {})[worker.worker_id] = worker.epoch
            self._epochs.move_to_end(digest)
        while len(self._epochs) > self._max_digests:
            self._epochs.popitem(last=False)

    def num_blocks(self, worker: Worker, digests: Sequence[bytes]) -> int:
        """How many of the blocks, from the first on, the worker holds.

        A worker that holds a block here also holds those before it, so a binary search finds the end.
        """

        def missing(digest: bytes) -> bool:
            return self._epochs.get(digest, {}).get(worker.worker_id) != worker.epoch

        return bisect.bisect_left(digests, True, key=missing)


class BrokenLinks:
    """Links over which a KV cache did not arrive, each for a while; both workers may be well, and go well with others.

    Args:
        seconds: after which a link is tried again.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: dict[tuple[WorkerStart, WorkerStart], float] = {}

    def add(self, prefill: WorkerStart, decode: WorkerStart, now: float) -> None:
        self._until = {link: until for link, until in self._until.items() if until > now}
        self._until[prefill, decode] = now + self._seconds

    def has(self, prefill: Worker, decode: Worker, now: float) -> bool:
        link = (prefill.worker_id, prefill.epoch), (decode.worker_id, decode.epoch)
        return self._until.get(link, now) > now
