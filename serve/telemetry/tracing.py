"""Traces: who asked whom, and where a request's time went, in the headers and words of W3C Trace Context.

Every request is a span of a trace: its caller's, where the header `traceparent` names one, else one of its own. Its ids
go into the log, the answer and what is asked of other servers; that costs some microseconds. What happened inside it is
kept only where it is exported (otlp.py): the standard variables of OpenTelemetry switch that on, and without them
none of its packages is imported.

A request has one child for each stage, a set of them for each part. Passes are shared, so that they can be nobody's
child: each is a trace of its own, which the `pose` spans of all that rode in it link to.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, Self

import structlog

from serve.errors import ApiError
from serve.telemetry.spans import SAMPLED, Context, Span, Value
from workers.messages import PartAnswer, PassRecord

log = structlog.get_logger()

_RANDOM: Final = 0x02  # its trace id is random
_LONGEST_STATE: Final = 512  # characters that everybody must be able to pass on; a longer state is left behind whole
_MOST_MEMBERS: Final = 32
_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KEY: Final = r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
_MEMBER: Final = re.compile(rf"({_KEY})=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{{0,255}}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")
_PACKAGES: Final = "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
_REMEMBERED_PASSES: Final = 1024
_LONGEST_FLUSH_S: Final = 3.0
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})

_NO_ATTRIBUTES: Final[Mapping[str, Value]] = {}


# -------------------------------------------------------------------------------------------------------- the headers


def parse_traceparent(text: str) -> Context | None:
    """The caller's span; None where the header breaks the rules of its version, which is no error of the request.

    Of a version that we do not know the fields of version 00 are read, and what follows them is ignored.
    """
    match = _TRACEPARENT.fullmatch(text)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    if trace_id.strip("0") == "" or span_id.strip("0") == "":
        return None
    return Context(trace_id, span_id, int(flags, 16) & (SAMPLED | _RANDOM))


def parse_tracestate(text: str) -> str:
    """The state as it came; empty where it breaks the rules or is too long to be passed on."""
    members = [member for part in text.split(",") if (member := part.strip(" \t"))]
    if len(text) > _LONGEST_STATE or len(members) > _MOST_MEMBERS:
        return ""
    matches = [_MEMBER.fullmatch(member) for member in members]
    keys = {match[1] for match in matches if match is not None}
    return text if len(keys) == len(members) > 0 else ""  # a broken member or a key that comes twice spoils it


def _caller(headers: Iterable[tuple[bytes, bytes]]) -> Context | None:
    parents = [value for name, value in headers if name == b"traceparent"]
    if len(parents) != 1:
        return None
    parent = parse_traceparent(parents[0].decode("latin-1"))
    if parent is None:
        return None
    states = [value.decode("latin-1") for name, value in headers if name == b"tracestate"]
    return replace(parent, state=parse_tracestate(",".join(states))) if states else parent


# ----------------------------------------------------------------------------------------------------------- requests


@dataclass(slots=True)
class Trace:
    """One request's span, and what happened in it where that is recorded."""

    own: Context
    parent: Context | None  # the caller's span
    onward: Context  # what others are told: our span, but the caller's where ours is nowhere to be seen
    begun_unix: float
    begun: float  # the same moment, monotonic
    recorded: bool = False
    name: str = ""
    attributes: dict[str, Value] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)

    @classmethod
    def of(cls, headers: Iterable[tuple[bytes, bytes]]) -> Self:
        """The trace of a request with these headers (names in lower case), recorded nowhere until `begin` says so."""
        parent = _caller(headers)
        own = parent.child() if parent is not None else Context(secrets.token_hex(16), secrets.token_hex(8))
        return cls(own, parent, onward=parent or own, begun_unix=time.time(), begun=time.monotonic())

    def unix(self, moment: float) -> float:
        """A monotonic moment of this request as Unix time."""
        return self.begun_unix + moment - self.begun

    def add(
        self,
        name: str,
        begun_unix: float,
        ended_unix: float,
        attributes: Mapping[str, Value] = _NO_ATTRIBUTES,
        links: tuple[Context, ...] = (),
    ) -> None:
        """A stage of this request."""
        if self.recorded:
            self.spans.append(
                Span(
                    name=name,
                    context=self.own.child(),
                    parent=self.own,
                    begun_unix=begun_unix,
                    ended_unix=ended_unix,
                    attributes=attributes,
                    links=links,
                )
            )

    @contextlib.contextmanager
    def asking(self, name: str) -> Iterator[Context]:
        """A span around a request to another server; gives the context that goes with it."""
        if not self.recorded:
            yield self.onward
            return
        context, begun_unix = self.own.child(), time.time()
        error: dict[str, Value] = {}
        try:
            yield context
        except BaseException as exception:  # a cancellation, too
            error["error.type"] = exception.code if isinstance(exception, ApiError) else type(exception).__name__
            raise
        finally:
            self.spans.append(
                Span(
                    name=name,
                    context=context,
                    parent=self.own,
                    kind="client",
                    begun_unix=begun_unix,
                    ended_unix=time.time(),
                    attributes=error,
                    failed=bool(error),
                )
            )

    def part(self, answer: PartAnswer, queued_unix: float, waited_s: float) -> None:
        """The stages of one part, or of the last step of a request that was split (`finish`)."""
        if not self.recorded:
            return
        index = answer.part_id.rpartition("/")[2]
        which: dict[str, Value] = {"pem.part": int(index) if index.isdigit() else index}
        if answer.decode_unix > 0:
            self.add("queue", queued_unix, queued_unix + waited_s, which)
            self.add("decode", answer.decode_unix, answer.decode_unix + answer.decode_ms / 1e3, which)
        if answer.pose_unix > 0:
            about: dict[str, Value] = {
                "pem.engine": answer.engine,
                "pem.detections": len(answer.rows),
                "pem.batch_wait_ms": round(answer.queue_ms, 3),  # since it was decoded
            }
            links = tuple(pass_context(pass_id) for pass_id in answer.pass_ids)
            self.add("pose", answer.pose_unix, answer.pose_unix + answer.pose_ms / 1e3, which | about, links)
        if answer.respond_unix > 0:
            self.add("respond", answer.respond_unix, answer.respond_unix + answer.respond_ms / 1e3, which)


