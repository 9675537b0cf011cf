"""Evidence for a pose: full for the true one, little for others, and finite numbers for absurd ones."""

from __future__ import annotations

import dataclasses
import functools
import tracemalloc
from typing import Any

import numpy as np
import pytest

from posekit.engine import Evidence, Float32, Float64, Instance
from posekit.render import depth_to_points, render
from posekit.sam6d.evidence import NEAR, evidence
from posekit.surface import sample_surface
from posekit.synthetic.shapes import SHAPES, rotation

K = np.array([[600.0, 0, 149.5], [0, 600.0, 149.5], [0, 0, 1]])
TRUE = np.eye(4)
TRUE[:3, :3] = rotation((1, 2, 0.5), 140)
TRUE[:3, 3] = 0.01, -0.02, 0.6


@functools.cache
def seen() -> tuple[Instance, Float32, float, Float32]:
    """Return a rendered mug before a wall, points of its surface, its radius, and the readings of its pixels."""
    mesh = SHAPES["mug"]().mesh
    rendered = render([mesh], [TRUE], K, 300, 300)
    mask = rendered.instance >= 0
    depth_m = np.where(mask, rendered.depth_m, np.float32(1.2)).astype(np.float32)
    instance = Instance(object_id="mug", rgb=rendered.rgb, depth_m=depth_m, mask=mask, K=K, seed=0)
    points_obj_m = sample_surface(mesh, 2048)[0].astype(np.float32)
    radius_m = float(np.linalg.norm(points_obj_m, axis=1).max())
    return instance, points_obj_m, radius_m, depth_to_points(depth_m, K)[mask]


def moved(x_m: float = 0.0, y_m: float = 0.0, z_m: float = 0.0) -> Float64:
    T_cam_obj = TRUE.copy()
    T_cam_obj[:3, 3] += x_m, y_m, z_m
    return T_cam_obj


def of_pose(T_cam_obj: Float64, **changes: Any) -> Evidence:
    instance, points_obj_m, radius_m, seen_m = seen()
    return evidence(dataclasses.replace(instance, **changes), points_obj_m, radius_m, seen_m, T_cam_obj)


def test_everything_speaks_for_the_true_pose() -> None:
    made = of_pose(TRUE)
    assert made.inlier_fraction > 0.99
    assert made.visible_overlap > 0.9
    assert made.free_space_violation < 0.05
    assert made.residual_mm < 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_pose_five_centimetres_off_explains_less(axis: int) -> None:
    made, true = of_pose(moved(*(0.05 * np.eye(3)[axis]))), of_pose(TRUE)
    assert made.inlier_fraction < 0.7
    assert made.visible_overlap < 0.7 * true.visible_overlap
    assert made.residual_mm > 2 * true.residual_mm


def test_a_pose_turned_to_its_other_side_explains_less() -> None:
    turned = TRUE.copy()
    turned[:3, :3] = TRUE[:3, :3] @ rotation((1, 0, 0), 90)
    assert of_pose(turned).inlier_fraction < of_pose(TRUE).inlier_fraction - 0.1


def test_a_pose_beside_the_object_is_seen_through_to_the_wall() -> None:
    made = of_pose(moved(x_m=-0.12))
    assert made.inlier_fraction < 0.1
    assert made.visible_overlap < 0.05
    assert made.free_space_violation > 0.95


def test_what_stands_before_the_object_violates_nothing() -> None:
    instance, _, _, _ = seen()
    hidden = instance.depth_m.copy()
    hidden[:, : int(np.median(np.nonzero(instance.mask)[1]))] = 0.3
    made, clear = of_pose(TRUE, depth_m=hidden), of_pose(TRUE)
    assert made.free_space_violation <= clear.free_space_violation
    assert 0.2 < made.visible_overlap < 0.7


def test_pixels_without_a_reading_tell_nothing() -> None:
    instance, _, _, _ = seen()
    gaps = instance.depth_m.copy()
    gaps[:, ::2] = 0
    gaps[::3] = np.nan
    made = of_pose(TRUE, depth_m=gaps)
    assert made.visible_overlap > 0.9
    assert made.residual_mm < 1
    blind = of_pose(TRUE, depth_m=np.zeros_like(gaps))
    assert (blind.visible_overlap, blind.free_space_violation) == (0, 0)
    assert blind.residual_mm == pytest.approx(1000 * NEAR * seen()[2])


@pytest.mark.parametrize("z_m", [-0.6, -1.2, -100.0])
def test_a_pose_around_or_behind_the_camera_has_nothing_that_speaks_for_it(z_m: float) -> None:
    made = of_pose(moved(z_m=z_m))
    assert (made.visible_overlap, made.free_space_violation) == (0, 0)
    assert made.inlier_fraction == 0


@pytest.mark.parametrize("shift", [(0, 0, 1e5), (1e4, 0, 0), (-1e4, 1e4, 10)])
def test_a_pose_far_outside_of_the_picture_ends_in_numbers(shift: tuple[float, float, float]) -> None:
    made = of_pose(moved(*shift))
    assert all(np.isfinite(value) for value in dataclasses.astuple(made))
    assert made.inlier_fraction == 0


def test_a_pose_far_from_the_axis_takes_no_memory_for_the_way_there() -> None:
    tracemalloc.start()
    try:
        of_pose(moved(3000.0, 3000.0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6  # a grid over all of it would have a thousand million cells


@pytest.mark.parametrize("readings", [1, 2, 100, 3000])
def test_the_share_of_readings_that_a_pose_explains_is_counted(readings: int) -> None:
    instance, points_obj_m, radius_m, seen_m = seen()
    some = seen_m[np.arange(readings) % len(seen_m)].copy()
    assert evidence(instance, points_obj_m, radius_m, some, TRUE).inlier_fraction == pytest.approx(1, abs=0.01)
    some[len(some) // 2 :] += 1
    made = evidence(instance, points_obj_m, radius_m, some, TRUE)
    assert made.inlier_fraction == pytest.approx((readings // 2) / readings, abs=0.01)
