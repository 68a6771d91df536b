"""Pairing: which transport two workers agree on, what they refuse, and what they say and measure of a link."""

import asyncio
import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kv_transfer.choice import FASTEST_FIRST, Choice, choose_transport, parse_required
from kv_transfer.rate import LinkRate, measure_bandwidth, measure_latency
from kv_transfer.transport import TransferFailed
from kvrelay.errors import ConfigurationError, FailedPrecondition, KvrelayError, Unavailable
from kvrelay.rpc import open_channel, translated
from kvrelay.v1 import kv_pb2, kv_pb2_grpc
from tests.contract.transport_kit import EPOCH, TRANSPORTS, Prefill, Registry, decode_worker, noting, pair
from tests.patience import SOON, until


class Fake:
    """A receiver of which only the trying-out matters."""

    usable = True

    def __init__(self, name: str, works: bool = True) -> None:
        self.name = name
        self.works = works
        self.closed_by: int | None = None  # a thread

    async def receive(self, source: Sequence[int], destination: Sequence[int], data: bytes) -> None:
        raise NotImplementedError

    async def probe(self, num_bytes: int) -> int:
        if not self.works:
            raise TransferFailed("nothing came", reason="SHORT_READ")
        return num_bytes

    def close(self) -> None:
        self.closed_by = threading.get_ident()


def _opener(receiver: Any) -> Any:
    async def open_it() -> Any:
        if isinstance(receiver, KvrelayError):
            raise receiver
        return receiver

    return open_it


async def _choose(
    preference: str = "auto", required: Sequence[str] = (), offered: Sequence[str] = FASTEST_FIRST, **receivers: Any
) -> Choice:
    openers = {name: each if isinstance(each, str) else _opener(each) for name, each in receivers.items()}
    return await choose_transport(preference, required, openers, offered, measure_bandwidth)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
async def test_the_fastest_comes_first(count: int) -> None:
    names = FASTEST_FIRST[-count:]
    receivers: dict[str, Any] = {name: Fake(name) for name in reversed(names)}
    choice = await _choose(**receivers)
    assert (choice.receiver.name, choice.fallback) == (names[0], "")
    assert choice.bandwidth > 0


async def test_the_order() -> None:
    assert FASTEST_FIRST == ("pool", "cuda_ipc", "shm", "nixl", "grpc")


async def test_why_each_faster_one_was_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    spoiled = Fake("nixl", works=False)
    with caplog.at_level(logging.WARNING):
        choice = await _choose(
            offered=("shm", "nixl", "grpc"),
            cuda_ipc=Fake("cuda_ipc"),
            shm=FailedPrecondition("on another host", reason="SHM_UNAVAILABLE"),
            nixl=spoiled,
            grpc=Fake("grpc"),
        )
    assert choice.receiver.name == "grpc"
    assert choice.fallback == (
        "cuda_ipc: the prefill worker does not offer it; shm: on another host; nixl: nothing came"
    )
    assert spoiled.closed_by not in (None, threading.get_ident())
    assert [name for name in FASTEST_FIRST if any(f"the {name} " in each.message for each in caplog.records)] == [
        "shm",
        "nixl",
    ]


async def test_what_this_process_lacks_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        choice = await _choose(nixl="nixl is not installed here", grpc=Fake("grpc"))
    assert choice.fallback == "nixl: nixl is not installed here"
    assert not caplog.records


@pytest.mark.parametrize(
    ("receivers", "offered", "reason"),
    [
        ({"nixl": "not installed", "grpc": Fake("grpc")}, FASTEST_FIRST, "TRANSPORT_REFUSED"),
        ({"grpc": Fake("grpc")}, FASTEST_FIRST, "TRANSPORT_REFUSED"),
        ({"nixl": Fake("nixl"), "grpc": Fake("grpc")}, ("shm", "grpc"), "TRANSPORT_REFUSED"),
        ({"nixl": Fake("nixl", works=False), "grpc": Fake("grpc")}, FASTEST_FIRST, "SHORT_READ"),
    ],
)
async def test_a_forced_transport_is_not_replaced(receivers: Any, offered: Any, reason: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        await _choose("nixl", offered=offered, **receivers)
    assert caught.value.reason == reason


async def test_a_fallback_that_is_not_listed_is_refused() -> None:
    down = Unavailable("the agent is away", reason="X")
    with pytest.raises(FailedPrecondition) as caught:
        await _choose(required=("shm", "nixl"), shm=FailedPrecondition("on another host"), nixl=down, grpc=Fake("grpc"))
    assert caught.value.reason == "TRANSPORT_REFUSED"
    for words in ("shm: on another host", "nixl: the agent is away", "grpc: not listed"):
        assert words in caught.value.message


async def test_what_is_listed_may_be_chosen() -> None:
    choice = await _choose(required=("grpc",), shm=Fake("shm"), grpc=Fake("grpc"))
    assert (choice.receiver.name, choice.fallback) == ("grpc", "shm: not listed in require_transport")


def test_the_list_is_checked() -> None:
    assert parse_required(" shm , nixl,") == {"shm", "nixl"}
    assert parse_required("") == set()
    with pytest.raises(ConfigurationError, match="require_transport: 'smh' is no transport"):
        parse_required("shm,smh")


# Two workers


async def test_a_link_tells_how_it_works() -> None:
    async with pair("auto") as workers:
        await workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), 0)
        (link,) = workers.decode.links.status()
        assert (link.prefill_worker_id, link.transport, link.fallback) == ("prefill-0", "shm", "")
        assert str(link).startswith("prefill-0 by shm, ")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_link_is_measured_at_pairing(transport: str) -> None:
    async with pair(transport) as workers, workers.decode.links.use("prefill-0", EPOCH) as link:
        assert 0 < link.rate.bandwidth < math.inf
        assert 0 < link.rate.latency < math.inf


