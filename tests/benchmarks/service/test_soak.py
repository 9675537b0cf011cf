"""The soak: its definition of a leak, and a short soak of a running server whose workers are killed."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import subprocess
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.running import Running
from benchmarks.service import checks, memory, soak
from pem.bench.mix import FORMATS, Load, Mix, prepare
from pem.bench.sample import Target
from pem.bench.server import register
from pem.wire import MSGPACK
from tests.running import RunningServer
from tests.serve.tiny import Asker

GATEWAY = 10


def snapshot(**changes: Any) -> soak.Snapshot:
    """Make a snapshot of a small server, unless `changes` say otherwise."""
    fields: dict[str, Any] = {
        "processes": Counter({"gateway": 1, "decode": 2, "pose": 1}),
        "zombies": 0,
        "open_files": {GATEWAY: 30, 11: 12},
        "files": Counter({"workers/pose-0.state": 1, "workers/decode-0.state": 1}),
        "series": frozenset({"a", 'b{code="200"}'}),
    }
    return soak.Snapshot(**(fields | changes))


def readings(late_mb: float = 100.0) -> list[memory.Reading]:
    """Make readings with a pose worker that is replaced halfway."""
    return [
        memory.Reading(
            when=float(second),
            resident_mb={("gateway", 1): 80.0, ("pose", 2 if second < 30 else 3): 100.0 if second < 30 else late_mb},
        )
        for second in range(60)
    ]


def seen(**changes: Any) -> soak.Seen:
    """Make a soak in which nothing went wrong, unless `changes` say otherwise."""
    fields: dict[str, Any] = {
        "requests": 500,
        "refused": 40,
        "kills": 3,
        "away_s": [2.0, 3.0, 2.5],
        "readings": readings(),
        "before": snapshot(),
        "halfway": snapshot().series,
        "after": snapshot(),
        "gateway": GATEWAY,
    }
    return soak.Seen(**(fields | changes))


def failures(one: soak.Seen, left_behind: list[str] | None = None) -> list[str]:
    return [check.what for check in soak.judged(one, left_behind or []) if not check.holds]


def test_a_soak_in_which_nothing_went_wrong_passes() -> None:
    assert failures(seen()) == []
    assert soak.details(seen(), []) == []


def test_fewer_open_files_and_less_memory_are_no_leak() -> None:
    assert failures(seen(after=snapshot(open_files={GATEWAY: 20, 11: 10}), readings=readings(60.0))) == []


@pytest.mark.parametrize(
    "changes, figure, words",
    [
        ({"wrong": 1}, "poses that are wrong under load alone", None),
        ({"changed": 1}, "rows that are others than when asked alone", None),
        ({"unexpected": Counter({"503 worker_lost": 2})}, "requests without their answer", "2 x 503 worker_lost"),
        ({"problems": ["a text: answered 500"]}, "other things that went wrong", "a text: answered 500"),
        ({"refused": 0}, "bad requests refused as they should be", None),
        ({"kills": 0}, "workers killed", None),
        (
            {"after": snapshot(processes=Counter({"gateway": 1, "decode": 3, "pose": 1}))},
            "processes more than before",
            "process decode (+1)",
        ),
        (
            {"after": snapshot(processes=Counter({"gateway": 1, "decode": 1, "pose": 1}))},
            "processes fewer than before",
            None,
        ),
        ({"after": snapshot(zombies=1)}, "zombies", "1 zombies"),
        (
            {"after": snapshot(open_files={GATEWAY: 45, 11: 12})},
            "files open in the gateway, more",
            "15 open files of the gateway",
        ),
        (
            {"after": snapshot(files=snapshot().files + Counter({"jobs/x": 1}))},
            "files more in the run directory",
            "file jobs/x (+1)",
        ),
        ({"readings": readings(115.0)}, "memory of pose (100 MB), growth in %", None),
        (
            {"after": snapshot(series=frozenset({"a", 'b{code="200"}', "c"}))},
            "series of /metrics more than halfway",
            "series c",
        ),
    ],
)
def test_each_fault_is_found_and_shown(changes: dict[str, Any], figure: str, words: str | None) -> None:
    one = seen(**changes)
    assert figure in failures(one)
    assert len(failures(one)) <= 2, "the gateway's files are among all files"
    assert soak.details(one, []) == ([words] if words else [])


@pytest.mark.parametrize("late_mb, holds", [(8.5, True), (12.0, False)])
def test_a_small_process_may_grow_by_a_few_buffers_and_by_no_more(late_mb: float, holds: bool) -> None:
    front = [
        memory.Reading(when=float(second), resident_mb={("mosec", 3): 7.0 if second < 30 else late_mb})
        for second in range(60)
    ]
    assert failures(seen(readings=front)) == ([] if holds else ["memory of mosec (7 MB), growth in %"])


def test_what_stays_in_shared_memory_is_named() -> None:
    assert failures(seen(), ["sem.mp-1"]) == ["entries of /dev/shm left after the stop"]
    assert soak.details(seen(), ["sem.mp-1"]) == ["/dev/shm/sem.mp-1"]


def test_shared_memory_that_nobody_holds_is_left_over_and_that_of_others_is_not() -> None:
    name = f"pem-test-{uuid.uuid4().hex}"
    path = Path("/dev/shm") / name
    path.write_bytes(b"x" * 100)
    another = Path("/dev/shm") / f"pem-server-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    another.mkdir()
    semaphore = multiprocessing.get_context("spawn").Semaphore()  # made under one name, known to others by a second
    file_name = f"sem.{semaphore._semlock.name.removeprefix('/')}"
    try:
        assert (Path("/dev/shm") / file_name).exists()
        assert file_name not in soak.shared_memory()
        assert name in soak.shared_memory()
        assert another.name not in soak.shared_memory(), "its process lives"
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
            assert name not in soak.shared_memory(), "this process has it mapped"
        assert name in soak.shared_memory()
    finally:
        path.unlink()
        another.rmdir()


def test_a_dead_child_that_nobody_asked_about_is_a_zombie() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert soak._zombies({os.getpid()}) == 1
    child.wait()
    assert soak._zombies({os.getpid()}) == 0


def test_state_files_of_replaced_workers_count_as_the_same() -> None:
    folder = Path("/run/x")
    assert soak._without_pid(folder / "workers" / "pose-0-4711.state", folder) == "workers/pose-0.state"
    assert soak._without_pid(folder / "jobs" / "demo-17", folder) == "jobs/demo-17"


@pytest.fixture(scope="module")
def load() -> Load:
    """Make a load of one object, one mask, in all formats."""
    return prepare(Mix(masks=(1,), sizes=((320, 240),), formats=FORMATS, scenes=1, objects=1))


def test_every_bad_request_is_refused_as_the_soak_expects(server: RunningServer, load: Load) -> None:
    register(Target(url=server.url), load)
    question = next(question for question in load.questions if question.content_type == MSGPACK)
    with Asker(server.url) as ask:
        for bad in soak.bad_requests(question):
            answer = ask.send("POST", soak._ROUTE, content=bad.body, headers={"Content-Type": bad.content_type})
            assert (answer.status_code, answer.json()["error"]["code"]) == (bad.status, bad.code), bad.name
    assert msgspec.msgpack.decode(question.body)["detections"]["masks"], "the question itself is whole"


def soaked(server: RunningServer, load: Load, **how: float) -> tuple[soak.Seen, list[checks.Check], list[str]]:
    """Soak a server and stop it; return the observations, the verdict, and the rows that were printed."""
    stood = soak.shared_memory()
    register(Target(url=server.url), load)
    rows: list[str] = []
    one = soak.soak(Running(url=server.url, pid=server.pid), load, tell=rows.append, **how)
    assert server.stop() == 0
    return one, soak.judged(one, sorted(soak.shared_memory() - stood)), rows


@pytest.mark.slow
def test_a_short_soak_of_a_running_server_leaves_nothing_behind(
    start_server: Callable[..., RunningServer], load: Load
) -> None:
    one, found, rows = soaked(start_server(pose_workers=0, decode_workers=0), load, seconds=9.0, kill_every_s=4.0)
    told = [*checks.table(found).as_dicts(), *soak.details(one, [])]
    steady = [check for check in found if not check.what.startswith(("memory", "series"))]  # these want longer runs
    assert checks.all_hold(steady), told
    assert one.kills >= 1
    assert len(one.away_s) == one.kills
    assert one.requests > 0
    assert one.hung_up > 0
    assert len(rows) >= 2


@pytest.mark.long
def test_an_hour_of_kills_and_bad_requests_leaves_nothing_behind_and_no_memory_grows(
    start_server: Callable[..., RunningServer], load: Load
) -> None:
    one, found, _ = soaked(start_server(pose_workers=0, decode_workers=0), load, seconds=3600.0, kill_every_s=60.0)
    assert checks.all_hold(found), [*checks.table(found).as_dicts(), *soak.details(one, [])]