def pass_context(pass_id: str) -> Context:
    """The span of a pass: its ids are made where it runs."""
    return Context(pass_id[:32], pass_id[32:], SAMPLED)


# ------------------------------------------------------------------------------------------------------------- export


class Exporter(Protocol):
    """Where spans go; nothing here may wait."""

    def samples(self, parent: Context | None, trace_id: str, name: str, attributes: Mapping[str, Value]) -> bool:
        """Whether a request is recorded."""

    def export(self, span: Span) -> None:
        """Take a span that has ended."""

    def close(self) -> None:
        """Deliver what is waiting; may take long."""


class Tracing:
    """What the gateway records of all requests."""

    def __init__(self, exporter: Exporter | None = None) -> None:
        self._exporter = exporter
        self._jobs: dict[str, tuple[Trace, float]] = {}  # by the job's id: whose it is, and when it was queued
        self._passes = _Passes()

    @classmethod
    def start(cls, environment: Mapping[str, str]) -> Self:
        """With export where the standard variables ask for it. What stands in its way is a warning, not an end."""
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
        """Decide whether this request is recorded, as its caller did unless the sampler is told otherwise.

        route: as the metrics name it; None for probes and for what is no route of ours: they never are.
        """
        if self._exporter is None:
            return
        if route is not None:
            known = method in _METHODS  # a client cannot make names
            trace.name = f"{method if known else 'HTTP'} {route}"
            trace.attributes = {"http.request.method": method if known else "_OTHER", "http.route": route}
            with _harmless():
                trace.recorded = self._exporter.samples(trace.parent, trace.own.trace_id, trace.name, trace.attributes)
        flags = trace.own.flags & ~SAMPLED | (SAMPLED if trace.recorded else 0)
        trace.own = trace.onward = replace(trace.own, flags=flags)

    @contextlib.contextmanager
    def queued(self, job_id: str, trace: Trace) -> Iterator[None]:
        """While it lasts, the answers to this job's parts become spans of the trace."""
        if trace.recorded:
            self._jobs[job_id] = (trace, time.time())
        try:
            yield
        finally:
            self._jobs.pop(job_id, None)

    def part(self, answer: PartAnswer, waited_s: float) -> None:
        """A part was answered, having waited so long in the gateway."""
        if self._exporter is None:
            return
        found = self._jobs.get(answer.part_id.rpartition("/")[0])
        if found is not None:
            trace, queued_unix = found
            trace.part(answer, queued_unix, waited_s)
        with _harmless():
            for record in self._passes.to_export(answer, wanted=found is not None):
                self._exporter.export(_pass_span(record))

    def end(self, trace: Trace, status: int, attributes: Mapping[str, Value | None]) -> None:
        """The request was answered; attributes that are None are left out."""
        if self._exporter is None or not trace.recorded:
            return
        about = {name: value for name, value in attributes.items() if value is not None}
        span = Span(
            name=trace.name,
            context=trace.own,
            parent=trace.parent,
            parent_is_remote=True,
            kind="server",
            begun_unix=trace.begun_unix,
            ended_unix=trace.unix(time.monotonic()),
            attributes={**trace.attributes, "http.response.status_code": status, **about},
            failed=status >= 500,
        )
        with _harmless():
            for stage in trace.spans:
                self._exporter.export(stage.within(span.begun_unix, span.ended_unix))
            self._exporter.export(span)

    async def close(self, limit_s: float) -> None:
        """Deliver what is waiting, for so long at the most: a collector that is away holds up no stop."""
        if self._exporter is None:
            return
        delivered, loop = asyncio.Event(), asyncio.get_running_loop()
        exporter, self._exporter = self._exporter, None

        def deliver() -> None:
            exporter.close()
            with contextlib.suppress(RuntimeError):  # the loop did not wait for us
                loop.call_soon_threadsafe(delivered.set)

        threading.Thread(target=deliver, name="traces", daemon=True).start()
        try:
            await asyncio.wait_for(delivered.wait(), min(limit_s, _LONGEST_FLUSH_S))
        except TimeoutError:
            log.warning("traces_left", hint="the collector did not take the last spans in time")


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    """What an exporter or a sampler stumbles over is never the request's trouble."""
    try:
        yield
    except Exception:
        log.exception("trace_failed")


def asked_for(environment: Mapping[str, str]) -> bool:
    """Whether the standard variables name a collector, and none switches traces off."""
    named = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    elsewhere = environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() not in ("", "otlp")
    return any(environment.get(name, "").strip() for name in named) and not disabled and not elsewhere


class _Passes:
    """Which passes to export: each one that a recorded part rode in, once.

    A pass's record comes with one of its parts, which may be recorded or not, and before or after the others.
    """

    def __init__(self) -> None:
        self._unwanted: OrderedDict[str, PassRecord] = OrderedDict()  # came, and nobody recorded rode in it yet
        self._wanted: OrderedDict[str, bool] = OrderedDict()  # somebody recorded did; whether it was exported

    def to_export(self, answer: PartAnswer, *, wanted: bool) -> list[PassRecord]:
        """Those for which the time has come with this answer."""
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


def _pass_span(record: PassRecord) -> Span:
    return Span(
        name="pass",
        context=pass_context(record.pass_id),
        begun_unix=record.begun_unix,
        ended_unix=record.begun_unix + record.seconds,
        attributes={
            "pem.engine": record.engine,
            "pem.device": record.device,
            "pem.detections": record.detections,
            "pem.requests": record.requests,
        },
    )
