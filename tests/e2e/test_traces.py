"""One request is one trace through all processes, at a real OTLP receiver."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from kvrelay import Client
from kvrelay.errors import DeadlineExceeded
from tests.e2e.cluster import Cluster, eventually, free_port, start_cluster

GATEWAY_SPANS = {"kvrelay.generate", "kvrelay.tokenize", "kvrelay.gateway_queue"}
PREFILL_SPANS = {"kvrelay.prefill_queue", "kvrelay.prefill"}
DECODE_SPANS = {"kvrelay.transfer", "kvrelay.decode_queue", "kvrelay.decode"}
ALL_SPANS = GATEWAY_SPANS | PREFILL_SPANS | DECODE_SPANS
ARRIVAL_SECONDS = 15.0


@dataclass(frozen=True)
class Received:
    """A span, and the service and the process that sent it."""

    service: str
    instance: str
    span: Span

    @property
    def attributes(self) -> dict[str, Any]:
        return {entry.key: getattr(entry.value, str(entry.value.WhichOneof("value"))) for entry in self.span.attributes}


class Receiver:
    """A collector that keeps everything; may be stopped and started again on its port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.requests: list[bytes] = []
        self.metric_names: set[str] = set()
        self._spans: list[Received] = []
        self._lock = threading.Lock()
        self._server: grpc.Server | None = None

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(4))
        add_traces: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        add_traces(_Traces(self), self._server)
        add_metrics: Any = metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server
        add_metrics(_Metrics(self), self._server)
        assert self._server.add_insecure_port(f"127.0.0.1:{self.port}") == self.port
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(None).wait()

    def take_traces(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        with self._lock:
            self.requests.append(request.SerializeToString())
            for resource in request.resource_spans:
                names = {entry.key: entry.value.string_value for entry in resource.resource.attributes}
                for scope in resource.scope_spans:
                    sender = names["service.name"], names["service.instance.id"]
                    self._spans += [Received(*sender, span) for span in scope.spans]

    def take_metrics(self, request: metrics_service_pb2.ExportMetricsServiceRequest) -> None:
        with self._lock:
            self.requests.append(request.SerializeToString())
            for resource in request.resource_metrics:
                for scope in resource.scope_metrics:
                    self.metric_names |= {metric.name for metric in scope.metrics}

    def trace_of(self, request_id: str, names: set[str] = ALL_SPANS) -> dict[str, Received]:
        """The spans of a request's trace by name, once all of these are there."""
        deadline = time.monotonic() + ARRIVAL_SECONDS
        while not {each.span.name for each in self._trace(request_id)} >= names:
            assert time.monotonic() < deadline, [each.span.name for each in self._trace(request_id)]
            time.sleep(0.02)
        trace = self._trace(request_id)
        found = {each.span.name: each for each in trace}
        assert len(trace) == len(found), "a span came twice"
        return found

    def spans(self) -> list[Received]:
        with self._lock:
            return list(self._spans)

    def _trace(self, request_id: str) -> list[Received]:
        spans = self.spans()
        roots = [each for each in spans if each.span.name == "kvrelay.generate"]
        trace_ids = {each.span.trace_id for each in roots if each.attributes["kvrelay.request_id"] == request_id}
        return [each for each in spans if each.span.trace_id in trace_ids]


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, context: Any) -> trace_service_pb2.ExportTraceServiceResponse:
        self._receiver.take_traces(request)
        return trace_service_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, context: Any) -> metrics_service_pb2.ExportMetricsServiceResponse:
        self._receiver.take_metrics(request)
        return metrics_service_pb2.ExportMetricsServiceResponse()


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    receiver.start()
    yield receiver
    receiver.stop()


