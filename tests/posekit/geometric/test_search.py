"""Poses without a start: the results of a search, and the choice among many poses."""

from __future__ import annotations

import numpy as np
import torch

from posekit.geometric.kernels import distinct
from posekit.geometric.poses import Poses
from posekit.geometric.score import score, tolerance_m
from posekit.geometric.search import FINALISTS, search, with_twins
from posekit.geometric.symmetry import pose_difference
from posekit.synthetic.scenes import demo_scene
from posekit.synthetic.shapes import SHAPES, rotation
from tests.posekit.geometric.support import (
    NO_SYMMETRY,
    at,
    cut,
    demo,
    looked_at,
    nudged,
    photograph,
    pose_of,
    poses_of,
    prepared,
)


def test_a_search_leaves_a_few_poses_and_one_of_them_is_near_the_truth() -> None:
    model = prepared("housing")
    found, part = search(*looked_at(demo(), model))
    assert part.shape == (1, found.count)
    assert FINALISTS <= found.count <= FINALISTS + 2 * (len(model.twins) - 1)
    truth = demo_scene().instances[0].T_cam_obj
    errors = [pose_difference(pose_of(found, index, model), truth, NO_SYMMETRY) for index in range(found.count)]
    assert min(angle_deg for angle_deg, _ in errors) < 4
    assert min(distance_m for _, distance_m in errors) < 0.004


def test_the_true_pose_scores_higher_than_others() -> None:
    model = prepared("housing")
    truth = demo_scene().instances[0].T_cam_obj
    others = [nudged(truth, 15, 0), nudged(truth, 0, 0.02), nudged(truth, 170, 0), at(0, 0, -0.1) @ truth]
    shelf, observations = looked_at(demo(), model)
    for visible in (0, 128):
        poses = poses_of([truth, *others], model)
        whole = torch.zeros(1, poses.count, dtype=torch.int64)
        total = score(shelf, observations, poses, whole, points=256, visible=visible, colour=True)
        assert total[0, 0] > 0.5
        assert (total[0, 1:] < 0.8 * total[0, 0]).all()


def test_a_pose_is_judged_by_its_own_part_of_the_mask() -> None:
    """A mask that holds a larger neighbour: the small object explains its own part of it, not the whole."""
    small, large = SHAPES["wedge"](), SHAPES["housing"]()
    model = prepared("wedge")
    places = [at(-0.05, 0, 0.6, rotation((1, 0.3, 0.2), 200)), at(0.1, 0.02, 0.75, rotation((1, 0, 0), 210))]
    scene = photograph([small, large], places)
    crop = cut(scene, 0, mask=scene.instances[0].mask | scene.instances[1].mask)
    shelf, observations = looked_at(crop, model)
    parts = observations.members.shape[1]
    assert parts > 1
    poses = poses_of([places[0]] * parts, model)
    explained = score(shelf, observations, poses, torch.arange(parts)[None], points=256, visible=0)[0]
    assert explained[0] < 0.7
    assert explained.max() > 0.8


def test_what_counts_as_on_the_surface_grows_with_noise_and_distance() -> None:
    shape, model = SHAPES["wedge"](), prepared("wedge")
    tolerances = []
    for z_m, noise_m in ((0.6, 0.0), (0.6, 0.003), (1.6, 0.0)):
        crop = cut(photograph([shape], [at(0, 0, z_m, rotation((1, 0.3, 0.2), 200))], wall_m=2.5), 0)
        crop.depth_m[:] += noise_m * np.random.default_rng(0).standard_normal(crop.depth_m.shape).astype(np.float32)
        tolerances.append(tolerance_m(*looked_at(crop, model)).item())
    near, noisy, far = tolerances
    assert noisy > 2 * near
    assert far > 1.15 * near


def test_of_poses_that_are_alike_only_the_best_is_kept() -> None:
    T = at(0, 0, 0.7, rotation((1, 1, 0), 40))
    moved, turned, both = nudged(T, 0, 0.05), nudged(T, 30, 0), nudged(T, 2, 0.002)
    poses = poses_of([T, both, moved, turned], prepared("wedge"))
    total = torch.tensor([[0.8, 0.9, 0.7, 0.6]])
    kept = distinct(poses, total, 4, 5.0, torch.tensor([0.01]))
    assert kept.tolist() == [[1, 2, 3, 1]]  # the best is repeated where there are no more
    assert distinct(poses, total, 2, 5.0, torch.tensor([0.01])).tolist() == [[1, 2]]


def test_each_instance_of_a_batch_keeps_its_own() -> None:
    T = at(0, 0, 0.7)
    model = prepared("wedge")
    first = poses_of([T, nudged(T, 1, 0), nudged(T, 90, 0)], model)
    second = poses_of([T, nudged(T, 90, 0), nudged(T, 1, 0)], model)
    batch = Poses(torch.cat((first.R, second.R)), torch.cat((first.t, second.t)))
    total = torch.tensor([[0.9, 0.8, 0.7], [0.1, 0.2, 0.3]])
    kept = distinct(batch, total, 2, 5.0, torch.tensor([0.02, 0.02]))
    assert kept.tolist() == [[0, 2], [2, 1]]


def test_twins_of_the_first_poses_join_them() -> None:
    carton, model = SHAPES["carton"](), prepared("carton")
    T = at(0.01, 0, 0.6, rotation((1, 0.5, 0.2), 215))
    crop = cut(photograph([carton], [T]), 0)
    shelf, _ = looked_at(crop, model)
    poses = poses_of([T, nudged(T, 40, 0), nudged(T, 80, 0)], model)
    joined, part = with_twins(shelf, poses, torch.tensor([[2, 0, 1]]), first=1)
    assert part.tolist() == [[2, 0, 1, *[2] * (joined.count - 3)]]
    assert joined.count == 3 + len(model.twins) - 1
    for S in carton.symmetries.discrete:  # which the colours break
        wanted = T @ S
        errors = [pose_difference(pose_of(joined, i, model), wanted, NO_SYMMETRY) for i in range(joined.count)]
        assert min(angle_deg + 1000 * distance_m for angle_deg, distance_m in errors) < 2
