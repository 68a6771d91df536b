"""Random acts on a shared pool, by two workers of which either may die: it does what a pool of one process does."""

import os
from random import Random

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.pool_file import DIGEST_BYTES, PoolFile
from kvrelay.engine.shared_block_pool import SharedBlockPool
from tests.exploring import exploring
from tests.unit.shared_pools import LAYOUT

workers = st.integers(0, 1)
lots = st.integers(0, 1000)
# They hash to two neighbouring places, so that runs in the table are long, meet, and change their order.
DIGESTS = [bytes([value % 2]) * 8 + bytes([value]) * (DIGEST_BYTES - 8) for value in range(8)]


class SharedPoolMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, 9))
    def begin(self, num_blocks: int) -> None:
        self.memfd = os.memfd_create("pool of a test")
        self.num_blocks = num_blocks
        self.reference = BlockPool(num_blocks)
        self.files: list[PoolFile] = []
        self.pools: list[SharedBlockPool] = []
        self.held: list[list[list[int]]] = [[], []]
        for _ in range(2):
            self.join()

    def join(self) -> None:
        file = PoolFile.join(f"/proc/self/fd/{self.memfd}", LAYOUT, self.num_blocks, lambda num_bytes: None)
        self.files.append(file)
        self.pools.append(SharedBlockPool(file))

    @rule(worker=workers, count=lots)
    def allocate(self, worker: int, count: int) -> None:
        count %= self.reference.num_free + 1
        blocks = self.pools[worker].allocate(count)
        assert blocks == self.reference.allocate(count)
        self.held[worker].append(blocks)

    @rule(worker=workers, which=lots)
    def release(self, worker: int, which: int) -> None:
        if self.held[worker]:
            blocks = self.held[worker].pop(which % len(self.held[worker]))
            self.pools[worker].release(blocks)
            self.reference.release(blocks)

    @rule(worker=workers, which=lots)
    def join_those_of_the_other(self, worker: int, which: int) -> None:
        if self.held[1 - worker]:
            blocks = self.held[1 - worker][which % len(self.held[1 - worker])]
            assert self.pools[worker].join(blocks, list(map(self.reference.generation, blocks)))
            self.reference.share(blocks)
            self.held[worker].append(blocks)

    @rule(worker=workers, which=lots, digest=st.sampled_from(DIGESTS))
    def name(self, worker: int, which: int, digest: bytes) -> None:
        if blocks := [block for each in self.held[worker] for block in each]:
            block = blocks[which % len(blocks)]
            self.pools[worker].name(block, digest)
            self.reference.name(block, digest)

    @rule(worker=workers, digests=st.permutations(DIGESTS))
    def find_and_share(self, worker: int, digests: list[bytes]) -> None:
        found = self.pools[worker].find(digests)
        assert found == self.reference.find(digests)
        self.pools[worker].share(found)
        self.reference.share(found)
        self.held[worker].append(found)

    @rule(worker=workers)
    def die(self, worker: int) -> None:
        """And is started anew. Who sees it frees the blocks from the last to the first."""
        self.files[worker].close()
        order = sorted({block for blocks in self.held[worker] for block in blocks})
        counts = [block for blocks in self.held[worker] for block in blocks]
        for block in reversed(order):
            self.reference.release([block] * counts.count(block))
        self.held[worker] = []
        self.pools[1 - worker]._reclaim()
        self.join()
        self.files[worker], self.pools[worker] = self.files.pop(), self.pools.pop()

    @invariant()
    def check(self) -> None:
        for pool, held in zip(self.pools, self.held, strict=True):
            pool.check(block for blocks in held for block in blocks)
            pool.check_all()
            assert pool.num_free == self.reference.num_free
            assert pool.num_freed == self.num_blocks + self.reference.num_freed, "all were once found free"
            assert pool.num_held == len({block for blocks in held for block in blocks})
            for block in range(self.num_blocks):
                assert pool.generation(block) == self.reference.generation(block)
                assert pool.is_free(block) == self.reference.is_free(block)
            assert [pool.find([digest]) for digest in DIGESTS] == [self.reference.find([each]) for each in DIGESTS]
        assert list(self.pools[0]._free) == list(self.reference._free)

    def teardown(self) -> None:
        for file in getattr(self, "files", []):
            file.close()
        os.close(self.memfd)


TestSharedPoolMachine = SharedPoolMachine.TestCase
TestSharedPoolMachine.settings = exploring(max_examples=60, max_acts=40)


def test_random_bytes_are_found_among_many() -> None:
    """A table that is half full, through many changes."""
    random = Random(1)
    memfd = os.memfd_create("pool of a test")
    file = PoolFile.join(f"/proc/self/fd/{memfd}", LAYOUT, 256, lambda num_bytes: None)
    pool, reference = SharedBlockPool(file), BlockPool(256)
    for _ in range(40):
        blocks = pool.allocate(random.randrange(1, 257))
        assert blocks == reference.allocate(len(blocks))
        digests = [random.randbytes(DIGEST_BYTES) for _ in blocks]
        for block, digest in zip(blocks, digests, strict=True):
            pool.name(block, digest)
            reference.name(block, digest)
        assert pool.find(digests) == blocks
        pool.release(blocks)
        reference.release(blocks)
        for digest in reference._block_of:
            assert pool.find([digest]) == reference.find([digest])
    pool.check_all()
    file.close()
    os.close(memfd)
