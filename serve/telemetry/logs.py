"""The log: one line for each request, one for each event; the console for people, JSON lines in a file for machines.

Callers only build a small dictionary. A separate thread writes it, so that neither a slow terminal nor a slow or full
disk delays the event loop. Lines that cannot be written are counted; standard error says so once, and the log says how
many are missing as soon as there is room.

No secret and no picture reaches the log: keys are blanked by name and by pattern, bytes become their length, long texts
are cut.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Final, Literal, TextIO, cast

import msgspec
import structlog
from structlog.typing import EventDict, WrappedLogger

from serve.settings import Log

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_ALIASES: Final = {"trace": 10, "warn": 30, "fatal": 50}  # in lines of other programs
_WAITING_LINES: Final = 20_000  # between the callers and the writing thread
_FLUSH_S: Final = 3.0  # limit of shutdown() and of flush()


def configure(log: Log, data_path: Path, *, stream: TextIO | None = None) -> None:
    """Start logging to `stream` (default: standard error) and, unless switched off, `<data_path>/logs/pem.log`.

    May be called again with other settings: earlier lines are written first.
    """
    global _writer
    shutdown()
    stream = sys.stderr if stream is None else stream
    on_terminal = False
    with contextlib.suppress(AttributeError, ValueError):  # standard error may be missing or closed
        on_terminal = stream.isatty()
    as_json = log.format == "json" or (log.format == "auto" and not on_terminal)
    console = None if as_json else Console(color=on_terminal and not os.environ.get("NO_COLOR"))
    file = RotatingFile(data_path / "logs" / "pem.log", log.file_mb * 2**20, log.files) if log.file else None
    _writer = writer = _Writer(stream, console, file)
    structlog.configure(
        processors=[structlog.processors.add_log_level, _stamp, _exception, redact],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[log.level]),
        logger_factory=lambda *_: writer,
        cache_logger_on_first_use=False,
    )
    _undo.callback(structlog.reset_defaults)
    root, level, handler = logging.getLogger(), LEVELS[log.level], _Stdlib()
    _undo.callback(root.setLevel, root.level)
    _undo.callback(root.removeHandler, handler)
    root.addHandler(handler)
    root.setLevel(level if level <= logging.DEBUG else max(level, logging.WARNING))  # libraries: no chatter


def shutdown() -> None:
    """Write the waiting lines, stop, and restore the earlier logging."""
    global _writer
    writer, _writer = _writer, None
    if writer is not None:
        _undo.close()
        writer.close()


def flush(timeout_s: float = _FLUSH_S) -> bool:
    """Wait until all lines so far are written; return False if that takes longer than `timeout_s`."""
    return _writer is None or _writer.flush(timeout_s)


def get(**fields: Any) -> structlog.typing.FilteringBoundLogger:
    """Return a logger that adds `fields` to its lines: `get(track="production").warning("worker_lost", pid=7)`."""
    return cast(structlog.typing.FilteringBoundLogger, structlog.get_logger(**fields))


def dropped_lines() -> int:
    """Return the number of lines lost since the start."""
    return _writer.dropped if _writer is not None else 0


# ------------------------------------------------------------------------------------------------------- what we log

#: Routes whose request lines have level debug. "probe": machines ask every few seconds; a 503 ("not yet") is debug too.
#: "watch": clients ask again and again while something is in progress; only successes are debug. None: never debug.
Quiet = Literal["probe", "watch"] | None


def log_request(
    *,
    request_id: str,
    method: str,
    route: str,
    status: int,
    seconds: float,
    detections: int | None = None,
    poses: int | None = None,
    release: str | None = None,
    engine: str | None = None,
    timing: Mapping[str, Any] | msgspec.Struct | None = None,
    error: str | None = None,
    quiet: Quiet = None,
    **fields: Any,
) -> None:
    """Write the one line of a request.

    detections: how many were sent; poses: how many of them were solved; timing: the answer's receipt; error: its code.
    Other fields (an error's detail and field, the client, the trace's id) are added unless they are None.
    Level: error for 500, warning for 429 and other 5xx, else info; `quiet` may lower it to debug.
    """
    level = "error" if status == 500 else "warning" if status == 429 or status > 500 else "info"
    if quiet is not None and (status < 400 or (status == 503 and quiet == "probe")):
        level = "debug"
    line: dict[str, Any] = {"id": request_id, "method": method, "route": route, "status": status}
    line["ms"] = round(seconds * 1000, 1)
    for name, value in (("detections", detections), ("poses", poses), ("engine", engine), ("release", release)):
        if value is not None:
            line[name] = value
    if timing is not None:
        items = timing if isinstance(timing, Mapping) else msgspec.structs.asdict(timing)
        line["timing"] = {k: round(v, 1) if isinstance(v, float) else v for k, v in items.items() if v is not None}
    if error is not None:
        line["error"] = error
    line.update({name: value for name, value in fields.items() if value is not None})
    get().log(LEVELS[level], "request", **line)


#: Mosec's messages in normal operation: logged at level debug.
_NOISE: Final = re.compile(
    r"begin listening to socket|socket accepted connection|socket connected to|socket closed|http service is running"
    r"|received signum|received terminate signal|service shutdown complete|service halted normally|cleanup completed"
    r"|service halted with signal \[-15\]"
    r"|failed to read from socket: unpack requires|warmup successfully"
)
_LONGEST_LINE: Final = 65_536


def forward_line(line: bytes) -> None:
    """Log a line that the backend wrote on its standard error, at the level that it names.

    There are three kinds: our workers' JSON (`event`, `stage`, `pid`), Mosec's JSON from Rust and Python (`target`,
    `fields`), and plain text, such as a traceback from an interpreter that could not start.
    """
    line = line.strip()
    if not line:
        return
    document = _object(line)
    if document is not None and isinstance(event := document.pop("event", None), str):
        _forward("worker", str(document.pop("level", "info")), event, document, unix=document.pop("time", None))
    elif document is not None and isinstance(fields := document.get("fields"), dict):
        level = str(document.get("level", "INFO"))
        text = str(fields.pop("message", "")).strip()
        if _NOISE.search(text):
            level = "debug"
        fields["target"] = document.get("target")
        if text.startswith("Traceback "):  # Mosec puts it on one line
            level, text, fields["traceback"] = "error", "stage_raised", text.replace("   ", "\n  ")
        _forward("mosec", level, text or "event", fields)
    else:
        text = line[:_LONGEST_LINE].decode("utf-8", "replace")
        _forward("mosec", "warning", "output", {"text": text})


def _object(line: bytes) -> dict[str, Any] | None:
    if not line.startswith(b"{") or len(line) > 16 * _LONGEST_LINE:
        return None
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


_OURS: Final = frozenset({"source", "timestamp", "level", "event", "self", "method_name"})


def _forward(source: str, level: str, event: str, fields: Mapping[str, Any], unix: object = None) -> None:
    ours = {k: v for k, v in fields.items() if k not in _OURS}
    if isinstance(unix, (int, float)) and 0 < unix < 1e11:
        ours["timestamp"] = _iso(unix)
    get(source=source).log((LEVELS | _ALIASES).get(level.lower(), logging.INFO), event, **ours)


# -------------------------------------------------------------------------------------------------------- processors


def _iso(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _stamp(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Add the time in milliseconds. structlog's stamper writes six decimals, or none if they are all zero."""
    event.setdefault("timestamp", _iso(time.time()))
    return event


