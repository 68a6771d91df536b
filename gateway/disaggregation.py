"""Whether a prompt is worth moving: the cost of both ways in seconds. Policy without I/O or a clock.

DistServe (Zhong et al., OSDI 2024) separates prefill from decoding so that neither delays the other, and pays with a
transfer. For a short prompt the transfer costs more than the delay, so each request is weighed: what its first tokens
wait for on either way, and what the streams that run on the decode worker lose meanwhile.
"""

import enum
from dataclasses import dataclass

from kvrelay.request import WorkerRole

__all__ = ["Disaggregation", "Link", "PromptWork", "seconds_local", "seconds_split"]

# Tokens per second while no worker of the cluster has been measured. Only the order of magnitude matters: both ways are
# then as fast as one another, and the link and the running streams decide.
ASSUMED_PREFILL_RATE = 1000.0


class Disaggregation(enum.Enum):
    """Who computes prompts."""

    ALWAYS = "always"  # prefill workers
    NEVER = "never"  # the decode worker of the request: colocated serving
    AUTO = "auto"  # whichever costs less; decode workers alone where there is no prefill worker

    @property
    def roles(self) -> tuple[WorkerRole, ...]:
        """Those without which no request can be served."""
        if self is Disaggregation.ALWAYS:
            return WorkerRole.PREFILL, WorkerRole.DECODE
        return (WorkerRole.DECODE,)


@dataclass(frozen=True, slots=True)
class Link:
    """The way from a prefill worker to a decode worker.

    Attributes:
        bandwidth: bytes per second.
        latency: seconds that a handover costs besides its bytes.
    """

    bandwidth: float = 1e9
    latency: float = 0.002


@dataclass(frozen=True, slots=True)
class PromptWork:
    """A prompt on one worker.

    Attributes:
        queued_tokens: to be computed there before it.
        uncached_tokens: of the prompt, to be computed there.
        rate: tokens per second; 0 while unknown.
    """

    queued_tokens: int
    uncached_tokens: int
    rate: float

    @property
    def prefill_seconds(self) -> float:
        """Of the prompt alone."""
        return self.uncached_tokens / (self.rate or ASSUMED_PREFILL_RATE)

    @property
    def seconds(self) -> float:
        """Until the prompt is computed, queue included."""
        return (self.queued_tokens + self.uncached_tokens) / (self.rate or ASSUMED_PREFILL_RATE)


def seconds_split(
    work: PromptWork, link: Link, *, num_tokens_moved: int, token_bytes: float, chunk_tokens: int
) -> float:
    """What a prompt costs that a prefill worker computes.

    Blocks travel while later ones are computed. What that cannot hide is the last chunk, or more where the link is
    slower than prefill.

    Args:
        num_tokens_moved: of the prompt, whose KV cache the decode worker does not hold.
        token_bytes: of one token's KV cache.
        chunk_tokens: that a step of the prefill worker computes.
    """
    token_seconds = token_bytes / link.bandwidth
    num_moved_last = min(num_tokens_moved, chunk_tokens)
    exposed = max(num_moved_last * token_seconds, num_tokens_moved * token_seconds - work.prefill_seconds)
    return work.seconds + link.latency + exposed


def seconds_local(work: PromptWork, num_running: int, itl_limit: float) -> float:
    """What a prompt costs that the decode worker computes.

    Each stream that runs there waits for it, but no step keeps it waiting for longer than the limit.

    Args:
        itl_limit: seconds for which prompt tokens may hold up a step of the worker; 0 is no limit.
    """
    delay = min(work.prefill_seconds, itl_limit) if itl_limit > 0.0 else work.prefill_seconds
    return work.seconds + num_running * delay
