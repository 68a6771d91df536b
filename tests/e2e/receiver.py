"""A collector to which a cluster sends its traces and metrics; a plugin, for its fixture."""

from collections.abc import Iterator

import pytest

from tests.otlp import Collector, Received, spans_of
from tests.patience import eventually

__all__ = [
    "ALL_SPANS",
    "ARRIVAL_SECONDS",
    "DECODE_SPANS",
    "GATEWAY_SPANS",
    "PREFILL_SPANS",
    "Receiver",
]

GATEWAY_SPANS = {"kvrelay.generate", "kvrelay.tokenize", "kvrelay.gateway_queue"}
PREFILL_SPANS = {"kvrelay.prefill_queue", "kvrelay.prefill"}
DECODE_SPANS = {"kvrelay.transfer", "kvrelay.decode_queue", "kvrelay.decode"}
ALL_SPANS = GATEWAY_SPANS | PREFILL_SPANS | DECODE_SPANS
ARRIVAL_SECONDS = 15.0


class Receiver(Collector):
    @property
    def environment(self) -> dict[str, str]:
        """What makes a process send here soon."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_METRIC_EXPORT_INTERVAL": "500",
        }

    @property
    def metric_names(self) -> set[str]:
        scopes = [scope for resource in list(self.metrics) for scope in resource.scope_metrics]
        return {metric.name for scope in scopes for metric in scope.metrics}

    def spans(self) -> list[Received]:
        return list(spans_of(list(self.traces)))

    def trace_of(self, request_id: str, names: set[str] = ALL_SPANS) -> dict[str, Received]:
        """The spans of a request's trace by name, once all of these are there."""

        def found() -> list[str]:
            return [each.span.name for each in self._trace(request_id)]

        eventually(lambda: set(found()) >= names, ARRIVAL_SECONDS, lambda: f"all spans, not only {found()}")
        trace = self._trace(request_id)
        by_name = {each.span.name: each for each in trace}
        assert len(trace) == len(by_name), "a span came twice"
        return by_name

    def _trace(self, request_id: str) -> list[Received]:
        spans = self.spans()
        roots = [each for each in spans if each.span.name == "kvrelay.generate"]
        trace_ids = {each.span.trace_id for each in roots if each.attributes["kvrelay.request_id"] == request_id}
        return [each for each in spans if each.span.trace_id in trace_ids]


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    receiver.start()
    yield receiver
    receiver.stop()
