"""Inspecting meshes and onboarding objects."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
import trimesh

from posekit.engine import ObjectModel
from posekit.store import ObjectStore, StoredObject
from posekit.synthetic.box import box_mesh
from tests.workers.support import ascii_ply, register
from workers.messages import Failure, Inspected, InspectTask, Onboarded, OnboardTask
from workers.settings import Stages
from workers.stages.inspect_cad import InspectStage
from workers.stages.onboard import OnboardStage
from workers.state import progress_path

BOX = box_mesh()
PLY = ascii_ply(BOX.vertices_m * 1000, BOX.faces)


@pytest.fixture(scope="module")
def inspect(shared: Stages) -> InspectStage:
    return InspectStage()


@pytest.fixture(scope="module")
def onboard(shared: Stages) -> OnboardStage:
    return OnboardStage()


@pytest.fixture
def store(shared: Stages) -> ObjectStore:
    return ObjectStore(Path(shared.objects_dir))


def look(
    inspect: InspectStage, folder: Path, name: str, data: bytes, cad_format: str, unit: str | None
) -> Inspected | Failure:
    (folder / "source").mkdir(parents=True)
    (folder / "source" / name).write_bytes(data)
    task = {"task_id": "t", "folder": str(folder), "cad_format": cad_format, "model_unit": unit, "max_faces": 1000}
    return inspect.forward(msgspec.convert(task, InspectTask))


def inspected(found: Inspected | Failure) -> Inspected:
    assert isinstance(found, Inspected), found
    return found


def test_a_mesh_is_known_by_its_content_and_left_in_metres(inspect: InspectStage, tmp_path: Path) -> None:
    found = inspected(look(inspect, tmp_path / "a", "model.ply", PLY, "ply", "mm"))
    assert found.health.extents_mm == pytest.approx((100, 60, 40), rel=1e-4)
    assert found.health.watertight
    assert found.health.faces == 12
    assert (tmp_path / "a" / "mesh.safetensors").is_file()
    again = inspected(look(inspect, tmp_path / "b", "other.ply", PLY, "ply", "mm"))
    assert again.object_id == found.object_id
    metres = inspected(look(inspect, tmp_path / "c", "model.ply", PLY, "ply", "m"))
    assert metres.object_id != found.object_id
    assert metres.health.diameter_mm == pytest.approx(1000 * found.health.diameter_mm)


def test_a_guessed_unit_is_reported(inspect: InspectStage, tmp_path: Path) -> None:
    small = ascii_ply(BOX.vertices_m, BOX.faces)
    found = inspected(look(inspect, tmp_path / "a", "model.ply", small, "ply", "auto"))
    assert found.model_unit == "m"
    assert any("auto" in warning for warning in found.health.warnings)


def test_a_zip_is_the_files_in_it_however_they_are_packed(inspect: InspectStage, tmp_path: Path) -> None:
    ids = set()
    for index, method in enumerate((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", method) as archive:
            archive.writestr("model.ply", PLY)
        folder = tmp_path / str(index)
        ids.add(inspected(look(inspect, folder, "model.zip", packed.getvalue(), "zip", "mm")).object_id)
    assert len(ids) == 1


def test_a_glb_is_in_metres_unless_told_also_in_a_zip(inspect: InspectStage, tmp_path: Path) -> None:
    glb = trimesh.Scene(trimesh.Trimesh(BOX.vertices_m, BOX.faces, process=False)).export(file_type="glb")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("model.glb", glb)
    for name, data in (("model.glb", glb), ("model.zip", packed.getvalue())):
        for unit, expected in ((None, "m"), ("mm", "mm")):
            found = inspected(look(inspect, tmp_path / f"{unit}-{name}", name, data, name[-3:], unit))
            assert found.model_unit == expected
            assert found.health.extents_mm[0] == pytest.approx(100 if expected == "m" else 0.1, rel=1e-4)
    assert inspected(look(inspect, tmp_path / "ply", "model.ply", PLY, "ply", None)).model_unit == "mm"


@pytest.mark.parametrize(
    "data, kind",
    [
        (b"", "bad_data"),
        (b"ISO-10303-21;\nHEADER;", "invalid"),
        (b"ply\nnonsense", "bad_data"),
        (PLY.replace(b"element face 12", b"element face 99999"), "too_large"),
        (ascii_ply(BOX.vertices_m * np.nan, BOX.faces), "invalid"),
    ],
)
def test_what_is_no_usable_mesh_is_a_failure(inspect: InspectStage, tmp_path: Path, data: bytes, kind: str) -> None:
    found = look(inspect, tmp_path / "a", "model.ply", data, "ply", "mm")
    assert isinstance(found, Failure)
    assert found.code == kind


def test_a_folder_that_is_gone_is_our_own_fault(inspect: InspectStage, tmp_path: Path) -> None:
    task = InspectTask(task_id="t", folder=str(tmp_path / "x"), cad_format="ply", model_unit="mm", max_faces=1)
    found = inspect.forward(task)
    assert isinstance(found, Failure)
    assert found.code == "internal"
    assert str(tmp_path) not in found.detail


def test_onboarding_tells_its_progress_and_leaves_a_model(
    shared: Stages, stored: StoredObject, store: ObjectStore, onboard: OnboardStage
) -> None:
    assert store.has_model(stored.object_id, "geometric", onboard.engine.version)
    assert float(progress_path(Path(shared.run_dir), stored.object_id, "geometric").read_text()) == 1.0


def test_what_is_onboarded_is_not_onboarded_again(
    stored: StoredObject, onboard: OnboardStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onboard.engine, "onboard", None)  # calling it would fail
    answer = onboard.forward(OnboardTask(task_id="t", object_id=stored.object_id))
    assert isinstance(answer, Onboarded)


def test_a_stored_model_that_cannot_be_read_is_built_again(
    stored: StoredObject, store: ObjectStore, onboard: OnboardStage
) -> None:
    [model] = store.folder(stored.object_id).glob("geometric-*.safetensors")
    model.write_bytes(b"broken")
    answer = onboard.forward(OnboardTask(task_id="t", object_id=stored.object_id))
    assert isinstance(answer, Onboarded)
    store.load_model(stored.object_id, "geometric", onboard.engine.version)


def test_a_model_that_came_while_another_was_built_stays(
    stored: StoredObject, store: ObjectStore, onboard: OnboardStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = onboard.engine
    assert engine is not None
    [path] = store.folder(stored.object_id).glob("geometric-*.safetensors")
    imported = path.read_bytes()
    path.unlink()
    build = engine.onboard

    def slow(*given: object) -> ObjectModel:
        model = build(*given)  # type: ignore[arg-type]
        path.write_bytes(imported)
        return model

    monkeypatch.setattr(engine, "onboard", slow)
    written = []
    monkeypatch.setattr(onboard.store, "save_model", lambda *model, **facts: written.append(model))
    assert isinstance(onboard.forward(OnboardTask(task_id="t", object_id=stored.object_id)), Onboarded)
    assert written == []


def test_declared_symmetries_override_those_found(inspect: InspectStage, tmp_path: Path, onboard: OnboardStage) -> None:
    turned = np.diag([-1.0, -1.0, 1.0, 1.0])
    turned[:3, 3] = (4.0, 0.0, 0.0)
    declared = {"symmetries_discrete": [turned.ravel().tolist()], "symmetries_continuous": []}
    elsewhere = ObjectStore(tmp_path)
    own = onboard.store
    onboard.store = elsewhere
    try:
        made = register(elsewhere, inspect.forward, onboard.forward, declared=declared)
        answer = onboard.forward(OnboardTask(task_id="t", object_id=made.object_id))
    finally:
        onboard.store = own
    assert isinstance(answer, Onboarded)
    assert answer.symmetries.symmetries_discrete == declared["symmetries_discrete"]


def test_an_object_that_is_not_there_is_not_found(onboard: OnboardStage) -> None:
    answer = onboard.forward(OnboardTask(task_id="t", object_id="e" * 64))
    assert isinstance(answer, Failure)
    assert answer.code == "unknown_object"


def test_an_object_whose_mesh_is_broken_fails_in_words(
    onboard: OnboardStage, stored: StoredObject, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    elsewhere = ObjectStore(tmp_path)
    elsewhere.commit(elsewhere.stage(), stored)
    own = onboard.store
    onboard.store = elsewhere
    try:
        answer = onboard.forward(OnboardTask(task_id="t", object_id=stored.object_id))
    finally:
        onboard.store = own
    assert isinstance(answer, Failure)
    assert "register the object again" in answer.detail
    assert all(json.loads(line) for line in capfd.readouterr().err.splitlines())
