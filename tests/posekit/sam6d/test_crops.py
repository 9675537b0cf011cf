"""The network's input for a detection and for a template view, rule by rule."""

from __future__ import annotations

import dataclasses
from typing import Any

import cv2
import numpy as np
import pytest

from posekit.engine import Instance, Rejection
from posekit.errors import InvalidInput
from posekit.sam6d.crops import NetworkInput, crop_box, instance_input, template_input
from posekit.sam6d.templates import View

K = np.array([[600.0, 0, 99.5], [0, 610.0, 70.25], [0, 0, 1]])
FAR_M = 10.0  # a radius that every point lies in


def mask_of(height: int, width: int, *parts: tuple[slice, slice]) -> np.ndarray:
    mask = np.zeros((height, width), dtype=np.bool_)
    for part in parts:
        mask[part] = True
    return mask


def seen(mask: np.ndarray, **changes: Any) -> Instance:
    """Return a detection in a picture of noise, on a slope half a metre away."""
    rng = np.random.default_rng(5)
    depth_m = (0.5 + 0.001 * np.arange(mask.shape[1]) + np.zeros(mask.shape)).astype(np.float32)
    rgb = rng.integers(1, 256, (*mask.shape, 3), dtype=np.uint8)
    made = Instance(object_id="o", rgb=rgb, depth_m=depth_m, mask=mask, K=K, seed=0)
    return dataclasses.replace(made, **changes)


def network_input(instance: Instance, radius_m: float = FAR_M, points: int = 2048, seed: int = 0) -> NetworkInput:
    made = instance_input(instance, radius_m, np.random.default_rng(seed), points)
    assert isinstance(made, NetworkInput), made
    return made


def rejection(instance: Instance, radius_m: float = FAR_M) -> Rejection:
    made = instance_input(instance, radius_m, np.random.default_rng(0))
    assert isinstance(made, Rejection)
    return made


def pixels_of(points_m: np.ndarray, K: np.ndarray = K) -> np.ndarray:
    """Return the column and row at which each point was seen, (n, 2)."""
    uv = points_m.astype(np.float64) @ K.T
    return uv[:, :2] / uv[:, 2:]


# ---------------------------------------------------------------------------------------------------------- what counts


def test_the_network_gets_a_square_picture_and_as_many_points_as_asked_for() -> None:
    made = network_input(seen(mask_of(140, 200, np.s_[30:90, 40:120])))
    assert (made.rgb.shape, made.rgb.dtype) == ((224, 224, 3), np.uint8)
    assert (made.points_m.shape, made.points_m.dtype) == ((2048, 3), np.float32)
    assert (made.choose.shape, made.choose.dtype) == ((2048,), np.int32)
    assert made.choose.min() >= 0
    assert made.choose.max() < 224 * 224


@pytest.mark.parametrize("nonsense", [0.0, -0.5, np.nan, np.inf, -np.inf])
def test_a_pixel_without_a_depth_reading_is_not_of_the_object(nonsense: float) -> None:
    instance = seen(mask_of(140, 200, np.s_[30:90, 40:100]))
    depth_m = instance.depth_m.copy()
    depth_m[30:60] = nonsense
    half = network_input(dataclasses.replace(instance, depth_m=depth_m))
    lower = network_input(dataclasses.replace(instance, mask=mask_of(140, 200, np.s_[60:90, 40:100])))
    assert np.isfinite(half.points_m).all()
    for with_nonsense, without in zip(half, lower, strict=True):
        np.testing.assert_array_equal(with_nonsense, without)


def test_more_than_32_readings_are_needed() -> None:
    instance = seen(mask_of(140, 200, np.s_[10:14, 20:28], np.s_[14, 20]))
    network_input(instance)
    depth_m = instance.depth_m.copy()
    depth_m[14, 20] = 0
    reason = rejection(dataclasses.replace(instance, depth_m=depth_m))
    assert reason.code == "mask_too_small"
    assert "32 valid depth pixels under the mask, more than 32 needed" in reason.detail


def test_a_mask_without_pixels_or_readings_says_so() -> None:
    assert rejection(seen(mask_of(20, 30))).code == "mask_empty"
    blind = rejection(seen(mask_of(20, 30, np.s_[:, :]), depth_m=np.zeros((20, 30), np.float32)))
    assert (blind.code, "600 pixels" in blind.detail) == ("no_depth", True)


def test_an_image_of_one_row_is_answered_too() -> None:
    assert rejection(seen(mask_of(1, 200, np.s_[:, 20:120]))).code == "no_fit"  # no square of pixels fits into it


# ------------------------------------------------------------------------------------------------------------- the box


