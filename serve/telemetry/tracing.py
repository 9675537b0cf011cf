"""Traces: who called whom, and where a request's time went, in the headers and terms of W3C Trace Context.

Every request is a span of a trace: the caller's if the header `traceparent` names one, else a new one. Its ids go into
the log, the answer and the requests to other servers; that costs some microseconds. The spans inside a request are
recorded only if they are exported (otlp.py): the standard variables of OpenTelemetry switch the export on. Without them
OpenTelemetry's SDK is not imported. Spans and contexts are those of OpenTelemetry's API.

A request's span has one child per stage, for each of its parts. Requests share passes, so that a pass cannot be a child
of one of them: each pass is a separate trace, and the `pose` spans of its requests link to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, Self

import structlog
from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN_CONTEXT,
    Link,
    NonRecordingSpan,
    NoOpTracer,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
    format_trace_id,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serve.errors import ApiError
from workers.messages import PartAnswer, PassRecord

log = structlog.get_logger()

_DEFINED_FLAGS: Final = TraceFlags.SAMPLED | TraceFlags.RANDOM_TRACE_ID
_LONGEST_STATE: Final = 512  # characters that W3C asks everybody to pass on; a longer state is dropped whole
_PACKAGES: Final = "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
_REMEMBERED_PASSES: Final = 1024
_LONGEST_FLUSH_S: Final = 3.0
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})

_W3C: Final = TraceContextTextMapPropagator()
_NO_TRACER: Final = NoOpTracer()
logging.getLogger(TraceState.__module__).setLevel(logging.ERROR)  # else it warns of every malformed `tracestate`

Value = str | int | float


# -------------------------------------------------------------------------------------------------------- the headers


def _caller(headers: Sequence[tuple[bytes, bytes]]) -> SpanContext:
    """Read the caller's span; an invalid one if the headers name none or are malformed, which fails no request."""
    parents = [value.decode("latin-1") for name, value in headers if name == b"traceparent"]
    if len(parents) != 1 or parents[0] != parents[0].strip():  # the propagator would take the first, and ignore blanks
        return INVALID_SPAN_CONTEXT
    state = b",".join(value for name, value in headers if name == b"tracestate").decode("latin-1")
    carrier = {"traceparent": parents[0], "tracestate": state if len(state) <= _LONGEST_STATE else ""}
    found = get_current_span(_W3C.extract(carrier, Context())).get_span_context()
    flags = TraceFlags(found.trace_flags & _DEFINED_FLAGS)
    return SpanContext(found.trace_id, found.span_id, found.is_remote, flags, found.trace_state)


def headers_of(context: SpanContext) -> dict[str, str]:
    """Return the headers of a request or an answer that belongs to this span."""
    headers: dict[str, str] = {}
    _W3C.inject(headers, _inside(context))
    return headers


def _inside(context: SpanContext) -> Context:
    return set_span_in_context(NonRecordingSpan(context), Context())


# ----------------------------------------------------------------------------------------------------------- requests


