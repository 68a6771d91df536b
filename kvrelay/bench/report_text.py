"""A benchmark's report for a terminal."""

from collections.abc import Iterator

from kvrelay.bench.measure import Distribution, Summary
from kvrelay.bench.report import Report

__all__ = ["LATENCIES", "headline", "milliseconds", "render_text"]

LATENCIES = {
    "ttft": ("TTFT", "time to first token"),
    "itl": ("ITL", "gap between tokens"),
    "tpot": ("TPOT", "time per token after the first"),
    "response_gap": ("response gap", "gap between responses, of one or more tokens"),
    "e2e": ("E2E", "end to end"),
}
_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "maximum")


def render_text(report: Report) -> str:
    """Lines of at most 100 characters, without the last line's end."""
    return "\n".join(_lines(report))


def headline(report: Report) -> str:
    """What was measured, in one line."""
    cluster = report.cluster
    workers = f"{cluster['prefill_workers']} prefill + {cluster['decode_workers']} decode"
    return f"{cluster['model']} at {cluster['target']} ({workers}); {report.configuration['arrivals']}"


def milliseconds(seconds: float) -> str:
    """With three significant digits where it is short."""
    value = seconds * 1000
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _lines(report: Report) -> Iterator[str]:
    summary = report.summary
    yield headline(report)
    yield ""
    yield from _throughput(summary)
    yield ""
    yield from _latency_table(summary)
    yield ""
    if summary.stages:
        shares = ", ".join(f"{name} {stage.share:.0%}" for name, stage in summary.stages.items())
        yield f"time on the cluster   {shares}"
    share = summary.client_cpu_seconds / summary.window if summary.window else 0.0
    yield f"load generator        {summary.client_cpu_seconds:.2f} CPU seconds, {share:.0%} of one core"
    yield from (f"note: {note}" for note in report.notes)


def _throughput(summary: Summary) -> Iterator[str]:
    failed = f", {summary.failed} failed" if summary.failed else ""
    yield _row("requests", f"{summary.completed} completed{failed}", f"{summary.requests_per_second:,.2f} /s")
    yield from (_row(f"  {code}", f"{count}") for code, count in summary.errors.items())
    yield _row("output tokens", f"{summary.output_tokens:,}", f"{summary.output_tokens_per_second:,.1f} /s")
    cached = summary.cached_tokens / summary.input_tokens if summary.input_tokens else 0.0
    yield _row("prompt tokens", f"{summary.input_tokens:,}", f"{cached:.0%} from the prefix cache")
    total = summary.input_tokens + summary.output_tokens
    yield _row("all tokens", f"{total:,}", f"{summary.total_tokens_per_second:,.1f} /s")
    if summary.goodput is not None:
        goodput, limits = summary.goodput, summary.goodput.limits
        named = (("TTFT", limits.ttft), ("TPOT", limits.tpot), ("gaps", limits.gap))
        within = [f"{name} {limit:g} s" for name, limit in named if limit is not None]
        rate = f"{goodput.requests_per_second:,.2f} /s within {', '.join(within)}"
        yield _row("goodput", f"{goodput.share:.1%} of requests", rate)
    yield _row("measured", f"{summary.window:.2f} s")


def _row(name: str, value: str, rate: str = "") -> str:
    return f"{name:<20}  {value:<36}{rate}".rstrip()


def _latency_table(summary: Summary) -> Iterator[str]:
    yield f"{'milliseconds':<14}" + "".join(f"{'max' if name == 'maximum' else name:>11}" for name in _COLUMNS)
    for key, (name, _) in LATENCIES.items():
        distribution: Distribution | None = getattr(summary, key)
        cells = ["-"] * len(_COLUMNS) if distribution is None else _cells(distribution)
        yield f"{name:<14}" + "".join(f"{cell:>11}" for cell in cells)


def _cells(distribution: Distribution) -> list[str]:
    return [milliseconds(getattr(distribution, column)) for column in _COLUMNS]
