"""Acts on a scheduler, in any order, and what must come back from them."""

import hypothesis.strategies as st
from hypothesis.stateful import rule

from kvrelay.engine.events import Admitted, Event, Failed, Finished, Progress, Sampled
from kvrelay.engine.sequence import Chunk, Role, SequenceState
from kvrelay.errors import AlreadyExists, DeadlineExceeded, Internal, Unavailable
from kvrelay.request import FinishReason
from tests.unit.scheduler_invariants import SchedulerInvariants
from tests.unit.scheduler_lives import (
    BLOCK_SIZE,
    CHOICES,
    CONTEXT_LENGTH,
    HELD,
    NOT_FINISHED,
    RUNNING,
    TRANSFERRING,
    WAITING,
    Disturbance,
    Flight,
    Life,
    Spec,
)
from tests.unit.scheduling import GARBAGE

which = st.integers(0, 1000)
specs = st.builds(Spec, **{name: st.sampled_from(values) for name, values in CHOICES.items()})


class SchedulerMachine(SchedulerInvariants):
    """Adds sequences of all roles, steps, hands over, fails, aborts and lets time pass.

    Steps are committed at once, or, with overlap, after the next one has been scheduled; the device writes as late as
    it may.
    """

    @rule(specs=st.lists(specs, min_size=1, max_size=4))
    def add(self, specs: list[Spec]) -> None:
        for spec in specs:
            known = spec.request_id in {life.sequence.request_id for life in self.live(*NOT_FINISHED)}
            try:
                sequence = self.bench.add(
                    spec.request_id,
                    spec.prompt,
                    spec.role,
                    max_tokens=spec.max_tokens,
                    salt=spec.salt,
                    stop=spec.stop,
                    deadline=None if spec.patience is None else self.bench.now + spec.patience,
                    arrival=float(len(self.lives)),
                )
            except AlreadyExists:
                assert known
            else:
                assert not known
                self.lives.append(Life(sequence, spec.role, self.bench.expected(sequence)))

    @rule(seconds=st.sampled_from([0, 0, 1, 5]), times=st.integers(1, 8))
    def step(self, seconds: int, times: int) -> None:
        self.bench.now += seconds
        for _ in range(times):
            self.launch(self.schedule())
            self.land()

    @rule(index=which, num_tokens=st.integers(0, CONTEXT_LENGTH), fails=st.booleans(), fewer=st.integers(0, 3))
    def end_transfer(self, index: int, num_tokens: int, fails: bool, fewer: int) -> None:
        for life in self.one(index, TRANSFERRING):
            sequence = life.sequence
            end = sequence.num_prompt_tokens
            if fails:
                copied = min(sequence.num_computed_tokens + num_tokens, end)
                self.model.write(sequence, sequence.num_computed_tokens, copied)
                self.model.write(sequence, copied, end, GARBAGE)
                whole = -(-copied // BLOCK_SIZE) if copied == end else copied // BLOCK_SIZE
                self.scheduler.recompute(sequence.request_id, max(0, whole - fewer))
                assert (sequence.state, sequence.role) == (WAITING, Role.WHOLE)
            else:
                life.adopted = True
                self.scheduler.adopt(sequence.request_id, self.bench.transfer(sequence))

    @rule(index=which)
    def release(self, index: int) -> None:
        for life in self.one(index, HELD):
            life.released = True
            self.scheduler.forget(life.sequence.request_id)

    @rule(index=which, disturbance=st.sampled_from(Disturbance))
    def disturb(self, index: int, disturbance: Disturbance) -> None:
        if disturbance is Disturbance.ABORT:
            self.abort(index)
            return
        self.launch(self.schedule(), fails=disturbance is Disturbance.FAILED_STEP)
        if disturbance is Disturbance.ABORT_DURING_STEP:
            self.abort(index)
        self.land()

    def launch(self, chunks: list[Chunk], fails: bool = False) -> None:
        if chunks:
            written = [
                (chunk.sequence, block)
                for chunk in chunks
                for block in chunk.sequence.block_table[chunk.start // BLOCK_SIZE : -(-chunk.end // BLOCK_SIZE)]
            ]
            self.flights.append(Flight(chunks, self.model.launch(chunks), written, fails))
            if self.model.overlaps:
                self.scheduler.assume(chunks)
        self.num_kept = int(bool(chunks) and self.model.overlaps)

    def land(self) -> None:
        while len(self.flights) > self.num_kept:
            flight = self.flights.popleft()
            tokens = flight.launched.tokens()
            if flight.fails:
                for _, block in flight.written:
                    self.model.slots[block] = [GARBAGE] * BLOCK_SIZE
                for chunk in flight.chunks:
                    life = next(life for life in self.lives if life.sequence is chunk.sequence)
                    life.causes.add(Internal)
                self.take(self.scheduler.fail(flight.chunks, Internal("defect")))
            else:
                self.take(self.scheduler.commit(flight.chunks, tokens))

    def abort(self, index: int) -> None:
        for life in self.one(index, *NOT_FINISHED):
            life.causes |= {Unavailable, FinishReason.ABORT}
            self.scheduler.abort(life.sequence.request_id, Unavailable("gone") if index % 2 else None)

    def one(self, index: int, *states: SequenceState) -> list[Life]:
        lives = self.live(*states)
        return lives[index % len(lives) :][:1] if lives else []

    # What comes back

    def schedule(self) -> list[Chunk]:
        now, limits = self.bench.now, self.scheduler.limits
        ran = {life.sequence: life.sequence.num_uncomputed_tokens for life in self.live(RUNNING)}
        transferring = self.live(TRANSFERRING)
        chunks, events = self.scheduler.schedule(now)
        self.take(events)
        assert all(life.sequence.state is TRANSFERRING for life in transferring), "somebody copies into its blocks"
        assert sum(chunk.length for chunk in chunks) <= limits.max_batched_tokens
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        ranks = [(chunk.sequence not in ran, ran.get(chunk.sequence, 0) > 1) for chunk in chunks]
        assert ranks == sorted(ranks), "decode tokens, then prompts that run, then those admitted"
        holders = self.holders()
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.state is RUNNING
            assert sequence.deadline is None or sequence.deadline > now
            assert chunk.start == sequence.next_position
            assert 0 < chunk.length <= sequence.num_uncomputed_tokens
            written = sequence.block_table[chunk.start // BLOCK_SIZE : -(-chunk.end // BLOCK_SIZE)]
            assert all(len(holders[block]) == 1 for block in written), "writes into a block that others read"
        if not chunks and not self.flights:
            assert not self.live(RUNNING)
            assert not self.live(WAITING) or self.live(TRANSFERRING, HELD), "nothing is in the way of those that wait"
        return chunks

    def life(self, request_id: str) -> Life:
        return next(life for life in self.lives if life.sequence.request_id == request_id and not life.over)

    def take(self, events: list[Event]) -> None:
        for event in events:
            life = self.life(event.request_id)
            match event:
                case Admitted(block_ids=block_ids, generations=generations):
                    assert generations == tuple(self.bench.pool.generation(block) for block in block_ids)
                    assert life.admitted is None or life.role is not Role.PREFILL, "its blocks were promised"
                    life.admitted = event
                case Progress(num_computed_tokens=count):
                    assert life.sequence.role is Role.PREFILL
                    self.model.check(life.sequence, count)
                case Sampled(index=index, token=token):
                    assert index == life.num_tokens + life.adopted
                    assert token.token_id == life.expected[index]
                    life.num_tokens += 1
                case Finished(reason=reason, num_completion_tokens=count):
                    assert count == life.num_tokens + life.adopted
                    if reason is FinishReason.ABORT:
                        assert reason in life.causes
                    else:
                        assert count == len(life.expected)
                    life.ends.append(event)
                case Failed(error=error):
                    if isinstance(error, DeadlineExceeded):
                        assert life.sequence.deadline is not None
                        assert life.sequence.deadline <= self.bench.now
                    else:
                        assert type(error) in life.causes
                    life.ends.append(event)

    # The end

    def teardown(self) -> None:
        """All that is still there finishes, once transfers end and held blocks are released; and the pool is whole."""
        for _ in range(1000):
            self.step(0, 1)
            self.the_books_are_right()
            if not self.live(*NOT_FINISHED) and not self.flights:
                break
            self.end_transfer(0, 0, False, 0)
            self.release(0)
        self.step(0, 1)
        assert [len(life.ends) + life.released for life in self.lives] == [1] * len(self.lives)
        self.scheduler.check_integrity()
        assert self.bench.pool.num_free == self.bench.pool.num_blocks
        assert self.scheduler.load().waiting_tokens == 0
