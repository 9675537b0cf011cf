"""Instance masks in every form that clients send, decoded safely.

The form is recognised from the value:
- an object `{"size": [h, w], "counts": ...}`: COCO RLE, counts as COCO's compressed string or as a list of run lengths;
- a string: a base64 PNG; bytes that start as a PNG does: that PNG; any other bytes: JSON text of one of the forms;
- a list of lists that hold nothing but the integers 0 and 1 (or booleans): a nested list, which must be h rows of w
  (as polygons such lists could not enclose more than a single pixel);
- any other list: one polygon `[x, y, x, y, ...]` or a list of them, in pixels, (0, 0) being the image's outer corner.

Everything is decoded here, in numpy, with sizes checked before memory is taken: masks come from strangers. `pem.rle`
says how COCO's run lengths are written, and why pycocotools does not read them.
"""

from __future__ import annotations

import binascii
from array import array
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from posekit.errors import BadData, InvalidInput, TooLarge
from posekit.io import images

__all__ = ["decode_mask", "mask_box", "parse"]

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

_RLE_CHARACTERS = 7  # per run, five bits each: no run of an image needs more
_POLYGON_WORK = 400_000_000  # limit on the polygons of one mask, in pixels filled: a second or two
_CROSSING_COST = 10  # cost of an edge crossing a row, in pixels filled
_CROSSINGS_AT_ONCE = 1 << 20
_BINARY = "the rows of a mask that is a nested list hold 0 and 1 only"
_ROWS_AT_LEAST = 4  # of a nested list of 0 and 255: fewer may be polygons around a corner of 255 pixels


# ------------------------------------------------------------------------------------------------------------- decode


def decode_mask(spec: object, height: int, width: int, field: str | None, max_pixels: float) -> Bool:
    """Decode one mask of any form to (height, width) bool, True inside.

    `spec` is the mask as JSON text (bytes), as a parsed value, or the bytes of a PNG. `max_pixels` limits the decoded
    size. An empty mask is valid. Raises BadData if the mask does not parse, TooLarge before decoding, InvalidInput if
    it parses but does not fit the image.
    """
    value = parse(spec, field)
    pixels = _pixels(value, height, width, field)
    if pixels > max_pixels:
        raise TooLarge(
            f"the mask decodes to {pixels / 1e6:.1f} megapixels, more than the {max_pixels / 1e6:.1f} left", field
        )
    if isinstance(value, bytes):
        return _decode_png(value, height, width, field)
    if isinstance(value, dict):
        return _decode_rle(value, height, width, field)
    if not isinstance(value, list):
        raise _unknown(value, field)
    rows = _binary_rows(value, field)
    if rows is not None:
        return _decode_rows(rows, height, width, field)
    return _decode_polygons(value, height, width, field)


def parse(spec: object, field: str | None = None) -> object:
    """Return the mask as an undecoded value: a dict (RLE), a list, or bytes (a PNG, base64 removed). Idempotent."""
    if isinstance(spec, (bytearray, memoryview)):
        spec = bytes(spec)
    if isinstance(spec, bytes):
        if spec.startswith(images.PNG_SIGNATURE):
            return spec
        if not spec:
            raise BadData("the mask is empty (0 bytes)", field)
        if spec.startswith(b"\xff\xd8\xff"):
            raise BadData("the mask is a JPEG, which blurs its edge; send a PNG", field)
        try:
            spec = msgspec.json.decode(spec)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise BadData("the mask is neither a PNG nor JSON", field) from None
    if isinstance(spec, str):
        return _from_base64(spec, field)
    return list(spec) if isinstance(spec, tuple) else spec


def _from_base64(text: str, field: str | None) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        data = binascii.a2b_base64("".join(text.split()), strict_mode=True)
    except ValueError:  # includes binascii.Error
        raise BadData(
            'the mask is a string that is not valid base64; an RLE is {"size": [h, w], "counts": "..."}', field
        ) from None
    if not data.startswith(images.PNG_SIGNATURE):
        raise BadData("the mask's base64 holds no PNG", field)
    return data


def _pixels(value: object, height: int, width: int, field: str | None) -> int:
    if isinstance(value, bytes):
        return images.inspect(value, field).pixels
    if isinstance(value, dict):
        rows, columns = _rle_size(value, field)
        return rows * columns
    if not isinstance(value, list):
        raise _unknown(value, field)
    return height * width


def _unknown(value: object, field: str | None) -> InvalidInput:
    kind = "null" if value is None else type(value).__name__
    return InvalidInput(
        f"a mask cannot be {kind}: send a COCO RLE object, a base64 PNG, a nested 0/1 list or a list of polygons", field
    )


