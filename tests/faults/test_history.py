"""The history checker finds what no client should have seen. One that found nothing would let everything pass."""

from dataclasses import replace

import pytest

from kvrelay.client import Completion
from kvrelay.errors import DeadlineExceeded, Internal, KvrelayError, Unavailable
from kvrelay.failpoints import Failpoint
from kvrelay.request import Chunk, FinishReason, Timings, TokenLogprobs, Usage
from tests.faults.faults import Fault, Kind
from tests.faults.history import Excuse, Outcome, excuses, too_many_defects, violations_of

LOGPROBS = tuple(TokenLogprobs(token, -0.5, ((token, -0.5), (9, -1.5))) for token in (5, 6, 7))
EXPECTED = Completion("r", "abc", (5, 6, 7), LOGPROBS, FinishReason.LENGTH, Usage(4, 0, 3), Timings())


def right() -> Outcome:
    chunks = [Chunk("r", seq + 1, "abc"[seq], (5 + seq,), (LOGPROBS[seq],)) for seq in range(3)]
    chunks[2] = replace(chunks[2], finish_reason=FinishReason.LENGTH, usage=EXPECTED.usage, timings=Timings())
    return Outcome("r", chunks=chunks)


def with_last(**changes: object) -> Outcome:
    outcome = right()
    outcome.chunks[-1] = replace(outcome.chunks[-1], **changes)  # type: ignore[arg-type]
    return outcome


def without(index: int) -> Outcome:
    outcome = right()
    del outcome.chunks[index]
    return outcome


def twice(index: int) -> Outcome:
    outcome = right()
    outcome.chunks.insert(index, outcome.chunks[index])
    return outcome


def dropped_and_counted_on() -> Outcome:
    outcome = without(1)
    outcome.chunks = [replace(chunk, seq=seq) for seq, chunk in enumerate(outcome.chunks, 1)]
    return outcome


def ended_with(error: KvrelayError | None, num_chunks: int) -> Outcome:
    return Outcome("r", chunks=right().chunks[:num_chunks], error=error)


def aborted(by_its_client: bool) -> Outcome:
    """After two of three tokens."""
    outcome = ended_with(None, 2)
    outcome.chunks.append(Chunk("r", 3, finish_reason=FinishReason.ABORT, usage=Usage(4, 0, 2), timings=Timings()))
    outcome.aborted = by_its_client
    return outcome


def test_what_came_without_faults_is_right() -> None:
    assert violations_of(right(), EXPECTED, ()) == []


@pytest.mark.parametrize("num_chunks", [0, 2])
def test_an_error_that_is_allowed_ends_a_request(num_chunks: int) -> None:
    allowed = [Excuse("UNAVAILABLE", while_running=True)]
    assert violations_of(ended_with(Unavailable("gone"), num_chunks), EXPECTED, allowed) == []


def test_who_leaves_sees_a_part() -> None:
    outcome = ended_with(None, 2)
    outcome.has_left = True
    assert violations_of(outcome, EXPECTED, ()) == []


def test_who_aborts_sees_a_part_and_its_end() -> None:
    assert violations_of(aborted(by_its_client=True), EXPECTED, ()) == []


def test_who_aborts_may_see_half_a_character() -> None:
    outcome = aborted(by_its_client=True)
    outcome.chunks[-1] = replace(outcome.chunks[-1], text="\ufffd")
    assert violations_of(outcome, EXPECTED, ()) == []
    outcome.chunks[0] = replace(outcome.chunks[0], text="\ufffd")
    assert violations_of(outcome, EXPECTED, ())


@pytest.mark.parametrize(
    ("outcome", "complaint"),
    [
        (without(0), "seq has gaps"),
        (without(1), "seq has gaps"),
        (twice(1), "seq has gaps"),
        (dropped_and_counted_on(), "tokens (5, 7) instead of"),
        (twice(2), "ended 2 times"),
        (without(2), "ended 0 times"),
        (ended_with(None, 0), "ended 0 times"),
        (ended_with(Unavailable("gone"), 3), "ended 1 times, and with Unavailable"),
        (ended_with(Internal("defect"), 1), "failed with INTERNAL"),
        (with_last(token_ids=(8,)), "tokens (5, 6, 8) instead of"),
        (with_last(text="d"), "text 'abd' instead of 'abc'"),
        (with_last(text=""), "instead of"),
        (with_last(finish_reason=FinishReason.STOP), "instead of"),
        (aborted(by_its_client=False), "was aborted by nobody"),
        (with_last(text="\ufffd"), "instead of 'abc'"),
        (with_last(usage=Usage(4, 0, 2)), "instead of"),
        (with_last(logprobs=()), "2 log-probabilities for 3 tokens"),
        (with_last(logprobs=(replace(LOGPROBS[2], top=((7, -0.5), (8, -1.5))),)), "log-probabilities"),
        (with_last(logprobs=(replace(LOGPROBS[2], logprob=-0.6),)), "log-probabilities"),
    ],
)
def test_what_is_wrong_is_found(outcome: Outcome, complaint: str) -> None:
    found = violations_of(outcome, EXPECTED, [Excuse("UNAVAILABLE", while_running=True)])
    assert any(complaint in each for each in found), found


