"""The run folder's spooled requests, and their removal."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.backend import run_dir as run_dir_module
from serve.backend.run_dir import RunDir
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
    assert run_dir.path.parent == Path(run_dir_module.tempfile.gettempdir())
    assert list(deep.iterdir()) == []
    run_dir.remove()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(OSError, match="name another spool_dir"):
        RunDir(deep)
