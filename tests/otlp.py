"""What Jaeger is to kvrelay, as far as the wire goes."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.metrics.v1.metrics_pb2 import ResourceMetrics
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span

from tests.ports import free_port

__all__ = ["Collector", "Received", "spans_of"]


@dataclass(frozen=True)
class Received:
    """A span, and the service and the process that sent it."""

    service: str
    instance: str
    span: Span

    @property
    def attributes(self) -> dict[str, Any]:
        return {entry.key: getattr(entry.value, str(entry.value.WhichOneof("value"))) for entry in self.span.attributes}


def spans_of(traces: Iterable[ResourceSpans]) -> Iterator[Received]:
    for resource in traces:
        names = {entry.key: entry.value.string_value for entry in resource.resource.attributes}
        for scope in resource.scope_spans:
            sender = names["service.name"], names["service.instance.id"]
            yield from (Received(*sender, span) for span in scope.spans)


class Collector(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps what it is sent; may be stopped and started again on its port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.traces: list[ResourceSpans] = []
        self.metrics: list[ResourceMetrics] = []
        self._server: grpc.Server | None = None

    def start(self) -> None:
        # With one thread, what is sent comes one after the other.
        self._server = grpc.server(ThreadPoolExecutor(1))
        add_traces: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        add_traces(self, self._server)
        add_metrics: Any = metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server
        add_metrics(self, self._server)
        assert self._server.add_insecure_port(f"127.0.0.1:{self.port}") == self.port
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(None).wait()

    def take_traces(self, traces: Iterable[ResourceSpans]) -> None:
        self.traces += traces

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Of both services."""
        if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
            self.take_traces(request.resource_spans)
            return trace_service_pb2.ExportTraceServiceResponse()
        self.metrics += request.resource_metrics
        return metrics_service_pb2.ExportMetricsServiceResponse()
