"""Ask two versions of the server the same questions and report every difference: a refactoring may not cause any.

Each version runs as a child process in its own checkout, with a fresh data directory and the same settings. Both get
the same requests one after another, and their answers are compared field by field. Poses are compared bit for bit;
values of one run alone (times, rates, new ids) are left out; sentences for people count separately, as "words". Files
that requests wrote, the objects on disk and the exit codes are compared too. Last, both serve copies of the data
directory that the old version left: the same objects must be ready at once, untouched, and give the same poses.

Exits 0 only if nothing but words differs. Needs the server's dependencies, no GPU, and about five minutes.

Examples:

  python -m benchmarks.versions --old ../before --new .
  python -m benchmarks.versions --old ../before --new . --requests-only --groups masks cad
  python -m benchmarks.versions --old ../before --new . --data-only --data /var/lib/pem --json out.json
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec

from benchmarks.versions import diff as diff
from benchmarks.versions import material as material
from benchmarks.versions import questions as requests

Verdict = Literal["same", "words", "different"]

START_LIMIT_S = 400.0
STOP_LIMIT_S = 60.0
ANSWER_LIMIT_S = 180.0
RAW_LIMIT_S = 20.0
HANG_S = 15.0  # of the ISM server, unless its question ends before
_ATTEMPTS = 4  # for questions whose answer depends on held requests
_PAUSE_S = 0.3  # time for the server to notice connections that open and close
_NOT_COMPARED: Final = ("logs", "cad", ".lock", "stderr.log", "keys.json", "keys.json.lock", "outputs.list")
_OF_THE_STORE: Final = frozenset({"bytes", "created", "created_unix", "onboard_seconds", "seconds"})


# ------------------------------------------------------------------------------------------------------ the ISM server


class IsmServer:
    """An instance-segmentation server in a thread, for both versions; `mode` sets how it answers."""

    def __init__(self) -> None:
        self.mode = "good"
        self.asked: list[tuple[dict[str, str], Any]] = []  # headers and body of each request
        self.over = threading.Event()  # set when the question is over: nobody waits any more
        self._http = _IsmHttp(("127.0.0.1", 0), _IsmHandler)
        self._http.ism = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    def __enter__(self) -> IsmServer:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.over.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        """Return its address."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def begin(self, mode: str) -> None:
        """Forget what was asked, and answer in this mode from now on."""
        self.mode, self.asked = mode, []
        self.over = threading.Event()


