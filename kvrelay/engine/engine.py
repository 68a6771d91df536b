"""The engine in three verbs: schedule, launch, commit."""

import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

from kvrelay.engine.events import Event, StepOutput
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import Chunk
from kvrelay.errors import Internal
from kvrelay.request import Token

__all__ = ["Engine", "Launched", "Runner"]

log = logging.getLogger(__name__)


class Launched(Protocol):
    """A step that a device computes, or has computed."""

    def tokens(self) -> list[Token]:
        """Waits for the step; one token for each chunk that samples, in order."""


class Runner(Protocol):
    """What computes a step; `kvrelay.engine.runner.ModelRunner` does it with a model.

    Attributes:
        overlaps: whether the next step may be launched before this one's tokens are known here. The runner then feeds
            them to it by itself, and computes the steps in the order of their launch.
    """

    overlaps: bool

    def launch(self, chunks: Items[Chunk]) -> Launched:
        """Begins to compute the chunks' KV cache in place. What it needs of the sequences it reads at once."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """A step that could not be launched."""

    error: Exception

    def tokens(self) -> list[Token]:
        raise self.error


@dataclass(frozen=True, slots=True)
class _Step:
    """A step in flight, and when the call began that launched it."""

    started: float
    chunks: list[Chunk]
    launched: Launched


class Engine:
    """Sequences in, tokens out. Not thread-safe: `EngineLoop` owns it.

    If the runner overlaps, a step's tokens are committed after the next step has been launched, so that the device
    computes while the scheduler plans.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, clock: Callable[[], float] = time.monotonic) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.clock = clock
        self._in_flight: deque[_Step] = deque()
        self._last_ended = float("-inf")

    def step(self) -> StepOutput:
        """Computes one batch. A batch that cannot be computed fails its own sequences, nobody else's."""
        started = self.clock()
        chunks, events = self.scheduler.schedule(started)
        overlaps = bool(chunks) and self.runner.overlaps
        if chunks:
            self._in_flight.append(_Step(started, chunks, self._launch(chunks)))
            if overlaps:
                self.scheduler.assume(chunks)
        collected = self._collect(len(self._in_flight) - overlaps, events)
        return self._output(events, started, chunks, collected, idle=not chunks and not collected)

    def finish(self) -> StepOutput:
        """Waits for what is in flight, and launches nothing."""
        started, events = self.clock(), list[Event]()
        collected = self._collect(len(self._in_flight), events)
        return self._output(events, started, [], collected, idle=True)

    def _launch(self, chunks: list[Chunk]) -> Launched:
        try:
            return self.runner.launch(chunks)
        except Exception as error:
            return _Failure(error)

    def _collect(self, count: int, events: list[Event]) -> list[_Step]:
        """Commits the oldest steps in flight, adds what happened to the events, and answers with the steps."""
        collected = [self._in_flight.popleft() for _ in range(count)]
        for step in collected:
            try:
                events += self.scheduler.commit(step.chunks, step.launched.tokens())
            except Exception:
                log.exception("a step of %d chunks failed", len(step.chunks))
                error = Internal("the engine could not compute this request", reason="ENGINE_STEP_FAILED")
                events += self.scheduler.fail(step.chunks, error)
        return collected

    def _output(
        self, events: list[Event], started: float, chunks: list[Chunk], collected: list[_Step], idle: bool
    ) -> StepOutput:
        ended = self.clock()
        for step in collected:
            # A device begins a step when it is done with the one before, so steps that overlap share no time.
            self.scheduler.observe(step.chunks, ended - max(step.started, self._last_ended))
        self._last_ended = ended
        num_tokens = sum(chunk.length for chunk in chunks)
        return StepOutput(tuple(events), num_tokens, started, ended, self.scheduler.load(), idle)
