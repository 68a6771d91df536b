"""What the model of the scheduler knows: requests, the lives they lead, and steps in flight."""

import enum
from dataclasses import dataclass, field
from typing import Any

from kvrelay.engine.engine import Launched
from kvrelay.engine.events import Admitted, Failed, Finished
from kvrelay.engine.sequence import Chunk, Role, Sequence, SequenceState
from kvrelay.request import FinishReason
from tests.unit.scheduling import VOCABULARY

BLOCK_SIZE = 3
CONTEXT_LENGTH = 24
*NOT_FINISHED, FINISHED = SequenceState
WAITING, TRANSFERRING, RUNNING, HELD = NOT_FINISHED


class Disturbance(enum.Enum):
    ABORT = 1
    ABORT_DURING_STEP = 2
    FAILED_STEP = 3


@dataclass(frozen=True)
class Spec:
    """A request, made so that equal prefixes, and prompts that end with a block, come often."""

    request_id: str
    prefix: list[int]
    length: int
    last: int | None
    role: Role
    salt: str
    max_tokens: int
    stop: set[int]
    patience: int | None

    @property
    def prompt(self) -> list[int]:
        return self.prefix[: self.length] if self.last is None else [*self.prefix[: self.length - 1], self.last]


CHOICES: dict[str, list[Any]] = {
    "request_id": [f"r{number}" for number in range(14)],
    "prefix": [list(range(CONTEXT_LENGTH)), [*range(7), *range(50, 70)]],
    "length": [1, 2, 6, 9, 10, 12, 18, CONTEXT_LENGTH - 1],
    "last": [None, None, 90],
    "role": list(Role),
    "salt": ["", "", "salt"],
    "max_tokens": list(range(1, 16)),
    "stop": [set(), set(), set(), {3}, set(range(VOCABULARY))],
    "patience": [None, None, None, 0, 10, 30, 60],
}


@dataclass(eq=False)
class Life:
    """What the model knows of a sequence, beside the scheduler's own books."""

    sequence: Sequence
    role: Role
    expected: list[int]
    adopted: bool = False
    released: bool = False
    admitted: Admitted | None = None
    num_tokens: int = 0
    causes: set[type[Exception] | FinishReason] = field(default_factory=set)
    ends: list[Finished | Failed] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.released or bool(self.ends)


@dataclass
class Flight:
    """A step in flight, and the blocks into which its sequences will be written."""

    chunks: list[Chunk]
    launched: Launched
    written: list[tuple[Sequence, int]]
    fails: bool
