"""What one step of the engine tells those who wait for it: immutable, so that it may cross threads."""

from dataclasses import dataclass

from kvrelay.errors import KvrelayError
from kvrelay.request import FinishReason, Token

__all__ = [
    "Admitted",
    "EngineLoad",
    "Event",
    "Failed",
    "Finished",
    "HandedOver",
    "HeldBlocks",
    "Progress",
    "Sampled",
    "StepOutput",
]


@dataclass(frozen=True, slots=True)
class Admitted:
    """The sequence has its blocks. `num_cached_blocks` of them, from the first on, hold their content already.

    Attributes:
        borrowed: they are those in which another worker has its KV cache, and need not be filled.
    """

    request_id: str
    block_ids: tuple[int, ...]
    generations: tuple[int, ...]
    num_cached_blocks: int
    borrowed: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """The KV cache of a sequence that is to be handed over is final up to `num_computed_tokens`."""

    request_id: str
    num_computed_tokens: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token. `index` is its position in the completion; `finish_reason` is set if the completion ends with it."""

    request_id: str
    index: int
    token: Token
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """No token follows, and the engine holds nothing of the sequence beyond the step in flight."""

    request_id: str
    reason: FinishReason
    num_completion_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """As Finished, for the reason that the error gives."""

    request_id: str
    error: KvrelayError


@dataclass(frozen=True, slots=True)
class HandedOver:
    """No token follows here: the blocks are held, unchanged, for a worker that goes on from the last token.

    They hold the KV cache of all tokens but the last one.
    """

    request_id: str
    block_ids: tuple[int, ...]
    generations: tuple[int, ...]
    last_token_id: int
    num_completion_tokens: int


Event = Admitted | Progress | Sampled | HandedOver | Finished | Failed


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy the engine is.

    Attributes:
        waiting_tokens: tokens that are known but not computed.
        blocks_free: of the pool, which other processes may share.
        blocks_held: by this engine.
        preemptions: so far.
        prefill_rate: prompt tokens computed per second, as measured; 0 while unknown.
    """

    running: int
    waiting: int
    waiting_tokens: int
    blocks_total: int
    blocks_free: int
    blocks_held: int = 0
    preemptions: int = 0
    prefill_rate: float = 0.0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The events of one step in the order in which they happened; times in seconds on the engine's clock.

    Where steps overlap, what was decided is of this step, and what was computed is of the one before.

    Attributes:
        num_tokens: computed by the step.
        idle: nothing was launched nor committed, so that only a command or a deadline can bring work.
    """

    events: tuple[Event, ...]
    num_tokens: int
    started: float
    ended: float
    load: EngineLoad
    idle: bool


@dataclass(frozen=True, slots=True)
class HeldBlocks:
    """The blocks that one sequence holds, since when, and why (its state)."""

    request_id: str
    state: str
    block_ids: tuple[int, ...]
    since: float
