"""One request is one trace through all processes, at a real OTLP receiver."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvrelay import Client
from kvrelay.errors import DeadlineExceeded
from tests.e2e.cluster import Cluster, start_cluster
from tests.e2e.receiver import ALL_SPANS, ARRIVAL_SECONDS, DECODE_SPANS, GATEWAY_SPANS, PREFILL_SPANS, Receiver
from tests.patience import eventually

pytest_plugins = ["tests.e2e.receiver"]


@pytest.fixture(scope="module")
def traced(receiver: Receiver, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that exports to the receiver."""
    run_dir = tmp_path_factory.mktemp("traced") / "run"
    with contextlib.ExitStack() as cleanup:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in receiver.environment.items():
                environment.setenv(name, value)
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
    assert instances == {gateway.id for gateway in status.gateways} | {worker.id for worker in status.workers}


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
    for sent in (*receiver.traces, *receiver.metrics):
        data = sent.SerializeToString()
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
