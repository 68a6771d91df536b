"""A benchmark's report as one page that needs nothing else: no script, no other file, light and dark."""

from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

import numpy as np

from kvrelay.bench.measure import Distribution, Floats, Summary, samples
from kvrelay.bench.plots import Frame, linear_axis, log_axis, stacked_bar
from kvrelay.bench.report import Report
from kvrelay.bench.report_text import LATENCIES, headline, milliseconds
from kvrelay.bench.timeline import Timeline, timeline

__all__ = ["render_html"]

NUM_BINS = 48
NUM_CURVE_POINTS = 300
# Gaps of 0 have no place on a logarithmic axis; this is well below what a network can do.
LEAST_MILLISECONDS = 0.01


def render_html(report: Report) -> str:
    """The page."""
    parts = [
        f"<h1>kvrelay bench</h1><p class='lead'>{escape(headline(report))}<br>{escape(_when_and_where(report))}</p>",
        _cards(report.summary),
        "".join(f"<p class='note'>{escape(note)}</p>" for note in report.notes),
        _section("Latency", _latency_table(report.summary)),
        _section("Distributions", _grid(_distributions(report))),
        _section("Over time", _grid(_over_time(timeline(report.run), report.summary.window))),
        _section("Where the time goes on the cluster", _stages(report.summary)),
        _section("Configuration", _configuration(report)),
    ]
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>kvrelay bench</title>"
    body = "\n".join(part for part in parts if part)
    return (
        f"<!doctype html>\n<html lang='en'>\n<head>{head}<style>{_STYLE}</style></head>\n<body>{body}</body>\n</html>\n"
    )


def _when_and_where(report: Report) -> str:
    return f"{report.date}, {report.machine['cpu']}, {report.machine['cores']} cores"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _grid(figures: Iterable[str]) -> str:
    content = "".join(figures)
    return f"<div class='grid'>{content}</div>" if content else ""


