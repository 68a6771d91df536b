import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from kvrelay import telemetry
from tests.otlp import Collector
from tests.patience import SOON

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    collector.start()
    yield collector
    collector.stop()


def run(program: str, **environment: str) -> Any:
    """Runs a program in a fresh process, as a provider can be set only once in one; answers with what it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    prelude = "import json, sys, time\nfrom kvrelay import telemetry\nfrom kvrelay.telemetry import SpanName, Metric\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + program],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return json.loads(done.stdout)


ONE_REQUEST = f"""
telemetry.configure("gateway", "gateway-1")
with telemetry.tracer().start_as_current_span(
    SpanName.GENERATE, context=telemetry.context_from({{"traceparent": "{TRACEPARENT}"}})
) as span:
    parent = telemetry.traceparent(span)
    started = time.monotonic()
    telemetry.record_stage(SpanName.PREFILL, parent, started - 2.0, started - 0.5, {{"tokens": 3}})
    telemetry.record_stage(SpanName.DECODE, "", started, started)
telemetry.meter().create_counter(Metric.REQUESTS).add(2)
telemetry.shutdown()
print(json.dumps({{"parent": parent, "sdk": "opentelemetry.sdk" in sys.modules}}))
"""


def test_a_request_is_one_trace_below_the_clients_span(collector: Collector) -> None:
    printed = run(ONE_REQUEST, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint)
    [resource_spans] = collector.traces
    resource = {attribute.key: attribute.value.string_value for attribute in resource_spans.resource.attributes}
    assert (resource["service.name"], resource["service.instance.id"]) == ("gateway", "gateway-1")
    spans = {span.name: span for scope in resource_spans.scope_spans for span in scope.spans}
    assert spans.keys() == {"kvrelay.generate", "kvrelay.prefill"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}
    generate, prefill = spans["kvrelay.generate"], spans["kvrelay.prefill"]
    assert generate.parent_span_id.hex() == SPAN_ID
    assert prefill.parent_span_id == generate.span_id
    assert printed["parent"] == f"00-{TRACE_ID}-{generate.span_id.hex()}-01"
    assert prefill.end_time_unix_nano - prefill.start_time_unix_nano == pytest.approx(1.5e9, rel=1e-6)
    assert abs(prefill.end_time_unix_nano + 0.5e9 - generate.start_time_unix_nano) < 1e9, "both on the wall clock"
    [metric] = [metric for item in collector.metrics for scope in item.scope_metrics for metric in scope.metrics]
    assert (metric.name, metric.sum.data_points[0].as_int) == ("kvrelay.requests", 2)


@pytest.mark.parametrize(("kind", "num_traces", "num_metrics"), [("TRACES", 1, 0), ("METRICS", 0, 1)])
def test_traces_and_metrics_can_be_exported_apart(
    collector: Collector, kind: str, num_traces: int, num_metrics: int
) -> None:
    run(ONE_REQUEST, **{f"OTEL_EXPORTER_OTLP_{kind}_ENDPOINT": collector.endpoint})
    assert (len(collector.traces), len(collector.metrics)) == (num_traces, num_metrics)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "True"},
    ],
    ids=["unset", "empty", "disabled"],
)
def test_without_an_endpoint_nothing_is_loaded_and_the_clients_trace_is_carried_on(environment: dict[str, str]) -> None:
    printed = run(ONE_REQUEST, **environment)
    assert printed["sdk"] is False
    assert printed["parent"] == TRACEPARENT


class Unanswered:
    """A provider whose collector says nothing until the test lets it."""

    def __init__(self) -> None:
        self.asked, self.answer, self.ended = (threading.Event() for _ in range(3))
        self.keeps_the_process = False

    def shutdown(self) -> None:
        self.keeps_the_process = not threading.current_thread().daemon
        self.asked.set()
        self.answer.wait(SOON)
        self.ended.set()


def test_shutdown_does_not_wait_for_a_collector_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    providers = traces, counts = Unanswered(), Unanswered()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: traces)
    monkeypatch.setattr(metrics, "get_meter_provider", lambda: counts)
    monkeypatch.setattr(telemetry, "SHUTDOWN_SECONDS", 0.01)
    telemetry.shutdown()
    try:
        assert all(each.asked.wait(SOON) for each in providers)
        assert not any(each.ended.is_set() or each.keeps_the_process for each in providers)
    finally:
        for each in providers:
            each.answer.set()


@pytest.mark.parametrize(
    "header",
    ["", "garbage", "00-" + "0" * 32 + f"-{SPAN_ID}-01", f"00-{TRACE_ID}-{'0' * 16}-01", f"ff-{TRACE_ID}-{SPAN_ID}-01"],
)
def test_a_malformed_header_counts_as_none(header: str) -> None:
    for carrier in ({"traceparent": header}, {}):
        context = telemetry.context_from(carrier)
        assert not trace.get_current_span(context).get_span_context().is_valid


def test_nobody_traces_so_no_header_is_sent() -> None:
    assert telemetry.traceparent(trace.INVALID_SPAN) == ""


def test_durations_of_seconds_lie_in_buckets_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    monkeypatch.setattr(telemetry, "meter", lambda: MeterProvider([reader]).get_meter("test"))
    histogram = telemetry.seconds_histogram(telemetry.Metric.TIME_TO_FIRST_TOKEN)
    for seconds in (0.03, 0.3, 3.0, 30.0):
        histogram.record(seconds)
    data: Any = reader.get_metrics_data()
    [metric] = data.resource_metrics[0].scope_metrics[0].metrics
    assert (metric.name, metric.unit) == ("kvrelay.time_to_first_token", "s")
    [point] = metric.data.data_points
    assert sorted(point.bucket_counts, reverse=True)[:5] == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("names", [telemetry.SpanName, telemetry.Attribute, telemetry.Metric])
def test_names_are_unique(names: type) -> None:
    values = [value for key, value in vars(names).items() if key.isupper()]
    assert values
    assert len(values) == len(set(values))