@pytest.mark.parametrize(
    "rows, columns, expected",
    [
        ((30, 50), (40, 80), (20, 40, 40)),  # around the middle, as wide as the longer side
        ((30, 51), (40, 81), (20, 40, 40)),  # 41 wide: the last column is lost, the middle is rounded down
        ((31, 51), (41, 80), (22, 41, 38)),
        ((0, 20), (40, 80), (0, 40, 40)),  # moved down into the image
        ((90, 100), (40, 80), (60, 40, 40)),  # moved up
        ((10, 90), (0, 20), (10, 0, 80)),  # moved right
        ((10, 90), (180, 200), (10, 120, 80)),  # moved left
        ((50, 60), (0, 200), (0, 50, 100)),  # longer than the image is high
        ((0, 100), (0, 200), (0, 50, 100)),
    ],
)  # fmt: skip
def test_the_box_is_an_even_square_inside_of_the_image(
    rows: tuple[int, int], columns: tuple[int, int], expected: tuple[int, int, int]
) -> None:
    assert crop_box(mask_of(100, 200, (slice(*rows), slice(*columns)))) == expected


def test_the_box_of_a_crop_is_the_box_in_its_image() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        whole, window = random_mask(rng)
        top, left = window[0].start, window[1].start
        box = crop_box(whole[window], (left, top), (whole.shape[1], whole.shape[0]))
        assert crop_box(whole) == (box.top + top, box.left + left, box.side)


