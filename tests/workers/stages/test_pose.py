"""Passes over the parts of a batch: the real engine, on real crops."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pem.contract import Row, RowError
from posekit.engine import Instance, ObjectModel, Outcome
from posekit.store import ObjectStore, StoredObject
from posekit.synthetic.scenes import pose_errors
from tests.workers.support import Asker
from workers.lifecycle import INTERNAL_DETAIL
from workers.messages import Cut, Failure, Part, PoseInput, Solved
from workers.settings import Stages
from workers.stages import pose as pose_module
from workers.stages.decode import DecodeStage
from workers.stages.pose import PoseStage

Cutter = Callable[..., Cut]


@pytest.fixture
def cut(decode: DecodeStage, asker: Asker) -> Cutter:
    """Return a function: a part of a job about one detection (or several), decoded and sent through the wire."""

    def make(which: Sequence[int] = (0,), request_id: str = "r1", **changes: Any) -> Cut:
        masks = [asker.scene.instances[i].mask for i in which]
        part = asker.part(asker.job(masks, request_id=request_id, **changes))
        made = msgspec.msgpack.decode(decode.serialize_ipc(decode.forward(part)), type=PoseInput)
        assert isinstance(made, Cut)
        return made

    return make


def solved(answer: Solved | Failure) -> Solved:
    assert isinstance(answer, Solved), answer
    return answer


def error(row: Row) -> RowError:
    assert isinstance(row.error, RowError), row
    return row.error


def without_object(cut: Cut, object_id: str) -> Cut:
    crops = [msgspec.structs.replace(crop, object_id=object_id) for crop in cut.crops]
    return msgspec.structs.replace(cut, crops=crops)


class Troubled:
    """An engine that fails for passes that are too large, or that hold a certain seed."""

    def __init__(self, engine: Any, trouble: Exception, *, above: int | None = None, seed: int | None = None) -> None:
        self.engine, self.trouble, self.above, self.seed = engine, trouble, above, seed
        self.name, self.version, self.device = engine.name, engine.version, engine.device
        self.sizes: list[int] = []

    def prepare(self, model: ObjectModel) -> int:
        return int(self.engine.prepare(model))

    def estimate(self, instances: Sequence[Instance], models: Mapping[str, ObjectModel]) -> list[Outcome]:
        self.sizes.append(len(instances))
        if self.above is not None and len(instances) > self.above:
            raise self.trouble
        if any(instance.seed == self.seed for instance in instances):
            raise self.trouble
        return list(self.engine.estimate(instances, models))


def test_poses_are_right_and_in_millimetres(pose: PoseStage, cut: Cutter, asker: Asker) -> None:
    [answer] = pose.forward([cut((0, 1, 2))])
    rows = solved(answer).rows
    assert [row.status for row in rows] == ["ok"] * 3
    for row, instance in zip(rows, asker.scene.instances, strict=True):
        T_cam_obj = np.eye(4)
        T_cam_obj[:3, :3] = row.rotation
        T_cam_obj[:3, 3] = np.array(row.translation) / 1000
        degrees, millimetres = pose_errors(T_cam_obj, instance.T_cam_obj, instance.shape.symmetries)
        assert degrees < 5
        assert millimetres < 5
        assert (row.object_id, row.cad_id) == (7, asker.reference.object_id)
        assert 0 < row.confidence <= 1
    assert solved(answer).scores == [0.5] * 3


def test_requests_share_passes_in_order_of_arrival(pose: PoseStage, cut: Cutter) -> None:
    answers = pose.forward([cut((0, 1, 2), "a"), cut((1,), "b"), cut((2, 0), "c")])
    passes = solved(answers[0]).passes
    assert [(record.detections, record.requests) for record in passes] == [(4, 2), (2, 1)]
    assert all(record.seconds > 0 for record in passes)
    assert [solved(answer).passes for answer in answers[1:]] == [[], []]  # counted once
    assert [solved(answer).batch_detections for answer in answers] == [4, 4, 2]
    assert [solved(answer).batch_requests for answer in answers] == [2, 2, 1]


def test_parts_of_one_request_count_as_one(pose: PoseStage, cut: Cutter) -> None:
    answers = pose.forward([cut((0,), "a"), cut((1,), "a"), cut((2,), "b")])
    assert [(record.detections, record.requests) for record in solved(answers[0]).passes] == [(3, 2)]


def test_a_pose_has_the_same_bits_alone_and_in_company(pose: PoseStage, cut: Cutter) -> None:
    [alone] = pose.forward([cut((1,))])
    company = pose.forward([cut((0, 2), "b"), cut((1,)), cut((2, 1, 0), "c")])
    assert solved(company[1]).rows == solved(alone).rows
    assert solved(company[2]).rows[1] == solved(alone).rows[0]


def test_failures_pass_through_and_the_others_are_answered(pose: PoseStage, cut: Cutter) -> None:
    earlier = Failure(part_id="x", code="bad_data", detail="broken")
    answers = pose.forward([earlier, cut((0,))])
    assert answers[0] is earlier
    assert solved(answers[1]).rows[0].status == "ok"
    assert len(solved(answers[1]).passes) == 1
    assert pose.forward([earlier]) == [earlier]


def test_a_part_past_its_deadline_costs_nothing(pose: PoseStage, cut: Cutter) -> None:
    late = msgspec.structs.replace(cut((0, 1)), deadline_unix=time.time() - 1)
    first, second = pose.forward([late, cut((2,), "b")])
    assert isinstance(first, Failure)
    assert (first.code, first.part_id) == ("deadline", "r1/0")
    assert [record.detections for record in solved(second).passes] == [1]


def test_rejected_crops_become_rows_in_their_place(pose: PoseStage, cut: Cutter) -> None:
    whole = cut((0, 1))
    rejected = msgspec.structs.replace(whole.crops[0], rejected=("mask_empty", "the mask has no pixel"))
    [answer] = pose.forward([msgspec.structs.replace(whole, crops=[rejected, whole.crops[1]])])
    first, second = solved(answer).rows
    assert (first.status, first.rotation, first.confidence) == ("rejected", None, 0.0)
    assert error(first) == RowError(code="mask_empty", detail="the mask has no pixel")
    assert second.status == "ok"


def test_no_detections_are_answered_with_no_rows(pose: PoseStage, cut: Cutter) -> None:
    [answer] = pose.forward([cut(())])
    assert (solved(answer).rows, solved(answer).passes) == ([], [])


def test_a_confidence_below_the_clients_minimum_is_a_row_that_says_so(pose: PoseStage, cut: Cutter) -> None:
    [answer] = pose.forward([msgspec.structs.replace(cut((0,)), min_score=1.1)])
    [row] = solved(answer).rows
    assert error(row).code == "low_confidence"
    assert "1.1" in error(row).detail
    assert row.rotation is None
    assert row.confidence > 0
    assert not isinstance(row.evidence, msgspec.UnsetType)


def test_hypotheses_come_only_where_asked_for(pose: PoseStage, cut: Cutter) -> None:
    [plain, asked] = pose.forward([cut((0,)), cut((0,), "b", hypotheses=2)])
    assert solved(plain).rows[0].hypotheses is msgspec.UNSET
    hypotheses = solved(asked).rows[0].hypotheses
    assert isinstance(hypotheses, list)
    assert len(hypotheses) <= 2


def test_an_object_without_a_model_is_the_row_no_cad_and_harms_nobody(pose: PoseStage, cut: Cutter) -> None:
    answers = pose.forward([without_object(cut((0,)), "0" * 64), cut((1,), "b")])
    assert error(solved(answers[0]).rows[0]).code == "no_cad"
    assert solved(answers[1]).rows[0].status == "ok"


def test_a_pass_that_runs_out_of_memory_is_halved(
    pose: PoseStage, cut: Cutter, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = Troubled(pose.engines["geometric"], MemoryError("too much"), above=1)
    monkeypatch.setitem(pose.engines, "geometric", engine)  # type: ignore[misc]
    [answer] = pose.forward([cut((0, 1, 2))])
    assert [row.status for row in solved(answer).rows] == ["ok"] * 3
    assert engine.sizes == [3, 2, 1, 1, 1]
    assert [record.detections for record in solved(answer).passes] == [3]
    assert json.loads(capfd.readouterr().err.splitlines()[0])["event"] == "out_of_memory"


def test_what_does_not_fit_even_alone_is_an_engine_error(
    pose: PoseStage, cut: Cutter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pose.engines, "geometric", Troubled(pose.engines["geometric"], MemoryError(), above=0))
    [answer] = pose.forward([cut((0, 1))])
    assert [error(row).code for row in solved(answer).rows] == ["engine_error"] * 2
    assert "memory" in error(solved(answer).rows[0]).detail


def test_only_the_detection_that_breaks_the_engine_fails(
    pose: PoseStage, cut: Cutter, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    culprit = cut((1,), "culprit")
    engine = Troubled(pose.engines["geometric"], RuntimeError("secret path /srv"), seed=culprit.crops[0].seed)
    monkeypatch.setitem(pose.engines, "geometric", engine)  # type: ignore[misc]
    answers = pose.forward([cut((0,), "a"), culprit, cut((2,), "b")])
    assert [solved(answer).rows[0].status for answer in answers] == ["ok", "rejected", "ok"]
    assert error(solved(answers[1]).rows[0]) == RowError(code="engine_error", detail=INTERNAL_DETAIL)
    last = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert last["detections"] == ["culprit[0]"]
    assert "secret path" in last["traceback"]


def test_a_worker_whose_device_is_lost_makes_way_for_a_new_one(
    pose: PoseStage, cut: Cutter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setitem(pose.engines, "geometric", Troubled(pose.engines["geometric"], RuntimeError("lost"), above=0))
    monkeypatch.setattr(pose_module, "_device_works", lambda: False)
    monkeypatch.setattr(os, "_exit", leave)
    part = cut((0,))
    with pytest.raises(SystemExit):
        pose.forward([part])


def no_device_memory() -> None:
    """A GPU that does not answer."""
    raise RuntimeError("CUDA error")


def test_a_device_that_does_not_tell_its_memory_costs_no_answer(
    pose: PoseStage, cut: Cutter, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pose_module, "_device_memory", no_device_memory)
    [answer] = pose.forward([cut((0,))])
    assert solved(answer).rows[0].status == "ok"
    last = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert (last["event"], last["reason"]) == ("device_memory_unknown", "CUDA error")


def test_a_worker_whose_device_is_lost_after_its_last_answer_makes_way_too(
    pose: PoseStage, cut: Cutter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(pose_module, "_device_memory", no_device_memory)
    monkeypatch.setattr(pose_module, "_device_works", lambda: False)
    monkeypatch.setattr(os, "_exit", leave)
    part = cut((0,))
    with pytest.raises(SystemExit):
        pose.forward([part])


def test_an_engine_that_is_not_loaded_is_said_in_the_row(pose: PoseStage, cut: Cutter) -> None:
    [answer] = pose.forward([msgspec.structs.replace(cut((0,)), engine="other")])
    assert error(solved(answer).rows[0]).code == "engine_error"
    assert "'other'" in error(solved(answer).rows[0]).detail


def test_the_state_tells_of_the_cache_and_the_speed(pose: PoseStage, cut: Cutter, stored: StoredObject) -> None:
    before = pose.state.state.info
    assert before["objects"] == [stored.object_id]  # warm before the first request
    assert before["detections_per_second"]["geometric"] > 0
    assert before["device"] == "cpu"
    pose.forward([cut((0,))])
    assert pose.state.state.info["cache_hits"] == before["cache_hits"] + 1
    assert pose.state.state.info["cache_bytes"] > 0


def test_a_deleted_object_is_forgotten_and_one_onboarded_anew_is_loaded_anew(
    shared: Stages, stored: StoredObject, pose: PoseStage, cut: Cutter, tmp_path: Path
) -> None:
    folder = Path(shared.objects_dir) / stored.object_id
    shutil.move(folder, tmp_path / "away")
    [answer] = pose.forward([cut((0,))])
    assert error(solved(answer).rows[0]).code == "no_cad"
    assert pose.state.state.info["objects"] == []
    shutil.move(tmp_path / "away", folder)
    misses = pose.models.misses
    [answer] = pose.forward([cut((0,))])
    assert solved(answer).rows[0].status == "ok"
    [model] = folder.glob("geometric-*.safetensors")
    model.write_bytes(model.read_bytes())  # same content, another time
    pose.forward([cut((0,))])
    assert pose.models.misses == misses + 2
    model_bytes = model.read_bytes()
    model.write_bytes(model_bytes[:1000])
    [answer] = pose.forward([cut((0,))])
    assert error(solved(answer).rows[0]).code == "no_cad"
    model.write_bytes(model_bytes)


def test_a_stored_model_whose_arrays_do_not_fit_is_a_row_and_its_cause_is_logged(
    pose: PoseStage, cut: Cutter, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def load(store: ObjectStore, object_id: str, engine: str, version: str) -> ObjectModel:
        model = real(store, object_id, engine, version)
        return dataclasses.replace(model, arrays={n: a for n, a in model.arrays.items() if n != "points_m"})

    real = ObjectStore.load_model
    monkeypatch.setattr(ObjectStore, "load_model", load)
    monkeypatch.setattr(pose.models, "_held", OrderedDict())
    [answer] = pose.forward([cut((0,))])
    assert error(solved(answer).rows[0]).code == "no_cad"
    last = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert (last["event"], last["cause"]) == ("no_model", "KeyError('points_m')")


def test_large_crops_come_out_of_a_file_beside_their_job(
    decode: DecodeStage, pose: PoseStage, asker: Asker, tmp_path: Path
) -> None:
    (tmp_path / "job").write_bytes(msgspec.msgpack.encode(asker.job()))
    made = decode.forward(Part(part_id="r1/0", start=0, stop=3, path=str(tmp_path / "job")))
    assert isinstance(made, Cut)
    encoded = decode.serialize_ipc(made)
    assert len(encoded) < 1000
    assert len(list(tmp_path.iterdir())) == 2
    back = pose.deserialize_ipc(encoded)
    pose.state.release_all()
    assert msgspec.msgpack.encode(back) == msgspec.msgpack.encode(made)
    assert [path.name for path in tmp_path.iterdir()] == ["job"]
    lost = pose.deserialize_ipc(encoded)  # given up meanwhile, and its files are gone
    pose.state.release_all()
    assert isinstance(lost, Failure)
    assert (lost.part_id, lost.code) == ("r1/0", "internal")
