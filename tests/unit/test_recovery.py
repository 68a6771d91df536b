"""When a request goes on after a failure, where not, and when it is given up."""

import pytest

from gateway.recovery import LONGEST_DELAY_SECONDS, Recovery, broken_from
from kvrelay.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    KvrelayError,
    Unavailable,
)

LOST = Unavailable("lost", reason="WORKER_LOST", metadata={"stage": "decode", "worker": "d1"}, retry_after=1.0)


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument.field("prompt", "too long"),
        DeadlineExceeded("too late"),
        Internal("a defect", reason="ENGINE_STEP_FAILED"),
        FailedPrecondition("no", reason="LAYOUT_MISMATCH"),
        Unavailable("no Redis", reason="REDIS_UNAVAILABLE"),
    ],
)
def test_what_no_other_worker_could_do_better_ends_the_request(error: KvrelayError) -> None:
    with pytest.raises(type(error)) as caught:
        Recovery(max_failures=4).note(error, None)
    assert caught.value is error


def test_a_worker_that_failed_is_avoided_and_its_next_start_is_not() -> None:
    recovery = Recovery(max_failures=4)
    recovery.note(LOST, ("d1", 7))
    assert recovery.avoided == {("d1", 7)}


def test_one_failure_too_many_says_stage_worker_and_that_another_try_may_work() -> None:
    recovery = Recovery(max_failures=2)
    recovery.note(LOST, ("d1", 1))
    recovery.note(LOST, ("d1", 2))
    with pytest.raises(Unavailable) as caught:
        recovery.note(LOST, ("d1", 3))
    error = caught.value
    assert error.reason == "WORKER_LOST"
    assert error.metadata == {"stage": "decode", "worker": "d1", "cause": "WORKER_LOST", "failures": "3"}
    assert error.retry_after is not None


@pytest.mark.parametrize("reason", ["EVICTED", "WORKER_DRAINING", "NO_WORKERS"])
def test_nobody_is_to_blame_for_a_lack_of_room_or_a_drain(reason: str) -> None:
    recovery = Recovery(max_failures=0)
    for _ in range(50):
        recovery.note(FailedPrecondition("elsewhere", reason=reason), None)
    assert recovery.avoided == set()
    assert recovery.delay == 0.0


def transfer_failed(cause: str) -> KvrelayError:
    return FailedPrecondition("no", reason="TRANSFER_FAILED", metadata={"worker": "d1", "cause": cause})


@pytest.mark.parametrize("cause", ["TICKET_UNKNOWN", "TICKET_EXPIRED"])
def test_a_decode_worker_is_not_to_blame_for_a_lease_that_ended(cause: str) -> None:
    recovery = Recovery(max_failures=0)
    for _ in range(50):
        recovery.note(transfer_failed(cause), ("d1", 1))
    assert recovery.avoided == set()
    assert recovery.delay == 0.0


def test_a_decode_worker_may_be_to_blame_for_bytes_that_changed() -> None:
    recovery = Recovery(max_failures=4)
    recovery.note(transfer_failed("CHECKSUM_MISMATCH"), ("d1", 1))
    assert recovery.avoided == {("d1", 1)}


def test_a_link_breaks_where_a_cache_did_not_arrive_and_not_where_its_lease_had_ended() -> None:
    for cause, source in (("UNAVAILABLE", "p1"), ("CHECKSUM_MISMATCH", "p1"), ("TICKET_EXPIRED", "")):
        error = transfer_failed(cause)
        error.metadata["source"] = "p1"
        assert broken_from(error) == source
    assert broken_from(LOST) == ""


def test_the_first_recovery_is_immediate_and_the_others_wait_ever_longer() -> None:
    recovery = Recovery(max_failures=20)
    delays = []
    for epoch in range(12):
        recovery.note(LOST, ("d1", epoch))
        delays.append(recovery.delay)
    assert delays[0] == 0.0
    assert delays == sorted(delays)
    assert delays[-1] == LONGEST_DELAY_SECONDS