def test_the_box_is_of_the_pixels_with_a_reading_near_or_not() -> None:
    instance = seen(mask_of(140, 200, np.s_[40:80, 60:100]))
    depth_m = instance.depth_m.copy()
    depth_m[40:80, 60:64] = 3.0  # of the wall behind
    depth_m[40:80, 96:100] = 0
    made = network_input(dataclasses.replace(instance, depth_m=depth_m), radius_m=0.6)
    masked = np.where((instance.mask & (depth_m > 0))[..., None], instance.rgb, 0)[40:80, 58:98, ::-1]
    np.testing.assert_array_equal(made.rgb, cv2.resize(masked, (224, 224), interpolation=cv2.INTER_LINEAR))
    assert made.rgb[112, 224 * 4 // 40].any()  # the wall's pixels stay in the picture
    assert made.points_m[:, 2].max() < 1  # and give no points


# ----------------------------------------------------------------------------------------------------------- the points


def test_a_point_is_where_its_pixel_saw_it() -> None:
    mask = mask_of(140, 200, np.s_[50, 60:100])
    made = network_input(seen(mask), points=5000)
    uv = pixels_of(made.points_m)
    np.testing.assert_allclose(uv, np.rint(uv), atol=1e-3)  # whole numbers, no half pixels
    columns = np.rint(uv[:, 0]).astype(int)
    assert set(columns) == set(range(60, 100))
    np.testing.assert_allclose(made.points_m[:, 2], seen(mask).depth_m[50, columns])


def test_points_farther_than_so_many_radii_from_the_middle_are_dropped() -> None:
    row = mask_of(100, 100, np.s_[50, 2:98])
    K = np.array([[64.0, 0, 49.5], [0, 64, 50], [0, 0, 1]])
    instance = seen(row, K=K, depth_m=np.ones((100, 100), np.float32))  # x from -47.5 / 64 to 47.5 / 64, y = 0
    radius_m = 47.5 / 64 / 1.2
    assert radius_m * 1.2 == 47.5 / 64
    made = network_input(instance, radius_m, points=4096)
    assert len(np.unique(made.points_m, axis=0)) == 94  # the two at the very limit are out
    made = network_input(instance, float(np.nextafter(radius_m, 1)), points=4096)
    assert len(np.unique(made.points_m, axis=0)) == 96


def test_fewer_than_four_points_near_the_middle_are_too_few() -> None:
    row = mask_of(100, 100, np.s_[50, 2:98])
    K = np.array([[64.0, 0, 49.5], [0, 64, 50], [0, 0, 1]])
    instance = seen(row, K=K, depth_m=np.ones((100, 100), np.float32))
    assert len(np.unique(network_input(instance, 1.6 / 64 / 1.2).points_m, axis=0)) == 4
    instance.depth_m[50, 48] = 0
    reason = rejection(instance, 1.6 / 64 / 1.2)
    assert reason.code == "no_fit"
    assert "3 of 95 depth readings" in reason.detail
    assert "within 25.0 mm" in reason.detail


def test_few_points_are_drawn_with_replacement_and_many_without() -> None:
    mask = mask_of(140, 200, np.s_[40:60, 60:80])  # 400 points
    counts = {n: len(np.unique(network_input(seen(mask), points=n).points_m, axis=0)) for n in (399, 400, 2048)}
    assert counts[399] == 399
    assert counts[400] < 400
    assert 390 < counts[2048] <= 400


def test_the_generator_alone_decides_which_points_are_drawn() -> None:
    instance = seen(mask_of(140, 200, np.s_[10:130, 20:180]))
    once, again = network_input(instance, seed=3), network_input(instance, seed=3)
    np.testing.assert_array_equal(once.choose, again.choose)
    assert not np.array_equal(once.choose, network_input(instance, seed=4).choose)


@pytest.mark.parametrize(
    "rows, columns", [((20, 120), (40, 90)), ((60, 61), (40, 140)), ((0, 7), (0, 11)), ((0, 140), (0, 200))]
)
def test_a_point_knows_its_pixel_in_the_picture(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    mask = mask_of(140, 200, (slice(*rows), slice(*columns)))
    made, (top, left, side) = network_input(seen(mask)), crop_box(mask)
    column, row = np.rint(pixels_of(made.points_m)).astype(int).T
    expected = np.floor((row - top) * 224 / side) * 224 + np.floor((column - left) * 224 / side)
    np.testing.assert_array_equal(made.choose, expected)


# ---------------------------------------------------------------------------------------------------------- the picture


def test_the_picture_is_blue_first_and_masked_before_it_is_resized() -> None:
    mask = mask_of(140, 200, np.s_[40:80, 60:90])
    mask[45:55, 70:75] = False
    red = np.zeros((140, 200, 3), dtype=np.uint8)
    red[...] = 200, 40, 10
    made = network_input(seen(mask, rgb=red))
    masked = np.where(mask[..., None], red, 0)[40:80, 55:95, ::-1]
    np.testing.assert_array_equal(made.rgb, cv2.resize(masked, (224, 224), interpolation=cv2.INTER_LINEAR))
    assert tuple(made.rgb[112 + 60, 112]) == (10, 40, 200)
    assert len(np.unique(made.rgb[..., 2])) > 2  # the rim fades out


def random_mask(rng: np.random.Generator) -> tuple[np.ndarray, tuple[slice, slice]]:
    """Return a mask in an image, often long and thin or at the border, and a window that holds all of it."""
    shape = rng.integers(24, 120, 2)
    size = np.maximum(2, (shape * rng.random(2) ** rng.choice([0.1, 1, 4])).astype(int))
    start = np.clip(rng.integers(-20, shape - size + 21), 0, shape - size)
    mask = np.zeros(shape, dtype=np.bool_)
    mask[start[0] : start[0] + size[0], start[1] : start[1] + size[1]] = rng.random(size) < rng.choice([0.3, 0.9, 1])
    mask[tuple(start)] = True
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    margin = int(rng.integers(0, 30))
    return mask, tuple(
        slice(max(0, places[0] - margin), min(side, places[-1] + 1 + margin))
        for places, side in zip((rows, columns), shape.tolist(), strict=True)
    )  # type: ignore[return-value]


def test_a_crop_and_its_whole_image_give_the_network_the_same() -> None:
    rng = np.random.default_rng(2)
    compared = 0
    for seed in range(300):
        mask, window = random_mask(rng)
        whole = seen(mask)
        top, left = window[0].start, window[1].start
        crop = dataclasses.replace(
            whole,
            rgb=whole.rgb[window],
            depth_m=whole.depth_m[window],
            mask=mask[window],
            K=K - [[0, 0, left], [0, 0, top], [0, 0, 0]],
            origin_px=(left, top),
            image_size_px=(mask.shape[1], mask.shape[0]),
        )
        expected = instance_input(whole, 0.05, np.random.default_rng(seed))
        made = instance_input(crop, 0.05, np.random.default_rng(seed))
        if isinstance(expected, Rejection):
            assert made == expected
            continue
        assert isinstance(made, NetworkInput)
        compared += 1
        np.testing.assert_array_equal(made.rgb, expected.rgb)
        np.testing.assert_array_equal(made.choose, expected.choose)
        np.testing.assert_allclose(made.points_m, expected.points_m, atol=1e-7)
    assert compared > 200


# ------------------------------------------------------------------------------------------------------ template views


def view(mask: np.ndarray) -> View:
    rng = np.random.default_rng(6)
    row, column = np.indices(mask.shape)
    xyz_m = np.stack((column, row, 0 * row), axis=-1) / np.float32(1000)
    return View(rng.integers(1, 256, (*mask.shape, 3), dtype=np.uint8), mask, xyz_m.astype(np.float32))


def test_a_view_goes_the_way_of_an_instance_with_its_own_points() -> None:
    mask = mask_of(140, 200, np.s_[30:90, 40:120])
    template = view(mask)
    made = template_input(template, np.random.default_rng(0))
    assert made.points_m.shape == (5000, 3)
    column, row = np.rint(made.points_m[:, :2].T * 1000).astype(int)
    assert mask[row, column].all()
    np.testing.assert_array_equal(made.choose, (row - 20) * 224 // 80 * 224 + (column - 40) * 224 // 80)
    np.testing.assert_array_equal(made.rgb, network_input(seen(mask, rgb=template.rgb)).rgb)


def test_points_of_a_view_are_drawn_like_those_of_an_instance() -> None:
    def different(side: int) -> int:
        made = template_input(view(mask_of(140, 200, np.s_[:side, :side])), np.random.default_rng(0))
        return len(np.unique(made.points_m, axis=0))

    assert different(100) == 5000
    assert different(20) == 400


@pytest.mark.parametrize("parts", [(), (np.s_[0:2, 0:2], np.s_[0:2, 196:200])])
def test_a_view_with_nothing_in_the_middle_is_refused(parts: tuple[tuple[slice, slice], ...]) -> None:
    with pytest.raises(InvalidInput, match="mask"):
        template_input(view(mask_of(20, 200, *parts)), np.random.default_rng(0))