def _exception(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Turn `exc_info` (True, or an exception) into the text of its traceback."""
    event = structlog.processors.format_exc_info(logger, method, event)
    if "exception" in event:
        event["traceback"] = event.pop("exception")
    return event


_SECRET: Final = frozenset(
    ["authorization", "proxyauthorization", "apikey", "xapikey", "cookie", "setcookie", "password", "secret", "token"]
)
_LONGEST_TEXT: Final = 2000
_LONGEST_TRACEBACK: Final = 20_000
_MOST_ITEMS: Final = 100
_BEARER: Final = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_KEY: Final = re.compile(r"\bpem_[A-Za-z0-9_-]{16,}")  # as serve/gateway/keys.py makes them
_USERINFO: Final = re.compile(r"(?<=://)[^/\s@]+@")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]{256,}={0,2}")


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Return a copy without secrets and bulk, so that the caller may go on changing its own event."""
    return {key: _clean(key, value, 0) for key, value in event.items()}


def _clean(key: object, value: Any, depth: int) -> Any:
    kind = type(value)
    if kind in (int, float, bool) or value is None:
        return value
    if isinstance(key, str) and key.lower().replace("-", "").replace("_", "") in _SECRET:
        return "[redacted]"
    if isinstance(value, str):
        return _clean_text(str(value), _LONGEST_TRACEBACK if key == "traceback" else _LONGEST_TEXT)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    if depth > 4:
        return "…"
    if isinstance(value, Mapping):
        return {str(k)[:200]: _clean(k, v, depth + 1) for k, v in list(value.items())[:_MOST_ITEMS]}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_clean(None, item, depth + 1) for item in list(value)[:_MOST_ITEMS]]
        return [*items, f"… {len(value)} in all"] if len(value) > _MOST_ITEMS else items
    if isinstance(value, msgspec.Struct):
        return _clean(key, msgspec.structs.asdict(value), depth + 1)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"<{value.dtype} array {tuple(value.shape)}>" if value.shape else _clean(key, value.item(), depth + 1)
    return _clean_text(str(value), _LONGEST_TEXT)


