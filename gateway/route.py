"""What the router is shown of a prompt and of workers, and its answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gateway.disaggregation import Link
from kvrelay.request import WorkerRole

__all__ = ["Prompt", "Route", "WorkerView", "link_between"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request brings that somebody must compute, or have.

    Attributes:
        digests: of its full blocks, as `kvrelay.engine.prefix.block_digests` makes them, by each block size of the
            workers.
    """

    num_tokens: int
    digests: Mapping[int, Sequence[bytes]]

    def num_blocks(self, block_size: int) -> int:
        """That hold it."""
        return -(-self.num_tokens // block_size)


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as its last heartbeat showed it.

    Attributes:
        running: sequences in its batch.
        waiting: sequences that wait for blocks or for their turn.
        waiting_tokens: prompt tokens still to be computed there.
        blocks_free: KV blocks that a new sequence could take, cached ones included.
        seen_at: when the heartbeat came, in seconds on the clock of the router's caller.
        block_size: tokens in a KV block.
        max_batched_tokens: that one step computes, which is a chunk of a longer prompt.
        itl_limit: seconds for which prompt tokens may hold up a step; 0 is no limit.
        epoch: grows when the worker restarts, which empties its cache.
        draining: takes no new requests.
        prefill_rate: prompt tokens it computes per second, as measured; 0 while unknown.
        block_bytes: of a KV block; 0 if unknown.
        links: of a decode worker, by prefill worker, as measured.
    """

    worker_id: str
    role: WorkerRole
    running: int
    waiting: int
    waiting_tokens: int
    blocks_free: int
    seen_at: float
    block_size: int
    max_batched_tokens: int
    itl_limit: float
    epoch: int = 0
    draining: bool = False
    prefill_rate: float = 0.0
    block_bytes: int = 0
    links: Mapping[str, Link] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes.

    Attributes:
        prefill_id: None where the decode worker computes the prompt, too.
        num_uncached_tokens: prompt tokens that will probably have to be computed.
        reserves_late: the decode worker's blocks are scarce, so they are taken when prefill is nearly done.
    """

    prefill_id: str | None
    decode_id: str
    num_uncached_tokens: int
    reserves_late: bool = False

    @property
    def computed_on(self) -> str:
        """The worker that computes the prompt."""
        return self.prefill_id or self.decode_id


def link_between(prefill: WorkerView, decode: WorkerView) -> Link:
    """The link by which a decode worker takes KV caches over from a prefill worker; a usual one if not measured."""
    return decode.links.get(prefill.worker_id) or Link()
