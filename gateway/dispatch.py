"""Puts requests on workers: the router's choice among those that are up, and the wait for one when none is."""

import asyncio
import contextlib
import time
from types import TracebackType

from gateway.disaggregation import Costs
from gateway.fleet import Connection, Fleet
from gateway.reservation import Reservation
from gateway.router import Router, WorkerView
from kvrelay.control.membership import WorkerEntry
from kvrelay.engine.prefix import block_digests, root_digest
from kvrelay.errors import Unavailable
from kvrelay.request import Request, WorkerState

__all__ = ["Dispatch", "Placement"]


class Placement:
    """The workers of one request, which count it as theirs inside the context.

    Attributes:
        prefill: None where the decode worker computes the prompt, too.
        reservation: when the decode worker may be asked.
    """

    def __init__(
        self,
        router: Router,
        request_id: str,
        prefill: Connection | None,
        decode: Connection,
        reservation: Reservation,
    ) -> None:
        self.prefill = prefill
        self.decode = decode
        self.reservation = reservation
        self._router = router
        self._request_id = request_id

    def prefill_done(self) -> None:
        """The prompt has been computed."""
        self._router.prefill_done(self._request_id)

    def __enter__(self) -> "Placement":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._router.finished(self._request_id)


class Dispatch:
    """Knows where requests can go.

    Args:
        block_size: of the workers' KV blocks, in which their prefix caches count.
        wait_seconds: how long a request waits for a worker when there is none.
        costs: of moving a prompt's KV cache, or not; by default it is always moved.
    """

    def __init__(self, fleet: Fleet, block_size: int, wait_seconds: float, costs: Costs | None = None) -> None:
        self._fleet = fleet
        self._block_size = block_size
        self._wait_seconds = wait_seconds
        self._router = Router(block_size, costs=costs)

    def context_length(self, otherwise: int) -> int:
        """Tokens that a request may have on every worker that is up; `otherwise` if none is."""
        return min((entry.record.model.context_length for entry in self._fleet.entries()), default=otherwise)

    async def place(self, request: Request) -> Placement:
        """Chooses the workers.

        Raises:
            Unavailable: there is no worker of a role that is needed, and none came in time.
        """
        until = time.monotonic() + self._wait_seconds
        while True:
            try:
                return self._choose(request)
            except Unavailable:
                if time.monotonic() >= until:
                    raise
            await self._wait_for_change(until)

    async def _wait_for_change(self, until: float) -> None:
        # Not asyncio.wait_for, which in Python 3.11 can swallow a cancellation.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(until - time.monotonic()):
                await self._fleet.wait_for_change()

    def _choose(self, request: Request) -> Placement:
        entries = self._fleet.entries()
        prompt = request.prompt_token_ids
        digests: list[bytes] = []
        if entries:
            root = root_digest(bytes.fromhex(entries[0].record.model.model_digest), request.cache_salt)
            digests = block_digests(root, prompt, self._block_size)
        views = [_view(entry) for entry in entries]
        route = self._router.choose(request.request_id, len(prompt), digests, views, time.monotonic())
        prefill = None if route.prefill_id is None else self._fleet.connection(route.prefill_id)
        decode = self._fleet.connection(route.decode_id)
        return Placement(self._router, request.request_id, prefill, decode, Reservation(route.reserves_late))


def _view(entry: WorkerEntry) -> WorkerView:
    record, load = entry.record, entry.load
    return WorkerView(
        worker_id=record.worker_id,
        role=record.role,
        running=load.running,
        waiting=load.waiting,
        waiting_tokens=load.waiting_tokens,
        blocks_free=load.blocks_free,
        seen_at=entry.seen_at,
        epoch=record.epoch,
        draining=load.state is WorkerState.DRAINING,
        prefill_rate=load.prefill_rate,
        block_bytes=record.model.block_bytes,
    )
