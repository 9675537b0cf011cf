"""Pose errors and average recall as the BOP challenges 2019 and 2020 define them: VSD, MSSD and MSPD.

    target = prepare_target(mesh, symmetries)                        # once per object
    errors = pose_error(T_est, T_true, target, depth_m, K)           # per instance
    recalls(errors, target.diameter_m, depth_m.shape[1]).ar          # None instead of errors: no answer

Hodan et al., «BOP Challenge 2020 on 6D Object Localization», section 2.2: an error counts as right below a threshold.
The recall is averaged over the thresholds of each measure, and AR is the mean of the three. A set's AR is the mean of
its instances' AR. Poses are (4, 4), object to camera, in metres.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import ConvexHull, QhullError

from posekit.engine import Bool, Float32, Float64, Mesh, Symmetries
from posekit.io import meshes
from posekit.render import Caster, pixel_rays
from posekit.synthetic.shapes import rotation

SHARES = np.arange(1, 11) / 20  # of the diameter for VSD's tau and for MSSD; of the visible surface for VSD's theta
MSPD_STEP_PX = 5.0  # ten thresholds this far apart, for images 640 pixels wide
VISIBLE_M = 0.015  # VSD's delta: a surface up to this far behind the camera's reading counts as visible
TURN_SHARE = 0.01  # share of the diameter that one step of a continuous symmetry moves the furthest vertex
PROJECTED_VERTICES = 5000  # of a larger mesh, MSPD uses a part of the vertices
CHUNK = 500_000  # points held at a time while going through symmetries: 12 MB an array


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the measures need to know of one object; made by `prepare_target`."""

    diameter_m: float
    transforms: Float64  # (S, 4, 4), motions of the object onto itself, the identity first
    hull_m: Float64  # (H, 3), vertices of the convex hull: they give the same MSSD as all vertices
    vertices_m: Float64  # (V, 3), for MSPD
    corners_m: Float64  # (8, 3), of the box around the mesh
    caster: Caster  # of the mesh in its own frame


@dataclass(frozen=True, kw_only=True)
class Errors:
    """The distance of one estimate from the truth, by the three measures."""

    vsd: Float64  # (10,), 0..1, for tau = 0.05..0.5 of the diameter
    mssd_m: float
    mspd_px: float  # inf if the estimate is not wholly in front of the camera


@dataclass(frozen=True, kw_only=True)
class Recalls:
    """Shares of the thresholds that one estimate passes, 0..1; `ar` is their mean."""

    vsd: float
    mssd: float
    mspd: float
    ar: float


