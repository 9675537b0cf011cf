"""Helpers for the tests of the geometric engine: one engine, objects onboarded once, pictures and crops of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import trimesh

from posekit.engine import Bool, Estimate, Float64, Instance, Mesh, ObjectModel, Outcome, Symmetries, UInt8
from posekit.geometric.engine import GeometricEngine
from posekit.geometric.model import Prepared, Shelf, prepare
from posekit.geometric.observe import Cleaned, Observations, clean, together
from posekit.geometric.poses import Poses
from posekit.geometric.symmetry import pose_difference
from posekit.render import Caster
from posekit.synthetic.scenes import Scene, SceneInstance, demo_scene
from posekit.synthetic.shapes import SHAPES, Shape, rotation

NO_SYMMETRY = Symmetries()
SURE = 0.8  # a larger confidence counts as right


@functools.cache
def engine() -> GeometricEngine:
    return GeometricEngine("cpu", threads=1)


def onboarded(mesh: Mesh, object_id: str = "primitive") -> ObjectModel:
    return engine().onboard(object_id, mesh, None, lambda share: None)


@functools.cache
def model(name: str) -> ObjectModel:
    """Return the onboarded model of an object in SHAPES."""
    return onboarded(SHAPES[name]().mesh, name)


@functools.cache
def prepared(name: str) -> Prepared:
    return prepare(model(name), torch.device("cpu"))


def estimate(*instances: Instance, models: Mapping[str, ObjectModel] | None = None) -> list[Outcome]:
    return engine().estimate(instances, models or {one.object_id: model(one.object_id) for one in instances})


def solved(instance: Instance, models: Mapping[str, ObjectModel] | None = None) -> Estimate:
    outcome = estimate(instance, models=models)[0]
    assert isinstance(outcome, Estimate), outcome
    return outcome


def off_by(answer: Estimate, truth: SceneInstance) -> tuple[float, float]:
    """Return degrees and millimetres to the truth, modulo the symmetries of the shape."""
    angle_deg, distance_m = pose_difference(answer.T_cam_obj, truth.T_cam_obj, truth.shape.symmetries)
    return angle_deg, 1000 * distance_m


def cut(scene: Scene, index: int, mask: Bool | None = None, **changes: Any) -> Instance:
    """Cut an instance out of a scene, or the pixels of `mask` (H, W), with a margin around it."""
    truth = scene.instances[index]
    mask = truth.mask if mask is None else mask
    rows, columns = np.nonzero(mask)
    top, left = max(rows.min() - 25, 0), max(columns.min() - 25, 0)
    window = (slice(top, rows.max() + 26), slice(left, columns.max() + 26))
    instance = Instance(
        object_id=truth.shape.name,
        rgb=scene.rgb[window],
        depth_m=scene.depth_m[window],
        mask=mask[window],
        K=scene.K - np.array([[0, 0, left], [0, 0, top], [0, 0, 0]]),
        seed=1,
    )
    return dataclasses.replace(instance, **changes)


@functools.cache
def demo(index: int = 0) -> Instance:
    """Return the crop of an object of the demo scene, the housing first."""
    return cut(demo_scene(), index)


def at(x_m: float, y_m: float, z_m: float, R: Float64 | None = None) -> Float64:
    """Return T_cam_obj (4, 4) of an object at this place."""
    T = np.eye(4)
    T[:3, :3] = np.eye(3) if R is None else R
    T[:3, 3] = x_m, y_m, z_m
    return T


def nudged(T_cam_obj: Float64, degrees: float, metres: float) -> Float64:
    """Return a pose turned about a slanted axis of the object and shifted along a slanted axis of the camera."""
    T = T_cam_obj.copy()
    T[:3, :3] = T[:3, :3] @ rotation((1, 2, 0.5), degrees)
    T[:3, 3] += metres * np.array([0.54, -0.45, 0.71])
    return T


def photograph(
    shapes: Sequence[Shape],
    T_cam_obj: Sequence[Float64],
    *,
    wall_m: float = 1.0,
    focal_px: float = 600.0,
    width: int = 640,
    height: int = 480,
) -> Scene:
    """Picture shapes before a wall, without noise and without light; depth in tenths of a millimetre."""
    K = np.array([[focal_px, 0, width / 2 - 0.5], [0, focal_px, height / 2 - 0.5], [0, 0, 1]])
    seen = Caster([shape.mesh for shape in shapes], T_cam_obj).render(np.eye(4), K, width, height)
    there = seen.depth_m > 0
    return Scene(
        rgb=np.where(there[..., None], seen.rgb, 90).astype(np.uint8),
        depth_raw=np.rint(np.where(there, seen.depth_m, wall_m) * 10_000).astype(np.uint16),
        depth_scale_mm=0.1,
        K=K,
        instances=[
            SceneInstance(shape=shape, T_cam_obj=T, mask=np.asarray(seen.instance == index), visibility=1.0)
            for index, (shape, T) in enumerate(zip(shapes, T_cam_obj, strict=True))
        ],
    )


def mesh_of(solid: trimesh.Trimesh, colours: UInt8 | None = None) -> Mesh:
    return Mesh(
        vertices_m=np.asarray(solid.vertices, dtype=np.float32),
        faces=np.asarray(solid.faces, dtype=np.int32),
        vertex_colors=colours,
    )


def cuboid(extents_m: Sequence[float], cuts: int = 0) -> trimesh.Trimesh:
    """Make a box of 12 triangles, each divided into four `cuts` times."""
    box: trimesh.Trimesh = trimesh.creation.box(extents_m)
    for _ in range(cuts):
        box = box.subdivide()
    return box


def of_shells(*shells: trimesh.Trimesh) -> Mesh:
    """Join several surfaces into one mesh, in order."""
    vertices = np.concatenate([shell.vertices for shell in shells])
    first = np.cumsum([0, *(len(shell.vertices) for shell in shells)])
    faces = np.concatenate([shell.faces + start for shell, start in zip(shells, first, strict=False)])
    return Mesh(vertices_m=vertices.astype(np.float32), faces=faces.astype(np.int32))


def cleaned(instance: Instance, diameter_m: float) -> Cleaned:
    one = clean(instance, diameter_m)
    assert isinstance(one, Cleaned), one
    return one


def looked_at(instance: Instance, model: Prepared) -> tuple[Shelf, Observations]:
    """Return the inputs of the engine's steps, for one instance."""
    shelf = Shelf.of([model])
    return shelf, together([cleaned(instance, model.diameter_m)], shelf.diameter_m)


def poses_of(T_cam_obj: Sequence[Float64], model: Prepared) -> Poses:
    """Return poses, (4, 4) each, as the hypotheses of one instance, centred."""
    T = torch.from_numpy(np.stack(T_cam_obj))
    t = T[:, :3, 3] + T[:, :3, :3] @ model.centre_m.double()
    return Poses(T[None, :, :3, :3].float(), t[None].float())


def pose_of(poses: Poses, index: int, model: Prepared) -> Float64:
    """Return one of an instance's hypotheses as a pose (4, 4) of the object's own frame."""
    R, t = poses.R[0, index].double(), poses.t[0, index].double()
    x_m, y_m, z_m = (t - R @ model.centre_m.double()).tolist()
    return at(x_m, y_m, z_m, R.numpy())
