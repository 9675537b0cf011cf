"""Traces: the headers' rules, and the spans that a listening collector gets from a running server."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SentSpan
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import INVALID_SPAN_CONTEXT, NoOpTracer, SpanContext, Tracer

from pem.client import Client
from serve.telemetry import otlp, tracing
from serve.telemetry.tracing import Trace, Tracing, Value
from tests.running import ROOT, SMALL, RunningServer, post, register, wait_until
from tests.serve.ism_server import IsmServer
from tests.serve.tiny import FULL, NAMES, POSE, Asker, ascii_ply, masks_of, one, tetrahedron, tiny_question, tiny_scene
from workers.messages import PartAnswer, PassRecord

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


def called_with(*headers: tuple[str, str]) -> Trace:
    """Return the trace of a request with these headers."""
    return Trace.of([(name.encode(), value.encode("latin-1")) for name, value in headers])


# --------------------------------------------------------------------------------------------------------- the headers


@pytest.mark.parametrize(
    "text, flags",
    [
        (PARENT, 1),
        (f"00-{TRACE}-{SPAN}-00", 0),
        (f"00-{TRACE}-{SPAN}-03", 3),
        (f"00-{TRACE}-{SPAN}-ff", 3),  # flags that nobody has defined yet are not passed on
        (f"01-{TRACE}-{SPAN}-01", 1),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", 1),
    ],
)
def test_a_span_is_read_from_the_header(text: str, flags: int) -> None:
    trace = called_with(("traceparent", text))
    assert tracing.headers_of(trace.onward) == {"traceparent": f"00-{TRACE}-{SPAN}-{flags:02x}"}
    assert trace.parent.is_remote


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        PARENT.upper(),
        PARENT[:-1],
        PARENT + "0",
        PARENT + "-more",  # version 00 has four fields
        " " + PARENT,
        f"ff-{TRACE}-{SPAN}-01",
        f"0-{TRACE}-{SPAN}-01",
        f"cc-{TRACE}-{SPAN}-01.more",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f"00_{TRACE}_{SPAN}_01",
        PARENT + "\n",
    ],
)
def test_a_malformed_header_is_no_span(text: str) -> None:
    assert called_with(("traceparent", text)).parent == INVALID_SPAN_CONTEXT


@pytest.mark.parametrize(
    "text, kept",
    [
        ("rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", True),
        ("tenant@system=a b:c", True),
        ("a=1, \tb=2,,", True),
        ("a=" + "x" * 256, True),
        (",".join(f"k{number}=1" for number in range(32)), True),
        (",".join(f"k{number}=1" for number in range(33)), False),
        (",".join(f"k{number}={'x' * 200}" for number in range(3)), False),  # over 512 characters
        ("a=" + "x" * 257, False),
        ("a=1,a=2", False),
        ("A=1", False),
        ("a", False),
        ("a=", False),
        ("a=b=c", False),
        ("a=\u00e9", False),
        ("a=1\r\nX-Evil: 1", False),
        (",", False),
        ("", False),
    ],
)
def test_the_state_is_passed_on_member_by_member_or_not_at_all(
    text: str, kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    state = tracing.headers_of(called_with(("traceparent", PARENT), ("tracestate", text)).onward).get("tracestate")
    assert state == (re.sub(r",?[ \t]*,[ \t]*|,$", ",", text).rstrip(",") if kept else None)
    assert caplog.records == []  # a client fills no log


def test_a_request_continues_its_callers_trace() -> None:
    trace = called_with(("traceparent", PARENT), ("tracestate", "a=1"), ("accept", "*/*"), ("tracestate", "b=2"))
    assert tracing.headers_of(trace.parent) == {"traceparent": PARENT, "tracestate": "a=1,b=2"}
    assert (trace.trace_id, trace.own.trace_flags, trace.own.trace_state.to_header()) == (TRACE, 1, "a=1,b=2")
    assert SPAN not in trace.traceparent
    assert trace.span is None


@pytest.mark.parametrize("parents", [[], ["malformed"], [PARENT, PARENT]])
def test_a_request_without_one_good_caller_begins_a_trace(parents: list[str]) -> None:
    headers = [*(("traceparent", parent) for parent in parents), ("tracestate", "a=1")]
    traces = [called_with(*headers) for _ in range(2)]
    for trace in traces:
        assert not trace.parent.is_valid
        assert trace.own.is_valid
        assert tracing.headers_of(trace.own) == {"traceparent": trace.traceparent}
        assert re.fullmatch(rf"00-{trace.trace_id}-[0-9a-f]{{16}}-00", trace.traceparent)
        assert trace.onward is trace.own
    assert traces[0].trace_id != traces[1].trace_id != TRACE


def test_without_export_other_servers_become_children_of_the_caller() -> None:
    trace = called_with(("traceparent", PARENT), ("tracestate", "a=1"))
    Tracing().begin(trace, "POST", POSE)
    with trace.asking("ism") as headers:  # a span of ours would be a hole in the caller's trace
        assert headers == {"traceparent": PARENT, "tracestate": "a=1"}
    assert trace.span is None


# ---------------------------------------------------------------------------------------------------- what is exported


class Kept:
    """An exporter that keeps the spans of requests whose caller is sampled, and of those without a caller."""

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        self._memory = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(processor or SimpleSpanProcessor(self._memory))
        self.tracer: Tracer = provider.get_tracer("tests")
        self.given: list[tuple[Any, ...]] = []

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self._memory.get_finished_spans()

    def export(self, name: str, context: SpanContext, begun: float, ended: float, about: Mapping[str, Value]) -> None:
        self.given.append((name, context, begun, ended, about))

    def close(self) -> None:
        pass


def part(job: str, passes: list[PassRecord], rode: PassRecord) -> PartAnswer:
    now = time.time()
    stages = {"decode_unix": now, "pose_unix": now, "respond_unix": now}
    return PartAnswer(part_id=f"{job}/0", passes=passes, pass_ids=[rode.pass_id], **stages)


def recorded(kept: Tracing, flags: str = "01") -> Trace:
    trace = called_with(("traceparent", f"{PARENT[:-2]}{flags}"))
    kept.begin(trace, "POST", POSE)
    return trace


@pytest.mark.parametrize("order", list(itertools.permutations(["carrier", "recorded", "not recorded"])))
def test_a_pass_is_exported_once_if_anyone_who_is_recorded_rode_in_it(order: tuple[str, ...]) -> None:
    exporter = Kept()
    one_tracing = Tracing(exporter)
    record = PassRecord(
        engine="geometric", detections=2, requests=3, seconds=0.5, pass_id=secrets.token_hex(24), begun_unix=1e9
    )
    lonely = PassRecord(engine="geometric", detections=1, requests=1, seconds=0.1, pass_id=secrets.token_hex(24))
    traces = {"recorded": recorded(one_tracing), "not recorded": recorded(one_tracing, flags="00")}
    for name in order:
        trace = traces.get(name)
        passes = [record, lonely] if name == "carrier" else []  # the carrier's client has gone
        if trace is None:
            one_tracing.part(part(name, passes, record), 0.0)
        else:
            with one_tracing.queued(name, trace):
                one_tracing.part(part(name, passes, record), 0.0)
    ((name, context, begun, ended, attributes),) = exporter.given
    assert (name, f"{context.trace_id:032x}{context.span_id:016x}", begun, ended) == (
        "pass",
        record.pass_id,
        1e9,
        1e9 + 0.5,
    )
    assert attributes == {"pem.engine": "geometric", "pem.device": "cpu", "pem.detections": 2, "pem.requests": 3}


def test_a_request_that_is_not_recorded_exports_nothing_and_says_so_onward() -> None:
    exporter = Kept()
    one_tracing = Tracing(exporter)
    trace = recorded(one_tracing, flags="00")
    trace.add("read", 1.0, 2.0)
    one_tracing.end(trace, 200, {})
    assert exporter.spans == ()
    assert trace.onward is trace.own
    assert trace.traceparent == f"00-{TRACE}-{trace.own.span_id:016x}-00"


def test_an_exporter_that_fails_is_not_the_requests_trouble(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            raise ValueError("no room")

    one_tracing = Tracing(Kept(Broken()))
    trace = recorded(one_tracing)
    record = PassRecord(engine="geometric", detections=1, requests=1, seconds=0.1, pass_id=secrets.token_hex(24))
    with one_tracing.queued("job", trace):
        one_tracing.part(part("job", [record], record), 0.0)
    with trace.asking("ism") as headers:
        assert headers["traceparent"].startswith(f"00-{TRACE}-")
    one_tracing.end(trace, 200, {})
    assert capsys.readouterr().out.count("] trace_failed") == 6  # four stages, the ISM server, the request


def test_a_sampler_that_fails_leaves_a_request_unrecorded(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(NoOpTracer):
        def start_span(self, *args: Any, **kwargs: Any) -> NoReturn:
            raise ValueError("cannot decide")

    exporter = Kept()
    exporter.tracer = Broken()
    trace = recorded(Tracing(exporter))
    assert (trace.span, trace.onward) == (None, trace.parent)
    assert capsys.readouterr().out.count("] trace_failed") == 1


def test_a_request_without_a_route_to_name_is_not_recorded() -> None:
    trace = called_with(("traceparent", PARENT))
    Tracing(Kept()).begin(trace, "GET", None)
    assert trace.span is None


def test_a_clock_that_is_set_back_makes_no_span_that_ends_before_it_begins() -> None:
    exporter = Kept()
    trace = recorded(Tracing(exporter))
    for begun_s, ended_s in ((50.0, 40.0), (-50.0, -40.0), (-1.0, 50.0), (50.0, -50.0)):
        trace.add("pose", trace.begun_unix + begun_s, trace.begun_unix + ended_s)
    now_ns = round(trace.now_unix() * 1e9)
    assert len(exporter.spans) == 4
    for span in exporter.spans:
        assert span.start_time is not None
        assert span.end_time is not None
        assert round(trace.begun_unix * 1e9) <= span.start_time <= span.end_time <= now_ns


@pytest.mark.parametrize(
    "environment, asked",
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_SERVICE_NAME": "pem"}, False),
    ],
)
def test_the_standard_variables_switch_export_on(environment: dict[str, str], asked: bool) -> None:
    assert tracing.asked_for(environment) is asked


def test_spans_that_find_the_queue_full_are_told_once_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Slow(otlp.OTLPSpanExporter):
        """A collector that takes everything, but the first batch not before it may."""

        begun, may_end = threading.Event(), threading.Event()
        taken = 0

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            Slow.begun.set()
            assert Slow.may_end.wait(60)
            Slow.taken += len(spans)
            return SpanExportResult.SUCCESS

    monkeypatch.setattr(otlp, "OTLPSpanExporter", Slow)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    exporter = otlp.OtlpExporter()
    trace = recorded(Tracing(exporter))
    trace.add("pose", 1e9, 1e9)
    assert Slow.begun.wait(60)
    for _ in range(6):  # two have room
        trace.add("pose", 1e9, 1e9)
    exporter.export("pass", trace.own, 1e9, 1e9, {})
    Slow.may_end.set()
    wait_until(lambda: Slow.taken == 3, 60, "the collector takes what has waited")
    exporter.close()
    said = capsys.readouterr().out
    assert said.count("traces_lost") == said.count("the queue is full") == 1
    assert re.findall(r"traces_taken_again .*lost=(\d+)", said) == ["5"]
    assert caplog.records == []


def run(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter; return what it prints."""
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout + answer.stderr


