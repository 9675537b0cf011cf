"""Masks in every form, compared with pycocotools where it supports them, and nonsense in their place."""

from __future__ import annotations

import base64
import contextlib
import time

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from pem.rle import encode_rle
from posekit.errors import BadData, InvalidInput, PoseError, TooLarge
from posekit.io import images
from posekit.io.masks import decode_mask, mask_box
from tests.fuzzing import examples

ANY = 1e9  # pixels: no limit
RNG = np.random.default_rng(3)
MASK = np.zeros((12, 20), bool)
MASK[3:9, 5:17] = True
MASK[5, 8:11] = False


def random_masks():
    for share in np.linspace(0.0, 1.0, 40):
        height, width = RNG.integers(1, 40, 2)
        small = RNG.random((height, width)) < share
        yield small
        yield np.kron(small, np.ones((5, 11), bool))


def decode(spec, mask=MASK, field="detections.masks[3]"):
    return decode_mask(spec, *mask.shape, field, ANY)


# ---------------------------------------------------------------------------------------------------------------- RLE


def test_rle_is_written_as_pycocotools_writes_it():
    for mask in random_masks():
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert encode_rle(mask) == {"size": theirs["size"], "counts": theirs["counts"].decode()}


def test_rle_of_pycocotools_is_read():
    for mask in random_masks():
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert np.array_equal(decode(theirs, mask), mask)
        assert np.array_equal(decode({**theirs, "counts": theirs["counts"].decode()}, mask), mask)


def test_a_list_of_counts_is_read():
    for mask in random_masks():
        flat = mask.ravel(order="F")
        runs = np.diff(np.concatenate(([0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]))).tolist()
        counts = [0, *runs] if flat[0] else runs
        assert np.array_equal(decode({"size": list(mask.shape), "counts": counts}, mask), mask)


