"""OpenCV (contrib): surface matching by point pair features, then its own ICP, with the numbers of OpenCV's sample.

Drost et al., «Model Globally, Match Locally», as in `cv2.ppf_match_3d`. Three things are done here because the module
does not do them. Lengths are given as shares of the model's diameter, since it clusters poses by an absolute distance.
The model is sampled as finely as keeps its training within seconds; training grows with the fourth power of the points.
Of the refined poses, the one that explains the most points is taken, since ICP's own residual picks the wrong one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import open3d as o3d

from benchmarks.peers.job import Array, run, surface_points

SAMPLINGS = (0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1)  # of the model's box along each axis
MODEL_POINTS = 700  # at most, after sampling
DISTANCE_STEP, ANGLES = 0.05, 30
SCENE_SAMPLING, SCENE_SHARE = 0.05, 1 / 5  # share of the scene's box; share of the scene's points that vote
SURFACE_POINTS = 5_000
NORMAL_NEIGHBOURS = 12
REFINED = 20  # number of poses refined: those with the most votes
ICP_ROUNDS, ICP_TOLERANCE, ICP_REJECTION, ICP_LEVELS = 100, 0.005, 2.5, 8
NEAR = 0.03  # of the diameter: a point this near to the model is explained

ppf: Any = cv2.ppf_match_3d  # type: ignore[attr-defined]  # it is in contrib alone


@dataclass(frozen=True, kw_only=True)
class Model:
    """A prepared mesh."""

    detector: Any
    diameter_m: float  # of its box
    points: Array  # (N, 6) float32: position in diameters, normal
    cloud: Any  # the positions, for Open3D


class OpencvPpf:
    """OpenCV's point pair features and ICP."""

    def __init__(self) -> None:
        cv2.setNumThreads(int(os.environ["OMP_NUM_THREADS"]))

    def prepare(self, vertices_m: Array, faces: Array) -> Model:
        """Sample the surface, with the faces' normals, and fill the hash table of its pairs."""
        positions, normals = surface_points(vertices_m, faces, SURFACE_POINTS, seed=0)
        diameter_m = float(np.linalg.norm(np.ptp(vertices_m, axis=0)))
        points = np.ascontiguousarray(np.hstack([positions / diameter_m, normals]), dtype=np.float32)
        detector = ppf.PPF3DDetector(_sampling(points), DISTANCE_STEP, ANGLES)
        detector.trainModel(points)
        return Model(detector=detector, diameter_m=diameter_m, points=points, cloud=_cloud(points))

    def solve(self, model: Model, points_m: Array) -> Array | None:
        """Vote, cluster, refine the best."""
        positions = np.ascontiguousarray(points_m / model.diameter_m, dtype=np.float32)
        _, scene = ppf.computeNormalsPC3d(positions, NORMAL_NEIGHBOURS, True, (0.0, 0.0, 0.0))
        found = list(model.detector.match(scene, SCENE_SHARE, SCENE_SAMPLING))[:REFINED]
        if not found:
            return None
        icp = ppf.ICP(ICP_ROUNDS, ICP_TOLERANCE, ICP_REJECTION, ICP_LEVELS)
        _, refined = icp.registerModelToScene(model.points, scene, found)
        cloud = _cloud(scene)
        best = max((pose.pose for pose in refined), key=lambda pose: _explained(cloud, model.cloud, pose))
        T_cam_obj = np.array(best, dtype=np.float64)
        T_cam_obj[:3, 3] *= model.diameter_m
        return T_cam_obj


def _sampling(points: Array) -> float:
    """Return the finest sampling that leaves at most MODEL_POINTS of the points (N, 6)."""
    ranges = [(float(axis.min()), float(axis.max())) for axis in points.T[:3]]
    for sampling in SAMPLINGS[:-1]:
        if len(ppf.samplePCByQuantization(points, *ranges, sampling, 0)) <= MODEL_POINTS:
            return sampling
    return SAMPLINGS[-1]


def _cloud(points: Array) -> Any:
    return o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points[:, :3].astype(np.float64)))


def _explained(scene: Any, model: Any, T_cam_obj: Array) -> float:
    """Return the share of the scene's points that lie near the model at a pose."""
    found = o3d.pipelines.registration.evaluate_registration(scene, model, NEAR, np.linalg.inv(T_cam_obj))
    return float(found.fitness)


if __name__ == "__main__":
    run(OpencvPpf())
