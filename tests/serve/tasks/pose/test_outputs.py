"""Retention: files that the server wrote are removed after a time, others stay."""

from __future__ import annotations

import time
from pathlib import Path

from serve.tasks.pose.outputs import Outputs
from workers.messages import OUTPUT_FILES


def written(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in OUTPUT_FILES:
        (folder / name).write_text("x")
    return folder


def test_old_outputs_leave_and_new_ones_stay(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "outputs.list", days=30)
    old, new = written(tmp_path / "out" / "old one"), written(tmp_path / "out" / "new")
    outputs.wrote(old)
    outputs.wrote(new)
    listed = (tmp_path / "outputs.list").read_text().splitlines()
    (tmp_path / "outputs.list").write_text(f"1000 {listed[0].split()[1]}\n{listed[1]}\n")
    assert outputs.sweep(time.time() - 86_400) == 3
    assert not old.exists()
    assert len(list(new.iterdir())) == 3
    assert outputs.sweep(time.time() - 86_400) == 0


def test_a_folder_that_was_written_again_is_new(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "outputs.list", days=30)
    folder = written(tmp_path / "out" / "frame")
    outputs.wrote(folder)
    text = (tmp_path / "outputs.list").read_text()
    (tmp_path / "outputs.list").write_text(f"1000 {text.split()[1]}\n{text}")
    assert outputs.sweep(time.time() - 86_400) == 0
    assert len(list(folder.iterdir())) == 3


def test_files_of_others_are_never_touched(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "outputs.list", days=30)
    theirs, ours = written(tmp_path / "out" / "theirs"), written(tmp_path / "out" / "ours")
    (ours / "notes.txt").write_text("kept")
    outputs.wrote(ours)
    assert outputs.sweep(time.time() + 10) == 3
    assert len(list(theirs.iterdir())) == 3
    assert [path.name for path in ours.iterdir()] == ["notes.txt"]


def test_a_broken_list_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "outputs.list").write_text("nonsense\n\n12 \n")
    assert Outputs(tmp_path / "outputs.list", days=30).sweep(time.time()) == 0
    assert Outputs(tmp_path / "missing" / "outputs.list", days=30).sweep(time.time()) == 0
