"""Open3D: FPFH features, RANSAC over their matches, then point-to-plane ICP, with the distances of Open3D's tutorial.

The points under the mask are the source and the whole model is the target, since every good point has its match there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import open3d as o3d

from benchmarks.peers.job import Array, run, surface_points

VOXEL_SHARE = 0.04  # of the diameter of the model's box: 25 voxels along the object
SURFACE_POINTS = 20_000
RANSAC_ROUNDS = 1_000_000
ICP_REACHES = (1.0, 0.4)  # in voxels, one ICP after the other
ICP_ROUNDS = 50

registration: Any = o3d.pipelines.registration


@dataclass(frozen=True, kw_only=True)
class Model:
    """A prepared mesh."""

    voxel_m: float
    dense: Any  # point cloud with normals, for ICP
    coarse: Any  # one point per voxel, for RANSAC
    features: Any


class Open3dFpfh:
    """Open3D's FPFH, RANSAC and ICP."""

    def prepare(self, vertices_m: Array, faces: Array) -> Model:
        """Sample the surface, with the faces' normals, and compute its features."""
        voxel_m = VOXEL_SHARE * float(np.linalg.norm(np.ptp(vertices_m, axis=0)))
        points, normals = surface_points(vertices_m, faces, SURFACE_POINTS, seed=0)
        cloud = _cloud(points)
        cloud.normals = o3d.utility.Vector3dVector(normals)
        coarse = cloud.voxel_down_sample(voxel_m)
        return Model(
            voxel_m=voxel_m,
            dense=cloud.voxel_down_sample(voxel_m / 4),
            coarse=coarse,
            features=_features(coarse, voxel_m),
        )

    def solve(self, model: Model, points_m: Array) -> Array | None:
        """Match, then refine on all points."""
        o3d.utility.random.seed(0)
        cloud = _cloud(points_m)
        coarse = cloud.voxel_down_sample(model.voxel_m)
        if len(coarse.points) < 4:
            return None
        coarse.estimate_normals(o3d.geometry.KDTreeSearchParamHybrid(radius=2 * model.voxel_m, max_nn=30))
        coarse.orient_normals_towards_camera_location(np.zeros(3))
        reach_m = 1.5 * model.voxel_m
        found = registration.registration_ransac_based_on_feature_matching(
            coarse,
            model.coarse,
            _features(coarse, model.voxel_m),
            model.features,
            mutual_filter=False,
            max_correspondence_distance=reach_m,
            estimation_method=registration.TransformationEstimationPointToPoint(False),
            ransac_n=3,
            checkers=[
                registration.CorrespondenceCheckerBasedOnEdgeLength(0.9),
                registration.CorrespondenceCheckerBasedOnDistance(reach_m),
            ],
            criteria=registration.RANSACConvergenceCriteria(RANSAC_ROUNDS, 0.999),
        )
        if not len(found.correspondence_set):
            return None
        T_obj_cam = found.transformation
        for reach in ICP_REACHES:
            T_obj_cam = registration.registration_icp(
                cloud,
                model.dense,
                reach * model.voxel_m,
                T_obj_cam,
                registration.TransformationEstimationPointToPlane(),
                registration.ICPConvergenceCriteria(max_iteration=ICP_ROUNDS),
            ).transformation
        return np.asarray(np.linalg.inv(T_obj_cam))


def _cloud(points_m: Array) -> Any:
    return o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points_m.astype(np.float64)))


def _features(cloud: Any, voxel_m: float) -> Any:
    return registration.compute_fpfh_feature(
        cloud, o3d.geometry.KDTreeSearchParamHybrid(radius=5 * voxel_m, max_nn=100)
    )


if __name__ == "__main__":
    run(Open3dFpfh())
