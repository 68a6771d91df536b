"""More requests than a decode worker has room for, for longer than a lease: real workers, and a played model."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from decode_worker.service import DecodeWorker
from gateway.fleet import Connection
from kvrelay.request import FinishReason, WorkerRole
from prefill_worker.service import PrefillWorker
from tests.patience import SOON, until
from tests.played_workers import Directory, played_worker
from tests.unit.serving_kit import MAX_TOKENS, Run

LEASE_SECONDS = 0.1
STEP_SECONDS = 0.05


class Reached(Connection):
    """A connection, as a test's fleet shows it."""

    blocks_free = 100

    @property
    def worker_id(self) -> str:
        return self.record.worker_id


@contextlib.asynccontextmanager
async def connections(directory: Directory) -> AsyncIterator[list[Reached]]:
    reached = [Reached(entry.record, "gateway", lambda: None) for entry in directory.snapshot().values()]
    try:
        await until(lambda: all(each.up for each in reached))
        yield reached
    finally:
        for each in reached:
            await each.close()


async def test_a_kv_cache_waits_for_as_long_as_its_request_does() -> None:
    """Each request decodes for longer than a lease, one after another; and no prompt is computed twice."""
    directory = Directory()
    async with (
        played_worker(PrefillWorker, WorkerRole.PREFILL, directory, lease_seconds=LEASE_SECONDS) as prefill,
        played_worker(DecodeWorker, WorkerRole.DECODE, directory, max_num_sequences=1, step_seconds=STEP_SECONDS),
        connections(directory) as workers,
        asyncio.timeout(SOON),
    ):
        runs = [Run(workers, request_id=f"r{number}") for number in range(4)]
        reasons = await asyncio.gather(*(run.to_the_end() for run in runs))
        assert reasons == [FinishReason.LENGTH] * len(runs)
        assert [len(run.token_ids) for run in runs] == [MAX_TOKENS] * len(runs)
        assert [run.span.events for run in runs] == [[]] * len(runs)
        await until(lambda: len(prefill.source.leases) == 0)
