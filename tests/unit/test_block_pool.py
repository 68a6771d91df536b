import pytest

from kvrelay.engine.block_pool import BlockPool, OutOfBlocks


def test_blocks_are_allocated_until_none_is_left() -> None:
    pool = BlockPool(4)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.num_free == 1
    with pytest.raises(OutOfBlocks, match="2 blocks asked for, 1 free"):
        pool.allocate(2)
    assert pool.num_free == 1, "nothing was taken"
    assert pool.allocate(0) == []
    pool.check([0, 1, 2])


def test_the_block_that_was_free_for_the_longest_time_is_taken_first() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    pool.release([blocks[2]])
    pool.release([blocks[0]])
    assert pool.allocate(2) == [2, 0]


def test_the_end_of_a_prefix_is_reused_before_its_beginning() -> None:
    pool = BlockPool(3)
    pool.release(pool.allocate(3))
    assert pool.allocate(2) == [2, 1]


def test_a_shared_block_is_free_when_its_last_holder_releases_it() -> None:
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.share([block])
    pool.check([block, block])
    pool.release([block])
    assert not pool.is_free(block)
    pool.check([block])
    pool.release([block])
    assert pool.is_free(block)
    assert pool.num_free == 2


def test_a_free_block_is_not_released() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="block 0 is free already"):
        pool.release(blocks)
    pool.check([])


def test_the_longest_cached_prefix_is_found() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    for block, digest in zip(blocks, [b"a", b"b", b"d"], strict=True):
        pool.name(block, digest)
    assert pool.find([b"a", b"b", b"c", b"d"]) == blocks[:2]
    assert pool.find([b"x", b"a"]) == []
    assert pool.find([]) == []


def test_a_free_block_can_be_taken_back_with_its_content() -> None:
    pool = BlockPool(3)
    [block] = pool.allocate(1)
    pool.name(block, b"a")
    pool.release([block])
    generation = pool.generation(block)
    pool.share(pool.find([b"a"]))
    assert not pool.is_free(block)
    assert pool.generation(block) == generation
    pool.check([block])
    assert block not in pool.allocate(2)


def test_an_allocated_block_has_a_new_generation_and_no_name() -> None:
    pool = BlockPool(1)
    [block] = pool.allocate(1)
    pool.name(block, b"a")
    generation = pool.generation(block)
    pool.release([block])
    assert pool.find([b"a"]) == [block]
    pool.allocate(1)
    assert pool.generation(block) == generation + 1
    assert pool.find([b"a"]) == []


def test_the_first_block_of_equal_content_keeps_the_name() -> None:
    pool = BlockPool(3)
    first, second, other = pool.allocate(3)
    pool.name(first, b"a")
    pool.name(second, b"a")
    assert pool.find([b"a"]) == [first]
    pool.release([second])
    pool.release([first])
    assert pool.allocate(2) == [second, first]
    assert pool.find([b"a"]) == []
    pool.name(second, b"b")
    pool.name(second, b"c")
    assert (pool.find([b"b"]), pool.find([b"c"])) == ([], [second])
    pool.check([first, second, other])


@pytest.mark.parametrize("held", [[], [0], [0, 0, 1], [0, 1, 2]])
def test_books_that_differ_from_the_facts_are_found(held: list[int]) -> None:
    pool = BlockPool(3)
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
