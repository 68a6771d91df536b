"""Both ends of the handover, and what always holds of them, whatever has been done."""

from collections.abc import Callable

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from kvrelay.engine.sequence import Role, Sequence, SequenceState
from kvrelay.errors import FailedPrecondition, NotFound, PermissionDenied
from tests.unit.handover_lives import (
    BLOCK_SIZE,
    CONTEXT_LENGTH,
    LEASE_SECONDS,
    DecodeWorker,
    Life,
    PrefillWorker,
    Spec,
    Taking,
)
from tests.unit.scheduling import Bench


class HandoverInvariants(RuleBasedStateMachine):
    """The workers, what the model knows of them, and what is checked after each act. Subclasses bring the acts."""

    @initialize(
        prefill_blocks=st.integers(8, 14),
        decode_blocks=st.integers(8, 20),
        max_batched_tokens=st.integers(1, 12),
        checksum=st.booleans(),
    )
    def begin(self, prefill_blocks: int, decode_blocks: int, max_batched_tokens: int, checksum: bool) -> None:
        self.now = 1000.0
        self.checksum = checksum
        self.prefill_blocks, self.max_batched_tokens = prefill_blocks, max_batched_tokens
        self.prefill = PrefillWorker(self.bench(prefill_blocks), epoch=1)
        self.decodes = [DecodeWorker(self.bench(decode_blocks)) for _ in range(2)]
        self.lives: list[Life] = []
        self.num_adopted = self.num_recomputed = self.num_refused = 0
        self.num_taken_from_another = self.num_borrowed = 0

    def bench(self, num_blocks: int) -> Bench:
        return Bench(
            num_blocks,
            block_size=BLOCK_SIZE,
            max_batched_tokens=self.max_batched_tokens,
            context_length=CONTEXT_LENGTH,
        )

    def add(self, bench: Bench, spec: Spec, role: Role) -> Sequence:
        bench.tokens.pop(spec.request_id, None)  # of an earlier request with this id
        return bench.add(
            spec.request_id,
            spec.prompt,
            role,
            max_tokens=spec.max_tokens,
            stop=spec.stop,
            arrival=float(len(self.lives)),
        )

    # What the model knows

    def takings(self) -> list[Taking]:
        return [taking for decode in self.decodes for taking in decode.takings.values()]

    def transfers(self) -> list[Taking]:
        return [taking for taking in self.takings() if taking.transferring]

    def leased(self) -> list[Life]:
        return [life for life in self.prefill.lives.values() if life.ticket and not life.lease_ended]

    def lease_end(self, life: Life) -> float:
        return float("inf") if life.spec.ends_with_call else life.renewed_at + LEASE_SECONDS

    def is_live(self, life: Life) -> bool:
        return life in self.leased() and self.now < self.lease_end(life)

    # What always holds

    @invariant()
    def check(self) -> None:
        self.prefill.bench.scheduler.check_integrity()
        for decode in self.decodes:
            decode.bench.scheduler.check_integrity()
        assert len(self.prefill.leases) == len(self.leased())
        for life in self.leased():
            assert life.ticket is not None
            assert life.handover is not None
            pool = self.prefill.bench.pool
            assert not any(pool.is_free(block) for block in life.ticket.block_ids)
            assert tuple(map(pool.generation, life.ticket.block_ids)) == life.ticket.generations
            final = min(life.handover.num_final_blocks * BLOCK_SIZE, life.spec.length)
            self.prefill.bench.model.check(self.prefill.bench.sequences[life.spec.request_id], final)
            assert refuses(self.prefill.leases.find, life.ticket, self.now) is not self.is_live(life)
        for taking in self.takings():
            if taking.sequence.state is SequenceState.RUNNING:
                taking.bench.model.check(taking.sequence, taking.sequence.num_computed_tokens)


def refuses(act: Callable[..., object], *arguments: object) -> bool:
    try:
        act(*arguments)
    except (NotFound, FailedPrecondition, PermissionDenied):
        return True
    return False
