"""What is asked and what goes wrong meanwhile, from a seed alone.

Of five seeds, two go through all that a failpoint can do at each state of the handover, two through all that strikes
from outside (signals, links, Redis, the gateway, the client itself), and one through pairs of faults; so that so many
seeds as there are such cases leave none out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from kvrelay.failpoints import ACTIONS, POINTS, Failpoint
from tests.faults.catalog import LONG, SHORT, WIDE
from tests.faults.faults import Fault, Kind
from tests.faults.proxy import Direction
from tests.faults.rig import DECODE, GATEWAY, GATEWAYS, PREFILL, REDIS, WORKERS

__all__ = ["OUTSIDE", "PAIRS", "Schedule", "schedule"]

BOTH_WAYS = frozenset(Direction)
LONG_SECONDS = 3.0  # after which a worker that was silent has been given up
LATE_TOKENS = 20  # when short requests may all have ended
FLIP_POINT, LAST_CHUNK_POINT = "transfer.received", "prefill.last_chunk"
PREFILL_POINTS = ("prefill.", "pull.", "release.")
# What a request meets whoever computes its prompt.
POINTS_OF_ALL = ("decode.received", "decode.frame")


@dataclass(frozen=True)
class Schedule:
    """Requests that run together, and what goes wrong.

    Attributes:
        gateway: that is asked.
        asks: places in the catalog.
        num_late: how many of them, the last ones, are asked only when the first fault has struck.
    """

    seed: int
    gateway: str
    asks: tuple[int, ...]
    faults: tuple[Fault, ...]
    num_late: int = 0

    def __str__(self) -> str:
        late = f", {self.num_late} of them late" if self.num_late else ""
        return f"seed {self.seed}: {self.gateway}, requests {self.asks}{late}; {'; '.join(map(str, self.faults))}"


def schedule(seed: int) -> Schedule:
    random = Random(seed)
    part, place = divmod(seed, 5)
    faults = _faults(random, part, place)
    gateway = GATEWAY if any(_is_in_the_way_of_blocks(fault) for fault in faults) else random.choice(GATEWAYS)
    faults = tuple(_at_gateway(fault, gateway) for fault in faults)
    return Schedule(seed, gateway, _asks(random, faults), faults, _num_late(random, faults))


def _faults(random: Random, part: int, place: int) -> tuple[Fault, ...]:
    if place == 4:
        return list(PAIRS.values())[part % len(PAIRS)](random)
    strikes = _outside if place % 2 else _inside
    return (strikes(random, 2 * part + place // 2),)


def _is_in_the_way_of_blocks(fault: Fault) -> bool:
    """Whether it is met only by requests whose prompts are computed by prefill workers."""
    return fault.target in PREFILL or (fault.failpoint is not None and fault.failpoint.point not in POINTS_OF_ALL)


def _at_gateway(fault: Fault, gateway: str) -> Fault:
    target, client = ({ASKED: gateway}.get(name, name) for name in (fault.target, fault.client))
    return replace(fault, target=target, client=client)


def _asks(random: Random, faults: Sequence[Fault]) -> tuple[int, ...]:
    asks = random.sample(SHORT, random.randint(4, 7))
    if any(fault.failpoint is not None and fault.failpoint.point not in POINTS_OF_ALL for fault in faults):
        asks += random.sample(WIDE, 2)  # one for each prefill worker, so that its failpoints are met
    if any(fault.kind is Kind.DRAIN for fault in faults) or sum(fault.restarts_a_worker for fault in faults) > 1:
        asks += random.sample(LONG, 2)
    elif any(fault.after_tokens >= LATE_TOKENS for fault in faults):
        asks += random.sample(LONG, 1)
    random.shuffle(asks)
    return tuple(asks)


def _num_late(random: Random, faults: Sequence[Fault]) -> int:
    # Nobody knows when a failpoint is met, and a client acts on what it has asked.
    early = any(fault.is_of_a_client or fault.failpoint is not None for fault in faults)
    return 0 if early else random.choice([0, 2])


INSIDE = (
    tuple((point, action) for action in ACTIONS for point in POINTS if action != "flip" or point == FLIP_POINT)
    + ((FLIP_POINT, "flip"),) * 3
)


def _inside(random: Random, number: int) -> Fault:
    # A step that shares no divisor with the number of cases, so that any few dozen seeds have some of each action.
    return _at(random, *INSIDE[number * 29 % len(INSIDE)])


def _at(random: Random, point: str, action: str) -> Fault:
    target = random.choice(PREFILL if point.startswith(PREFILL_POINTS) else DECODE)
    if action == "flip":
        target = DECODE[0]  # the other one does not look at each block
    delay = random.choice([0.05, 0.3]) if action == "delay" else 0.0
    if point == "decode.frame":
        times = random.randint(1, 5)
    else:
        times = 1 if point == LAST_CHUNK_POINT else random.choice([1, 1, 1, 2])
    seconds = _freeze(random) if action == "stop" else 0.0
    return Fault(Kind.FAILPOINT, target, failpoint=Failpoint(point, action, delay, times), seconds=seconds)


# Stands for the gateway that is asked.
ASKED = "gateway"
KV_LINKS = tuple((decode, prefill) for decode in DECODE for prefill in PREFILL)
# The other decode worker reads shared memory, which no proxy sees, and does not look at each block.
FLIPPED_LINKS = tuple((DECODE[0], prefill) for prefill in PREFILL)
WORKER_LINKS = tuple((ASKED, worker) for worker in WORKERS)
REDIS_LINKS = ((ASKED, REDIS), *((worker, REDIS) for worker in WORKERS))
Target = tuple[str, str]  # who connects and to whom; or nobody, and who is struck


def _each(*targets: str) -> tuple[Target, ...]:
    return tuple(("", target) for target in targets)


# Kinds, and whom they may strike; nobody but a request where there is none.
OUTSIDE: tuple[tuple[Kind, tuple[Target, ...]], ...] = (
    (Kind.KILL, _each(*PREFILL)),
    (Kind.KILL, _each(*DECODE)),
    (Kind.KILL, _each(REDIS)),
    (Kind.KILL, _each(ASKED)),
    (Kind.DRAIN, _each(*PREFILL)),
    (Kind.DRAIN, _each(*DECODE)),
    (Kind.DRAIN, _each(ASKED)),
    (Kind.FREEZE, _each(*PREFILL)),
    (Kind.FREEZE, _each(*DECODE)),
    (Kind.FREEZE, _each(REDIS)),
    (Kind.FREEZE, _each(ASKED)),
    (Kind.WIPE, _each(REDIS)),
    *(
        (kind, links)
        for kind in (Kind.CUT, Kind.REFUSE, Kind.DELAY, Kind.STALL)
        for links in (KV_LINKS, WORKER_LINKS, REDIS_LINKS)
    ),
    (Kind.FLIP, FLIPPED_LINKS),
    (Kind.CANCEL, ()),
    (Kind.ABORT, ()),
    (Kind.DEADLINE, ()),
)


def _outside(random: Random, number: int) -> Fault:
    kind, targets = OUTSIDE[number % len(OUTSIDE)]
    return _strike(random, kind, targets, 0 if kind is Kind.FLIP else random.choice([0, 0, 1, 2, 5, 10, 20, 40]))


def _strike(random: Random, kind: Kind, targets: Sequence[Target], after: int) -> Fault:
    if not targets:
        seconds = random.choice([0.01, 0.05, 0.2]) if kind is Kind.DEADLINE else 0.0
        return Fault(kind, request=random.randrange(4), after_tokens=after // 4, seconds=seconds)
    client, target = random.choice(targets)
    match kind:
        case Kind.DELAY:
            seconds = random.choice([0.01, 0.05])
        case Kind.KILL if target == REDIS:
            seconds = random.choice([0.0, 0.5, LONG_SECONDS])
        case Kind.FREEZE:
            seconds = _freeze(random)
        case Kind.REFUSE | Kind.STALL | Kind.CUT:
            seconds = random.choice([0.2, 0.2, 0.5, LONG_SECONDS])
        case _:
            seconds = 0.0
    ways = (BOTH_WAYS, *(frozenset({way}) for way in Direction))
    stalled = random.choice(ways) if kind is Kind.STALL else frozenset()
    return Fault(kind, target, client, stalled=stalled, after_tokens=after, seconds=seconds)


def _freeze(random: Random) -> float:
    return random.choice([0.1, 0.1, 0.3, 0.3, 0.6, LONG_SECONDS])


Pair = Callable[[Random], tuple[Fault, Fault]]


def _pair(first: Kind, first_targets: Sequence[str], second: Kind, second_targets: Sequence[str]) -> Pair:
    """The second strikes while the first is being recovered from; another process than the first, if it can."""

    def pair(random: Random) -> tuple[Fault, Fault]:
        after = random.choice([1, 5, 10, 40])
        one = _strike(random, first, _each(*first_targets), after)
        others = [target for target in second_targets if target != one.target] or second_targets
        other = _strike(random, second, _each(*others), after)
        return one, replace(other, pause=random.choice([0.02, 0.1, 0.3, 0.6]))

    return pair


def _killed_as_it_drains(random: Random) -> tuple[Fault, Fault]:
    drain = _strike(random, Kind.DRAIN, _each(*WORKERS), random.choice([1, 10, 40]))
    return drain, replace(drain, kind=Kind.KILL, pause=random.choice([0.1, 0.5, 0.6, 0.7]))


def _a_link_and_an_abort(random: Random) -> tuple[Fault, Fault]:
    after = random.choice([0, 1, 5])
    kind = random.choice([Kind.CUT, Kind.REFUSE, Kind.STALL])
    return _strike(random, kind, KV_LINKS + WORKER_LINKS, after), _strike(random, Kind.ABORT, (), after)


def _a_handover_and_a_leaving(random: Random) -> tuple[Fault, Fault]:
    point = random.choice([point for point in POINTS if point != LAST_CHUNK_POINT])
    leaving = random.choice([Kind.CANCEL, Kind.ABORT])
    return _at(random, point, "delay"), _strike(random, leaving, (), random.choice([0, 4, 8]))


def _a_handover_and_a_kill(random: Random) -> tuple[Fault, Fault]:
    point = random.choice([point for point in POINTS if point != LAST_CHUNK_POINT])
    stop = _at(random, point, "stop")
    others = [worker for worker in WORKERS if worker != stop.target]
    return stop, _strike(random, Kind.KILL, _each(*others), random.choice([1, 5, 10]))


PAIRS: dict[str, Pair] = {
    "killed as it drains": _killed_as_it_drains,
    "one drains, and the other is killed": _pair(Kind.DRAIN, DECODE, Kind.KILL, DECODE),
    "both decode workers are killed": _pair(Kind.KILL, DECODE, Kind.KILL, DECODE),
    "both prefill workers are lost": _pair(Kind.KILL, PREFILL, Kind.FREEZE, PREFILL),
    "one of each kind": _pair(Kind.FREEZE, DECODE, Kind.KILL, PREFILL),
    "a link, and an abort": _a_link_and_an_abort,
    "a handover, and a client that leaves": _a_handover_and_a_leaving,
    "a handover, and a kill": _a_handover_and_a_kill,
    "Redis, and a worker": _pair(Kind.KILL, (REDIS,), Kind.KILL, WORKERS),
    "Redis, and the gateway": _pair(Kind.WIPE, (REDIS,), Kind.KILL, (ASKED,)),
    "a worker drains, and the gateway": _pair(Kind.DRAIN, WORKERS, Kind.DRAIN, (ASKED,)),
}
