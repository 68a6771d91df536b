"""The one thread that owns the engine. Others put commands into its mailbox and get events back."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from kvrelay.engine.engine import Engine
from kvrelay.engine.events import StepOutput
from kvrelay.engine.scheduler import Scheduler
from kvrelay.errors import Unavailable

__all__ = ["EngineLoop"]

log = logging.getLogger(__name__)
T = TypeVar("T")
Letter = tuple["Future[Any]", Callable[[Scheduler], Any]]
# An idle engine checks its books this often.
QUIET_SECONDS = 5.0
# One that waits for blocks of other workers looks for them this often.
LOOK_SECONDS = 0.005


class EngineLoop:
    """Steps the engine while there is work, and sleeps on the mailbox while there is none.

    Args:
        deliver: called on the loop's thread after each step that had events; must not block.
    """

    def __init__(self, engine: Engine, deliver: Callable[[StepOutput], None]) -> None:
        self._engine = engine
        self._deliver = deliver
        self._mailbox: queue.SimpleQueue[Letter | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._stopping = False
        self._ended = False
        self._step_began: float | None = None
        self.load = engine.scheduler.load()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the steps in progress."""
        self._stopping = True
        self._mailbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def step_seconds(self) -> float:
        """For how long the step in progress has lasted; 0 between steps. May be asked from any thread."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def tell(self, command: Callable[[Scheduler], T]) -> "Future[T]":
        """Runs the command on the loop's thread between two steps; the future has its result or its exception.

        Raises:
            Unavailable: the loop has ended, or has not begun. If it ends before the command, the future has this error.
        """
        if not self.alive:
            raise _stopped()
        future: Future[T] = Future()
        self._mailbox.put((future, command))
        if self._ended:  # meanwhile, so perhaps nobody reads the mail any more
            self._refuse_mail()
        return future

    def _work(self) -> None:
        try:
            idle = True
            while not self._stopping:
                self._read_mail(wait=idle)
                self._step_began = time.monotonic()
                output = self._engine.step()
                self._step_began = None
                self._publish(output)
                idle = output.idle
            self._publish(self._engine.finish())
        except Exception:
            log.exception("the engine's loop ended")
            raise
        finally:
            self._ended = True
            self._refuse_mail()

    def _publish(self, output: StepOutput) -> None:
        self.load = output.load
        if output.events:
            self._deliver(output)

    def _read_mail(self, wait: bool) -> None:
        """Executes all commands; if there are none and `wait`, sleeps until one comes or a deadline passes."""
        try:
            self._execute(self._mailbox.get(block=wait, timeout=self._patience()))
        except queue.Empty:
            if wait and not self._engine.scheduler.waits_for_others:
                self._engine.scheduler.check_integrity()
        while not self._mailbox.empty():
            self._execute(self._mailbox.get())

    def _patience(self) -> float:
        if self._engine.scheduler.waits_for_others:
            return LOOK_SECONDS
        deadline = self._engine.scheduler.next_deadline
        return QUIET_SECONDS if deadline is None else min(QUIET_SECONDS, max(0.0, deadline - self._engine.clock()))

    def _execute(self, letter: Letter | None) -> None:
        if letter is not None:
            future, command = letter
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(command(self._engine.scheduler))
                except Exception as error:
                    future.set_exception(error)

    def _refuse_mail(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                letter = self._mailbox.get_nowait()
                if letter is not None and letter[0].set_running_or_notify_cancel():
                    letter[0].set_exception(_stopped())


def _stopped() -> Unavailable:
    return Unavailable("the engine of this worker has stopped", reason="ENGINE_STOPPED")
