"""A bench for the engine's policy: a scheduler, a clock that the test moves, and a model that needs no tensors."""

import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Protocol

from kvrelay.engine.admission import BlockAdmission
from kvrelay.engine.block_pool import BlockBooks, BlockPool
from kvrelay.engine.engine import Launched
from kvrelay.engine.events import Admitted, Event, Failed, Finished, Progress, Sampled
from kvrelay.engine.limits import Limits
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import Chunk, Role, Sequence, SequenceState
from kvrelay.request import Request, Sampling, Token

VOCABULARY = 11
GARBAGE = -1
ChunkShape = tuple[str, int, int]


def fingerprints(salt: str, token_ids: Iterable[int]) -> list[int]:
    """What the fake model keeps in each slot: as in a real KV cache, it depends on all tokens up to there."""
    value, slots = zlib.crc32(salt.encode()), []
    for token_id in token_ids:
        value = hash((value, token_id))
        slots.append(value)
    return slots


def completion(request: Request, context_length: int) -> list[int]:
    """The tokens that a request must get, whatever is scheduled beside it."""
    tokens = list(request.prompt_token_ids)
    while True:
        tokens.append(fingerprints(request.cache_salt, tokens)[-1] % VOCABULARY)
        produced = len(tokens) - len(request.prompt_token_ids)
        if (
            tokens[-1] in request.sampling.stop_token_ids
            or produced >= request.sampling.max_tokens
            or len(tokens) >= context_length
        ):
            return tokens[-produced:]


class Cached(Protocol):
    """What has a KV cache: a sequence, or what a device was told of it."""

    request: Request
    block_table: list[int]

    @property
    def token_ids(self) -> Items[int]: ...


@dataclass
class Input:
    """A chunk as the device got it at the launch. Of tokens in flight it knows the number only."""

    chunk: Chunk
    request: Request
    token_ids: list[int]
    num_unknown: int
    block_table: list[int]


@dataclass
class FakeStep:
    model: "FakeModel"
    inputs: list[Input]

    def tokens(self) -> list[Token]:
        return self.model.compute(self.inputs)


