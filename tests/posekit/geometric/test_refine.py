"""Poses refined against the observation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from posekit.engine import Float64
from posekit.geometric.poses import Poses
from posekit.geometric.refine import polish, refine
from posekit.geometric.score import tolerance_m
from posekit.geometric.symmetry import pose_difference
from posekit.synthetic.scenes import demo_scene
from tests.posekit.geometric.support import NO_SYMMETRY, demo, looked_at, nudged, pose_of, poses_of, prepared

TRUTH = demo_scene().instances[0].T_cam_obj


def errors(poses: Poses) -> list[tuple[float, float]]:
    """Return degrees and millimetres to the truth."""
    model = prepared("housing")
    off = [pose_difference(pose_of(poses, index, model), TRUTH, NO_SYMMETRY) for index in range(poses.count)]
    return [(angle_deg, 1000 * distance_m) for angle_deg, distance_m in off]


def refined(*T_cam_obj: Float64, visible: int = 128, steps: int = 8) -> Poses:
    model = prepared("housing")
    shelf, observations = looked_at(demo(), model)
    tolerance = tolerance_m(shelf, observations)
    reach_m = [0.08 * shelf.diameter_m] * (steps // 2) + [3 * tolerance] * (steps - steps // 2)
    return refine(
        shelf,
        observations,
        poses_of(T_cam_obj, model),
        points=384,
        visible=visible,
        reach_m=reach_m,
        through_m=2 * tolerance,
    )


@pytest.mark.parametrize("visible", [0, 128])
def test_poses_from_every_side_are_drawn_to_the_truth(visible: int) -> None:
    starts = [nudged(TRUTH, sign * 8, sign * metres) for sign in (1, -1) for metres in (0.008, -0.008)]
    for angle_deg, distance_mm in errors(refined(*starts, visible=visible)):
        assert angle_deg < 1.5
        assert distance_mm < 2


def test_a_pose_that_nothing_pulls_stays_where_it_is() -> None:
    away = nudged(TRUTH, 10, 0.0)
    away[2, 3] += 3.0
    model = prepared("housing")
    moved = refined(away, visible=0)
    assert torch.isfinite(moved.R).all()
    assert np.allclose(pose_of(moved, 0, model), away, atol=1e-4)


def test_points_that_are_not_trusted_do_not_pull() -> None:
    model = prepared("housing")
    shelf, observations = looked_at(demo(), model)
    start = poses_of([nudged(TRUTH, 5, 0.005)], model)
    settings = {"points": 256, "visible": 0, "reach_m": [0.08 * shelf.diameter_m] * 6, "through_m": shelf.diameter_m}
    trust = torch.zeros(1, 1, 512)
    still = refine(shelf, observations, start, trust=trust, **settings)  # type: ignore[arg-type]
    assert torch.allclose(still.t, start.t, atol=1e-6)
    spoilt = dataclasses.replace(observations, points=observations.points.clone())
    spoilt.points[:, ::2] += torch.tensor([0.01, 0, 0.01])
    trust[..., 1::2] = 1
    half = refine(shelf, observations, start, trust=trust, **settings)  # type: ignore[arg-type]
    same = refine(shelf, spoilt, start, trust=trust, **settings)  # type: ignore[arg-type]
    assert torch.equal(half.R, same.R)
    assert torch.equal(half.t, same.t)


def test_polishing_brings_near_poses_nearer() -> None:
    model = prepared("housing")
    shelf, observations = looked_at(demo(), model)
    starts = [nudged(TRUTH, 1.5, 0.0015), nudged(TRUTH, -1.5, 0.0015)]
    for angle_deg, distance_mm in errors(polish(shelf, observations, poses_of(starts, model))):
        assert angle_deg < 0.4
        assert distance_mm < 0.4


def test_polishing_leaves_rotations_rotations() -> None:
    model = prepared("housing")
    R = polish(*looked_at(demo(), model), poses_of([nudged(TRUTH, 1, 0.001)], model)).R[0, 0].double()
    assert torch.allclose(R @ R.mT, torch.eye(3, dtype=torch.float64), atol=1e-5)
