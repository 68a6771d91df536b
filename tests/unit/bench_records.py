"""Records of requests made by hand, for the tests of what a benchmark makes of them."""

from array import array
from collections.abc import Sequence
from datetime import UTC, datetime

from kvrelay.bench.load import Outcome, Record
from kvrelay.bench.measure import GoodputLimits, Run
from kvrelay.bench.report import Report, make_report
from kvrelay.request import Timings, Usage

CLUSTER = {
    "target": "localhost:50051",
    "model": "tiny <model>",
    "architecture": "LlamaForCausalLM",
    "context_length": 4096,
    "vocab_size": 512,
    "prefill_workers": 1,
    "decode_workers": 2,
}


def record(
    responses: Sequence[tuple[float, int]] = (),
    *,
    index: int = 0,
    due: float = 0.0,
    sent: float | None = None,
    ended: float | None = None,
    outcome: Outcome = Outcome.COMPLETED,
    asked: int | None = None,
    input_tokens: int = 10,
    cached_tokens: int = 0,
    error: str | None = None,
    timings: Timings | None = None,
    was_cut: bool = False,
) -> Record:
    """One request whose responses are pairs of time and number of tokens; it ends with the last unless told."""
    received = sum(tokens for _, tokens in responses)
    last = responses[-1][0] if responses else None
    return Record(
        index=index,
        request_id=f"r-{index}",
        input_tokens=input_tokens,
        output_tokens=received if asked is None else asked,
        was_cut=was_cut,
        due=due,
        sent=due if sent is None else sent,
        response_times=array("d", [time for time, _ in responses]),
        response_tokens=array("L", [tokens for _, tokens in responses]),
        outcome=outcome,
        ended=None if outcome is Outcome.INTERRUPTED else last if ended is None else ended,
        error=error,
        usage=Usage(input_tokens, cached_tokens, received),
        timings=timings or Timings(),
    )


def report(records: Sequence[Record], window: float = 10.0, limits: GoodputLimits | None = None) -> Report:
    """A report of these records."""
    return make_report(
        Run(records, window, client_cpu_seconds=0.5),
        limits or GoodputLimits(),
        {"arrivals": "closed loop, 2 concurrent", "requests": len(records), "seed": 0},
        CLUSTER,
        datetime(2026, 11, 23, 12, 0, tzinfo=UTC),
    )
