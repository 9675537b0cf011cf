"""`pem bench` as people run it."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from pem.bench import cli, drive, observe
from pem.bench import server as servers
from pem.bench.mix import Load, Mix, prepare
from pem.bench.report import in_words, machine
from pem.bench.sample import STAGES
from pem.cli import main
from pem.client import Client
from pem.commands import common
from pem.host.child import ServerTrouble
from tests.client.bench.pose_fake import PoseFake, Reply, answer, pose
from tests.running import ROOT, running, wait_until

MIX = Mix(masks=(1, 2), sizes=((240, 180),), scenes=1, objects=3, seed=1)
OPTIONS = ("--masks", "1,2", "--sizes", "240x180", "--scenes", "1", "--objects", "3", "--seed", "1")
CLIENT_ONLY = "import importlib.metadata; importlib.metadata.entry_points = lambda **_: []"


def bench(*options: str, code: str = "", timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run `pem bench` to its end; `code` runs before it in the same process."""
    run = f"{code}\nimport sys; sys.argv[0] = 'pem'; from pem.cli import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", run, "bench", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def figures(path: Path) -> dict[str, Any]:
    return dict(msgspec.json.decode(path.read_bytes()))


@pytest.fixture(scope="module")
def load() -> Load:
    """Return the load that `pem bench` makes with OPTIONS."""
    return prepare(MIX)


@pytest.fixture
def request_file(tmp_path: Path) -> Path:
    path = tmp_path / "request.json"
    path.write_bytes(b'{"detections": {"masks": [[[1]]]}}')
    return path