LOSSES = [Kind.KILL, Kind.DRAIN, Kind.FREEZE, Kind.CUT, Kind.REFUSE, Kind.STALL, Kind.FLIP, Kind.DELAY]


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_of_a_worker_allows_no_error(kind: Kind) -> None:
    assert excuses([Fault(kind, "decode-0")], 0) == ()


@pytest.mark.parametrize("action", ["kill", "stop", "delay", "flip"])
def test_a_failpoint_allows_no_error(action: str) -> None:
    fault = Fault(Kind.FAILPOINT, "decode-0", failpoint=Failpoint("decode.frame", action))
    assert excuses([fault], 0) == ()


def test_a_deadline_is_one_requests_own() -> None:
    late = Fault(Kind.DEADLINE, request=1)
    assert is_allowed(DeadlineExceeded("late"), late, num_chunks=2, index=1)
    assert not is_allowed(DeadlineExceeded("late"), late, num_chunks=2, index=0)


@pytest.mark.parametrize("kind", [Kind.CANCEL, Kind.ABORT])
def test_who_leaves_is_told_of_no_error(kind: Kind) -> None:
    assert excuses([Fault(kind, request=1)], 1) == ()


def test_a_defect_is_one_requests_own() -> None:
    raised = Fault(Kind.FAILPOINT, "decode-0", failpoint=Failpoint("decode.reserved", "raise", at=1))
    defect = Internal("defect")
    assert is_allowed(defect, raised, num_chunks=1)
    failed = [ended_with(defect, 1), right(), ended_with(Unavailable("gone"), 0)]
    assert too_many_defects(failed, [raised]) == []
    assert too_many_defects([*failed, ended_with(defect, 0)], [raised])


REFUSED = Unavailable("no Redis", reason="REDIS_UNAVAILABLE")


@pytest.mark.parametrize("kind", [Kind.KILL, Kind.FREEZE, Kind.CUT, Kind.REFUSE, Kind.STALL])
@pytest.mark.parametrize("client", ["", "gateway-auto"])
def test_without_redis_only_those_are_refused_that_do_not_run(kind: Kind, client: str) -> None:
    fault = Fault(kind, "redis", client)
    assert is_allowed(REFUSED, fault, num_chunks=0)
    assert not is_allowed(REFUSED, fault, num_chunks=1)
    assert not is_allowed(Unavailable("a worker was lost", reason="WORKER_LOST"), fault, num_chunks=0)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(Kind.WIPE, "redis"),
        Fault(Kind.DELAY, "redis", "gateway-auto"),
        Fault(Kind.CUT, "redis", "decode-0"),
    ],
)
def test_nobody_notices_a_redis_that_is_there(fault: Fault) -> None:
    assert not is_allowed(REFUSED, fault, num_chunks=0)


def test_a_gateway_loses_what_it_runs_only_if_it_is_killed() -> None:
    killed, drained = (Fault(kind, "gateway-auto") for kind in (Kind.KILL, Kind.DRAIN))
    gone = Unavailable("gone")
    assert is_allowed(gone, killed, num_chunks=2)
    assert is_allowed(gone, drained, num_chunks=0)
    assert not is_allowed(gone, drained, num_chunks=2)
    assert not is_allowed(Internal("defect"), killed, num_chunks=2)


def test_a_gateway_that_stands_still_is_lost_only_if_somebody_notices() -> None:
    short, long = (Fault(Kind.FREEZE, "gateway-auto", seconds=seconds) for seconds in (0.6, 3.0))
    assert is_allowed(Unavailable("gone"), long, num_chunks=2)
    assert not is_allowed(Unavailable("gone"), short, num_chunks=0)


def is_allowed(error: KvrelayError, fault: Fault, num_chunks: int, index: int = 0) -> bool:
    return violations_of(ended_with(error, num_chunks), EXPECTED, excuses([fault], index)) == []