def _decode_png(data: bytes, height: int, width: int, field: str | None) -> Bool:
    info = images.inspect(data, field)
    _check_size((info.height, info.width), height, width, "a PNG", field)
    image = images.decode_png(data, field)
    inside: Bool = image != 0 if image.ndim == 2 else (image[:, :, :3] != 0).any(axis=2)
    return inside


def _check_size(size: tuple[int, int], height: int, width: int, form: str, field: str | None) -> None:
    """Raise InvalidInput where a mask that was sent as `form` is not as large as the image."""
    if size == (height, width):
        return
    turned = "sizes are [height, width]" if form.startswith("an RLE") else "rows and columns are exchanged"
    hint = f"; {turned}" if size == (width, height) else ""
    raise InvalidInput(
        f"the mask, {form}, is {size[0]} rows of {size[1]} pixels, the image is {height} rows of {width}{hint}", field
    )


# ---------------------------------------------------------------------------------------------------------------- RLE


def _rle_size(value: dict[Any, Any], field: str | None) -> tuple[int, int]:
    if "size" not in value or "counts" not in value:
        raise InvalidInput('a mask object is a COCO RLE: {"size": [h, w], "counts": ...}', field)
    size = value["size"]
    if (
        not isinstance(size, (list, tuple))
        or len(size) != 2
        or any(type(side) is not int or not 0 <= side < 1 << 31 for side in size)
    ):
        raise InvalidInput("the RLE's size must be two whole numbers, [height, width]", field)
    return size[0], size[1]


