"""Which workers a request goes to: a policy that does no I/O and takes the time as an argument."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from gateway.disaggregation import Disaggregation, PromptWork, seconds_local, seconds_split
from gateway.reservation import reserves_late
from gateway.route import Prompt, Route, WorkerView, link_between
from gateway.router_memory import BrokenLinks, PrefixIndex, Sent, WorkerStart
from kvrelay.errors import Unavailable
from kvrelay.request import WorkerRole

__all__ = ["Router"]

BROKEN_LINK_SECONDS = 5.0  # until it is tried again, which costs a request another attempt if it fails


class Router:
    """Chooses workers by load and by the prefixes they probably hold.

    The prompt goes to the prefill worker that will be done with it first, counted in tokens: what is queued there by
    the last heartbeat, what was sent there since, and what of this prompt it has not cached. Decoding goes to the
    worker with the fewest sequences for its free blocks, and among equals to the one that holds most of the prefix.
    Or one decode worker does both, if the mode says so: the one where that costs least. A link that has just broken is
    taken only where there is no other.

    Args:
        mode: who computes prompts.
        max_digests: block digests remembered for each role; the least recently used are forgotten.
    """

    def __init__(self, mode: Disaggregation = Disaggregation.ALWAYS, max_digests: int = 1 << 16) -> None:
        self._mode = mode
        self._prefixes = {role: PrefixIndex(max_digests) for role in (WorkerRole.PREFILL, WorkerRole.DECODE)}
        self._routes: dict[str, Route] = {}
        self._sent: defaultdict[str, Sent] = defaultdict(Sent)  # prompt tokens, by who computes them
        self._promised: defaultdict[str, Sent] = defaultdict(Sent)  # blocks of decode workers
        self._num_decoding: Counter[str] = Counter()
        self._broken = BrokenLinks(BROKEN_LINK_SECONDS)

    def choose(
        self,
        request_id: str,
        prompt: Prompt,
        workers: Collection[WorkerView],
        now: float,
        avoid: Collection[str] = (),
    ) -> Route:
        """Picks the workers and counts the request as theirs until `finished`.

        Chosen again, a request leaves the workers it had before.

        Args:
            now: in seconds, on the clock of the views' `seen_at`.
            avoid: ids of workers to take only where there are no others, such as those that have just failed.

        Raises:
            Unavailable: there is no worker of a role that is needed; reason NO_WORKERS, and the role as
                metadata["stage"].
        """
        self.finished(request_id)
        usable = [worker for worker in workers if not worker.draining]
        prefill, decode = self._choose(prompt, usable, avoid, now)
        computing = prefill or decode
        route = Route(
            prefill_id=None if prefill is None else prefill.worker_id,
            decode_id=decode.worker_id,
            num_uncached_tokens=self._num_uncached(computing, prompt),
            reserves_late=prefill is not None and self._reserves_late(decode, prompt),
        )
        self._remember(computing, prompt)
        self._sent[computing.worker_id].add(request_id, route.num_uncached_tokens, now)
        self._join_decode(request_id, decode, prompt, now)
        self._routes[request_id] = route
        return route

    def move(
        self,
        request_id: str,
        prompt: Prompt,
        workers: Collection[WorkerView],
        now: float,
        avoid: Collection[str] = (),
    ) -> str:
        """Picks another decode worker for a request that has been routed; answers its id.

        Args:
            prompt, workers, now, avoid: as for `choose`.

        Raises:
            Unavailable: there is no other; reason NO_WORKERS.
        """
        route = self._routes[request_id]
        others = [worker for worker in workers if not worker.draining and worker.worker_id != route.decode_id]
        decode = min(_of_role(others, WorkerRole.DECODE, avoid), key=self._cost_of_decoding(prompt))
        self._leave_decode(request_id, route)
        self._join_decode(request_id, decode, prompt, now)
        self._routes[request_id] = replace(route, decode_id=decode.worker_id)
        return decode.worker_id

    def prefill_done(self, request_id: str) -> None:
        """The prompt has been computed; its tokens are queued no more."""
        route = self._routes.get(request_id)
        if route is not None:
            self._sent[route.computed_on].remove(request_id)

    def finished(self, request_id: str) -> None:
        """The request has left its workers, for whatever reason; an unknown one is passed over."""
        self.prefill_done(request_id)
        route = self._routes.pop(request_id, None)
        if route is not None:
            self._leave_decode(request_id, route)

    def link_broke(self, prefill: WorkerStart, decode: WorkerStart, now: float) -> None:
        """A KV cache did not arrive, which neither worker need be to blame for."""
        self._broken.add(prefill, decode, now)

    def _join_decode(self, request_id: str, worker: WorkerView, prompt: Prompt, now: float) -> None:
        self._remember(worker, prompt)
        self._promised[worker.worker_id].add(request_id, prompt.num_blocks(worker.block_size), now)
        self._num_decoding[worker.worker_id] += 1

    def _remember(self, worker: WorkerView, prompt: Prompt) -> None:
        """The worker is going to hold the prompt's prefix."""
        self._prefixes[worker.role].record(worker, prompt.digests[worker.block_size])

    def _leave_decode(self, request_id: str, route: Route) -> None:
        self._promised[route.decode_id].remove(request_id)
        self._num_decoding[route.decode_id] -= 1

    def _choose(
        self, prompt: Prompt, workers: Sequence[WorkerView], avoid: Collection[str], now: float
    ) -> tuple[WorkerView | None, WorkerView]:
        """The prefill worker, or None where the decode worker computes the prompt; and the decode worker."""
        has_prefill = any(worker.role is WorkerRole.PREFILL for worker in workers)
        decoding = _of_role(workers, WorkerRole.DECODE, avoid)
        if self._mode is Disaggregation.NEVER or (self._mode is Disaggregation.AUTO and not has_prefill):
            return None, min(decoding, key=self._cost_of_both(prompt, workers))
        prefill, decode = self._choose_pair(prompt, workers, avoid, now)
        if self._mode is Disaggregation.AUTO:
            whole = min(decoding, key=self._cost_of_both(prompt, workers))
            is_broken = self._broken.has(prefill, decode, now)
            seconds_whole = self._seconds_local(whole, prompt, workers)
            if is_broken or seconds_whole <= self._seconds_split(prefill, decode, prompt, workers):
                return None, whole
        return prefill, decode

    def _choose_pair(
        self, prompt: Prompt, workers: Sequence[WorkerView], avoid: Collection[str], now: float
    ) -> tuple[WorkerView, WorkerView]:
        """A prefill worker and a decode worker, joined by a link that is not broken if there is one."""
        prefilling, decoding = (_of_role(workers, role) for role in (WorkerRole.PREFILL, WorkerRole.DECODE))

        def is_joined(decode: WorkerView) -> bool:
            return not all(self._broken.has(prefill, decode, now) for prefill in prefilling)

        decoding = _preferring(lambda worker: worker.worker_id not in avoid, _preferring(is_joined, decoding))
        decode = min(decoding, key=self._cost_of_decoding(prompt))
        prefilling = _preferring(lambda worker: not self._broken.has(worker, decode, now), prefilling)
        prefilling = _preferring(lambda worker: worker.worker_id not in avoid, prefilling)
        return min(prefilling, key=self._cost_of_prefill(prompt)), decode

    def _cost_of_prefill(self, prompt: Prompt) -> Callable[[WorkerView], tuple[int, int, str]]:
        def cost(worker: WorkerView) -> tuple[int, int, str]:
            queued = self._num_queued(worker) + self._num_uncached(worker, prompt)
            return queued, worker.running + worker.waiting, worker.worker_id

        return cost

    def _cost_of_decoding(self, prompt: Prompt) -> Callable[[WorkerView], tuple[float, int, str]]:
        def cost(worker: WorkerView) -> tuple[float, int, str]:
            tokens_free = max(1, worker.blocks_free) * worker.block_size
            return (self._num_sequences(worker) + 1) / tokens_free, -self._num_held(worker, prompt), worker.worker_id

        return cost

    def _cost_of_both(
        self, prompt: Prompt, workers: Sequence[WorkerView]
    ) -> Callable[[WorkerView], tuple[bool, float, tuple[float, int, str]]]:
        cost_of_decoding = self._cost_of_decoding(prompt)

        def cost(worker: WorkerView) -> tuple[bool, float, tuple[float, int, str]]:
            num_needed = prompt.num_blocks(worker.block_size) + self._num_promised(worker, prompt)
            has_room = worker.blocks_free >= num_needed
            return not has_room, self._seconds_local(worker, prompt, workers), cost_of_decoding(worker)

        return cost

    def _seconds_local(self, worker: WorkerView, prompt: Prompt, workers: Sequence[WorkerView]) -> float:
        return seconds_local(self._work(worker, prompt, workers), self._num_sequences(worker), worker.itl_limit)

    def _seconds_split(
        self, prefill: WorkerView, decode: WorkerView, prompt: Prompt, workers: Sequence[WorkerView]
    ) -> float:
        return seconds_split(
            self._work(prefill, prompt, workers),
            link_between(prefill, decode),
            num_tokens_moved=max(0, prompt.num_tokens - self._num_held(decode, prompt)),
            token_bytes=decode.block_bytes / decode.block_size,
            chunk_tokens=prefill.max_batched_tokens,
        )

    def _work(self, worker: WorkerView, prompt: Prompt, workers: Sequence[WorkerView]) -> PromptWork:
        # Nobody is avoided, or preferred, for want of experience.
        rate = worker.prefill_rate or max(other.prefill_rate for other in workers)
        return PromptWork(self._num_queued(worker), self._num_uncached(worker, prompt), rate)

    def _num_queued(self, worker: WorkerView) -> int:
        """Prompt tokens that are to be computed there: by the last heartbeat, and sent since."""
        return worker.waiting_tokens + self._sent[worker.worker_id].since(worker.seen_at)

    def _num_uncached(self, worker: WorkerView, prompt: Prompt) -> int:
        # The last token is always computed, for its logits.
        return max(1, prompt.num_tokens - self._num_held(worker, prompt))

    def _num_held(self, worker: WorkerView, prompt: Prompt) -> int:
        """Tokens of the prompt whose KV cache the worker probably has."""
        num_blocks = self._prefixes[worker.role].num_blocks(worker, prompt.digests[worker.block_size])
        return num_blocks * worker.block_size

    def _num_sequences(self, worker: WorkerView) -> int:
        # The heartbeat lags behind what this gateway sent, and knows what other gateways sent.
        return max(worker.running + worker.waiting, self._num_decoding[worker.worker_id])

    def _num_promised(self, worker: WorkerView, prompt: Prompt) -> int:
        """Blocks that others are going to take: sent since the heartbeat, or waiting there, as large as this one."""
        waiting = worker.waiting * prompt.num_blocks(worker.block_size)
        return self._promised[worker.worker_id].since(worker.seen_at) + waiting

    def _reserves_late(self, worker: WorkerView, prompt: Prompt) -> bool:
        num_blocks = prompt.num_blocks(worker.block_size)
        return reserves_late(num_blocks, worker.blocks_free, self._num_promised(worker, prompt))


def _of_role(workers: Sequence[WorkerView], role: WorkerRole, avoid: Collection[str] = ()) -> list[WorkerView]:
    """The workers to choose from; those to avoid if there are only such."""
    found = [worker for worker in workers if worker.role == role]
    if not found:
        raise Unavailable(
            f"no {role} worker can take the request",
            reason="NO_WORKERS",
            metadata={"stage": str(role)},
            retry_after=1.0,
        )
    return _preferring(lambda worker: worker.worker_id not in avoid, found)


def _preferring(is_preferred: Callable[[WorkerView], bool], workers: list[WorkerView]) -> list[WorkerView]:
    """The preferred ones; without any, all."""
    return [worker for worker in workers if is_preferred(worker)] or workers