class FakeModel:
    """Computes fingerprints in place of keys and values, and refuses to read a slot that is not the sequence's own.

    It computes a step as late as a device may: when somebody waits for its tokens.
    """

    def __init__(
        self, num_blocks: int, block_size: int, overlaps: bool = False, slots: list[list[int]] | None = None
    ) -> None:
        self.block_size = block_size
        self.overlaps = overlaps
        self.slots = [[GARBAGE] * block_size for _ in range(num_blocks)] if slots is None else slots
        self.num_computed = 0
        self._last_tokens: dict[Sequence, int] = {}

    def launch(self, chunks: Items[Chunk]) -> Launched:
        inputs = []
        for chunk in chunks:
            s = chunk.sequence
            inputs.append(Input(chunk, s.request, list(s.token_ids), s.num_sampling_tokens, list(s.block_table)))
        return FakeStep(self, inputs)

    def compute(self, inputs: Items[Input]) -> list[Token]:
        for each in inputs:
            if each.num_unknown:
                each.token_ids.append(self._last_tokens[each.chunk.sequence])
        for each in inputs:
            if each.chunk.sequence.state is not SequenceState.FINISHED:  # else nobody reads what comes of it
                self.check(each, each.chunk.start)
        tokens = []
        for each in inputs:
            chunk = each.chunk
            self.write(each, chunk.start, chunk.end)
            self.num_computed += chunk.length
            if chunk.samples:
                tokens.append(Token(self.read(each, chunk.end)[-1] % VOCABULARY))
                self._last_tokens[chunk.sequence] = tokens[-1].token_id
        return tokens

    def run(self, chunks: Items[Chunk]) -> list[Token]:
        return self.launch(chunks).tokens()

    def check(self, sequence: Cached, length: int) -> None:
        expected = fingerprints(sequence.request.cache_salt, sequence.token_ids[:length])
        if self.read(sequence, length) != expected:
            raise AssertionError(f"{sequence.request.request_id} reads KV that is not its own below {length}")

    def read(self, sequence: Cached, length: int) -> list[int]:
        blocks = sequence.block_table[: -(-length // self.block_size)]
        return [slot for block in blocks for slot in self.slots[block]][:length]

    def write(self, sequence: Cached, start: int, end: int, value: int | None = None) -> None:
        """Writes what belongs there, or `value`."""
        content = fingerprints(sequence.request.cache_salt, sequence.token_ids[:end])
        for position in range(start, end):
            block = sequence.block_table[position // self.block_size]
            self.slots[block][position % self.block_size] = content[position] if value is None else value


class CheckedAdmission(BlockAdmission):
    """Refuses nobody without a look whom it would not refuse after one."""

    def _is_refused_still(self, sequence: Sequence, watermark: int) -> bool:
        if not super()._is_refused_still(sequence, watermark):
            return False
        cached = self._prefixes.find(sequence)
        num_held = sum(not self._pool.is_free(block) for block in cached)
        wanted = self._limits.blocks_for(len(sequence.token_ids)) - num_held + watermark
        if wanted <= self._pool.num_free:
            raise AssertionError(f"{sequence.request_id} is refused, with {wanted} of {self._pool.num_free} wanted")
        return True


class Bench:
    """Keeps all events, and per request its tokens and how it ended.

    With `overlap`, each step is committed after the next has been scheduled. Workers that share a pool have a `pool`
    with the same books, and the same `slots`.
    """

    def __init__(
        self,
        num_blocks: int = 64,
        *,
        block_size: int = 4,
        max_num_sequences: int = 8,
        max_batched_tokens: int = 64,
        context_length: int = 100,
        prefix_caching: bool = True,
        overlap: bool = False,
        itl_limit: float = 0.0,
        pool: BlockBooks | None = None,
        slots: list[list[int]] | None = None,
    ) -> None:
        limits = Limits(
            max_num_sequences=max_num_sequences,
            max_batched_tokens=max_batched_tokens,
            context_length=min(context_length, num_blocks * block_size),
            block_size=block_size,
            model_digest=b"model",
            prefix_caching=prefix_caching,
            itl_limit=itl_limit,
        )
        self.scheduler = Scheduler(pool or BlockPool(num_blocks), limits)
        self.scheduler._admission = CheckedAdmission(self.pool, self.scheduler._prefixes, limits)
        self.model = FakeModel(num_blocks, block_size, overlap, slots)
        self.in_flight: deque[tuple[list[Chunk], Launched]] = deque()
        self.now = 0.0
        self.sequences: dict[str, Sequence] = {}
        self.events: list[Event] = []
        self.tokens: defaultdict[str, dict[int, int]] = defaultdict(dict)
        self.ends: defaultdict[str, list[Finished | Failed]] = defaultdict(list)

    @property
    def pool(self) -> BlockBooks:
        return self.scheduler.pool

    def add(
        self,
        request_id: str,
        prompt: Iterable[int],
        role: Role = Role.WHOLE,
        *,
        max_tokens: int = 4,
        salt: str = "",
        stop: Iterable[int] = (),
        deadline: float | None = None,
        arrival: float | None = None,
    ) -> Sequence:
        sampling = Sampling(max_tokens, stop_token_ids=frozenset(stop))
        sequence = Sequence(
            Request(request_id, tuple(prompt), sampling, salt),
            role,
            float(len(self.sequences)) if arrival is None else arrival,
            deadline,
        )
        self.scheduler.add(sequence)
        self.sequences[request_id] = sequence
        return sequence

    def schedule(self) -> tuple[list[Chunk], list[Event]]:
        chunks, events = self.scheduler.schedule(self.now)
        self._note(events)
        return chunks, events

    def commit(self, chunks: Items[Chunk]) -> list[Event]:
        events = self.scheduler.commit(chunks, self.model.run(chunks))
        self._note(events)
        return events

    def step(self) -> list[ChunkShape]:
        """One step; answers with its chunks: request, start, length."""
        chunks, _ = self.schedule()
        if self.model.overlaps:
            self.launch(chunks)
            self.settle(keep=min(len(chunks), 1))
        else:
            self.commit(chunks)
        return [(chunk.sequence.request_id, chunk.start, chunk.length) for chunk in chunks]

    def launch(self, chunks: list[Chunk]) -> None:
        """The device has begun to compute a step."""
        if chunks:
            self.in_flight.append((chunks, self.model.launch(chunks)))
            self.scheduler.assume(chunks)

    def settle(self, keep: int = 0) -> list[Event]:
        """Commits what is in flight but for the last `keep` steps."""
        events = []
        while len(self.in_flight) > keep:
            chunks, launched = self.in_flight.popleft()
            events += self.scheduler.commit(chunks, launched.tokens())
        self._note(events)
        return events

    def drain(self, limit: int = 1000) -> list[list[ChunkShape]]:
        """Steps until nothing is left to compute."""
        steps: list[list[ChunkShape]] = []
        while True:
            was_busy = bool(self.in_flight)
            shapes = self.step()
            if not shapes and not was_busy:
                return steps
            steps += [shapes] if shapes else []
            if len(steps) > limit:
                raise AssertionError(f"no end after {limit} steps: {self.scheduler.load()}")

    def transfer(self, sequence: Sequence) -> int:
        """Copies the prompt's KV cache into the blocks of a sequence in transfer; answers with the first token."""
        self.model.check(sequence, sequence.num_computed_tokens)
        self.model.write(sequence, sequence.num_computed_tokens, sequence.num_prompt_tokens)
        return self.expected(sequence)[0]

    def expected(self, sequence: Sequence) -> list[int]:
        return completion(sequence.request, self.scheduler.limits.context_length)

    def got(self, request_id: str) -> list[int]:
        return list(self.tokens[request_id].values())

    def admissions(self, request_id: str) -> list[Admitted]:
        return [event for event in self.events if isinstance(event, Admitted) and event.request_id == request_id]

    def progress(self, request_id: str) -> list[int]:
        return [e.num_computed_tokens for e in self.events if isinstance(e, Progress) and e.request_id == request_id]

    def close(self) -> None:
        """The books are right; and when all is aborted, every block is free."""
        self.settle()
        self.scheduler.check_integrity()
        for request_id in self.sequences:
            self.scheduler.abort(request_id)
        self.schedule()
        self.scheduler.check_integrity()
        load = self.scheduler.load()
        if (load.blocks_free, load.running, load.waiting, load.waiting_tokens) != (load.blocks_total, 0, 0, 0):
            raise AssertionError(f"not idle after all was aborted: {load}")

    def _note(self, events: Iterable[Event]) -> None:
        for event in events:
            self.events.append(event)
            if isinstance(event, Sampled):
                if event.index in self.tokens[event.request_id]:
                    raise AssertionError(f"{event.request_id} got token {event.index} twice")
                self.tokens[event.request_id][event.index] = event.token.token_id
            elif isinstance(event, Finished | Failed):
                self.ends[event.request_id].append(event)


NewBench = Callable[..., Bench]


def whole(load: Any) -> bool:
    return bool(load.blocks_free == load.blocks_total and load.running == load.waiting == load.waiting_tokens == 0)