def _decode_rle(value: dict[Any, Any], height: int, width: int, field: str | None) -> Bool:
    counts = value["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("latin-1")
    form = "an RLE with counts as a " + ("string" if isinstance(counts, str) else "list")
    _check_size(_rle_size(value, field), height, width, form, field)
    if isinstance(counts, str):
        runs = _runs_from_string(counts, field)
    elif isinstance(counts, (list, tuple)):
        try:
            runs = np.frombuffer(array("q", counts), dtype=np.int64)
        except (TypeError, OverflowError):
            raise InvalidInput("the RLE's counts must be whole numbers", field) from None
    else:
        raise InvalidInput("the RLE's counts must be a string or a list of whole numbers", field)
    pixels = height * width
    if runs.size and (runs.min() < 0 or runs.max() > pixels):
        raise InvalidInput("the RLE's counts are negative or longer than the image", field)
    total = int(runs.sum())
    if total != pixels:
        raise InvalidInput(
            f"the mask, {form}, has counts that cover {total} pixels, "
            f"the image has {pixels} ({height} rows of {width})",
            field,
        )
    inside = np.arange(runs.size) % 2 == 1
    return np.ascontiguousarray(np.repeat(inside, runs).reshape(width, height).T)


def _runs_from_string(text: str, field: str | None) -> Int64:
    """Return the run lengths of an untrusted compressed string (`pem.rle` describes the format)."""
    try:
        raw = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise InvalidInput("the RLE's counts hold characters that COCO's encoding does not use", field) from None
    if raw.size == 0:
        return raw
    if raw.min() < 0 or raw.max() > 63:
        raise InvalidInput("the RLE's counts hold characters that COCO's encoding does not use", field)
    last = (raw & 32) == 0  # the character ends its number
    ends = np.flatnonzero(last) + 1
    starts = np.concatenate(([0], ends[:-1]))
    if not last[-1] or int((ends - starts).max()) > _RLE_CHARACTERS:
        raise InvalidInput("the RLE's counts are cut short or hold a number too long for any image", field)
    place = 5 * (np.arange(raw.size) - np.repeat(starts, ends - starts))
    values: Int64 = np.add.reduceat((raw & 31) << place, starts)
    negative = (raw[ends - 1] & 16) != 0
    values[negative] -= np.int64(1) << (5 * (ends - starts)[negative])
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


# ----------------------------------------------------------------------------------------------- nested lists, polygons


def _binary_rows(value: list[Any], field: str | None) -> list[bytes] | None:
    """The rows of a nested 0/1 list, one byte per pixel; None where it is something else (an empty list too).

    Rows of 0 and 255 are refused, whatever their number: as polygons they would make a mask that nobody drew.
    """
    if not value or not all(isinstance(row, (list, tuple)) for row in value):
        return None
    try:
        rows = [bytes(row) for row in value]
    except (TypeError, ValueError):  # not whole numbers, or not in 0..255
        return None
    if all(max(row, default=0) <= 1 for row in rows):
        return rows
    if len(rows) >= _ROWS_AT_LEAST and len({len(row) for row in rows}) == 1 and set(b"".join(rows)) == {0, 255}:
        raise InvalidInput(f"{_BINARY}, these 0 and 255 in {len(rows)} rows of {len(rows[0])}", field)
    return None


def _decode_rows(rows: list[bytes], height: int, width: int, field: str | None) -> Bool:
    if len({len(row) for row in rows}) > 1:
        raise InvalidInput("the rows of the mask's nested list differ in length", field)
    _check_size((len(rows), len(rows[0])), height, width, "a nested list", field)
    inside: Bool = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(height, width) != 0
    return inside


def _decode_polygons(value: list[Any], height: int, width: int, field: str | None) -> Bool:
    """Return the union of the polygons. A pixel is inside where its centre is, by the even-odd rule."""
    if value and all(isinstance(number, (int, float)) for number in value):
        value = [value]
    if len(value) == height and all(isinstance(row, list) and len(row) == width for row in value):
        raise InvalidInput(_BINARY, field)
    mask = np.zeros((height, width), dtype=bool)
    work = 0
    for index, numbers in enumerate(value):
        points = _polygon_points(numbers, index, field)
        x0, y0 = np.clip(np.floor(points.min(axis=0)), 0, (width, height)).astype(int)
        x1, y1 = np.clip(np.ceil(points.max(axis=0)), 0, (width, height)).astype(int)
        tops = np.clip(np.ceil(np.minimum(points[:, 1], np.roll(points[:, 1], -1)) - 0.5), y0, y1)
        bottoms = np.clip(np.ceil(np.maximum(points[:, 1], np.roll(points[:, 1], -1)) - 0.5), y0, y1)
        work += int((x1 - x0) * (y1 - y0)) + _CROSSING_COST * int((bottoms - tops).sum()) + 1000
        if work > _POLYGON_WORK:
            raise TooLarge("the mask's polygons are too many or too intricate; send the mask as an RLE", field)
        if x1 > x0 and y1 > y0:
            mask[y0:y1, x0:x1] |= _fill_polygon(points, tops.astype(np.int64), bottoms.astype(np.int64), x0, y0, x1, y1)
    return mask


def _polygon_points(numbers: object, index: int, field: str | None) -> Float64:
    if not isinstance(numbers, (list, tuple)):
        raise InvalidInput("a mask that is a list holds rows of 0 and 1, or polygons [x, y, x, y, ...]", field)
    try:
        flat = np.frombuffer(array("d", numbers), dtype=np.float64)
    except (TypeError, OverflowError):
        raise InvalidInput(f"polygon {index} of the mask holds something that is no number", field) from None
    if flat.size < 6 or flat.size % 2:
        raise InvalidInput(
            f"polygon {index} of the mask has {flat.size} numbers; it needs three or more points, written "
            "[x, y, x, y, x, y, ...]",
            field,
        )
    if not np.isfinite(flat).all() or np.abs(flat).max() > 1e7:
        raise InvalidInput(f"polygon {index} of the mask has a coordinate that is no pixel of any image", field)
    return flat.reshape(-1, 2)


def _fill_polygon(points: Float64, tops: Int64, bottoms: Int64, x0: int, y0: int, x1: int, y1: int) -> Bool:
    """Fill a polygon inside the window. Edge i crosses the centres of rows tops[i] to bottoms[i].

    Every crossing flips the pixels to its right, so the running sum along a row is odd inside.
    """
    flips = np.zeros((y1 - y0) * (x1 - x0 + 1), dtype=np.uint8)
    following = np.roll(points, -1, axis=0)
    crossings = bottoms - tops
    total = np.cumsum(crossings)
    start = 0
    while start < len(points):
        stop = max(start + 1, int(np.searchsorted(total, (total[start - 1] if start else 0) + _CROSSINGS_AT_ONCE)))
        edge = np.repeat(np.arange(start, stop), crossings[start:stop])
        if edge.size:
            before = np.repeat(np.cumsum(crossings[start:stop]) - crossings[start:stop], crossings[start:stop])
            row = tops[edge] + np.arange(edge.size) - before
            a, b = points[edge], following[edge]
            x = a[:, 0] + (row + 0.5 - a[:, 1]) * (b[:, 0] - a[:, 0]) / (b[:, 1] - a[:, 1])
            column = np.clip(np.ceil(x - 0.5), x0, x1).astype(np.int64) - x0
            np.add.at(flips, (row - y0) * (x1 - x0 + 1) + column, np.uint8(1))
        start = stop
    grid = flips.reshape(y1 - y0, x1 - x0 + 1)[:, :-1]
    inside: Bool = np.cumsum(grid, axis=1, dtype=np.uint8) % 2 == 1
    return inside


# ---------------------------------------------------------------------------------------------------------------- box


def mask_box(mask: Bool) -> tuple[int, int, int, int] | None:
    """Return the smallest box around an (H, W) mask: (x, y, width, height), whole pixels; None if the mask is empty."""
    columns = np.flatnonzero(mask.any(axis=0))
    if not columns.size:
        return None
    rows = np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1
