"""Which blocks are verified, who decides it, and what a mismatch is worth."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from kv_transfer.sampling import CHECKSUM_MODES, verified_positions
from kv_transfer.tickets import Ticket, sign_ticket
from kv_transfer.transport import TransferFailed
from kvrelay.errors import InvalidArgument
from kvrelay.v1 import kv_pb2
from tests.contract.transport_kit import KEY, TRANSPORTS, Pair, noting, pair

FULL, SAMPLED, OFF = CHECKSUM_MODES["full"], CHECKSUM_MODES["sampled"], CHECKSUM_MODES["off"]


def _sampled(ticket: bytes, total: int) -> Sequence[int]:
    return verified_positions(SAMPLED, ticket, 0, total, total)


def _signed(request_id: str, total: int) -> bytes:
    return sign_ticket(Ticket(request_id, "prefill-0", 7, tuple(range(total)), (0,) * total), KEY)


def test_one_in_eight_and_the_last() -> None:
    chosen = [_sampled(_signed(f"r{n}", 64), 64) for n in range(200)]
    assert all(63 in positions for positions in chosen)
    rate = sum(len(positions) - 1 for positions in chosen) / (200 * 63)
    assert 0.1 < rate < 0.15
    assert len({tuple(positions) for positions in chosen}) == 200


def test_the_choice_does_not_depend_on_the_runs() -> None:
    ticket = _signed("r", 50)
    pieces = [verified_positions(SAMPLED, ticket, first, 10, 50) for first in range(0, 50, 10)]
    assert [position for piece in pieces for position in piece] == list(_sampled(ticket, 50))


def test_the_mac_decides() -> None:
    body = Ticket("r", "prefill-0", 7, tuple(range(64)), (0,) * 64)
    assert _sampled(sign_ticket(body, KEY), 64) != _sampled(sign_ticket(body, b"another key" * 3), 64)


def test_full_is_what_an_older_decode_worker_gets() -> None:
    assert list(verified_positions(kv_pb2.CHECKSUM_MODE_UNSPECIFIED, b"t", 3, 4, 9)) == [3, 4, 5, 6]
    assert list(verified_positions(OFF, b"t", 3, 4, 9)) == []
    with pytest.raises(InvalidArgument):
        verified_positions(99, b"t", 3, 4, 9)


def _spoil(workers: Pair, position: int) -> None:
    """Flips a bit of a block on its way."""

    def flip(event: kv_pb2.PullResponse) -> list[kv_pb2.PullResponse]:
        ready, size = event.ready, workers.prefill.cache.layout.block_bytes
        if ready.first <= position < ready.first + ready.count:
            if ready.data:
                data = bytearray(ready.data)
                data[(position - ready.first) * size] ^= 1
                ready.data = bytes(data)
            else:
                workers.prefill.cache.block_view(position, 1)[0] ^= 1
        return [event]

    workers.prefill.tamper = flip


@pytest.mark.parametrize("mode", ["full", "sampled", "off"])
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_the_decode_worker_decides(transport: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.service.MAX_RUN_BYTES", 5 * 8192)
    async with pair(transport, checksum=mode) as workers:
        sent: list[int] = []
        workers.prefill.tamper = noting(lambda event: sent.extend(event.ready.checksums))
        ticket = workers.prefill.grant_complete(range(48))
        await workers.decode.puller.pull(ticket, range(48), 0)
        assert len(sent) == {"full": 48, "sampled": len(_sampled(ticket, 48)), "off": 0}[mode]
        assert workers.same(range(48), range(48))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_sampled_mismatch_distrusts_the_whole_pull(
    transport: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kv_transfer.service.MAX_RUN_BYTES", 8192)
    async with pair(transport, checksum="sampled") as workers:
        counted: list[int] = []
        monkeypatch.setattr(workers.decode.puller._mismatches, "add", lambda number, *_: counted.append(number))
        _spoil(workers, 47)
        with caplog.at_level(logging.WARNING), pytest.raises(TransferFailed) as caught:
            await workers.decode.puller.pull(workers.prefill.grant_complete(range(48)), range(48), 3)
        assert (caught.value.reason, caught.value.verified_blocks) == ("CHECKSUM_MISMATCH", 3)
        assert counted == [1]
        assert any("prefill-0" in record.message and "block 47" in record.message for record in caplog.records)


async def test_sampling_looks_at_no_block_that_was_not_chosen() -> None:
    async with pair("grpc", checksum="sampled") as workers:
        ticket = workers.prefill.grant_complete(range(48))
        spared = next(position for position in range(48) if position not in _sampled(ticket, 48))
        _spoil(workers, spared)
        await workers.decode.puller.pull(ticket, range(48), 0)
        assert not workers.same([spared], [spared])


@pytest.mark.parametrize("mode", ["full", "sampled"])
async def test_checksums_are_insisted_on(mode: str) -> None:
    def strip(event: kv_pb2.PullResponse) -> list[kv_pb2.PullResponse]:
        event.ready.ClearField("checksums") if event.HasField("ready") else None
        return [event]

    async with pair("grpc", checksum=mode) as workers:
        workers.prefill.tamper = strip
        with pytest.raises(TransferFailed) as caught:
            await workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), 0)
        assert (caught.value.reason, caught.value.verified_blocks) == ("UNEXPECTED_EVENT", 0)


async def test_a_sampled_pull_that_breaks_off_proves_nothing(monkeypatch: Any) -> None:
    monkeypatch.setattr("kv_transfer.service.MAX_RUN_BYTES", 8192)
    async with pair("grpc", checksum="sampled") as workers:
        workers.prefill.tamper = lambda event: [event] if event.HasField("ready") else []
        with pytest.raises(TransferFailed) as caught:
            await workers.decode.puller.pull(workers.prefill.grant_complete(range(8)), range(8), 2)
        assert (caught.value.reason, caught.value.verified_blocks) == ("TRUNCATED", 2)
