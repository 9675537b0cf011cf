"""Objects on disk: whole or absent, whatever happens in between."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from posekit import store as store_module
from posekit.engine import Mesh, ObjectModel, Symmetries
from posekit.errors import InvalidInput, StoreError, StoreFull
from posekit.store import ObjectStore, StoredObject

ID, OTHER = "a" * 64, "0123456789abcdef" * 4
MESH = Mesh(
    vertices_m=np.array([[0, 0, 0], [0.1, 0, 0], [0, 0.1, 0]], np.float32),
    faces=np.array([[0, 1, 2]], np.int32),
    vertex_colors=np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.uint8),
)


def described(object_id: str = ID, **changes) -> StoredObject:
    fields = {
        "object_id": object_id,
        "name": "mug",
        "cad_format": "ply",
        "model_unit": "mm",
        "files": ["model.ply"],
        "faces": 1,
        "watertight": False,
        "extents_mm": (100.0, 100.0, 0.0),
        "diameter_mm": 141.4,
        "warnings": ["the mesh is not watertight"],
        "declared_symmetries": {"symmetries_discrete": [[1.0] * 16], "symmetries_continuous": []},
        "created_unix": 1.5,
    }
    return StoredObject(**{**fields, **changes})


def add(store: ObjectStore, object_id: str = ID, **changes) -> bool:
    staged = store.stage()
    (staged / "source" / "model.ply").write_bytes(b"ply")
    store.save_mesh(staged, MESH)
    return store.commit(staged, described(object_id, **changes))


def model(object_id: str = ID, version: str = "1") -> ObjectModel:
    return ObjectModel(
        object_id=object_id,
        engine="geometric",
        engine_version=version,
        diameter_m=0.1414,
        symmetries=Symmetries(
            discrete=(np.diag([-1.0, -1.0, 1.0, 1.0]),), continuous=((np.array([0.0, 0.0, 1.0]), np.full(3, 0.01)),)
        ),
        arrays={
            "points": np.arange(12, dtype=np.float32).reshape(4, 3),
            "table": np.arange(6, dtype=np.int64).reshape(2, 3).T,  # not contiguous
            "flags": np.array([True, False]),
            "none": np.zeros((0, 3), np.float16),
            "one": np.float64(3.5) * np.ones(()),
        },
    )


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(tmp_path / "objects")


def test_an_object_comes_back_as_it_was_stored(store):
    assert add(store)
    assert store.get(ID) == described()
    mesh = store.load_mesh(ID)
    assert np.array_equal(mesh.vertices_m, MESH.vertices_m)
    assert np.array_equal(mesh.faces, MESH.faces)
    assert np.array_equal(mesh.vertex_colors, MESH.vertex_colors)
    assert (store.folder(ID) / "source" / "model.ply").read_bytes() == b"ply"


def test_a_second_store_on_the_same_folder_sees_it(store):
    add(store)
    assert ObjectStore(store.root).get(ID) == described()


def test_the_same_object_again_changes_nothing_and_leaves_nothing(store):
    assert add(store)
    assert not add(store, name="another")
    assert store.get(ID).name == "mug"
    assert [entry.name for entry in store.root.iterdir()] == [ID]


def test_objects_are_listed_oldest_first_and_broken_ones_left_out(store):
    add(store, ID, created_unix=2.0)
    add(store, OTHER, created_unix=1.0)
    for name, content in (("b" * 64, None), ("c" * 64, b"{"), ("d" * 64, b"[]"), ("e" * 64, b"\xff"), ("stray", b"x")):
        (store.root / name).mkdir()
        if content is not None:
            (store.root / name / "object.json").write_bytes(content)
    (store.root / ("f" * 64)).write_bytes(b"a file where a folder should be")
    assert [stored.object_id for stored in store.list()] == [OTHER, ID]
    assert store.broken() == [letter * 64 for letter in "bcdef"]


def test_a_broken_folder_makes_way_for_the_object(store):
    broken = store.root / ID
    broken.mkdir()
    (broken / "object.json").write_bytes(b"{")
    assert add(store)
    assert store.get(ID) == described()


def test_a_name_can_change(store):
    add(store)
    assert store.get(ID).names == ["mug"]
    store.replace(described().named(["mug", "can", "cup"]))
    assert store.get(ID).name == "cup"
    assert store.get(ID).aliases == ["mug", "can"]
    assert store.get(ID).names == ["mug", "can", "cup"]
    store.replace(described().named([]))
    assert (store.get(ID).name, store.get(ID).names) == (None, [])
    with pytest.raises(StoreError, match="no such object"):
        store.replace(msgspec.structs.replace(described(), object_id=OTHER))


def test_a_removed_object_is_gone_and_can_come_again(store):
    add(store)
    assert store.remove(ID)
    assert not store.remove(ID)
    assert store.get(ID) is None
    assert list(store.root.iterdir()) == []
    assert add(store)


@pytest.mark.parametrize(
    "object_id", ["", "..", "../" * 10, "a" * 63, "A" * 64, "a" * 65, "a" * 63 + "/", "a" * 64 + "\n"]
)
def test_an_id_that_is_no_hash_never_reaches_the_disk(store, object_id):
    assert store.get(object_id) is None
    acts = [store.folder, store.remove, store.load_mesh]
    acts += [lambda one: store.failure(one, "geometric", "1"), lambda one: store.fail(one, "geometric", "1", "x")]
    for act in acts:
        with pytest.raises(InvalidInput, match="64 hexadecimal characters"):
            act(object_id)


# ------------------------------------------------------------------------------------------------------------- models


def test_a_model_comes_back_as_it_was_stored(store):
    add(store)
    assert not store.has_model(ID, "geometric", "1")
    store.save_model(model())
    assert store.has_model(ID, "geometric", "1")
    loaded = store.load_model(ID, "geometric", "1")
    assert (loaded.object_id, loaded.engine, loaded.engine_version) == (ID, "geometric", "1")
    assert loaded.diameter_m == 0.1414
    assert np.array_equal(loaded.symmetries.discrete[0], np.diag([-1.0, -1.0, 1.0, 1.0]))
    assert np.array_equal(loaded.symmetries.continuous[0], [[0.0, 0.0, 1.0], [0.01, 0.01, 0.01]])
    for name, array in model().arrays.items():
        assert loaded.arrays[name].dtype == array.dtype
        assert loaded.arrays[name].shape == array.shape
        assert np.array_equal(loaded.arrays[name], array)


def test_versions_live_side_by_side(store):
    add(store)
    store.save_model(model(version="1"))
    store.save_model(model(version="2.b1"))
    assert store.has_model(ID, "geometric", "1")
    assert store.load_model(ID, "geometric", "2.b1").engine_version == "2.b1"
    assert not store.has_model(ID, "sam6d", "1")


@pytest.mark.parametrize("engine, version", [("../x", "1"), ("geometric", "../../1"), ("", "1"), ("a/b", "1")])
def test_an_engine_is_no_way_out_of_the_folder(store, engine, version):
    with pytest.raises(StoreError, match="letters, digits"):
        store.has_model(ID, engine, version)


def test_a_missing_model_or_mesh_is_a_store_error(store):
    with pytest.raises(StoreError, match="lacks a file"):
        store.load_model(ID, "geometric", "1")
    with pytest.raises(StoreError, match="lacks a file"):
        store.load_mesh(ID)
    with pytest.raises(StoreError):  # no folder to write to
        store.save_model(model())


def test_a_broken_model_or_mesh_is_a_store_error_wherever_it_breaks(store):
    add(store)
    store.save_model(model())
    path = store.folder(ID) / "geometric-1.safetensors"
    whole = path.read_bytes()
    for broken in (b"", whole[:7], whole[: len(whole) // 2], whole[:-1], b"\xff" * 64, b"{}" * 99):
        path.write_bytes(broken)
        with pytest.raises(StoreError, match="broken"):
            store.load_model(ID, "geometric", "1")
        (store.folder(ID) / "mesh.safetensors").write_bytes(broken)
        with pytest.raises(StoreError, match="broken"):
            store.load_mesh(ID)
    path.write_bytes((store.folder(ID) / "mesh.safetensors").read_bytes())


def test_a_model_of_another_object_or_engine_is_refused(store):
    add(store)
    store.save_model(model())
    path = store.folder(ID) / "geometric-1.safetensors"
    path.rename(path.with_name("sam6d-1.safetensors"))
    with pytest.raises(StoreError, match="another object or engine"):
        store.load_model(ID, "sam6d", "1")
    store.save_mesh(store.folder(ID), MESH)
    (store.folder(ID) / "mesh.safetensors").rename(path)
    with pytest.raises(StoreError, match="model is broken"):  # a mesh is no model
        store.load_model(ID, "geometric", "1")


def test_a_model_is_described_without_its_arrays(store):
    add(store)
    store.save_model(model(), seconds=1.25, threads=2)
    described_as = store.describe_model(ID, "geometric", "1")
    assert (described_as.seconds, described_as.threads) == (1.25, 2)
    assert described_as.nbytes == (store.folder(ID) / "geometric-1.safetensors").stat().st_size
    assert np.array_equal(described_as.symmetries.discrete[0], model().symmetries.discrete[0])
    with pytest.raises(StoreError, match="missing or broken"):
        store.describe_model(ID, "geometric", "2")


def test_an_engines_failure_is_remembered_until_it_is_cleared(store):
    add(store)
    assert store.failure(ID, "geometric", "1") is None
    store.fail(ID, "geometric", "1", "the mesh is hollow: 7 < 8")
    assert ObjectStore(store.root).failure(ID, "geometric", "1") == "the mesh is hollow: 7 < 8"
    assert store.failure(ID, "sam6d", "1") is None
    assert store.failure(ID, "geometric", "2") is None  # a new version tries anew
    store.clear_failures(ID)
    store.clear_failures(ID)
    assert store.failure(ID, "geometric", "1") is None
    (store.folder(ID) / "geometric-1.failed.json").write_bytes(b"{")
    assert "cannot be read" in store.failure(ID, "geometric", "1")


# ------------------------------------------------------------------------------------------------- kills and full disks


def test_sweeping_removes_what_was_left_behind_and_nothing_else(store):
    add(store)
    store.save_model(model())
    before = {path: path.stat().st_mtime for path in store.root.rglob("*")}
    store.stage()
    (store.root / ".trash-1" / "source").mkdir(parents=True)
    (store.root / ".partial-2").write_bytes(b"half")
    (store.folder(ID) / ".partial-3").write_bytes(b"half")
    assert store.sweep() == 4
    assert store.sweep() == 0
    assert {path: path.stat().st_mtime for path in store.root.rglob("*") if path.is_file()} == {
        path: time_ for path, time_ in before.items() if path.is_file()
    }


def test_sweeping_a_folder_that_went_away_is_no_crash(store):
    store.root.rmdir()
    assert store.sweep() == 0
    assert store.list() == []
    assert store.bytes_used() == 0


def test_a_kill_in_the_middle_leaves_objects_whole_or_absent(store):
    script = (
        "import sys, itertools, numpy as np; sys.path.insert(0, 'tests/posekit'); from pathlib import Path\n"
        "from test_store import *\n"
        "store = ObjectStore(Path(sys.argv[1])); print('go', flush=True)\n"
        "for count in itertools.count():\n"
        "    add(store, f'{count:064x}'); store.save_model(model(f'{count:064x}'))\n"
    )
    for delay_s in (0.02, 0.11, 0.23):
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(store.root)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": "."},
        )
        with child:
            assert child.stdout.readline() == b"go\n"
            time.sleep(delay_s)
            child.send_signal(signal.SIGKILL)
        store.sweep()
        assert store.broken() == []
        for stored in store.list():
            store.load_mesh(stored.object_id)
            if store.has_model(stored.object_id, "geometric", "1"):
                store.load_model(stored.object_id, "geometric", "1")
        assert not list(store.root.rglob(".*"))
    assert store.list()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so_and_leaves_the_old_file_in_place(store, monkeypatch, code):
    add(store)

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code), "/some/server/path")

    monkeypatch.setattr(store_module.os, "fsync", full)
    for act in (
        lambda: store.replace(described()),
        lambda: store.save_model(model()),
        lambda: store.fail(ID, "geometric", "1", "x"),
    ):
        with pytest.raises(StoreFull, match="full") as caught:
            act()
        assert "/some" not in caught.value.detail
    staged = store.stage()
    with pytest.raises(StoreFull):
        store.commit(staged, described(OTHER))
    monkeypatch.undo()
    assert store.get(ID) == described()
    assert not store.has_model(ID, "geometric", "1")
    assert [path.name for path in store.root.iterdir()] == [ID]
    assert store.sweep() == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_one_may_not_write_to_is_a_store_error(store):
    store.root.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="Permission denied"):
            store.stage()
    finally:
        store.root.chmod(0o700)


def test_a_root_that_is_a_file_is_a_store_error_without_its_path(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError) as caught:
        ObjectStore(tmp_path / "file" / "objects")
    assert str(tmp_path) not in caught.value.detail


def test_bytes_used_counts_every_file(store):
    assert store.bytes_used() == 0
    add(store)
    assert store.bytes_used() == sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file()) > 300
