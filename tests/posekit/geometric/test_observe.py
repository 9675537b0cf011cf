"""Crops become clean points: the parts of a mask, thinning, and the direction of surfaces."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from posekit.engine import Instance
from posekit.geometric.observe import (
    LEAST_DRAWN,
    LEAST_POINTS,
    MASK_SIDE,
    POINTS,
    SEED_POINTS,
    SEEDS,
    Cleaned,
    clean,
    together,
)
from posekit.geometry import project
from posekit.synthetic.scenes import MaskQuality, Scene, degrade_mask, demo_scene
from posekit.synthetic.shapes import SHAPES, rotation
from tests.posekit.geometric.support import at, cleaned, cut, demo, model, photograph

DIAMETER_M = 0.13  # of a wedge


@pytest.fixture(scope="module")
def pair() -> Scene:
    """Two wedges side by side, 6 cm apart."""
    places = (at(-0.09, 0, 0.6, rotation((1, 0.3, 0.2), 200)), at(0.09, 0.02, 0.6, rotation((1, 0.5, 0), 230)))
    return photograph([SHAPES["wedge"]()] * 2, places)


def test_a_mask_of_two_objects_has_both_as_parts(pair: Scene) -> None:
    left, right = (one.mask for one in pair.instances)
    one = cleaned(cut(pair, 0, left | right), DIAMETER_M)
    on_the_left = one.column < one.K[0, 2]
    shares = [on_the_left[members].mean() for members in one.members]
    assert max(shares) == 1.0  # a part that is the left one alone,
    assert min(shares) == 0.0  # and one that is the right one


def test_a_mask_of_one_object_is_one_part(pair: Scene) -> None:
    assert cleaned(cut(pair, 0), DIAMETER_M).members.all()
    assert len(cleaned(cut(pair, 0), DIAMETER_M).members) == 1


@pytest.mark.parametrize("quality", ["exact", "noisy", "under", "merged"])
def test_parts_are_never_empty_and_shapes_are_fixed(quality: MaskQuality) -> None:
    scene = demo_scene()
    for index, truth in enumerate(scene.instances):
        others = [other.mask for other in scene.instances if other is not truth]
        mask = degrade_mask(truth.mask, quality, np.random.default_rng(index), others)
        one = cleaned(cut(scene, index, mask), model(truth.shape.name).diameter_m)
        assert one.row.shape == one.column.shape == (POINTS,)
        assert 1 <= len(one.members) <= SEEDS
        assert one.members.shape == (len(one.members), POINTS)
        assert one.seed_points.shape == (len(one.members), SEED_POINTS)
        for members, seeds in zip(one.members, one.seed_points, strict=True):
            assert members.sum() >= LEAST_DRAWN
            assert members[seeds].all()


@pytest.mark.parametrize("seed", range(8))
def test_a_part_that_the_points_miss_is_left_out(seed: int) -> None:
    """A ring with a thin spoke in its middle, beside blocks that are much larger than the object."""
    row, column = np.mgrid[:239, :239]
    radius = np.hypot(row - 120, column - 165)
    ring = (radius < 70) & (radius > 40) & ~((column < 145) & (np.abs(row - 120) < 45))
    spoke = (np.abs(row - 120) <= 1) & (column > 150) & (column < 210)
    mask = ring | spoke | ((column < 50) & (np.abs(row - 120) > 55))
    instance = Instance(
        object_id="small",
        rgb=np.full((*mask.shape, 3), 90, dtype=np.uint8),
        depth_m=np.where(mask, 0.6, 0).astype(np.float32),
        mask=mask,
        K=np.array([[600, 0, 120], [0, 600, 120], [0, 0, 1.0]]),
        seed=seed,
    )
    one = cleaned(instance, 0.013)
    assert (one.members.sum(axis=1) >= LEAST_DRAWN).all()
    observations = together([one], torch.tensor([0.013]))
    assert torch.isfinite(observations.seed_centres).all()


def test_points_are_pixels_under_the_mask_with_a_reading() -> None:
    one = cleaned(demo(), 0.17)
    assert (one.mask & (one.depth_m > 0))[one.row, one.column].all()
    assert len(np.unique(np.stack((one.row, one.column)), axis=1).T) == POINTS


def test_few_pixels_are_repeated() -> None:
    mask = np.zeros_like(demo().mask)
    mask.ravel()[np.flatnonzero(demo().mask & (demo().depth_m > 0))[: LEAST_POINTS + 1]] = True
    one = cleaned(dataclasses.replace(demo(), mask=mask), 0.17)
    assert one.row.shape == (POINTS,)
    assert one.mask[one.row, one.column].all()


def test_the_seed_chooses_the_points_and_nothing_else_does() -> None:
    again, other = cleaned(demo(), 0.17), cleaned(dataclasses.replace(demo(), seed=2), 0.17)
    assert cleaned(demo(), 0.17).row.tolist() == again.row.tolist() != other.row.tolist()
    assert isinstance(clean(dataclasses.replace(demo(), seed=-(2**70)), 0.17), Cleaned)


def test_points_in_front_of_and_behind_the_object_are_left_out() -> None:
    crop = demo()
    rows, columns = np.nonzero(crop.mask & (crop.depth_m > 0))
    depth = crop.depth_m.copy()
    stray = np.random.default_rng(0).permutation(len(rows))[: len(rows) // 50]
    depth[rows[stray], columns[stray]] += 0.4
    one = cleaned(dataclasses.replace(crop, depth_m=depth), model("housing").diameter_m)
    assert not (one.depth_m[one.row, one.column] > crop.depth_m[crop.mask].max() + 0.1).any()


def test_a_mask_wider_than_its_limit_is_thinned_and_keeps_its_camera() -> None:
    T = at(0, 0, 0.35, rotation((1, 0.3, 0.2), 200))
    scene = photograph([SHAPES["wedge"]()], [T], focal_px=1200, width=1280, height=960)
    crop = cut(scene, 0)
    one = cleaned(crop, DIAMETER_M)
    step = crop.K[0, 0] / one.K[0, 0]
    assert crop.mask.any(axis=0).sum() > MASK_SIDE >= one.mask.any(axis=0).sum()
    assert step == 2
    assert one.depth_m.shape == one.mask.shape == one.rgb.shape[:2] == one.to_border.shape[:2]
    # A pixel of the thinned picture looks along the same ray as the one that it was.
    point = np.array([0.01, -0.02, 0.35])
    for axis in (0, 1):
        assert (one.K @ point)[axis] * step == pytest.approx((crop.K @ point)[axis])
    assert np.array_equal(one.depth_m, crop.depth_m[::2, ::2])


def test_a_wide_mask_of_few_pixels_is_left_as_it_is() -> None:
    mask = np.zeros((400, 400), dtype=np.bool_)
    mask[1::10, 1] = mask[1, 1::10] = True  # none of them where thinning would look
    crop = Instance(
        object_id="dots",
        rgb=np.zeros((400, 400, 3), np.uint8),
        depth_m=np.full((400, 400), 0.5, np.float32),
        mask=mask,
        K=np.array([[600.0, 0, 200], [0, 600, 200], [0, 0, 1]]),
        seed=0,
    )
    assert cleaned(crop, 0.1).mask.shape == (400, 400)


def test_the_way_to_the_border_leads_to_the_outermost_pixels_of_the_mask() -> None:
    one = cleaned(demo(), 0.17)
    row, column = np.indices(one.mask.shape) + one.to_border.transpose(2, 0, 1)[::-1].astype(int)
    padded = np.pad(one.mask, 1).astype(int)
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    outermost = one.mask & (around < 4)
    assert outermost[row, column].all()
    assert not one.to_border[outermost].any()


def test_normals_of_a_plane_are_its_own_and_look_at_the_camera() -> None:
    normal = rotation((1, 0.4, 0), 35) @ np.array([0, 0, -1.0])
    v, u = np.mgrid[:200, :200]
    rays = np.stack([(u - 100) / 600, (v - 100) / 600, np.ones_like(u)], axis=-1)
    depth = 0.6 * normal[2] / (rays @ normal)
    mask = np.zeros((200, 200), dtype=np.bool_)
    mask[40:160, 40:160] = True
    crop = Instance(
        object_id="plane",
        rgb=np.zeros((200, 200, 3), np.uint8),
        depth_m=depth.astype(np.float32),
        mask=mask,
        K=np.array([[600.0, 0, 100], [0, 600, 100], [0, 0, 1]]),
        seed=0,
    )
    seen = together([cleaned(crop, 0.2)], torch.tensor([0.2]))
    assert (seen.normals[0] @ torch.tensor(normal, dtype=torch.float32)).min() > 0.998
    assert seen.noise_m[0] < 5e-4
    noisy = crop.depth_m + np.random.default_rng(0).normal(0, 0.002, depth.shape).astype(np.float32)
    seen = together([cleaned(dataclasses.replace(crop, depth_m=noisy), 0.2)], torch.tensor([0.2]))
    assert seen.noise_m[0] == pytest.approx(0.002 * normal[2] ** 2, rel=0.4)  # across the plane, not along the ray


def test_what_model_points_meet_is_told_apart() -> None:
    seen = together([cleaned(demo(), 0.17)], torch.tensor([0.17]))
    on = seen.points[:, None, :50]

    def kinds(points: torch.Tensor) -> list[float]:
        """Return the shares on the object, beside it, seen through, hidden."""
        return [kind.float().mean().item() for kind in seen.classify(points, torch.tensor([0.004]))]

    assert kinds(on) == [1, 0, 0, 0]
    assert kinds(on * 1.05) == [0, 0, 0, 1]
    assert kinds(on + torch.tensor([1.0, 0, 0])) == [0, 0, 0, 0]  # outside the crop
    on_object, beside, through, hidden = kinds(on * 0.9)
    assert through > 0.9
    assert (on_object, beside, hidden) == (0, 0, 0)


def test_an_outline_is_good_to_a_pixel() -> None:
    """A board in front of a wall: beside the last pixel of the board nothing has been seen through yet."""
    depth_m = np.full((100, 100), 1.0, np.float32)
    depth_m[20:80, 20:80] = 0.5
    crop = Instance(
        object_id="board",
        rgb=np.zeros((100, 100, 3), np.uint8),
        depth_m=depth_m,
        mask=depth_m < 0.8,
        K=np.array([[600.0, 0, 0], [0, 600, 0], [0, 0, 1]]),
        seed=0,
    )
    seen = together([cleaned(crop, 0.1)], torch.tensor([0.1]))
    columns = torch.tensor([79.0, 80, 81])  # the last of the board, the first two beside it
    points = torch.stack((columns, torch.full((3,), 50.0), torch.full((3,), 600.0)), dim=-1) / 600 * 0.5
    through = seen.classify(points[None, None], torch.tensor([0.004]))[2]
    assert through[0, 0].tolist() == [False, False, True]


def test_pixels_of_a_batch_are_looked_up_in_their_own_crop() -> None:
    crops = [cleaned(demo(index), 0.15) for index in (0, 3, 5)]
    seen = together(crops, torch.full((3,), 0.15))
    flat, inside = seen.pixel(*project(seen.points, seen.K))
    assert inside.all()
    for row, one in enumerate(crops):
        assert torch.equal(seen.depth_m[flat[row]], torch.from_numpy(one.depth_m[one.row, one.column]))
        assert torch.equal(seen.mask[flat[row]], torch.ones(POINTS, dtype=torch.bool))
