"""What can go wrong: the kinds of faults, and one fault with its target and its moment."""

import enum
from dataclasses import dataclass

from kvrelay.failpoints import Failpoint
from tests.faults.proxy import Direction
from tests.faults.rig import GATEWAYS, REDIS, WORKERS

__all__ = ["Fault", "Kind"]


class Kind(enum.Enum):
    """What goes wrong."""

    FAILPOINT = "failpoint"
    KILL = "kill"
    DRAIN = "drain"
    FREEZE = "freeze"
    WIPE = "wipe"
    CUT = "cut"
    REFUSE = "refuse"
    DELAY = "delay"
    STALL = "stall"
    FLIP = "flip"
    CANCEL = "cancel"
    ABORT = "abort"
    DEADLINE = "deadline"


NOTICED_SECONDS = 1.0  # a process that stands still for less is not taken for lost by anybody
CLIENT_KINDS = frozenset({Kind.CANCEL, Kind.ABORT, Kind.DEADLINE})


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        target: of a failpoint or a signal, the process; of a link, its server; "redis" among them.
        client: of a link, the process that connects.
        request: of what a client does, which of the schedule's requests.
        after_tokens: when it strikes: as soon as so many tokens have come, of that request or else of all.
        pause: seconds from then until it strikes.
        seconds: how long it lasts; of a request's deadline, when that is.
    """

    kind: Kind
    target: str = ""
    client: str = ""
    failpoint: Failpoint | None = None
    stalled: frozenset[Direction] = frozenset()
    request: int = -1
    after_tokens: int = 0
    pause: float = 0.0
    seconds: float = 0.0

    @property
    def action(self) -> str:
        return self.failpoint.action if self.failpoint is not None else self.kind.value

    @property
    def is_of_a_client(self) -> bool:
        return self.kind in CLIENT_KINDS

    @property
    def takes_a_worker(self) -> bool:
        """Whether the target cannot serve for a while."""
        return self.target in WORKERS and self.action in ("kill", "drain", "stop", "freeze")

    @property
    def takes_a_link(self) -> bool:
        """Whether two workers, who are both there, cannot reach one another for a while."""
        return self.client in WORKERS and self.target in WORKERS

    @property
    def restarts_a_worker(self) -> bool:
        return self.target in WORKERS and self.action in ("kill", "drain")

    @property
    def takes_the_gateway(self) -> bool:
        """Whether its clients may lose it."""
        is_noticed = self.kind is Kind.FREEZE and self.seconds > NOTICED_SECONDS
        return self.target in GATEWAYS and (is_noticed or self.kind in (Kind.KILL, Kind.DRAIN))

    @property
    def takes_redis(self) -> bool:
        """Whether the gateway may be without its Redis for a while. One that is slow, or was wiped, is there."""
        takes = self.kind in (Kind.KILL, Kind.FREEZE, Kind.CUT, Kind.REFUSE, Kind.STALL)
        return self.target == REDIS and takes and self.client not in WORKERS

    def __str__(self) -> str:
        link = f"{self.client}>" if self.client else ""
        ways = f" {'+'.join(sorted(way.value for way in self.stalled))}" if self.stalled else ""
        what = str(self.failpoint or self.kind.value)
        whom = f"request {self.request}" if self.request >= 0 else link + self.target
        pause = f" and {self.pause:g} s" if self.pause else ""
        lasts = f", for {self.seconds:g} s" if self.seconds else ""
        return f"{what} {whom}{ways} after {self.after_tokens} tokens{pause}{lasts}"
