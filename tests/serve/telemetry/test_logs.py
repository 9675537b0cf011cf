"""The log: the form of a line, the secrets that never get into it, and a log that cannot be written."""

from __future__ import annotations

import io
import json
import logging
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pem.contract import Timing
from serve.settings import Log
from serve.telemetry import logs
from serve.telemetry.logs import RotatingFile

Lines = Callable[[], list[dict[str, Any]]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def lines(tmp_path: Path, stream: io.StringIO) -> Iterator[Lines]:
    """Log at level debug; give a function that returns the lines in the file so far."""
    logs.configure(Log(level="debug"), tmp_path, stream=stream)

    def read() -> list[dict[str, Any]]:
        assert logs.flush()
        return [json.loads(line) for line in (tmp_path / "logs" / "pem.log").read_text().splitlines()]

    yield read
    logs.shutdown()


def request(**fields: Any) -> None:
    usual = {
        "request_id": "r-1",
        "method": "POST",
        "route": "/api/v1/pose_estimation",
        "status": 200,
        "seconds": 0.18234,
    }
    logs.log_request(**(usual | fields))


# ------------------------------------------------------------------------------------------------------- request lines


def test_a_request_is_one_line_with_everything(lines: Lines) -> None:
    timing = Timing(decode_ms=10.04, queue_ms=1.0, pose_ms=100.0, batch_detections=12, batch_requests=3)
    request(detections=12, poses=11, release="r1", engine="geometric", timing=timing)
    (line,) = lines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert line == {
        "level": "info",
        "event": "request",
        "id": "r-1",
        "method": "POST",
        "route": "/api/v1/pose_estimation",
        "status": 200,
        "ms": 182.3,
        "detections": 12,
        "poses": 11,
        "engine": "geometric",
        "release": "r1",
        "timing": {"decode_ms": 10.0, "queue_ms": 1.0, "pose_ms": 100.0, "batch_detections": 12, "batch_requests": 3},
    }


@pytest.mark.parametrize(
    "quiet, status, level",
    [
        (None, 200, "info"),
        (None, 422, "info"),
        (None, 429, "warning"),
        (None, 503, "warning"),
        (None, 500, "error"),
        ("probe", 200, "debug"),
        ("probe", 503, "debug"),
        ("probe", 500, "error"),
        ("probe", 401, "info"),
        ("watch", 200, "debug"),
        ("watch", 404, "info"),
        ("watch", 503, "warning"),
    ],
)
def test_the_level_says_whether_an_operator_should_look(
    lines: Lines, quiet: logs.Quiet, status: int, level: str
) -> None:
    request(quiet=quiet, status=status)
    assert lines()[0]["level"] == level


def test_the_level_of_the_settings_is_honoured(tmp_path: Path, stream: io.StringIO) -> None:
    logs.configure(Log(level="warning"), tmp_path, stream=stream)
    request()
    request(status=500)
    logs.shutdown()
    assert len(stream.getvalue().splitlines()) == 1


def test_a_request_line_costs_the_caller_less_than_a_tenth_of_a_millisecond_of_cpu(lines: Lines) -> None:
    timing = {"decode_ms": 10.0, "queue_ms": 1.0, "pose_ms": 100.0, "batch_detections": 12, "batch_requests": 3}
    best = float("inf")
    for _ in range(5):
        started = time.thread_time()
        for _ in range(200):
            request(detections=12, poses=11, release="r1", engine="geometric", timing=timing)
        best = min(best, (time.thread_time() - started) / 200)
    assert len(lines()) == 1000
    assert best < 100e-6


# --------------------------------------------------------------------------------------------------------------- forms


def test_what_is_no_terminal_gets_json(lines: Lines, stream: io.StringIO) -> None:
    request()
    assert lines() == [json.loads(stream.getvalue())]


def test_a_terminal_gets_aligned_columns_in_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    logs.configure(Log(), tmp_path, stream=terminal)
    timing = {"decode_ms": 12.4, "queue_ms": 0.0, "pose_ms": 140.6, "respond_ms": 0.0, "total_ms": 160.0}
    request(detections=12, poses=11, timing=timing, client="key robot-1")
    request(route="/api/v1/objects", status=404, error="unknown_object")
    logs.shutdown()
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in terminal.getvalue().splitlines()]
    assert "\x1b[" in terminal.getvalue()
    assert [line[12:] for line in plain] == [
        " [info     ] 200  POST    /api/v1/pose_estimation       182.3 ms "
        "id=r-1 detections=12 poses=11 decode_ms=12.4 pose_ms=140.6 total_ms=160.0",
        " [info     ] 404  POST    /api/v1/objects               182.3 ms id=r-1 error=unknown_object",
    ]


