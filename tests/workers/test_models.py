"""The limit on the models in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from posekit.engine import ObjectModel, Symmetries
from posekit.errors import StoreError
from posekit.store import ObjectStore, StoredObject
from posekit.synthetic.box import box_mesh
from workers.engines import load_engine
from workers.models import ModelCache

NAMES = ["a" * 64, "b" * 64, "c" * 64]


class Plain:
    """The parts of an engine that the cache needs."""

    name, version, device = "plain", "1", "cpu"

    def prepare(self, model: ObjectModel) -> int:
        return 0


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    """Make a store of three objects with models of 1000 bytes."""
    store = ObjectStore(tmp_path)
    for age, object_id in enumerate(NAMES):
        stored = StoredObject(
            object_id=object_id,
            name=None,
            cad_format="ply",
            model_unit="mm",
            files=[],
            faces=1,
            watertight=True,
            extents_mm=(1, 1, 1),
            diameter_mm=1,
            created_unix=float(age),
        )
        store.commit(store.stage(), stored)
        store.save_model(
            ObjectModel(
                object_id=object_id,
                engine="plain",
                engine_version="1",
                diameter_m=0.1,
                symmetries=Symmetries(),
                arrays={"x": np.zeros(1000, np.uint8)},
            )
        )
    return store


def test_the_least_recently_used_leave_first(store: ObjectStore, tmp_path: Path) -> None:
    cache = ModelCache(tmp_path, limit_bytes=2000)
    engine = Plain()
    for name in (NAMES[0], NAMES[1], NAMES[0], NAMES[2]):
        cache.get(engine, name)  # type: ignore[arg-type]
    assert cache.object_ids == [NAMES[0], NAMES[2]]
    assert (cache.hits, cache.misses, cache.nbytes) == (1, 3, 2000)


def test_what_engines_prepare_counts_against_the_bound(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plain, "prepare", lambda self, model: 500)
    cache = ModelCache(tmp_path, limit_bytes=2999)
    for name in NAMES[:2]:
        cache.get(Plain(), name)  # type: ignore[arg-type]
    assert (cache.object_ids, cache.nbytes) == ([NAMES[1]], 1500)


def test_a_model_larger_than_the_bound_is_held_alone(store: ObjectStore, tmp_path: Path) -> None:
    cache = ModelCache(tmp_path, limit_bytes=10)
    cache.get(Plain(), NAMES[0])  # type: ignore[arg-type]
    cache.get(Plain(), NAMES[1])  # type: ignore[arg-type]
    assert cache.object_ids == [NAMES[1]]


def test_warming_up_starts_with_the_newest_and_stops_at_the_bound(store: ObjectStore, tmp_path: Path) -> None:
    cache = ModelCache(tmp_path, limit_bytes=2000)
    assert cache.warm_up([Plain()]) == []  # type: ignore[list-item]
    assert set(cache.object_ids) == {NAMES[2], NAMES[1]}


def test_one_broken_model_does_not_keep_the_others_from_being_warm(store: ObjectStore, tmp_path: Path) -> None:
    (store.folder(NAMES[1]) / "plain-1.safetensors").write_bytes(b"broken")
    cache = ModelCache(tmp_path, limit_bytes=10_000)
    assert cache.warm_up([Plain()]) == [NAMES[1]]  # type: ignore[list-item]
    assert set(cache.object_ids) == {NAMES[0], NAMES[2]}


def test_a_model_that_the_engine_cannot_use_is_no_reason_not_to_start(store: ObjectStore, tmp_path: Path) -> None:
    engine = load_engine("geometric", device="cpu", threads=1)
    for object_id in NAMES:
        folder = store.folder(object_id)
        (folder / "plain-1.safetensors").rename(folder / f"geometric-{engine.version}.safetensors")
    assert set(ModelCache(tmp_path, limit_bytes=10_000).warm_up([engine])) == set(NAMES)


@pytest.mark.parametrize("missing", ["points_m", "spacing_m", "field_nearest"])
def test_a_model_without_one_of_its_arrays_is_a_model_that_cannot_be_used(
    missing: str, store: ObjectStore, tmp_path: Path
) -> None:
    engine = load_engine("geometric", device="cpu", threads=1)
    model = engine.practice_model(NAMES[0], box_mesh())
    arrays = {name: array for name, array in model.arrays.items() if name != missing}
    assert len(arrays) == len(model.arrays) - 1
    store.save_model(dataclasses.replace(model, arrays=arrays))
    cache = ModelCache(tmp_path, limit_bytes=10_000)
    for _ in range(2):
        with pytest.raises(StoreError, match="stored model is broken; onboard it again"):
            cache.get(engine, NAMES[0])
    assert cache.object_ids == []


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_too_little_memory_for_a_model_does_not_make_it_a_broken_one(
    kind: type[Exception], store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Plain, model: ObjectModel) -> int:
        raise kind

    monkeypatch.setattr(Plain, "prepare", full)
    with pytest.raises(kind):
        ModelCache(tmp_path, limit_bytes=1).get(Plain(), NAMES[0])  # type: ignore[arg-type]


def test_ids_that_are_none_are_missing_objects(store: ObjectStore, tmp_path: Path) -> None:
    for object_id in ("", "../x", "d" * 64):
        with pytest.raises(StoreError):
            ModelCache(tmp_path, limit_bytes=1).get(Plain(), object_id)  # type: ignore[arg-type]
