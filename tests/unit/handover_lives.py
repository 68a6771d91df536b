"""What the model of the handover knows: requests, the lives they lead, the workers, and who takes what over."""

import enum
from dataclasses import dataclass, field
from typing import Any

from kv_transfer.handover import Handover
from kv_transfer.leases import LeaseTable
from kv_transfer.tickets import Ticket
from kvrelay.engine.events import Admitted
from kvrelay.engine.sequence import Sequence, SequenceState
from tests.unit.scheduling import Bench

KEY = b"k" * 32
BLOCK_SIZE = 3
CONTEXT_LENGTH = 24
LEASE_SECONDS = 30.0
WAITS = (0.0, 1.0, 10.0, 29.0, 31.0, 700.0)
PREFIXES = (list(range(CONTEXT_LENGTH)), [*range(7), *range(50, 70)])
Block = tuple[int, ...]


class Loss(enum.Enum):
    """What becomes of a Release."""

    NONE = 1
    REQUEST = 2
    ANSWER = 3


class Side(enum.Enum):
    PREFILL = 1
    DECODE = 2


@dataclass(frozen=True)
class Spec:
    """A request; prefixes are shared by many, and prompts often end with a block.

    Attributes:
        ends_with_call: its lease does, as on a prefill worker. Else its blocks are put under a lease when all are
            final, as on a decode worker that drains, and no call is open.
    """

    number: int
    prefix: int
    length: int
    max_tokens: int
    stop: frozenset[int]
    ends_with_call: bool

    @property
    def request_id(self) -> str:
        return f"r{self.number}"

    @property
    def prompt(self) -> list[int]:
        return PREFIXES[self.prefix][: self.length]


CHOICES: dict[str, list[Any]] = {
    "number": list(range(8)),
    "prefix": [0, 1],
    "length": [1, 2, 6, 9, 10, 12, 18],
    "max_tokens": [2, 3, 6],
    "stop": [frozenset(), frozenset({3})],
    "ends_with_call": [True, False],
}


@dataclass(eq=False)
class PrefillWorker:
    """One start of the prefill worker. The engine hears of freed leases before its next step only."""

    bench: Bench
    epoch: int
    lives: "dict[str, Life]" = field(default_factory=dict)
    mailbox: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.leases = LeaseTable("prefill-0", LEASE_SECONDS, self.bench.pool.generation, self.mailbox.append)
        self.leases.epoch = self.epoch


@dataclass
class Run:
    """Blocks that were announced; `data` is empty where they are to be fetched later."""

    first: int
    checksums: list[Block]
    data: list[Block]


@dataclass(eq=False)
class DecodeWorker:
    """A decode worker, and what it takes over or has taken, by request id."""

    bench: Bench
    takings: "dict[str, Taking]" = field(default_factory=dict)


@dataclass(eq=False)
class Life:
    """What the model knows of one request.

    Attributes:
        num_releases: how many decode workers were told that they have got its KV cache.
    """

    spec: Spec
    worker: PrefillWorker
    admitted: Admitted | None = None
    signed: bytes = b""
    ticket: Ticket | None = None
    handover: Handover | None = None
    renewed_at: float = 0.0
    lease_ended: bool = False
    ended_at_first: bool = False
    aborted: bool = False
    num_releases: int = 0
    takings: "list[Taking]" = field(default_factory=list)


@dataclass(eq=False)
class Taking:
    """One decode worker that was sent a life's ticket."""

    life: Life
    decode: DecodeWorker
    sequence: Sequence
    admitted: Admitted | None = None
    pull: Handover | None = None
    runs: list[Run] = field(default_factory=list)
    num_announced: int = 0
    num_verified: int = 0
    first_token: int | None = None
    aborted: bool = False
    finished: bool = False

    @property
    def bench(self) -> Bench:
        return self.decode.bench

    @property
    def transferring(self) -> bool:
        return self.sequence.state is SequenceState.TRANSFERRING and self.admitted is not None
