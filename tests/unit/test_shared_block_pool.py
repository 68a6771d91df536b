"""A pool whose books several processes share: what each sees of the others, also when they die or stand still."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvrelay.engine.block_pool import OutOfBlocks
from kvrelay.engine.pool_file import DIGEST_BYTES
from kvrelay.engine.shared_block_pool import SharedBlockPool
from tests.patience import eventually
from tests.unit.shared_pools import LAYOUT, Worker, joined, worker

NUM_BLOCKS = 16
A, B = (bytes([value]) * DIGEST_BYTES for value in range(2))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pool"


@pytest.fixture
def pool(path: Path) -> Iterator[SharedBlockPool]:
    with joined(path, NUM_BLOCKS) as pool:
        yield pool


@pytest.fixture
def other(path: Path, pool: SharedBlockPool) -> Iterator[Worker]:
    with worker(path, NUM_BLOCKS) as other:
        yield other


@contextlib.contextmanager
def stopped(process: Worker) -> Iterator[None]:
    os.kill(process.process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.process.pid, os.WSTOPPED)
    try:
        yield
    finally:
        process.process.send_signal(signal.SIGCONT)


def wait_free(pool: SharedBlockPool, count: int) -> None:
    """Looks as a worker does that waits for blocks."""

    def is_free() -> bool:
        with pool.locked():
            return pool.num_free == count

    eventually(is_free, what=lambda: f"{count} blocks are free, not {pool.num_free}")


def test_what_one_worker_does_another_sees(pool: SharedBlockPool, other: Worker) -> None:
    theirs = other.ask("pool.allocate(5)")
    assert theirs == [0, 1, 2, 3, 4]
    assert (pool.num_free, pool.num_held) == (11, 0)
    assert other.ask("(pool.num_free, pool.num_held)") == (11, 5)
    mine = pool.allocate(11)
    assert set(mine).isdisjoint(theirs)
    with pytest.raises(OutOfBlocks):
        pool.allocate(1)
    other.ask(f"pool.name(2, {A!r})")
    assert pool.find([A, B]) == [2]
    other.ask("pool.release([2])")
    assert pool.find([A]) == [2], "free, and still named"
    assert pool.allocate(1) == [2]
    assert other.ask("pool.generation(2)") == pool.generation(2) == 2
    assert other.ask(f"pool.find([{A!r}])") == []


def test_a_block_is_free_when_its_last_holder_in_any_process_releases_it(pool: SharedBlockPool, other: Worker) -> None:
    [block] = other.ask("pool.allocate(1)")
    assert pool.join([block], [pool.generation(block)])
    other.ask(f"pool.release([{block}])")
    assert not pool.is_free(block)
    with pytest.raises(ValueError, match="not held"):
        pool.release([block, block])


def test_a_worker_releases_only_what_it_holds_itself(pool: SharedBlockPool, other: Worker) -> None:
    [block] = other.ask("pool.allocate(1)")
    with pytest.raises(ValueError, match=f"block {block} is not held"):
        pool.release([block])
    pool.check([])
    assert other.ask(f"pool.check([{block}])") is None
    with pytest.raises(RuntimeError, match=f"block {block}: 0 holders on the books, 1 in fact"):
        pool.check([block])


def test_what_a_killed_worker_held_is_free_and_keeps_its_names(pool: SharedBlockPool, other: Worker) -> None:
    theirs = other.ask("pool.allocate(6)")
    other.ask(f"pool.name({theirs[0]}, {A!r})")
    joint = theirs[4:]
    assert pool.join(joint, list(map(pool.generation, joint)))
    other.kill()
    wait_free(pool, NUM_BLOCKS - len(joint))
    pool.check(joint)
    pool.check_all()
    assert pool.find([A]) == theirs[:1]
    pool.release(joint)


def test_the_slot_of_a_killed_worker_is_taken_without_its_holds(
    path: Path, pool: SharedBlockPool, other: Worker
) -> None:
    slot = other.ask("pool._file.slot")
    other.ask("pool.allocate(6)")
    other.kill()
    with worker(path, NUM_BLOCKS) as another:
        assert another.ask("pool._file.slot") == slot
        assert another.ask("(pool.num_free, pool.num_held)") == (NUM_BLOCKS, 0)


def test_nothing_of_a_stopped_worker_is_given_away(pool: SharedBlockPool, other: Worker) -> None:
    theirs = other.ask("pool.allocate(6)")
    with stopped(other):
        mine = pool.allocate(10)
        assert set(mine).isdisjoint(theirs)
        pool._reclaim()
        with pytest.raises(OutOfBlocks):
            pool.allocate(1)
    assert other.ask(f"pool.check({theirs})") is None
    other.ask(f"pool.release({theirs})")
    assert pool.num_free == 6


@pytest.mark.parametrize(
    "torn",
    [
        "pass",
        "pool._free.pop_first()",
        "pool._own[7] = 1",
        "pool._own[0] = 0",
        "pool._index.remove(0)",
        "pool._books.table[:] = 3",
        "pool._books.following[:] = 0; pool._books.preceding[:] = 0",
    ],
)
def test_books_that_a_killed_worker_left_half_changed_are_made_anew(
    pool: SharedBlockPool, other: Worker, torn: str
) -> None:
    held = pool.allocate(2)
    pool.name(held[0], B)
    theirs = other.ask("pool.allocate(4)")
    other.ask(f"pool.name({theirs[0]}, {A!r})")
    other.send(f"pool._mutex.__enter__(); {torn}; os.kill(os.getpid(), signal.SIGKILL)")
    other.process.wait()
    assert pool._books.mutex[0] == 1
    wait_free(pool, NUM_BLOCKS - 2)
    pool.check(held)
    pool.check_all()
    assert pool.find([A]) == pool.find([B]) == [], "no name is trusted"
    assert sorted(pool.allocate(14)) == sorted(set(range(NUM_BLOCKS)) - set(held))


def test_a_defect_inside_leaves_the_books_to_be_made_anew(pool: SharedBlockPool) -> None:
    [block] = pool.allocate(1)

    def fail() -> None:
        with pool.locked():
            pool._free.pop_first()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert pool.find([]) == []
    pool.check([block])
    pool.check_all()


def test_who_stands_still_at_the_books_is_killed_by_who_waits(path: Path) -> None:
    with joined(path, NUM_BLOCKS, patience=0.3) as pool, worker(path, NUM_BLOCKS) as other:
        other.ask("pool.allocate(3)")
        other.send("pool._mutex.__enter__(); print(0, flush=True); os.kill(os.getpid(), signal.SIGSTOP)")
        other.read()
        assert pool.allocate(2)
        assert other.process.wait(10) == -signal.SIGKILL
        wait_free(pool, NUM_BLOCKS - 2)


def test_who_is_at_the_books_often_is_not_taken_for_who_stands_still(path: Path) -> None:
    with joined(path, NUM_BLOCKS, patience=0.3) as pool, worker(path, NUM_BLOCKS) as other:
        stay = "with pool._mutex: print(flush=True) if turn == 0 else time.sleep(0.02)"
        other.send(f"import time\\nfor turn in range(50):\\n {stay}".join(("exec('", "')")))
        other.read()
        pool.release(pool.allocate(1))
        assert other.ask("pool.num_held") == 0


def test_workers_at_the_same_time_never_have_a_block_both(path: Path) -> None:
    """Each stamps its blocks, and finds its own stamp when it gives them back."""
    rounds = (
        "stamp = random.randbytes(LAYOUT.block_bytes); mine = []\n"
        "for _ in range(3000):\n"
        "    if mine and (random.random() < 0.5 or pool.num_free < 4):\n"
        "        blocks = mine.pop(random.randrange(len(mine)))\n"
        "        for each in blocks: assert memory(each) == stamp\n"
        "        pool.release(blocks)\n"
        "    else:\n"
        "        with pool.locked(): blocks = pool.allocate(min(pool.num_free, random.randrange(1, 4)))\n"
        "        for each in blocks: pool._file.memory[at(each):at(each + 1)] = stamp\n"
        "        if blocks: mine.append(blocks)\n"
        "        if blocks and random.random() < 0.5: pool.name(blocks[0], random.randbytes(32))\n"
        "for blocks in mine: pool.release(blocks)\n"
        "print(pool.num_held)"
    )
    helpers = (
        "from tests.unit.shared_pools import LAYOUT\n"
        "def at(block): return pool._file.blocks_offset + block * LAYOUT.block_bytes\n"
        "def memory(block): return pool._file.memory[at(block):at(block + 1)]\n"
    )
    assert LAYOUT.block_bytes > 64
    with joined(path, 24) as pool, contextlib.ExitStack() as stack:
        workers = [stack.enter_context(worker(path, 24)) for _ in range(3)]
        for each in workers:
            each.send(f"exec({helpers + rounds!r}, globals())")
        assert [each.read() for each in workers] == ["0", "0", "0"]
        assert pool.num_free == 24
        pool.check_all()


def test_a_file_keeps_what_was_computed_when_all_have_gone(path: Path) -> None:
    with joined(path, NUM_BLOCKS) as pool:
        [block] = pool.allocate(1)
        pool.name(block, A)
    with joined(path, NUM_BLOCKS) as pool:
        assert pool.find([A]) == [block]
        assert pool.num_free == NUM_BLOCKS


def test_sequences_that_grow_are_counted_over_all_that_live(pool: SharedBlockPool, other: Worker) -> None:
    assert pool.expect_growth(3) == 3
    assert other.ask("pool.expect_growth(4)") == 7
    assert pool.expect_growth(1) == 5
    other.kill()
    wait_free(pool, NUM_BLOCKS)
    pool._reclaim()
    assert pool.expect_growth(1) == 1
