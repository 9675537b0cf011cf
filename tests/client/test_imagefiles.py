"""The client's own picture files against two other readers: the server's and Pillow's."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pem import imagefiles
from posekit.io import images

Array = np.ndarray[Any, Any]


def picture(shape: tuple[int, ...], dtype: str) -> Array:
    """Make noise on a slope: every PNG filter finds its rows."""
    rng = np.random.default_rng(3)
    top = np.iinfo(dtype).max
    slope = np.linspace(0, top * 0.9, shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
    return (slope + rng.uniform(0, top * 0.1, shape)).astype(dtype)


KINDS = [((37, 53, 3), "uint8"), ((37, 53), "uint8"), ((37, 53), "uint16"), ((1, 1), "uint16"), ((1, 5, 3), "uint8")]


@pytest.mark.parametrize("shape, dtype", KINDS)
def test_every_reader_sees_the_same_pixels(shape: tuple[int, ...], dtype: str) -> None:
    image = picture(shape, dtype)
    data = imagefiles.write_png(image)
    np.testing.assert_array_equal(imagefiles.read_png(data), image)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
    if image.ndim == 3:
        np.testing.assert_array_equal(images.decode_color(data, 1.0), image)
    elif dtype == "uint16":
        np.testing.assert_array_equal(images.decode_depth(data, 1.0), image)


@pytest.mark.parametrize("shape, dtype", KINDS)
def test_pngs_of_others_can_be_read(shape: tuple[int, ...], dtype: str) -> None:
    image = picture(shape, dtype)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", optimize=True)
    np.testing.assert_array_equal(imagefiles.read_png(file.getvalue()), image)
    np.testing.assert_array_equal(imagefiles.read_png(images.encode_png(image)), image)


def test_a_mask_becomes_black_and_white() -> None:
    mask = np.eye(5, dtype=bool)
    np.testing.assert_array_equal(imagefiles.read_png(imagefiles.write_png(mask)), mask * np.uint8(255))


def test_every_row_filter_is_understood() -> None:
    import zlib

    image = picture((6, 9, 3), "uint8")
    rows = image.reshape(6, -1).astype(int)
    left = np.hstack([np.zeros((6, 3), int), rows[:, :-3]])
    above = np.vstack([np.zeros((1, 27), int), rows[:-1]])
    corner = np.hstack([np.zeros((6, 3), int), above[:, :-3]])
    guess = left + above - corner
    candidates = np.stack([left, above, corner])
    paeth = np.take_along_axis(candidates, np.abs(candidates - guess).argmin(axis=0)[None], axis=0)[0]
    predictions = [np.zeros_like(rows), left, above, (left + above) // 2, paeth]
    stream = b"".join(
        bytes([row % 5]) + ((rows[row] - predictions[row % 5][row]) % 256).astype(np.uint8).tobytes()
        for row in range(6)
    )
    good = imagefiles.write_png(image)
    start, end = good.index(b"IDAT") - 4, good.index(b"IEND") - 4
    data = good[:start] + imagefiles._chunk(b"IDAT", zlib.compress(stream)) + good[end:]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
    np.testing.assert_array_equal(imagefiles.read_png(data), image)


def test_float_depth_arrives_bit_for_bit() -> None:
    depth = np.random.default_rng(0).uniform(0.3, 2.0, (31, 17)).astype(np.float32)
    data = imagefiles.write_float_tiff(depth)
    np.testing.assert_array_equal(images.decode_depth(data, 1.0), depth)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), depth)


def test_nan_in_float_depth_means_no_reading() -> None:
    depth = np.array([[np.nan, 1.0], [np.inf, -1.0]], dtype=np.float32)
    data = imagefiles.write_float_tiff(depth)
    np.testing.assert_array_equal(images.decode_depth(data, 1.0), [[0, 1], [0, 0]])


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.int32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4), np.uint8),
        np.zeros((4, 4, 3), np.uint16),
    ],
    ids=["int32", "alpha", "empty", "16-bit colour"],
)
def test_what_no_png_holds_is_refused(image: Array) -> None:
    with pytest.raises(ValueError, match="cannot write"):
        imagefiles.write_png(image)


def test_broken_pngs_are_refused_in_words() -> None:
    good = imagefiles.write_png(picture((8, 8), "uint8"))
    flipped = bytearray(good)
    flipped[50] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        imagefiles.read_png(bytes(flipped))
    with pytest.raises(ValueError, match="pixels"):
        imagefiles.read_png(good[:33] + good[-12:])
    with pytest.raises(ValueError, match="no PNG"):
        imagefiles.read_png(b"GIF89a")
    with pytest.raises(ValueError, match="only plain"):
        imagefiles.read_png(images.encode_png(np.zeros((4, 4, 4), np.uint8)))
