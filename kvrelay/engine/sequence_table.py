"""The books of sequences: where each stands, and which slot and which blocks it holds."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from itertools import chain

from kvrelay.engine.block_pool import BlockBooks
from kvrelay.engine.events import HeldBlocks
from kvrelay.engine.sequence import Chunk, Role, Sequence, SequenceState

__all__ = ["SequenceTable"]


class SequenceTable:
    """Every sequence, by its id. The methods that change a state are the arrows of `SequenceState`; none decides.

    It knows also which steps are in flight: the blocks of a sequence that ends meanwhile are free when no step in
    flight writes to them.

    Attributes:
        sequences: all that have not ended.
        waiting: those to be admitted, the next one first.
        running: those that have a slot.
        num_transferring: those whose KV cache comes from another worker.
        num_waiting_tokens: tokens of `waiting` that will be computed here.
    """

    def __init__(self, pool: BlockBooks, num_slots: int) -> None:
        self.sequences: dict[str, Sequence] = {}
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self.running: dict[str, Sequence] = {}
        self.num_transferring = 0
        self.num_waiting_tokens = 0
        self._pool = pool
        self._free_slots = list(reversed(range(num_slots)))
        self._in_flight: deque[Items[Chunk]] = deque()
        self._ended_in_flight: set[Sequence] = set()

    # What others ask

    @property
    def num_admitted(self) -> int:
        """Sequences that run, or whose KV cache is being transferred."""
        return len(self.running) + self.num_transferring

    @property
    def num_decoding(self) -> int:
        """Running sequences that have their prompt behind them."""
        return sum(sequence.decodes for sequence in self.running.values())

    @property
    def in_flight(self) -> bool:
        """Whether a step is."""
        return bool(self._in_flight)

    def held(self) -> list[HeldBlocks]:
        """Every block that is held, by whom, and in which state."""
        return [
            HeldBlocks(s.request_id, s.state.value, tuple(s.block_table), s.held_since)
            for s in self._holders()
            if s.block_table
        ]

    def check_integrity(self) -> None:
        """Raises: RuntimeError if a block is lost, or held by nobody."""
        self._pool.check(block for sequence in self._holders() for block in sequence.block_table)

    # Where a sequence stands

    def add(self, sequence: Sequence) -> None:
        """A new one joins the end of the queue."""
        self.sequences[sequence.request_id] = sequence
        self._enqueue(sequence)

    def transfer(self, sequence: Sequence) -> None:
        self._leave_state(sequence)
        sequence.state = SequenceState.TRANSFERRING
        self.num_transferring += 1

    def run(self, sequence: Sequence) -> None:
        self._leave_state(sequence)
        sequence.state = SequenceState.RUNNING
        self.running[sequence.request_id] = sequence
        sequence.slot = self._free_slots.pop()

    def hold(self, sequence: Sequence) -> None:
        self._leave_state(sequence)
        sequence.state = SequenceState.HELD

    def preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue, with nothing but what the prefix cache happens to keep."""
        self._leave_state(sequence)
        self._free_blocks(sequence)
        sequence.role = Role.WHOLE
        self._enqueue(sequence)
        self.waiting.move_to_end(sequence.request_id, last=False)

    def finish(self, sequence: Sequence) -> None:
        self._leave_state(sequence)
        if sequence.in_flight:
            # The device is going to write into its blocks, so that nobody else may have them yet.
            self._ended_in_flight.add(sequence)
        else:
            self._free_blocks(sequence)
        sequence.state = SequenceState.FINISHED
        del self.sequences[sequence.request_id]

    # Which steps are in flight

    def assume(self, chunks: Items[Chunk]) -> None:
        """The step is in flight from now on."""
        self._in_flight.append(chunks)
        for chunk in chunks:
            chunk.sequence.num_computing_tokens += chunk.length
            chunk.sequence.num_sampling_tokens += chunk.samples

    def settle(self, chunks: Items[Chunk]) -> None:
        """Nothing of the step is in flight any more, if it was."""
        if not self._in_flight or self._in_flight[0] is not chunks:
            return
        self._in_flight.popleft()
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computing_tokens -= chunk.length
            sequence.num_sampling_tokens -= chunk.samples
            if sequence in self._ended_in_flight and not sequence.in_flight:
                self._ended_in_flight.remove(sequence)
                self._free_blocks(sequence)

    # How

    def _holders(self) -> Iterator[Sequence]:
        return chain(self.sequences.values(), self._ended_in_flight)

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        self.waiting[sequence.request_id] = sequence
        if sequence.role is not Role.DECODE:
            self.num_waiting_tokens += len(sequence.token_ids)

    def _leave_state(self, sequence: Sequence) -> None:
        """Takes back what its state has entered into the books."""
        if sequence.state is SequenceState.WAITING:
            del self.waiting[sequence.request_id]
            if sequence.role is not Role.DECODE:
                self.num_waiting_tokens -= len(sequence.token_ids)
        elif sequence.state is SequenceState.TRANSFERRING:
            self.num_transferring -= 1
        elif sequence.state is SequenceState.RUNNING:
            del self.running[sequence.request_id]
            self._free_slots.append(sequence.slot)
            sequence.slot = -1

    def _free_blocks(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0
