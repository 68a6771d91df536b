"""Leases: what keeps one, what ends one, and who is told."""

from dataclasses import replace
from typing import Any

import pytest

from kv_transfer.handover import EndReason
from kv_transfer.leases import LeaseTable
from kv_transfer.tickets import Ticket
from kvrelay.errors import AlreadyExists, FailedPrecondition, KvrelayError, NotFound, Unavailable

EPOCH = 4
BLOCKS = (2, 0, 5)
START = 1000.0


class Owner:
    """The engine's side: generations, and which requests may be freed."""

    def __init__(self) -> None:
        self.generations = [1] * 8
        self.freed: list[str] = []
        self.table = LeaseTable("prefill-0", 30.0, self.generations.__getitem__, self.freed.append)
        self.table.epoch = EPOCH

    def grant(self, request_id: str = "r1", *, complete: bool = True, ends_with_call: bool = False) -> Ticket:
        generations = tuple(self.generations[block_id] for block_id in BLOCKS)
        handover, ticket = self.table.grant(
            request_id, "gateway-0", BLOCKS, generations, START, ends_with_call=ends_with_call
        )
        if complete:
            handover.complete(9, START)
        return ticket


@pytest.fixture
def owner() -> Owner:
    return Owner()


def reason(call: Any, *arguments: Any) -> str:
    with pytest.raises(KvrelayError) as caught:
        call(*arguments)
    assert isinstance(caught.value, NotFound if caught.value.reason == "TICKET_UNKNOWN" else FailedPrecondition)
    return caught.value.reason


def test_ticket_says_what_is_held(owner: Owner) -> None:
    ticket = owner.grant()
    assert ticket == Ticket("r1", "prefill-0", EPOCH, BLOCKS, (1, 1, 1))
    handover = owner.table.find(ticket, START)
    assert (handover.request_id, handover.block_ids) == ("r1", BLOCKS)


def test_one_lease_a_request(owner: Owner) -> None:
    owner.grant()
    with pytest.raises(AlreadyExists):
        owner.grant()


def test_no_ticket_before_the_epoch_is_known(owner: Owner) -> None:
    owner.table.epoch = 0
    with pytest.raises(Unavailable):
        owner.grant()


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"request_id": "r2"}, "TICKET_UNKNOWN"),
        ({"worker_id": "prefill-1"}, "TICKET_UNKNOWN"),
        ({"epoch": EPOCH - 1}, "STALE_EPOCH"),
        ({"block_ids": (2, 0, 6)}, "STALE_GENERATION"),
        ({"block_ids": (2, 0), "generations": (1, 1)}, "STALE_GENERATION"),
        ({"generations": (1, 1, 2)}, "STALE_GENERATION"),
    ],
)
def test_refused_tickets(owner: Owner, changes: dict[str, Any], answer: str) -> None:
    ticket = replace(owner.grant(), **changes)
    assert reason(owner.table.find, ticket, START) == answer
    assert reason(owner.table.release, ticket, START) == answer
    assert owner.freed == []


def test_block_that_the_engine_gave_away(owner: Owner) -> None:
    ticket = owner.grant()
    handover = owner.table.find(ticket, START)
    owner.generations[5] += 1
    assert reason(owner.table.find, ticket, START) == "STALE_GENERATION"
    assert reason(owner.table.release, ticket, START) == "STALE_GENERATION"
    owner.table.verify(handover, 0, 2)
    assert reason(owner.table.verify, handover, 2, 1) == "STALE_GENERATION"


def test_old_ticket_of_the_same_request(owner: Owner) -> None:
    ticket = owner.grant()
    owner.table.release(ticket, START)
    owner.generations[0] += 1
    owner.grant()
    assert reason(owner.table.find, ticket, START) == "STALE_GENERATION"


def test_a_ticket_is_good_for_as_long_as_its_lease(owner: Owner) -> None:
    ticket = owner.grant()
    for seconds in range(0, 3600, 29):
        assert owner.table.find(ticket, START + seconds)
        owner.table.renew("r1", START + seconds)
    assert reason(owner.table.find, ticket, START + seconds + 30) == "TICKET_UNKNOWN"