async def test_falling_back_is_visible_and_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    async with pair("auto") as workers:
        record = workers.prefill.record
        assert record.shm is not None
        workers.decode.registry.tell(replace(record, shm=replace(record.shm, host_id="elsewhere")))
        with caplog.at_level(logging.WARNING, "kv_transfer.choice"):
            for _ in range(3):
                await workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), 0)
        (link,) = workers.decode.links.status()
        assert link.transport != "shm"
        assert "shm: shared memory cannot be used: the prefill worker is on another host" in link.fallback
        assert sum("from the shm transport" in each.message for each in caplog.records) == 1


async def test_a_pair_without_a_required_transport_is_refused() -> None:
    prefill = Prefill()
    async with prefill.serving():
        record = replace(prefill.record, shm=None)
        async with decode_worker(Registry(record), "auto", required=("shm",)) as decode:
            with pytest.raises(TransferFailed) as caught:
                await decode.puller.pull(prefill.grant_complete(range(8)), range(8), 2)
            assert (caught.value.reason, caught.value.verified_blocks) == ("TRANSPORT_REFUSED", 2)
            assert decode.links.status() == []


@pytest.mark.parametrize("end", ["links", "service"])
async def test_protocol_versions_differ(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"kv_transfer.{end}.PROTOCOL_VERSION", 1)
    async with pair("auto") as workers:
        with pytest.raises(TransferFailed) as caught:
            await workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), 0)
        assert caught.value.reason == "VERSION_MISMATCH"
        assert workers.decode.links.status() == []


async def test_a_broken_way_is_replaced() -> None:
    async with pair("shm") as workers:
        async with workers.decode.links.use("prefill-0", EPOCH) as link:
            receiver: Any = link.receiver
            receiver.usable = False
        await workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), 0)
        assert workers.prefill.num_pairings == 2
        assert workers.same(range(8), range(8))


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda stub: stub.Export(kv_pb2.ExportRequest(transport="carrier pigeon")), "INVALID_ARGUMENT"),
        (lambda stub: stub.Export(kv_pb2.ExportRequest(transport="cuda_ipc")), "INVALID_ARGUMENT"),
        (lambda stub: stub.Export(kv_pb2.ExportRequest(transport="shm")), "FAILED_PRECONDITION"),
        (lambda stub: stub.Probe(kv_pb2.ProbeRequest(num_bytes=(16 << 20) + 1)).read(), "INVALID_ARGUMENT"),
    ],
)
async def test_what_cannot_be_exported_or_probed(call: Any, code: str) -> None:
    async with pair("grpc") as workers:
        channel = open_channel(f"127.0.0.1:{workers.prefill.port}")
        try:
            with pytest.raises(KvrelayError) as caught, translated():
                await call(kv_pb2_grpc.KvServiceStub(channel))
            assert caught.value.code == code
        finally:
            await channel.close(None)


async def test_a_probe_brings_what_was_asked_for_and_nothing_of_the_pool() -> None:
    async with pair("grpc") as workers:
        channel = open_channel(f"127.0.0.1:{workers.prefill.port}")
        try:
            probe = kv_pb2_grpc.KvServiceStub(channel).Probe(kv_pb2.ProbeRequest(num_bytes=(2 << 20) + 5))
            assert b"".join([part.data async for part in probe]) == bytes((2 << 20) + 5)
        finally:
            await channel.close(None)


# Rates


def test_pulls_refine_the_rate_and_small_ones_do_not() -> None:
    rate = LinkRate(1e9, 1e-3)
    rate.add(1000, 1.0)
    rate.add(1 << 20, 0.0)
    assert rate.bandwidth == 1e9
    for _ in range(50):
        rate.add(10_000_000, 0.02)
    assert rate.bandwidth == pytest.approx(5e8, rel=0.01)
    rate.add(10_000_000, 0.01)
    assert rate.bandwidth == pytest.approx(6e8, rel=0.01)


async def test_the_best_of_several_counts() -> None:
    times = iter([0.0, 3.0, 10.0, 10.5, 20.0, 22.0])
    assert await measure_latency(lambda: asyncio.sleep(0), lambda: next(times)) == 0.5
    times = iter([0.0, 3.0, 10.0, 10.5])
    assert await measure_bandwidth(Fake("shm"), lambda: next(times)) == (4 << 20) / 0.5


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_waiting_for_prefill_is_not_receiving(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[tuple[int, float]] = []
    monkeypatch.setattr(LinkRate, "add", lambda self, num_bytes, seconds: noted.append((num_bytes, seconds)))
    monkeypatch.setattr("kv_transfer.service.MAX_RUN_BYTES", 4 * 8192)
    async with pair(transport) as workers:
        size, now = workers.prefill.cache.layout.block_bytes, SimpleNamespace(seconds=100.0)
        monkeypatch.setattr(workers.decode.puller, "_clock", lambda: now.seconds)
        handover, ticket = workers.prefill.grant(range(16))
        handover.advance(4)
        arrived = asyncio.Event()
        workers.prefill.tamper = noting(lambda event: arrived.set())
        task = asyncio.create_task(workers.decode.puller.pull(ticket, range(16), 0))
        await asyncio.wait_for(arrived.wait(), SOON)
        await until(lambda: workers.same(range(4), range(4)))
        now.seconds += 1000  # prefill takes its time
        handover.complete(42, workers.prefill.now)
        await task
        ((num_bytes, seconds),) = noted
        assert seconds == 0
        # By grpc only runs that followed at once are timed: the two after the first that was waited for.
        assert num_bytes == (8 if transport == "grpc" else 16) * size
