"""Evidence for a pose of the network: compare its few thousand model points with the depth that was read."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from posekit.engine import Bool, Evidence, Float32, Float64, Instance

NEAR = 0.1  # radii: a reading this near to a model point agrees with it; model points are some 0.08 apart
LOOKED_AT = 512  # readings, at most


def evidence(
    instance: Instance, points_obj_m: Float32, radius_m: float, seen_m: Float32, T_cam_obj: Float64
) -> Evidence:
    """Compare a pose with the picture.

    points_obj_m: (M, 3), spread over the model's surface; seen_m: (N, 3) readings in the camera frame. Model points
    that face away from the camera, lie outside the crop or have no reading are ignored.
    """
    tolerance_m = NEAR * radius_m
    R, t = T_cam_obj[:3, :3], T_cam_obj[:3, 3]
    readings_obj = (seen_m[:: max(1, len(seen_m) // LOOKED_AT)] - t) @ R
    distance_m, _ = cKDTree(points_obj_m).query(readings_obj)
    points_cam = points_obj_m @ R.T + t
    points_cam = points_cam[_in_front(points_cam, tolerance_m)]
    z = points_cam[:, 2]
    pixel = np.rint(points_cam @ instance.K.T / z[:, None])[:, :2].astype(np.int64)
    height, width = instance.depth_m.shape
    inside = (pixel >= 0).all(axis=1) & (pixel < (width, height)).all(axis=1)
    z, pixel = z[inside], pixel[inside]
    read = instance.depth_m[pixel[:, 1], pixel[:, 0]]
    known = (read > 0) & np.isfinite(read)
    behind_m = read[known] - z[known]
    met = np.abs(behind_m) < tolerance_m
    count = max(1, len(behind_m))
    return Evidence(
        inlier_fraction=float((distance_m < tolerance_m).mean()),
        residual_mm=float(1000 * np.median(np.abs(behind_m[met]))) if met.any() else 1000 * tolerance_m,
        visible_overlap=float(met.sum() / count),
        free_space_violation=float((behind_m > tolerance_m).sum() / count),
    )


def _in_front(points_cam: Float64, depth_m: float) -> Bool:
    """Return True for points that no other hides: in each cell of a coarse grid the nearest, or just behind it."""
    z = points_cam[:, 2]
    if not (z > depth_m).all():  # the points surround the camera: no answer possible
        return np.zeros(len(z), dtype=np.bool_)
    cell = (points_cam[:, :2] / z[:, None] * z.mean() / (1.5 * depth_m)).astype(np.int64)
    cell -= cell.min(axis=0)
    _, group = np.unique(cell[:, 0] * (cell[:, 1].max() + 1) + cell[:, 1], return_inverse=True)
    nearest = np.full(len(z), np.inf)  # only cells with points: the whole grid may be as large as K makes it
    np.minimum.at(nearest, group, z)
    return np.asarray(z < nearest[group] + 2 * depth_m)
