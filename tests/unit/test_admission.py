"""Who was refused blocks is looked up again when it may get another answer, and not before."""

from collections.abc import Iterable

from kvrelay.engine.admission import BlockAdmission
from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.limits import Limits
from kvrelay.engine.prefix_cache import PrefixCache
from kvrelay.engine.sequence import Sequence
from kvrelay.request import Request, Sampling

NUM_BLOCKS = 32
BLOCK_SIZE = 4


class CountingPool(BlockPool):
    """Notes how many names are looked up."""

    num_looked_up = 0

    def find(self, digests: Iterable[bytes]) -> list[int]:
        digests = list(digests)
        self.num_looked_up += len(digests)
        return super().find(digests)


class House:
    """A pool in which a prefix of 10 blocks is cached and idle, with all but 2 of the others taken."""

    def __init__(self) -> None:
        limits = Limits(8, 64, NUM_BLOCKS * BLOCK_SIZE, BLOCK_SIZE)
        self.pool = CountingPool(NUM_BLOCKS)
        self.prefixes = PrefixCache(self.pool, BLOCK_SIZE, b"model", enabled=True)
        self.admission = BlockAdmission(self.pool, self.prefixes, limits)
        first = self.sequence(40)
        first.block_table = self.pool.allocate(10)
        self.prefixes.advance(first, 40)
        self.taken = self.pool.allocate(20)
        self.pool.release(first.block_table)

    def sequence(self, num_tokens: int) -> Sequence:
        return Sequence(Request("r", tuple(range(num_tokens)), Sampling(max_tokens=1)))

    def admits(self, sequence: Sequence, num_running: int = 0) -> bool:
        return self.admission.admit(sequence, num_running) is not None

    def num_looked_up(self, sequence: Sequence) -> int:
        """At one more refusal."""
        self.pool.num_looked_up = 0
        assert not self.admits(sequence)
        return self.pool.num_looked_up


def test_a_refused_prompt_is_not_looked_up_at_each_step() -> None:
    house = House()
    waiting = house.sequence(60)  # 10 blocks are cached, and of 5 more there are 2
    assert house.num_looked_up(waiting) == 14
    assert [house.num_looked_up(waiting) for _ in range(3)] == [1, 1, 1], "the one that would follow"


def test_it_is_admitted_when_as_many_blocks_have_been_freed_as_were_missing() -> None:
    house = House()
    waiting = house.sequence(60)
    for _ in range(3):
        assert house.num_looked_up(waiting) in (14, 1)
        house.pool.release([house.taken.pop()])
    assert house.admits(waiting)
    assert len(waiting.block_table) == 15


def test_what_others_take_meanwhile_is_missing_again() -> None:
    house = House()
    waiting = house.sequence(60)
    assert not house.admits(waiting)
    house.taken += house.pool.allocate(2)
    house.pool.release([house.taken.pop() for _ in range(3)])
    assert house.num_looked_up(waiting) == 14
    house.pool.release([house.taken.pop() for _ in range(2)])
    assert house.admits(waiting)


def test_it_is_admitted_when_its_cached_prefix_grows() -> None:
    house = House()
    waiting, other = house.sequence(60), house.sequence(56)
    assert not house.admits(waiting)
    other.block_table = [*house.prefixes.find(other), *house.taken[:4]]
    other.num_computed_tokens = 40
    house.prefixes.advance(other, 56)
    assert house.admits(waiting)
    assert waiting.block_table[10:14] == house.taken[:4]


def test_it_is_admitted_when_fewer_sequences_want_more() -> None:
    house = House()
    waiting = house.sequence(48)
    assert not house.admits(waiting, num_running=1)
    assert not house.admits(waiting, num_running=1)
    assert house.admits(waiting, num_running=0)


def test_who_asks_in_between_is_looked_up_for_itself() -> None:
    house = House()
    waiting = house.sequence(60)
    assert not house.admits(waiting)
    assert house.admits(house.sequence(44))
    assert house.num_looked_up(waiting) == 14