@pytest.mark.slow
def test_a_server_of_its_own_is_started_loaded_judged_and_stopped(tmp_path):
    ran = bench(
        *(*OPTIONS, "--format", "msgpack,json,multipart", "--clients", "2", "--rate", "4", "--duration", "4"),
        *("--warmup", "1", "--set", "pose.threads=1", "--json", str(tmp_path / "load.json")),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    shown = ("2 clients", "4 requests/s", "p99.9", "gateway", "outside", "load generator", "1 mask, 240x180")
    for words in shown:
        assert words in ran.stdout
    lines = iter(ran.stderr.splitlines())
    for words in (
        r"drawing the scenes",
        r"starting a server",
        r"registering the objects \(onboarding the bench-\S+, 2 of 2\)",
        r"2 clients: [\d.]+ requests/s, [\d.]+ poses/s, p50 \d+ ms, p99 \d+ ms",
        r"4 requests a second: [\d.]+ requests/s, [\d.]+ poses/s, p50 \d+ ms, p99 \d+ ms",
    ):
        assert any(re.fullmatch(words, line) for line in lines), f"no line {words}, in this order: {ran.stderr}"

    told = figures(tmp_path / "load.json")
    assert (told["ok"], told["faults"]) == (True, [])
    assert told["server"]["own"] is True
    assert told["server"]["settings"] == {"pose.threads": "1"}
    assert told["server"]["release"].startswith("geometric")
    assert told["mix"]["formats"] == ["msgpack", "json", "multipart"]
    assert {**told["machine"], "commit": None} == {**machine(), "commit": None}
    assert f"asked from {in_words(told['machine'])}\n" in ran.stdout
    assert len(told["questions"]) == 6
    closed, opened = told["runs"]
    assert (closed["mode"], closed["clients"], opened["mode"], opened["rate_hz"]) == ("closed", 2, "open", 4.0)
    for run in (closed, opened):
        assert run["answered"] == run["offered"] > 0
        assert (run["wrong"], run["changed"], run["errors"]) == (0, 0, {})
        assert run["wrong_alone_share"] < 0.5
        assert set(run["stage_ms"]) == {*STAGES, "outside"}
        assert run["latency_ms"]["p50"] <= run["latency_ms"]["p99"] <= run["latency_ms"]["max"]
        assert run["passes"]["count"] > 0
        assert run["passes"]["detections"] >= 1
        assert {"gateway", "decode", "pose", "respond"} <= {usage["name"] for usage in run["usage"]}
        assert sum(usage["cpu_s"] for usage in run["usage"] if usage["name"] == "pose") > 0.1
        assert all(usage["rss_peak_mb"] >= usage["rss_mb"] for usage in run["usage"])
        assert run["load_generator_cpu_s"] > 0
    assert not running(max(closed["usage"], key=lambda usage: usage["name"] == "gateway")["pid"])


def replying(load: Load, right_until: int) -> Any:
    """Return a reply function: right answers up to a number, then poses that are 2 cm off."""
    known = {question.body: question.truths for question in load.questions}

    def reply(number: int, body: bytes) -> Reply:
        poses = [truth.T_cam_obj.copy() for truth in known[body] if truth.T_cam_obj is not None]
        if number >= right_until:
            for T_cam_obj in poses:
                T_cam_obj[0, 3] += 0.02
        return 200, {}, answer(*poses)

    return reply


@pytest.mark.slow
def test_a_server_elsewhere_has_the_objects_in_the_end_that_it_had_before(server, load, tmp_path):
    names = sorted(load.objects)
    with Client(server.url) as client:
        kept = client.objects.add(load.objects[names[0]], cad_format="ply", name="mine")
        before = {(known.object_id, known.name) for known in client.objects.list()}
        done = bench(
            "--url", server.url, *OPTIONS, "--clients", "1", "--duration", "1", "--json", str(tmp_path / "load.json")
        )
        after = {(known.object_id, known.name) for known in client.objects.list()}
        client.objects.remove(kept.object_id)
    assert figures(tmp_path / "load.json")["runs"][0]["answered"] > 0, done.stderr
    assert {object_id for object_id, _ in after} == {object_id for object_id, _ in before}


@pytest.mark.slow
def test_poses_that_go_wrong_under_load_are_no_success(load, tmp_path):
    with PoseFake(replying(load, right_until=len(load.questions))) as fake:
        options = ("--clients", "2", "--duration", "1", "--warmup", "0", "--json", str(tmp_path / "load.json"))
        ran = bench("--url", fake.target.url, *OPTIONS, *options)
    assert ran.returncode == 1, ran.stderr
    assert "poses are wrong under load" in ran.stderr
    told = figures(tmp_path / "load.json")
    (run,) = told["runs"]
    assert told["ok"] is False
    assert run["wrong"] == run["changed"] > 0
    assert run["poses_hz"] == 0.0
    assert run["detections_hz"] > 0.0
    assert told["server"] == {"url": fake.target.url, "own": False, "settings": {}}
    assert run["passes"] == {}
    assert run["usage"] == []


@pytest.mark.slow
def test_a_server_that_is_always_wrong_is_no_success_either(load):
    with PoseFake(replying(load, right_until=0)) as fake:
        options = ("--url", fake.target.url, *OPTIONS, "--clients", "2", "--duration", "0.5", "--warmup", "0")
        ran = bench(*options)
        accepted = bench(*options, "--most-wrong-alone", "1")
    assert ran.returncode == 1
    assert "100% of the detections get a wrong pose or none even without load" in ran.stderr
    assert "20.0 mm and 0.0 degrees off" in ran.stdout
    assert accepted.returncode == 0
    assert "20.0 mm and 0.0 degrees off" in accepted.stdout


@pytest.mark.slow
def test_refusals_are_counted_and_errors_are_no_success(load, tmp_path):
    right = replying(load, right_until=10**9)
    refused = (429, {"Retry-After": "1"}, {"error": {"code": "over_capacity", "detail": "later"}})
    failed = (500, {}, {"error": {"code": "internal", "detail": "sorry"}})

    def reply(every_third: Reply) -> Any:
        return lambda number, body: every_third if number % 3 == 2 else right(number, body)

    for third, code in ((refused, 0), (failed, 1)):
        with PoseFake(reply(third)) as fake:
            options = ("--rate", "40", "--duration", "1", "--warmup", "0", "--json", str(tmp_path / "load.json"))
            ran = bench("--url", fake.target.url, *OPTIONS, *options)
        assert ran.returncode == code, ran.stderr
        (run,) = figures(tmp_path / "load.json")["runs"]
        assert set(run["errors"]) == {"429 over_capacity" if code == 0 else "500 internal"}
        assert f"{run['errors'].popitem()[1]} x {third[0]}" in ran.stdout


@pytest.mark.slow
def test_latency_against_load_is_drawn(load, tmp_path):
    picture, figures_file = tmp_path / "load.svg", tmp_path / "load.json"
    with PoseFake(replying(load, right_until=10**9)) as fake:
        options = ("--rate", "20,40", "--duration", "1", "--warmup", "0", "--json", str(figures_file))
        ran = bench("--url", fake.target.url, *OPTIONS, *options, "--picture", str(picture))
    assert ran.returncode == 0, ran.stderr
    assert picture.read_text().lstrip().startswith(("<svg", "<?xml"))
    points = figures(figures_file)["sweep"]["points"]
    assert len(points) == 2
    for point in points:
        assert point["seconds"] > 1.5, "a second has no hundred requests"
        assert point["run"]["latency_ms"]["p999"] >= point["latency_ms"]["p90"]
        assert set(point["run"]["stage_ms"]) == {*STAGES, "outside"}
    assert figures(figures_file)["runs"] == []
    assert "offered/s" in ran.stdout


@pytest.mark.slow
def test_rows_that_load_makes_others_are_no_success_of_a_picture(load, tmp_path):
    right = replying(load, right_until=10**9)

    def reply(number: int, body: bytes) -> Reply:
        status, headers, tree = right(number, body)
        if number > len(load.questions):
            tree["poses"][0]["translation"][0] += 0.5  # mm: no wrong pose, but another one
        return status, headers, tree

    with PoseFake(reply) as fake:
        options = ("--rate", "100", "--duration", "1", "--warmup", "0", "--picture", str(tmp_path / "load.svg"))
        ran = bench("--url", fake.target.url, *OPTIONS, *options)
    assert ran.returncode == 1, ran.stdout
    assert re.search(r"requests/s: \d+ rows are others than when asked alone", ran.stderr)


@pytest.mark.slow
def test_what_is_wrong_without_load_counts_for_a_picture_too(load, tmp_path):
    with PoseFake(replying(load, right_until=0)) as fake:
        options = ("--rate", "100", "--duration", "1", "--warmup", "0", "--picture", str(tmp_path / "load.svg"))
        ran = bench("--url", fake.target.url, *OPTIONS, *options)
    assert ran.returncode == 1, ran.stdout
    assert "100% of the detections get a wrong pose or none even without load" in ran.stderr
    assert "20.0 mm and 0.0 degrees off" in ran.stdout


@pytest.mark.slow
def test_poses_that_load_loses_are_no_success_where_nothing_is_compared_with_alone(load):
    def reply(number: int, body: bytes) -> Reply:
        known = {question.body: question.truths for question in load.questions}[body]
        lost = number > len(load.questions)
        return 200, {}, answer(*(None if lost else truth.T_cam_obj for truth in known))

    with PoseFake(reply) as fake:
        options = ("--clients", "1", "--duration", "1", "--warmup", "0", "--no-compare-alone")
        ran = bench("--url", fake.target.url, *OPTIONS, *options)
    assert ran.returncode == 1, ran.stdout
    assert "poses are lost under load" in ran.stderr
    assert "poses are lost that their question has when asked alone" in ran.stdout


@pytest.mark.slow
def test_a_time_out_holds_for_a_picture_and_for_robots_too(load, tmp_path):
    right = replying(load, right_until=10**9)

    def stuck(number: int, body: bytes) -> Reply:
        if number >= len(load.questions) and number % 2:
            time.sleep(3)
        return right(number, body)

    short = ("--duration", "0.5", "--warmup", "0", "--timeout", "0.5", "--json", str(tmp_path / "load.json"))
    with PoseFake(stuck) as fake:
        bench("--url", fake.target.url, *OPTIONS, *short, "--picture", str(tmp_path / "load.svg"), "--rate", "300")
    (point,) = figures(tmp_path / "load.json")["sweep"]["points"]
    assert point["run"]["errors"].get("0 timeout", 0) > 10
    with PoseFake(stuck) as fake:
        ran = bench("--url", fake.target.url, *OPTIONS, *short, "--capacity", "--robots-hz", "4")
    assert ran.returncode == 1
    assert "with 0 timeout" in ran.stdout


@pytest.mark.slow
def test_progress_within_a_step_is_told_also_where_there_is_no_terminal(load, tmp_path):
    with PoseFake(replying(load, right_until=10**9)) as fake:
        options = ("--rate", "100", "--duration", "2", "--warmup", "0", "--picture", str(tmp_path / "load.svg"))
        often = "from pem.bench import cli; cli._EVERY_S = 0.1"
        ran = bench("--url", fake.target.url, *OPTIONS, *options, code=often)
    assert re.search(r"^100 requests/s \(\d s left, \d+ answers, [\d.]+ rows/s, 0 errors\)$", ran.stderr, re.MULTILINE)
    assert re.search(r"^offering more and more: [\d.]+ requests/s offered", ran.stderr, re.MULTILINE)


def test_progress_on_a_terminal_is_a_line_that_is_rewritten(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, highlight=False)
    monkeypatch.setattr(common, "stderr", lambda: terminal)
    now = drive.Progress(seconds_left=12.0, requests=34, poses_hz=5.6, errors=0)
    with cli._watched("counting robots") as watch:
        watch.now("8 robots", now)
        watch.line("counting robots: 4 robots hold")
    assert "8 robots (12 s left, 34 answers, 5.6 rows/s, 0 errors)" in screen.getvalue()
    assert "counting robots: 4 robots hold\n" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K"), "the line that is rewritten is gone in the end"


@pytest.mark.slow
def test_a_server_that_carries_no_robot_is_no_success(load, tmp_path):
    def slow(number: int, body: bytes) -> Reply:
        time.sleep(0.05)
        return reply(number, body)

    reply = replying(load, right_until=10**9)
    with PoseFake(slow) as fake:
        promise = ("--capacity", "--slo", "p50=20ms", "--robots-hz", "10", "--duration", "0.5", "--warmup", "0")
        ran = bench("--url", fake.target.url, *OPTIONS, *promise, "--json", str(tmp_path / "load.json"))
    assert ran.returncode == 1
    assert "this machine carries 0 robots" in ran.stdout
    assert "not even one robot can be served" in ran.stderr
    told = figures(tmp_path / "load.json")["capacity"]
    assert (told["robots"], told["robots_hz"], told["slo_ms"]) == (0, 10.0, {"p50": 20.0})


def test_a_client_alone_loads_a_server_elsewhere_with_a_ready_request(request_file, tmp_path):
    with PoseFake(lambda number, body: (200, {}, answer(pose()))) as fake:
        ran = bench(
            *("--url", fake.target.url, "--request", str(request_file), "--clients", "1", "--duration", "2"),
            *("--warmup", "0", "--json", "-"),
            code=CLIENT_ONLY,
        )
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"^1 client: [\d.]+ requests/s", ran.stderr, re.MULTILINE)
    told = msgspec.json.decode(ran.stdout)  # and nothing else
    assert told["runs"][0]["answered"] > 5
    assert told["mix"] is None
    assert told["questions"] == [{"name": "request.json, 1 mask", "bytes": 34, "detections": 1}]


