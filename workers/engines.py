"""Load engines with the settings of this start, and warm them up.

Asking for versions is cheap; loading an engine is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Collection
from pathlib import Path

import msgspec

import pointnet2_ext
from posekit import registry
from posekit.engine import Engine, Instance, ObjectModel
from posekit.errors import BrokenCheckpoint, StoreError
from posekit.store import ObjectStore
from posekit.synthetic.box import box_instance, box_mesh
from workers.settings import Stages


def load_engine(name: str, stages: Stages | None = None, *, device: str, threads: int) -> Engine:
    """Load the engine `name` on `device` ("cpu", "cuda:0"), with `threads` CPU threads; its imports take seconds.

    Raises BrokenCheckpoint if its version changed since the server's start: no other process would read its models.
    """
    stages = stages or Stages()
    one, own = registry.spec(name), stages.own(name)
    if name in stages.versions and one.version(own) != stages.versions[name]:
        what = "the weights were replaced" if one.weights else f"the engine {name} was replaced"
        raise BrokenCheckpoint(f"{what} since the server started; start it again")
    return one.load(own, device, threads)


def versions(stages: Stages) -> dict[str, str]:
    """Return engine name -> version (part of the stored model's file name), the default first. Imports no torch."""
    return {name: stages.versions.get(name) or registry.spec(name).version(stages.own(name)) for name in stages.engines}


def with_fixed_versions(stages: Stages) -> Stages:
    """Return the settings with the current versions fixed, so that workers that start later load no other weights."""
    return msgspec.structs.replace(stages, versions=versions(stages))


def kernels(device: str, engines: Collection[str]) -> dict[str, str]:
    """Return operation -> "compiled" or "reference" of these engines on `device`. Imports torch."""
    found: dict[str, str] = {**pointnet2_ext.kernels(device)}
    for one in registry.by_effort():
        if one.name in engines:
            found |= one.kernels(device)
    return found


# ------------------------------------------------------------------------------------------------------ first exercise

_MOMENT_S = 1.0


def practise(engine: Engine, detections: int, folder: Path) -> float:
    """Warm up an engine on a small made-up scene, and return its detections/s.

    A pass of `detections` is timed if that takes no longer than a moment, else a single detection. The model of the
    scene's box is kept in `folder`, so that a worker that replaces another one starts sooner.
    """
    model = _practice_model(engine, folder)
    engine.prepare(model)
    instances = [box_instance(seed, model.object_id) for seed in range(detections)]
    seconds = [_time(engine, instances[:1], model) for _ in range(2)][-1]
    if seconds * detections > _MOMENT_S:
        return 1.0 / seconds
    return detections / _time(engine, instances, model)


def _time(engine: Engine, instances: list[Instance], model: ObjectModel) -> float:
    begun = time.perf_counter()
    engine.estimate(instances, {model.object_id: model})
    return max(time.perf_counter() - begun, 1e-6)


def _practice_model(engine: Engine, folder: Path) -> ObjectModel:
    object_id = hashlib.sha256(b"the box of the first exercise").hexdigest()
    try:
        return ObjectStore(folder).load_model(object_id, engine.name, engine.version)
    except StoreError:
        model = engine.practice_model(object_id, box_mesh())
    with contextlib.suppress(StoreError, OSError):  # no room: the next worker builds it again
        store = ObjectStore(folder)
        store.folder(object_id).mkdir(exist_ok=True)
        store.save_model(model)
    return model
