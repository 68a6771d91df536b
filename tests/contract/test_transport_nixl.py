"""NIXL: what is checked before it may read, and that what was given up never writes."""

import asyncio
import os
import signal
from typing import Any

import pytest
import torch

from kv_transfer import nixl_agent
from kv_transfer.nixl import NixlReceiver
from kv_transfer.nixl_agent import MAX_METADATA_BYTES, NixlAgent, NixlFailed, NixlTimedOut, nixl_problem
from kv_transfer.transport import TransferFailed
from kvrelay.engine.kv_cache import KvCache
from kvrelay.errors import FailedPrecondition
from kvrelay.v1 import kv_pb2
from tests.contract.transport_kit import EPOCH, LAYOUT, NUM_BLOCKS, Registry, decode_worker, pair, prefill_process
from tests.patience import until
from tests.stopping import is_stopped

needs_nixl = pytest.mark.skipif(nixl_problem() is not None, reason=str(nixl_problem()))


class FakeAgent:
    """An agent that notes what is read, and fails as it is told."""

    def __init__(self, cache: KvCache, failure: NixlFailed | None = None) -> None:
        self.cache = cache
        self.failure = failure
        self.reads: list[Any] = []
        self.met: list[bytes] = []

    def segment_of(self, export: kv_pb2.NixlExport) -> str:
        return "vram" if export.on_gpu else "dram"

    def meet(self, metadata: bytes) -> str:
        self.met.append(metadata)
        return "peer"

    def read(self, *arguments: Any) -> None:
        self.reads.append(arguments)
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        pass


def _export(**changes: Any) -> kv_pb2.NixlExport:
    return kv_pb2.NixlExport(**{"metadata": b"m", "base_address": 1 << 20, "num_blocks": 64, **changes})


@pytest.fixture
def cache() -> Any:
    cache = KvCache(LAYOUT, NUM_BLOCKS, torch.device("cpu"))
    yield cache
    cache.close()


@pytest.mark.parametrize("block_id", [-1, 64, 2**32 - 1])
async def test_no_address_is_made_of_a_block_out_of_range(cache: KvCache, block_id: int) -> None:
    agent: Any = FakeAgent(cache)
    receiver = NixlReceiver.open_pool(_export(), agent)
    with pytest.raises(TransferFailed) as caught:
        await receiver.receive([0, block_id], [0, 1], b"")
    assert caught.value.reason == "BLOCK_OUT_OF_RANGE"
    with pytest.raises(TransferFailed, match="nobody asked"):
        await receiver.receive([0], [0], b"x")
    assert agent.reads == []


async def test_runs_are_merged(cache: KvCache) -> None:
    agent: Any = FakeAgent(cache)
    receiver = NixlReceiver.open_pool(_export(on_gpu=True, device_index=3), agent)
    await receiver.receive([4, 5, 6, 9, 10], [1, 2, 3, 4, 5], b"")
    size, own = LAYOUT.block_bytes, cache.block_bytes.data_ptr()
    ((peer, source, destination, segment, device),) = agent.reads
    assert (peer, segment, device) == ("peer", "vram", 3)
    assert source == [((1 << 20) + 4 * size, 3 * size), ((1 << 20) + 9 * size, 2 * size)]
    assert destination == [(own + size, 3 * size), (own + 4 * size, 2 * size)]


@pytest.mark.parametrize(
    "changes", [{"num_blocks": 0}, {"base_address": 0}, {"base_address": (1 << 63) - 1}, {"base_address": 2**64 - 1}]
)
def test_export_that_is_no_pool(cache: KvCache, changes: Any) -> None:
    agent: Any = FakeAgent(cache)
    with pytest.raises(FailedPrecondition) as caught:
        NixlReceiver.open_pool(_export(**changes), agent)
    assert caught.value.reason == "NIXL_UNAVAILABLE"
    assert agent.met == []


@pytest.mark.parametrize("timed_out", [True, False])
async def test_only_what_was_given_up_ends_the_connection(cache: KvCache, timed_out: bool) -> None:
    agent: Any = FakeAgent(cache, NixlTimedOut("late") if timed_out else NixlFailed("broken"))
    receiver = NixlReceiver.open_pool(_export(), agent)
    with pytest.raises(TransferFailed) as caught:
        await receiver.receive([0], [0], b"")
    assert caught.value.reason == "NIXL_FAILED"
    assert receiver.usable is not timed_out


@needs_nixl
@pytest.mark.parametrize(
    ("metadata", "words"),
    [(b"", "0 bytes"), (b"nonsense" * 20, "cannot be reached"), (b"x" * (MAX_METADATA_BYTES + 1), "65537 bytes")],
    ids=["none", "nonsense", "too long"],
)
def test_metadata_that_is_none(cache: KvCache, metadata: bytes, words: str) -> None:
    with pytest.raises(FailedPrecondition, match=words) as caught:
        NixlAgent(cache).meet(metadata)
    assert caught.value.reason == "NIXL_UNAVAILABLE"


@needs_nixl
async def test_memory_that_is_not_registered_is_not_read() -> None:
    async with pair("nixl") as workers, workers.decode.links.use("prefill-0", EPOCH) as link:
        receiver: Any = link.receiver
        receiver._export.num_blocks = 2 * NUM_BLOCKS  # as a defect of the prefill worker might say
        with pytest.raises(TransferFailed) as caught:
            await receiver.receive([NUM_BLOCKS], [0], b"")
        assert caught.value.reason == "NIXL_FAILED"
        await receiver.receive([0], [0], b"")
        assert workers.same([0], [0])


@needs_nixl
async def test_what_was_given_up_never_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")  # else the kernel copies, and needs nothing of a process that stands still
    async with (
        prefill_process() as (process, record, _),
        decode_worker(Registry(record), "nixl") as decode,
        decode.links.use("prefill-0", EPOCH) as link,
    ):
        await link.receiver.receive(range(4), range(4), b"")
        assert any(decode.cache.read_blocks(range(4)))
        decode.cache.block_bytes.zero_()
        monkeypatch.setattr(nixl_agent, "TRANSFER_SECONDS", 0.3)
        os.kill(process.pid, signal.SIGSTOP)
        try:
            await until(lambda: is_stopped(process.pid))
            with pytest.raises(TransferFailed, match="within"):
                await link.receiver.receive(range(16), range(16), b"")
        finally:
            os.kill(process.pid, signal.SIGCONT)
        await asyncio.sleep(1)
        assert not any(decode.cache.read_blocks(range(64)))
        assert not link.receiver.usable