def _clean_text(text: str, longest: int) -> str:
    size = len(text)
    if size > 10 * longest:  # do not search through megabytes
        text = text[: 5 * longest] + text[-5 * longest :]
    if size > 256:
        text = _BASE64.sub(lambda match: f"<{len(match[0])} characters>", text)
    if "://" in text:
        text = _USERINFO.sub("[redacted]@", text)
    if "pem_" in text:
        text = _KEY.sub("[redacted]", text)
    if " " in text:
        text = _BEARER.sub(r"\1 [redacted]", text)
    if len(text) > longest:
        text = f"{text[: longest // 2]}… {size} characters …{text[-longest // 2 :]}"
    return text


# ----------------------------------------------------------------------------------------------------------- writing


class _Writer:
    """A thread that writes log lines. structlog calls the methods named for levels.

    The standard library's QueueHandler and QueueListener do not serve here: a short line costs its caller 1.5 times as
    much, and stopping the listener waits for a stuck terminal for ever, or fails if the queue is full.
    """

    def __init__(self, stream: TextIO, console: Console | None, file: RotatingFile | None) -> None:
        self._stream = stream
        self._console = console
        self._file = file
        self._queue: queue.SimpleQueue[EventDict | threading.Event | None] = queue.SimpleQueue()
        self._full = 0  # lines that found no room in the queue
        self._full_said = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        return self._full + (self._file.dropped if self._file is not None else 0)

    def put(self, /, **event: Any) -> None:
        """Queue an event. Never waits, never raises."""
        if self._closed:
            return
        if self._queue.qsize() < _WAITING_LINES:
            self._queue.put(event)
        else:
            self._full += 1

    debug = info = warning = warn = error = critical = fatal = exception = log = msg = put

    def flush(self, timeout_s: float) -> bool:
        done = threading.Event()
        self._queue.put(done)
        return done.wait(timeout_s)

    def close(self) -> None:
        self._closed = True
        self._queue.put(None)
        self._thread.join(_FLUSH_S)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            with contextlib.suppress(Exception):  # the log must never bring the server down
                self._write(item)
        if self._file is not None:
            self._file.close()

    def _write(self, event: EventDict) -> None:
        if (full := self._full) > self._full_said:
            missing, self._full_said = _missing(full - self._full_said), full
            self._write(missing)
        line = encode(event)
        if self._file is not None and (failure := self._file.write(line)) is not None:
            self._say(_full_disk(self._file.path, failure))
        self._say(event, line)

    def _say(self, event: EventDict, line: bytes | None = None) -> None:
        text = (line or encode(event)).decode()
        if self._console is not None:
            with contextlib.suppress(Exception):  # a field that the console cannot show: the JSON line instead
                text = self._console.render(event)
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


def encode(event: Mapping[str, Any]) -> bytes:
    """Return an event as one JSON line: time, level and event first."""
    ordered = {key: event[key] for key in ("timestamp", "level", "event") if key in event} | dict(event)
    try:
        return _encoder.encode(ordered) + b"\n"
    except (TypeError, ValueError):  # a text with half a surrogate pair, or a key that is not a string
        return json.dumps(ordered, default=str, skipkeys=True).encode() + b"\n"


_encoder = msgspec.json.Encoder(enc_hook=str)


def _full_disk(path: Path, failure: OSError) -> EventDict:
    return {
        "timestamp": _iso(time.time()),
        "level": "warning",
        "event": "log_file_not_written",
        "reason": failure.strerror,
        "file": str(path),
        "hint": "lines go to standard error only until there is room again",
    }


