"""Which tokens are computed next. Pure policy: takes the time as an argument, owns no I/O and no tensors.

Iteration-level scheduling after Orca (Yu et al., OSDI 2022) with chunked prefill after Sarathi-Serve (Agrawal et al.,
OSDI 2024): each step computes one token of every decoding sequence first, then as many prompt tokens as the budget
leaves; `StepBudget` says how many that are beside decoding sequences. When blocks run out, the youngest sequence gives
its own back, and is recomputed later or goes on elsewhere; but the blocks of a sequence that is to be handed over are
promised to a decode worker and stay.

A step may be scheduled before the one before it is committed, while the device computes that one. It is then assumed
to bring what every step brings: the KV cache of its chunks, and one token of which only the device knows which it is.
What is told to others waits for the commit: names of cached blocks, progress, tokens, handovers. Of a sequence that
ends meanwhile one token too many is computed, and dropped; its blocks are free when no step in flight writes to them.

Where several workers share the pool, others take its blocks and give them back at any time. So the books are locked
while a step is planned, and whoever waits for blocks looks again by itself.

What is decided here is entered in three books: where sequences stand (`SequenceTable`), which prefixes are cached
(`PrefixCache`), and whose time is up when (`Deadlines`). `BlockAdmission` says whether a waiting sequence finds blocks
to begin with.
"""

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items

from kvrelay.engine.admission import BlockAdmission
from kvrelay.engine.block_pool import BlockBooks
from kvrelay.engine.deadlines import Deadlines
from kvrelay.engine.events import EngineLoad, Event, Failed, Finished, HandedOver, HeldBlocks, Progress, Sampled
from kvrelay.engine.limits import Limits
from kvrelay.engine.prefix_cache import PrefixCache
from kvrelay.engine.sequence import Chunk, Role, Sequence, SequenceState
from kvrelay.engine.sequence_table import SequenceTable
from kvrelay.engine.step_budget import StepBudget
from kvrelay.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    KvrelayError,
)
from kvrelay.request import FinishReason, Token

__all__ = ["Scheduler"]