def _figure(caption: str, drawing: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"


def _cards(summary: Summary) -> str:
    cards = [
        (f"{summary.output_tokens_per_second:,.1f}", "output tokens/s", f"{summary.output_tokens:,} tokens"),
        (f"{summary.total_tokens_per_second:,.1f}", "tokens/s in all", f"{summary.input_tokens:,} prompt tokens"),
        (f"{summary.requests_per_second:,.2f}", "requests/s", _outcomes(summary)),
    ]
    if summary.goodput is not None:
        goodput = summary.goodput
        cards.append(
            (f"{goodput.requests_per_second:,.2f}", "goodput, requests/s", f"{goodput.share:.1%} within limits")
        )
    for key in ("ttft", "itl"):
        distribution: Distribution | None = getattr(summary, key)
        if distribution is not None:
            median, tail = milliseconds(distribution.p50), milliseconds(distribution.p99)
            cards.append((median, f"{LATENCIES[key][0]} p50, ms", f"p99 {tail} ms"))
    return "<div class='cards'>" + "".join(_card(*card) for card in cards) + "</div>"


def _card(value: str, name: str, remark: str) -> str:
    return f"<div class='card'><b>{value}</b><span>{escape(name)}</span><small>{escape(remark)}</small></div>"


def _outcomes(summary: Summary) -> str:
    counts = {"completed": summary.completed, "failed": summary.failed, "interrupted": summary.interrupted}
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


def _latency_table(summary: Summary) -> str:
    rows = []
    for key, (name, meaning) in LATENCIES.items():
        found: Distribution | None = getattr(summary, key)
        if found is not None:
            values = (found.mean, found.p50, found.p90, found.p95, found.p99, found.maximum)
            rows.append([f"<b>{name}</b> {meaning}", *map(milliseconds, values), f"{found.count:,}"])
    return _table(["milliseconds", "mean", "p50", "p90", "p95", "p99", "max", "count"], rows) if rows else ""


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _distributions(report: Report) -> Iterator[str]:
    values = samples(report.run)
    for key in ("ttft", "itl"):
        name, meaning = LATENCIES[key]
        found: Floats = getattr(values, key) * 1000
        if len(found):
            yield _figure(f"{name}, {meaning}: how often", _histogram(name, found))
            yield _figure(
                f"{name}: share of {'requests' if key == 'ttft' else 'tokens'} within", _cumulative(name, found)
            )


def _percentiles(values: Floats) -> list[tuple[str, float]]:
    return [(f"p{percent}", float(np.percentile(values, percent))) for percent in (50, 90, 99)]


def _span(values: Floats) -> tuple[float, float]:
    return max(float(values.min()), LEAST_MILLISECONDS), max(float(values.max()), LEAST_MILLISECONDS)


def _histogram(name: str, values: Floats) -> str:
    x = log_axis("milliseconds", *_span(values))
    edges = np.geomspace(x.low, x.high, NUM_BINS + 1)
    edges[-1] = x.high
    counts, _ = np.histogram(np.clip(values, x.low, x.high), edges)
    shares = (counts / len(values) * 100).tolist()
    frame = Frame(f"histogram of {name}", x, linear_axis("% of all", max(shares)))
    bounds = edges.tolist()
    texts = [
        f"{low:.3g} to {high:.3g} ms: {count:,}" for low, high, count in zip(bounds, bounds[1:], counts, strict=False)
    ]
    frame.bars(bounds, shares, texts)
    frame.verticals(_percentiles(values))
    return frame.svg()


def _cumulative(name: str, values: Floats) -> str:
    percents = np.linspace(0.0, 100.0, NUM_CURVE_POINTS)
    frame = Frame(
        f"cumulative distribution of {name}",
        log_axis("milliseconds", *_span(values)),
        linear_axis("% of all", 100.0),
    )
    frame.curve(np.percentile(values, percents).tolist(), percents.tolist())
    frame.verticals(_percentiles(values))
    return frame.svg()


def _over_time(found: Timeline, window: float) -> Iterator[str]:
    end = float(found.edges[-1])
    seconds = linear_axis("seconds", end, exact=True)
    middles = (found.edges[:-1] + found.edges[1:]) / 2
    limits = [("end of window", window)] if window < 0.98 * end else []
    for caption, label, xs, ys in (
        ("Output tokens per second", "tokens/s", middles, found.tokens_per_second),
        ("Running requests", "requests", found.moments, found.running),
    ):
        frame = Frame(caption, seconds, linear_axis(label, max(float(ys.max()), 1.0)))
        frame.area(xs.tolist(), ys.tolist())
        frame.verticals(limits)
        yield _figure(caption, frame.svg())


def _stages(summary: Summary) -> str:
    if not summary.stages:
        return ""
    bar = stacked_bar("stages", [(name, stage.share) for name, stage in summary.stages.items()])
    rows = [
        [f"<i class='part-{index}'></i>{name}", f"{milliseconds(stage.mean)} ms", f"{stage.share:.1%}"]
        for index, (name, stage) in enumerate(summary.stages.items())
    ]
    return bar + _table(["stage", "mean per request", "share"], rows)


def _configuration(report: Report) -> str:
    summary = report.summary
    groups: dict[str, dict[str, Any]] = {
        "load": dict(report.configuration),
        "cluster": dict(report.cluster),
        "machine": dict(report.machine),
        "measured": {
            "window, seconds": f"{summary.window:.2f}",
            "load generator, CPU seconds": f"{summary.client_cpu_seconds:.2f}",
            "requests sent late, p99": f"{milliseconds(summary.send_delay.p99)} ms" if summary.send_delay else None,
            **{f"failed: {code}": count for code, count in summary.errors.items()},
        },
    }
    rows = [
        [escape(group), escape(name.replace("_", " ")), escape(str(value))]
        for group, entries in groups.items()
        for name, value in entries.items()
        if value is not None
    ]
    return _table(["", "setting", "value"], rows)


_STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --ink: #1d1d1b; --soft: #66655f; --line: #e2e1dc; --card: #f3f2ee;
  --mark: #2a6fbb; --limit: #b4531a; --p0: #8a8a84; --p1: #2a6fbb; --p2: #b4531a; --p3: #2f8f6b; --p4: #c9c7bf; }
@media (prefers-color-scheme: dark) { :root { --page: #191918; --ink: #ecebe6; --soft: #a3a29a; --line: #383834;
  --card: #232321; --mark: #6aa9ea; --limit: #e8945a; --p0: #85857e; --p1: #6aa9ea; --p2: #e8945a; --p3: #5dbf97;
  --p4: #4b4a46; } }
body { margin: 0 auto; padding: 32px 24px 64px; max-width: 1160px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 17px; margin: 36px 0 12px; }
.lead { color: var(--soft); margin: 4px 0 24px; }
.note { border-left: 3px solid var(--limit); padding: 2px 0 2px 12px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.card { background: var(--card); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 24px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card span, .card small { display: block; } .card small { color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 20px 24px; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; } svg.stack { height: 22px; margin-bottom: 14px; }
.bar, .area { fill: var(--mark); } .area { opacity: .18; }
.curve { fill: none; stroke: var(--mark); stroke-width: 2; stroke-linejoin: round; }
.grid path.grid, svg .grid { fill: none; stroke: var(--line); }
.limit { stroke: var(--limit); stroke-dasharray: 4 3; fill: none; }
.name { fill: var(--limit); font-size: 12px; } .tick, .axis { fill: var(--soft); font-size: 12px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
section:last-of-type td, section:last-of-type th { text-align: left; white-space: normal; }
i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 8px; }
.part-0 { fill: var(--p0); background: var(--p0); } .part-1 { fill: var(--p1); background: var(--p1); }
.part-2 { fill: var(--p2); background: var(--p2); } .part-3 { fill: var(--p3); background: var(--p3); }
.part-4 { fill: var(--p4); background: var(--p4); }
"""