@pytest.fixture(scope="module")
def traced(receiver: Receiver, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that exports to the receiver."""
    run_dir = tmp_path_factory.mktemp("traced") / "run"
    with contextlib.ExitStack() as cleanup:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.port}")
            environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
            environment.setenv("OTEL_METRIC_EXPORT_INTERVAL", "500")
            cluster = cleanup.enter_context(start_cluster(run_dir, tiny_llama, num_blocks=1024))
        # Until the decode worker knows the prefill worker from the registry, it computes the prompts itself.
        eventually(lambda: are_paired(cluster), 10, "the workers are paired")
        yield cluster


def are_paired(cluster: Cluster) -> bool:
    with cluster.client() as client:
        client.complete("Once", max_tokens=2, ignore_eos=True)
        return any(worker.links for worker in client.status().workers)


@pytest.fixture
def client(traced: Cluster) -> Iterator[Client]:
    with traced.client() as client:
        yield client
    traced.wait_whole()


def test_a_span_names_its_process_as_the_cluster_does(client: Client, receiver: Receiver) -> None:
    trace = receiver.trace_of(client.complete("Once", max_tokens=3, ignore_eos=True).request_id)
    instances = {trace[f"kvrelay.{name}"].instance for name in ("generate", "prefill", "decode")}
    status = client.status()
    assert instances == {member.id for member in (*status.gateways, *status.workers)}


def test_one_request_is_one_trace_of_three_services(client: Client, receiver: Receiver) -> None:
    result = client.complete("Once upon a time", max_tokens=20, ignore_eos=True)
    trace = receiver.trace_of(result.request_id)
    assert trace.keys() == ALL_SPANS
    for names, service in ((GATEWAY_SPANS, "gateway"), (PREFILL_SPANS, "prefill"), (DECODE_SPANS, "decode")):
        assert {trace[name].service for name in names} == {f"kvrelay-{service}"}
    root = trace["kvrelay.generate"].span
    assert root.parent_span_id == b""
    for name in ALL_SPANS - {"kvrelay.generate"}:
        span = trace[name].span
        assert span.parent_span_id == root.span_id
        # The clocks of two processes are compared in the wall's time, which each reads for itself.
        slack = 5_000_000
        assert root.start_time_unix_nano - slack <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano + slack or name == "kvrelay.decode"


def test_the_spans_tell_what_the_answer_tells(client: Client, receiver: Receiver) -> None:
    result = client.complete(token_ids=range(5, 105), max_tokens=20, ignore_eos=True)
    trace = receiver.trace_of(result.request_id)
    root, prefill, transfer, decode = (
        trace[f"kvrelay.{name}"].attributes for name in ("generate", "prefill", "transfer", "decode")
    )
    assert root["gen_ai.request.model"] == "tiny-llama"
    assert root["gen_ai.usage.input_tokens"] == prefill["gen_ai.usage.input_tokens"] == 100
    assert root["gen_ai.usage.output_tokens"] == decode["gen_ai.usage.output_tokens"] == 20
    assert transfer["kvrelay.transfer.blocks"] == 7
    assert transfer["kvrelay.transfer.bytes"] > 0
    assert transfer["kvrelay.transport"] == "shm"
    span = trace["kvrelay.prefill"].span
    seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert seconds == pytest.approx(result.timings.prefill, abs=1e-3)


def test_a_completion_that_a_stop_string_ends_has_its_decode_span(client: Client, receiver: Receiver) -> None:
    whole = client.complete("Once upon a time", max_tokens=40, temperature=0, ignore_eos=True)
    stop = whole.text[20:24]
    result = client.complete("Once upon a time", max_tokens=40, temperature=0, ignore_eos=True, stop=stop)
    assert result.text == whole.text[: whole.text.index(stop)]
    assert receiver.trace_of(result.request_id).keys() == ALL_SPANS


def test_a_failed_request_says_so(client: Client, receiver: Receiver) -> None:
    with pytest.raises(DeadlineExceeded):
        client.complete("Once", max_tokens=8000, ignore_eos=True, timeout=0.5, request_id="too-late")
    root = receiver.trace_of("too-late", GATEWAY_SPANS)["kvrelay.generate"]
    assert root.span.status.code == root.span.status.STATUS_CODE_ERROR
    assert root.attributes["error.type"] in ("DEADLINE_EXCEEDED", "CANCELLED")


def test_the_clients_trace_is_carried_on(client: Client, receiver: Receiver) -> None:
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    result = client.complete(
        "Once", max_tokens=3, ignore_eos=True, metadata={"traceparent": f"00-{trace_id}-{parent}-01"}
    )
    trace = receiver.trace_of(result.request_id)
    assert {each.span.trace_id.hex() for each in trace.values()} == {trace_id}
    assert trace["kvrelay.generate"].span.parent_span_id.hex() == parent


@pytest.mark.parametrize("traceparent", ["garbage", f"00-{'0' * 32}-{'0' * 16}-01", f"00-{'A' * 31}-{'b' * 16}-01"])
def test_a_malformed_trace_begins_a_new_one(client: Client, receiver: Receiver, traceparent: str) -> None:
    result = client.complete("Once", max_tokens=3, ignore_eos=True, metadata={"traceparent": traceparent})
    assert receiver.trace_of(result.request_id)["kvrelay.generate"].span.parent_span_id == b""


def test_a_trace_that_the_client_does_not_sample_is_not_exported(client: Client, receiver: Receiver) -> None:
    metadata = {"traceparent": f"00-{'c' * 32}-{'d' * 16}-00"}
    client.complete("Once", max_tokens=3, ignore_eos=True, metadata=metadata)
    later = client.complete("Once", max_tokens=3, ignore_eos=True)
    receiver.trace_of(later.request_id)
    assert not [each for each in receiver.spans() if each.span.trace_id.hex() == "c" * 32]


def test_what_was_said_stays_out_of_spans_and_metrics(client: Client, receiver: Receiver) -> None:
    secret = "a-secret-that-nobody-should-read"
    result = client.complete(secret, max_tokens=60, temperature=0, ignore_eos=True, cache_salt="salt-" + secret)
    chat = client.complete(messages=[{"role": "user", "content": secret}], max_tokens=3, stop=["stop-" + secret])
    receiver.trace_of(result.request_id)
    receiver.trace_of(chat.request_id)
    expected = {"kvrelay.requests", "kvrelay.completion_tokens", "kvrelay.time_to_first_token"}
    eventually(lambda: receiver.metric_names >= expected, ARRIVAL_SECONDS, "metrics")
    words = [secret, result.text[:16], result.text[16:32]]
    for data in list(receiver.requests):
        assert not [word for word in words if word.encode() in data]


def test_requests_do_not_notice_that_the_receiver_is_down(client: Client, receiver: Receiver, traced: Cluster) -> None:
    receiver.stop()
    for _ in range(20):  # an export is given up after 10 s
        client.complete("Once", max_tokens=10, temperature=0, ignore_eos=True, timeout=5)
    receiver.start()
    result = client.complete("Once", max_tokens=3, ignore_eos=True)
    assert receiver.trace_of(result.request_id).keys() == ALL_SPANS


def test_a_cluster_ends_in_time_although_the_receiver_is_down(receiver: Receiver, traced: Cluster) -> None:
    receiver.stop()
    with traced.client() as client:
        client.complete("Once", max_tokens=3, ignore_eos=True)
    assert traced.stop() == 0, traced.logs()


REPORT = """
import json, os, sys
from kvrelay import telemetry
from opentelemetry import metrics, trace
telemetry.configure("a service", "an instance")
with telemetry.tracer().start_as_current_span("a span") as span:
    report = {"recording": span.is_recording(), "header": telemetry.traceparent(span)}
telemetry.meter().create_counter("a counter").add(1)
telemetry.shutdown()
report["exporters"] = sorted(name for name in sys.modules if name.startswith("opentelemetry.exporter"))
print(json.dumps(report))
"""


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://[::1]:1", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_without_an_endpoint_nothing_is_exported(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    output = subprocess.run([sys.executable, "-c", REPORT], check=True, capture_output=True, timeout=60).stdout
    assert json.loads(output) == {"recording": False, "header": "", "exporters": []}
