"""Traces and metrics: the only file that names a span, an attribute or a metric.

Off unless the standard variables (`OTEL_EXPORTER_OTLP_ENDPOINT`, or the one for traces or metrics) name an endpoint,
empty being none; then every request is one trace through gateway, prefill, transfer and decode. Prompts and texts never
enter a span.
"""

import os
import threading
import time
from collections.abc import Mapping

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

__all__ = [
    "Attribute",
    "EventName",
    "Metric",
    "SpanName",
    "configure",
    "context_from",
    "meter",
    "record_stage",
    "seconds_histogram",
    "shutdown",
    "traceparent",
    "tracer",
]


class SpanName:
    """One request is GENERATE and what lies below it."""

    GENERATE = "kvrelay.generate"
    TOKENIZE = "kvrelay.tokenize"
    GATEWAY_QUEUE = "kvrelay.gateway_queue"
    PREFILL_QUEUE = "kvrelay.prefill_queue"
    PREFILL = "kvrelay.prefill"
    TRANSFER = "kvrelay.transfer"
    DECODE_QUEUE = "kvrelay.decode_queue"
    DECODE = "kvrelay.decode"


class EventName:
    """What may happen to a request on its way, as events of its span."""

    RECOVERED = "kvrelay.recovered"  # a worker failed it, and it goes on elsewhere
    MOVED = "kvrelay.moved"  # a decode worker drained, and handed it over


class Attribute:
    """Span attributes; those of OpenTelemetry's generative-AI conventions where they exist."""

    REQUEST_ID = "kvrelay.request_id"
    WORKER_ID = "kvrelay.worker_id"
    MODEL = "gen_ai.request.model"
    PROMPT_TOKENS = "gen_ai.usage.input_tokens"
    COMPLETION_TOKENS = "gen_ai.usage.output_tokens"
    CACHED_TOKENS = "kvrelay.cached_tokens"
    FINISH_REASON = "gen_ai.response.finish_reasons"
    TRANSPORT = "kvrelay.transport"
    TRANSFER_BLOCKS = "kvrelay.transfer.blocks"
    TRANSFER_BYTES = "kvrelay.transfer.bytes"
    ERROR_REASON = "error.type"


class Metric:
    """Metric names, with their units."""

    REQUESTS = "kvrelay.requests"  # by outcome
    COMPLETION_TOKENS = "kvrelay.completion_tokens"
    TIME_TO_FIRST_TOKEN = "kvrelay.time_to_first_token"  # s
    TRANSFER_BYTES = "kvrelay.transfer.bytes"  # By
    CHECKSUM_MISMATCHES = "kvrelay.transfer.checksum_mismatches"
    RECOMPUTED = "kvrelay.recomputed_sequences"
    RECOVERIES = "kvrelay.recoveries"  # by reason
    EXPIRED_LEASES = "kvrelay.expired_leases"


SHUTDOWN_SECONDS = 2.0
# Those of OpenTelemetry's generative-AI conventions, and longer ones, because a prompt may queue. OpenTelemetry's own
# are for milliseconds.
BUCKET_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 25, 50)
_PROPAGATOR = TraceContextTextMapPropagator()


def configure(service: str, instance: str) -> None:
    """Starts exporting if an endpoint is set, else leaves OpenTelemetry's no-op implementation in place."""
    everything = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    export_traces = everything or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    export_metrics = everything or os.environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if disabled or not (export_traces or export_metrics):
        return
    # Imported here because a process that does not export should not pay for loading the exporters.
    from opentelemetry.sdk.resources import Resource

    resource = Resource.create({"service.name": service, "service.instance.id": instance})
    if export_traces:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        traces = TracerProvider(resource=resource, shutdown_on_exit=False)
        traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(traces)
    if export_metrics:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        reader = PeriodicExportingMetricReader(OTLPMetricExporter())
        metrics.set_meter_provider(MeterProvider([reader], resource, shutdown_on_exit=False))


def shutdown() -> None:
    """Sends what is left; a collector that does not answer is waited for `SHUTDOWN_SECONDS` at most."""
    stops = [getattr(each, "shutdown", None) for each in (trace.get_tracer_provider(), metrics.get_meter_provider())]
    threads = [threading.Thread(target=stop, daemon=True) for stop in stops if stop is not None]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + SHUTDOWN_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def tracer() -> trace.Tracer:
    return trace.get_tracer("kvrelay")


def meter() -> metrics.Meter:
    return metrics.get_meter("kvrelay")


def seconds_histogram(name: str) -> metrics.Histogram:
    """For durations, whatever process records them: with buckets that tell them apart."""
    return meter().create_histogram(name, unit="s", explicit_bucket_boundaries_advisory=BUCKET_SECONDS)


def context_from(carrier: Mapping[str, str]) -> Context:
    """The caller's trace from W3C headers; a malformed header counts as none."""
    return _PROPAGATOR.extract(carrier)


def record_stage(
    name: str, parent: str, started: float, ended: float, attributes: Mapping[str, str | int] | None = None
) -> None:
    """Records a span of another process's trace after it has ended.

    Args:
        parent: the W3C traceparent; empty records nothing.
        started, ended: on the clock of `time.monotonic`.
    """
    if parent:
        offset = time.time_ns() - time.monotonic_ns()
        begin, end = (int(moment * 1e9) + offset for moment in (started, ended))
        context = context_from({"traceparent": parent})
        tracer().start_span(name, context=context, start_time=begin, attributes=attributes).end(end)


def traceparent(span: Span) -> str:
    """The W3C header that makes another process's spans children of this one; empty when nobody traces."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")
