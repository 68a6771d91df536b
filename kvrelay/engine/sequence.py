"""A request while the engine works on it."""

import enum
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from kvrelay.request import FinishReason, Request

__all__ = ["BorrowedBlocks", "Chunk", "Role", "Sequence", "SequenceState"]


class Role(enum.Enum):
    """What this engine does of a request."""

    WHOLE = "whole"  # prefill and decode
    PREFILL = "prefill"  # up to the first token; then the KV cache is held for a decode worker
    DECODE = "decode"  # the KV cache of the prompt and the first token come from a prefill worker


class SequenceState(enum.Enum):
    """Where a sequence stands.

        WAITING ──> RUNNING ──> FINISHED          Role.WHOLE
           ^           │
           └─preempted─┘
        WAITING ──> RUNNING ──> HELD ──> FINISHED           Role.PREFILL; released, or its lease ended
        WAITING ──> TRANSFERRING ──> RUNNING ──> FINISHED   Role.DECODE; becomes WHOLE when it
                                                            is preempted or the transfer failed
                                     RUNNING ──> HELD ──> FINISHED    it goes on elsewhere

    An abort leads from every state to FINISHED. From TRANSFERRING it does so only after the copy into the
    sequence's blocks has stopped, which the one who copies reports.
    """

    WAITING = "waiting"
    TRANSFERRING = "transferring"
    RUNNING = "running"
    HELD = "held"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class BorrowedBlocks:
    """Blocks of a shared pool in which another worker has, or computes, a sequence's KV cache.

    They are held by both until one gives up, so that nobody else can have them. Who borrows does not write to them
    before the other has ended its lease: the last one may be half full.

    Attributes:
        generations: that the blocks have, unless they mean something else by now.
    """

    block_ids: tuple[int, ...]
    generations: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable; owned by the engine's thread.

    `num_computed_tokens` is the only progress: a chunk of a prompt, a prefix found in the cache and a KV cache that
    came from another worker all just advance it. The sequence is at its next sampling when one token is left.

    A step in flight has been launched and not been committed: the device computes it while the next is scheduled.

    Attributes:
        deadline: seconds on the engine's clock; work does not start, nor go on, after it.
        token_ids: prompt and completion, as far as the ids are known here.
        num_computed_tokens: tokens whose KV cache is final.
        num_computing_tokens: tokens after those whose KV cache steps in flight compute.
        num_sampling_tokens: tokens after `token_ids` that steps in flight sample.
        block_table: block of slot i is `block_table[i // block_size]`. It only grows; other blocks are another list.
        slot: number of its place among the running sequences; -1 while it does not run.
        borrowed: of Role.DECODE, the blocks to hold instead of own ones; None when it has been admitted.
        leaving: it goes on elsewhere as soon as it has a token that another worker can go on from.
        digests: names of the full blocks that have been named or looked up, from the first on.
    """

    request: Request
    role: Role = Role.WHOLE
    arrival: float = 0.0
    deadline: float | None = None
    state: SequenceState = SequenceState.WAITING
    token_ids: Items[int] = field(init=False)
    num_computed_tokens: int = 0
    num_computing_tokens: int = 0
    num_sampling_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    slot: int = -1
    borrowed: BorrowedBlocks | None = None
    leaving: bool = False
    digests: list[bytes] = field(default_factory=list)
    held_since: float = 0.0

    def __post_init__(self) -> None:
        # The request's own until the first token is sampled, so that a waiting sequence has no copy.
        self.token_ids = self.request.token_ids

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of which those sampled by steps in flight are the last."""
        return len(self.token_ids) + self.num_sampling_tokens

    @property
    def next_position(self) -> int:
        """Where the next chunk starts."""
        return self.num_computed_tokens + self.num_computing_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        known = len(self.token_ids) + self.num_sampling_tokens
        return known - self.num_computed_tokens - self.num_computing_tokens

    @property
    def decodes(self) -> bool:
        """Whether its next chunk is one token that follows a sampled one."""
        return self.num_uncomputed_tokens == 1 and self.num_tokens > self.num_prompt_tokens

    @property
    def in_flight(self) -> bool:
        """Whether a step in flight writes into its blocks."""
        return self.num_computing_tokens > 0

    @property
    def at_handover(self) -> bool:
        """Whether it is leaving, and all that is known of it but the last token is computed or in flight."""
        return self.leaving and self.num_tokens > self.num_prompt_tokens and self.num_uncomputed_tokens <= 1

    def will_end(self, context_length: int) -> bool:
        """Whether a token in flight is the last one, whichever it is."""
        if self.num_sampling_tokens == 0:
            return False
        completion = self.num_tokens - self.num_prompt_tokens
        return (
            self.role is Role.PREFILL
            or completion >= self.request.sampling.max_tokens
            or self.num_tokens >= context_length
        )

    def append(self, token_id: int, context_length: int) -> FinishReason | None:
        """Adds a sampled token; answers why the sequence ends with it, if it does."""
        if not isinstance(self.token_ids, list):
            self.token_ids = list(self.token_ids)
        self.token_ids.append(token_id)
        sampling = self.request.sampling
        if token_id in sampling.stop_token_ids:
            return FinishReason.STOP
        if self.num_completion_tokens >= sampling.max_tokens or len(self.token_ids) >= context_length:
            return FinishReason.LENGTH
        return None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, start + length)` of a sequence, to be computed in one step.

    Attributes:
        samples: whether the next token is sampled after this chunk, because no token is left to compute.
        decodes: whether it is a sampled token and nothing of a prompt.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool = field(init=False)
    decodes: bool = field(init=False)

    def __post_init__(self) -> None:
        # Kept, because the sequence may have grown when the step is committed.
        object.__setattr__(self, "samples", self.end == self.sequence.num_tokens)
        object.__setattr__(self, "decodes", self.length == 1 and self.start >= self.sequence.num_prompt_tokens)

    @property
    def end(self) -> int:
        return self.start + self.length
