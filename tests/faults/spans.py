"""How often each request's span has ended."""

from collections import Counter
from collections.abc import Iterable

from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans

from kvrelay.telemetry import Attribute, SpanName
from tests.otlp import Collector, spans_of

__all__ = ["SpanCollector"]


class SpanCollector(Collector):
    """Counts and keeps nothing, however long it runs.

    Attributes:
        num_ended: request id -> spans that came; they come when they have ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_ended: Counter[str] = Counter()

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process send its spans here, soon after they have ended."""
        return {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": self.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    def take_traces(self, traces: Iterable[ResourceSpans]) -> None:
        for each in spans_of(traces):
            if each.span.name == SpanName.GENERATE:
                self.num_ended[each.attributes[Attribute.REQUEST_ID]] += 1
