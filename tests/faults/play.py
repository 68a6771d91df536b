"""Plays a schedule on a rig and tells what went against the promises."""

import asyncio
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvrelay.client import Completion
from kvrelay.errors import KvrelayError
from tests.faults.history import Outcome, allowed_errors, faults_of
from tests.faults.proxy import Link
from tests.faults.rig import WORKERS, Rig
from tests.faults.schedules import CATALOG, Kind, Schedule

__all__ = ["Report", "play", "record"]

REQUEST_SECONDS = 40.0  # a guard: what takes so long hangs
WHOLE_SECONDS = 20.0
NUM_RECORDED_AT_ONCE = 4

References = Mapping[int, Completion]


@dataclass(frozen=True)
class Report:
    """What came of a schedule.

    Attributes:
        struck: whether the fault met anybody.
        num_errors: requests that ended with an error that is allowed.
        faults: what went against the promises.
    """

    schedule: Schedule
    struck: bool
    num_errors: int
    seconds: float
    faults: tuple[str, ...]

    def __str__(self) -> str:
        struck = "" if self.struck else " (met nobody)"
        lines = [f"{self.schedule}{struck}: {self.num_errors} errors, {self.seconds:.1f} s", *self.faults]
        return "\n    ".join(lines)


async def record(rig: Rig) -> References:
    """What each request of the catalog brings without faults."""
    limit = asyncio.Semaphore(NUM_RECORDED_AT_ONCE)

    async def run(number: int) -> Completion:
        async with limit:
            return await rig.client.complete(**CATALOG[number], cache_salt="reference")

    completions = await asyncio.gather(*(run(number) for number in range(len(CATALOG))))
    return dict(enumerate(completions))


async def play(rig: Rig, schedule: Schedule, references: References, *, run: str = "") -> Report:
    """Runs the schedule's requests, strikes, heals, and looks at what is left.

    Args:
        run: tells apart the times that one rig plays one seed.
    """
    await _prepare(rig, schedule)
    started = time.monotonic()
    player = _Player(rig, schedule, run)
    outcomes = await player.play()
    faults = []
    for index, outcome in enumerate(outcomes):
        allowed = allowed_errors(schedule.fault, index == schedule.fault.request)
        faults += faults_of(outcome, references[schedule.asks[index]], allowed)
    faults += await _left(rig, outcomes)
    num_errors = sum(outcome.error is not None for outcome in outcomes)
    return Report(schedule, player.has_struck(), num_errors, time.monotonic() - started, tuple(faults))


async def _prepare(rig: Rig, schedule: Schedule) -> None:
    """The target is there; and if it will be lost, somebody else of its kind."""
    fault = schedule.fault
    role = fault.target.partition("-")[0]
    if fault.takes_a_worker:
        await rig.wait_ready(*(name for name in WORKERS if name.startswith(role)))
    elif fault.target in WORKERS:
        await rig.wait_ready(fault.target)
    for kind in ("prefill", "decode"):
        names = [name for name in WORKERS if name.startswith(kind)]

        async def any_is_ready(names: list[str] = names) -> bool:
            return any([await rig.are_ready(name) for name in names])

        await rig.eventually(any_is_ready, 120.0, f"a {kind} worker ready")


async def _left(rig: Rig, outcomes: Sequence[Outcome]) -> list[str]:
    """Blocks, leases, requests in the queue, and spans without an end."""
    deadline = time.monotonic() + WHOLE_SECONDS
    while left := _open_spans(rig, outcomes) or await rig.what_is_left():
        if time.monotonic() > deadline:
            return [f"left: {left}"]
        await asyncio.sleep(0.05)
    return []


def _open_spans(rig: Rig, outcomes: Sequence[Outcome]) -> str:
    """Each request that was heard has one span; who left or failed early may not have been heard."""
    ended = {outcome.request_id: rig.spans.num_ended[outcome.request_id] for outcome in outcomes}
    heard = {outcome.request_id for outcome in outcomes if outcome.chunks}
    wrong = {request_id: count for request_id, count in ended.items() if not (request_id in heard) <= count <= 1}
    return f"spans that ended: {wrong}" if wrong else ""


