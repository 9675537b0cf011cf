"""Colour and depth images: the formats that are read; broken, huge or lossy ones are refused in words."""

from __future__ import annotations

import contextlib
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posekit.errors import BadData, InvalidInput, PoseError, TooLarge
from posekit.io import images
from tests.fuzzing import examples

REAL = Path(__file__).parents[3] / "../shared/real"
RNG = np.random.default_rng(7)
RGB = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)
DEPTH = RNG.integers(1, 60000, (37, 53), dtype=np.uint16)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int,
    height: int,
    bit_depth: int,
    color_type: int,
    raw: bytes,
    *,
    interlace: int = 0,
    extra=b"",
    stream: bytes | None = None,
) -> bytes:
    """Write a PNG by hand: `raw` is what the pixel data inflates to, `extra` stands before it.

    `stream` is the pixel data itself, where it is not simply `raw` compressed.
    """
    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, interlace)
    return (
        images.PNG_SIGNATURE
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(raw) if stream is None else stream)
        + chunk(b"IEND", b"")
    )


def rows_of(array: np.ndarray) -> bytes:
    """Return what an 8-bit PNG inflates to, each row unfiltered."""
    return b"".join(b"\0" + row.tobytes() for row in array)


def encoded(array: np.ndarray, suffix: str, *options: int) -> bytes:
    done, data = cv2.imencode(suffix, array, options)
    assert done
    return data.tobytes()


def float_tiff(array: np.ndarray, compression: int = 1) -> bytes:
    return encoded(array, ".tiff", cv2.IMWRITE_TIFF_COMPRESSION, compression)


# ------------------------------------------------------------------------------------------------------------- colour


def test_a_colour_png_comes_back_as_rgb():
    assert np.array_equal(images.decode_color(images.encode_png(RGB), 50), RGB)


def test_a_jpeg_comes_back_close_and_as_rgb():
    flat = np.zeros((40, 60, 3), np.uint8)
    flat[..., 0] = 200
    decoded = images.decode_color(encoded(flat[..., ::-1], ".jpg", cv2.IMWRITE_JPEG_QUALITY, 95), 50)
    assert np.abs(decoded.astype(int) - flat).max() <= 4  # JPEG at quality 95 on a flat colour


def test_a_progressive_jpeg_is_read():
    data = encoded(RGB, ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    assert images.decode_color(data, 50).shape == RGB.shape


def test_grey_becomes_three_equal_channels():
    decoded = images.decode_color(images.encode_png(RGB[..., 0]), 50)
    assert all(np.array_equal(decoded[..., channel], RGB[..., 0]) for channel in range(3))


def test_alpha_is_dropped_and_not_blended():
    rgba = np.dstack([RGB, np.zeros(RGB.shape[:2], np.uint8)])
    assert np.array_equal(images.decode_color(images.encode_png(rgba), 50), RGB)


def test_a_palette_is_expanded_and_its_transparency_ignored():
    palette = chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255])) + chunk(b"tRNS", b"\0\0")
    decoded = images.decode_color(png(2, 1, 8, 3, b"\0\0\1", extra=palette), 50)
    assert decoded.tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_an_interlaced_png_is_read_like_any_other():
    # Adam7 of a 2 x 2 image: pass 1 has (0, 0), pass 6 has (1, 0), pass 7 has the second row.
    data = png(2, 2, 8, 0, b"\0\x0a" + b"\0\x14" + b"\0\x1e\x28", interlace=1)
    assert images.decode_color(data, 50)[..., 0].tolist() == [[10, 20], [30, 40]]


def test_an_exif_rotation_is_not_applied():
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    jpeg = encoded(RGB, ".jpg")
    rotated = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    assert images.decode_color(rotated, 50).shape == RGB.shape
    tagged = images.encode_png(RGB)
    tagged = tagged[:33] + chunk(b"eXIf", exif[6:]) + tagged[33:]
    assert np.array_equal(images.decode_color(tagged, 50), RGB)


def test_bytes_after_the_end_of_a_png_are_ignored():
    assert np.array_equal(images.decode_color(images.encode_png(RGB) + b"tail", 50), RGB)


def test_sixteen_bit_colour_is_refused_in_words():
    data = encoded(RGB.astype(np.uint16) * 257, ".png")
    with pytest.raises(InvalidInput, match="16 bits per channel; send an 8-bit PNG or JPEG") as caught:
        images.decode_color(data, 50, "rgb_image")
    assert caught.value.field == "rgb_image"


def test_a_tiff_is_no_colour_image():
    with pytest.raises(InvalidInput, match="TIFF"):
        images.decode_color(encoded(RGB, ".tiff"), 50)


# -------------------------------------------------------------------------------------------------------------- depth


