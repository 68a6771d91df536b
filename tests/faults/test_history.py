"""The history checker finds what no client should have seen. One that found nothing would let everything pass."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from kvrelay.client import Completion
from kvrelay.errors import DeadlineExceeded, Internal, Unavailable
from kvrelay.failpoints import Failpoint
from kvrelay.request import Chunk, FinishReason, Timings, TokenLogprobs, Usage
from tests.faults.history import Outcome, allowed_errors, faults_of
from tests.faults.schedules import Fault, Kind

LOGPROBS = tuple(TokenLogprobs(token, -0.5, ((token, -0.5), (9, -1.5))) for token in (5, 6, 7))
EXPECTED = Completion("r", "abc", (5, 6, 7), LOGPROBS, FinishReason.LENGTH, Usage(4, 0, 3), Timings())


def right() -> Outcome:
    chunks = [Chunk("r", seq + 1, "abc"[seq], (5 + seq,), (LOGPROBS[seq],)) for seq in range(3)]
    chunks[2] = replace(chunks[2], finish_reason=FinishReason.LENGTH, usage=EXPECTED.usage, timings=Timings())
    return Outcome("r", chunks)


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


def ended_with(error: Exception | None, num_chunks: int) -> Outcome:
    return Outcome("r", right().chunks[:num_chunks], error)  # type: ignore[arg-type]


def test_what_came_without_faults_is_right() -> None:
    assert faults_of(right(), EXPECTED, frozenset()) == []


@pytest.mark.parametrize("num_chunks", [0, 2])
def test_an_error_that_is_allowed_ends_a_request(num_chunks: int) -> None:
    assert faults_of(ended_with(Unavailable("gone"), num_chunks), EXPECTED, frozenset({"UNAVAILABLE"})) == []


def test_who_leaves_sees_a_part() -> None:
    outcome = ended_with(None, 2)
    outcome.has_left = True
    assert faults_of(outcome, EXPECTED, frozenset()) == []


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
        (with_last(finish_reason=FinishReason.ABORT), "was aborted by nobody"),
        (with_last(usage=Usage(4, 0, 2)), "instead of"),
        (with_last(logprobs=()), "2 log-probabilities for 3 tokens"),
        (with_last(logprobs=(replace(LOGPROBS[2], top=((7, -0.5), (8, -1.5))),)), "log-probabilities"),
        (with_last(logprobs=(replace(LOGPROBS[2], logprob=-0.6),)), "log-probabilities"),
    ],
)
def test_what_is_wrong_is_found(outcome: Outcome, complaint: str) -> None:
    found = faults_of(outcome, EXPECTED, frozenset({"UNAVAILABLE"}))
    assert any(complaint in each for each in found), found


@pytest.mark.parametrize("kind", [Kind.KILL, Kind.FREEZE, Kind.CUT, Kind.REFUSE, Kind.STALL, Kind.FLIP, Kind.DELAY])
def test_the_loss_of_a_worker_allows_no_error(kind: Kind) -> None:
    assert allowed_errors(Fault(kind, "decode-0"), is_target=False) == frozenset()


@pytest.mark.parametrize("action", ["kill", "stop", "delay", "flip"])
def test_a_failpoint_allows_no_error(action: str) -> None:
    fault = Fault(Kind.FAILPOINT, "decode-0", failpoint=Failpoint("decode.frame", action))
    assert allowed_errors(fault, is_target=False) == frozenset()


def late(kind: Kind) -> Callable[[bool], frozenset[str]]:
    return lambda is_target: allowed_errors(Fault(kind, request=1), is_target)


def test_a_deadline_is_one_requests_own() -> None:
    allowed = late(Kind.DEADLINE)
    assert allowed(True) == {DeadlineExceeded.code}
    assert allowed(False) == late(Kind.CANCEL)(True) == frozenset()
