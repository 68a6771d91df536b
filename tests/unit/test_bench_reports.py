"""A benchmark's reports: that each says what was measured, and that the page needs nothing else."""

import json
import re
from html.parser import HTMLParser

import pytest

from kvrelay.bench.load import Outcome, Record
from kvrelay.bench.measure import GoodputLimits
from kvrelay.bench.plots import Axis, linear_axis, log_axis
from kvrelay.bench.report import Report, to_json
from kvrelay.bench.report_html import render_html
from kvrelay.bench.report_text import render_text
from kvrelay.request import Timings
from tests.unit.bench_records import record, report

TIMINGS = Timings(gateway_queue=0.5, prefill=0.25, transfer=0.125, time_to_first_token=0.75, total=2.0)
VOID_ELEMENTS = {"meta", "br"}


def full_report() -> Report:
    done = [
        record([(0.1 * n + 0.123, 1), (0.1 * n + 1, 4)], index=n, due=0.1 * n, timings=TIMINGS, input_tokens=1000)
        for n in range(20)
    ]
    failed = record([], index=20, outcome=Outcome.FAILED, error="UNAVAILABLE", ended=1.0)
    cut = record([(1.0, 1)], index=21, outcome=Outcome.INTERRUPTED, was_cut=True)
    return report([*done, failed, cut], limits=GoodputLimits(ttft=0.2))


class Page(HTMLParser):
    """What the tests want to know of a page. Raises if an element is closed that is not the last one opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# the page


def test_the_page_is_well_formed() -> None:
    text = render_html(full_report())
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert page.open == []
    assert page.seen.count("svg") == 7
    assert "tiny <model>" in "".join(page.texts)


def test_the_page_needs_nothing_else() -> None:
    text = render_html(full_report())
    page = Page(text)
    assert {"script", "link", "img", "iframe", "object", "use"}.isdisjoint(page.seen)
    assert {"href", "src", "srcset", "xlink:href", "style"}.isdisjoint(name for name, _ in page.attributes)
    assert not re.search(r"https?:|url\(|@import|//", text)
    assert "prefers-color-scheme: dark" in text


def test_the_page_has_the_numbers() -> None:
    texts = Page(render_html(full_report())).texts
    for expected in ("10.1", "2,011.1", "2.00", "20 completed, 1 failed, 1 interrupted", "95.2% within limits", "123"):
        assert expected in texts
    for name in ("failed: UNAVAILABLE", "2026-11-23T12:00:00+00:00", "context length", "4096", "0.50"):
        assert name in "".join(texts)


def test_every_number_in_a_plot_is_finite() -> None:
    values = [value or "" for name, value in Page(render_html(full_report())).attributes if name in ("d", "x", "y")]
    assert values
    assert not any(re.search(r"nan|inf", value) for value in values)


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record([], outcome=Outcome.FAILED, error="UNAVAILABLE", ended=0.5)],
        [record([(1.0, 1)])],
        [record([(1.0, 5)])],  # gaps of nothing
        [record([(1.0, 1), (2.0, 1)])] * 3,  # no spread
        [record([(0.5, 1)], outcome=Outcome.INTERRUPTED)],
    ],
    ids=["nothing", "only errors", "one token", "one response", "all alike", "interrupted"],
)
def test_reports_of_little(records: list[Record]) -> None:
    little = report(records, window=0.0 if not records else 3.0)
    assert Page(render_html(little)).open == []
    assert "output tokens" in render_text(little)
    json.loads(to_json(little, with_records=True))


# text


def test_the_text_has_the_numbers() -> None:
    lines = render_text(full_report()).splitlines()
    assert lines[0] == "tiny <model> at localhost:50051 (1 prefill + 2 decode); closed loop, 2 concurrent"
    rows = {re.split(r"  +", line.strip())[0]: re.split(r"  +", line.strip())[1:] for line in lines if line}
    assert rows["requests"] == ["20 completed, 1 failed", "2.00 /s"]
    assert rows["UNAVAILABLE"] == ["1"]
    assert rows["output tokens"] == ["101", "10.1 /s"]
    assert rows["goodput"] == ["95.2% of requests", "2.00 /s within TTFT 0.2 s"]
    assert rows["TTFT"] == ["123"] * 6
    assert rows["ITL"] == ["219"] * 6
    assert rows["E2E"] == ["1,000"] * 6
    assert rows["time on the cluster"] == ["queue 25%, prefill 12%, transfer 6%, decode 56%, other 0%"]
    assert rows["load generator"] == ["0.50 CPU seconds, 5% of one core"]
    assert max(map(len, lines)) <= 120


def test_notes() -> None:
    notes = "\n".join(line for line in render_text(full_report()).splitlines() if line.startswith("note: "))
    assert "1 requests were still running when the benchmark was interrupted" in notes
    assert "1 of 22 requests were longer than the model's context of 4,096 tokens" in notes
    late = report([record([(2.0, 1)], sent=1.0), record([(2.0, 3)], asked=5)])
    assert any("The load generator was late" in note for note in late.notes)
    assert any(note.startswith("1 completed requests brought another number of tokens") for note in late.notes)
    assert report([record([(1.0, 1)])]).notes == []


# JSON


def test_the_json_has_everything() -> None:
    found = json.loads(to_json(full_report(), with_records=True))
    assert (found["format"], found["format_version"], found["date"]) == (
        "kvrelay-bench",
        1,
        "2026-11-23T12:00:00+00:00",
    )
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["cpu"]
    assert found["cluster"]["decode_workers"] == 2
    assert found["configuration"]["seed"] == 0
    summary = found["summary"]
    assert (summary["completed"], summary["errors"]) == (20, {"UNAVAILABLE": 1})
    assert summary["client_cpu_seconds"] == 0.5
    assert summary["ttft"]["p99"] == pytest.approx(0.123)
    assert summary["goodput"]["limits"] == {"ttft": 0.2, "tpot": None, "gap": None}
    assert len(found["requests"]) == 22
    request = found["requests"][0]
    assert (request["outcome"], request["input_tokens"], request["output_tokens"]) == ("completed", 1000, 5)
    assert request["first_token"] == pytest.approx(0.123)
    assert request["timings"]["prefill"] == 0.25
    assert found["requests"][20]["error"] == "UNAVAILABLE"
    assert found["requests"][21]["ended"] is None


def test_the_summary_alone() -> None:
    text = to_json(full_report(), with_records=False)
    assert "\n" not in text
    assert "requests" not in json.loads(text)


# axes


def test_linear_axes() -> None:
    assert linear_axis("", 87.0) == Axis("", 0.0, 100.0, [0, 20, 40, 60, 80, 100])
    assert linear_axis("", 0.3).high == pytest.approx(0.3)
    exact = linear_axis("", 10.05, exact=True)
    assert (exact.high, list(exact.ticks)) == (10.05, [0, 5, 10])
    assert [exact.share(value) for value in (0, 10.05, 99)] == [0, 1, 1]


def test_log_axes() -> None:
    axis = log_axis("", 22.0, 1700.0)
    assert list(axis.ticks) == pytest.approx([20, 50, 100, 200, 500, 1000, 2000])
    assert axis.share(200) == pytest.approx(0.5)
    assert axis.share(1) == 0
    wide = log_axis("", 0.01, 90_000.0)
    assert list(wide.ticks) == pytest.approx([10.0**power for power in range(-2, 6)])
    alike = log_axis("", 5.0, 5.0)
    assert alike.low <= 5 < alike.high
