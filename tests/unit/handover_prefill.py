"""Acts of the prefill worker: it computes prompts, leases their blocks, starts anew, and lets leases run out."""

import hypothesis.strategies as st
from hypothesis.stateful import rule

from kv_transfer.handover import EndReason, Handover
from kv_transfer.tickets import sign_ticket
from kvrelay.engine.events import Admitted, Event, Finished, Progress, Sampled
from kvrelay.engine.sequence import Role
from tests.unit.handover_invariants import HandoverInvariants
from tests.unit.handover_lives import BLOCK_SIZE, CHOICES, KEY, WAITS, Life, PrefillWorker, Spec


class PrefillActs(HandoverInvariants):
    """What the one prefill worker does, and the passing of the time that its leases have."""

    @rule(spec=st.builds(Spec, **{name: st.sampled_from(values) for name, values in CHOICES.items()}))
    def submit(self, spec: Spec) -> None:
        if spec.request_id in self.prefill.lives or any(spec.request_id in each.takings for each in self.decodes):
            return
        life = Life(spec, self.prefill)
        self.add(self.prefill.bench, spec, Role.PREFILL)
        self.prefill.lives[spec.request_id] = life
        self.lives.append(life)

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
        match event:
            case Admitted():
                life.admitted = event
                if life.spec.ends_with_call:
                    self.grant(life).advance(event.num_cached_blocks)
            case Progress(num_computed_tokens=count) if life.handover is not None:
                life.handover.advance(count // BLOCK_SIZE)
            case Sampled() if event.finish_reason is not None:
                self.prefill.leases.end(event.request_id, EndReason.ABORTED)
                life.lease_ended = life.ended_at_first = True
            case Sampled():
                (life.handover or self.grant(life)).complete(event.token.token_id, self.now)
            case Finished():
                del self.prefill.lives[event.request_id]

    def grant(self, life: Life) -> Handover:
        assert life.admitted is not None
        life.handover, life.ticket = self.prefill.leases.grant(
            life.spec.request_id,
            "gateway-0",
            life.admitted.block_ids,
            life.admitted.generations,
            self.now,
            ends_with_call=life.spec.ends_with_call,
        )
        life.signed, life.renewed_at = sign_ticket(life.ticket, KEY), self.now
        return life.handover

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
