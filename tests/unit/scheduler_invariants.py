"""A scheduler, and what always holds of it, whatever has been done."""

from collections import defaultdict, deque

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from kvrelay.engine.sequence import Role, Sequence, SequenceState
from tests.unit.scheduler_lives import (
    BLOCK_SIZE,
    CONTEXT_LENGTH,
    FINISHED,
    HELD,
    NOT_FINISHED,
    RUNNING,
    TRANSFERRING,
    WAITING,
    Flight,
    Life,
)
from tests.unit.scheduling import Bench


class SchedulerInvariants(RuleBasedStateMachine):
    """A bench of any size, and what is checked after each act. Subclasses bring the acts."""

    @initialize(
        num_blocks=st.integers(CONTEXT_LENGTH // BLOCK_SIZE, 20),
        max_num_sequences=st.integers(1, 6),
        max_batched_tokens=st.integers(1, 20),
        prefix_caching=st.sampled_from([True, True, True, False]),
        overlap=st.booleans(),
    )
    def begin(
        self, num_blocks: int, max_num_sequences: int, max_batched_tokens: int, prefix_caching: bool, overlap: bool
    ) -> None:
        self.bench = Bench(
            num_blocks,
            block_size=BLOCK_SIZE,
            max_num_sequences=max_num_sequences,
            max_batched_tokens=max_batched_tokens,
            context_length=CONTEXT_LENGTH,
            prefix_caching=prefix_caching,
            overlap=overlap,
        )
        self.scheduler, self.model = self.bench.scheduler, self.bench.model
        self.lives: list[Life] = []
        self.flights: deque[Flight] = deque()

    def live(self, *states: SequenceState) -> list[Life]:
        return [life for life in self.lives if life.sequence.state in states]

    def holders(self) -> dict[int, list[tuple[Sequence, int]]]:
        holders = defaultdict(list)
        for sequence in [*(life.sequence for life in self.live(*NOT_FINISHED)), *self.ended_in_flight()]:
            for index, block in enumerate(sequence.block_table):
                holders[block].append((sequence, index))
        return holders

    def ended_in_flight(self) -> set[Sequence]:
        sequences = (chunk.sequence for flight in self.flights for chunk in flight.chunks)
        return {sequence for sequence in sequences if sequence.state is FINISHED}

    # What always holds

    @invariant()
    def check(self) -> None:
        self.the_books_are_right()
        self.what_the_device_will_write_belongs_to_nobody_else()
        self.a_block_is_shared_only_by_equal_prefixes()
        self.progress_stays_within_the_tokens_and_the_blocks()
        self.promised_blocks_stay()
        self.no_deadline_is_missed()

    def the_books_are_right(self) -> None:
        self.scheduler.check_integrity()
        load = self.scheduler.load()
        holders = self.holders()
        assert load.blocks_total - load.blocks_free == len(holders)
        assert load.running == len(self.live(RUNNING, TRANSFERRING)) <= self.scheduler.limits.max_num_sequences
        assert load.waiting == len(self.live(WAITING))
        assert load.waiting_tokens == sum(
            life.sequence.num_uncomputed_tokens
            for life in self.live(WAITING, RUNNING)
            if life.sequence.role is not Role.DECODE or life.sequence.state is RUNNING
        )
        held = {(held.request_id, held.state, held.block_ids) for held in self.scheduler.held()}
        assert held == {
            (s.request_id, s.state.value, tuple(s.block_table))
            for s in [*(life.sequence for life in self.live(TRANSFERRING, RUNNING, HELD)), *self.ended_in_flight()]
        }

    def what_the_device_will_write_belongs_to_nobody_else(self) -> None:
        holders = self.holders()
        for flight in self.flights:
            for sequence, block in flight.written:
                assert [holder for holder, _ in holders[block]] == [sequence]
        in_flight = {chunk.sequence for flight in self.flights for chunk in flight.chunks}
        assert all(life.sequence not in in_flight for life in self.live(WAITING, TRANSFERRING, HELD))
        slots = [life.sequence.slot for life in self.live(RUNNING)]
        assert len(set(slots)) == len(slots)
        assert set(slots) <= set(range(self.scheduler.limits.max_num_sequences))

    def a_block_is_shared_only_by_equal_prefixes(self) -> None:
        for sharers in self.holders().values():
            if len(sharers) > 1:
                assert self.scheduler.limits.prefix_caching
                assert all((index + 1) * BLOCK_SIZE <= sequence.num_computed_tokens for sequence, index in sharers)
                prefixes = {
                    (sequence.request.cache_salt, tuple(sequence.token_ids[: (index + 1) * BLOCK_SIZE]))
                    for sequence, index in sharers
                }
                assert len(prefixes) == 1

    def progress_stays_within_the_tokens_and_the_blocks(self) -> None:
        for life in self.lives:
            sequence = life.sequence
            assert 0 <= sequence.num_computed_tokens <= len(sequence.token_ids) <= CONTEXT_LENGTH
            assert sequence.state is FINISHED or sequence.next_position <= len(sequence.block_table) * BLOCK_SIZE
            assert 0 <= sequence.num_sampling_tokens <= 1
            assert sequence.state is not RUNNING or sequence.num_uncomputed_tokens > 0
            assert sequence.state is not WAITING or not sequence.block_table
            assert len(life.ends) + life.released <= 1

    def promised_blocks_stay(self) -> None:
        for life in self.live(TRANSFERRING, HELD):
            assert life.admitted is not None
            assert tuple(life.sequence.block_table) == life.admitted.block_ids
            generations = tuple(self.bench.pool.generation(block) for block in life.admitted.block_ids)
            assert generations == life.admitted.generations
            self.model.check(life.sequence, life.sequence.num_computed_tokens)
        for life in self.live(HELD):
            assert life.sequence.num_computed_tokens == life.sequence.num_prompt_tokens

    def no_deadline_is_missed(self) -> None:
        next_deadline = self.scheduler.next_deadline
        for life in self.live(WAITING, RUNNING, HELD):
            if life.sequence.deadline is not None:
                assert next_deadline is not None
                assert next_deadline <= life.sequence.deadline
