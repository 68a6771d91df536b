"""A bench for both ends of the handover, without sockets: leases, tickets, handovers and two schedulers.

What crosses the wire is done here by hand, in the order in which `KvService` and `Puller` do it, and at any moment in
between something else may happen. Whoever joins a batch must have the KV cache of its own prompt.
"""

from collections.abc import Callable

import hypothesis.strategies as st
from handover_lives import (
    BLOCK_SIZE,
    CHOICES,
    CONTEXT_LENGTH,
    KEY,
    LEASE_SECONDS,
    WAITS,
    Block,
    Life,
    Loss,
    PrefillWorker,
    Run,
    Side,
    Spec,
)
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from scheduling import GARBAGE, Bench

from kv_transfer.handover import EndReason, Handover
from kv_transfer.tickets import open_ticket, sign_ticket
from kvrelay.engine.events import Admitted, Event, Finished, Progress, Sampled
from kvrelay.engine.sequence import BorrowedBlocks, Role, Sequence, SequenceState
from kvrelay.errors import Cancelled, FailedPrecondition, KvrelayError, NotFound, PermissionDenied, Unavailable

which = st.integers(0, 1000)


class HandoverMachine(RuleBasedStateMachine):
    """One prefill worker, which may start anew, and one decode worker."""

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
        self.decode = self.bench(decode_blocks)
        self.lives: list[Life] = []
        self.on_decode: dict[str, Life] = {}
        self.num_adopted = self.num_recomputed = self.num_refused = self.num_borrowed = 0

    def bench(self, num_blocks: int) -> Bench:
        return Bench(
            num_blocks,
            block_size=BLOCK_SIZE,
            max_batched_tokens=self.max_batched_tokens,
            context_length=CONTEXT_LENGTH,
        )

    # The prefill worker

    @rule(spec=st.builds(Spec, **{name: st.sampled_from(values) for name, values in CHOICES.items()}))
    def submit(self, spec: Spec) -> None:
        if spec.request_id in self.prefill.lives or spec.request_id in self.on_decode:
            return
        life = Life(spec, self.prefill)
        self.add(self.prefill.bench, spec, Role.PREFILL)
        self.prefill.lives[spec.request_id] = life
        self.lives.append(life)

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

    @rule(times=st.integers(1, 4))
    def step_prefill(self, times: int) -> None:
        for _ in range(times):
            worker, bench = self.prefill, self.prefill.bench
            for request_id in worker.mailbox:
                bench.scheduler.forget(request_id)
                worker.lives.pop(request_id, None)
            worker.mailbox.clear()
            bench.now = self.now
            chunks, events = bench.schedule()
            for event in [*events, *bench.commit(chunks)]:
                if event.request_id in worker.lives:
                    self.take_prefill(worker.lives[event.request_id], event)

    def take_prefill(self, life: Life, event: Event) -> None:
        leases = self.prefill.leases
        match event:
            case Admitted():
                life.handover, life.ticket = leases.grant(
                    event.request_id, event.block_ids, event.generations, self.now
                )
                life.handover.advance(event.num_cached_blocks)
                life.signed, life.renewed_at = sign_ticket(life.ticket, KEY), self.now
            case Progress(num_computed_tokens=count) if life.handover is not None:
                life.handover.advance(count // BLOCK_SIZE)
            case Sampled() if event.finish_reason is not None:
                leases.end(event.request_id, EndReason.ABORTED)
                life.lease_ended = life.ended_at_first = True
            case Sampled() if life.handover is not None:
                life.handover.complete(event.token.token_id, self.now)
                life.completed_at = self.now
            case Finished():
                del self.prefill.lives[event.request_id]

    @rule()
    def restart(self) -> None:
        for life in self.prefill.lives.values():
            life.lease_ended = True
        self.prefill = PrefillWorker(self.bench(self.prefill_blocks), self.prefill.epoch + 1)

    @rule()
    def lapse(self) -> None:
        """The worker was taken for lost, and begins a new epoch with what it has."""
        for life in self.leased():
            life.lease_ended = True
        self.prefill.epoch += 1
        self.prefill.leases.begin_epoch(self.prefill.epoch)

    @rule(seconds=st.sampled_from(WAITS), sweep=st.booleans())
    def wait(self, seconds: float, sweep: bool) -> None:
        self.now += seconds
        if sweep:
            expired = self.prefill.leases.expire(self.now)
            due = {life.spec.request_id for life in self.leased() if self.lease_end(life) <= self.now}
            assert set(expired) == due
            for request_id in expired:
                self.prefill.lives[request_id].lease_ended = True

    # The decode worker

    @rule(index=which)
    def submit_decode(self, index: int) -> None:
        waiting = [life for life in self.lives if life.ticket and life.sequence is None and not life.aborted]
        waiting = [life for life in waiting if not life.ended_at_first and life.spec.request_id not in self.on_decode]
        if waiting:
            life = waiting[index % len(waiting)]
            life.sequence = self.add(self.decode, life.spec, Role.DECODE)
            life.sequence.borrowed = self.borrowed(life)
            self.on_decode[life.spec.request_id] = life

    def borrowed(self, life: Life) -> BorrowedBlocks | None:
        """What the sequence may hold instead of blocks of its own."""
        return None

    @rule(times=st.integers(1, 4))
    def step_decode(self, times: int) -> None:
        for _ in range(times):
            chunks, events = self.decode.schedule()
            for event in [*events, *self.decode.commit(chunks)]:
                life = self.on_decode.get(event.request_id)
                if life is None:
                    continue
                if isinstance(event, Admitted) and life.admitted is None:
                    life.admitted = event
                    life.num_verified = event.num_cached_blocks
                    self.num_borrowed += event.borrowed
                    life.num_announced = len(event.block_ids) if event.borrowed else event.num_cached_blocks
                elif isinstance(event, Finished):
                    self.finish(life)

    def finish(self, life: Life) -> None:
        assert life.sequence is not None
        first = [] if life.first_token is None else [life.first_token]
        assert first + self.decode.got(life.spec.request_id) == self.decode.expected(life.sequence)
        life.finished = True
        del self.on_decode[life.spec.request_id]

    @rule(index=which, count=st.integers(1, 8), late=st.booleans())
    def announce(self, index: int, count: int, late: bool) -> None:
        """The prefill worker names blocks that are final, with their bytes or for a reader of its memory."""
        for life in self.one(index, self.transfers()):
            try:
                handover = self.opened(life)
                num_final = handover.num_final_blocks
                handover.check()
                count = min(count, num_final - life.num_announced)
                if count > 0:
                    self.renew(life)
                    first = life.num_announced
                    data = [self.block(life.worker.bench, block) for block in handover.block_ids[first:][:count]]
                    life.worker.leases.verify(handover, first, count)
                    life.runs.append(Run(first, data, [] if late else data))
                    life.num_announced += count
            except KvrelayError as error:
                self.fail(life, error)

    def opened(self, life: Life) -> Handover:
        if life.pull is None:
            life.pull = self.prefill.leases.find(open_ticket(life.signed, KEY), self.now)
        if life.worker is not self.prefill:
            raise Unavailable("the worker that served the pull is gone")
        return life.pull

    def renew(self, life: Life) -> None:
        life.worker.leases.renew(life.spec.request_id, self.now)
        life.renewed_at = self.now

    @rule(index=which, flips=st.sampled_from([False, False, False, True]), at=which)
    def fetch(self, index: int, flips: bool, at: int) -> None:
        """The blocks of a run come into the decode worker's pool, from memory that may be a dead worker's."""
        for life in self.one(index, [life for life in self.transfers() if life.runs]):
            assert life.admitted is not None
            assert life.ticket is not None
            run = life.runs.pop(0)
            end = run.first + len(run.checksums)
            data = run.data or [
                self.block(life.worker.bench, block) for block in life.ticket.block_ids[run.first : end]
            ]
            if flips and self.checksum:
                data = [*data]
                data[at % len(data)] = (*data[at % len(data)][:-1], GARBAGE - 1)
            for block, content in zip(life.admitted.block_ids[run.first : end], data, strict=True):
                self.decode.model.slots[block] = list(content)
            if self.checksum:
                right = [had == wanted for had, wanted in zip(data, run.checksums, strict=True)]
                life.num_verified += right.index(False) if False in right else len(right)
                if False in right:
                    self.fail(life, Unavailable("another checksum"))

    @rule(index=which, loss=st.sampled_from([Loss.NONE, Loss.NONE, Loss.NONE, Loss.REQUEST, Loss.ANSWER]))
    def release(self, index: int, loss: Loss) -> None:
        """All has been copied: Release proves that it was what was meant."""
        for life in self.one(index, [life for life in self.transfers() if self.is_copied(life)]):
            assert life.pull is not None
            token, held = life.pull.first_token_id, self.is_live(life)
            assert token is not None
            assert life.admitted is not None
            if life.admitted.borrowed:
                life.num_verified = len(life.admitted.block_ids)
            try:
                if loss is not Loss.REQUEST:
                    self.prefill.leases.release(open_ticket(life.signed, KEY), self.now)
                    assert held, "released what was not held any more"
                    life.lease_ended = True
                if loss is not Loss.NONE:
                    raise Unavailable("no answer")
            except (NotFound, FailedPrecondition) as error:
                if not life.admitted.borrowed:
                    life.num_verified = life.admitted.num_cached_blocks
                self.fail(life, error)
            except Unavailable as error:
                self.fail(life, error)
            else:
                self.adopt(life, token)

    def is_copied(self, life: Life) -> bool:
        pull = life.pull
        known = pull is not None and pull.first_token_id is not None
        return known and not life.runs and pull is not None and life.num_announced == len(pull.block_ids)

    def adopt(self, life: Life, token: int) -> None:
        assert life.sequence is not None
        self.decode.model.check(life.sequence, life.sequence.num_prompt_tokens)
        assert token == self.decode.expected(life.sequence)[0]
        life.first_token = token
        self.num_adopted += 1
        self.decode.scheduler.adopt(life.spec.request_id, token)

    @rule(index=which)
    def break_off(self, index: int) -> None:
        for life in self.one(index, self.transfers()):
            self.fail(life, Unavailable("the link broke"))

    def fail(self, life: Life, error: KvrelayError) -> None:
        life.runs.clear()
        if isinstance(error, Cancelled):  # the gateway has ended the request
            self.abort_decode(life)
        else:
            self.num_recomputed += 1
            self.decode.scheduler.recompute(life.spec.request_id, life.num_verified)

    # What anybody may do at any time

    @rule(index=which, side=st.sampled_from(Side))
    def abort(self, index: int, side: Side) -> None:
        if side is Side.DECODE:
            for life in self.one(index, list(self.on_decode.values())):
                self.abort_decode(life)
            return
        for life in self.one(index, list(self.prefill.lives.values())):
            life.aborted = life.lease_ended = True
            self.prefill.leases.end(life.spec.request_id, EndReason.ABORTED)
            self.prefill.bench.scheduler.forget(life.spec.request_id)
            del self.prefill.lives[life.spec.request_id]

    def abort_decode(self, life: Life) -> None:
        life.aborted = True
        life.runs.clear()
        self.decode.scheduler.forget(life.spec.request_id)
        del self.on_decode[life.spec.request_id]

    @rule(index=which)
    def present(self, index: int) -> None:
        """Somebody comes with a ticket, maybe an old one."""
        for life in self.one(index, [life for life in self.lives if life.ticket]):
            ticket = open_ticket(life.signed, KEY)
            assert ticket == life.ticket
            live, fresh = self.is_live(life), self.now * 1000 < ticket.expires_unix_ms
            assert refuses(self.prefill.leases.find, ticket, self.now) is not (live and fresh)
            if not live:
                assert refuses(self.prefill.leases.release, ticket, self.now)
                self.num_refused += 1

    @rule(index=which, bit=st.integers(0, 1 << 14))
    def forge(self, index: int, bit: int) -> None:
        for life in self.one(index, [life for life in self.lives if life.ticket]):
            forged = bytearray(life.signed)
            forged[bit // 8 % len(forged)] ^= 1 << bit % 8
            # A bit of the outer message may be one that proto readers pass over.
            assert refuses(open_ticket, bytes(forged), KEY) or open_ticket(bytes(forged), KEY) == life.ticket

    # What the model knows

    def one(self, index: int, lives: list[Life]) -> list[Life]:
        return lives[index % len(lives) :][:1] if lives else []

    def transfers(self) -> list[Life]:
        return [life for life in self.on_decode.values() if life.transferring and life.admitted is not None]

    def leased(self) -> list[Life]:
        return [life for life in self.prefill.lives.values() if life.ticket and not life.lease_ended]

    def lease_end(self, life: Life) -> float:
        return float("inf") if life.completed_at is None else max(life.completed_at, life.renewed_at) + LEASE_SECONDS

    def is_live(self, life: Life) -> bool:
        return life in self.leased() and self.now < self.lease_end(life)

    def block(self, bench: Bench, block_id: int) -> Block:
        return tuple(bench.model.slots[block_id])

    # What always holds

    @invariant()
    def check(self) -> None:
        self.prefill.bench.scheduler.check_integrity()
        self.decode.scheduler.check_integrity()
        assert len(self.prefill.leases) == len(self.leased())
        for life in self.leased():
            assert life.ticket is not None
            assert life.handover is not None
            pool = self.prefill.bench.pool
            assert not any(pool.is_free(block) for block in life.ticket.block_ids)
            assert tuple(map(pool.generation, life.ticket.block_ids)) == life.ticket.generations
            final = min(life.handover.num_final_blocks * BLOCK_SIZE, life.spec.length)
            self.prefill.bench.model.check(self.prefill.bench.sequences[life.spec.request_id], final)
        for life in self.on_decode.values():
            if life.sequence is not None and life.sequence.state is SequenceState.RUNNING:
                self.decode.model.check(life.sequence, life.sequence.num_computed_tokens)

    def teardown(self) -> None:
        """Whatever still runs comes to its end, with its own tokens, and both pools are whole."""
        for _ in range(1000):
            self.step_prefill(1)
            self.step_decode(1)
            self.wait(LEASE_SECONDS + 1, sweep=True)
            self.break_off(0)
            if not self.on_decode and not self.prefill.lives:
                break
        self.step_prefill(1)
        self.check()
        assert not self.on_decode
        assert len(self.prefill.leases) == 0
        assert all(life.finished or life.aborted for life in self.lives if life.sequence is not None)
        for bench in (self.prefill.bench, self.decode):
            assert bench.pool.num_free == bench.pool.num_blocks


def refuses(act: Callable[..., object], *arguments: object) -> bool:
    try:
        act(*arguments)
    except (NotFound, FailedPrecondition, PermissionDenied):
        return True
    return False