def test_the_console_form_is_plain_where_nobody_can_see_colour(tmp_path: Path, stream: io.StringIO) -> None:
    logs.configure(Log(format="console", file=False), tmp_path, stream=stream)
    logs.get().info("ready", seconds=1.5, why="all warm")
    logs.shutdown()
    assert stream.getvalue()[12:] == " [info     ] ready                          seconds=1.5 why='all warm'\n"
    assert not (tmp_path / "logs").exists()


def test_json_can_be_asked_for_on_a_terminal(tmp_path: Path) -> None:
    terminal = Terminal()
    logs.configure(Log(format="json"), tmp_path, stream=terminal)
    request()
    logs.shutdown()
    assert json.loads(terminal.getvalue())["event"] == "request"


def test_no_field_can_steer_the_terminal_or_forge_a_line(tmp_path: Path, stream: io.StringIO) -> None:
    logs.configure(Log(format="console"), tmp_path, stream=stream)
    evil = "\x1b[2J\u202e\r\n12:00:00.000 [error    ] forged"
    logs.get().info(evil, name=evil, bare=evil.split()[0], deep=[{evil: evil}], **{evil: 1})
    logs.get(source=evil, stage=evil).info("raised", traceback=f"Traceback\n  {evil}")
    logs.log_request(request_id="r-1", method=evil, route=evil, status=404, seconds=0.1, error=evil)
    logs.shutdown()
    text = stream.getvalue()
    assert not re.search(r"[\x1b\r\u202e]", text)
    assert [line for line in text.splitlines() if line.startswith("12:00")] == []
    assert text.count("\n") == 1 + 4 + 1


def test_an_exception_brings_its_traceback(lines: Lines, stream: io.StringIO) -> None:
    try:
        raise ValueError("a bad thing")
    except ValueError:
        logs.get(id="r-1").exception("internal_error")
    (line,) = lines()
    assert line["level"] == "error"
    assert line["traceback"].startswith("Traceback")
    assert "ValueError: a bad thing" in line["traceback"]


def test_what_json_cannot_hold_is_written_all_the_same(lines: Lines) -> None:
    logs.get().info("odd", half="\ud800", path=Path("/x"), number=float("nan"), deep=[[[[[[[1]]]]]]], keys={1: 2})
    (line,) = lines()
    assert line["path"] == "/x"
    assert line["keys"] == {"1": 2}


def test_libraries_speak_in_our_form(lines: Lines) -> None:
    logging.getLogger("aiohttp.client").warning("unclosed %s", "session")
    logging.getLogger("aiohttp.client").log(35, "a level of its own")
    line, other = lines()
    assert (line["event"], line["logger"], line["level"]) == ("unclosed session", "aiohttp.client", "warning")
    assert (other["event"], other["level"]) == ("a level of its own", "warning")


def test_a_backends_line_may_have_any_fields(lines: Lines) -> None:
    logs.forward_line(b'{"event": "odd", "level": "warning", "method_name": "x", "self": 1, "stage": "pose"}')
    (line,) = lines()
    assert (line["event"], line["stage"]) == ("odd", "pose")


def test_an_event_that_the_console_cannot_show_is_told_as_json(tmp_path: Path) -> None:
    terminal = Terminal()
    logs.configure(Log(file=False), tmp_path, stream=terminal)
    logs.get().warning("request", status=200, timing=None)
    assert logs.flush()
    logs.shutdown()
    assert json.loads(terminal.getvalue())["status"] == 200


def test_logging_again_with_other_settings_loses_nothing(tmp_path: Path, stream: io.StringIO) -> None:
    logs.configure(Log(), tmp_path, stream=stream)
    kept = logs.get()
    kept.info("one")
    logs.configure(Log(format="console"), tmp_path, stream=stream)
    logs.get().info("two")
    logs.shutdown()
    assert [json.loads(line)["event"] for line in (tmp_path / "logs" / "pem.log").read_text().splitlines()] == [
        "one",
        "two",
    ]


# ------------------------------------------------------------------------------------------------ what never gets there


def test_keys_are_blanked_by_name_and_by_shape(lines: Lines) -> None:
    secret = "pem_4f9c1d2e3aDb-x_Yw7Kq"
    logs.get().warning(
        f"refused Bearer {secret}",
        authorization=f"Bearer {secret}",
        api_key=secret,
        query=f"wait=3&key={secret}",
        headers={"X-API-Key": secret, "Cookie": secret, "Accept": "*/*"},
        url=f"http://user:{secret}@ism:8000/x",
    )
    (line,) = lines()
    assert secret not in json.dumps(line)
    assert line["headers"] == {"X-API-Key": "[redacted]", "Cookie": "[redacted]", "Accept": "*/*"}
    assert line["url"] == "http://[redacted]@ism:8000/x"


