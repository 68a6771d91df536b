"""Schedulers of two workers that share a pool."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvrelay.engine.events import Admitted, Failed
from kvrelay.engine.sequence import BorrowedBlocks, Role, Sequence, SequenceState
from tests.unit.scheduling import GARBAGE, Bench
from tests.unit.shared_pools import joined

NUM_BLOCKS = 16
BLOCK_SIZE = 4
PROMPT = range(10)


class Host:
    """A prefill and a decode worker."""

    def __init__(self, prefill: Bench, decode: Bench) -> None:
        self.prefill = prefill
        self.decode = decode

    def admit(self, request_id: str = "a", prompt: range = PROMPT) -> BorrowedBlocks:
        """The prefill worker has reserved, and begun to compute."""
        self.prefill.add(request_id, prompt, Role.PREFILL)
        self.prefill.step()
        [admitted] = self.prefill.admissions(request_id)
        return BorrowedBlocks(admitted.block_ids, admitted.generations)

    def borrow(self, borrowed: BorrowedBlocks, request_id: str = "a", prompt: range = PROMPT) -> Sequence:
        sequence = self.decode.add(request_id, prompt, Role.DECODE, max_tokens=6)
        sequence.borrowed = borrowed
        self.decode.step()
        return sequence

    def admitted(self, request_id: str = "a") -> Admitted:
        [admitted] = self.decode.admissions(request_id)
        return admitted

    def finish(self, sequence: Sequence) -> None:
        """Release, and all that follows."""
        self.prefill.drain()
        [token] = self.prefill.got(sequence.request_id)
        self.prefill.scheduler.forget(sequence.request_id)
        self.decode.scheduler.adopt(sequence.request_id, token)
        self.decode.drain()
        assert [token, *self.decode.got(sequence.request_id)] == self.decode.expected(sequence)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    slots = [[GARBAGE] * BLOCK_SIZE for _ in range(NUM_BLOCKS)]
    with joined(tmp_path / "pool", NUM_BLOCKS) as one, joined(tmp_path / "pool", NUM_BLOCKS) as other:
        benches = [Bench(NUM_BLOCKS, pool=pool, slots=slots, max_batched_tokens=6) for pool in (one, other)]
        yield Host(*benches)
        for each in benches:
            each.scheduler.check_integrity()
            for request_id in each.sequences:
                each.scheduler.forget(request_id)
            each.schedule()
            each.scheduler.check_integrity()
        assert one.num_free == NUM_BLOCKS


def test_a_borrowed_prompt_takes_no_blocks_and_is_gone_on_with(host: Host) -> None:
    borrowed = host.admit()
    assert host.decode.pool.num_free == NUM_BLOCKS - 3
    sequence = host.borrow(borrowed)
    assert host.decode.pool.num_free == NUM_BLOCKS - 3
    assert host.admitted() == Admitted("a", borrowed.block_ids, borrowed.generations, 0, borrowed=True)
    assert sequence.state is SequenceState.TRANSFERRING
    host.finish(sequence)


def test_a_prompt_is_borrowed_when_the_pool_is_full(host: Host) -> None:
    borrowed = host.admit()
    taken = host.prefill.pool.allocate(host.prefill.pool.num_free)
    assert host.borrow(borrowed).state is SequenceState.TRANSFERRING
    host.prefill.pool.release(taken)


@pytest.mark.parametrize("change", ["freed", "given to another", "of another length"])
def test_what_cannot_be_borrowed_is_reserved(host: Host, change: str) -> None:
    borrowed = host.admit()
    if change == "of another length":
        borrowed = BorrowedBlocks(borrowed.block_ids[1:], borrowed.generations[1:])
    else:
        host.prefill.scheduler.forget("a")
        if change == "given to another":
            host.prefill.pool.allocate(NUM_BLOCKS)
            host.prefill.pool.release(range(NUM_BLOCKS))
    sequence = host.borrow(borrowed)
    admitted = host.admitted()
    assert not admitted.borrowed
    assert sequence.block_table == list(admitted.block_ids)
    assert len(admitted.block_ids) == 3


@pytest.mark.parametrize("complete", [False, True])
def test_a_failed_handover_is_recomputed_in_other_blocks(host: Host, complete: bool) -> None:
    """The prefill worker may still write to those that were borrowed, or another decode worker may have got them."""
    borrowed = host.admit()
    sequence = host.borrow(borrowed)
    if complete:
        host.prefill.drain()
    host.decode.scheduler.recompute("a", 3 if complete else 0)
    host.decode.step()
    assert sequence.state is SequenceState.RUNNING
    fresh = set(sequence.block_table) - set(borrowed.block_ids)
    assert borrowed.block_ids[-1] not in sequence.block_table
    assert len(fresh) == 1 if complete else len(fresh) >= 2, "what is final and named is shared"
    host.prefill.drain()
    host.decode.drain()
    assert host.decode.got("a") == host.decode.expected(sequence)
    host.prefill.model.check(host.prefill.sequences["a"], len(PROMPT))


def test_borrowed_blocks_stay_when_the_prefill_worker_gives_up(host: Host) -> None:
    borrowed = host.admit()
    host.borrow(borrowed)
    host.prefill.scheduler.forget("a")
    assert host.prefill.pool.num_free == NUM_BLOCKS - 3
    host.decode.scheduler.forget("a")
    assert host.prefill.pool.num_free == NUM_BLOCKS


def test_who_waits_for_blocks_looks_by_itself(host: Host) -> None:
    taken = host.prefill.pool.allocate(NUM_BLOCKS)
    assert not host.decode.scheduler.waits_for_others
    host.decode.add("a", PROMPT)
    assert host.decode.step() == []
    assert host.decode.scheduler.waits_for_others
    host.prefill.pool.release(taken)
    assert host.decode.step() != []
    assert not host.decode.scheduler.waits_for_others


def test_prefixes_that_another_worker_computed_are_found(host: Host) -> None:
    host.prefill.add("a", PROMPT)
    host.prefill.drain()
    sequence = host.decode.add("b", PROMPT)
    host.decode.drain()
    assert host.decode.admissions("b")[0].num_cached_blocks == 2
    assert host.decode.got("b") == host.decode.expected(sequence)


def test_admission_leaves_blocks_to_the_sequences_of_others(host: Host) -> None:
    host.decode.add("a", range(3), max_tokens=6)
    host.decode.step()
    host.prefill.pool.allocate(12)
    host.prefill.add("b", range(100, 110))
    assert host.prefill.step() == [], "3 blocks are free, one of which the other worker's sequence will want"
    host.decode.drain()
    assert host.prefill.step() != []
    host.prefill.pool.release(range(1, 13))


def test_who_finds_no_block_gives_its_own_back(host: Host) -> None:
    host.decode.add("a", range(4), max_tokens=6)
    host.decode.step()
    taken = host.prefill.pool.allocate(NUM_BLOCKS - 1)
    assert host.decode.step() == []
    assert host.decode.scheduler.load().preemptions == 1
    assert not any(isinstance(event, Failed) for event in host.decode.events)
    host.prefill.pool.release(taken)
    host.decode.drain()
