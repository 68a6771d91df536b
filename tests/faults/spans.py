"""A collector that counts how often each request's span has ended."""

from collections import Counter
from typing import Any

from grpc import aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from kvrelay.telemetry import Attribute

__all__ = ["SpanCollector"]

SPAN = "kvrelay.generate"


class SpanCollector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP receiver on a port of its own. Belongs to one event loop.

    Attributes:
        num_ended: request id -> spans that came; they come when they have ended.
    """

    def __init__(self) -> None:
        self.port = 0
        self.num_ended: Counter[str] = Counter()
        self._server: aio.Server | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process send its spans here, soon after they have ended."""
        return {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }

    async def start(self) -> None:
        self._server = aio.server()
        add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        add(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)

    async def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        spans = [span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans]
        for span in spans:
            if span.name == SPAN:
                names = {entry.key: entry.value.string_value for entry in span.attributes}
                self.num_ended[names[Attribute.REQUEST_ID]] += 1
        return trace_service_pb2.ExportTraceServiceResponse()
