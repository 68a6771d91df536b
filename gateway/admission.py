"""Who may go on to the workers, and when: the gateway's side of the queue in Redis."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any

from kvrelay.control.request_queue import Admission as QueueAdmission
from kvrelay.control.request_queue import ExistingRequest, Outcome, RequestQueue, Verdict
from kvrelay.errors import AlreadyExists, KvrelayError, Unavailable
from kvrelay.request import QueueStatus

__all__ = ["Admission"]

log = logging.getLogger(__name__)

POLL_SECONDS = 0.3


class Admission:
    """Requests enter, wait for their turn, and leave. A lost Redis refuses the new and disturbs nobody else."""

    def __init__(self, queue: RequestQueue) -> None:
        self._queue = queue
        self._turns: dict[str, asyncio.Event] = {}
        self._poller: asyncio.Task[None] | None = None
        self._farewells: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._poller = asyncio.create_task(self._poll(), name="queue poll")

    async def stop(self) -> None:
        if self._poller is not None:
            self._poller.cancel()
        await asyncio.gather(*self._farewells)

    async def enter(
        self, request_id: str, body_digest: str, priority: int, deadline: float | None
    ) -> ExistingRequest | None:
        """Takes a place. None means that the request is new; then it must `leave`, whatever happens.

        Args:
            deadline: seconds of Unix time.

        Raises:
            AlreadyExists, ResourceExhausted, Unavailable: as `RequestQueue.enter`.
        """
        if request_id in self._turns:
            raise AlreadyExists(f"request_id: {request_id} is in use")
        # Set before the answer, because a promotion may overtake it.
        turn = self._turns[request_id] = asyncio.Event()
        entering = asyncio.create_task(self._queue.enter(request_id, body_digest, priority, deadline, time.time()))
        try:
            admission = await asyncio.shield(entering)
        except asyncio.CancelledError:
            del self._turns[request_id]
            self._in_background(self._withdraw(request_id, entering))
            raise
        except KvrelayError:
            del self._turns[request_id]
            raise
        if admission.verdict is Verdict.EXISTING:
            del self._turns[request_id]
            return admission.existing
        if admission.verdict is Verdict.RUNNING:
            turn.set()
        return None

    async def wait_for_turn(self, request_id: str) -> None:
        await self._turns[request_id].wait()

    def leave(self, request_id: str, outcome: Outcome) -> None:
        """Gives the place to the next; the news goes to Redis in the background."""
        self._turns.pop(request_id, None)
        self._in_background(self._finish(request_id, outcome))

    async def status(self) -> QueueStatus:
        """Raises: Unavailable if Redis cannot be reached."""
        return await self._queue.status()

    def _in_background(self, farewell: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(farewell)
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    async def _withdraw(self, request_id: str, entering: "asyncio.Task[QueueAdmission]") -> None:
        """Nobody waits for the entry any more, but Redis may have made it."""
        with contextlib.suppress(KvrelayError):
            if (await entering).verdict is not Verdict.EXISTING:
                await self._finish(request_id, Outcome.WITHDRAWN)

    async def _finish(self, request_id: str, outcome: Outcome) -> None:
        with contextlib.suppress(Unavailable):
            self._call_up(await self._queue.finish(request_id, outcome))

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                self._call_up(await self._queue.poll())
            except Unavailable:
                log.debug("the queue cannot be polled")

    def _call_up(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            turn = self._turns.get(request_id)
            if turn is not None:
                turn.set()