class _IsmHttp(ThreadingHTTPServer):
    daemon_threads = True
    ism: IsmServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up."""


class _IsmHandler(BaseHTTPRequestHandler):
    server: _IsmHttp

    def do_POST(self) -> None:
        """Answer one request for detections."""
        ism = self.server.ism
        body = self.rfile.read(int(self.headers["Content-Length"]))
        ism.asked.append((dict(self.headers.items()), msgspec.json.decode(body)))
        status, answer = material.ism_answer(ism.mode, len(ism.asked))
        if status < 0:
            ism.over.wait(HANG_S)
        if status <= 0:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


# --------------------------------------------------------------------------------------------------------- the servers


class CannotRun(Exception):
    """A version does not start, or is no version; the message says why."""


@dataclass
class Side:
    """One version of the server with its data directory."""

    label: Literal["old", "new"]
    checkout: Path
    data: Path
    settings: Mapping[str, str]  # PEM_ variables without the prefix
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    values: dict[str, str] = field(default_factory=dict)  # value of each @NAME@
    ready_s: float = 0.0

    @property
    def module(self) -> str:
        """Return the command line's module, whose place differs between versions."""
        return "pem" if (self.checkout / "client" / "pem").is_dir() else "serve.cli"

    @property
    def environment(self) -> dict[str, str]:
        """Return a child's variables: only our settings, and this checkout's packages before the installed ones."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PEM_", "OTEL_", "PYTHON"))}
        folders = [self.checkout, *([self.checkout / "client"] if (self.checkout / "client").is_dir() else [])]
        kept |= {"PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONDONTWRITEBYTECODE": "1"}
        kept |= {"NO_COLOR": "1", "COLUMNS": "200", "PEM_CHECKPOINTS_DIR": str(self.data.parent / "no-checkpoints")}
        return kept | {f"PEM_{name}": value for name, value in self.settings.items()}

    @property
    def log(self) -> Path:
        """Return the file of its standard output and error."""
        return self.data / "stderr.log"

    def reading(self, ask: material.Ask | None = None, exact: Iterable[str] = ()) -> diff.Reading:
        """Return how to read this side's answers."""
        own = {str(self.data): "@DATA@", f"127.0.0.1:{self.port}": "@ADDRESS@"}
        return diff.Reading(
            own_texts=own,
            open_keys=ask.open_keys if ask else frozenset(),
            exact_keys=frozenset(exact),
            structure_only=ask is not None and ask.path == "/openapi.json",
        )

    def start(self) -> None:
        """Start the server and wait until it takes pose requests and all its workers are there."""
        self.port = _free_port()
        self.data.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", self.module, "serve", "--port", str(self.port), "--data-dir", str(self.data)]
        begun = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--engine", "geometric", "--device", "cpu", "--log-format", "json"],
                cwd=self.checkout,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._wait(lambda: exchange(self.port, "GET", "/readyz").status == 200)
        self.ready_s = time.monotonic() - begun
        with contextlib.suppress(CannotRun):  # a version without such numbers is compared all the same
            self._wait(self._staffed, 20.0)

    def _staffed(self) -> bool:
        reply = exchange(self.port, "GET", "/api/v1/status")
        if reply.status != 200:
            return True
        tracks = msgspec.json.decode(reply.body).get("tracks", {})
        return all(count for track in tracks.values() for count in track.get("workers", {}).values())

    def _wait(self, condition: Any, limit_s: float = START_LIMIT_S) -> None:
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            assert self.process is not None
            if self.process.poll() is not None:
                raise CannotRun(f"the {self.label} server ended with {self.process.returncode}:\n{self.log_end()}")
            if condition():
                return
            time.sleep(0.1)
        raise CannotRun(f"the {self.label} server was not ready after {limit_s:g} s:\n{self.log_end()}")

    def stop(self) -> int:
        """Send SIGTERM, then wait; return the exit code, or that of a kill if it did not end."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def log_end(self) -> str:
        """Return the last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def run(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run its command line once on its data directory."""
        command = [sys.executable, "-m", self.module, *arguments, "--data-dir", str(self.data)]
        return subprocess.run(
            command, cwd=self.checkout, env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )

    def check_imports(self) -> list[str]:
        """Return packages that would come from outside the checkout; CannotRun if the server itself would."""
        names = ("serve", "workers", "posekit", "pem", "pointnet2_ext")
        code = (
            "import importlib.util as u, json, sys; "
            "print(json.dumps({n: getattr(u.find_spec(n), 'origin', None) for n in sys.argv[1:]}))"
        )
        command = [sys.executable, "-c", code, *names]
        done = subprocess.run(command, cwd=self.checkout, env=self.environment, capture_output=True, check=True)
        found: dict[str, str | None] = msgspec.json.decode(done.stdout)
        foreign = [
            name
            for name, origin in found.items()
            if origin is not None and not Path(origin).resolve().is_relative_to(self.checkout)
        ]
        main = self.module.split(".")[0]
        if found[main] is None or main in foreign:
            raise CannotRun(f"{self.checkout} has no server: its module {self.module} would come from {found[main]}")
        return [name for name in foreign if (self.checkout / name).exists() or name in ("posekit", "workers")]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(sides: Sequence[Side], report: Report, what: str) -> Iterator[None]:
    """Run both servers while the block runs, and compare their exit codes. Stops in any case what was started."""
    codes: list[int] = []
    try:
        for side in sides:
            side.start()
        yield
    finally:
        codes += [side.stop() for side in sides if side.process is not None]
    found = []
    if len(set(codes)) > 1:
        found.append(diff.Difference(where="exit code", old=str(codes[0]), new=str(codes[1])))
    report.add("start and stop", f"exit codes of the {what} ({codes[0]})", found)
    print(f"{what}: ready after {', '.join(f'{side.ready_s:.1f} s ({side.label})' for side in sides)}")


# --------------------------------------------------------------------------------------------------------- on the wire


def exchange(
    port: int,
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    chunk: int = 0,
) -> diff.Reply:
    """Send one request on a connection of its own; return status 0 with the reason if there is no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_LIMIT_S)
    given = dict(headers or {})
    try:
        connection.putrequest(method, path, skip_host="Host" in given, skip_accept_encoding=True)
        if chunk and body is not None:
            given["Transfer-Encoding"] = "chunked"
        elif body is not None:
            given["Content-Length"] = str(len(body))
        for name, value in given.items():
            connection.putheader(name, value)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused early: the answer says why
            if chunk and body is not None:
                pieces = [body[start : start + chunk] for start in range(0, len(body), chunk)]
                connection.endheaders(pieces, encode_chunked=True)
            else:
                connection.endheaders(body)
        answer = connection.getresponse()
        return diff.Reply(status=answer.status, headers=answer.getheaders(), body=answer.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        return diff.Reply(status=0, body=f"{type(error).__name__}: {error}".encode())
    finally:
        connection.close()


def raw_exchange(port: int, data: bytes) -> list[diff.Reply]:
    """Send bytes unchanged; return every answer until the server closes the connection."""
    got = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=RAW_LIMIT_S) as connection:
            connection.sendall(data)
            while part := connection.recv(65536):
                got += part
    except OSError as error:
        if not got:
            return [diff.Reply(status=0, body=f"{type(error).__name__}: {error}".encode())]
    replies = []
    while got:
        head, _, rest = got.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        lengths = [int(value) for name, value in headers if name.lower() == "content-length"]
        length = lengths[0] if lengths else len(rest)
        status = first.split(" ")[1] if first.startswith("HTTP/1.") else ""
        replies.append(diff.Reply(status=int(status) if status.isdigit() else 0, headers=headers, body=rest[:length]))
        got = rest[length:]
    return replies or [diff.Reply(status=0, body=b"the connection was closed without an answer")]


