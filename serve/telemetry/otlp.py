"""Export of spans to an OpenTelemetry collector (OTLP over HTTP): the one module that imports its SDK.

Its sampler, resource and exporter read the standard variables themselves. A thread of the SDK sends the spans. What a
collector that is away or too slow does not take is dropped, and told once.
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

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")  # the first counts
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_WAITING_SPANS: Final = 2048  # unless OTEL_BSP_MAX_QUEUE_SIZE says otherwise, as in the SDK


class OtlpExporter:
    """Where spans go, as the environment says. Raises ValueError for variables that the SDK cannot use."""

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
        """Queue a span that has the ids it is given; the tracer's spans get theirs from the SDK."""
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
        """Send what is waiting; takes as long as OTEL_EXPORTER_OTLP_TIMEOUT says where nobody listens."""
        self._provider.shutdown()


class _Queue(BatchSpanProcessor):
    """The SDK's queue, which drops and counts nothing by itself: a span that finds no room does not get there."""

    def __init__(self, exporter: _Telling, room: int) -> None:
        super().__init__(exporter, max_queue_size=room)
        self._telling = exporter

    def on_end(self, span: ReadableSpan) -> None:
        """Into the queue of the thread that sends, where there is room."""
        if span.context is not None and span.context.trace_flags.sampled and self._telling.has_room():
            super().on_end(span)


class _Telling(SpanExporter):
    """The exporter, which says once that spans are lost and why, and once that they are taken again."""

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
        """Take one span's room in the queue; it is given back when the span leaves. A span without room is lost."""
        taken = self._room.acquire(blocking=False)
        self._refused += not taken
        return taken

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """As the exporter says. Spans that found the queue full meanwhile count as lost, whatever becomes of these."""
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
        """Let go of the connection."""
        self._exporter.shutdown()


class _Reasons(logging.Filter):
    """Keeps what the exporter says of each attempt out of the log, and its first words for the one line of ours."""

    first: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """No to everything."""
        self.first = self.first or record.getMessage()
        return False
