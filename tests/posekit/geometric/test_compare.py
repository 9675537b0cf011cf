"""Render-and-compare: the cost of poses, and the certainty of the answer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from posekit.engine import Float64, Instance
from posekit.geometric.compare import Comparison, compare, decided, likelihood, margins
from posekit.synthetic.shapes import SHAPES, rotation
from tests.posekit.geometric.support import SURE, at, cut, looked_at, nudged, photograph, poses_of, prepared

TRUTH = at(0.01, 0, 0.6, rotation((1, 0.3, 0.2), 200))
CELLS_M = 0.003  # about three cells of the picture


@pytest.fixture(scope="module")
def housing() -> Instance:
    """A housing that nothing hides, in noiseless depth."""
    return cut(photograph([SHAPES["housing"]()], [TRUTH]), 0)


def judged(instance: Instance, *T_cam_obj: Float64) -> Comparison:
    model = prepared(instance.object_id)
    shelf, observations = looked_at(instance, model)
    return compare(shelf, observations, poses_of(T_cam_obj, model))


def test_the_true_pose_costs_less_than_one_moved_by_a_few_cells(housing: Instance) -> None:
    moves = [nudged(TRUTH, 0, sign * CELLS_M) for sign in (1, -1)] + [nudged(TRUTH, sign * 3, 0) for sign in (1, -1)]
    sideways = [at(sign * CELLS_M, 0, 0) @ TRUTH for sign in (1, -1)]
    cost = judged(housing, TRUTH, *moves, *sideways).cost[0]
    assert (cost[1:] > 1.5 * cost[0]).all()


def test_what_is_further_off_costs_more(housing: Instance) -> None:
    cost = judged(housing, *(nudged(TRUTH, 0, metres) for metres in (0, 0.003, 0.006, 0.012))).cost[0]
    assert cost.tolist() == sorted(cost.tolist())
    cost = judged(housing, *(nudged(TRUTH, degrees, 0) for degrees in (0, 3, 8, 20))).cost[0]
    assert cost.tolist() == sorted(cost.tolist())


def test_the_true_pose_explains_the_picture(housing: Instance) -> None:
    true = judged(housing, TRUTH)
    assert true.inliers.item() > 0.95
    assert true.overlap.item() > 0.9
    assert true.through.item() < 0.1
    assert true.residual_m.item() < 0.001
    assert true.colour.item() < 0.05
    assert true.inside.item() > 0.99
    assert likelihood(true).item() > 0.99


def test_what_stands_in_front_hides_and_violates_nothing(housing: Instance) -> None:
    depth_m, mask = housing.depth_m.copy(), housing.mask.copy()
    middle = mask.shape[1] // 2
    hidden = (slice(None), slice(middle - 12, middle + 12))
    assert mask[hidden].mean() > 0.3
    free = judged(housing, TRUTH)
    depth_m[hidden], mask[hidden] = 0.4, False
    behind = judged(dataclasses.replace(housing, depth_m=depth_m, mask=mask), TRUTH)
    assert behind.cost.item() < 1.1 * free.cost.item()
    assert behind.through.item() < free.through.item() + 0.02
    assert behind.overlap.item() > free.overlap.item() - 0.02
    assert behind.cells.item() < 0.95 * free.cells.item()
    assert likelihood(behind).item() > 0.99


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_a_pose_in_front_of_what_the_camera_saw_stands_in_free_space(housing: Instance, share: float) -> None:
    true, before = (judged(housing, at(0, 0, z) @ TRUTH) for z in (0, -(1 - share) * TRUTH[2, 3]))
    assert before.through.item() > 0.85
    assert before.inliers.item() < 0.1
    assert likelihood(before).item() < 1e-3
    assert before.cost.item() > 5 * true.cost.item()


def test_a_pose_behind_what_the_camera_saw_is_no_more_likely(housing: Instance) -> None:
    behind = judged(housing, at(0, 0, 0.05) @ TRUTH)
    assert behind.inliers.item() < 0.1
    assert likelihood(behind).item() < 1e-3


def test_a_pose_out_of_the_picture_is_judged_too(housing: Instance) -> None:
    away = judged(housing, at(1, 0, 0) @ TRUTH, at(0, 0, -2) @ TRUTH)
    assert torch.isfinite(away.cost).all()
    assert (away.inliers == 0).all()
    assert (away.overlap == 0).all()
    assert (likelihood(away) < 1e-3).all()


@pytest.mark.parametrize(
    "light", [(1, 1, 1), (0.5, 0.5, 0.5), (1, 0.9, 0.75), (0.8, 0.9, 1)], ids=["plain", "half", "warm", "cold"]
)
def test_colours_choose_among_poses_that_shape_cannot_tell_apart(light: tuple[float, float, float]) -> None:
    carton = SHAPES["carton"]()
    T = at(0.01, 0, 0.6, rotation((1, 0.5, 0.2), 215))
    crop = cut(photograph([carton], [T]), 0)
    lit = dataclasses.replace(crop, rgb=np.rint(crop.rgb * np.array(light)).astype(np.uint8))
    turned = [T @ S for S in carton.symmetries.discrete]
    judgement = judged(lit, T, *turned)
    assert (judgement.inliers[0] > 0.95).all()
    assert (judgement.cost[0, 1:] > 1.5 * judgement.cost[0, 0]).all()
    assert (judgement.colour[0, 1:] > judgement.colour[0, 0] + 0.1).all()
    assert (margins(judgement, torch.tensor([0]))[0, 1:] > 5).all()
    assert likelihood(judgement)[0, 0].item() > 0.98


def test_an_object_without_colours_is_not_judged_by_the_picture(housing: Instance) -> None:
    model = dataclasses.replace(prepared("housing"), colours=None, dense_colours=None)
    costs = []
    for rgb in (housing.rgb, 255 - housing.rgb):
        shelf, observations = looked_at(dataclasses.replace(housing, rgb=rgb), model)
        costs.append(compare(shelf, observations, poses_of([TRUTH], model)).cost.item())
    assert costs[0] == costs[1]


def test_margins_are_nothing_against_oneself_and_large_against_what_is_worse(housing: Instance) -> None:
    judgement = judged(housing, TRUTH, TRUTH, nudged(TRUTH, 8, 0), TRUTH @ at(0, 0, 0, rotation((0, 0, 1), 180)))
    same, again, turned, flipped = margins(judgement, torch.tensor([0]))[0].tolist()
    assert same == again == 0
    assert turned > 5
    assert flipped > 5
    assert margins(judgement, torch.tensor([2]))[0, 0].item() == pytest.approx(-turned)


def test_being_decided_grows_with_the_margin_from_one_half_to_one() -> None:
    chances = [decided(margin) for margin in np.linspace(0, 30, 200)]
    assert chances == sorted(chances)
    assert decided(0) == pytest.approx(0.5, abs=0.12)
    assert decided(3) < SURE < decided(5)
    assert decided(10) > 0.99
    assert decided(np.inf) > 0.9999