def _filled(value: Any, values: Mapping[str, str]) -> Any:
    """Replace each @NAME@ in the value's texts; pictures are bytes and stay as they are."""
    if isinstance(value, str):
        for name, text in values.items():
            value = value.replace(f"@{name}@", text)
        return value
    if isinstance(value, dict):
        return {key: _filled(item, values) for key, item in value.items()}
    return [_filled(item, values) for item in value] if isinstance(value, list) else value


def ask_side(side: Side, ask: material.Ask, number: int) -> list[diff.Reply]:
    """Return one side's answers to a question, in the order in which they came."""
    if ask.before is not None:
        ask.before(side.data)
    if ask.raw is not None:
        return _ask_raw(side, ask, ask.raw)
    headers = {"X-Request-Id": f"question-{number}", "Accept": "application/json"}
    body = ask.body
    if ask.tree is not None:
        media, body = material.encoded(_filled(ask.tree, side.values), ask.form)
        headers["Content-Type"] = media
    if ask.gzipped and body is not None:
        body = gzip.compress(body, 1, mtime=0)
        headers["Content-Encoding"] = "gzip"
    headers |= _filled(dict(ask.headers), side.values)
    path = _filled(ask.path, side.values)
    return [exchange(side.port, ask.method, path, headers, body, ask.chunk) for _ in range(ask.times)]


def _ask_raw(side: Side, ask: material.Ask, raw: bytes) -> list[diff.Reply]:
    replies: list[diff.Reply] = []
    for _ in range(_ATTEMPTS if ask.until else 1):
        with contextlib.ExitStack() as held:
            for _ in range(ask.held_count):
                waiting = held.enter_context(socket.create_connection(("127.0.0.1", side.port), timeout=RAW_LIMIT_S))
                waiting.sendall(ask.held or b"")
            if ask.held_count:
                time.sleep(_PAUSE_S)
            replies = raw_exchange(side.port, raw)
        if ask.held_count:
            time.sleep(_PAUSE_S)
        if not ask.until or replies[0].status == ask.until:
            break
    return replies


# ---------------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True, kw_only=True)
class Result:
    """One question, and its differences."""

    group: str
    name: str
    differences: Sequence[diff.Difference]
    answer: str = ""  # the old server's answer, in short
    seconds: float = 0.0  # time that both servers took

    @property
    def verdict(self) -> Verdict:
        """Return the worst of the differences."""
        if not self.differences:
            return "same"
        return "different" if any(one.kind == "different" for one in self.differences) else "words"


