"""Export of spans to an OpenTelemetry collector (OTLP over HTTP): the one module that imports its SDK.

The SDK's sampler, resource and exporter read the standard variables themselves. A thread of the SDK sends the spans.
Spans that an absent or slow collector does not take are dropped, and one log line says so.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Final

import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_BSP_MAX_QUEUE_SIZE
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext

from serve import __version__

log = structlog.get_logger()

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")  # the first set counts
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_WAITING_SPANS: Final = 2048  # unless OTEL_BSP_MAX_QUEUE_SIZE says otherwise, as in the SDK


class OtlpExporter:
    """The exporter that the environment describes. Raises ValueError for variables that the SDK cannot use."""

    def __init__(self) -> None:
        protocol = next((text for name in _PROTOCOLS if (text := os.environ.get(name, "").strip())), "http/protobuf")
        if protocol != "http/protobuf":
            log.warning("tracing_protocol", asked=protocol, used="http/protobuf", hint="that is port 4318, mostly")
        self.endpoint = next(text for name in _ENDPOINTS if (text := os.environ.get(name, "").strip()))
        ours = Resource({"service.name": "pem-server", "service.version": __version__})
        self._resource = Resource.create().merge(ours).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=self._resource, shutdown_on_exit=False)
        room = int(os.environ.get(OTEL_BSP_MAX_QUEUE_SIZE) or _WAITING_SPANS)
        self._queue = _Queue(_Telling(OTLPSpanExporter(), self.endpoint, room), room)
        self._provider.add_span_processor(self._queue)
        self.tracer = self._provider.get_tracer("pem-server", __version__)
        self._scope = InstrumentationScope("pem-server", __version__)

    def export(
        self,
        name: str,
        context: SpanContext,
        begun_unix: float,
        ended_unix: float,
        attributes: Mapping[str, str | int | float],
    ) -> None:
        """Queue a span with the ids of `context`; spans from the tracer get their ids from the SDK."""
        self._queue.on_end(
            ReadableSpan(
                name,
                context=context,
                resource=self._resource,
                attributes=attributes,
                start_time=round(begun_unix * 1e9),
                end_time=round(ended_unix * 1e9),
                instrumentation_scope=self._scope,
            )
        )

    def close(self) -> None:
        """Send the waiting spans. Takes as long as OTEL_EXPORTER_OTLP_TIMEOUT if no collector listens."""
        self._provider.shutdown()


class _Queue(BatchSpanProcessor):
    """The SDK's queue, never full: a span without room is refused, and counted, before it gets there."""

    def __init__(self, exporter: _Telling, room: int) -> None:
        super().__init__(exporter, max_queue_size=room)
        self._telling = exporter

    def on_end(self, span: ReadableSpan) -> None:
        """Put a sampled span into the queue of the sending thread, if there is room."""
        if span.context is not None and span.context.trace_flags.sampled and self._telling.has_room():
            super().on_end(span)


class _Telling(SpanExporter):
    """The exporter, with one log line when spans are lost, saying why, and one when they are taken again."""

    def __init__(self, exporter: SpanExporter, endpoint: str, room: int) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._room = threading.Semaphore(room)
        self._refused = 0  # spans that found the queue full
        self._refused_told = 0
        self._lost = 0
        self._reasons = _Reasons()
        logging.getLogger(OTLPSpanExporter.__module__).addFilter(self._reasons)

    def has_room(self) -> bool:
        """Take one place in the queue, which is free again once the span has left. A span without a place is lost."""
        taken = self._room.acquire(blocking=False)
        self._refused += not taken
        return taken

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export spans and return the exporter's result. Spans refused meanwhile by a full queue count as lost, too."""
        self._room.release(len(spans))
        self._reasons.first = None
        result = self._exporter.export(spans)
        refused = self._refused
        lost, self._refused_told = refused - self._refused_told, refused
        if result is not SpanExportResult.SUCCESS:
            lost += len(spans)
        if lost:
            if not self._lost:
                log.warning(
                    "traces_lost",
                    endpoint=self._endpoint,
                    reason=self._reasons.first or "more spans came than it took: the queue is full",
                    hint="spans are dropped until the collector takes them; this is said once",
                )
            self._lost += lost
        elif self._lost:
            log.info("traces_taken_again", lost=self._lost)
            self._lost = 0
        return result

    def shutdown(self) -> None:
        """Close the connection."""
        self._exporter.shutdown()


class _Reasons(logging.Filter):
    """Keeps the exporter's messages on each attempt out of the log, and the first message for our single line."""

    first: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Refuse every record."""
        self.first = self.first or record.getMessage()
        return False
