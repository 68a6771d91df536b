"""A bench for both ends of the handover, without sockets: leases, tickets, handovers and three schedulers.

What crosses the wire is done here by hand, in the order in which `KvService` and `Puller` do it, and at any moment in
between something else may happen. Whoever joins a batch must have the KV cache of its own prompt.
"""

from typing import TypeVar

import hypothesis.strategies as st
from hypothesis.stateful import rule

from kv_transfer.handover import EndReason, Handover
from kv_transfer.tickets import open_ticket
from kvrelay.engine.events import Admitted, Finished
from kvrelay.engine.sequence import BorrowedBlocks, Role
from kvrelay.errors import Cancelled, FailedPrecondition, KvrelayError, NotFound, Unavailable
from tests.unit.handover_invariants import refuses
from tests.unit.handover_lives import KEY, LEASE_SECONDS, Block, Life, Loss, Run, Side, Taking
from tests.unit.handover_prefill import PrefillActs
from tests.unit.scheduling import GARBAGE, Bench

Item = TypeVar("Item")
which = st.integers(0, 1000)


class HandoverMachine(PrefillActs):
    """One prefill worker, which may start anew, and two decode workers, either or both of which get a ticket."""

    # The decode workers

    @rule(index=which, worker=st.sampled_from([0, 1]))
    def submit_decode(self, index: int, worker: int) -> None:
        """Also where the other has the same ticket, and is lost, or is only taken for lost."""
        decode = self.decodes[worker]
        waiting = [life for life in self.lives if life.ticket and not life.aborted and not life.ended_at_first]
        waiting = [life for life in waiting if all(taking.decode is not decode for taking in life.takings)]
        for life in self.one(index, [life for life in waiting if life.spec.request_id not in decode.takings]):
            taking = Taking(life, decode, self.add(decode.bench, life.spec, Role.DECODE))
            taking.sequence.borrowed = self.borrowed(life)
            decode.takings[life.spec.request_id] = taking
            life.takings.append(taking)

    def borrowed(self, life: Life) -> BorrowedBlocks | None:
        """What the sequence may hold instead of blocks of its own."""
        return None

    @rule(times=st.integers(1, 4))
    def step_decode(self, times: int) -> None:
        for decode in self.decodes * times:
            chunks, events = decode.bench.schedule()
            for event in [*events, *decode.bench.commit(chunks)]:
                taking = decode.takings.get(event.request_id)
                if taking is None:
                    continue
                if isinstance(event, Admitted) and taking.admitted is None:
                    taking.admitted = event
                    taking.num_verified = event.num_cached_blocks
                    taking.num_announced = len(event.block_ids) if event.borrowed else event.num_cached_blocks
                    self.num_borrowed += event.borrowed
                elif isinstance(event, Finished):
                    self.finish(taking)

    def finish(self, taking: Taking) -> None:
        request_id, bench = taking.life.spec.request_id, taking.bench
        first = [] if taking.first_token is None else [taking.first_token]
        assert first + bench.got(request_id) == bench.expected(taking.sequence)
        taking.finished = True
        del taking.decode.takings[request_id]

    @rule(index=which, count=st.integers(1, 8), late=st.booleans())
    def announce(self, index: int, count: int, late: bool) -> None:
        """The prefill worker names blocks that are final, with their bytes or for a reader of its memory."""
        for taking in self.one(index, self.transfers()):
            worker = taking.life.worker
            try:
                handover = self.opened(taking)
                num_final = handover.num_final_blocks
                handover.check()
                count = min(count, num_final - taking.num_announced)
                if count > 0:
                    self.renew(taking.life)
                    first = taking.num_announced
                    data = [self.block(worker.bench, block) for block in handover.block_ids[first:][:count]]
                    worker.leases.verify(handover, first, count)
                    taking.runs.append(Run(first, data, [] if late else data))
                    taking.num_announced += count
            except KvrelayError as error:
                self.fail(taking, error)

    def opened(self, taking: Taking) -> Handover:
        if taking.pull is None:
            taking.pull = self.prefill.leases.find(open_ticket(taking.life.signed, KEY), self.now)
        if taking.life.worker is not self.prefill:
            raise Unavailable("the worker that served the pull is gone")
        return taking.pull

    def renew(self, life: Life) -> None:
        life.worker.leases.renew(life.spec.request_id, self.now)
        life.renewed_at = self.now

    @rule(index=which, flips=st.sampled_from([False, False, False, True]), at=which)
    def fetch(self, index: int, flips: bool, at: int) -> None:
        """The blocks of a run come into the decode worker's pool, from memory that may be a dead worker's."""
        for taking in self.one(index, [taking for taking in self.transfers() if taking.runs]):
            ticket = taking.life.ticket
            assert taking.admitted is not None
            assert ticket is not None
            run = taking.runs.pop(0)
            end = run.first + len(run.checksums)
            source = taking.life.worker.bench
            data = run.data or [self.block(source, block) for block in ticket.block_ids[run.first : end]]
            if flips and self.checksum:
                data = [*data]
                data[at % len(data)] = (*data[at % len(data)][:-1], GARBAGE - 1)
            for block, content in zip(taking.admitted.block_ids[run.first : end], data, strict=True):
                taking.bench.model.slots[block] = list(content)
            if self.checksum:
                right = [had == wanted for had, wanted in zip(data, run.checksums, strict=True)]
                taking.num_verified += right.index(False) if False in right else len(right)
                if False in right:
                    self.fail(taking, Unavailable("another checksum"))

    @rule(index=which, loss=st.sampled_from([Loss.NONE, Loss.NONE, Loss.NONE, Loss.REQUEST, Loss.ANSWER]))
    def release(self, index: int, loss: Loss) -> None:
        """All has been copied: Release proves that it was what was meant."""
        for taking in self.one(index, [taking for taking in self.transfers() if self.is_copied(taking)]):
            life = taking.life
            assert taking.pull is not None
            token, held = taking.pull.first_token_id, self.is_live(life)
            assert token is not None
            assert taking.admitted is not None
            if taking.admitted.borrowed:
                taking.num_verified = len(taking.admitted.block_ids)
            try:
                if loss is not Loss.REQUEST:
                    self.prefill.leases.release(open_ticket(life.signed, KEY), self.now)
                    assert held, "released what was not held any more"
                    life.lease_ended = True
                    life.num_releases += 1
                    assert life.num_releases == 1, "two have got it"
                if loss is not Loss.NONE:
                    raise Unavailable("no answer")
            except (NotFound, FailedPrecondition) as error:
                if not taking.admitted.borrowed:
                    taking.num_verified = taking.admitted.num_cached_blocks
                self.fail(taking, error)
            except Unavailable as error:
                self.fail(taking, error)
            else:
                self.adopt(taking, token)

    def is_copied(self, taking: Taking) -> bool:
        pull = taking.pull
        known = pull is not None and pull.first_token_id is not None
        return known and not taking.runs and pull is not None and taking.num_announced == len(pull.block_ids)

    def adopt(self, taking: Taking, token: int) -> None:
        bench, sequence = taking.bench, taking.sequence
        bench.model.check(sequence, sequence.num_prompt_tokens)
        assert token == bench.expected(sequence)[0]
        taking.first_token = token
        self.num_adopted += 1
        self.num_taken_from_another += len(taking.life.takings) > 1
        bench.scheduler.adopt(taking.life.spec.request_id, token)

    @rule(index=which)
    def break_off(self, index: int) -> None:
        for taking in self.one(index, self.transfers()):
            self.fail(taking, Unavailable("the link broke"))

    def fail(self, taking: Taking, error: KvrelayError) -> None:
        taking.runs.clear()
        if isinstance(error, Cancelled):  # the gateway has ended the request
            self.abort_decode(taking)
        else:
            self.num_recomputed += 1
            taking.bench.scheduler.recompute(taking.life.spec.request_id, taking.num_verified)

    # What anybody may do at any time

    @rule(index=which, side=st.sampled_from(Side))
    def abort(self, index: int, side: Side) -> None:
        if side is Side.DECODE:
            for taking in self.one(index, self.takings()):
                self.abort_decode(taking)
            return
        for life in self.one(index, list(self.prefill.lives.values())):
            self.abort_prefill(life)

    def abort_prefill(self, life: Life) -> None:
        life.aborted = life.lease_ended = True
        self.prefill.leases.end(life.spec.request_id, EndReason.ABORTED)
        self.prefill.bench.scheduler.forget(life.spec.request_id)
        del self.prefill.lives[life.spec.request_id]

    def abort_decode(self, taking: Taking) -> None:
        taking.aborted = True
        taking.runs.clear()
        taking.bench.scheduler.forget(taking.life.spec.request_id)
        del taking.decode.takings[taking.life.spec.request_id]

    @rule(index=which)
    def present(self, index: int) -> None:
        """Somebody comes with a ticket, maybe an old one."""
        for life in self.one(index, [life for life in self.lives if life.ticket]):
            ticket = open_ticket(life.signed, KEY)
            assert ticket == life.ticket
            live = self.is_live(life)
            assert refuses(self.prefill.leases.find, ticket, self.now) is not live
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

    def one(self, index: int, items: list[Item]) -> list[Item]:
        return items[index % len(items) :][:1] if items else []

    def block(self, bench: Bench, block_id: int) -> Block:
        return tuple(bench.model.slots[block_id])

    # The end

    def end_calls(self) -> None:
        """The gateway ends its calls for prompts that nobody takes over, for their leases do not run out."""
        for life in self.leased():
            if life.spec.ends_with_call and not any(taking.transferring for taking in life.takings):
                self.abort_prefill(life)

    def teardown(self) -> None:
        """Whatever still runs comes to its end, with its own tokens, and both pools are whole."""
        for _ in range(1000):
            self.step_prefill(1)
            self.step_decode(1)
            self.wait(LEASE_SECONDS + 1, sweep=True)
            self.break_off(0)
            self.end_calls()
            if not self.takings() and not self.prefill.lives:
                break
        self.step_prefill(1)
        self.check()
        assert not self.takings()
        assert len(self.prefill.leases) == 0
        assert all(taking.finished or taking.aborted for life in self.lives for taking in life.takings)
        for bench in (self.prefill.bench, *(decode.bench for decode in self.decodes)):
            assert bench.pool.num_free == bench.pool.num_blocks