class RotatingFile:
    """`path`, then `path.1` to `path.<files - 1>`, newest first, each of at most `limit_bytes`.

    `write` never raises: a line that cannot be written whole is taken back and counted. Before the first line that can
    be written again comes one that says how many are missing. The standard library's RotatingFileHandler only does the
    renaming: on a full disk it leaves half a line and miscounts, and it never rotates a single file.
    """

    def __init__(self, path: Path, limit_bytes: int, files: int) -> None:
        self.path = path
        self.dropped = 0
        self._limit = limit_bytes
        self._rotation = RotatingFileHandler(path, backupCount=files - 1, delay=True)
        self._file: io.FileIO | None = None
        self._size = 0
        self._missing = 0
        self._fails = False

    def write(self, line: bytes) -> OSError | None:
        """Append one line; rotate first if it would not fit. Returns an error if it is the first of a row of them."""
        fails, self._fails = self._fails, True
        try:
            if self._missing:
                self._append(encode(_missing(self._missing)))
                self._missing = 0
            self._append(line)
        except OSError as error:
            self.dropped += 1
            self._missing += 1
            return None if fails else error
        self._fails = False
        return None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None

    def _append(self, line: bytes) -> None:
        file = self._file or self._open()
        if self._size and self._size + len(line) > self._limit:
            self.close()
            self._rotate()
            file = self._open()
        written = file.write(line)
        if written < len(line):
            with contextlib.suppress(OSError):
                file.truncate(self._size)
            raise OSError(errno.ENOSPC, "the disk took only a part of a line")
        self._size += written

    def _open(self) -> io.FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = io.FileIO(self.path, "ab", opener=lambda path, flags: os.open(path, flags, 0o640))
        self._size = self._file.tell()
        return self._file

    def _rotate(self) -> None:
        if self._rotation.backupCount:
            self._rotation.doRollover()
        else:
            self.path.unlink(missing_ok=True)


def _missing(count: int) -> dict[str, Any]:
    return {"timestamp": _iso(time.time()), "level": "warning", "event": "log_lines_missing", "lines": count}


# ----------------------------------------------------------------------------------------------------------- console


class Console:
    """Lines for people: the hour, the level, what happened, and its fields; tracebacks below."""

    def __init__(self, *, color: bool) -> None:
        plain = structlog.dev.plain_traceback  # tracebacks are text already
        self._renderer = structlog.dev.ConsoleRenderer(colors=color, sort_keys=False, exception_formatter=plain)

    def render(self, event: Mapping[str, Any]) -> str:
        """Return an event as text with a final newline. No character in it can control the terminal."""
        shown = dict(event)
        shown["timestamp"] = str(event.get("timestamp", ""))[11:23]
        if event.get("event") == "request" and "status" in event:
            columns = (shown.pop("status"), shown.pop("method", ""), shown.pop("route", ""), shown.pop("ms", ""))
            shown["event"] = "{}  {:<6}  {:<24}  {:>9} ms".format(*map(str, columns))
            timing = shown.pop("timing", {})
            shown |= {name: value for name, value in timing.items() if value}
            for name in ("client", "trace_id"):  # only in the file: people see long runs of one client, and have the id
                shown.pop(name, None)
        elif "source" in event:
            shown["logger"] = f"{shown.pop('source')} {shown.pop('stage', '')}".rstrip()
        trace = str(shown.pop("traceback", "")).rstrip().splitlines()
        shown = {_printable(name): _printable(v) if isinstance(v, str) else v for name, v in shown.items()}
        if trace:
            shown["exception"] = "\n".join("    " + _printable(line) for line in trace)
        return self._renderer(None, "", shown) + "\n"


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# ------------------------------------------------------------------------------------------- other libraries' logging


class _Stdlib(logging.Handler):
    """Takes records of the standard library's logging into our log: warnings and errors; at level debug, everything."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a library's broken message is not our failure
            level = max((one for one in LEVELS.values() if one <= record.levelno), default=logging.DEBUG)
            get().log(level, record.getMessage(), logger=record.name, exc_info=record.exc_info)


_writer: _Writer | None = None
_undo: Final = contextlib.ExitStack()  # undoes what `configure` set up
atexit.register(shutdown)