class _Player:
    def __init__(self, rig: Rig, schedule: Schedule, run: str) -> None:
        self._rig = rig
        self._schedule = schedule
        self._name = f"seed-{schedule.seed}{run}"
        self._outcomes = [Outcome(f"{self._name}-{index}") for index in range(len(schedule.asks))]
        self._num_tokens = 0
        self._progress = asyncio.Condition()
        self._link: Link | None = None
        self._struck = False
        self._num_fired = self._count_fired()

    def has_struck(self) -> bool:
        if self._schedule.fault.kind is Kind.FAILPOINT:
            return self._count_fired() > self._num_fired
        if self._schedule.fault.kind in (Kind.FLIP, Kind.DELAY, Kind.STALL) and self._link is not None:
            return self._link.num_struck > self._num_fired
        return self._struck

    def _count_fired(self) -> int:
        fault = self._schedule.fault
        if fault.kind is Kind.FAILPOINT:
            return self._rig.processes[fault.target].num_fired()
        return self._rig.link(fault.client, fault.target).num_struck if fault.client else 0

    async def play(self) -> list[Outcome]:
        fault = self._schedule.fault
        self._rig.freeze_seconds = fault.seconds
        if fault.failpoint is not None:
            self._rig.processes[fault.target].arm(str(fault.failpoint))
        striker = asyncio.create_task(self._strike_in_time())
        try:
            await asyncio.gather(*(self._ask(index) for index in range(len(self._outcomes))))
        finally:
            striker.cancel()
            await asyncio.gather(striker, return_exceptions=True)
            self._rig.heal()
        return self._outcomes

    async def _ask(self, index: int) -> None:
        fault, outcome = self._schedule.fault, self._outcomes[index]
        is_target = index == fault.request
        timeout = fault.seconds if is_target and fault.kind is Kind.DEADLINE else REQUEST_SECONDS
        # A salt of its own, so that nothing is cached and all blocks travel.
        options = {**CATALOG[self._schedule.asks[index]], "cache_salt": self._name}
        stream = self._rig.client.generate(timeout=timeout, request_id=outcome.request_id, **options)  # type: ignore[arg-type]
        try:
            async for chunk in stream:
                outcome.chunks.append(chunk)
                async with self._progress:
                    self._num_tokens += len(chunk.token_ids)
                    self._progress.notify_all()
                if is_target and fault.kind is Kind.CANCEL and len(outcome.token_ids) >= fault.after_tokens:
                    outcome.has_left = self._struck = True
                    break
        except KvrelayError as error:
            outcome.error = error
            self._struck |= is_target
        finally:
            await stream.close()

    async def _strike_in_time(self) -> None:
        fault = self._schedule.fault
        async with self._progress:
            await self._progress.wait_for(lambda: self._num_tokens >= fault.after_tokens)
        if fault.kind in (Kind.KILL, Kind.FREEZE):
            number = signal.SIGKILL if fault.kind is Kind.KILL else signal.SIGSTOP
            self._rig.processes[fault.target].signal(number)
            self._struck = True
        elif fault.client:
            self._link = self._rig.link(fault.client, fault.target)
            await self._strike_link(self._link)

    async def _strike_link(self, link: Link) -> None:
        fault = self._schedule.fault
        match fault.kind:
            case Kind.CUT | Kind.REFUSE:
                link.refuses = fault.kind is Kind.REFUSE
                self._struck = True
                link.cut()
            case Kind.DELAY:
                link.delay = fault.seconds
                return  # to the end
            case Kind.STALL:
                link.stalled = fault.stalled
            case Kind.FLIP:
                link.num_flips = 1
                return
        await asyncio.sleep(fault.seconds)
        link.heal()