@dataclass
class Report:
    """Every question asked, in order."""

    results: list[Result] = field(default_factory=list)
    requests: int = 0
    poses: int = 0  # poses that the old version found

    def add(
        self, group: str, name: str, found: Iterable[diff.Difference], answer: str = "", seconds: float = 0.0
    ) -> None:
        """Record one result, and show it if there are differences."""
        result = Result(group=group, name=name, differences=list(found), answer=answer, seconds=round(seconds, 3))
        self.results.append(result)
        if result.verdict != "same":
            print(f"{result.verdict:>9}  {group}: {name}" + (f"  [{answer}]" if answer else ""))
            for one in result.differences[:12]:
                print(f"           {one.where}\n             old: {one.old}\n             new: {one.new}")
            if len(result.differences) > 12:
                print(f"           ... and {len(result.differences) - 12} more")

    def table(self) -> str:
        """Tabulate groups by verdicts."""
        groups = list(dict.fromkeys(result.group for result in self.results))
        counted = [(group, Counter(one.verdict for one in self.results if one.group == group)) for group in groups]
        counted.append(("all", Counter(one.verdict for one in self.results)))
        width = max(len(group) for group, _ in counted)
        lines = [f"{'':{width}}  {'asked':>6} {'same':>6} {'words':>6} {'different':>9}"]
        for group, count in counted:
            same, words, different = (count[verdict] for verdict in get_args(Verdict))
            lines.append(f"{group:{width}}  {count.total():>6} {same:>6} {words:>6} {different:>9}")
        return "\n".join(lines)

    def as_json(self, options: Mapping[str, Any], seconds: float) -> bytes:
        """Return everything, for a machine."""
        results = [asdict(result) | {"verdict": result.verdict} for result in self.results]
        tree: dict[str, Any] = {"options": options, "requests": self.requests, "poses": self.poses}
        tree |= {"seconds": round(seconds, 1), "passed": self.passed, "results": results}
        return json.dumps(tree, indent=1).encode()

    @property
    def passed(self) -> bool:
        """Return True if nothing but words differs."""
        return bool(self.results) and all(result.verdict != "different" for result in self.results)


class Comparison:
    """Runs the same steps on two sides, one step after another."""

    def __init__(self, old: Side, new: Side, report: Report, ism: IsmServer, exact: Iterable[str] = ()) -> None:
        self.sides = (old, new)
        self._report = report
        self._ism = ism
        self._exact = frozenset(exact)
        for side in self.sides:
            side.values["DATA"] = str(side.data)

    def run(self, steps: Iterable[material.Step]) -> None:
        """Run every step."""
        for step in steps:
            if isinstance(step, material.Command):
                self._command(step)
            else:
                self._ask(step)

    def _ask(self, ask: material.Ask) -> None:
        self._report.requests += ask.times
        begun = time.monotonic()
        answers, asked = [], []
        for side in self.sides:
            self._ism.begin(ask.ism)
            answers.append(ask_side(side, ask, self._report.requests))
            self._ism.over.set()
            asked.append([[dict(sorted(_ism_headers(headers).items())), body] for headers, body in self._ism.asked])
        readings = self._readings(ask)
        old, new = answers
        found: list[diff.Difference] = []
        if len(old) != len(new):
            found.append(diff.Difference(where="answers on the connection", old=str(len(old)), new=str(len(new))))
        for before, after in zip(old, new, strict=False):
            found += diff.compare_replies(before, after, *readings)
        if ask.asks_ism:
            found += diff.compare_trees(asked[0], asked[1], *readings, "asked of the ISM server")
        if ask.files:
            folders = [side.data / "outputs" / ask.files for side in self.sides]
            found += diff.compare_folders(folders[0], folders[1], *readings)[1]
        if ask.remember:
            for side, replies in zip(self.sides, answers, strict=True):
                side.values[ask.remember] = _remembered(replies[-1], "object_id")
        self._report.poses += sum(_poses(reply) for reply in old)
        shown = ", ".join(_in_short(reply) for reply in old)
        self._report.add(ask.group, ask.name, found, shown, time.monotonic() - begun)

    def _readings(self, ask: material.Ask | None = None) -> tuple[diff.Reading, diff.Reading]:
        old, new = self.sides
        return old.reading(ask, self._exact), new.reading(ask, self._exact)

    def _command(self, command: material.Command) -> None:
        done = [side.run(command.arguments) for side in self.sides]
        readings = self._readings()
        found = []
        if done[0].returncode != done[1].returncode:
            codes = [str(one.returncode) for one in done]
            found.append(diff.Difference(where="exit code", old=codes[0], new=codes[1]))
        outputs = [_tree_or_message(one.stdout) for one in done]
        found += diff.compare_trees(outputs[0], outputs[1], *readings, "standard output")
        errors = [{"message": one.stderr.strip()} for one in done]
        found += diff.compare_trees(errors[0], errors[1], *readings, "standard error")
        if command.remember:
            for side, output in zip(self.sides, outputs, strict=True):
                side.values[command.remember] = str(output.get("key", "")) if isinstance(output, dict) else ""
        name = f"pem {' '.join(command.arguments)}"
        self._report.add(command.group, name, found, f"exit code {done[0].returncode}")

    def compare_data(self) -> None:
        """Compare what both have on disk once they are stopped."""
        folders = [side.data for side in self.sides]
        readings = self._readings()
        count, found = diff.compare_folders(folders[0], folders[1], *readings, leave_out=_NOT_COMPARED)
        wrong = {one.where for one in found}
        for one in found:
            self._report.add("files on disk", one.where, [one])
        self._report.add("files on disk", f"{count - len(wrong)} other files", [])


