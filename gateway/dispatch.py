"""Puts requests on workers: the router's choice among those that are up, and the wait for one when none is."""

import asyncio
import contextlib
import time
from collections.abc import Collection, Sequence
from types import TracebackType

from gateway.disaggregation import Disaggregation, Link
from gateway.fleet import Connection, Fleet
from gateway.reservation import Reservation
from gateway.route import Prompt, WorkerView
from gateway.router import Router
from gateway.router_memory import WorkerStart
from kvrelay.control.membership import WorkerEntry
from kvrelay.control.registry import LinkRecord, ModelInfo
from kvrelay.engine.prefix import block_digests, root_digest
from kvrelay.errors import Unavailable
from kvrelay.request import Request, WorkerRole, WorkerState

__all__ = ["Dispatch", "Placement"]

# The pull, the release, and the call that they are part of.
HANDOVER_ROUND_TRIPS = 3


class Placement:
    """The workers of one request, which count it as theirs inside the context.

    Attributes:
        request_id: by which the router knows it.
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
        self.request_id = request_id
        self.prefill = prefill
        self.decode = decode
        self.reservation = reservation
        self._router = router

    def start_of(self, worker_id: str) -> WorkerStart | None:
        """Which start of the worker it is, if it is one of these."""
        connections = [connection for connection in (self.prefill, self.decode) if connection is not None]
        return next((each.start for each in connections if each.start[0] == worker_id), None)

    def prefill_done(self) -> None:
        """The prompt has been computed."""
        self._router.prefill_done(self.request_id)

    def __enter__(self) -> "Placement":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._router.finished(self.request_id)


class Dispatch:
    """Knows where requests can go.

    Args:
        wait_seconds: how long a request waits for a worker when there is none.
        mode: who computes prompts.
    """

    def __init__(self, fleet: Fleet, wait_seconds: float, mode: Disaggregation) -> None:
        self._fleet = fleet
        self._wait_seconds = wait_seconds
        self._router = Router(mode)

    def context_length(self, otherwise: int) -> int:
        """Tokens that a request may have on every worker that is up; `otherwise` if none is."""
        return min((entry.record.model.context_length for entry in self._fleet.entries()), default=otherwise)

    async def place(self, request: Request, avoided: Collection[WorkerStart] = ()) -> Placement:
        """Chooses the workers, those to avoid only where there are no others.

        Raises:
            Unavailable: there is no worker of a role that is needed, and none came in time.
        """
        until = time.monotonic() + self._wait_seconds
        while True:
            try:
                return self._choose(request, avoided)
            except Unavailable:
                if time.monotonic() >= until:
                    raise
            await self._wait_for_change(until)

    async def _wait_for_change(self, until: float) -> None:
        # Not asyncio.wait_for, which in Python 3.11 can swallow a cancellation.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(until - time.monotonic()):
                await self._fleet.wait_for_change()

    def can_move(self, placement: Placement) -> bool:
        """Whether there is another decode worker."""
        return any(
            entry.record.role is WorkerRole.DECODE
            and entry.record.worker_id != placement.decode.record.worker_id
            and entry.load.state is WorkerState.READY
            for entry in self._fleet.entries()
        )

    def move(self, placement: Placement, request: Request, avoided: Collection[WorkerStart]) -> None:
        """Chooses another decode worker; those to avoid only where there are no others.

        Raises:
            Unavailable: there is no other.
        """
        entries = self._fleet.entries()
        worker_id = self._router.move(
            placement.request_id,
            _prompt(request, entries),
            [_view(entry) for entry in entries],
            time.monotonic(),
            avoid=_to_avoid(entries, avoided),
        )
        placement.decode = self._fleet.connection(worker_id)

    def link_broke(self, placement: Placement, source_id: str) -> None:
        """The KV cache did not come from this worker to the request's decode worker."""
        prefill = placement.prefill
        if prefill is not None and prefill.record.worker_id == source_id:  # else from a decode worker that drains
            self._router.link_broke(prefill.start, placement.decode.start, time.monotonic())

    def _choose(self, request: Request, avoided: Collection[WorkerStart]) -> Placement:
        entries = self._fleet.entries()
        route = self._router.choose(
            request.request_id,
            _prompt(request, entries),
            [_view(entry) for entry in entries],
            time.monotonic(),
            avoid=_to_avoid(entries, avoided),
        )
        prefill = None if route.prefill_id is None else self._fleet.connection(route.prefill_id)
        decode = self._fleet.connection(route.decode_id)
        return Placement(self._router, request.request_id, prefill, decode, Reservation(route.reserves_late))


def _prompt(request: Request, entries: Sequence[WorkerEntry]) -> Prompt:
    models = {entry.record.model.block_size: entry.record.model for entry in entries}
    return Prompt(len(request.token_ids), {size: _digests(request, model) for size, model in models.items()})


def _digests(request: Request, model: ModelInfo) -> list[bytes]:
    root = root_digest(bytes.fromhex(model.model_digest), request.cache_salt)
    return block_digests(root, request.token_ids, model.block_size)


def _to_avoid(entries: Sequence[WorkerEntry], avoided: Collection[WorkerStart]) -> list[str]:
    starts = [(entry.record.worker_id, entry.record.epoch) for entry in entries]
    return [worker_id for worker_id, epoch in starts if (worker_id, epoch) in avoided]


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
        block_size=record.model.block_size,
        max_batched_tokens=record.max_batched_tokens,
        itl_limit=record.itl_limit,
        epoch=record.epoch,
        draining=load.state is not WorkerState.READY,
        prefill_rate=load.prefill_rate,
        block_bytes=record.model.block_bytes,
        links={link.prefill_worker_id: _link(link) for link in load.links if link.bandwidth > 0},
    )


def _link(record: LinkRecord) -> Link:
    return Link(record.bandwidth, HANDOVER_ROUND_TRIPS * record.latency)