class Scheduler:
    """Owns the sequences and the block pool. One thread calls it: `schedule`, then `commit`, for ever.

    Who commits a step only after the next has been scheduled calls `assume` in between. Steps are committed in order.

    Between the calls, sequences may be added, aborted, adopted or handed over; what that brings about is among the
    events that the next `schedule` or `commit` returns.

    Raises:
        ValueError: a sequence of the context's length would not fit the pool, and would wait in it for ever.
    """

    def __init__(self, pool: BlockBooks, limits: Limits) -> None:
        if limits.context_length > pool.num_blocks * limits.block_size:
            capacity = f"{pool.num_blocks} blocks of {limits.block_size}"
            raise ValueError(f"a context of {limits.context_length} tokens does not fit {capacity}")
        self.pool = pool
        self.limits = limits
        self._table = SequenceTable(pool, limits.max_num_sequences)
        self._prefixes = PrefixCache(pool, limits.block_size, limits.model_digest, limits.prefix_caching)
        self._admission = BlockAdmission(pool, self._prefixes, limits)
        self._deadlines = Deadlines(self._table.sequences)
        self._budget = StepBudget(limits.max_batched_tokens, limits.itl_limit, limits.block_size)
        self._num_preemptions = 0
        self._events: list[Event] = []

    # What others ask

    @property
    def next_deadline(self) -> float | None:
        """When `schedule` must be called at the latest, even if nothing else happens."""
        return self._deadlines.earliest

    @property
    def waits_for_others(self) -> bool:
        """Whether `schedule` may find work although nobody has told anything: others may have given blocks back."""
        return self.pool.shared and bool(self._table.waiting)

    def load(self) -> EngineLoad:
        table = self._table
        return EngineLoad(
            running=table.num_admitted,
            waiting=len(table.waiting),
            waiting_tokens=table.num_waiting_tokens + sum(s.num_uncomputed_tokens for s in table.running.values()),
            blocks_total=self.pool.num_blocks,
            blocks_free=self.pool.num_free,
            blocks_held=self.pool.num_held,
            preemptions=self._num_preemptions,
            prefill_rate=self._budget.prefill_rate,
        )

    def held(self) -> list[HeldBlocks]:
        """Every block that is held, by whom, and in which state."""
        return self._table.held()

    def check_integrity(self) -> None:
        """Raises: RuntimeError if a block is lost, or held by nobody."""
        self._table.check_integrity()

    # What others tell

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence.

        Raises:
            AlreadyExists: its id is known.
            InvalidArgument: it can never run here.
        """
        if sequence.request_id in self._table.sequences:
            raise AlreadyExists(f"request {sequence.request_id} is on this worker already", reason="ALREADY_ON_WORKER")
        num_tokens = len(sequence.token_ids)
        if not sequence.num_prompt_tokens or not num_tokens < self.limits.context_length:
            raise InvalidArgument.field(
                "prompt", f"{num_tokens} tokens do not fit a context of {self.limits.context_length}"
            )
        self._table.add(sequence)
        self._deadlines.watch(sequence)

    def abort(self, request_id: str, error: KvrelayError | None = None) -> None:
        """Ends a sequence in any state; unknown ids are passed over.

        A sequence in transfer may not be aborted here: whoever copies into its blocks stops first, then calls this.
        """
        sequence = self._table.sequences.get(request_id)
        if sequence is None:
            return
        if error is not None:
            self._table.finish(sequence)
            self._events.append(Failed(request_id, error))
        else:
            self._finish(sequence, FinishReason.ABORT)

    def forget(self, request_id: str) -> None:
        """As `abort`, and nothing more is told of the sequence, so that another may have its id."""
        self.abort(request_id)
        self._events = [event for event in self._events if event.request_id != request_id]

    def adopt(self, request_id: str, first_token_id: int) -> None:
        """The blocks of a sequence in transfer are whole: it runs, from the token that the prefill worker sampled."""
        sequence = self._table.sequences.get(request_id)
        if sequence is None or sequence.state is not SequenceState.TRANSFERRING:
            return
        self._table.run(sequence)
        self._deadlines.watch(sequence)
        self._prefixes.advance(sequence, len(sequence.token_ids))
        reason = sequence.append(first_token_id, self.limits.context_length)
        if reason is not None:
            self._finish(sequence, reason)
        self._hold_if_leaving(sequence)

    def recompute(self, request_id: str, num_valid_blocks: int) -> None:
        """The transfer failed: the sequence goes on from the blocks that are verified and computes the rest here."""
        sequence = self._table.sequences.get(request_id)
        if sequence is None or sequence.state is not SequenceState.TRANSFERRING:
            return
        valid = min(num_valid_blocks * self.limits.block_size, len(sequence.token_ids))
        self._prefixes.advance(sequence, max(valid, sequence.num_computed_tokens))
        self._table.preempt(sequence)
        self._deadlines.watch(sequence)

    def hand_over(self, request_id: str) -> None:
        """The sequence goes on elsewhere: it stops when its KV cache lacks but its last token's, and is held."""
        sequence = self._table.sequences.get(request_id)
        if sequence is not None:
            sequence.leaving = True
            self._hold_if_leaving(sequence)

    # The step

    def schedule(self, now: float) -> tuple[list[Chunk], list[Event]]:
        """Decides on the next step; answers with it and with what has happened since the last.

        Sequences whose deadline has passed fail first, so that expired work never starts.
        """
        self._expire(now)
        budget = self._budget.num_tokens(self._table.num_decoding)
        with self.pool.locked():
            chunks = self._schedule_running(budget)
            if chunks is not None:
                budget -= sum(chunk.length for chunk in chunks)
                chunks += self._schedule_waiting(budget, now)
            self.pool.expect_growth(len(self._table.running))
        events, self._events = self._events, []
        return chunks or [], events

    def observe(self, chunks: Items[Chunk], seconds: float) -> None:
        """A step of these chunks took so long, which says what later ones may hold."""
        num_prompt_tokens = sum(chunk.length for chunk in chunks if not chunk.decodes)
        self._budget.observe(sum(chunk.length for chunk in chunks), num_prompt_tokens, seconds)

    def assume(self, chunks: Items[Chunk]) -> None:
        """Reckons with a step that has been launched and will be committed after the next one is scheduled."""
        self._table.assume(chunks)

    def commit(self, chunks: Items[Chunk], tokens: Items[Token]) -> list[Event]:
        """Books what a step computed.

        Args:
            tokens: one for each chunk that samples, in the same order.
        """
        self._table.settle(chunks)
        sampled: Iterator[Token] = iter(tokens)
        for chunk in chunks:
            token = next(sampled) if chunk.samples else None
            if chunk.sequence.state is not SequenceState.RUNNING:
                continue  # It ended while the step was computed.
            self._prefixes.advance(chunk.sequence, chunk.end)
            if token is not None:
                self._append(chunk.sequence, token)
            elif chunk.sequence.role is Role.PREFILL:
                self._events.append(Progress(chunk.sequence.request_id, chunk.end))
            self._hold_if_leaving(chunk.sequence)
        events, self._events = self._events, []
        return events

    def fail(self, chunks: Items[Chunk], error: Internal) -> list[Event]:
        """Books a step that could not be computed: its sequences fail, the others go on."""
        self._table.settle(chunks)
        for chunk in chunks:
            if chunk.sequence.state is not SequenceState.FINISHED:
                self.abort(chunk.sequence.request_id, error)
        events, self._events = self._events, []
        return events

    # How

    def _expire(self, now: float) -> None:
        for sequence in self._deadlines.expired(now):
            # Who copies into a sequence's blocks has the same deadline and ends it after the copy.
            if sequence.state is not SequenceState.TRANSFERRING:
                self.abort(sequence.request_id, DeadlineExceeded("the deadline passed before the request was done"))

    def _schedule_running(self, budget: int) -> list[Chunk] | None:
        """None: blocks are short, and nobody gives way before the step in flight has shown who ends."""
        chunks = []
        running = self._table.running.values()
        candidates = deque(sorted(running, key=lambda s: (s.num_uncomputed_tokens > 1, s.arrival)))
        while candidates and budget > 0:
            sequence = candidates.popleft()
            if sequence.will_end(self.limits.context_length) or sequence.at_handover:
                continue
            length = min(sequence.num_uncomputed_tokens, budget)
            wanted = self.limits.blocks_for(sequence.next_position + length) - len(sequence.block_table)
            if wanted > self.pool.num_free and self._table.in_flight:
                return None
            if self._make_room(sequence, wanted, candidates):
                chunks.append(Chunk(sequence, sequence.next_position, length))
                budget -= length
        return chunks

    def _make_room(self, sequence: Sequence, wanted: int, others: deque[Sequence]) -> bool:
        """Gives the sequence the blocks it needs, at the cost of younger ones; False if it had to give way itself."""
        while wanted > self.pool.num_free:
            # The oldest never gives way while others can, so that all finish in the end.
            victims = (s for s in reversed((sequence, *others)) if s.role is not Role.PREFILL)
            victim = max(victims, key=lambda s: s.arrival)
            self._give_way(victim)
            if victim is sequence:
                return False
            others.remove(victim)
        if wanted > 0:
            sequence.block_table += self.pool.allocate(wanted)
        return True

    def _give_way(self, sequence: Sequence) -> None:
        self._num_preemptions += 1
        if self.limits.evicts:
            message = "the worker ran out of KV blocks; the request can go on elsewhere"
            self.abort(sequence.request_id, FailedPrecondition(message, reason="EVICTED"))
        else:
            self._table.preempt(sequence)

    def _schedule_waiting(self, budget: int, now: float) -> list[Chunk]:
        chunks = []
        while self._table.waiting and self._table.num_admitted < self.limits.max_num_sequences:
            sequence = next(iter(self._table.waiting.values()))
            if (budget <= 0 and sequence.role is not Role.DECODE) or not self._admit(sequence, now):
                break
            if sequence.state is SequenceState.RUNNING:
                length = min(sequence.num_uncomputed_tokens, budget)
                chunks.append(Chunk(sequence, sequence.next_position, length))
                budget -= length
        return chunks

    def _admit(self, sequence: Sequence, now: float) -> bool:
        """Lets the sequence begin, with blocks for all tokens known; False if there are too few."""
        admitted = self._admission.admit(sequence, len(self._table.running))
        if admitted is None:
            return False
        sequence.held_since = now
        self._events.append(admitted)
        if sequence.role is Role.DECODE:
            self._table.transfer(sequence)
        else:
            self._table.run(sequence)
        return True

    def _append(self, sequence: Sequence, token: Token) -> None:
        index = sequence.num_completion_tokens
        reason = sequence.append(token.token_id, self.limits.context_length)
        self._events.append(Sampled(sequence.request_id, index, token, reason))
        if reason is not None:
            self._finish(sequence, reason)
        elif sequence.role is Role.PREFILL:
            self._table.hold(sequence)

    def _hold_if_leaving(self, sequence: Sequence) -> None:
        if sequence.at_handover and sequence.state is SequenceState.RUNNING and not sequence.in_flight:
            self._table.hold(sequence)
            blocks = tuple(sequence.block_table[: self.limits.blocks_for(sequence.num_computed_tokens)])
            generations = tuple(map(self.pool.generation, blocks))
            self._events.append(
                HandedOver(
                    sequence.request_id, blocks, generations, sequence.token_ids[-1], sequence.num_completion_tokens
                )
            )

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._table.finish(sequence)
        self._events.append(Finished(sequence.request_id, reason, sequence.num_completion_tokens))