def test_a_client_alone_watches_a_server_on_its_machine_by_its_programs(request_file, tmp_path):
    with PoseFake(lambda number, body: (200, {}, answer(pose()))) as fake:
        ran = bench(
            *("--url", fake.target.url, "--request", str(request_file), "--clients", "1", "--duration", "1"),
            *("--warmup", "0", "--pid", str(os.getpid()), "--json", str(tmp_path / "load.json")),
            code=CLIENT_ONLY,
        )
    assert ran.returncode == 0, ran.stderr
    (run,) = figures(tmp_path / "load.json")["runs"]
    assert os.getpid() in [usage["pid"] for usage in run["usage"]]


@pytest.mark.parametrize(
    "options, why",
    [
        (("--url", "https://cell"), "plain http"),
        (("--url", "cell:8003"), "no http address"),
        (("--url", "http://cell", "--set", "pose.threads=1"), "--set is for the server that this starts"),
        (("--pid", "1"), "--pid says which process is behind --url"),
        (("--set", "pose.threds=1"), "there is no setting 'pose.threds'"),
        (("--set", "pose.threads"), "write NAME=VALUE"),
        (("--masks", "3;4"), "--masks 3;4: write 3 or 1,3,10"),
        (("--masks", "0"), "masks of a request must be 1 to 1000"),
        (("--sizes", "640"), "--sizes 640: write 640x480"),
        (("--format", "xml"), "--format xml: write msgpack or json or multipart"),
        (("--clients", "0"), "at least one client"),
        (("--rate", "-1"), "a rate above 0"),
        (("--request", "/nowhere/request.json"), "cannot read /nowhere/request.json"),
        (("--capacity", "--slo", "fast"), "'fast' is no limit"),
        (("--slo", "p99=1s"), "--slo is what --capacity searches with; give both"),
        (("--slo", "fast"), "--slo is what --capacity searches with; give both"),
        (("--robots-hz", "-1"), "--robots-hz is what --capacity searches with; give both"),
        (("--capacity", "--robots-hz", "-1"), "a rate above 0"),
        (("--capacity", "--robots-hz", "nan"), "--robots-hz must be a finite number, got nan"),
        (("--duration", "inf"), "--duration must be a finite number, got inf"),
        (("--most-wrong-alone", "-3"), "--most-wrong-alone is a share of the detections, 0 to 1, got -3"),
        (("--most-wrong-alone", "1.5"), "--most-wrong-alone is a share of the detections, 0 to 1, got 1.5"),
        (("--json", "/nowhere/load.json"), "there is no folder /nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_starts(options, why, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(SystemExit) as left:
        main(["bench", *OPTIONS, *options])
    assert left.value.code == 2
    assert why in capsys.readouterr().err.replace("\n", " ")


def test_a_server_that_is_not_there_is_said_to_be(request_file):
    ran = bench("--url", "http://127.0.0.1:9", "--request", str(request_file))
    assert ran.returncode == 1
    assert "no connection to 127.0.0.1:9" in ran.stderr


def test_help_teaches_by_examples():
    ran = bench("--help")
    assert ran.returncode == 0
    assert len(re.findall(r"^ +pem bench", ran.stdout, re.MULTILINE)) >= 5


def test_a_setting_is_called_as_in_files_or_in_the_environment():
    assert servers.variable("pose.threads") == servers.variable("POSE_THREADS") == "PEM_POSE_THREADS"
    assert servers.variable("PEM_DEVICE") == servers.variable("device") == "PEM_DEVICE"


@pytest.mark.slow
def test_a_server_of_its_own_that_cannot_start_says_why(tmp_path):
    settings = {"checkpoints_dir": str(tmp_path), "engine": "sam6d", "sam6d.fallback": "false"}
    with pytest.raises(ServerTrouble, match="the server ended with code"), servers.own_server(settings):
        pass


@pytest.mark.slow
def test_a_bench_that_is_ended_leaves_no_server_behind():
    bench_process = subprocess.Popen(
        [sys.executable, "-m", "pem", "bench", *OPTIONS, "--clients", "1", "--duration", "100"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: len(observe.tree(bench_process.pid)) > 1, 180, "a server below pem bench")
        below = observe.tree(bench_process.pid)
        bench_process.send_signal(signal.SIGTERM)
        assert bench_process.wait(120) == 128 + signal.SIGTERM
    finally:
        bench_process.kill()
    wait_until(lambda: not any(running(pid) for pid in below), 60, "every process gone")