def _ism_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers to the ISM server that are compared."""
    kept = {name.lower(): value for name, value in headers.items()}
    values = ("content-type", "x-request-id", "accept")
    return {name: value if name in values else "(any)" for name, value in kept.items()}


def _remembered(reply: diff.Reply, key: str) -> str:
    with contextlib.suppress(msgspec.DecodeError):
        tree = msgspec.json.decode(reply.body)
        if isinstance(tree, dict):
            return str(tree.get(key, "unknown"))
    return "unknown"


def _tree_or_message(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {"message": text.strip()}


def _tree(reply: diff.Reply) -> Any:
    """Return a reply's body; None if it is no tree."""
    with contextlib.suppress(msgspec.DecodeError):
        is_packed = reply.content_type == material.MSGPACK
        return msgspec.msgpack.decode(reply.body) if is_packed else msgspec.json.decode(reply.body)
    return None


def _poses(reply: diff.Reply) -> int:
    """Count the poses of a reply, in either dialect."""
    tree = _tree(reply)
    if not isinstance(tree, dict):
        return 0
    rows = [row for row in tree.get("poses", []) if row.get("rotation") is not None]
    return len(rows) + len(tree.get("pred_rot", []))


def _in_short(reply: diff.Reply) -> str:
    """Return status and error code of a reply."""
    tree = _tree(reply)
    error = tree.get("error") if isinstance(tree, dict) else None
    return f"{reply.status} {error.get('code')}" if isinstance(error, dict) else str(reply.status)


# --------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The choices of the command line."""

    old: Path
    new: Path
    folder: Path  # for all files that are made
    groups: frozenset[str]  # empty: all

    def pair(self, name: str, settings: Mapping[str, str]) -> tuple[Side, Side]:
        """Make two sides with these settings, whose paths have the same length."""
        old = Side(label="old", checkout=self.old, data=self.folder / f"{name}-old", settings=settings)
        return old, Side(label="new", checkout=self.new, data=self.folder / f"{name}-new", settings=settings)

    def chosen(self, steps: Iterable[material.Step]) -> list[material.Step]:
        """Return the steps of the chosen groups, with the steps that these need."""
        kept = self.groups
        return [step for step in steps if not kept or step.group in kept or step.remember]


def compare_requests(plan: Plan, report: Report, ism: IsmServer) -> None:
    """Compare every form of a request and every failure, on two pairs of servers."""
    settings = {name: value.format(ism=ism.url) for name, value in material.QUESTIONS_SETTINGS.items()}
    for name, values, steps in (
        ("servers", settings, requests.questions()),
        ("servers with tight limits", material.LIMITS_SETTINGS, requests.limits()),
    ):
        wanted = plan.chosen(steps)
        if plan.groups and not any(step.group in plan.groups for step in wanted):
            continue
        comparison = Comparison(*plan.pair(name.replace(" ", "-"), values), report, ism)
        with running(comparison.sides, report, name):
            comparison.run(wanted)
        if name == "servers":
            keep = plan.folder / "stored"
            shutil.copytree(comparison.sides[0].data, keep, symlinks=True, ignore=shutil.ignore_patterns("logs"))
            (plan.folder / "stored-key").write_text(comparison.sides[0].values.get("KEY:stored", ""))
        comparison.compare_data()


