"""Which blocks are shared, and which never are."""

import pytest

from kvrelay.engine.sequence import Role
from tests.unit.scheduling import GARBAGE, NewBench, whole


@pytest.mark.parametrize(
    ("role", "length", "cached"),
    [(role, length, cached) for role in (Role.WHOLE, Role.PREFILL) for length, cached in [(11, 2), (12, 2), (13, 3)]]
    + [(Role.DECODE, 11, 2), (Role.DECODE, 12, 3), (Role.DECODE, 13, 3)],
)
def test_full_blocks_of_an_equal_prefix_are_shared(bench: NewBench, role: Role, length: int, cached: int) -> None:
    house = bench()
    house.add("first", range(16), Role.PREFILL)
    house.step()
    house.settle()
    table = list(house.sequences["first"].block_table)
    second = house.add("second", range(length), role)
    shapes = house.step()
    house.settle()
    [admitted] = house.admissions("second")
    assert admitted.num_cached_blocks == cached
    assert second.num_computed_tokens == (4 * cached if role is Role.DECODE else length)
    assert list(admitted.block_ids[:cached]) == table[:cached]
    assert not set(admitted.block_ids[cached:]) & set(table)
    assert shapes == ([] if role is Role.DECODE else [("second", 4 * cached, length - 4 * cached)])
    house.scheduler.check_integrity()


def test_a_prefix_stays_in_the_cache_after_its_sequence_ended(bench: NewBench) -> None:
    house = bench()
    house.add("first", range(12), max_tokens=6)
    house.drain()
    generations = [house.pool.generation(block) for block in range(64)]
    tokens = [*range(12), *house.got("first")]
    second = house.add("second", tokens, max_tokens=1)
    # The completion's blocks are cached as well: 17 of 18 tokens have been computed.
    assert house.step() == [("second", 16, 2)]
    house.settle()
    admitted = house.admissions("second")[0]
    for block, generation in zip(admitted.block_ids[:4], admitted.generations[:4], strict=True):
        assert generation == generations[block], "taking a block back is not an allocation"
    assert house.got("second") == house.expected(second)


def test_generations_grow_with_each_allocation_only(bench: NewBench) -> None:
    house = bench(4)
    house.add("first", range(15), max_tokens=1)
    house.drain()
    assert [house.pool.generation(block) for block in range(4)] == [1, 1, 1, 1]
    house.add("same", range(15), max_tokens=1)
    house.drain()
    assert sorted(house.pool.generation(block) for block in range(4)) == [1, 1, 1, 2]
    house.add("other", range(50, 65), max_tokens=1)
    house.drain()
    assert sorted(house.pool.generation(block) for block in range(4)) == [2, 2, 2, 3]


def test_prefixes_are_never_shared_across_salts(bench: NewBench) -> None:
    house = bench()
    for name, salt in [("first", "x"), ("other", "y"), ("none", ""), ("same", "x")]:
        house.add(name, range(12), Role.PREFILL, salt=salt)
        house.step()
    assert [house.admissions(name)[0].num_cached_blocks for name in house.sequences] == [0, 0, 0, 2]
    assert not set(house.sequences["first"].block_table) & set(house.sequences["other"].block_table)


def test_prefixes_are_not_shared_when_caching_is_off(bench: NewBench) -> None:
    house = bench(prefix_caching=False)
    for name in ("first", "second"):
        house.add(name, range(12), Role.PREFILL)
        house.step()
    assert house.admissions("second")[0].num_cached_blocks == 0
    assert not set(house.sequences["first"].block_table) & set(house.sequences["second"].block_table)


def test_blocks_are_found_only_once_they_are_computed(bench: NewBench) -> None:
    house = bench(max_batched_tokens=10)
    first = house.add("first", range(20), Role.PREFILL)
    chunks, _ = house.schedule()
    assert house.pool.find(first.digests) == []
    house.commit(chunks)
    assert house.pool.find(first.digests) == first.block_table[:2]
    house.step()
    house.settle()
    assert house.pool.find(first.digests) == first.block_table


def test_equal_prompts_in_one_step_are_computed_apart(bench: NewBench) -> None:
    house = bench()
    for name in "ab":
        house.add(name, range(12), max_tokens=3)
    assert house.step() == [("a", 0, 12), ("b", 0, 12)]
    house.drain()
    assert house.got("a") == house.got("b") == house.expected(house.sequences["a"])


def test_blocks_in_transfer_are_found_only_once_they_are_verified(bench: NewBench) -> None:
    house = bench()
    first = house.add("first", range(12), Role.DECODE)
    house.step()
    house.add("second", range(12), Role.DECODE)
    house.step()
    assert house.admissions("second")[0].num_cached_blocks == 0
    house.scheduler.adopt("first", house.transfer(first))
    house.add("third", range(12), Role.DECODE)
    house.step()
    assert house.admissions("third")[0].num_cached_blocks == 3


def test_unverified_blocks_of_a_failed_transfer_are_never_found(bench: NewBench) -> None:
    house = bench()
    first = house.add("first", range(12), Role.DECODE)
    house.step()
    house.model.write(first, 0, 12, GARBAGE)
    house.model.write(first, 0, 4)
    house.scheduler.recompute("first", 1)
    assert house.step() == [("first", 4, 8)]
    house.add("second", range(12), max_tokens=2)
    house.drain()
    assert house.got("first")[:2] == house.got("second") == house.expected(house.sequences["second"])


def test_held_blocks_survive_pressure_until_they_are_released(bench: NewBench) -> None:
    house = bench(6, prefix_caching=False)
    held = house.add("held", range(10), Role.PREFILL)
    house.step()
    generations = [house.pool.generation(block) for block in held.block_table]
    for number in range(4):
        house.add(str(number), range(40, 45), max_tokens=7)
    house.drain()
    assert [len(house.ends[str(number)]) for number in range(4)] == [1] * 4
    house.model.check(held, 10)
    assert [house.pool.generation(block) for block in held.block_table] == generations
    house.scheduler.forget("held")
    assert whole(house.scheduler.load())
