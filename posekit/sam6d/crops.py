"""Turn pixels into the network's input: a picture of 224 x 224 and points that know their pixel in it.

An instance and a template view go the same way: the square around the mask, the colours under the mask in that
square, and a fixed number of points drawn from it. The details decide what the network sees, so every step is the
one that the released weights were trained with.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from posekit.engine import Bool, Float32, Float64, Instance, Int32, Rejection, UInt8
from posekit.errors import InvalidInput
from posekit.sam6d.templates import View

SIDE_PX = 224  # side of the network's picture
LEAST_READINGS = 33  # depth readings needed under the mask
LEAST_POINTS = 4  # readings needed near enough to their middle
REACH = 1.2  # object radii from the middle of the readings: farther readings belong to something else

Indices = npt.NDArray[np.intp]


class NetworkInput(NamedTuple):
    """One picture with its points, as the network takes them."""

    rgb: UInt8  # (224, 224, 3), blue first, as in the network's training; 0 outside the mask
    points_m: Float32  # (N, 3): camera frame for an instance, CAD frame for a view
    choose: Int32  # (N,), flat pixel of each point in `rgb`


class Box(NamedTuple):
    """A square of pixels. Its corner may lie outside the array that it was made for, never outside the image."""

    top: int
    left: int
    side: int  # even; 0 where the image is one pixel high or wide


def instance_input(
    instance: Instance, radius_m: float, rng: np.random.Generator, points: int = 2048
) -> NetworkInput | Rejection:
    """Return the network's input for a detection, or the reason why it shows too little.

    `radius_m`: how far the object reaches from the origin of its CAD. `rng` alone decides which points are drawn: with
    replacement if there are no more than `points`. Only pixels under the mask with a depth reading count; NaN and
    infinity are no readings.
    """
    mask = instance.mask & (instance.depth_m > 0) & np.isfinite(instance.depth_m)
    if (reason := _why_not(instance.mask, mask)) is not None:
        return reason
    box = crop_box(mask, instance.origin_px, instance.image_size_px)
    row, column = _pixels(mask, box)
    cloud = _backproject(row, column, instance.depth_m[row, column], instance.K)
    middle = cloud.sum(axis=0) / max(1, len(cloud))
    reach_m = radius_m * REACH
    near = np.linalg.norm(cloud - middle, axis=1) < reach_m
    if near.sum() < LEAST_POINTS:
        return Rejection(
            code="no_fit",
            detail=f"{near.sum()} of {len(near)} depth readings under the mask lie within {reach_m * 1000:.1f} mm "
            f"({REACH:g} radii of the object) of their middle, {LEAST_POINTS} needed: is it this object's mask?",
        )
    # Only points are filtered: the picture keeps pixels whose readings are too far away.
    return _drawn(instance.rgb, mask, box, row[near], column[near], cloud[near], rng, points)


def template_input(view: View, rng: np.random.Generator, points: int = 5000) -> NetworkInput:
    """Return the network's input for a template view.

    Raises InvalidInput if the square around the mask holds none of its pixels: a mask of a few scattered ones.
    """
    if not view.mask.any():
        raise InvalidInput("the mask of a template view has no pixel")
    box = crop_box(view.mask)
    row, column = _pixels(view.mask, box)
    if not len(row):
        raise InvalidInput(
            f"the {view.mask.sum()} mask pixels of a template view lie apart, none in the square around their middle"
        )
    return _drawn(view.rgb, view.mask, box, row, column, view.xyz_m[row, column], rng, points)


def crop_box(mask: Bool, origin_px: tuple[int, int] = (0, 0), image_size_px: tuple[int, int] | None = None) -> Box:
    """Return the square around a mask, relative to the mask's array. The mask must have at least one pixel.

    `origin_px`: column and row of the array's first pixel in its image, whose size is (width, height) `image_size_px`;
    None = the array is the image. The square is moved into the image, never shrunk, and no larger than the image's
    shorter side. An odd side loses one pixel, so that a row and a column of the mask may fall out.
    """
    height, width = mask.shape
    image_width, image_height = image_size_px or (width, height)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom = int(rows[0]) + origin_px[1], int(rows[-1]) + 1 + origin_px[1]
    left, right = int(columns[0]) + origin_px[0], int(columns[-1]) + 1 + origin_px[0]
    half = min(max(bottom - top, right - left), image_width, image_height) // 2
    top = min(max((top + bottom) // 2 - half, 0), image_height - 2 * half)
    left = min(max((left + right) // 2 - half, 0), image_width - 2 * half)
    return Box(top - origin_px[1], left - origin_px[0], 2 * half)


def _why_not(mask: Bool, usable: Bool) -> Rejection | None:
    total, count = int(mask.sum()), int(usable.sum())
    if not total:
        return Rejection(code="mask_empty", detail="the mask has no pixel")
    if not count:
        return Rejection(code="no_depth", detail=f"none of the mask's {total} pixels has a depth reading")
    if count < LEAST_READINGS:
        return Rejection(
            code="mask_too_small",
            detail=f"{count} valid depth pixels under the mask, more than {LEAST_READINGS - 1} needed",
        )
    return None


def _inside(box: Box, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Return the part of an array that the box holds."""
    rows = slice(max(0, box.top), min(shape[0], box.top + box.side))
    return rows, slice(max(0, box.left), min(shape[1], box.left + box.side))


def _pixels(mask: Bool, box: Box) -> tuple[Indices, Indices]:
    """Return rows and columns of the mask's pixels in the box, row by row."""
    rows, columns = _inside(box, mask.shape)
    row, column = np.nonzero(mask[rows, columns])
    return row + rows.start, column + columns.start


def _backproject(row: Indices, column: Indices, depth_m: Float32, K: Float64) -> Float64:
    """Return points (n, 3) in the camera frame; pixel centres are whole numbers."""
    z = depth_m.astype(np.float64)
    y = (row - K[1, 2]) * z / K[1, 1]
    x = ((column - K[0, 2]) * z - K[0, 1] * y) / K[0, 0]
    return np.stack((x, y, z), axis=1)


def _drawn(
    rgb: UInt8,
    mask: Bool,
    box: Box,
    row: Indices,
    column: Indices,
    points_m: Float32 | Float64,
    rng: np.random.Generator,
    points: int,
) -> NetworkInput:
    """Return the picture in the box with `points` of the (n, 3) points, whose pixels are `row` and `column`; n > 0."""
    picked = rng.choice(len(row), points, replace=len(row) <= points)
    cell_row = (row[picked] - box.top) * SIDE_PX // box.side
    cell_column = (column[picked] - box.left) * SIDE_PX // box.side
    return NetworkInput(
        rgb=_picture(rgb, mask, box),
        points_m=points_m[picked].astype(np.float32),
        choose=(cell_row * SIDE_PX + cell_column).astype(np.int32),
    )


def _picture(rgb: UInt8, mask: Bool, box: Box) -> UInt8:
    """Return the colours under the mask, blue first. Masking precedes resizing, so the rim blends with black."""
    rows, columns = _inside(box, mask.shape)
    square = np.zeros((box.side, box.side, 3), dtype=np.uint8)  # pixels outside the array are not in the mask
    here = square[rows.start - box.top : rows.stop - box.top, columns.start - box.left : columns.stop - box.left]
    here[...] = rgb[rows, columns, ::-1] * mask[rows, columns, None]
    return np.asarray(cv2.resize(square, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