def test_sixteen_bit_depth_comes_back_raw():
    decoded = images.decode_depth(images.encode_png(DEPTH), 50)
    assert decoded.dtype == np.uint16
    assert np.array_equal(decoded, DEPTH)


@pytest.mark.parametrize("compression", [1, 5, 8, 32773])
def test_float_depth_comes_back_raw_from_every_usual_compression(compression):
    depth = DEPTH.astype(np.float32) / 1000
    decoded = images.decode_depth(float_tiff(depth, compression), 50)
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, depth)


def test_what_is_no_reading_becomes_zero():
    depth = np.array([[1.5, np.nan, np.inf], [-np.inf, -2.0, 0.0]], np.float32)
    wanted = [[1.5, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert images.decode_depth(float_tiff(depth), 50).tolist() == wanted
    assert images.decode_depth_raw_f32(depth.astype("<f4").tobytes(), 2, 3).tolist() == wanted


def test_only_a_tiff_is_float_depth():
    assert images.depth_is_float(float_tiff(np.ones((3, 3), np.float32)))
    assert not images.depth_is_float(images.encode_png(DEPTH))
    assert not images.depth_is_float(b"")


def test_eight_bit_depth_has_lost_its_data():
    with pytest.raises(InvalidInput, match="8 bits per pixel: it has lost its data") as caught:
        images.decode_depth(images.encode_png((DEPTH >> 8).astype(np.uint8)), 50, "depth_image")
    assert caught.value.field == "depth_image"
    with pytest.raises(InvalidInput, match=r"JPEG.*lost its data"):
        images.decode_depth(encoded((DEPTH >> 8).astype(np.uint8), ".jpg"), 50)


@pytest.mark.parametrize("array", [RGB, RGB.astype(np.uint16)])
def test_depth_with_three_channels_is_refused(array):
    with pytest.raises(InvalidInput, match="3 channels"):
        images.decode_depth(encoded(array, ".png"), 50)


@pytest.mark.parametrize("dtype", [np.float64, np.uint16])
def test_a_tiff_of_another_type_is_refused(dtype):
    with pytest.raises(InvalidInput, match="32-bit float TIFF"):
        images.decode_depth(encoded(DEPTH.astype(dtype), ".tiff"), 50)


def test_a_turned_tiff_keeps_its_rows():
    depth = DEPTH.astype(np.float32)
    data = bytearray(float_tiff(depth))
    (directory,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, directory)
    tags = [struct.unpack_from("<H", data, directory + 2 + 12 * index)[0] for index in range(count)]
    entry = directory + 2 + 12 * tags.index(284)  # planar configuration is 1 for grey anyway: reuse its place
    struct.pack_into("<HHIHH", data, entry, 274, 3, 1, 3, 0)  # orientation 3: upside down
    assert np.array_equal(images.decode_depth(bytes(data), 50), depth)


def test_raw_float_depth_of_another_length_is_refused():
    with pytest.raises(InvalidInput, match="takes 24 bytes, 20 were sent"):
        images.decode_depth_raw_f32(bytes(20), 2, 3)
    with pytest.raises(BadData, match="empty"):
        images.decode_depth_raw_f32(b"", 2, 3)


# -------------------------------------------------------------------------------------------------- broken, too large


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x89PNG", images.PNG_SIGNATURE, b"\xff\xd8\xff", b"II*\0", bytes(99)]
)
def test_what_is_no_image_is_bad_data(data):
    for read in (images.decode_color, images.decode_depth):
        with pytest.raises(BadData):
            read(data, 50, "field")


@pytest.mark.parametrize(
    "data", [images.encode_png(DEPTH), images.encode_png(RGB), encoded(RGB, ".jpg")], ids=["depth", "png", "jpeg"]
)
def test_an_image_cut_short_anywhere_is_bad_data(data):
    read = images.decode_depth if data == images.encode_png(DEPTH) else images.decode_color
    for length in (*range(0, len(data), 97), len(data) - 1):
        with pytest.raises(BadData):
            read(data[:length], 50)


def test_a_tiff_cut_short_anywhere_is_bad_data():
    for compression in (1, 5):
        data = float_tiff(DEPTH.astype(np.float32), compression)
        for length in range(0, len(data), 97):
            with pytest.raises(BadData):
                images.decode_depth(data[:length], 50)


def test_any_flipped_bit_of_a_png_is_bad_data():
    data = images.encode_png(DEPTH[:9, :9])
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        with pytest.raises(BadData):
            images.decode_depth(bytes(flipped), 50)


def test_pixel_data_of_another_length_is_bad_data():
    rows = b"\0\1\2" * 3
    assert images.decode_color(png(2, 3, 8, 0, rows), 50).shape == (3, 2, 3)
    for raw in (b"", rows[:-1], rows + b"\0", rows * 1000):
        with pytest.raises(BadData, match="does not inflate to the size of the image"):
            images.decode_color(png(2, 3, 8, 0, raw), 50)


PASSED_ON = {  # 300 rows of 300 bytes: what compresses well is passed on as it came, the rest inflated
    "inflated": RNG.integers(0, 256, (300, 300), dtype=np.uint8),
    "compressed": np.zeros((300, 300), np.uint8),
}


@pytest.mark.parametrize("array", PASSED_ON.values(), ids=PASSED_ON)
def test_pixels_that_do_not_add_up_are_bad_data_however_well_they_compress(array):
    rows = rows_of(array)
    good = zlib.compress(rows)
    assert np.array_equal(images.decode_png(png(300, 300, 8, 0, b"", stream=good)), array)
    broken = {
        "a byte too few": zlib.compress(rows[:-1]),
        "a byte too many": zlib.compress(rows + b"\0"),
        "another checksum": good[:-1] + bytes([good[-1] ^ 1]),
        "no checksum": good[:-4],
        "cut short": good[: len(good) // 2],
        "no deflate": rows,
    }
    for stream in broken.values():
        with pytest.raises(BadData, match="does not inflate to the size of the image"):
            images.decode_png(png(300, 300, 8, 0, b"", stream=stream))
    with pytest.raises(BadData, match="filter"):
        images.decode_png(png(300, 300, 8, 0, rows[: 250 * 301] + b"\5" + rows[250 * 301 + 1 :]))


@pytest.mark.parametrize("array", PASSED_ON.values(), ids=PASSED_ON)
def test_bytes_behind_the_pixel_data_are_ignored_without_a_word(array, capfd):
    stream = zlib.compress(rows_of(array)) + bytes(9)
    assert np.array_equal(images.decode_png(png(300, 300, 8, 0, b"", stream=stream)), array)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("width, height", [(65533, 1), (65534, 1), (65535, 1), (65534, 2), (65535, 2), (254, 257)])
def test_pixels_about_a_whole_number_of_steps_are_read(width, height):
    array = RNG.integers(0, 256, (height, width), dtype=np.uint8)  # 65535 bytes are inflated at a time
    assert np.array_equal(images.decode_png(png(width, height, 8, 0, rows_of(array))), array)


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize(
    "color_type, bit_depth", [(kind, bits) for kind, depths in images._PNG_BIT_DEPTHS.items() for bits in depths]
)
def test_opencv_reads_the_same_from_what_is_passed_on(color_type, bit_depth, interlace):
    plain = png(99, 77, bit_depth, color_type, b"", interlace=interlace)
    passes = images._png_header(plain, None).passes()
    rows = [bytes([RNG.integers(5)]) + RNG.bytes(row_bytes - 1) for row_bytes, count in passes for _ in range(count)]
    palette = chunk(b"PLTE", RNG.bytes(3 << bit_depth)) if color_type == 3 else b""
    data = png(99, 77, bit_depth, color_type, b"".join(rows), interlace=interlace, extra=palette)
    wanted = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(images.decode_png(data), wanted)


def test_an_unknown_row_filter_is_bad_data():
    with pytest.raises(BadData, match="filter"):
        images.decode_color(png(2, 3, 8, 0, b"\0\1\2\0\1\2\7\1\2"), 50)
    with pytest.raises(BadData, match="filter"):
        images.decode_color(png(2, 2, 8, 0, b"\0\x0a\0\x14\7\x1e\x28", interlace=1), 50)


def test_pixel_data_in_many_small_pieces_is_read():
    stream = zlib.compress(rows_of(RGB))
    header = struct.pack(">IIBBBBB", RGB.shape[1], RGB.shape[0], 8, 2, 0, 0, 0)
    pieces = b"".join(chunk(b"IDAT", stream[start : start + 7]) for start in range(0, len(stream), 7))
    data = images.PNG_SIGNATURE + chunk(b"IHDR", header) + pieces + chunk(b"IEND", b"")
    assert np.array_equal(images.decode_color(data, 50), RGB)


def test_a_long_flat_image_inflates_to_the_last_row():
    flat = np.zeros((1500, 1500), np.uint16)  # zlib holds back output after all input is read
    assert np.array_equal(images.decode_depth(images.encode_png(flat, 9), 50), flat)


def test_a_palette_image_without_palette_is_bad_data():
    with pytest.raises(BadData, match="palette"):
        images.decode_color(png(2, 1, 8, 3, b"\0\0\1"), 50)


def test_a_bomb_is_refused_by_its_header_alone():
    bombs = [
        png(100_000, 100_000, 8, 2, b""),
        png(1, 1 << 30, 1, 0, b""),
        encoded(RGB, ".jpg").replace(struct.pack(">HH", 37, 53), b"\xff\xff\xff\xff"),
    ]
    for data in bombs:
        with pytest.raises(TooLarge, match="more than the limit of 50 megapixels"):
            images.decode_color(data, 50)
        with pytest.raises(TooLarge):
            images.decode_depth(data, 50)


def test_the_limit_counts_pixels():
    data = images.encode_png(DEPTH)
    assert images.decode_depth(data, DEPTH.size / 1e6).shape == DEPTH.shape
    with pytest.raises(TooLarge):
        images.decode_depth(data, (DEPTH.size - 1) / 1e6)


def test_a_jpeg_of_endless_scans_is_refused():
    data = encoded(RGB, ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    scan = data.index(b"\xff\xda")
    with pytest.raises(BadData, match="scans"):
        images.decode_color(data[:scan] + data[scan:-2] * 200 + data[-2:], 50)


def test_an_unusual_tiff_compression_is_refused():
    data = bytearray(float_tiff(DEPTH.astype(np.float32)))
    (directory,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, directory)
    for index in range(count):
        entry = directory + 2 + 12 * index
        if struct.unpack_from("<H", data, entry)[0] == 259:
            struct.pack_into("<H", data, entry + 8, 7)
    with pytest.raises(InvalidInput, match="unusual compression"):
        images.decode_depth(bytes(data), 50)


@settings(max_examples=examples(150), deadline=None)
@given(
    source=st.sampled_from([images.encode_png(RGB), encoded(RGB, ".jpg"), float_tiff(DEPTH.astype(np.float32), 5)]),
    position=st.floats(0, 1, exclude_max=True),
    noise=st.binary(min_size=1, max_size=6),
)
def test_noise_in_an_image_raises_nothing_but_our_errors(source, position, noise):
    start = int(position * len(source))
    data = source[:start] + noise + source[start + len(noise) :]
    for read in (images.decode_color, images.decode_depth):
        with contextlib.suppress(PoseError):
            assert read(data, 1).size <= 3e6


@settings(max_examples=examples(100), deadline=None)
@given(st.sampled_from([images.PNG_SIGNATURE, b"\xff\xd8\xff", b"II*\0", b"MM\0*"]), st.binary(max_size=200))
def test_garbage_behind_a_signature_raises_nothing_but_our_errors(signature, garbage):
    for read in (images.decode_color, images.decode_depth):
        with pytest.raises(PoseError):
            read(signature + garbage, 1)


def test_broken_images_print_nothing(capfd):
    for data in (
        images.encode_png(RGB)[:-30],
        float_tiff(DEPTH.astype(np.float32), 5)[:900],
        encoded(RGB, ".jpg")[:300],
    ):
        with pytest.raises(BadData):
            images.decode_color(data, 50)
    assert capfd.readouterr() == ("", "")


# --------------------------------------------------------------------------------------------------- header, encoding


@pytest.mark.parametrize(
    "data, wanted",
    [
        (images.encode_png(RGB), ("png", 53, 37, 3, 8, "uint8")),
        (images.encode_png(DEPTH), ("png", 53, 37, 1, 16, "uint16")),
        (encoded(RGB, ".jpg"), ("jpeg", 53, 37, 3, 8, "uint8")),
        (float_tiff(DEPTH.astype(np.float32)), ("tiff", 53, 37, 1, 32, "float32")),
        (png(2, 1, 1, 3, b""), ("png", 2, 1, 3, 1, "uint8")),
    ],
)
def test_the_header_tells_format_size_and_type(data, wanted):
    info = images.inspect(data)
    assert (info.format, info.width, info.height, info.channels, info.bit_depth, info.dtype) == wanted


@pytest.mark.parametrize("array", [RGB, RGB[..., 0], DEPTH, RGB[..., 0] > 99, np.dstack([RGB, RGB[..., :1]])])
def test_what_is_encoded_decodes_to_the_same(array):
    decoded = images.decode_png(images.encode_png(array))
    if array.dtype == bool:
        decoded = decoded == 255
    elif decoded.ndim == 3:
        decoded = decoded[..., [2, 1, 0, 3][: decoded.shape[2]]]
    assert np.array_equal(decoded, array)


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.zeros((0, 2), np.uint8), np.zeros((2, 2, 2), np.uint8)])
def test_an_array_that_is_no_image_is_not_encoded(array):
    with pytest.raises(InvalidInput, match="cannot write"):
        images.encode_png(array)


@pytest.mark.skipif(not REAL.exists(), reason="the real frames are not beside the project")
@pytest.mark.parametrize("frame", ["lmo_can", "ycbv_mustard"])
def test_real_frames_are_read_as_opencv_reads_them(frame):
    for name, read in (("rgb.png", images.decode_color), ("depth.png", images.decode_depth)):
        wanted = cv2.imread(str(REAL / frame / name), cv2.IMREAD_UNCHANGED)
        decoded = read((REAL / frame / name).read_bytes(), 50)
        assert np.array_equal(decoded, wanted[..., ::-1] if wanted.ndim == 3 else wanted)
