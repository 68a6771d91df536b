"""What dispatch tells the router of workers: what they have registered, whatever this process is set to."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gateway.disaggregation import Disaggregation
from gateway.dispatch import Dispatch, Placement
from kvrelay.control.membership import WorkerEntry
from kvrelay.control.registry import LinkRecord, ModelInfo, WorkerLoad, WorkerRecord
from kvrelay.request import Request, Sampling, WorkerRole, WorkerState

MODEL = ModelInfo("model", "llama", 4096, 100, block_size=32, model_digest="00", block_bytes=32_000)
LOAD = WorkerLoad(WorkerState.READY, 0, 0, 1000, 1000, 0, prefill_rate=1000.0)
SLOW_LINK = LinkRecord("prefill", "grpc", bandwidth=1e6, latency=0.001)


class Worker(WorkerEntry):
    """An entry of the directory that is its own `Connection`."""

    @property
    def start(self) -> tuple[str, int]:
        return self.record.worker_id, self.record.epoch


@dataclass
class Workers:
    """What a `Dispatch` asks of a `Fleet`."""

    found: dict[str, WorkerEntry] = field(default_factory=dict)

    def add(self, worker_id: str, role: WorkerRole, load: WorkerLoad = LOAD, **own: Any) -> None:
        record = WorkerRecord(worker_id, role, "host:1", 1, MODEL, **own)
        self.found[worker_id] = Worker(record, load, seen_at=0.0)

    def entries(self) -> list[WorkerEntry]:
        return list(self.found.values())

    def connection(self, worker_id: str) -> Any:
        return self.found[worker_id]


async def place(dispatch: Dispatch, num_tokens: int) -> Placement:
    return await dispatch.place(Request("request", tuple(range(num_tokens)), Sampling(max_tokens=1)))


def dispatch_to(workers: Any, mode: Disaggregation) -> Dispatch:
    return Dispatch(workers, wait_seconds=0.0, mode=mode)


async def test_prefixes_count_in_the_blocks_of_the_workers() -> None:
    """The first prefill worker has computed this prompt once, and is a little busier now than the second."""
    for num_tokens, again_on in ((31, "prefill-1"), (32, "prefill-0")):
        workers = Workers()
        workers.add("decode", WorkerRole.DECODE)
        workers.add("prefill-0", WorkerRole.PREFILL)
        dispatch = dispatch_to(workers, Disaggregation.ALWAYS)
        with await place(dispatch, num_tokens):
            pass
        workers.add("prefill-0", WorkerRole.PREFILL, replace(LOAD, waiting_tokens=10))
        workers.add("prefill-1", WorkerRole.PREFILL)
        assert (await place(dispatch, num_tokens)).prefill is workers.connection(again_on)


async def test_a_prefill_worker_has_its_own_chunks() -> None:
    workers = Workers()
    workers.add("decode", WorkerRole.DECODE, replace(LOAD, running=8, links=(SLOW_LINK,)))
    for max_batched_tokens, moves in ((100, True), (2000, False)):
        workers.add("prefill", WorkerRole.PREFILL, max_batched_tokens=max_batched_tokens)
        placement = await place(dispatch_to(workers, Disaggregation.AUTO), 2000)
        assert (placement.prefill is not None) is moves


@pytest.mark.parametrize(
    ("source", "goes_to"), [("prefill-0", "prefill-1"), ("decode-1", "prefill-0"), ("", "prefill-0")]
)
async def test_the_link_that_broke_is_the_one_from_the_source(source: str, goes_to: str) -> None:
    """A KV cache may also come from a decode worker that drains, or from nobody."""
    workers = Workers()
    workers.add("decode-0", WorkerRole.DECODE)
    workers.add("prefill-0", WorkerRole.PREFILL)
    dispatch = dispatch_to(workers, Disaggregation.ALWAYS)
    with await place(dispatch, 32) as placement:
        dispatch.link_broke(placement, source)
    workers.add("prefill-1", WorkerRole.PREFILL, replace(LOAD, waiting_tokens=100))
    assert (await place(dispatch, 32)).prefill is workers.connection(goes_to)


async def test_a_decode_worker_has_its_own_limit() -> None:
    workers = Workers()
    workers.add("decode-0", WorkerRole.DECODE, replace(LOAD, running=4), itl_limit=0.0)
    workers.add("decode-1", WorkerRole.DECODE, replace(LOAD, running=4), itl_limit=0.01)
    placement = await place(dispatch_to(workers, Disaggregation.NEVER), 2000)
    assert placement.decode is workers.connection("decode-1")
