"""From what the load generator noted to the numbers of a report. All times are in seconds.

TTFT  from when the request was due to its first token. In a closed loop it is due when the stream is free, else at its
      scheduled moment, so that a load generator that falls behind cannot hide waiting.
E2E   from when it was due to its last response.
TPOT  (E2E - TTFT) / (tokens - 1), for requests of two tokens and more.
ITL   the gap before each token but the first. A response of n tokens that comes g seconds after the one before it is
      n gaps of g / n; tokens that come with the first one are gaps of 0. So a request has tokens - 1 gaps, and their
      sum is the time from its first token to its last.
response gap
      the time between two responses, however many tokens they bring: what a reader sees stand still.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvrelay.bench.load import Outcome, Record
from kvrelay.request import Timings

__all__ = [
    "Distribution",
    "Goodput",
    "GoodputLimits",
    "Run",
    "Samples",
    "Stage",
    "Summary",
    "inter_token_gaps",
    "samples",
    "summarise",
]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Run:
    """What a load has brought.

    Attributes:
        window: throughput counts what came within so many seconds after the start.
        client_cpu_seconds: what the load generator itself took, all of its threads.
    """

    records: Sequence[Record]
    window: float
    client_cpu_seconds: float

    def having(self, outcome: Outcome) -> list[Record]:
        """The requests with this outcome."""
        return [record for record in self.records if record.outcome is outcome]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of values in seconds; the percentiles are interpolated between neighbours."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    maximum: float

    @classmethod
    def of(cls, values: Floats) -> "Distribution | None":
        """None where there are no values."""
        if not len(values):
            return None
        p50, p90, p95, p99 = np.percentile(values, (50, 90, 95, 99)).tolist()
        return cls(len(values), float(values.mean()), p50, p90, p95, p99, float(values.max()))


@dataclass(frozen=True, slots=True)
class GoodputLimits:
    """What a good request keeps to, in seconds; None limits nothing.

    Attributes:
        gap: the longest response gap of the request.
    """

    ttft: float | None = None
    tpot: float | None = None
    gap: float | None = None

    def kept_by(self, record: Record) -> bool:
        """Whether the request completed within the limits. One without a second token has only TTFT to break."""
        if record.outcome is not Outcome.COMPLETED:
            return False
        limits = [(self.ttft, _ttft)]
        if record.num_received > 1:
            limits += [(self.tpot, _tpot), (self.gap, _longest_gap)]
        return all(limit is None or value(record) <= limit for limit, value in limits)


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests within the limits: how many a second, and their share of all that completed or failed."""

    limits: GoodputLimits
    requests_per_second: float
    share: float


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a request on the cluster: its mean, and its share of the whole."""

    mean: float
    share: float


@dataclass(frozen=True, slots=True)
class Samples:
    """The values behind the distributions, of completed requests."""

    ttft: Floats
    itl: Floats
    response_gap: Floats
    tpot: Floats
    e2e: Floats
    send_delay: Floats


@dataclass(frozen=True, slots=True)
class Summary:
    """The numbers of a report. Throughput is of the window; latencies are those of completed requests.

    Attributes:
        short: completed requests that brought fewer or more tokens than they were asked for.
        cut: requests that were cut to the model's context.
        errors: failed requests by gRPC status code.
        input_tokens: of prompts whose first token came within the window; `cached_tokens` are those among them that
            were found in a prefix cache, as far as the requests have completed.
        output_tokens: that came within the window, except those of failed requests.
        total_tokens_per_second: input and output.
        goodput: None without limits.
        send_delay: how much later than due requests were sent.
        stages: where the cluster says that the time went.
    """

    window: float
    completed: int
    failed: int
    interrupted: int
    short: int
    cut: int
    errors: Mapping[str, int]
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    goodput: Goodput | None
    ttft: Distribution | None
    itl: Distribution | None
    response_gap: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    send_delay: Distribution | None
    stages: Mapping[str, Stage]
    client_cpu_seconds: float


def summarise(run: Run, limits: GoodputLimits) -> Summary:
    """Computes everything that a report says."""
    completed, failed = run.having(Outcome.COMPLETED), run.having(Outcome.FAILED)
    tokens = _TokenCounts.of(run)
    per_second = 1 / run.window if run.window > 0 else 0.0
    values = samples(run)
    return Summary(
        window=run.window,
        completed=len(completed),
        failed=len(failed),
        interrupted=len(run.records) - len(completed) - len(failed),
        short=sum(record.num_received != record.output_tokens for record in completed),
        cut=sum(record.was_cut for record in run.records),
        errors=dict(Counter(record.error for record in failed if record.error).most_common()),
        input_tokens=tokens.input,
        cached_tokens=tokens.cached,
        output_tokens=tokens.output,
        requests_per_second=_num_ended(completed, run.window) * per_second,
        output_tokens_per_second=tokens.output * per_second,
        total_tokens_per_second=(tokens.input + tokens.output) * per_second,
        goodput=_goodput(run, limits, len(completed) + len(failed)),
        ttft=Distribution.of(values.ttft),
        itl=Distribution.of(values.itl),
        response_gap=Distribution.of(values.response_gap),
        tpot=Distribution.of(values.tpot),
        e2e=Distribution.of(values.e2e),
        send_delay=Distribution.of(values.send_delay),
        stages=_stages([record.timings for record in completed]),
        client_cpu_seconds=run.client_cpu_seconds,
    )


def samples(run: Run) -> Samples:
    """The values of all completed requests."""
    completed = [record for record in run.having(Outcome.COMPLETED) if record.response_times]
    return Samples(
        ttft=_each(completed, _ttft),
        itl=_joined(inter_token_gaps(record) for record in completed),
        response_gap=_joined(np.diff(record.response_times) for record in completed),
        tpot=_each([record for record in completed if record.num_received > 1], _tpot),
        e2e=_each(completed, _e2e),
        send_delay=_each(run.records, lambda record: record.sent - record.due),
    )


def inter_token_gaps(record: Record) -> Floats:
    """The gap before each token but the first; see the module for how responses of several tokens count."""
    counts = np.array(record.response_tokens, dtype=np.int64)
    gaps = np.repeat(np.diff(record.response_times) / counts[1:], counts[1:])
    return np.concatenate([np.zeros(counts[0] - 1), gaps])


def _ttft(record: Record) -> float:
    return record.response_times[0] - record.due if record.response_times else float("inf")


def _e2e(record: Record) -> float:
    return (record.ended or 0.0) - record.due


def _tpot(record: Record) -> float:
    return (_e2e(record) - _ttft(record)) / (record.num_received - 1)


def _longest_gap(record: Record) -> float:
    return float(np.diff(record.response_times).max(initial=0.0))


def _each(records: Iterable[Record], value: Callable[[Record], float]) -> Floats:
    return np.fromiter(map(value, records), dtype=np.float64)


def _joined(arrays: Iterable[Floats]) -> Floats:
    return np.concatenate([np.empty(0), *arrays])


@dataclass(frozen=True, slots=True)
class _TokenCounts:
    input: int
    cached: int
    output: int

    @classmethod
    def of(cls, run: Run) -> "_TokenCounts":
        counted = [record for record in run.records if record.outcome is not Outcome.FAILED]
        begun = [record for record in counted if record.response_times and record.response_times[0] <= run.window]
        output = sum(
            tokens
            for record in counted
            for time, tokens in zip(record.response_times, record.response_tokens, strict=True)
            if time <= run.window
        )
        return cls(
            input=sum(record.input_tokens for record in begun),
            cached=sum(record.usage.cached_tokens for record in begun),
            output=output,
        )


def _goodput(run: Run, limits: GoodputLimits, num_ended: int) -> Goodput | None:
    if limits == GoodputLimits():
        return None
    good = [record for record in run.records if limits.kept_by(record)]
    per_second = _num_ended(good, run.window) / run.window if run.window > 0 else 0.0
    return Goodput(limits, per_second, len(good) / num_ended if num_ended else 0.0)


def _num_ended(records: Iterable[Record], window: float) -> int:
    return sum(record.ended is not None and record.ended <= window for record in records)


def _stages(timings: Sequence[Timings]) -> dict[str, Stage]:
    """The stages follow one another, so that their shares sum up to 1."""
    stages = [each.stages() for each in timings]
    names = stages[0] if stages else ()
    means = {name: float(np.mean([each[name] for each in stages])) for name in names}
    whole = sum(means.values())
    return {name: Stage(mean, mean / whole if whole else 0.0) for name, mean in means.items()}
