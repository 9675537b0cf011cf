"""Engines with the settings of this start, and a first exercise for them.

Asking for versions is cheap, loading an engine is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Collection
from pathlib import Path

import msgspec
import numpy as np

import pointnet2_ext
from posekit import registry
from posekit.engine import Engine, Float32, Float64, Instance, Mesh, ObjectModel
from posekit.errors import BrokenCheckpoint, StoreError
from posekit.store import ObjectStore
from workers.settings import Stages


def load_engine(name: str, stages: Stages | None = None, *, device: str, threads: int) -> Engine:
    """The engine `name` on `device` ("cpu", "cuda:0"), with `threads` CPU threads. Imports what it needs: seconds.

    Raises BrokenCheckpoint where its version is no longer that of the server's start: nobody would read its models.
    """
    stages = stages or Stages()
    one, own = registry.spec(name), stages.own(name)
    if name in stages.versions and one.version(own) != stages.versions[name]:
        raise BrokenCheckpoint("the weights were replaced since the server started; start it again")
    return one.load(own, device, threads)


def versions(stages: Stages) -> dict[str, str]:
    """Engine name -> version, part of the stored model's file name, the default first. Imports no torch."""
    return {name: stages.versions.get(name) or registry.spec(name).version(stages.own(name)) for name in stages.engines}


def with_fixed_versions(stages: Stages) -> Stages:
    """The same with the versions as they are now: workers that start later load no other weights."""
    return msgspec.structs.replace(stages, versions=versions(stages))


def kernels(device: str, engines: Collection[str]) -> dict[str, str]:
    """Operation -> "compiled" or "reference": what these engines run on `device`. Imports torch."""
    found: dict[str, str] = {**pointnet2_ext.kernels(device)}
    for one in registry.by_effort():
        if one.name in engines:
            found |= one.kernels(device)
    return found


# ------------------------------------------------------------------------------------------------------ first exercise

_BOX_M = np.array([0.10, 0.06, 0.04])
_SIDE_PX = 112
_MOMENT_S = 1.0


def practise(engine: Engine, detections: int, folder: Path) -> float:
    """Let an engine solve a small made-up scene, so that what it does once is done, and return its detections/s.

    A pass of `detections` is timed where that takes no longer than a moment, else a single one. The model of the
    scene's box is kept in `folder`, so that a worker that replaces another one is there sooner.
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
    with contextlib.suppress(StoreError, OSError):  # no room: then the next worker builds it again
        store = ObjectStore(folder)
        store.folder(object_id).mkdir(exist_ok=True)
        store.save_model(model)
    return model


def box_mesh() -> Mesh:
    """A box of 100 x 60 x 40 mm about the origin."""
    corners = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)]) * _BOX_M
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [face for a, b, c, d in quads for face in ((a, b, c), (a, c, d))]
    return Mesh(vertices_m=corners.astype(np.float32), faces=np.array(faces, dtype=np.int32))


def box_instance(seed: int, object_id: str) -> Instance:
    """The box as a camera 0.6 m away sees it, turned at random: rays against its three pairs of sides."""
    rng = np.random.default_rng(seed)
    R_cam_obj, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    R_cam_obj[:, 0] *= np.linalg.det(R_cam_obj)
    K = np.array([[600.0, 0, _SIDE_PX / 2], [0, 600.0, _SIDE_PX / 2], [0, 0, 1]])
    depth_m = _box_depth(R_cam_obj, np.array([0.0, 0.0, 0.6]), K)
    return Instance(
        object_id=object_id,
        rgb=np.full((_SIDE_PX, _SIDE_PX, 3), 128, dtype=np.uint8),
        depth_m=depth_m,
        mask=depth_m > 0,
        K=K,
        seed=seed,
    )


def _box_depth(R_cam_obj: Float64, t_cam_obj: Float64, K: Float64) -> Float32:
    u, v = np.meshgrid(np.arange(_SIDE_PX), np.arange(_SIDE_PX))
    rays_cam = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(K).T  # (h, w, 3), z = 1
    rays_obj, camera_obj = rays_cam @ R_cam_obj, -R_cam_obj.T @ t_cam_obj
    with np.errstate(divide="ignore", invalid="ignore"):
        sides = np.stack([(sign * _BOX_M / 2 - camera_obj) / rays_obj for sign in (-1, 1)])
    enters, leaves = sides.min(axis=0).max(axis=-1), sides.max(axis=0).min(axis=-1)
    return np.where(enters < leaves, enters, 0.0).astype(np.float32)
