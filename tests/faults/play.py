"""Plays a schedule on a rig and tells what went against the promises."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvrelay.client import Completion, GenerateOptions
from kvrelay.errors import KvrelayError, Unavailable
from tests.faults.catalog import CATALOG
from tests.faults.faults import Fault, Kind
from tests.faults.history import Outcome, excuses, too_many_defects, violations_of
from tests.faults.rig import DECODE, PREFILL, WORKERS, Rig
from tests.faults.schedules import Schedule
from tests.faults.strikes import Strike

__all__ = ["References", "Report", "check_promises", "play", "record"]

REQUEST_SECONDS = 40.0  # a guard: what takes so long hangs
AGAIN_SECONDS = 30.0  # the same, for a gateway or Redis to be back
RETRY_SECONDS = 0.1
WHOLE_SECONDS = 20.0
NUM_RECORDED_AT_ONCE = 4

References = Mapping[int, Completion]


@dataclass(frozen=True)
class Report:
    """What came of a schedule.

    Attributes:
        met: whether each fault met anybody.
        num_errors: requests that ended with an error that is allowed.
        violations: what went against the promises.
    """

    schedule: Schedule
    met: tuple[bool, ...]
    num_errors: int
    seconds: float
    violations: tuple[str, ...]

    @property
    def struck(self) -> bool:
        """Whether any fault met anybody."""
        return any(self.met)

    def __str__(self) -> str:
        met = "" if all(self.met) else " (one met nobody)" if self.struck else " (met nobody)"
        lines = [f"{self.schedule}{met}: {self.num_errors} errors, {self.seconds:.1f} s", *self.violations]
        return "\n    ".join(lines)


async def record(rig: Rig) -> References:
    """What each request of the catalog brings without faults."""
    limit = asyncio.Semaphore(NUM_RECORDED_AT_ONCE)

    async def run(number: int) -> Completion:
        async with limit:
            options: GenerateOptions = {**CATALOG[number], "cache_salt": "reference"}
            return await rig.client.complete(**options)

    completions = await asyncio.gather(*(run(number) for number in range(len(CATALOG))))
    return dict(enumerate(completions))


async def play(rig: Rig, schedule: Schedule, references: References, *, run: str = "") -> Report:
    """Runs the schedule's requests, strikes, heals, and looks at what is left.

    Args:
        run: tells apart the times that one rig plays one seed.
    """
    with rig.asking(schedule.gateway):
        await _prepare(rig, schedule)
        return await _play(rig, schedule, references, run)


def check_promises(rig: Rig, reports: Sequence[Report]) -> None:
    """Raises AssertionError with what went against them, and how those schedules are played again."""
    bad = [report for report in reports if report.violations]
    flags = "--shared-pool --seed" if rig.shares_pool else "--seed"
    again = f"again: scripts/faults {flags} {' '.join(str(report.schedule.seed) for report in bad)}"
    assert not bad, "\n".join([*map(str, bad), rig.logs(), again])


async def _play(rig: Rig, schedule: Schedule, references: References, run: str) -> Report:
    started = time.monotonic()
    player = _Player(rig, schedule, run)
    await player.play()
    violations = []
    for outcome in player.outcomes:
        violations += violations_of(outcome, references[outcome.ask], excuses(player.met, outcome.index))
    violations += too_many_defects(player.outcomes, player.met)
    for outcome in player.asked_again:
        violations += violations_of(outcome, references[outcome.ask], ())
    violations += await _drained(player)
    violations += await _left(rig, player)
    num_errors = sum(outcome.error is not None for outcome in player.outcomes)
    return Report(schedule, player.struck(), num_errors, time.monotonic() - started, tuple(violations))


async def _prepare(rig: Rig, schedule: Schedule) -> None:
    """The targets are there; and if one will be lost, or out of reach, somebody else of its kind."""
    wanted = {fault.target for fault in schedule.faults if fault.target in WORKERS}
    for fault in schedule.faults:
        if fault.takes_a_worker or fault.takes_a_link:
            wanted |= set(PREFILL if fault.target in PREFILL else DECODE)
    await rig.wait_ready(*sorted(wanted))
    for kind in (PREFILL, DECODE):

        async def any_is_ready(names: Sequence[str] = kind) -> bool:
            return any([await rig.are_ready(name) for name in names])

        await rig.eventually(any_is_ready, 120.0, f"one of {', '.join(kind)} ready")


async def _drained(player: "_Player") -> list[str]:
    """Who was asked to drain, and not killed meanwhile, has ended well."""
    killed = {fault.target for fault in player.met if fault.action == "kill"}
    problems = []
    for strike in player.strikes:
        target = strike.fault.target
        if strike.fault.kind is Kind.DRAIN and strike.met_somebody and target not in killed:
            code = await strike.exit_code()
            problems += [f"{target} drained and ended with exit code {code}"] if code else []
    return problems


async def _left(rig: Rig, player: "_Player") -> list[str]:
    """Blocks, leases, requests in the queue, spans without an end, and processes that ended of their own accord."""
    deadline = time.monotonic() + WHOLE_SECONDS
    while left := _open_spans(rig, player) or await rig.what_is_left():
        if time.monotonic() > deadline:
            return [f"left: {left}"]
        await asyncio.sleep(0.05)
    return [f"{name} ended with exit code {code}" for name, code in rig.unexplained_ends()]


def _open_spans(rig: Rig, player: "_Player") -> str:
    """Each try that was heard has one span, if its gateway lived to tell; who failed early may not have been heard.

    After a freeze, a second try may join the first one, which still runs and whose client has left.
    """
    gateway_lost_by = {fault.kind for fault in player.met if fault.takes_the_gateway}
    tries, heard = Counter[str](), Counter[str]()
    for outcome in (*player.outcomes, *player.asked_again):
        tries[outcome.request_id] += outcome.num_tries
        heard[outcome.request_id] += bool(outcome.chunks)
    if Kind.KILL in gateway_lost_by:
        heard.clear()
    elif Kind.FREEZE in gateway_lost_by:
        heard = Counter(name for name, count in heard.items() if count)
    ended = rig.spans.num_ended
    wrong = {name: ended[name] for name in tries if not heard[name] <= ended[name] <= tries[name]}
    return f"spans that ended: {wrong}" if wrong else ""


class _Player:
    """Asks the requests of one schedule and lets its faults strike.

    Attributes:
        outcomes: of the requests.
        asked_again: of those that were refused or lost with their gateway, in another try, and of one new request.
    """

    def __init__(self, rig: Rig, schedule: Schedule, run: str) -> None:
        self._rig = rig
        self._schedule = schedule
        self._name = f"seed-{schedule.seed}{run}"
        self.outcomes = [Outcome(f"{self._name}-{index}", ask, index) for index, ask in enumerate(schedule.asks)]
        self.asked_again: list[Outcome] = []
        self._late = asyncio.Event()
        self.strikes = [Strike(rig, fault, self._late.set) for fault in schedule.faults if not fault.is_of_a_client]
        self._struck_clients: set[Fault] = set()
        self._num_tokens = 0
        self._progress = asyncio.Condition()

    @property
    def met(self) -> list[Fault]:
        """The faults that met somebody."""
        return [fault for fault, struck in zip(self._schedule.faults, self.struck(), strict=True) if struck]

    def struck(self) -> tuple[bool, ...]:
        """Of each fault, whether it met somebody."""
        met = self._struck_clients | {strike.fault for strike in self.strikes if strike.met_somebody}
        return tuple(fault in met for fault in self._schedule.faults)

    async def play(self) -> None:
        num_early = len(self.outcomes) - self._schedule.num_late
        for strike in self.strikes:
            strike.arm()
        striking = [strike for strike in self.strikes if strike.fault.failpoint is None]
        strikers = [asyncio.create_task(self._strike_in_time(strike)) for strike in striking]
        late = asyncio.gather(*(self._ask_late(outcome) for outcome in self.outcomes[num_early:]))
        try:
            await asyncio.gather(*(self._ask(outcome) for outcome in self.outcomes[:num_early]))
            self._late.set()  # whether or not a fault has struck
            await late
        finally:
            late.cancel()
            for striker in strikers:
                striker.cancel()
            ends = await asyncio.gather(late, *strikers, return_exceptions=True)
            self._rig.heal()
        for defect in (end for end in ends if isinstance(end, Exception)):
            raise defect
        if any(fault.takes_redis or fault.takes_the_gateway or fault.kind is Kind.WIPE for fault in self.met):
            await self._ask_again()

    async def _ask_late(self, outcome: Outcome) -> None:
        await self._late.wait()
        await self._ask(outcome)

    async def _ask_again(self) -> None:
        """Under their ids, those that ended with an error; and a new one, for which everything has to work again."""
        failed = [outcome for outcome in self.outcomes if isinstance(outcome.error, Unavailable)]
        again = [Outcome(outcome.request_id, outcome.ask) for outcome in failed]
        self.asked_again = [*again, Outcome(f"{self._name}-new", self._schedule.asks[0])]
        await asyncio.gather(*(self._ask_until_it_works(outcome) for outcome in self.asked_again))

    async def _ask_until_it_works(self, outcome: Outcome) -> None:
        deadline = time.monotonic() + AGAIN_SECONDS
        await self._ask(outcome)
        while isinstance(outcome.error, Unavailable) and not outcome.chunks and time.monotonic() < deadline:
            await asyncio.sleep(RETRY_SECONDS)
            outcome.error = None
            await self._ask(outcome)

    async def _ask(self, outcome: Outcome) -> None:
        of_mine = [fault for fault in self._schedule.faults if fault.request == outcome.index]
        timeout = next((fault.seconds for fault in of_mine if fault.kind is Kind.DEADLINE), REQUEST_SECONDS)
        # A salt of its own, so that nothing is cached and all blocks travel.
        options: GenerateOptions = {**CATALOG[outcome.ask], "cache_salt": self._name, "request_id": outcome.request_id}
        outcome.num_tries += 1
        stream = self._rig.client.generate(timeout=timeout, **options)
        try:
            async for chunk in stream:
                outcome.chunks.append(chunk)
                await self._note_progress(len(chunk.token_ids))
                for fault in of_mine:
                    await self._do_as_client(fault, outcome)
                if outcome.has_left:
                    break
        except KvrelayError as error:
            outcome.error = error
            self._struck_clients.update(fault for fault in of_mine if fault.kind is Kind.DEADLINE)
        finally:
            await stream.close()

    async def _do_as_client(self, fault: Fault, outcome: Outcome) -> None:
        if fault in self._struck_clients or len(outcome.token_ids) < fault.after_tokens:
            return
        match fault.kind:
            case Kind.CANCEL:
                outcome.has_left = True
            case Kind.ABORT:
                outcome.aborted = True
                await self._rig.client.abort(outcome.request_id)
            case _:
                return
        self._struck_clients.add(fault)

    async def _note_progress(self, num_tokens: int) -> None:
        async with self._progress:
            self._num_tokens += num_tokens
            self._progress.notify_all()

    async def _strike_in_time(self, strike: Strike) -> None:
        async with self._progress:
            await self._progress.wait_for(lambda: self._num_tokens >= strike.fault.after_tokens)
        await strike.at_last()
