"""Scenes: the same bits for a seed, and a truth that agrees with the pixels."""

from __future__ import annotations

import numpy as np
import pytest

from posekit.render import render
from posekit.scenes import (
    Scene,
    degrade_mask,
    demo_scene,
    make_scene,
    many_detections_scene,
    pose_errors,
    segment_by_depth,
)
from posekit.shapes import SHAPES, rotation


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


def test_masks_degrade_as_named(clean: Scene) -> None:
    masks = [item.mask for item in clean.instances]
    exact = degrade_mask(masks[0], "exact", np.random.default_rng(0))
    assert np.array_equal(exact, masks[0])
    assert exact is not masks[0]
    noisy = degrade_mask(masks[0], "noisy", np.random.default_rng(0))
    assert 0.7 < overlap(noisy, masks[0]) < 0.99
    assert np.array_equal(noisy, degrade_mask(masks[0], "noisy", np.random.default_rng(0)))
    spilt = degrade_mask(masks[0], "under", np.random.default_rng(0))
    assert spilt.sum() > masks[0].sum()
    assert (spilt & masks[0]).sum() == masks[0].sum()
    left, right = np.zeros((2, 60, 60), np.bool_)
    left[20:40, 10:30] = True
    right[20:40, 33:50] = True
    assert np.array_equal(degrade_mask(left, "under", np.random.default_rng(0), [right]), left | right)


def test_an_empty_mask_stays_empty() -> None:
    empty = np.zeros((40, 50), np.bool_)
    for quality in ("exact", "noisy", "under"):
        assert not degrade_mask(empty, quality, np.random.default_rng(0)).any()  # type: ignore[arg-type]


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
