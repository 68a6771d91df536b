"""What bounds the scheduler."""

from dataclasses import dataclass

from kvrelay.engine.kv_layout import blocks_for

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step and a sequence.

    Attributes:
        max_num_sequences: sequences that run, or whose KV cache is being transferred, at once.
        max_batched_tokens: tokens computed in one step.
        context_length: tokens, prompt and completion, that a sequence may have.
        model_digest: where the names of cached prefixes begin.
        evicts: a sequence that must give its blocks back fails, reason EVICTED, for whoever sent it to continue it
            elsewhere; else it is recomputed here, in front of everyone.
        itl_limit: seconds that a step with decoding sequences in it may take because of prompt tokens; 0 is no limit.
    """

    max_num_sequences: int
    max_batched_tokens: int
    context_length: int
    block_size: int
    model_digest: bytes = b""
    prefix_caching: bool = True
    evicts: bool = False
    itl_limit: float = 0.0

    def blocks_for(self, num_tokens: int) -> int:
        return blocks_for(num_tokens, self.block_size)
