"""The engine as an asyncio program sees it: submit a sequence, be called with its events."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from kvrelay.engine.engine import Engine
from kvrelay.engine.events import EngineLoad, Event, Failed, Finished, StepOutput
from kvrelay.engine.loop import EngineLoop
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import Sequence
from kvrelay.errors import AlreadyExists, Internal, KvrelayError

__all__ = ["AsyncEngine", "Listener"]

log = logging.getLogger(__name__)

Listener = Callable[[Event, StepOutput], None]
T = TypeVar("T")


class AsyncEngine:
    """Carries commands to the engine's thread and its events back to the event loop, one crossing a step each way.

    Attributes:
        on_step: called on the event loop after the listeners have had all events of a step.
    """

    def __init__(self, engine: Engine) -> None:
        self.on_step: Callable[[], None] = lambda: None
        self._engine_loop = EngineLoop(engine, self._deliver)
        self._pool = engine.scheduler.pool
        self._listeners: dict[str, Listener] = {}
        self._leaving: dict[str, asyncio.Future[None]] = {}  # ids whose former sequence is being ended
        self._event_loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """To be called on the event loop that is to receive the events."""
        self._event_loop = asyncio.get_running_loop()
        self._engine_loop.start()

    def stop(self) -> None:
        self._engine_loop.stop()

    @property
    def alive(self) -> bool:
        return self._engine_loop.alive

    def step_seconds(self) -> float:
        """As `EngineLoop.step_seconds`."""
        return self._engine_loop.step_seconds()

    @property
    def load(self) -> EngineLoad:
        """As it was after the last step; but free blocks as they are, for others may have taken them since."""
        return replace(self._engine_loop.load, blocks_free=self._pool.num_free)

    async def submit(self, sequence: Sequence, listener: Listener) -> None:
        """Queues a sequence. The listener is called on the event loop, in order, until Finished or Failed.

        Raises:
            AlreadyExists, InvalidArgument: as `Scheduler.add`.
            Unavailable: the engine has stopped.
        """
        request_id = sequence.request_id
        while request_id in self._leaving:
            # What the engine still tells of the former sequence with this id is not this listener's.
            await asyncio.wait([self._leaving[request_id]])
        if request_id in self._listeners:
            raise AlreadyExists(f"request {request_id} is on this worker already", reason="ALREADY_ON_WORKER")
        # Set before the answer, because the events of the first step may overtake it.
        self._listeners[request_id] = listener
        try:
            await self.ask(lambda scheduler: scheduler.add(sequence))
        except KvrelayError:
            del self._listeners[request_id]
            raise
        except asyncio.CancelledError:
            # It may have been added, or may be about to be; commands are executed in order.
            self.abort(request_id)
            raise

    async def ask(self, command: Callable[[Scheduler], T]) -> T:
        """Runs a command between two steps and waits for its result."""
        return await asyncio.wrap_future(self._engine_loop.tell(command))

    def tell(self, command: Callable[[Scheduler], None]) -> None:
        """Runs a command between two steps, without waiting. Nothing happens if the engine has stopped."""
        if self.alive:
            self._engine_loop.tell(command)

    def abort(self, request_id: str) -> None:
        """Ends a sequence and stops listening to it."""
        self._listeners.pop(request_id, None)
        if self.alive and request_id not in self._leaving:
            leaving = asyncio.wrap_future(self._engine_loop.tell(lambda scheduler: scheduler.forget(request_id)))
            self._leaving[request_id] = leaving
            leaving.add_done_callback(lambda future: self._left(request_id, future))

    def _left(self, request_id: str, future: "asyncio.Future[None]") -> None:
        del self._leaving[request_id]
        if not future.cancelled() and (error := future.exception()) is not None:
            log.debug("request %s ended with the engine: %s", request_id, error)

    def generation(self, block_id: int) -> int:
        """As `BlockBooks.generation`, at this moment; may be asked from any thread."""
        return self._pool.generation(block_id)

    def _deliver(self, output: StepOutput) -> None:
        if self._event_loop is not None and not self._event_loop.is_closed():
            self._event_loop.call_soon_threadsafe(self._dispatch, output)

    def _dispatch(self, output: StepOutput) -> None:
        for event in output.events:
            listener = self._listeners.get(event.request_id)
            if listener is not None:
                if isinstance(event, Finished | Failed):
                    del self._listeners[event.request_id]
                self._tell_listener(listener, event, output)
        self.on_step()

    def _tell_listener(self, listener: Listener, event: Event, output: StepOutput) -> None:
        try:
            listener(event, output)
        except Exception:
            # One listener's defect must not cost the others their events; its own request ends.
            log.exception("the listener of request %s failed", event.request_id)
            error = Internal("the worker failed to pass on a result", reason="LISTENER_FAILED")
            self.tell(lambda scheduler: scheduler.abort(event.request_id, error))
