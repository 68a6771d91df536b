"""The nouns that every process shares: what was asked, what comes back, what it took, and who did it."""

import enum
from dataclasses import dataclass

__all__ = [
    "Chunk",
    "ClusterStatus",
    "FinishReason",
    "GatewayStatus",
    "HeldBlocks",
    "LinkStatus",
    "Model",
    "QueueStatus",
    "Request",
    "Sampling",
    "SamplingParams",
    "Timings",
    "Token",
    "TokenLogprobs",
    "Usage",
    "WorkerRole",
    "WorkerState",
    "WorkerStatus",
]


class FinishReason(enum.Enum):
    """Why a completion ended. The values are those of the proto enum."""

    STOP = 1
    LENGTH = 2
    ABORT = 3


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What a client asks of the sampler. None means: as the checkpoint's generation config says.

    The fields mean what `kvrelay.v1.SamplingParams` says.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the engine is told: every choice made, nothing left to a default.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 keeps all tokens.
        seed: an unsigned 64-bit number; with the position it determines each random draw.
        stop_token_ids: the end-of-sequence tokens included, unless they are ignored.
        logprobs: None reports none, n reports the chosen token's and the n likeliest.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the workers see it. Immutable from the gateway to the last token.

    Attributes:
        request_id: unique on a worker, so that a request that goes on elsewhere has another there.
        completion_token_ids: tokens that it got from other workers before, which this one goes on from.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    cache_salt: str = ""
    completion_token_ids: tuple[int, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens that are known: the prompt, and of the completion what there is."""
        return self.prompt_token_ids + self.completion_token_ids


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one position: the chosen token's, and (token id, log-probability) of the likeliest."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request, as in `kvrelay.v1.Usage`."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent in each stage of one request, as in `kvrelay.v1.Timings`."""

    gateway_queue: float = 0.0
    prefill_queue: float = 0.0
    prefill: float = 0.0
    transfer: float = 0.0
    decode_queue: float = 0.0
    first_decode_step: float = 0.0
    time_to_first_token: float = 0.0
    total: float = 0.0

    def stages(self) -> dict[str, float]:
        """Where the time went, in order; what is left of `total` is called other."""
        stages = {
            "queue": self.gateway_queue + self.prefill_queue + self.decode_queue,
            "prefill": self.prefill,
            "transfer": self.transfer,
            "decode": max(0.0, self.total - self.time_to_first_token - self.transfer - self.decode_queue),
        }
        return {**stages, "other": max(0.0, self.total - sum(stages.values()))}


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is new in a stream since the chunk before, as in `kvrelay.v1.GenerateResponse`.

    Attributes:
        seq: counts the chunks of a request from 1 without a gap.
        text: may lag behind token_ids where a token ends within a character.
        logprobs: one for each of token_ids if they were asked for, else empty.
        finish_reason: set on the last chunk only, as are usage and timings.
    """

    request_id: str
    seq: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the cluster serves; context_length is in tokens, prompt and completion together."""

    id: str
    architecture: str
    context_length: int
    vocab_size: int


class WorkerRole(enum.StrEnum):
    """The part a worker plays; UNSPECIFIED also stands for a part that this version does not know."""

    UNSPECIFIED = "unspecified"
    PREFILL = "prefill"
    DECODE = "decode"


class WorkerState(enum.StrEnum):
    """UNREACHABLE is registered but does not answer; STUCK is in one step for too long.

    UNSPECIFIED also stands for what this version does not know.
    """

    UNSPECIFIED = "unspecified"
    READY = "ready"
    DRAINING = "draining"
    STUCK = "stuck"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """How a prefill worker's blocks reach a decode worker.

    Attributes:
        transport: "pool" (which moves nothing), "cuda_ipc", "shm", "nixl" or "grpc".
        bandwidth: bytes per second, measured; 0 if unknown.
        latency: seconds of a round trip, measured; 0 if unknown.
        fallback: why no faster transport is used; empty if none could be.
    """

    prefill_worker_id: str
    transport: str
    bandwidth: float = 0.0
    latency: float = 0.0
    fallback: str = ""

    def __str__(self) -> str:
        """For people: `prefill-0 by shm, 3.1 GB/s, 0.4 ms`."""
        bandwidth = "" if self.transport == "pool" else f", {self.bandwidth / 1e9:.1f} GB/s"
        measured = f"{bandwidth}, {self.latency * 1e3:.1f} ms" if self.bandwidth else ""
        return f"{self.prefill_worker_id} by {self.transport}{measured}"


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker, as in `kvrelay.v1.WorkerStatus`.

    Attributes:
        epoch: grows each time this worker starts.
        memory_bytes: resident, with the own KV pool and without those of others that it has mapped.
        preemptions: sequences that gave their blocks back for others, and were recomputed.
        links: of a decode worker, one for each prefill worker.
    """

    id: str
    role: WorkerRole
    pid: int
    address: str
    epoch: int
    state: WorkerState
    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    blocks_held: int
    memory_bytes: int
    links: tuple[LinkStatus, ...] = ()
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class GatewayStatus:
    """One gateway process."""

    id: str
    address: str
    pid: int


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Requests in the cluster, and how many may wait."""

    waiting: int
    running: int
    capacity: int


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """Everybody who takes part, and the queue."""

    workers: tuple[WorkerStatus, ...]
    gateways: tuple[GatewayStatus, ...]
    queue: QueueStatus


@dataclass(frozen=True, slots=True)
class HeldBlocks:
    """The KV blocks that one sequence holds on one worker, and why.

    Attributes:
        state: the sequence's: running, transferring or held.
        lease_seconds: until the lease runs out; None where an open call holds the blocks, and they are free when it
            ends.
        owner: who has to end it: the gateway whose request it is or, once one has pulled, the decode worker that takes
            the blocks over. Empty: nobody, they are about to be free.
    """

    worker_id: str
    request_id: str
    state: str
    block_ids: tuple[int, ...]
    age_seconds: float
    lease_seconds: float | None = None
    owner: str = ""
