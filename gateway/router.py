"""Which workers a request goes to: a policy that does no I/O and takes the time as an argument."""

import bisect
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from kvrelay.errors import Unavailable
from kvrelay.request import WorkerRole

__all__ = ["Route", "Router", "WorkerView"]


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as its last heartbeat showed it.

    Attributes:
        running: sequences in its batch.
        waiting: sequences that wait for blocks or for their turn.
        waiting_tokens: prompt tokens still to be computed there.
        blocks_free: KV blocks that a new sequence could take, cached ones included.
        seen_at: when the heartbeat came, in seconds on the clock of the router's caller.
        epoch: grows when the worker restarts, which empties its cache.
        draining: takes no new requests.
    """

    worker_id: str
    role: WorkerRole
    running: int
    waiting: int
    waiting_tokens: int
    blocks_free: int
    seen_at: float
    epoch: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes.

    Attributes:
        num_uncached_tokens: prompt tokens that the prefill worker will probably have to compute.
    """

    prefill_id: str
    decode_id: str
    num_uncached_tokens: int


class Router:
    """Chooses workers by load and by the prefixes they probably hold.

    The prompt goes to the prefill worker that will be done with it first, counted in tokens: what is queued there by
    the last heartbeat, what was sent there since, and what of this prompt it has not cached. Decoding goes to the
    worker with the fewest sequences for its free blocks, and among equals to the one that holds most of the prefix.

    Args:
        block_size: tokens in a KV block.
        max_digests: block digests remembered for each role; the least recently used are forgotten.
    """

    def __init__(self, block_size: int, max_digests: int = 1 << 16) -> None:
        self._block_size = block_size
        self._prefixes = {role: _PrefixIndex(max_digests) for role in (WorkerRole.PREFILL, WorkerRole.DECODE)}
        self._routes: dict[str, Route] = {}
        self._sent: defaultdict[str, _SentTokens] = defaultdict(_SentTokens)
        self._num_decoding: Counter[str] = Counter()

    def choose(
        self,
        request_id: str,
        num_prompt_tokens: int,
        digests: Sequence[bytes],
        workers: Collection[WorkerView],
        now: float,
        avoid: Collection[str] = (),
    ) -> Route:
        """Picks a worker of each role and counts the request as theirs until `finished`.

        Chosen again, a request leaves the workers it had before.

        Args:
            digests: of the prompt's full blocks, as `kvrelay.engine.prefix.block_digests` makes them.
            now: in seconds, on the clock of the views' `seen_at`.
            avoid: ids of workers to take only where there are no others, such as those that have just failed.

        Raises:
            Unavailable: there is no worker of a role; reason NO_WORKERS, and the role as metadata["stage"].
        """
        self.finished(request_id)
        usable = [worker for worker in workers if not worker.draining]
        prefill, num_uncached_tokens = self._choose_prefill(
            num_prompt_tokens, digests, _of_role(usable, WorkerRole.PREFILL, avoid)
        )
        decode = self._choose_decode(digests, _of_role(usable, WorkerRole.DECODE, avoid))
        for worker in (prefill, decode):
            self._prefixes[worker.role].record(worker, digests)
        self._sent[prefill.worker_id].add(request_id, num_uncached_tokens, now)
        self._num_decoding[decode.worker_id] += 1
        route = Route(prefill.worker_id, decode.worker_id, num_uncached_tokens)
        self._routes[request_id] = route
        return route

    def move(
        self, request_id: str, digests: Sequence[bytes], workers: Collection[WorkerView], exclude: Collection[str]
    ) -> str:
        """Picks another decode worker for a request that has been routed; answers its id.

        Raises:
            Unavailable: there is none but those excluded; reason NO_WORKERS.
        """
        usable = [worker for worker in workers if not worker.draining and worker.worker_id not in exclude]
        decode = self._choose_decode(digests, _of_role(usable, WorkerRole.DECODE))
        self._prefixes[decode.role].record(decode, digests)
        route = self._routes[request_id]
        self._num_decoding[route.decode_id] -= 1
        self._num_decoding[decode.worker_id] += 1
        self._routes[request_id] = replace(route, decode_id=decode.worker_id)
        return decode.worker_id

    def prefill_done(self, request_id: str) -> None:
        """The prompt has been computed; its tokens are queued no more."""
        route = self._routes.get(request_id)
        if route is not None:
            self._sent[route.prefill_id].remove(request_id)

    def finished(self, request_id: str) -> None:
        """The request has left its workers, for whatever reason; an unknown one is passed over."""
        self.prefill_done(request_id)
        route = self._routes.pop(request_id, None)
        if route is not None:
            self._num_decoding[route.decode_id] -= 1

    def _choose_prefill(
        self, num_prompt_tokens: int, digests: Sequence[bytes], workers: Sequence[WorkerView]
    ) -> tuple[WorkerView, int]:
        """Returns the worker and how many tokens of the prompt it will have to compute."""

        def num_uncached(worker: WorkerView) -> int:
            num_cached = self._prefixes[worker.role].num_blocks(worker, digests) * self._block_size
            return max(1, num_prompt_tokens - num_cached)  # the last token is always computed, for its logits

        def cost(worker: WorkerView) -> tuple[int, int, str]:
            queued = worker.waiting_tokens + self._sent[worker.worker_id].since(worker.seen_at)
            return queued + num_uncached(worker), worker.running + worker.waiting, worker.worker_id

        best = min(workers, key=cost)
        return best, num_uncached(best)

    def _choose_decode(self, digests: Sequence[bytes], workers: Sequence[WorkerView]) -> WorkerView:
        def cost(worker: WorkerView) -> tuple[float, int, str]:
            # The heartbeat lags behind what this gateway sent, and knows what other gateways sent.
            num_sequences = max(worker.running + worker.waiting, self._num_decoding[worker.worker_id])
            num_held = self._prefixes[worker.role].num_blocks(worker, digests)
            return (num_sequences + 1) / max(1, worker.blocks_free), -num_held, worker.worker_id

        return min(workers, key=cost)