def test_without_export_opentelemetrys_sdk_is_not_imported(server: RunningServer) -> None:
    code = (
        "import os, sys, serve.server; from serve.telemetry.tracing import Tracing; Tracing.start(os.environ);"
        "heavy = ('opentelemetry.sdk', 'opentelemetry.exporter', 'google');"
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    assert run(code).strip() == "[]"
    assert "google/_upb" not in Path(f"/proc/{server.pid}/maps").read_text()  # protobuf's library


def test_missing_packages_are_a_warning_that_says_what_to_install() -> None:
    code = (
        "import os, sys; sys.modules['opentelemetry.sdk'] = None; from serve.telemetry.tracing import Tracing;"
        "print(Tracing.start(os.environ)._exporter)"
    )
    said = run(code, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    assert said.count("tracing_off") == 1
    assert "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http" in said
    assert said.strip().splitlines()[-1] == "None"


def test_a_variable_that_cannot_be_used_is_a_warning() -> None:
    code = "import os; from serve.telemetry.tracing import Tracing; print(Tracing.start(os.environ)._exporter)"
    said = run(code, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1", OTEL_BSP_MAX_QUEUE_SIZE="-1")
    assert "tracing_off" in said
    assert said.strip().splitlines()[-1] == "None"


# -------------------------------------------------------------------------------------------------------- the collector


@dataclass(frozen=True)
class Seen:
    """A span as the collector got it; times in nanoseconds."""

    sent: SentSpan
    resource: dict[str, Any]

    @property
    def name(self) -> str:
        return self.sent.name

    @property
    def trace_id(self) -> str:
        return self.sent.trace_id.hex()

    @property
    def span_id(self) -> str:
        return self.sent.span_id.hex()

    @property
    def parent_id(self) -> str:
        return self.sent.parent_span_id.hex()

    @property
    def begun(self) -> int:
        return int(self.sent.start_time_unix_nano)

    @property
    def ended(self) -> int:
        return int(self.sent.end_time_unix_nano)

    @property
    def attributes(self) -> dict[str, Any]:
        return plain(self.sent.attributes)

    @property
    def links(self) -> list[str]:
        return [link.trace_id.hex() + link.span_id.hex() for link in self.sent.links]


def plain(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


class Collector:
    """An OTLP/HTTP collector on a port of loopback; `stop` removes it, `start` brings it back on the same port."""

    def __init__(self) -> None:
        self.spans: list[Seen] = []
        self.port = 0
        self._http: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                for group in message.resource_spans:
                    resource = plain(group.resource.attributes)
                    spans.extend(Seen(span, resource) for scope in group.scope_spans for span in scope.spans)
                body = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def request(self, trace_id: str) -> tuple[Seen, list[Seen]]:
        """Return the server's span of a trace, and its children in order of time; wait for them."""

        def roots() -> list[Seen]:
            return [span for span in self.spans if span.trace_id == trace_id and span.sent.kind == SERVER]

        wait_until(roots, 60, f"the collector gets the trace {trace_id}")
        (root,) = roots()  # it leaves after its children
        children = [span for span in self.spans if span.trace_id == trace_id and span is not root]
        return root, sorted(children, key=lambda span: span.begun)

    def passes(self, links: list[str]) -> list[Seen]:
        """Return the spans that links lead to."""

        def found() -> list[Seen]:
            return [span for span in self.spans if span.trace_id + span.span_id in links]

        wait_until(lambda: len(found()) == len(links), 60, "the collector gets the passes that are linked to")
        return found()


SERVER, CLIENT = SentSpan.SpanKind.SPAN_KIND_SERVER, SentSpan.SpanKind.SPAN_KIND_CLIENT
OK, FAILED = 0, 2  # the status of a span


@dataclass
class Traced:
    """A server that exports its traces, its collector, the ISM server behind it, and a client."""

    server: RunningServer
    collector: Collector
    ism: IsmServer
    ask: Asker

    def request(self, answer: httpx.Response) -> tuple[Seen, list[Seen]]:
        """The spans of the request that got this answer."""
        _, trace_id, span_id, _ = answer.headers["traceparent"].split("-")
        root, children = self.collector.request(trace_id)
        assert root.span_id == span_id
        return root, children

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Return the server's log lines of an event."""
        lines = [json.loads(line) for line in self.server.lines(event) if line.startswith("{")]
        return [line for line in lines if line["event"] == event]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    """Start one for the tests below. Its one pose worker gathers at the pose stage: waiting requests share a pass."""
    settings = {
        "pose_workers": 1,
        "pose_threads": 1,
        "pose_pass_detections": 4,
        "pose_batch_requests": 16,
        "pose_batch_wait_ms": 1,
        "decode_workers": 1,
    }
    collector = Collector()
    collector.start()
    with IsmServer() as ism, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        environment.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3")  # seconds: for one more attempt
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")  # milliseconds
        environment.setenv("OTEL_SERVICE_NAME", "poses-of-line-3")
        one_server = RunningServer(
            tmp_path_factory.mktemp("traced") / "data", {**SMALL, **settings, "ism_url": ism.url}
        )
        try:
            with one_server, Asker(one_server.url) as client:
                for instance in tiny_scene().instances:
                    register(one_server.url, instance.shape)
                yield Traced(one_server, collector, ism, client)
        finally:
            collector.stop()


def assert_nested(root: Seen, children: list[Seen]) -> None:
    """Check that each child belongs to the request and lies within it, and each part's stages follow each other."""
    for child in children:
        assert child.parent_id == root.span_id
        assert root.begun <= child.begun <= child.ended <= root.ended
    parts = {child.attributes["pem.part"] for child in children if "pem.part" in child.attributes}
    for index in parts - {"finish"}:
        stages = [child for child in children if child.attributes.get("pem.part") == index]
        assert [stage.name for stage in stages] == ["queue", "decode", "pose", "respond"]
        for earlier, later in itertools.pairwise(stages):
            assert earlier.ended <= later.begun + 2_000_000, (earlier.name, later.name)  # 2 ms: two processes' clocks


def test_a_request_is_a_span_with_its_stages_and_a_link_to_its_pass(traced: Traced) -> None:
    parent = f"00-{secrets.token_hex(16)}-{SPAN}-01"
    answer = traced.ask.post(one(), headers={"traceparent": parent, "tracestate": "a=1"})
    root, children = traced.request(answer)
    assert (root.name, root.parent_id, root.sent.trace_state) == (f"POST {POSE}", SPAN, "a=1")
    assert root.trace_id == parent.split("-")[1]
    assert root.resource["service.name"] == "poses-of-line-3"
    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": POSE,
        "http.response.status_code": 200,
        "pem.request_id": answer.headers["X-Request-Id"],
        "pem.detections": 1,
        "pem.poses": 1,
        "pem.engine": "geometric",
        "pem.release": answer.json()["release"],
    }
    assert root.sent.status.code == OK
    assert [child.name for child in children] == ["read", "queue", "decode", "pose", "respond"]
    assert_nested(root, children)
    pose = children[3]
    timing = answer.json()["timing"]
    assert (pose.ended - pose.begun) / 1e6 == pytest.approx(timing["pose_ms"], abs=0.01)
    (shared,) = traced.collector.passes(pose.links)
    assert (shared.name, shared.parent_id, shared.attributes["pem.detections"]) == ("pass", "", 1)
    assert pose.begun - 2_000_000 <= shared.begun <= shared.ended <= pose.ended + 2_000_000


def test_two_requests_at_once_link_to_the_pass_they_shared(traced: Traced) -> None:
    slow = tiny_question().body(indices=[0, 0, 0, 0])  # a search for each: keeps the one worker busy
    for _ in range(10):
        with ThreadPoolExecutor(3) as pool:
            with traced.server.paused("pose"):
                first = pool.submit(post, traced.server.url, slow)
                traced.server.wait_for_queue(requests=1)
                both = [pool.submit(post, traced.server.url, one()) for _ in range(2)]
                traced.server.wait_for_queue(requests=3)
            answers = [future.result() for future in (first, *both)]
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        if answers[1].json()["timing"]["batch_requests"] == 2:
            break
    assert [answer.json()["timing"]["batch_requests"] for answer in answers[1:]] == [2, 2]
    links = []
    for answer in answers[1:]:
        root, children = traced.request(answer)
        assert_nested(root, children)
        (pose,) = [child for child in children if child.name == "pose"]
        links += pose.links
    assert links[0] == links[1]
    (shared,) = traced.collector.passes(links[:1])
    assert (shared.attributes["pem.requests"], shared.attributes["pem.detections"]) == (2, 2)
    assert len({traced.request(answer)[0].trace_id for answer in answers} | {shared.trace_id}) == 4


def test_a_request_that_is_split_has_the_stages_of_each_part(traced: Traced) -> None:
    masks = tiny_question().masks
    tree = one(detections=masks_of(*[masks[1]] * 6), init_poses=[one()["init_poses"][0]] * 6, visualize=True)
    answer = traced.ask.post(tree)
    assert answer.status_code == 200, answer.text
    root, children = traced.request(answer)
    assert_nested(root, children)
    parts = [(child.name, child.attributes["pem.part"]) for child in children if child.name != "read"]
    each = [(name, part) for part in (0, 1) for name in ("queue", "decode", "pose", "respond")]
    assert sorted(parts, key=str) == sorted([*each, ("respond", "finish")], key=str)
    poses = [child for child in children if child.name == "pose"]
    assert sorted(child.attributes["pem.detections"] for child in poses) == [2, 4]
    links = {link for child in poses for link in child.links}
    assert sum(shared.attributes["pem.detections"] for shared in traced.collector.passes(list(links))) == 6


def test_the_ism_server_is_asked_as_a_child_of_our_span(traced: Traced) -> None:
    traced.ism.headers.clear()
    tree = one(detections=..., init_poses=..., objects=..., object_id=NAMES[1], refine="none", template_dir="/t")
    answer = traced.ask.post(tree, route=FULL, headers={"traceparent": PARENT, "tracestate": "a=1"})
    assert answer.status_code == 200, answer.text
    root, children = traced.request(answer)
    assert_nested(root, children)
    assert [child.name for child in children][:2] == ["read", "ism"]
    ism = children[1]
    assert ism.sent.kind == CLIENT
    (headers,) = traced.ism.headers
    assert headers["traceparent"] == f"00-{TRACE}-{ism.span_id}-01"
    assert headers["tracestate"] == "a=1"


def test_an_ism_server_that_fails_is_a_failed_span(traced: Traced) -> None:
    tree = one(detections=..., init_poses=..., objects=..., object_id=NAMES[1], refine="none", template_dir="/t")
    traced.ism.mode = "422"
    try:
        answer = traced.ask.post(tree, route=FULL)
    finally:
        traced.ism.mode = "good"
    root, children = traced.request(answer)
    for span in (root, children[-1]):
        assert (span.sent.status.code, span.attributes["error.type"]) == (FAILED, "ism_failed")
    assert root.attributes["http.response.status_code"] == 502
    assert [child.name for child in children] == ["read", "ism"]


def test_waiting_for_an_onboarding_is_a_span(traced: Traced) -> None:
    tree = one(init_poses=..., objects=..., cad=ascii_ply(tetrahedron()), cad_format="ply", units="check")
    answer = traced.ask.post(tree)
    root, children = traced.request(answer)
    assert_nested(root, children)
    assert [child.name for child in children][:2] == ["read", "onboard"]
    if answer.status_code == 200:
        onboard_ms = (children[1].ended - children[1].begun) / 1e6
        assert onboard_ms == pytest.approx(answer.json()["timing"]["onboard_ms"], rel=0.1, abs=5)


@pytest.mark.parametrize("header", ["hello", f"00-{'0' * 32}-{SPAN}-01", f"ff-{TRACE}-{SPAN}-01", PARENT + "-more"])
def test_a_malformed_header_is_no_error_and_begins_a_trace(traced: Traced, header: str) -> None:
    answer = traced.ask.send("GET", "/api/v1/status", headers={"traceparent": header, "tracestate": "a=1"})
    assert answer.status_code == 200
    root, children = traced.request(answer)
    assert (root.name, root.parent_id, root.sent.trace_state, children) == ("GET /api/v1/status", "", "", [])
    assert root.trace_id != TRACE


def test_a_caller_that_is_not_sampled_is_not_recorded(traced: Traced) -> None:
    trace_id = secrets.token_hex(16)
    answer = traced.ask.send("GET", "/api/v1/status", headers={"traceparent": f"00-{trace_id}-{SPAN}-00"})
    assert answer.headers["traceparent"].startswith(f"00-{trace_id}-")
    assert answer.headers["traceparent"].endswith("-00")
    traced.request(traced.ask.send("GET", "/api/v1/status"))  # what came after it has arrived
    assert [span for span in traced.collector.spans if span.trace_id == trace_id] == []


def test_a_refusal_is_recorded_with_its_code_and_is_no_failure_of_ours(traced: Traced) -> None:
    answer = traced.ask.post(one(objects={"wedge": {"object_id": "unheard-of"}}))
    root, children = traced.request(answer)
    assert root.attributes["error.type"] == "unknown_object"
    assert root.attributes["http.response.status_code"] == 404
    assert root.sent.status.code == OK
    assert [child.name for child in children] == ["read"]
    named, _ = traced.request(traced.ask.send("GET", "/api/v1/objects/unheard-of"))
    assert (named.name, named.attributes["http.route"]) == ("GET /api/v1/objects/{id}", "/api/v1/objects/{id}")


def test_a_method_that_nobody_knows_makes_no_name(traced: Traced) -> None:
    root, _ = traced.request(traced.ask.send("PROPFIND", POSE))
    assert (root.name, root.attributes["http.request.method"]) == (f"HTTP {POSE}", "_OTHER")


def test_the_log_line_names_the_trace(traced: Traced) -> None:
    answer = traced.ask.post(one())
    request_id = answer.headers["X-Request-Id"]
    traced.server.logged(request_id)
    (line,) = [line for line in traced.lines("request") if line["id"] == request_id]
    assert answer.headers["traceparent"].split("-")[1] == line["trace_id"]


def test_the_client_continues_the_trace_of_the_code_around_it(traced: Traced) -> None:
    scene = tiny_scene()
    with Client(traced.server.url) as client:
        tracer = TracerProvider(shutdown_on_exit=False).get_tracer("robot")
        with tracer.start_as_current_span("pick") as span:
            picture = (scene.rgb, scene.depth_raw, scene.K)
            client.estimate(*picture, [scene.instances[1].mask], object_id=NAMES[1], depth_scale=scene.depth_scale_mm)
        context = span.get_span_context()
        root, _ = traced.collector.request(f"{context.trace_id:032x}")
        assert root.parent_id == f"{context.span_id:016x}"


def test_a_collector_that_is_away_harms_nobody_and_is_told_once(traced: Traced) -> None:
    traced.collector.stop()
    try:
        begun = time.monotonic()
        for _ in range(3):
            assert traced.ask.post(one()).status_code == 200
            time.sleep(0.3)  # one batch each
        assert time.monotonic() - begun < 10
        wait_until(lambda: traced.lines("traces_lost"), 60, "the log tells that spans are lost")
        time.sleep(1.5)
    finally:
        traced.collector.start()
    (lost,) = traced.lines("traces_lost")
    assert lost["endpoint"] == traced.collector.url
    assert "refused" in lost["reason"]

    def taken_again() -> bool:
        traced.ask.send("GET", "/api/v1/status")
        return bool(traced.lines("traces_taken_again"))

    wait_until(taken_again, 60, "the log tells that they are taken again")
    assert not [line for line in traced.lines("urllib3") if line["level"] != "debug"]
    traced.request(traced.ask.send("GET", "/api/v1/status"))


@pytest.mark.slow
def test_a_collector_that_does_not_answer_holds_up_no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "6")
        waiting = Tracing(otlp.OtlpExporter())
        trace = recorded(waiting)
        waiting.end(trace, 200, {})
        begun = time.monotonic()
        asyncio.run(waiting.close(0.2))
        assert 0.2 <= time.monotonic() - begun < 5
        for thread in threading.enumerate():  # they end by themselves, not in the middle of another test
            if thread.name in ("traces", "OtelBatchSpanRecordProcessor"):
                thread.join(60)
                assert not thread.is_alive()


def test_what_is_waiting_is_delivered_before_the_server_ends(traced: Traced) -> None:
    answer = traced.ask.post(one())  # the last test here: it stops the server
    assert traced.server.stop() == 0
    root, children = traced.request(answer)
    assert_nested(root, children)
    assert traced.lines("traces_left") == []
