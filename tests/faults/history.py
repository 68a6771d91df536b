"""What clients saw, and whether a cluster that keeps its promises can have let them see it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvrelay.client import Completion
from kvrelay.errors import KvrelayError
from kvrelay.request import Chunk, FinishReason, TokenLogprobs
from tests.faults.faults import Fault, Kind

__all__ = ["Excuse", "Outcome", "excuses", "too_many_defects", "violations_of"]

LOGPROB_TOLERANCE = 1e-3
REPLACEMENT = "\ufffd"  # stands for bytes that are no character


@dataclass
class Outcome:
    """One request as its client saw it. An error is of the call; who has left sees nothing more.

    Attributes:
        ask: its place in the catalog.
        index: its place in the schedule; none if it was asked again.
        num_tries: how often it was sent; but for the last, nothing came of them.
    """

    request_id: str
    ask: int = 0
    index: int | None = None
    chunks: list[Chunk] = field(default_factory=list)
    error: KvrelayError | None = None
    has_left: bool = False
    aborted: bool = False
    num_tries: int = 0

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for chunk in self.chunks for token_id in chunk.token_ids)

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        return tuple(entry for chunk in self.chunks for entry in chunk.logprobs)


@dataclass(frozen=True)
class Excuse:
    """An error with which a request may end.

    Attributes:
        reason: any if empty.
        while_running: also after its first token; else only a request that was not admitted may end so.
    """

    code: str
    reason: str = ""
    while_running: bool = False

    def covers(self, outcome: Outcome) -> bool:
        error = outcome.error
        return (
            error is not None
            and error.code == self.code
            and self.reason in ("", error.reason)
            and (self.while_running or not outcome.chunks)
        )


def excuses(faults: Iterable[Fault], index: int | None) -> tuple[Excuse, ...]:
    """How a request may end under the faults that met somebody; if none covers its error, it had to be completed.

    Args:
        index: the request's place in the schedule.
    """
    return tuple(excuse for fault in faults for excuse in _excuses(fault, index))


def _excuses(fault: Fault, index: int | None) -> Iterator[Excuse]:
    if fault.kind is Kind.DEADLINE and index == fault.request:
        yield Excuse("DEADLINE_EXCEEDED", while_running=True)
    if fault.action == "raise":  # a defect, which another worker would have too
        yield Excuse("INTERNAL", while_running=True)
    if fault.takes_redis:  # without which nobody is admitted; who has been does not notice
        yield Excuse("UNAVAILABLE", "REDIS_UNAVAILABLE")
    if fault.takes_the_gateway:
        yield Excuse("UNAVAILABLE", while_running=fault.kind is not Kind.DRAIN)


def too_many_defects(outcomes: Iterable[Outcome], faults: Iterable[Fault]) -> list[str]:
    """More requests that failed by a defect than a defect was met by; empty if all is well."""
    failed = [each.request_id for each in outcomes if each.error is not None and each.error.code == "INTERNAL"]
    num_raised = sum(fault.action == "raise" for fault in faults)
    return [f"a defect of one request failed others: {failed}"] if len(failed) > num_raised else []


def violations_of(outcome: Outcome, expected: Completion, allowed: Sequence[Excuse]) -> list[str]:
    """What no client should ever have seen; empty if all is well.

    Args:
        expected: the same request without faults.
        allowed: errors that it may end with.
    """
    found = _ends(outcome, allowed)
    if [chunk.seq for chunk in outcome.chunks] != list(range(1, len(outcome.chunks) + 1)):
        found.append(f"seq has gaps: {[chunk.seq for chunk in outcome.chunks]}")
    count = len(outcome.token_ids)
    if outcome.token_ids != expected.token_ids[:count]:
        found.append(f"tokens {outcome.token_ids} instead of {expected.token_ids}")
    if not expected.text.startswith(_whole_characters(outcome)):
        found.append(f"text {outcome.text!r} instead of {expected.text!r}")
    found += _logprobs(outcome, expected)
    if outcome.chunks and outcome.chunks[-1].finish_reason is not None:
        found += _whole(outcome, expected)
    return [f"{outcome.request_id}: {each}" for each in found]


def _whole_characters(outcome: Outcome) -> str:
    """The text; of an aborted request without its end, which may be the half of a character."""
    is_part = bool(outcome.chunks) and outcome.chunks[-1].finish_reason is FinishReason.ABORT
    return outcome.text.rstrip(REPLACEMENT) if is_part else outcome.text


def _ends(outcome: Outcome, allowed: Sequence[Excuse]) -> list[str]:
    """Exactly one end, and nothing after it."""
    reasons = [chunk.finish_reason for chunk in outcome.chunks if chunk.finish_reason is not None]
    found = []
    if len(reasons) + (outcome.error is not None) != 1 and not outcome.has_left:
        found.append(f"ended {len(reasons)} times, and with {outcome.error!r}")
    if FinishReason.ABORT in reasons and not outcome.aborted:
        found.append("was aborted by nobody")
    if reasons and outcome.chunks[-1].finish_reason is None:
        found.append("went on after its end")
    if outcome.error is not None and not any(excuse.covers(outcome) for excuse in allowed):
        found.append(f"failed with {outcome.error.code} ({outcome.error.reason}): {outcome.error.message}")
    return found


def _whole(outcome: Outcome, expected: Completion) -> list[str]:
    last = outcome.chunks[-1]
    if last.finish_reason is FinishReason.ABORT:
        return []  # a part, for somebody wanted no more
    saw = (outcome.token_ids, outcome.text, last.finish_reason, last.usage and last.usage.completion_tokens)
    wanted = (expected.token_ids, expected.text, expected.finish_reason, expected.usage.completion_tokens)
    return [] if saw == wanted else [f"{saw} instead of {wanted}"]


def _logprobs(outcome: Outcome, expected: Completion) -> list[str]:
    if len(outcome.logprobs) != (len(outcome.token_ids) if expected.logprobs else 0):
        return [f"{len(outcome.logprobs)} log-probabilities for {len(outcome.token_ids)} tokens"]
    return [
        f"log-probabilities {saw} instead of {wanted}"
        for saw, wanted in zip(outcome.logprobs, expected.logprobs, strict=False)
        if _ids(saw) != _ids(wanted) or abs(saw.logprob - wanted.logprob) > LOGPROB_TOLERANCE
    ]


def _ids(entry: TokenLogprobs) -> tuple[int, ...]:
    return (entry.token_id, *(token_id for token_id, _ in entry.top))