def test_a_lease_is_the_gateways_until_somebody_pulls(owner: Owner) -> None:
    owner.grant()
    assert owner.table.owner("r1") == "gateway-0"
    owner.table.pass_to("r1", "decode-1")
    owner.table.pass_to("unknown", "decode-1")
    assert owner.table.owner("r1") == "decode-1"
    assert owner.table.owner("unknown") is None


def test_lease_runs_out(owner: Owner) -> None:
    ticket = owner.grant()
    assert owner.table.expire(START + 29.9) == []
    assert owner.table.find(ticket, START + 29.9)
    assert reason(owner.table.find, ticket, START + 30) == "TICKET_UNKNOWN"
    assert reason(owner.table.release, ticket, START + 30) == "TICKET_UNKNOWN"
    assert owner.freed == []
    assert owner.table.expire(START + 30) == ["r1"]
    assert owner.table.expire(START + 30) == []
    assert owner.freed == ["r1"]
    assert len(owner.table) == 0


def test_renewal_begins_the_lease_anew(owner: Owner) -> None:
    owner.grant()
    owner.table.renew("r1", START + 20)
    owner.table.renew("r1", START + 10)
    owner.table.renew("unknown", START)
    assert owner.table.expire(START + 49) == []
    assert owner.table.expire(START + 50) == ["r1"]


@pytest.mark.parametrize("complete", [False, True], ids=["computing", "computed"])
def test_lease_does_not_run_out_while_its_call_is_open(owner: Owner, complete: bool) -> None:
    """Nobody pulls: the decode worker may have no room, for however long."""
    ticket = owner.grant(complete=complete, ends_with_call=True)
    late = START + 10_000
    assert owner.table.expire(late) == []
    assert owner.table.lease_seconds("r1", late) is None
    handover = owner.table.find(ticket, late)
    owner.table.end("r1", EndReason.ABORTED)
    assert handover.end_reason is EndReason.ABORTED
    assert reason(owner.table.find, ticket, late) == "TICKET_UNKNOWN"
    assert reason(owner.table.release, ticket, late) == "TICKET_UNKNOWN"
    assert owner.freed == []


def test_a_new_epoch_ends_all_leases(owner: Owner) -> None:
    tickets = [owner.grant("r1"), owner.grant("r2", ends_with_call=True)]
    owner.table.begin_epoch(EPOCH + 1)
    assert [reason(owner.table.find, ticket, START) for ticket in tickets] == ["STALE_EPOCH"] * 2
    assert owner.freed == ["r1", "r2"]
    assert len(owner.table) == 0


def test_release_frees_once(owner: Owner) -> None:
    ticket = owner.grant()
    handover = owner.table.find(ticket, START)
    owner.table.release(ticket, START)
    assert owner.freed == ["r1"]
    assert handover.end_reason is EndReason.RELEASED
    assert reason(owner.table.release, ticket, START) == "TICKET_UNKNOWN"


def test_release_before_the_prompt_is_done(owner: Owner) -> None:
    ticket = owner.grant(complete=False)
    assert reason(owner.table.release, ticket, START) == "PREFILL_INCOMPLETE"
    assert owner.freed == []


def test_owner_ends_a_lease_without_being_told(owner: Owner) -> None:
    ticket = owner.grant(complete=False)
    handover = owner.table.find(ticket, START)
    owner.table.end("r1", EndReason.ABORTED)
    owner.table.end("r1", EndReason.FAILED)
    assert handover.end_reason is EndReason.ABORTED
    assert owner.freed == []
    assert reason(owner.table.find, ticket, START) == "TICKET_UNKNOWN"


def test_lease_seconds(owner: Owner) -> None:
    owner.grant()
    assert owner.table.lease_seconds("r1", START + 12) == 18
    assert owner.table.lease_seconds("r1", START + 99) == 0
    assert owner.table.lease_seconds("unknown", START) is None