@pytest.mark.parametrize(
    "counts, words",
    [
        ([239], "cover 239 pixels, the image has 240"),
        ([], "cover 0 pixels"),
        ([240, 1], "cover 241 pixels"),
        ([-5, 245], "negative or longer"),
        ([2**62, 2**62], "negative or longer"),
        ([2**63], "whole numbers"),
        ([1.5, 238.5], "whole numbers"),
        (["240"], "whole numbers"),
        ([None], "whole numbers"),
        (240, "a string or a list"),
        (None, "a string or a list"),
        ("", "cover 0 pixels"),
        ("o" * 40, "cut short or hold a number too long"),
        ("oooooooooo0", "too long"),
        ("P" * 3, "cut short"),
        ("ooooo?", "negative or longer"),
        ("\x00", "characters"),
        ("é", "characters"),
        ("~~~", "characters"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts, words):
    with pytest.raises(InvalidInput, match=words):
        decode({"size": [12, 20], "counts": counts})


@pytest.mark.parametrize(
    "rle",
    [
        {},
        {"size": [12, 20]},
        {"counts": [240]},
        {"size": [12], "counts": [240]},
        {"size": [12, 20, 1], "counts": [240]},
        {"size": [12.0, 20], "counts": [240]},
        {"size": [True, 20], "counts": [20]},
        {"size": [-12, -20], "counts": [240]},
        {"size": [1 << 40, 1 << 40], "counts": [1]},
        {"size": "12", "counts": [240]},
        {"size": [0, 0], "counts": []},
    ],
)
def test_an_object_that_is_no_rle_of_the_image_is_refused(rle):
    with pytest.raises(InvalidInput):
        decode(rle)


def test_a_huge_claim_costs_no_memory():
    for size in ([60_000, 60_000], [1 << 30, 1 << 30]):
        with pytest.raises(TooLarge):
            decode({"size": size, "counts": [size[0] * size[1]]})


# ---------------------------------------------------------------------------------------------------------------- PNG


@pytest.mark.parametrize(
    "array",
    [
        MASK,
        MASK.astype(np.uint8),
        MASK.astype(np.uint16) * 256,
        np.dstack([MASK * np.uint8(0), MASK * np.uint8(0), MASK * np.uint8(9)]),
        np.dstack([MASK * np.uint8(0), MASK * np.uint8(1), MASK * np.uint8(0), np.full(MASK.shape, 255, np.uint8)]),
    ],
    ids=["bool", "ones", "16 bit", "blue", "green with alpha"],
)
def test_a_png_is_inside_where_any_colour_is_not_zero(array):
    data = images.encode_png(array)
    assert np.array_equal(decode(data), MASK)
    assert np.array_equal(decode(memoryview(data)), MASK)
    assert np.array_equal(decode(base64.b64encode(data).decode()), MASK)
    assert np.array_equal(decode(b'"' + base64.b64encode(data) + b'"'), MASK)
    assert np.array_equal(decode("data:image/png;base64," + base64.b64encode(data).decode()), MASK)


def test_a_one_bit_png_is_read():
    done, data = cv2.imencode(".png", MASK.astype(np.uint8), [cv2.IMWRITE_PNG_BILEVEL, 1])
    assert done
    assert images.inspect(data.tobytes()).bit_depth == 1
    assert np.array_equal(decode(data.tobytes()), MASK)


def test_a_png_bomb_is_refused_by_its_header():
    header = images.encode_png(np.zeros((1, 1), np.uint8))
    bomb = bytearray(header)
    bomb[16:24] = (30_000).to_bytes(4, "big") * 2
    with pytest.raises(BadData):  # the header's checksum no longer fits
        decode(bytes(bomb))
    with pytest.raises(TooLarge, match=r"4\.0 megapixels, more than the 1\.0 left"):
        decode_mask(images.encode_png(np.zeros((2000, 2000), bool), 9), 12, 20, None, 1e6)


@pytest.mark.parametrize(
    "spec",
    [
        b"",
        b"nonsense",
        b"\xff\xfe",
        b"[1, 2",
        b"[" * 100_000,
        "no base64!",
        "",
        "QUJD",
        "iVBORw0KGgo",
        base64.b64encode(images.encode_png(MASK)[:-5]).decode(),
        images.encode_png(MASK)[:50],
    ],
)
def test_what_does_not_parse_is_bad_data(spec):
    with pytest.raises(BadData):
        decode(spec)


# --------------------------------------------------------------------------------------------- nested lists, polygons


def test_a_nested_list_of_ones_or_booleans_is_read():
    assert np.array_equal(decode(MASK.astype(int).tolist()), MASK)
    assert np.array_equal(decode(MASK.tolist()), MASK)
    assert np.array_equal(decode(msgspec.json.encode(MASK.astype(int).tolist())), MASK)


def test_a_nested_list_of_another_size_is_refused_and_never_taken_for_polygons():
    with pytest.raises(InvalidInput, match="a nested list, is 11 rows of 20 pixels, the image is 12 rows of 20"):
        decode(MASK[1:].astype(int).tolist())
    with pytest.raises(InvalidInput, match="differ in length"):
        decode([[0, 1], [0]])
    with pytest.raises(InvalidInput, match="0 pixels"):
        decode([[]])


@pytest.mark.parametrize(
    "shape, hint",
    [((6, 10), ""), ((20, 12), "(rows and columns are exchanged|sizes are \\[height, width\\])")],
    ids=["smaller", "turned"],
)
def test_a_mask_of_another_size_is_called_what_was_sent(shape, hint):
    other = np.zeros(shape, dtype=bool)
    other[2:4, 3:5] = True
    png = images.encode_png(other)
    sent = {
        "a PNG": [png, base64.b64encode(png).decode()],
        "a nested list": [other.tolist(), other.astype(int).tolist()],
        "an RLE with counts as a string": [encode_rle(other)],
        "an RLE with counts as a list": [{"size": list(shape), "counts": [other.size]}],
    }
    for form, specs in sent.items():
        words = rf"^the mask, {form}, is {shape[0]} rows of {shape[1]} pixels, the image is 12 rows of 20(; {hint})?$"
        for spec in specs:
            with pytest.raises(InvalidInput, match=words) as caught:
                decode(spec)
            assert (";" in str(caught.value)) is bool(hint)
            assert caught.value.field == "detections.masks[3]"


@pytest.mark.parametrize("shape", [(12, 20), (6, 10)])
def test_a_nested_list_of_0_and_255_is_never_taken_for_polygons(shape):
    rows = np.zeros(shape, dtype=int)
    rows[2:5, 3:7] = 255
    with pytest.raises(InvalidInput, match="the rows of a mask that is a nested list hold 0 and 1 only"):
        decode(rows.tolist())
    assert decode([[0, 0, 255, 0, 255, 255, 0, 255]] * 2).all(), "polygons around a corner stay polygons"


def test_other_numbers_make_a_nested_list_polygons():
    with pytest.raises(InvalidInput, match="polygon 0 of the mask has 5 numbers"):
        decode([[0, 1, 2, 3, 4]] * 12)


def test_a_rectangle_covers_the_pixels_whose_centres_it_holds():
    wanted = np.zeros((12, 20), bool)
    wanted[3:9, 5:17] = True
    rectangle = [5, 3, 17, 3, 17, 9, 5, 9]
    assert np.array_equal(decode([rectangle]), wanted)
    assert np.array_equal(decode(rectangle), wanted)  # a single flat polygon
    assert np.array_equal(decode([float(number) for number in rectangle]), wanted)


def test_polygons_are_united_also_where_they_overlap():
    wanted = np.zeros((12, 20), bool)
    wanted[2:6, 2:8] = True
    wanted[4:9, 5:12] = True
    assert np.array_equal(decode([[2, 2, 8, 2, 8, 6, 2, 6], [5, 4, 5, 9, 12, 9, 12, 4]]), wanted)


def test_a_polygon_beyond_the_image_is_cut_at_its_edge():
    assert decode([[-1000, -1000, 1000, -1000, 1000, 1000, -1000, 1000]]).all()
    assert not decode([[-10, -10, -5, -10, -5, -5]]).any()
    right = decode([[10, -50, 500, -50, 500, 500, 10, 500]])
    assert not right[:, :10].any()
    assert right[:, 10:].all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools 2 with numpy 2
def test_polygons_agree_with_pycocotools_but_for_a_pixel_at_the_border():
    pixel = np.ones((3, 3), np.uint8)
    for _ in range(60):
        angles = np.sort(RNG.random(RNG.integers(3, 12))) * 2 * np.pi
        radii = RNG.uniform(20, 55, angles.size)  # inside the image: pycocotools bends what crosses its edge
        polygon = np.column_stack([80 + radii * np.cos(angles), 60 + radii * np.sin(angles)]).ravel().tolist()
        ours = decode_mask([polygon], 120, 160, None, ANY).astype(np.uint8)
        theirs = coco.decode(coco.merge(coco.frPyObjects([polygon], 120, 160)))
        assert not (cv2.erode(theirs, pixel) & (1 - ours)).any()
        assert not (ours & (1 - cv2.dilate(theirs, pixel))).any()


@pytest.mark.parametrize("polygon", [[3, 3, 3, 3, 3, 3], [3, 3, 9, 3, 15, 3], [2.6, 2.6, 2.9, 2.6, 2.9, 2.9]])
def test_a_polygon_without_area_is_an_empty_mask(polygon):
    assert not decode([polygon]).any()


@pytest.mark.parametrize(
    "polygons, words",
    [
        ([[1, 2, 3, 4]], "polygon 0 of the mask has 4 numbers; it needs three or more points"),
        ([[5, 3, 17, 3, 17, 9], [1, 2, 3, 4, 5, 6, 7]], "polygon 1 of the mask has 7 numbers"),
        ([[2, 3], [4, 5], [6, 7]], "has 2 numbers"),
        ([[1, 2, 3, 4, 5, "6"]], "no number"),
        ([[1, 2, 3, 4, 5, None]], "no number"),
        ([[[1, 2], [3, 4], [5, 6]]], "no number"),
        ([[1, 2, 3, 4, 5, 10**400]], "no number"),
        ([[1, 2, 3, 4, 5, float("nan")]], "no pixel of any image"),
        ([[1, 2, 3, 4, 5, 1e30]], "no pixel of any image"),
        ([[5, 3, 17, 3, 17, 9], {"a": 1}], "rows of 0 and 1, or polygons"),
        ([[5, 3, 17, 3, 17, 9], "x"], "rows of 0 and 1, or polygons"),
        ([1, 2, None], "rows of 0 and 1, or polygons"),
    ],
)
def test_a_list_that_is_neither_mask_nor_polygon_is_refused(polygons, words):
    with pytest.raises(InvalidInput, match=words):
        decode(polygons)


def test_polygons_cannot_be_made_to_cost_minutes():
    whole = [[0, 0, 4000, 0, 4000, 4000, 0, 4000.5]] * 1000
    zigzag = [[float(number) for step in range(12_000) for number in (step % 4000, 4000.0 * (step % 2))]]
    for polygons in (whole, zigzag):
        start = time.perf_counter()
        with pytest.raises(TooLarge, match="send the mask as an RLE"):
            decode_mask(polygons, 4000, 4000, None, ANY)
        assert time.perf_counter() - start < 10


# ------------------------------------------------------------------------------------------------- empty, size, others


@pytest.mark.parametrize("spec", [[], b"[]", {"size": [12, 20], "counts": [240]}, np.zeros((12, 20), int).tolist()])
def test_a_mask_without_a_pixel_is_a_mask(spec):
    mask = decode(spec)
    assert mask.shape == (12, 20)
    assert mask.dtype == bool
    assert not mask.any()


@pytest.mark.parametrize("spec", [None, 7, 1.5, True, b"null", b"7"])
def test_what_is_no_form_of_mask_is_refused_with_the_forms(spec):
    with pytest.raises(InvalidInput, match="send a COCO RLE object, a base64 PNG, a nested 0/1 list or a list"):
        decode(spec)


def test_the_box_is_that_of_pycocotools():
    for mask in random_masks():
        theirs = coco.toBbox(coco.encode(np.asfortranarray(mask.astype(np.uint8))))
        assert mask_box(mask) == (tuple(theirs) if mask.any() else None)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=20) | st.integers(),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.sampled_from(["size", "counts", "x"]), inner),
    max_leaves=30,
)


@settings(max_examples=examples(300), deadline=None)
@given(json_values | st.binary(max_size=60))
def test_nonsense_raises_nothing_but_our_errors(spec):
    with contextlib.suppress(PoseError):
        assert decode(spec).shape == MASK.shape


@settings(max_examples=examples(300), deadline=None)
@given(st.text(st.characters(min_codepoint=40, max_codepoint=115), max_size=40) | st.lists(st.integers(-3, 300)))
def test_any_counts_give_a_mask_or_our_errors(counts):
    with contextlib.suppress(PoseError):
        assert decode({"size": [12, 20], "counts": counts}).shape == MASK.shape


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.lists(st.floats(-30, 50) | st.integers(-3, 30), min_size=6, max_size=14), max_size=4))
def test_any_polygons_give_a_mask_or_our_errors(polygons):
    with contextlib.suppress(PoseError):
        assert decode(polygons).shape == MASK.shape
