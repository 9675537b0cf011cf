"""Scenes: the same bits for a seed, and a truth that agrees with the pixels."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from posekit.engine import Bool
from posekit.render import render
from posekit.synthetic.scenes import (
    MaskQuality,
    Scene,
    degrade_mask,
    demo_scene,
    make_scene,
    many_detections_scene,
    pose_errors,
    segment_by_depth,
)
from posekit.synthetic.shapes import SHAPES, rotation

QUALITIES = get_args(MaskQuality)


def pose(R: np.ndarray, t: tuple[float, float, float] = (0.02, -0.05, 0.7)) -> np.ndarray:
    T = np.eye(4)
    T[:3, :3] = R
    T[:3, 3] = t
    return T


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.fixture(scope="module")
def clean() -> Scene:
    return make_scene(11, noise=False, depth_scale_mm=0.1)


def test_a_seed_gives_the_same_bits() -> None:
    first, again, other = make_scene(3), make_scene(3), make_scene(4)
    assert np.array_equal(first.rgb, again.rgb)
    assert np.array_equal(first.depth_raw, again.depth_raw)
    assert np.array_equal(first.K, again.K)
    assert len(first.instances) == len(again.instances)
    for a, b in zip(first.instances, again.instances, strict=True):
        assert a.shape.name == b.shape.name
        assert np.array_equal(a.T_cam_obj, b.T_cam_obj)
        assert np.array_equal(a.mask, b.mask)
    assert not np.array_equal(first.depth_raw, other.depth_raw)


def test_a_scene_has_the_types_it_promises() -> None:
    scene = make_scene(5, count=2, width=320, height=200)
    assert scene.rgb.shape == (200, 320, 3)
    assert scene.rgb.dtype == np.uint8
    assert scene.depth_raw.shape == (200, 320)
    assert scene.depth_raw.dtype == np.uint16
    assert scene.K.shape == (3, 3)
    assert scene.K.dtype == np.float64
    assert scene.depth_m.dtype == np.float32
    assert all(item.mask.dtype == np.bool_ and item.mask.shape == (200, 320) for item in scene.instances)
    assert all(np.allclose(item.T_cam_obj[:3, :3] @ item.T_cam_obj[:3, :3].T, np.eye(3)) for item in scene.instances)


def test_without_noise_the_depth_inside_a_mask_is_the_models(clean: Scene) -> None:
    assert len(clean.instances) >= 3
    for item in clean.instances:
        alone = render([item.shape.mesh], [item.T_cam_obj], clean.K, 640, 480)
        assert (alone.instance[item.mask] == 0).mean() > 0.999
        errors = np.abs(alone.depth_m - clean.depth_m)[item.mask & (alone.instance == 0)]
        assert np.median(errors) < 1e-4
        assert item.visibility == pytest.approx(item.mask.sum() / (alone.instance == 0).sum(), abs=0.02)


def test_masks_do_not_overlap(clean: Scene) -> None:
    assert np.sum([item.mask for item in clean.instances], axis=0).max() == 1


def test_objects_stand_apart_when_occlusion_is_off() -> None:
    for seed in range(3):
        assert min(item.visibility for item in make_scene(seed, occlusion=False).instances) > 0.8


def test_noise_is_that_of_a_depth_sensor() -> None:
    noisy, exact = make_scene(8), make_scene(8, noise=False)
    mask = noisy.instances[0].mask
    read = mask & (noisy.depth_raw > 0)
    holes = 1 - read.sum() / mask.sum()
    errors_mm = (noisy.depth_m - exact.depth_m)[read] * 1000
    assert 0 < holes < 0.4
    assert 0.5 < np.percentile(np.abs(errors_mm), 68) < 5
    assert abs(np.median(errors_mm)) < 1


def test_only_shapes_asked_for_appear() -> None:
    scene = make_scene(2, shapes=[SHAPES["gear"](), SHAPES["mug"]()], count=5)
    assert {item.shape.name for item in scene.instances} <= {"gear", "mug"}
    assert len(scene.instances) >= 3


def test_the_demo_scene_shows_its_main_object_first() -> None:
    scene = demo_scene()
    assert scene is demo_scene()
    assert scene.rgb.shape == (480, 640, 3)
    main = scene.instances[0]
    assert main.shape.name == "housing"
    assert not main.shape.symmetries.discrete
    assert not main.shape.symmetries.continuous
    assert 0.9 < main.visibility < 1
    assert len(scene.instances) >= 5


def test_depth_alone_finds_the_objects_of_the_demo_scene() -> None:
    scene = demo_scene()
    found = segment_by_depth(scene.depth_m, scene.K)
    assert len(found) == len(scene.instances)
    for item in scene.instances:
        assert max(overlap(item.mask, mask) for mask in found) > 0.75


def test_depth_without_objects_or_without_readings_finds_none() -> None:
    K = np.array([[600.0, 0, 160], [0, 600.0, 120], [0, 0, 1]])
    assert segment_by_depth(np.zeros((240, 320), np.float32), K) == []
    assert segment_by_depth(np.full((240, 320), 0.8, np.float32), K) == []


@pytest.mark.parametrize("n", [1, 40, 70])
def test_many_detections_are_as_many_as_asked(n: int) -> None:
    scene = many_detections_scene(1, n)
    assert len(scene.instances) == n
    assert all(item.mask.sum() >= 300 for item in scene.instances)


@pytest.mark.parametrize("quality", QUALITIES)
def test_a_degraded_mask_is_a_new_one_and_the_same_for_a_seed(clean: Scene, quality: MaskQuality) -> None:
    mask, *others = (item.mask for item in clean.instances)
    before = mask.copy()
    first, again = (degrade_mask(mask, quality, np.random.default_rng(0), others) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.shares_memory(first, mask)
    assert np.array_equal(mask, before)
    assert np.array_equal(first, mask) == (quality == "exact")


@pytest.mark.parametrize("radius", [8, 25, 120])
def test_noisy_masks_overlap_the_true_ones_to_four_fifths_whatever_their_size(clean: Scene, radius: int) -> None:
    y, x = np.mgrid[:300, :320]
    disc = (x - 160) ** 2 + (y - 150) ** 2 < radius**2
    rng = np.random.default_rng(1)
    shared = [overlap(degrade_mask(disc, "noisy", rng), disc) for _ in range(20)]
    shared += [overlap(degrade_mask(item.mask, "noisy", rng), item.mask) for item in clean.instances]
    assert 0.76 < np.mean(shared) < 0.84
    assert min(shared) > 0.68
    assert max(shared) < 0.93


def blocks() -> tuple[Bool, Bool, Bool]:
    """Return three masks in a row: 20 x 20 pixels, 20 x 17 close to it, 20 x 10 far from both."""
    left, right, far = np.zeros((3, 60, 100), np.bool_)
    left[20:40, 10:30] = True
    right[20:40, 33:50] = True
    far[20:40, 80:90] = True
    return left, right, far


def test_under_segmentation_takes_a_fifth_of_each_close_neighbour_from_its_near_side() -> None:
    left, right, far = blocks()
    under = degrade_mask(left, "under", np.random.default_rng(0), [right, far])
    gained = under & ~left
    assert np.array_equal(under & left, left)
    assert gained.sum() == round(0.2 * right.sum())
    assert gained[:, 33:37].sum() == gained.sum()


def test_under_segmentation_without_a_neighbour_spills_over_the_border() -> None:
    left, _, far = blocks()
    under = degrade_mask(left, "under", np.random.default_rng(0), [far])
    assert np.array_equal(under & left, left)
    assert under.sum() == round(1.2 * left.sum())
    assert not under[:, 33:].any()


def test_merging_swallows_the_close_neighbour_whole() -> None:
    left, right, far = blocks()
    assert np.array_equal(degrade_mask(left, "merged", np.random.default_rng(0), [far, right]), left | right)
    alone = degrade_mask(left, "merged", np.random.default_rng(0), [far])
    assert alone.sum() > 1.5 * left.sum()
    assert not (alone & far).any()


@pytest.mark.parametrize("quality", QUALITIES)
def test_an_empty_mask_stays_empty(quality: MaskQuality) -> None:
    empty = np.zeros((40, 50), np.bool_)
    assert not degrade_mask(empty, quality, np.random.default_rng(0), [~empty]).any()


def test_pose_errors_are_the_angle_and_the_distance() -> None:
    symmetries = SHAPES["housing"]().symmetries
    T = pose(rotation((1, 2, 3), 50))
    moved = pose(rotation((1, 2, 3), 53), (0.02, -0.046, 0.703))
    assert pose_errors(T, T, symmetries) == pytest.approx((0, 0), abs=1e-6)
    assert pose_errors(moved, T, symmetries) == pytest.approx((3, 5), abs=1e-6)


@pytest.mark.parametrize("name", ["gear", "carton", "bolt", "tee"])
def test_pose_errors_ignore_discrete_symmetries(name: str) -> None:
    symmetries = SHAPES[name]().symmetries
    T = pose(rotation((1, -1, 0.4), 70))
    for S in symmetries.discrete:
        assert pose_errors(T @ S, T, symmetries) == pytest.approx((0, 0), abs=1e-4)


def test_pose_errors_ignore_turns_about_a_symmetry_axis() -> None:
    symmetries = SHAPES["bottle"]().symmetries
    T = pose(rotation((1, -1, 0.4), 70))
    turn, tilt = np.eye(4), np.eye(4)
    turn[:3, :3] = rotation((0, 0, 1), 123)
    tilt[:3, :3] = rotation((1, 0, 0), 4)
    assert pose_errors(T @ turn, T, symmetries) == pytest.approx((0, 0), abs=1e-4)
    assert pose_errors(T @ tilt @ turn, T, symmetries)[0] == pytest.approx(4, abs=1e-4)