@dataclass(slots=True)
class Trace:
    """One request's span and, if it is recorded, the spans inside it."""

    own: SpanContext
    parent: SpanContext  # the caller's span; invalid where there is none
    begun_unix: float
    begun: float  # the same moment, monotonic
    onward: SpanContext  # what other servers are told: our span; without export the caller's, if there is one
    tracer: Tracer = _NO_TRACER
    span: Span | None = None  # None: not recorded

    @classmethod
    def of(cls, headers: Sequence[tuple[bytes, bytes]]) -> Self:
        """Return the trace of a request with these headers (names in lower case). Not recorded before `begin`."""
        parent = _caller(headers)
        trace_id = parent.trace_id or secrets.randbits(128)
        own = SpanContext(trace_id, secrets.randbits(64), False, parent.trace_flags, parent.trace_state)
        return cls(own, parent, time.time(), time.monotonic(), onward=parent if parent.is_valid else own)

    @property
    def trace_id(self) -> str:
        """Return the trace's id: 32 hexadecimal digits."""
        return format_trace_id(self.own.trace_id)

    @property
    def traceparent(self) -> str:
        """Return the answer's header `traceparent`."""
        return headers_of(self.own)["traceparent"]

    def unix(self, moment: float) -> float:
        """Return a monotonic moment of this request as Unix time."""
        return self.begun_unix + moment - self.begun

    def now_unix(self) -> float:
        """Return the Unix time. It never goes back within this request, even if the system's clock is set."""
        return self.unix(time.monotonic())

    def add(
        self,
        name: str,
        begun_unix: float,
        ended_unix: float,
        attributes: Mapping[str, Value] | None = None,
        links: Sequence[Link] = (),
    ) -> None:
        """Record a finished stage, its times clipped to the request's: the processes' clocks may disagree."""
        if self.span is None:
            return
        now = self.now_unix()
        begun = min(max(begun_unix, self.begun_unix), now)
        with _harmless():
            span = self.tracer.start_span(
                name, _inside(self.own), attributes=attributes, links=links, start_time=_ns(begun)
            )
            span.end(_ns(min(max(ended_unix, begun), now)))

    @contextlib.contextmanager
    def asking(self, name: str) -> Iterator[dict[str, str]]:
        """Record a request to another server; yield the headers to send with it."""
        span: Span = NonRecordingSpan(self.onward)
        with _harmless():
            span = self.tracer.start_span(name, _inside(self.onward), SpanKind.CLIENT, start_time=_ns(self.now_unix()))
        try:
            yield headers_of(span.get_span_context())
        except BaseException as exception:  # including a cancellation
            code = exception.code if isinstance(exception, ApiError) else type(exception).__name__
            span.set_attribute("error.type", code)
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            with _harmless():
                span.end(_ns(self.now_unix()))

    def part(self, answer: PartAnswer, queued_unix: float, waited_s: float) -> None:
        """Record the stages of one part, or of the last step of a split request (`finish`)."""
        index = answer.part_id.rpartition("/")[2]
        which: dict[str, Value] = {"pem.part": int(index) if index.isdigit() else index}
        if answer.decode_unix > 0:
            self.add("queue", queued_unix, queued_unix + waited_s, which)
            self.add("decode", answer.decode_unix, answer.decode_unix + answer.decode_ms / 1e3, which)
        if answer.pose_unix > 0:
            about: dict[str, Value] = {
                "pem.engine": answer.engine,
                "pem.detections": len(answer.rows),
                "pem.batch_wait_ms": round(answer.queue_ms, 3),  # since decoding
            }
            links = [Link(pass_context(pass_id)) for pass_id in answer.pass_ids]
            self.add("pose", answer.pose_unix, answer.pose_unix + answer.pose_ms / 1e3, which | about, links)
        if answer.respond_unix > 0:
            self.add("respond", answer.respond_unix, answer.respond_unix + answer.respond_ms / 1e3, which)


def _ns(unix: float) -> int:
    return round(unix * 1e9)


def pass_context(pass_id: str) -> SpanContext:
    """Return the span of a pass. The worker that ran the pass made its ids."""
    return SpanContext(int(pass_id[:32], 16), int(pass_id[32:], 16), False, TraceFlags(TraceFlags.SAMPLED))


# ------------------------------------------------------------------------------------------------------------- export


class Exporter(Protocol):
    """A destination of spans. Only `close` may block."""

    @property
    def tracer(self) -> Tracer:
        """Return the tracer, which makes the spans of requests and decides which are recorded."""

    def export(
        self, name: str, context: SpanContext, begun_unix: float, ended_unix: float, attributes: Mapping[str, Value]
    ) -> None:
        """Export a span whose ids are given, without asking a sampler."""

    def close(self) -> None:
        """Deliver the waiting spans; may take long."""


