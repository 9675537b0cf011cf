"""Export of spans to an OpenTelemetry collector (OTLP over HTTP): the one module that imports OpenTelemetry.

Spans come here when they have ended, with the ids that the gateway and the workers gave them. So they are handed to the
SDK's batch processor as they are; its sampler, its resource and its exporter read the standard variables themselves. A
thread of the SDK sends them. What a collector that is away or too slow does not take is dropped, and told once.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Final

import structlog
from opentelemetry.context import Context as OtelContext
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from serve import __version__
from serve.telemetry.spans import Context, Span, Value

log = structlog.get_logger()

_KINDS: Final = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT}
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")  # the first counts
_QUEUE_LOGGER: Final = "opentelemetry.sdk._shared_internal"  # of the SDK's queue
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class OtlpExporter:
    """Where spans go, as the environment says. Raises ValueError for variables that the SDK cannot use."""

    def __init__(self) -> None:
        protocol = next((text for name in _PROTOCOLS if (text := os.environ.get(name, "").strip())), "http/protobuf")
        if protocol != "http/protobuf":
            log.warning("tracing_protocol", asked=protocol, used="http/protobuf", hint="that is port 4318, mostly")
        ours = Resource({"service.name": "pem-server", "service.version": __version__})
        self._resource = Resource.create().merge(ours).merge(OTELResourceDetector().detect())
        self._sampler = TracerProvider(resource=self._resource, shutdown_on_exit=False).sampler
        self.endpoint = next(text for name in _ENDPOINTS if (text := os.environ.get(name, "").strip()))
        self._processor: SpanProcessor = BatchSpanProcessor(_Telling(OTLPSpanExporter(), self.endpoint))
        self._scope = InstrumentationScope("pem-server", __version__)

    def samples(self, parent: Context | None, trace_id: str, name: str, attributes: Mapping[str, Value]) -> bool:
        """What OTEL_TRACES_SAMPLER decides; unless it says otherwise the caller's flag, and all that have no caller."""
        context = OtelContext()
        if parent is not None:
            context = set_span_in_context(NonRecordingSpan(_span_context(parent, is_remote=True)), context)
        result = self._sampler.should_sample(context, int(trace_id, 16), name, SpanKind.SERVER, attributes)
        return result.decision is Decision.RECORD_AND_SAMPLE

    def export(self, span: Span) -> None:
        """Into the queue of the thread that sends; the oldest leave where that is full."""
        parent = span.parent
        self._processor.on_end(
            ReadableSpan(
                span.name,
                context=_span_context(span.context),
                parent=_span_context(parent, is_remote=span.parent_is_remote) if parent is not None else None,
                resource=self._resource,
                attributes=span.attributes,
                links=[Link(_span_context(link)) for link in span.links],
                kind=_KINDS[span.kind],
                status=Status(StatusCode.ERROR if span.failed else StatusCode.UNSET),
                start_time=round(span.begun_unix * 1e9),
                end_time=round(span.ended_unix * 1e9),
                instrumentation_scope=self._scope,
            )
        )

    def close(self) -> None:
        """Send what is waiting; takes as long as OTEL_EXPORTER_OTLP_TIMEOUT says where nobody listens."""
        self._processor.shutdown()


def _span_context(context: Context, *, is_remote: bool = False) -> SpanContext:
    state = _state(context.state) if context.state else None
    flags = TraceFlags(context.flags)
    return SpanContext(int(context.trace_id, 16), int(context.span_id, 16), is_remote, flags, state)


@functools.lru_cache(maxsize=256)
def _state(text: str) -> TraceState:
    return TraceState.from_header([text])


class _Telling(SpanExporter):
    """The exporter, which says once that spans are lost and why, and once that they are taken again."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._lost = 0
        self._reasons = _Reasons()
        logging.getLogger(OTLPSpanExporter.__module__).addFilter(self._reasons)
        self._full = _FullQueue()
        logging.getLogger(_QUEUE_LOGGER).filters.insert(0, self._full)  # before the SDK's, which drops repeated lines

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """As the exporter says. Spans that found the queue full meanwhile count as lost, whatever becomes of these."""
        self._reasons.first = None
        result = self._exporter.export(spans)
        lost = self._full.take()
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


class _FullQueue(logging.Filter):
    """Keeps the SDK's line for each span that finds the queue full out of the log, and counts them."""

    _dropped = 0

    def take(self) -> int:
        """How many there were since this was asked last."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def filter(self, record: logging.LogRecord) -> bool:
        """No to those lines; what else goes wrong in the SDK is told."""
        if not record.getMessage().startswith("Queue full"):
            return True
        self._dropped += 1
        return False
