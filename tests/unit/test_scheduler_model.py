"""Random lives of many sequences: the invariants hold after each act, and in the end everybody got their own tokens."""

import enum
from collections import defaultdict, deque
from dataclasses import dataclass, field
from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from scheduling import GARBAGE, VOCABULARY, Bench

from kvrelay.engine.engine import Launched
from kvrelay.engine.events import Admitted, Event, Failed, Finished, Progress, Sampled
from kvrelay.engine.sequence import Chunk, Role, Sequence, SequenceState
from kvrelay.errors import AlreadyExists, DeadlineExceeded, Internal, Unavailable
from kvrelay.request import FinishReason

BLOCK_SIZE = 3
CONTEXT_LENGTH = 24
*NOT_FINISHED, FINISHED = SequenceState
WAITING, TRANSFERRING, RUNNING, HELD = NOT_FINISHED
which = st.integers(0, 1000)


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
specs = st.builds(Spec, **{name: st.sampled_from(values) for name, values in CHOICES.items()})


def random_spec(random: Random) -> Spec:
    return Spec(**{name: random.choice(values) for name, values in CHOICES.items()})


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


class SchedulerMachine(RuleBasedStateMachine):
    """Adds sequences of all roles, steps, hands over, fails, aborts and lets time pass.

    Steps are committed at once, or, with overlap, after the next one has been scheduled; the device writes as late as
    it may.
    """

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

    # Acts

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


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=30,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlap"])
@pytest.mark.parametrize("seed", range(50))
def test_long_lives(seed: int, overlap: bool) -> None:
    """The same acts and invariants at random, which reaches fuller schedulers than the search for small examples."""
    random, machine = Random(seed), SchedulerMachine()
    machine.begin(random.randint(8, 20), random.randint(1, 6), random.randint(1, 20), seed % 4 > 0, overlap)
    for _ in range(150):
        index = random.randrange(10)
        match random.choice(["add", "step", "step", "step", "end_transfer", "release", "disturb"]):
            case "add" if len(machine.live(*NOT_FINISHED)) < 10:
                machine.add([random_spec(random) for _ in range(random.randint(1, 4))])
            case "end_transfer":
                machine.end_transfer(index, random.randint(0, 30), random.random() < 0.4, random.choice([0, 0, 1]))
            case "release" if random.random() < 0.5:
                machine.release(index)
            case "disturb" if random.random() < 0.2:
                machine.disturb(index, random.choice(list(Disturbance)))
            case _:
                machine.step(random.choice([0, 0, 1, 2]), random.randint(1, 4))
        machine.check()
    machine.teardown()