def test_pictures_never_get_into_the_log(lines: Lines) -> None:
    picture = "iVBORw0KGgo" * 100
    logs.get().info(
        "odd",
        rgb_image=b"\x89PNG" * 1000,
        body={"rgb_image": picture, "masks": [picture]},
        depth=np.zeros((480, 640), np.uint16),
        text=f"cannot decode {picture}",
        many=list(range(10_000)),
    )
    (line,) = lines()
    assert line["rgb_image"] == "<4000 bytes>"
    assert line["body"] == {"rgb_image": "<1100 characters>", "masks": ["<1100 characters>"]}
    assert line["depth"] == "<uint16 array (480, 640)>"
    assert line["text"] == "cannot decode <1100 characters>"
    assert len(json.dumps(line)) < 2000


def test_long_texts_are_cut_in_the_middle(lines: Lines) -> None:
    logs.get().info("long", text="a word " * 100_000, traceback="line of it\n" * 100)
    (line,) = lines()
    assert len(line["text"]) < 2100
    assert "700000 characters" in line["text"]
    assert line["traceback"].count("\n") == 100


# ------------------------------------------------------------------------------------------------- lines of the backend


def forwarded(lines: Lines, line: bytes) -> dict[str, Any]:
    logs.forward_line(line)
    (got,) = lines()
    return got


def test_a_workers_line_keeps_its_level_stage_pid_and_time(lines: Lines) -> None:
    line = (
        b'{"level": "error", "event": "internal_error", "stage": "pose", "pid": 7, "time": 1750000000.25, "part": "p"}'
    )
    assert forwarded(lines, line) == {
        "timestamp": "2025-06-15T15:06:40.250Z",
        "level": "error",
        "event": "internal_error",
        "source": "worker",
        "stage": "pose",
        "pid": 7,
        "part": "p",
    }


def test_a_line_of_mosecs_front_is_told_with_its_fields(lines: Lines) -> None:
    line = (
        b'{"timestamp":"2026-11-21T06:10:09.549220Z","level":"WARN","target":"mosec::protocol:155","fields":{"code":'
        b'"InternalError","connection_id":"1","ids":"[4]","message":"abnormal tasks","stage_name_label":"A_1"}}'
    )
    got = forwarded(lines, line)
    assert (got["level"], got["event"], got["source"]) == ("warning", "abnormal tasks", "mosec")
    assert (got["code"], got["target"]) == ("InternalError", "mosec::protocol:155")


def test_a_traceback_that_mosec_squeezed_into_a_line_is_an_error_with_a_traceback(lines: Lines) -> None:
    line = (
        rb'{"timestamp": "2026-11-21T06:10:09.549148Z ", "level": "WARNING", "fields": {"message": "Traceback (most '
        rb'recent call last):   File \"pose.py\", line 6, in forward     raise RuntimeError(1) RuntimeError: bug "}, '
        rb'"target": "mosec::coordinator.py:coordinate"}'
    )
    got = forwarded(lines, line)
    assert (got["level"], got["event"]) == ("error", "stage_raised")
    assert got["traceback"].endswith("RuntimeError: bug")


@pytest.mark.parametrize(
    "message",
    [
        b"<A_1|1> socket connected to /tmp/x.socket",
        b"begin listening to socket",
        b"service received terminate signal",
        b"mosec service halted with signal [-15]",
        b"<A_1|1> failed to read from socket: unpack requires a buffer of 2 bytes",
    ],
)
def test_mosecs_ordinary_chatter_is_debug(lines: Lines, message: bytes) -> None:
    got = forwarded(lines, b'{"level": "ERROR", "fields": {"message": "' + message + b'"}, "target": "mosec"}')
    assert (got["level"], got["source"]) == ("debug", "mosec")


@pytest.mark.parametrize("line", [b"Traceback (most recent call last):", b"{broken", b'{"a": 1}', b"\xff\xfe", b"[1]"])
def test_any_other_line_is_a_warning_with_its_text(lines: Lines, line: bytes) -> None:
    got = forwarded(lines, line + b"\n")
    assert (got["level"], got["event"], got["source"]) == ("warning", "output", "mosec")
    assert got["text"]


def test_empty_lines_are_nothing_and_odd_ones_do_no_harm(lines: Lines) -> None:
    for line in (b"", b"\n", b'{"event": "x", "level": 7, "time": "soon", "self": 1, "source": 2}', b"x" * 10_000_000):
        logs.forward_line(line)
    first, second = lines()
    assert (first["event"], first["level"], first["source"]) == ("x", "info", "worker")
    assert len(second["text"]) < 2100