def compare_stored(plan: Plan, report: Report, ism: IsmServer, data: Path | None) -> None:
    """Serve what an old server left with both versions: `data`, or the data of the requests' old server."""
    source = data or plan.folder / "stored"
    comparison = Comparison(*plan.pair("stored-data", {}), report, ism, exact=_OF_THE_STORE)
    key_file = plan.folder / "stored-key"
    key = key_file.read_text() if data is None and key_file.exists() else ""
    ignored = shutil.ignore_patterns("logs", ".lock", "stderr.log", *(["keys.json"] if data is not None else []))
    for side in comparison.sides:
        shutil.copytree(source, side.data, symlinks=True, ignore=ignored)
        side.values["KEY:stored"] = key
    before = diff.digests(comparison.sides[0].data / "objects")
    old = comparison.sides[0]
    with running(comparison.sides, report, "servers of stored data"):
        reply = exchange(old.port, "GET", material.OBJECTS, {"X-API-Key": key} if key else {})
        objects = msgspec.json.decode(reply.body).get("objects", []) if reply.status == 200 else []
        waiting = [one["object_id"] for one in objects if one.get("status") == "onboarding"]
        names = [one.get("name") or one["object_id"] for one in objects if one.get("status") == "ready"]
        if not names or waiting:
            why = diff.Difference(
                where="objects of the old server", old=f"{len(names)} ready", new=f"{waiting} are not"
            )
            report.add("stored data", "objects to compare", [why])
        comparison.run(requests.stored(names, keyed=bool(key)))
    touched = diff.untouched(before, comparison.sides[1].data / "objects")
    report.add("stored data", f"{len(before)} files of objects untouched by the new server", touched)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit code."""
    options = _parser().parse_args(arguments)
    if options.data_only and options.data is None:
        _parser().error("--data-only needs --data: there is no old server's data directory otherwise")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are also stopped then
    begun = time.monotonic()
    report = Report()
    folder = Path(options.work or tempfile.mkdtemp(prefix="pem-versions-"))
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        old=options.old.resolve(), new=options.new.resolve(), folder=folder.resolve(), groups=frozenset(options.groups)
    )
    try:
        for side in plan.pair("none", {}):
            for name in side.check_imports():
                print(f"note: the {side.label} version would import {name} from outside of its checkout")
        with IsmServer() as ism:
            if not options.data_only:
                compare_requests(plan, report, ism)
            if not options.requests_only and (options.data or not plan.groups):
                compare_stored(plan, report, ism, options.data.resolve() if options.data else None)
    except CannotRun as error:
        report.add("start and stop", str(error), [diff.Difference(where="cannot run", old="", new=str(error))])
    finally:
        if not options.keep and options.work is None:
            shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - begun
    print(f"\n{report.table()}\n")
    print(f"{report.requests} requests to each version, {report.poses} poses found by the old one, {seconds:.0f} s")
    print("nothing but words differs" if report.passed else "the versions DIFFER")
    if options.json:
        told = {name: str(value) for name, value in vars(options).items()}
        options.json.write_bytes(report.as_json(told, seconds))
    return 0 if report.passed else 1


def _parser() -> argparse.ArgumentParser:
    words, _, examples = (__doc__ or "").partition("\nExamples:\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.versions",
        description=words,
        epilog=f"Examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--old", type=Path, required=True, metavar="CHECKOUT", help="The version to compare with, its kernels built."
    )
    parser.add_argument(
        "--new", type=Path, required=True, metavar="CHECKOUT", help="The version in question, its kernels built."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write every question and difference there.")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--requests-only", action="store_true", help="Leave out the stored data.")
    parts.add_argument("--data-only", action="store_true", help="Only the stored data, which --data names.")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="A data directory that an old server left; copies of it are served, without its keys. "
        "Default: the one that the old version makes during the requests.",
    )
    parser.add_argument(
        "--groups", nargs="+", default=[], metavar="GROUP", help="Ask only these groups of requests (see the table)."
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="An empty folder to work in, which stays.")
    parser.add_argument("--keep", action="store_true", help="Keep the temporary folder, with the servers' logs.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