def prepare_target(mesh: Mesh, symmetries: Symmetries, diameter_m: float | None = None) -> Target:
    """Prepare a mesh for the measures; `diameter_m` None = measured.

    Of a mesh with more than PROJECTED_VERTICES vertices, MSPD uses those of the convex hull and every n-th vertex.
    """
    vertices = mesh.vertices_m.astype(np.float64)
    diameter = meshes.diameter_m(vertices) if diameter_m is None else diameter_m
    on_hull = _hull(vertices)
    stride = -(-len(vertices) // PROJECTED_VERTICES)
    projected = np.union1d(on_hull, np.arange(0, len(vertices), stride))
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    return Target(
        diameter_m=diameter,
        transforms=symmetry_transforms(symmetries, vertices[on_hull], diameter),
        hull_m=vertices[on_hull],
        vertices_m=vertices[projected],
        corners_m=np.stack(np.meshgrid(*zip(low, high, strict=True)), axis=-1).reshape(8, 3),
        caster=Caster([mesh]),
    )


def symmetry_transforms(symmetries: Symmetries, vertices_m: npt.NDArray[Any], diameter_m: float) -> Float64:
    """Return all motions of the object onto itself, (S, 4, 4), the identity first.

    A continuous symmetry becomes turns that move the furthest of the vertices (V, 3) by at most TURN_SHARE of the
    diameter each. Every discrete symmetry is followed by every turn. As in BOP, turns about different axes are not
    combined with one another, so that a sphere needs more than two axes to be covered.
    """
    turns = [np.eye(4)]
    for axis, offset_m in symmetries.continuous:
        arms = np.cross(vertices_m - offset_m, axis / np.linalg.norm(axis))
        way_m = 2 * np.pi * float(np.linalg.norm(arms, axis=1).max())
        steps = int(np.ceil(way_m / (TURN_SHARE * diameter_m)))
        for step in range(1, steps):
            T = np.eye(4)
            T[:3, :3] = rotation(axis.tolist(), 360.0 * step / steps)
            T[:3, 3] = offset_m - T[:3, :3] @ offset_m
            turns.append(T)
    discrete = np.stack([np.eye(4), *symmetries.discrete])
    return np.asarray((np.stack(turns)[None] @ discrete[:, None]).reshape(-1, 4, 4), dtype=np.float64)


def pose_error(T_est: Float64, T_true: Float64, target: Target, depth_m: Float32, K: Float64) -> Errors:
    """Return all three errors of an estimate. `depth_m`: the camera's readings, (H, W), z in metres, 0 = no reading."""
    return Errors(
        vsd=vsd(T_est, T_true, target, depth_m, K),
        mssd_m=mssd_m(T_est, T_true, target.hull_m, target.transforms),
        mspd_px=mspd_px(T_est, T_true, target.vertices_m, target.transforms, K),
    )


def mssd_m(T_est: Float64, T_true: Float64, vertices_m: npt.NDArray[Any], transforms: Float64) -> float:
    """Return the maximum symmetry-aware surface distance: the furthest vertex's way, to the nearest symmetric truth.

    vertices_m: (V, 3); transforms: (S, 4, 4). The way is the length of an affine function of the vertex. So the
    furthest vertex lies on the convex hull, whose vertices alone give the same result.
    """
    points = _homogeneous(vertices_m)
    nearest = np.inf
    for some in _chunks(transforms, len(vertices_m)):
        ways = (T_est - T_true @ some)[:, :3] @ points  # (s, 3, V)
        nearest = min(nearest, float(np.square(ways).sum(axis=1).max(axis=1).min()))
    return float(np.sqrt(nearest))


def mspd_px(T_est: Float64, T_true: Float64, vertices_m: npt.NDArray[Any], transforms: Float64, K: Float64) -> float:
    """Return the maximum symmetry-aware projection distance: as `mssd_m`, between projected vertices, in pixels.

    Returns inf if the estimate has a vertex at or behind the camera, which has no place in the image. The truth is
    assumed to lie in front of it.
    """
    points = _homogeneous(vertices_m)
    x, y, z = K @ T_est[:3] @ points
    if (z <= 0).any():
        return float("inf")
    u, v = x / z, y / z
    nearest = np.inf
    for some in _chunks(transforms, len(vertices_m)):
        seen = (K @ (T_true @ some)[:, :3]) @ points  # (s, 3, V)
        squared = np.square(seen[:, 0] / seen[:, 2] - u) + np.square(seen[:, 1] / seen[:, 2] - v)
        nearest = min(nearest, float(squared.max(axis=1).min()))
    return float(np.sqrt(nearest))


def vsd(T_est: Float64, T_true: Float64, target: Target, depth_m: Float32, K: Float64) -> Float64:
    """Return the visible surface discrepancy for tau = 0.05..0.5 of the diameter: (10,), each 0..1.

    Of the pixels where the object is visible at either pose, this is the share where it is not visible at both, or
    where the two surfaces are tau or more apart. Distances are from the camera's centre, not depths. A surface is
    visible if it lies at most VISIBLE_M behind the scene's surface in `depth_m` (H, W), or if that has no reading (0);
    the estimate also where the truth is visible. The result is 1 if nothing is visible at either pose.
    """
    boxes = [_box_px(target.corners_m, T, K, depth_m.shape) for T in (T_est, T_true)]
    left, top = np.min([box[:2] for box in boxes], axis=0)
    right, bottom = np.max([box[2:] for box in boxes], axis=0)
    rays = pixel_rays(K, right - left, bottom - top, left, top)
    lengths = np.linalg.norm(rays, axis=-1)
    scene = depth_m[top:bottom, left:right] * lengths
    distances = []
    for T, (u0, v0, u1, v1) in zip((T_est, T_true), boxes, strict=True):
        own = np.s_[v0 - top : v1 - top, u0 - left : u1 - left]
        R, t = T[:3, :3], T[:3, 3]
        distance = np.full(lengths.shape, np.inf)  # inf = no object there
        distance[own] = target.caster.cast(-R.T @ t, rays[own] @ R)["t_hit"] * lengths[own]
        distances.append(distance)
    est, true = distances
    visible_true = _visible(true, scene)
    visible_est = _visible(est, scene) | (visible_true & np.isfinite(est))
    either = int((visible_true | visible_est).sum())
    if either == 0:
        return np.ones(len(SHARES))
    both = visible_true & visible_est
    apart = np.abs(est[both] - true[both])
    good = (apart[None] < SHARES[:, None] * target.diameter_m).sum(axis=1)
    return np.asarray(1 - good / either, dtype=np.float64)


def recalls(errors: Errors | None, diameter_m: float, width_px: int) -> Recalls:
    """Return the recalls of one instance in an image of that width; None = there was no answer, all recalls are 0."""
    if errors is None:
        return Recalls(vsd=0.0, mssd=0.0, mspd=0.0, ar=0.0)
    of_vsd = float((errors.vsd[:, None] < SHARES).mean())
    of_mssd = float((errors.mssd_m < SHARES * diameter_m).mean())
    of_mspd = float((errors.mspd_px < np.arange(1, 11) * MSPD_STEP_PX * width_px / 640).mean())
    return Recalls(vsd=of_vsd, mssd=of_mssd, mspd=of_mspd, ar=(of_vsd + of_mssd + of_mspd) / 3)


def _visible(distance: Float64, scene: Float64) -> Bool:
    """Return True where a surface at these distances (inf = none) is seen in a scene of those (0 = no reading)."""
    return np.asarray(np.isfinite(distance) & ((scene == 0) | (distance - scene <= VISIBLE_M)), dtype=np.bool_)


def _box_px(corners_m: Float64, T: Float64, K: Float64, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the pixels that may see a box; all if it reaches behind the camera."""
    height, width = shape
    x, y, z = K @ T[:3] @ _homogeneous(corners_m)
    if (z < 1e-6).any():
        return 0, 0, width, height
    u, v = x / z, y / z
    left, right = np.clip([np.floor(u.min()), np.ceil(u.max()) + 1], 0, width).astype(int)
    top, bottom = np.clip([np.floor(v.min()), np.ceil(v.max()) + 1], 0, height).astype(int)
    return int(left), int(top), int(right), int(bottom)


def _hull(vertices: Float64) -> npt.NDArray[np.int64]:
    """Return the indices of the convex hull's vertices; all vertices if the mesh is flat."""
    try:
        return np.sort(ConvexHull(vertices).vertices).astype(np.int64)
    except QhullError:
        return np.arange(len(vertices))


def _homogeneous(points: npt.NDArray[Any]) -> Float64:
    """Append a row of ones: (V, 3) -> (4, V)."""
    return np.concatenate([np.asarray(points, dtype=np.float64).T, np.ones((1, len(points)))])


def _chunks(transforms: Float64, points: int) -> Iterator[Float64]:
    """Yield the transforms in groups that make at most CHUNK transformed points, given `points` points."""
    size = max(1, CHUNK // points)
    for start in range(0, len(transforms), size):
        yield transforms[start : start + size]
