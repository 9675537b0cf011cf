"""The run folder's spooled requests, and their removal."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.backend.run_dir import RunDir, sweep
from workers.jobs import BESIDE, INLINE_BYTES


def test_a_dropped_request_takes_along_what_dead_workers_left_beside_it(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    path, other = run_dir.put("one", bytes(INLINE_BYTES)), run_dir.put("one-more", bytes(INLINE_BYTES))
    assert path is not None
    assert other is not None
    for job in (path, other):
        Path(f"{job}{BESIDE}0a1b").write_bytes(b"crops")
    run_dir.drop(path)
    assert sorted(left.name for left in run_dir.jobs.iterdir()) == ["one-more", f"one-more{BESIDE}0a1b"]
    run_dir.remove()


def test_a_request_may_be_dropped_when_the_folder_is_gone(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    path = run_dir.put("one", bytes(INLINE_BYTES))
    run_dir.remove()
    run_dir.drop(path)
    run_dir.drop(None)


def test_a_folder_whose_path_is_too_long_for_sockets_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    run_dir = RunDir(deep)
    assert run_dir.path.parent == Path(tempfile.gettempdir())
    assert list(deep.iterdir()) == []
    run_dir.remove()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(OSError, match="name another spool_dir"):
        RunDir(deep)


ANOTHER_SERVER = """
import sys
from pathlib import Path
from serve.backend.run_dir import RunDir
print(RunDir(Path(sys.argv[1])).path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def short() -> Iterator[Path]:
    """Make a folder whose path leaves room for the names of Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="pem-") as folder:
        yield Path(folder)


def test_what_a_dead_server_left_is_swept_and_what_a_living_one_uses_is_not(short: Path) -> None:
    command = [sys.executable, "-c", ANOTHER_SERVER, str(short)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        folder = Path(other.stdout.readline().strip())
        assert sweep(short) == 0, "its server lives and holds the lock"
        assert folder.is_dir()
        other.kill()
        other.wait(30)
    assert sweep(short) >= 1
    assert not folder.exists()


def test_a_folder_that_is_just_being_made_has_no_lock_yet(tmp_path: Path) -> None:
    being_made, left = tmp_path / f"pem-server-{os.getpid()}-x", tmp_path / "pem-server-4194305-x"
    for folder in (being_made, left):  # the second is of a pid that cannot be: the largest is 4194304
        folder.mkdir()
    assert sweep(tmp_path) >= 1
    assert being_made.is_dir()
    assert not left.exists()
