"""The answer, the overlay, and the files of `output_dir`."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from pem.rle import decode_rle
from tests.workers.support import Asker
from workers.messages import Answer, Failure, FinishPart, Job, PartAnswer, RespondInput, Solved
from workers.stages.decode import DecodeStage
from workers.stages.pose import PoseStage
from workers.stages.respond import RespondStage


@pytest.fixture(scope="session")
def rows_and_job(asker: Asker, decode: DecodeStage, pose: PoseStage) -> tuple[Solved, Job]:
    """Return the solved rows and the job of three detections, the second an empty mask."""
    masks = [instance.mask for instance in asker.scene.instances]
    job = asker.job([masks[0], np.zeros_like(masks[1]), masks[2]])
    cut = decode.forward(asker.part(job))
    [solved] = pose.forward([cut])
    assert isinstance(solved, Solved)
    return solved, job


@pytest.fixture
def ask(respond: RespondStage, rows_and_job: tuple[Solved, Job], asker: Asker) -> Any:
    """Send the solved part on, the job changed as given."""

    def send(**changes: Any) -> PartAnswer | Failure:
        solved, job = rows_and_job
        part = asker.part(msgspec.structs.replace(job, **changes))
        return respond.forward(msgspec.structs.replace(solved, part=part))

    return send


def picture(png: bytes | None) -> np.ndarray:
    assert png is not None
    return np.asarray(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR_RGB))


def test_rows_and_timings_reach_the_gateway(ask: Any, rows_and_job: tuple[Solved, Job]) -> None:
    answer, solved = ask(), rows_and_job[0]
    assert answer.rows == solved.rows
    assert [row.status for row in answer.rows] == ["ok", "rejected", "ok"]
    assert (answer.pose_ms, answer.batch_detections, answer.passes) == (solved.pose_ms, 2, solved.passes)
    assert (answer.visualization, answer.output_written) == (None, False)


def test_the_answer_is_the_same_after_the_wire(respond: RespondStage, ask: Any) -> None:
    answer = ask()
    assert msgspec.msgpack.decode(respond.serialize(answer), type=Answer) == answer


def test_an_overlay_is_the_picture_with_something_drawn(ask: Any, asker: Asker) -> None:
    drawn = picture(ask(visualize=True).visualization)
    assert drawn.shape == asker.scene.rgb.shape
    assert (drawn != asker.scene.rgb).any(axis=2)[asker.scene.instances[0].mask].mean() > 0.1


def test_output_files_hold_every_row(ask: Any, tmp_path: Path, asker: Asker) -> None:
    folder = tmp_path / "new" / "folder"
    answer = ask(output_dir=str(folder))
    assert (answer.output_written, answer.visualization) == (True, None)
    assert sorted(path.name for path in folder.iterdir()) == ["detection_pem.json", "poses.npz", "vis_pem.png"]
    found = json.loads((folder / "detection_pem.json").read_text())
    assert len(found) == 2
    first, row = found[0], answer.rows[0]
    assert first["score"] == pytest.approx(0.5 * row.confidence)
    assert (first["R"], first["t"], first["category_id"]) == (row.rotation, row.translation, 7)
    np.testing.assert_array_equal(decode_rle(first["segmentation"]), asker.scene.instances[0].mask)
    assert set(first) == {
        "scene_id", "image_id", "category_id", "bbox", "score", "time", "segmentation", "R", "t",
    }  # fmt: skip
    with np.load(folder / "poses.npz", allow_pickle=False) as table:
        assert table["status"].tolist() == ["ok", "rejected", "ok"]
        assert table["error_code"].tolist() == ["", "mask_empty", ""]
        np.testing.assert_allclose(table["t_mm"][0], row.translation)
        assert np.isnan(table["R"][1]).all()
    assert picture((folder / "vis_pem.png").read_bytes()).shape == asker.scene.rgb.shape


def test_files_without_detections_are_written_too(respond: RespondStage, asker: Asker, tmp_path: Path) -> None:
    job = asker.job([], output_dir=str(tmp_path / "out"))
    answer = respond.forward(FinishPart(part_id="f", job=msgspec.msgpack.encode(job), rows=[]))
    assert isinstance(answer, PartAnswer)
    assert json.loads((tmp_path / "out" / "detection_pem.json").read_text()) == []
    with np.load(tmp_path / "out" / "poses.npz") as table:
        assert table["R"].shape == (0, 3, 3)


def test_a_split_request_is_finished_from_its_rows(
    respond: RespondStage, rows_and_job: tuple[Solved, Job], tmp_path: Path
) -> None:
    solved, job = rows_and_job
    path = tmp_path / "job"
    path.write_bytes(msgspec.msgpack.encode(msgspec.structs.replace(job, visualize=True)))
    message = FinishPart(part_id="r1/finish", path=str(path), rows=solved.rows)
    received = respond.deserialize(msgspec.msgpack.encode(message))
    assert respond.state.state.holding == ["r1/finish"]
    answer = respond.forward(received)
    respond.serialize(answer)
    assert respond.state.state.holding == []
    assert isinstance(answer, PartAnswer)
    assert answer.part_id == "r1/finish"
    assert picture(answer.visualization).shape == (480, 640, 3)


def test_both_ways_in_give_one_kind_of_message(respond: RespondStage, rows_and_job: tuple[Solved, Job]) -> None:
    encoded = msgspec.msgpack.encode(rows_and_job[0])
    assert respond.deserialize_ipc(encoded) == respond.deserialize(encoded) == rows_and_job[0]
    respond.state.release_all()
    failure = Failure(part_id="x", code="deadline", detail="too late")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(failure), type=RespondInput) == failure
    assert respond.forward(failure) is failure


def test_a_full_disk_is_told_without_a_path(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    failure = ask(output_dir=str(tmp_path / "out"))
    assert (failure.code, failure.field) == ("storage_full", "output_dir")
    assert "full" in failure.detail
    assert str(tmp_path) not in failure.detail
    assert list((tmp_path / "out").iterdir()) == []
    assert json.loads(capfd.readouterr().err.splitlines()[-1])["event"] == "output_failed"


def test_an_output_folder_that_cannot_be_made_is_told(ask: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    failure = ask(output_dir=str(tmp_path / "file" / "below"))
    assert failure.code == "storage_full"
    assert str(tmp_path) not in failure.detail


def test_a_job_whose_file_is_gone_harms_nothing(respond: RespondStage, tmp_path: Path) -> None:
    answer = respond.forward(FinishPart(part_id="f", path=str(tmp_path / "gone"), rows=[]))
    assert isinstance(answer, Failure)
    assert answer.code == "internal"