def _of_role(workers: Sequence[WorkerView], role: WorkerRole, avoid: Collection[str] = ()) -> list[WorkerView]:
    """The workers to choose from; those to avoid if there are only such."""
    found = [worker for worker in workers if worker.role == role]
    found = [worker for worker in found if worker.worker_id not in avoid] or found
    if not found:
        raise Unavailable(
            f"no {role} worker can take the request",
            reason="NO_WORKERS",
            metadata={"stage": str(role)},
            retry_after=1.0,
        )
    return found


class _SentTokens:
    """Prompt tokens that were sent to one worker and that its next heartbeat will tell of."""

    def __init__(self) -> None:
        self._sent: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._total = 0

    def add(self, request_id: str, num_tokens: int, now: float) -> None:
        self._sent[request_id] = now, num_tokens
        self._total += num_tokens

    def remove(self, request_id: str) -> None:
        _, num_tokens = self._sent.pop(request_id, (0.0, 0))
        self._total -= num_tokens

    def since(self, seen_at: float) -> int:
        """Forgets what was sent before this heartbeat, and returns the sum of the rest."""
        while self._sent:
            request_id, (sent_at, _) = next(iter(self._sent.items()))
            if sent_at > seen_at:
                break
            self.remove(request_id)
        return self._total


class _PrefixIndex:
    """Which workers probably hold which blocks: bounded, and forgetful of the least recently used."""

    def __init__(self, max_digests: int) -> None:
        self._max_digests = max_digests
        self._epochs: OrderedDict[bytes, dict[str, int]] = OrderedDict()  # by digest and worker id

    def record(self, worker: WorkerView, digests: Sequence[bytes]) -> None:
        """The worker computes or receives these blocks. A prefix is used more recently than what follows it."""
        for digest in reversed(digests):
            self._epochs.setdefault(digest, {})[worker.worker_id] = worker.epoch
            self._epochs.move_to_end(digest)
        while len(self._epochs) > self._max_digests:
            self._epochs.popitem(last=False)

    def num_blocks(self, worker: WorkerView, digests: Sequence[bytes]) -> int:
        """How many of the blocks, from the first on, the worker holds.

        A worker that holds a block here also holds those before it, so a binary search finds the end.
        """

        def missing(digest: bytes) -> bool:
            return self._epochs.get(digest, {}).get(worker.worker_id) != worker.epoch

        return bisect.bisect_left(digests, True, key=missing)
