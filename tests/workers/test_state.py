"""A worker's report about itself, and how little of it can get lost."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workers import state
from workers.state import StateWriter, WorkerState, keep_spares, read_states, remove_state


def only_state(run_dir: Path) -> WorkerState:
    [found] = read_states(run_dir)
    return found


def test_a_worker_is_seen_before_it_is_ready_and_after(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path, "pose", 1)
    assert (only_state(tmp_path).stage, only_state(tmp_path).slot) == ("pose", 1)
    assert not only_state(tmp_path).ready
    writer.ready(device="cpu")
    assert only_state(tmp_path).ready
    assert only_state(tmp_path).info == {"device": "cpu"}
    assert only_state(tmp_path).pid == os.getpid()


def test_what_is_held_is_told_while_it_is_held_and_no_longer(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path, "decode", 0)
    writer.hold("a")
    since = only_state(tmp_path).busy_since_unix
    writer.hold("b")
    assert only_state(tmp_path).holding == ["a", "b"]
    assert since is not None
    assert only_state(tmp_path).busy_since_unix == since
    writer.release("a")
    assert only_state(tmp_path).holding == ["b"]
    writer.release("never seen")
    writer.release("b")
    assert only_state(tmp_path).holding == []
    assert only_state(tmp_path).busy_since_unix is None


def test_the_block_form_lets_go_after_an_exception(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path, "decode", 0)

    def work() -> None:
        with writer.holding(["a", "b"]):
            assert only_state(tmp_path).holding == ["a", "b"]
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        work()
    assert only_state(tmp_path).holding == []


def test_updates_add_to_what_is_known(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path, "pose", 0)
    writer.ready(device="cpu", cache_hits=0)
    writer.update(cache_hits=7)
    assert only_state(tmp_path).info == {"device": "cpu", "cache_hits": 7}


def test_info_that_is_too_long_leaves_the_rest_readable(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path, "pose", 0)
    writer.hold("a")
    writer.ready(objects=["x" * 64] * 2000, cache_hits=3)
    assert only_state(tmp_path).ready
    assert only_state(tmp_path).holding == ["a"]
    assert only_state(tmp_path).info == {"cache_hits": 3, "left_out": ["objects"]}


def test_a_worker_is_forgotten_by_its_pid(tmp_path: Path) -> None:
    StateWriter(tmp_path, "pose", 0)
    remove_state(tmp_path, os.getpid() + 1)
    assert read_states(tmp_path)
    remove_state(tmp_path, os.getpid())
    remove_state(tmp_path, os.getpid())
    assert read_states(tmp_path) == []


def test_a_worker_that_ended_is_not_alive_though_nobody_asked_how(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    assert not WorkerState(stage="pose", slot=0, pid=ended.pid, started_unix=0.0).alive
    ended.wait()
    assert not WorkerState(stage="pose", slot=0, pid=ended.pid, started_unix=0.0).alive
    assert WorkerState(stage="pose", slot=0, pid=os.getpid(), started_unix=0.0).alive


def test_nothing_to_read_is_no_error(tmp_path: Path) -> None:
    assert read_states(tmp_path / "absent") == []


def test_files_that_hold_nothing_valid_are_left_out(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path, "pose", 0)
    folder = state.states_dir(tmp_path)
    (folder / "pose-1-1.state").write_bytes(b"short")
    (folder / "pose-2-2.state").write_bytes(b"\1" * (folder / f"pose-0-{os.getpid()}.state").stat().st_size)
    assert read_states(tmp_path) == [writer.state]


def test_without_room_for_its_file_a_worker_works_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    writer = StateWriter(tmp_path, "pose", 0)
    assert writer.failure is not None
    assert writer.failure.errno == errno.ENOSPC
    writer.ready()
    with writer.holding(["a"]):
        assert writer.state.holding == ["a"]
    assert read_states(tmp_path) == []
    assert list(state.states_dir(tmp_path).iterdir()) == []


WRITE_FOREVER = """
import sys
from pathlib import Path
from workers.state import StateWriter
writer = StateWriter(Path(sys.argv[1]), "pose", 0)
writer.ready(objects=["x" * 64] * 100)
for step in range(10**9):
    writer.hold(f"part-{step}")
    writer.release(f"part-{step}")
"""


def test_on_a_full_disk_a_worker_takes_a_spare_and_leaves_its_file_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    StateWriter(tmp_path, "pose", 0).ready(device="cpu")
    keep_spares(tmp_path)
    folder = state.states_dir(tmp_path)
    files = {path.name for path in folder.iterdir()}
    monkeypatch.setattr(os, "posix_fallocate", full)
    writer = StateWriter(tmp_path, "decode", 0)
    assert writer.failure is None
    assert {one.stage for one in read_states(tmp_path)} == {"pose", "decode"}
    remove_state(tmp_path, os.getpid())  # both are of this process
    assert read_states(tmp_path) == []
    assert {path.name for path in folder.iterdir()} == {name for name in files if name.startswith("spare")}
    again = StateWriter(tmp_path, "respond", 0)
    assert again.failure is None
    assert [one.stage for one in read_states(tmp_path)] == ["respond"]


def test_a_reader_sees_whole_states_also_of_a_worker_killed_while_writing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(tmp_path)])
    try:
        deadline = time.monotonic() + 120
        while not [found for found in read_states(tmp_path) if found.ready] and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(100):
            assert len(only_state(tmp_path).info["objects"]) == 100
            assert only_state(tmp_path).alive
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = only_state(tmp_path)
    assert last.pid == process.pid
    assert not last.alive
    assert len(last.holding) <= 1
