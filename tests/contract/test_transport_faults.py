"""What is refused, by whom, and what of a failed transfer can still be used."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from kv_transfer.blocks import checksums
from kv_transfer.handover import EndReason
from kv_transfer.tickets import TICKET_SECONDS, open_ticket, sign_ticket
from kv_transfer.transport import TransferFailed
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.kv_layout import KvLayout
from kvrelay.v1 import kv_pb2
from tests.contract.transport_kit import (
    EPOCH,
    KEY,
    LAYOUT,
    TRANSPORTS,
    Decode,
    Pair,
    Prefill,
    Registry,
    decode_worker,
    pair,
)

Events = list[kv_pb2.PullResponse]


@pytest.fixture(params=TRANSPORTS)
async def workers(request: pytest.FixtureRequest) -> Any:
    async with pair(request.param) as both:
        yield both


async def failure(decode: Decode, ticket: bytes, destination: Sequence[int], num_cached: int = 0) -> TransferFailed:
    with pytest.raises(TransferFailed) as caught:
        await decode.puller.pull(ticket, destination, num_cached)
    return caught.value


@pytest.fixture
def one_block_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.service.MAX_RUN_BYTES", 1)


# Bytes that are wrong


@pytest.mark.parametrize("byte", [0, 8191, 5 * 8192 + 17])
async def test_flipped_byte_is_found(workers: Pair, byte: int) -> None:
    def flip(event: kv_pb2.PullResponse) -> Events:
        if event.ready.data:
            data = bytearray(event.ready.data)
            data[byte] ^= 1
            event.ready.data = bytes(data)
        elif event.HasField("ready"):
            workers.prefill.cache.block_view(0, 8)[byte] ^= 1
        return [event]

    workers.prefill.tamper = flip
    failed = await failure(workers.decode, workers.prefill.grant_complete(range(8)), range(8))
    assert (failed.reason, failed.verified_blocks) == ("CHECKSUM_MISMATCH", byte // 8192)


@pytest.mark.usefixtures("one_block_an_event")
async def test_flipped_byte_in_a_later_event(workers: Pair) -> None:
    def flip(event: kv_pb2.PullResponse) -> Events:
        if event.ready.first == 5:
            event.ready.checksums[0] ^= 1
        return [event]

    workers.prefill.tamper = flip
    failed = await failure(workers.decode, workers.prefill.grant_complete(range(8)), range(8), 2)
    assert (failed.reason, failed.verified_blocks) == ("CHECKSUM_MISMATCH", 5)
    assert workers.same(range(2, 5), range(2, 5))


# Events that are wrong


@pytest.mark.usefixtures("one_block_an_event")
@pytest.mark.parametrize("last", [3, 7])
async def test_truncated_stream(workers: Pair, last: int) -> None:
    workers.prefill.tamper = lambda event: [event] if event.HasField("ready") and event.ready.first <= last else []
    ticket = workers.prefill.grant_complete(range(8))
    failed = await failure(workers.decode, ticket, range(8))
    assert failed.verified_blocks == last + 1
    assert workers.same(range(last + 1), range(last + 1))
    assert workers.prefill.freed == []


def _alter(**fields: Any) -> Any:
    def alter(event: kv_pb2.PullResponse) -> Events:
        for name, value in fields.items():
            if event.ready.first == 5:
                setattr(event.ready, name, value)
        return [event]

    return alter


def _resize(count: int) -> Any:
    def resize(event: kv_pb2.PullResponse) -> Events:
        if event.ready.first == 5:
            event.ready.count = count
            event.ready.checksums[:] = [1] * count
        return [event]

    return resize


def _fewer_checksums(event: kv_pb2.PullResponse) -> Events:
    if event.ready.first == 5:
        event.ready.ClearField("checksums")
    return [event]


def _token_too_early(event: kv_pb2.PullResponse) -> Events:
    early = kv_pb2.PullResponse(complete=kv_pb2.PrefillComplete(first_token_id=1))
    return [early if event.ready.first == 5 else event]


TAMPERED = {
    "a gap": _alter(first=6),
    "again": _alter(first=4),
    "beyond the ticket": _alter(count=100),
    "beyond the ticket, with checksums": _resize(4),
    "no block": _resize(0),
    "huge": _alter(first=2**32 - 1, count=2**32 - 1),
    "no checksums": _fewer_checksums,
    "token too early": _token_too_early,
    "empty": lambda event: [kv_pb2.PullResponse() if event.ready.first == 5 else event],
    "twice": lambda event: [event, event] if event.ready.first == 4 else [event],
    "wrong length": _alter(data=b"x" * 8191),
}


@pytest.mark.usefixtures("one_block_an_event")
@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED.keys())
async def test_wrong_event_touches_no_memory(workers: Pair, tamper: Any) -> None:
    workers.prefill.tamper = tamper
    failed = await failure(workers.decode, workers.prefill.grant_complete(range(8)), range(10, 18))
    assert failed.reason in {"UNEXPECTED_EVENT", "WRONG_LENGTH"}
    assert failed.verified_blocks == 5
    assert workers.same(range(5), range(10, 15))
    assert not any(workers.decode.cache.read_blocks([*range(10), *range(15, 64)]))


async def test_event_after_the_first_token(workers: Pair) -> None:
    workers.prefill.tamper = lambda event: [event, event] if event.HasField("complete") else [event]
    failed = await failure(workers.decode, workers.prefill.grant_complete(range(8)), range(8))
    assert (failed.reason, failed.verified_blocks) == ("UNEXPECTED_EVENT", 8)


# Tickets that are wrong


def _resigned(ticket: bytes, **changes: Any) -> bytes:
    return sign_ticket(replace(open_ticket(ticket, KEY), **changes), KEY)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epoch": EPOCH - 1}, "STALE_EPOCH"),
        ({"epoch": EPOCH + 1}, "STALE_EPOCH"),
        ({"worker_id": "prefill-9"}, "WORKER_UNKNOWN"),
        ({"request_id": "r2"}, "TICKET_UNKNOWN"),
        ({"generations": (2,) * 8}, "STALE_GENERATION"),
        ({"block_ids": tuple(range(1, 9))}, "STALE_GENERATION"),
        ({"block_ids": (0,), "generations": (3,)}, "WRONG_COUNT"),
    ],
)
async def test_refused_ticket(workers: Pair, changes: dict[str, Any], reason: str) -> None:
    ticket = _resigned(workers.prefill.grant_complete(range(8)), **changes)
    failed = await failure(workers.decode, ticket, range(8), 2)
    assert (failed.reason, failed.verified_blocks) == (reason, 2)
    assert not any(workers.decode.cache.read_blocks(range(64)))
    assert workers.prefill.freed == []


async def test_forged_ticket_is_refused_by_either_end(workers: Pair) -> None:
    ticket = sign_ticket(open_ticket(workers.prefill.grant_complete(range(8)), KEY), b"another key")
    assert (await failure(workers.decode, ticket, range(8))).reason == "TICKET_REFUSED"
    async with decode_worker(workers.decode.registry, "auto", key=b"another key") as traitor:
        assert (await failure(traitor, ticket, range(8))).reason == "TICKET_REFUSED"
    assert workers.prefill.freed == []


async def test_a_ticket_that_is_too_old_is_refused(workers: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket, made = workers.prefill.grant_complete(range(8)), time.time()
    monkeypatch.setattr(time, "time", lambda: made + TICKET_SECONDS + 1)
    assert (await failure(workers.decode, ticket, range(8))).reason == "TICKET_EXPIRED"
    assert workers.prefill.freed == []


async def test_stale_epoch_is_refused_by_the_prefill_worker_too(workers: Pair) -> None:
    await workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), 0)
    ticket = workers.prefill.grant_complete(range(8))
    workers.prefill.leases.epoch = EPOCH + 1
    assert (await failure(workers.decode, ticket, range(8))).reason == "STALE_EPOCH"


async def test_another_process_on_the_port_is_found_at_pairing(workers: Pair) -> None:
    workers.prefill.leases.worker_id = "prefill-1"
    failed = await failure(workers.decode, workers.prefill.grant_complete(range(8)), range(8))
    assert failed.reason in {"STALE_EPOCH", "WORKER_UNKNOWN"}


async def test_a_worker_that_the_registry_shows_a_moment_later_is_waited_for(workers: Pair) -> None:
    registry = workers.decode.registry
    registry.tell()
    pull = asyncio.create_task(workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), 0))
    await asyncio.sleep(0)
    registry.tell(workers.prefill.record)
    await pull
    assert workers.same(range(8), range(8))


# Leases that ended


async def test_expired_lease(workers: Pair) -> None:
    ticket = workers.prefill.grant_complete(range(8))
    workers.prefill.now += 31
    assert (await failure(workers.decode, ticket, range(8))).reason == "TICKET_UNKNOWN"
    assert workers.prefill.leases.expire(workers.prefill.now) == ["r1"]
    assert (await failure(workers.decode, ticket, range(8))).reason == "TICKET_UNKNOWN"


async def test_a_ticket_is_good_for_as_long_as_the_call_of_its_lease_is_open(workers: Pair) -> None:
    handover, ticket = workers.prefill.grant(range(8))
    handover.complete(42, workers.prefill.now)
    workers.prefill.now += 10_000
    assert workers.prefill.leases.expire(workers.prefill.now) == []
    assert (await workers.decode.puller.pull(ticket, range(8), 0)).first_token_id == 42
    assert (await failure(workers.decode, ticket, range(8))).reason == "TICKET_UNKNOWN"


async def test_a_ticket_is_worth_nothing_after_the_call(workers: Pair) -> None:
    handover, ticket = workers.prefill.grant(range(8))
    handover.complete(42, workers.prefill.now)
    workers.prefill.leases.end("r1", EndReason.ABORTED)
    assert (await failure(workers.decode, ticket, range(8))).reason == "TICKET_UNKNOWN"


async def test_release_after_expiry_is_refused(workers: Pair) -> None:
    def expire(event: kv_pb2.PullResponse) -> Events:
        if event.HasField("complete"):
            workers.prefill.now += 31
            workers.prefill.leases.expire(workers.prefill.now)
        return [event]

    workers.prefill.tamper = expire
    failed = await failure(workers.decode, workers.prefill.grant_complete(range(8)), range(8), 3)
    assert (failed.reason, failed.verified_blocks) == ("TICKET_UNKNOWN", 3)


async def test_block_that_was_given_away_is_never_sent(workers: Pair) -> None:
    handover, ticket = workers.prefill.grant(range(8))
    workers.prefill.generations[6] += 1
    handover.complete(1, workers.prefill.now)
    assert (await failure(workers.decode, ticket, range(8))).reason == "STALE_GENERATION"


async def test_block_that_is_given_away_while_it_is_read(workers: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(cache: KvCache, block_ids: Sequence[int]) -> list[int]:
        workers.prefill.generations[6] += 1
        return checksums(cache, block_ids)

    monkeypatch.setattr("kv_transfer.service.checksums", read)
    failed = await failure(workers.decode, workers.prefill.grant_complete(range(8)), range(8))
    assert (failed.reason, failed.verified_blocks) == ("STALE_GENERATION", 0)
    assert not any(workers.decode.cache.read_blocks(range(8)))


async def test_block_that_was_given_away_during_the_copy(workers: Pair) -> None:
    def give_away(event: kv_pb2.PullResponse) -> Events:
        if event.HasField("complete"):
            workers.prefill.generations[6] += 1
        return [event]

    workers.prefill.tamper = give_away
    failed = await failure(workers.decode, workers.prefill.grant_complete(range(8)), range(8))
    assert (failed.reason, failed.verified_blocks) == ("STALE_GENERATION", 0)
    assert workers.prefill.freed == []


async def test_released_ticket_cannot_be_replayed(workers: Pair) -> None:
    ticket = workers.prefill.grant_complete(range(8))
    await workers.decode.puller.pull(ticket, range(8), 0)
    assert (await failure(workers.decode, ticket, range(8))).reason == "TICKET_UNKNOWN"


# Workers that do not fit


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_digest", b"n" * 32),
        ("dtype", "bfloat16"),
        ("block_size", 32),
        ("num_layers", 1),
        ("num_kv_heads", 1),
        ("head_dim", 32),
    ],
)
@pytest.mark.parametrize("preference", TRANSPORTS)
async def test_layouts_differ(preference: str, field: str, value: Any) -> None:
    prefill = Prefill()
    layout: KvLayout = replace(LAYOUT, **{field: value})
    async with prefill.serving(), decode_worker(Registry(prefill.record), preference, layout=layout) as decode:
        failed = await failure(decode, prefill.grant_complete(range(8)), range(8))
        assert failed.reason == "LAYOUT_MISMATCH"
        assert field in failed.message
        assert decode.links.status() == []


async def test_layout_versions_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair("grpc") as workers:
        # Both ends live in this process, so only what the decode worker sends is altered.
        theirs = iter([2])
        monkeypatch.setattr("kv_transfer.links.layout_to_proto", lambda _: kv_pb2.KvLayout(version=next(theirs)))
        failed = await failure(workers.decode, workers.prefill.grant_complete(range(8)), range(8))
        assert failed.reason == "LAYOUT_MISMATCH"
        assert "version" in failed.message


async def test_worker_that_does_not_answer() -> None:
    prefill = Prefill()
    async with prefill.serving():
        record = prefill.record
        ticket = prefill.grant_complete(range(8))
    async with decode_worker(Registry(record), "auto") as decode:
        failed = await failure(decode, ticket, range(8), 1)
        assert failed.verified_blocks == 1
        assert decode.links.status() == []
