"""The bench of `handing_over` for workers that share a pool, where a handover passes the blocks themselves."""

import os

from hypothesis.stateful import invariant, rule

from kv_transfer.tickets import open_ticket
from kvrelay.engine.pool_file import PoolFile
from kvrelay.engine.sequence import BorrowedBlocks, SequenceState
from kvrelay.engine.shared_block_pool import SharedBlockPool
from tests.unit.handing_over import HandoverMachine
from tests.unit.handover_lives import BLOCK_SIZE, CONTEXT_LENGTH, KEY, Life
from tests.unit.scheduling import GARBAGE, Bench
from tests.unit.shared_pools import LAYOUT

NUM_SEQUENCES = 8


class SharedHandoverMachine(HandoverMachine):
    """What a dead worker held is free as soon as another looks, and its blocks may mean something else then."""

    def __init__(self) -> None:
        super().__init__()
        self.memfd = os.memfd_create("pool of a test")
        self.files: list[PoolFile] = []
        self.slots: list[list[int]] = []

    def bench(self, num_blocks: int) -> Bench:
        # As large as both pools of the machine together would be.
        num_blocks = len(self.slots) or num_blocks + 12
        self.slots = self.slots or [[GARBAGE] * BLOCK_SIZE for _ in range(num_blocks)]
        file = PoolFile.join(f"/proc/self/fd/{self.memfd}", LAYOUT, num_blocks, lambda num_bytes: None)
        self.files.append(file)
        return Bench(
            num_blocks,
            block_size=BLOCK_SIZE,
            max_num_sequences=NUM_SEQUENCES,
            max_batched_tokens=self.max_batched_tokens,
            context_length=CONTEXT_LENGTH,
            pool=SharedBlockPool(file),
            slots=self.slots,
        )

    @rule()
    def restart(self) -> None:
        [dead] = [file for file in self.files if file.books is self.prefill.bench.pool._books]  # type: ignore[attr-defined]
        dead.close()
        super().restart()

    def borrowed(self, life: Life) -> BorrowedBlocks | None:
        ticket = open_ticket(life.signed, KEY)
        return BorrowedBlocks(ticket.block_ids, ticket.generations)

    @invariant()
    def check_books(self) -> None:
        pool = self.prefill.bench.pool
        assert isinstance(pool, SharedBlockPool)
        pool.check_all()

    @invariant()
    def check_writers(self) -> None:
        """Whoever writes on in a half full block has it alone, but for who is about to give it up."""
        for taking in self.takings():
            if taking.sequence.state is SequenceState.RUNNING and taking.first_token is not None:
                assert taking.life.lease_ended

    def teardown(self) -> None:
        super().teardown()
        for file in self.files:
            file.close()
        os.close(self.memfd)
