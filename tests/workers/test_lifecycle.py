"""How a worker process starts and dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workers import lifecycle
from workers.lifecycle import Log, _Starts, slot_environment, starts_dir

#: A process that starts another one, which asks to die with it, and prints that one's pid.
FAMILY = """
import subprocess, sys, time
code = "import os; from workers.lifecycle import *; " + sys.argv[1] + "; print(os.getpid(), flush=True); time.sleep(60)"
subprocess.run([sys.executable, "-c", code])
"""


def test_a_worker_dies_with_its_parent() -> None:
    family = subprocess.Popen([sys.executable, "-c", FAMILY, "die_with_parent(os.getppid())"], stdout=subprocess.PIPE)
    assert family.stdout is not None
    with family.stdout as output:
        child = int(output.readline())
        family.kill()
        family.wait()
        assert output.readline() == b""  # its end of the pipe is closed
    deadline = time.monotonic() + 60
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_worker_whose_parent_died_before_it_could_ask_leaves_at_once() -> None:
    code = "from workers.lifecycle import die_with_parent; die_with_parent(1)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1


def test_every_slot_sets_the_same_variables() -> None:
    slots = [
        slot_environment(slot=0, keeper=False, device="cpu", threads=2),
        slot_environment(slot=1, keeper=False, device="cuda:1", threads=1),
        slot_environment(slot=2, keeper=True, device="cpu", threads=1),
    ]
    assert len({frozenset(slot) for slot in slots}) == 1
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["", "1", ""]
    assert [slot["PEM_SLOT_DEVICE"] for slot in slots] == ["cpu", "cuda:0", "cpu"]


def test_gpus_are_counted_among_those_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert slot_environment(slot=0, keeper=False, device="cuda:1", threads=1)["CUDA_VISIBLE_DEVICES"] == "GPU-b"


def test_a_slot_that_keeps_failing_waits_longer_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(lifecycle.time, "sleep", pauses.append)
    starts = _Starts(tmp_path, "pose", 0)
    for _ in range(9):
        starts.pause_after_failures(Log("pose"))
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert json.loads(capfd.readouterr().err.splitlines()[-1])["failed_starts"] == 8
    starts.forget()
    _Starts(tmp_path, "pose", 0).pause_after_failures(Log("pose"))
    assert len(pauses) == 8


def test_failures_of_long_ago_and_broken_notes_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(lifecycle.time, "sleep", pauses.append)
    note = starts_dir(tmp_path) / "pose-0.json"
    note.parent.mkdir()
    for text in (json.dumps([time.time() - 10_000]), "nonsense", "{}"):
        note.write_text(text)
        _Starts(tmp_path, "pose", 0).pause_after_failures(Log("pose"))
    assert pauses == []


def test_a_log_line_is_one_line_of_json(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        _ = {}["missing"]
    except KeyError:
        Log("pose").exception("broken", part_id="a\nb", path=Path("x"))
    [line] = capfd.readouterr().err.splitlines()
    fields = json.loads(line)
    assert (fields["level"], fields["event"], fields["stage"], fields["pid"]) == (
        "error",
        "broken",
        "pose",
        os.getpid(),
    )
    assert (fields["part_id"], fields["path"]) == ("a\nb", "x")
    assert "KeyError" in fields["traceback"]


def test_the_stages_import_cheaply_and_the_pose_stage_never_imports_open3d() -> None:
    code = (
        "import sys; import serve.app; "
        "print([name for name in ('torch', 'cv2', 'open3d', 'trimesh', 'scipy') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
    code = (
        "import sys, os; from workers.engines import load_engine, practise; from pathlib import Path; "
        "practise(load_engine('geometric', device='cpu', threads=1), 1, Path(sys.argv[1])); "
        "import workers.stages.pose; print('open3d' in sys.modules)"
    )
    folder = os.devnull  # nowhere to keep the model: it works all the same
    found = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "False"