# ------------------------------------------------------------------------------------------------------------- the file


def test_the_file_rotates_and_keeps_so_many(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "logs" / "pem.log", limit_bytes=100, files=3)
    for number in range(20):
        file.write(b'{"n": 1%02d, "pad": "................"}\n' % number)
    file.close()
    names = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert names == ["pem.log", "pem.log.1", "pem.log.2"]
    kept = "".join((tmp_path / "logs" / name).read_text() for name in reversed(names))
    assert [json.loads(line)["n"] for line in kept.splitlines()] == [114, 115, 116, 117, 118, 119]
    assert all(path.stat().st_size <= 100 for path in (tmp_path / "logs").iterdir())


def test_a_single_file_starts_anew_and_an_old_one_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "pem.log"
    path.write_text("0123456789\n")
    file = RotatingFile(path, limit_bytes=20, files=1)
    file.write(b"first\n")
    assert path.read_text() == "0123456789\nfirst\n"
    file.write(b"second\n")
    file.close()
    assert path.read_text() == "second\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here to stand for a full disk")
def test_a_full_disk_is_said_once_and_the_console_goes_on(tmp_path: Path, stream: io.StringIO) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "pem.log").symlink_to("/dev/full")
    logs.configure(Log(), tmp_path, stream=stream)
    for number in range(5):
        logs.get().info("event", number=number)
    assert logs.flush()
    assert logs.dropped_lines() == 5
    logs.shutdown()
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in said].count("log_file_not_written") == 1
    assert [line["number"] for line in said if line["event"] == "event"] == [0, 1, 2, 3, 4]


def test_a_line_that_the_disk_takes_in_part_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "pem.log"
    file = RotatingFile(path, limit_bytes=1000, files=2)
    assert file.write(b"whole\n") is None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # Python ignores SIGXFSZ
    try:
        assert isinstance(file.write(b"partly\n"), OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "whole\n"
    file.write(b"again\n")
    file.close()
    assert [line for line in path.read_text().splitlines() if not line.startswith("{")] == ["whole", "again"]


def test_lines_that_find_the_queue_full_are_counted_and_told(
    tmp_path: Path, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, may_go_on = threading.Event(), threading.Event()

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            written.set()
            assert may_go_on.wait(60)
            return super().write(text)

    monkeypatch.setattr(logs, "_WAITING_LINES", 2)
    terminal = Slow()
    logs.configure(Log(format="json"), tmp_path, stream=terminal)
    logs.get().info("event", number=0)
    assert written.wait(60)
    for number in range(1, 6):  # two have room
        logs.get().info("event", number=number)
    assert logs.dropped_lines() == 3
    may_go_on.set()
    logs.shutdown()
    for text in (terminal.getvalue(), (tmp_path / "logs" / "pem.log").read_text()):
        lines = [json.loads(line) for line in text.splitlines()]
        assert [line["number"] for line in lines if line["event"] == "event"] == [0, 1, 2]
        assert [line["lines"] for line in lines if line["event"] == "log_lines_missing"] == [3]


def test_a_terminal_that_is_stuck_holds_up_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on = threading.Event()

    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            assert may_go_on.wait(60)
            return 0

    monkeypatch.setattr(logs, "_FLUSH_S", 0.1)
    logs.configure(Log(), tmp_path, stream=Stuck())
    logs.get().info("event")
    assert not logs.flush(0.05)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "log"]
    logs.shutdown()
    assert thread.is_alive()
    may_go_on.set()
    thread.join(60)


def test_when_there_is_room_again_the_file_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    file = RotatingFile(tmp_path / "logs" / "pem.log", limit_bytes=1000, files=2)
    assert isinstance(file.write(b"{}\n"), OSError)
    assert file.write(b"{}\n") is None  # said once
    assert file.dropped == 2
    (tmp_path / "logs").unlink()
    file.write(b'{"event": "back"}\n')
    file.close()
    first, second = (json.loads(line) for line in (tmp_path / "logs" / "pem.log").read_text().splitlines())
    assert (first["event"], first["lines"]) == ("log_lines_missing", 2)
    assert second == {"event": "back"}


def test_a_broken_stream_is_no_trouble_for_the_caller(tmp_path: Path) -> None:
    stream = io.StringIO()
    stream.close()
    logs.configure(Log(), tmp_path, stream=stream)
    logs.get().info("event")
    logs.shutdown()
    assert json.loads((tmp_path / "logs" / "pem.log").read_text())["event"] == "event"
