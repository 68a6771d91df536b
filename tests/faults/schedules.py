"""What is asked and what goes wrong meanwhile, from a seed alone.

Even seeds go through all that a failpoint can do at each state of the handover, so that so many seeds as there are
such cases leave none out; odd seeds strike from outside: signals, links, the client itself.
"""

import enum
from dataclasses import dataclass
from random import Random

from kvrelay.client import GenerateOptions
from kvrelay.failpoints import ACTIONS, POINTS, Failpoint
from tests.checkpoints import VOCAB_SIZE
from tests.faults.proxy import Direction
from tests.faults.rig import GATEWAY, WORKERS

__all__ = ["CATALOG", "Fault", "Kind", "Schedule", "schedule"]

PREFILL, DECODE = WORKERS[:2], WORKERS[2:]
PREFILL_POINTS = ("prefill.", "pull.", "release.")
BOTH_WAYS = frozenset(Direction)
LONG_SECONDS = 3.0  # after which a worker that was silent has been given up


class Kind(enum.Enum):
    """What goes wrong."""

    FAILPOINT = "failpoint"
    KILL = "kill"
    FREEZE = "freeze"
    CUT = "cut"
    REFUSE = "refuse"
    DELAY = "delay"
    STALL = "stall"
    FLIP = "flip"
    CANCEL = "cancel"
    DEADLINE = "deadline"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        target: of a failpoint or a signal, the worker; of a link, its server, "redis" among them.
        client: of a link, the process that connects.
        request: of a cancellation or a deadline, which of the schedule's requests.
        after_tokens: when it strikes: as soon as so many tokens of all requests have come.
        seconds: how long it lasts.
    """

    kind: Kind
    target: str = ""
    client: str = ""
    failpoint: Failpoint | None = None
    stalled: frozenset[Direction] = frozenset()
    request: int = -1
    after_tokens: int = 0
    seconds: float = 0.0

    @property
    def action(self) -> str:
        return self.failpoint.action if self.failpoint is not None else self.kind.value

    @property
    def takes_a_worker(self) -> bool:
        """Whether the target cannot serve for a while."""
        return self.target in WORKERS and self.action in ("kill", "stop", "freeze")

    def __str__(self) -> str:
        link = f"{self.client}>" if self.client else ""
        ways = f" {'+'.join(sorted(way.value for way in self.stalled))}" if self.stalled else ""
        what = str(self.failpoint or self.kind.value)
        whom = f"request {self.request}" if self.request >= 0 else link + self.target
        return f"{what} {whom}{ways} after {self.after_tokens} tokens, {self.seconds:g} s"


@dataclass(frozen=True)
class Schedule:
    """Requests that run together, by their place in the catalog, and one fault."""

    seed: int
    asks: tuple[int, ...]
    fault: Fault

    def __str__(self) -> str:
        return f"seed {self.seed}: requests {self.asks}, {self.fault}"


def _catalog(size: int) -> tuple[GenerateOptions, ...]:
    random, asks = Random(20261125), []
    for number in range(size):
        length = random.choice([2, 7, 16, 40, 64, 100])
        ask = GenerateOptions(
            token_ids=[random.randrange(3, VOCAB_SIZE - 20) for _ in range(length)],
            max_tokens=random.choice([1, 5, 12, 24, 40]),
            temperature=0.0 if number % 2 else 0.9,
            seed=random.randrange(1 << 32),
            ignore_eos=number % 5 > 0,
        )
        if number % 3 == 0:
            ask["logprobs"] = number % 4
        if number % 4 == 0:
            ask["stop"] = [random.choice("aeiost"), "zz"]
        asks.append(ask)
    return tuple(asks)


CATALOG = _catalog(32)
FLIP_POINT = "transfer.received"
CASES = (
    tuple((point, action) for action in ACTIONS for point in POINTS if action != "flip" or point == FLIP_POINT)
    + ((FLIP_POINT, "flip"),) * 3
)
KV_LINKS = tuple((decode, prefill) for decode in DECODE for prefill in PREFILL)
LINKS = KV_LINKS + tuple((GATEWAY, worker) for worker in WORKERS)


def schedule(seed: int) -> Schedule:
    random = Random(seed)
    asks = tuple(random.sample(range(len(CATALOG)), random.randint(4, 7)))
    fault = _inside(random, seed // 2) if seed % 2 == 0 else _outside(random, len(asks))
    return Schedule(seed, asks, fault)


def _inside(random: Random, number: int) -> Fault:
    # A step that shares no divisor with the number of cases, so that any few dozen seeds have some of each action.
    point, action = CASES[number * 29 % len(CASES)]
    seconds = random.choice([0.05, 0.3]) if action == "delay" else 0.0
    times = random.randint(1, 5) if point == "decode.frame" else random.choice([1, 1, 2])
    target = random.choice(PREFILL if point.startswith(PREFILL_POINTS) else DECODE)
    return Fault(Kind.FAILPOINT, target, failpoint=Failpoint(point, action, seconds, times), seconds=_freeze(random))


def _outside(random: Random, num_requests: int) -> Fault:
    after = random.choice([0, 0, 1, 2, 5, 10, 20, 40])
    kinds = [Kind.KILL, *[Kind.FREEZE, Kind.CUT, Kind.DELAY, Kind.STALL, Kind.FLIP, Kind.CANCEL] * 3]
    match random.choice([*kinds, Kind.REFUSE, Kind.DEADLINE]):
        case Kind.KILL:
            return Fault(Kind.KILL, random.choice(WORKERS), after_tokens=after)
        case Kind.FREEZE:
            return Fault(Kind.FREEZE, random.choice(WORKERS), after_tokens=after, seconds=_freeze(random))
        case Kind.FLIP:
            # The other decode worker reads shared memory, which no proxy sees.
            return Fault(Kind.FLIP, random.choice(PREFILL), DECODE[0])
        case (Kind.CANCEL | Kind.DEADLINE) as kind:
            seconds = random.choice([0.01, 0.05, 0.2]) if kind is Kind.DEADLINE else 0.0
            return Fault(kind, request=random.randrange(num_requests), after_tokens=after, seconds=seconds)
        case kind:
            return _on_a_link(random, kind, after)


def _on_a_link(random: Random, kind: Kind, after: int) -> Fault:
    if random.random() < 0.2:
        client, server = random.choice((GATEWAY, *WORKERS)), "redis"
    else:
        client, server = random.choice(LINKS)
    seconds = random.choice([0.01, 0.05]) if kind is Kind.DELAY else random.choice([0.2, 0.2, 0.5, LONG_SECONDS])
    stalled = (
        random.choice([BOTH_WAYS, *(frozenset({way}) for way in Direction)]) if kind is Kind.STALL else frozenset()
    )
    return Fault(kind, server, client, stalled=stalled, after_tokens=after, seconds=seconds)


def _freeze(random: Random) -> float:
    return random.choice([0.1, 0.1, 0.3, 0.3, 0.6, LONG_SECONDS])