class Tracing:
    """The gateway's recorder of all requests."""

    def __init__(self, exporter: Exporter | None = None) -> None:
        self._exporter = exporter
        self._jobs: dict[str, tuple[Trace, float]] = {}  # job id -> its trace, and when it was queued (Unix time)
        self._passes = _Passes()

    @classmethod
    def start(cls, environment: Mapping[str, str]) -> Self:
        """Start, with export if the standard variables ask for it. If export is impossible, warn and go on without."""
        if not asked_for(environment):
            return cls()
        try:
            from serve.telemetry.otlp import OtlpExporter

            exporter = OtlpExporter()
        except ImportError as error:
            hint = f"pip install {_PACKAGES} (our extra `otel`); until then no trace is exported"
            log.warning("tracing_off", reason=str(error), hint=hint)
            return cls()
        except Exception as error:  # a variable that the SDK cannot use
            log.warning("tracing_off", reason=f"{type(error).__name__}: {error}", hint="look at the OTEL_ variables")
            return cls()
        log.info("tracing", endpoint=exporter.endpoint)
        return cls(exporter)

    def begin(self, trace: Trace, method: str, route: str | None) -> None:
        """Decide whether this request is recorded: as its caller decided, unless the sampler is set otherwise.

        route: the route's label in metrics; None for probes and unknown routes, which are never recorded.
        """
        if self._exporter is None or route is None:
            return
        known = method in _METHODS  # else clients could invent span names
        attributes = {"http.request.method": method if known else "_OTHER", "http.route": route}
        with _harmless():
            tracer = self._exporter.tracer
            span = tracer.start_span(
                f"{method if known else 'HTTP'} {route}",
                _inside(trace.parent),
                SpanKind.SERVER,
                attributes,
                start_time=_ns(trace.begun_unix),
            )
            trace.own = trace.onward = span.get_span_context()
            trace.tracer, trace.span = tracer, span if trace.own.trace_flags.sampled else None

    @contextlib.contextmanager
    def queued(self, job_id: str, trace: Trace) -> Iterator[None]:
        """Record the answers to this job's parts as spans of the trace, while the block runs."""
        if trace.span is not None:
            self._jobs[job_id] = (trace, time.time())
        try:
            yield
        finally:
            self._jobs.pop(job_id, None)

    def part(self, answer: PartAnswer, waited_s: float) -> None:
        """Record the answer to a part, which waited `waited_s` in the gateway."""
        if self._exporter is None:
            return
        found = self._jobs.get(answer.part_id.rpartition("/")[0])
        with _harmless():
            if found is not None:
                trace, queued_unix = found
                trace.part(answer, queued_unix, waited_s)
            for record in self._passes.to_export(answer, wanted=found is not None):
                attributes: dict[str, Value] = {
                    "pem.engine": record.engine,
                    "pem.device": record.device,
                    "pem.detections": record.detections,
                    "pem.requests": record.requests,
                }
                ended_unix = record.begun_unix + record.seconds
                context = pass_context(record.pass_id)
                self._exporter.export("pass", context, record.begun_unix, ended_unix, attributes)

    def end(self, trace: Trace, status: int, attributes: Mapping[str, Value | None]) -> None:
        """End the span of an answered request; attributes that are None are left out."""
        if trace.span is None:
            return
        about = {name: value for name, value in attributes.items() if value is not None}
        with _harmless():
            trace.span.set_attributes({"http.response.status_code": status, **about})
            if status >= 500:
                trace.span.set_status(StatusCode.ERROR)
            trace.span.end(_ns(trace.now_unix()))

    async def close(self, limit_s: float) -> None:
        """Deliver the waiting spans, for at most `limit_s` or 3 s: an absent collector must not delay a stop."""
        if self._exporter is None:
            return
        delivered, loop = asyncio.Event(), asyncio.get_running_loop()
        exporter, self._exporter = self._exporter, None

        def deliver() -> None:
            exporter.close()
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                loop.call_soon_threadsafe(delivered.set)

        threading.Thread(target=deliver, name="traces", daemon=True).start()
        try:
            await asyncio.wait_for(delivered.wait(), min(limit_s, _LONGEST_FLUSH_S))
        except TimeoutError:
            log.warning("traces_left", hint="the collector did not take the last spans in time")


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    """Log errors of an exporter or a sampler, so that they never fail the request."""
    try:
        yield
    except Exception:
        log.exception("trace_failed")


def asked_for(environment: Mapping[str, str]) -> bool:
    """Return True if the standard variables name a collector and none of them switches traces off."""
    named = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    elsewhere = environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() not in ("", "otlp")
    return any(environment.get(name, "").strip() for name in named) and not disabled and not elsewhere


class _Passes:
    """Picks the passes to export: each pass that served a recorded part, once.

    A pass's record arrives with one of its parts. That part may be recorded or not, and arrive before or after others.
    """

    def __init__(self) -> None:
        self._unwanted: OrderedDict[str, PassRecord] = OrderedDict()  # record arrived; no recorded part of it yet
        self._wanted: OrderedDict[str, bool] = OrderedDict()  # has a recorded part; True once it is exported

    def to_export(self, answer: PartAnswer, *, wanted: bool) -> list[PassRecord]:
        """Return the passes that are due for export with this answer."""
        for record in answer.passes:
            self._unwanted[record.pass_id] = record
        if wanted:
            for pass_id in answer.pass_ids:
                self._wanted.setdefault(pass_id, False)
        due = []
        for pass_id in {*answer.pass_ids, *(record.pass_id for record in answer.passes)}:
            if self._wanted.get(pass_id) is False and pass_id in self._unwanted:
                due.append(self._unwanted.pop(pass_id))
                self._wanted[pass_id] = True
        _shorten(self._unwanted)
        _shorten(self._wanted)
        return due


def _shorten(remembered: OrderedDict[str, bool] | OrderedDict[str, PassRecord]) -> None:
    while len(remembered) > _REMEMBERED_PASSES:
        remembered.popitem(last=False)
