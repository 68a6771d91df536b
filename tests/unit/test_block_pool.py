"""What every `BlockBooks` does: the one of a process alone, and the shared one seen by one of its workers."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvrelay.engine.block_pool import BlockBooks, BlockPool, OutOfBlocks
from kvrelay.engine.pool_file import DIGEST_BYTES
from tests.unit.shared_pools import joined

MakePool = Callable[[int], BlockBooks]
A, B, C, D, X = (bytes([value]) * DIGEST_BYTES for value in range(5))


@pytest.fixture(params=["own", "shared"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakePool]:
    if request.param == "own":
        yield BlockPool
        return
    with ExitStack() as pools:
        yield lambda num_blocks: pools.enter_context(joined(tmp_path / "pool", num_blocks))


def test_blocks_are_allocated_until_none_is_left(make: MakePool) -> None:
    pool = make(4)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.num_free == 1
    with pytest.raises(OutOfBlocks, match="2 blocks asked for, 1 free"):
        pool.allocate(2)
    assert pool.num_free == 1, "nothing was taken"
    assert pool.allocate(0) == []
    pool.check([0, 1, 2])


def test_the_block_that_was_free_for_the_longest_time_is_taken_first(make: MakePool) -> None:
    pool = make(4)
    blocks = pool.allocate(4)
    pool.release([blocks[2]])
    pool.release([blocks[0]])
    assert pool.allocate(2) == [2, 0]


def test_the_end_of_a_prefix_is_reused_before_its_beginning(make: MakePool) -> None:
    pool = make(3)
    pool.release(pool.allocate(3))
    assert pool.allocate(2) == [2, 1]


def test_a_shared_block_is_free_when_its_last_holder_releases_it(make: MakePool) -> None:
    pool = make(2)
    [block] = pool.allocate(1)
    pool.share([block])
    pool.check([block, block])
    pool.release([block])
    assert not pool.is_free(block)
    pool.check([block])
    pool.release([block])
    assert pool.is_free(block)
    assert pool.num_free == 2


def test_a_free_block_is_not_released(make: MakePool) -> None:
    pool = make(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="block 0 is not held"):
        pool.release(blocks)
    pool.check([])


def test_the_longest_cached_prefix_is_found(make: MakePool) -> None:
    pool = make(4)
    blocks = pool.allocate(3)
    for block, digest in zip(blocks, [A, B, D], strict=True):
        pool.name(block, digest)
    assert pool.find([A, B, C, D]) == blocks[:2]
    assert pool.find([X, A]) == []
    assert pool.find([]) == []


def test_a_free_block_can_be_taken_back_with_its_content(make: MakePool) -> None:
    pool = make(3)
    [block] = pool.allocate(1)
    pool.name(block, A)
    pool.release([block])
    generation = pool.generation(block)
    pool.share(pool.find([A]))
    assert not pool.is_free(block)
    assert pool.generation(block) == generation
    pool.check([block])
    assert block not in pool.allocate(2)


def test_an_allocated_block_has_a_new_generation_and_no_name(make: MakePool) -> None:
    pool = make(1)
    [block] = pool.allocate(1)
    pool.name(block, A)
    generation = pool.generation(block)
    pool.release([block])
    assert pool.find([A]) == [block]
    pool.allocate(1)
    assert pool.generation(block) == generation + 1
    assert pool.find([A]) == []


def test_the_first_block_of_equal_content_keeps_the_name(make: MakePool) -> None:
    pool = make(3)
    first, second, other = pool.allocate(3)
    pool.name(first, A)
    pool.name(second, A)
    assert pool.find([A]) == [first]
    pool.release([second])
    pool.release([first])
    assert pool.allocate(2) == [second, first]
    assert pool.find([A]) == []
    pool.name(second, B)
    pool.name(second, C)
    assert (pool.find([B]), pool.find([C])) == ([], [second])
    pool.check([first, second, other])


@pytest.mark.parametrize("held", [[], [0], [0, 0, 1], [0, 1, 2]])
def test_books_that_differ_from_the_facts_are_found(make: MakePool, held: list[int]) -> None:
    pool = make(3)
    pool.allocate(2)
    pool.check([0, 1])
    with pytest.raises(RuntimeError, match=r"block \d: \d holders on the books, \d in fact"):
        pool.check(held)


def test_a_block_that_is_free_and_held_is_found() -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    pool._free[0] = None
    with pytest.raises(RuntimeError, match="block 0"):
        pool.check([0, 1])


def test_blocks_that_somebody_holds_can_be_joined(make: MakePool) -> None:
    pool = make(4)
    blocks = pool.allocate(2)
    generations = [pool.generation(block) for block in blocks]
    assert pool.join(blocks, generations)
    pool.release(blocks)
    pool.check(blocks)
    assert (pool.num_free, pool.num_held) == (2, 2)


def test_blocks_that_mean_something_else_by_now_are_not_joined(make: MakePool) -> None:
    pool = make(2)
    blocks = pool.allocate(2)
    generations = [pool.generation(block) for block in blocks]
    pool.release(blocks[1:])
    assert not pool.join(blocks, generations), "one of them is free"
    pool.allocate(1)
    assert not pool.join(blocks, generations), "one of them holds something else"
    assert not pool.join([0, 2], generations), "there is no such block"
    assert not pool.join([-1], generations[1:])
    pool.check(blocks)
