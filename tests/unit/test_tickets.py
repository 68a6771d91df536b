"""Tickets are believed only if the cluster made them; layouts are compared field by field."""

import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.layouts import check_layouts, layout_to_proto
from kv_transfer.tickets import TICKET_SECONDS, Ticket, open_ticket, sign_ticket
from kvrelay.engine.kv_layout import LAYOUT_VERSION, KvLayout
from kvrelay.errors import FailedPrecondition, PermissionDenied
from kvrelay.v1 import kv_pb2

KEY = b"k" * 32
TICKET = Ticket("r1", "prefill-0", 3, (5, 0, 7), (1, 2, 3))
LAYOUT = KvLayout(b"m" * 32, "float32", block_size=16, num_layers=2, num_kv_heads=2, head_dim=16)


def refused(data: bytes) -> bool:
    with pytest.raises(PermissionDenied) as caught:
        open_ticket(data, KEY)
    return caught.value.reason == "TICKET_REFUSED"


@given(
    st.builds(
        lambda blocks, **fields: Ticket(block_ids=tuple(blocks), generations=tuple(blocks.values()), **fields),
        st.dictionaries(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), min_size=1),
        request_id=st.text(),
        worker_id=st.text(),
        epoch=st.integers(0, 2**64 - 1),
    )
)
def test_what_was_signed_is_what_opens(ticket: Ticket) -> None:
    assert open_ticket(sign_ticket(ticket, KEY), KEY) == ticket


def test_another_key() -> None:
    assert refused(sign_ticket(TICKET, b"x" * 32))


def test_any_flipped_bit_is_refused() -> None:
    data = sign_ticket(TICKET, KEY)
    for bit in range(8 * len(data)):
        forged = bytearray(data)
        forged[bit // 8] ^= 1 << bit % 8
        try:
            opened = open_ticket(bytes(forged), KEY)
        except PermissionDenied:
            continue
        # A bit of the outer message may be one that proto readers pass over.
        assert opened == TICKET


def test_a_ticket_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    data, made = sign_ticket(TICKET, KEY), time.time()
    monkeypatch.setattr(time, "time", lambda: made + TICKET_SECONDS - 1)
    assert open_ticket(data, KEY) == TICKET
    monkeypatch.setattr(time, "time", lambda: made + TICKET_SECONDS + 1)
    with pytest.raises(FailedPrecondition) as caught:
        open_ticket(data, KEY)
    assert caught.value.reason == "TICKET_EXPIRED"


@given(st.binary(max_size=300))
def test_garbage(data: bytes) -> None:
    assert refused(data)


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_mac_of_another_length(length: int) -> None:
    signed = kv_pb2.SignedTicket.FromString(sign_ticket(TICKET, KEY))
    signed.mac = (signed.mac + b"\0")[:length]
    assert refused(signed.SerializeToString())


def test_truncated() -> None:
    data = sign_ticket(TICKET, KEY)
    assert all(refused(data[:length]) for length in range(len(data)))


@pytest.mark.parametrize(
    "changes",
    [
        {"block_ids": (), "generations": ()},
        {"generations": (1, 2)},
        {"generations": (1, 2, 3, 4)},
        {"block_ids": (5, 0, 5)},
    ],
    ids=["no block", "generation missing", "generation too many", "block twice"],
)
def test_signed_but_inconsistent(changes: dict[str, Any]) -> None:
    assert refused(sign_ticket(replace(TICKET, **changes), KEY))


def test_equal_layouts_pass() -> None:
    check_layouts(layout_to_proto(LAYOUT), layout_to_proto(replace(LAYOUT)))


@pytest.mark.parametrize("field", [field.name for field in kv_pb2.KvLayout.DESCRIPTOR.fields])
def test_the_field_that_differs_is_named(field: str) -> None:
    other = layout_to_proto(LAYOUT)
    other.ClearField(field)
    with pytest.raises(FailedPrecondition, match=field) as caught:
        check_layouts(layout_to_proto(LAYOUT), other)
    assert caught.value.reason == "LAYOUT_MISMATCH"
    assert caught.value.metadata == {"field": field}


def test_layout_carries_its_version() -> None:
    assert layout_to_proto(LAYOUT).version == LAYOUT_VERSION
