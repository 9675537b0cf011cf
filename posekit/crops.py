"""Cut a detection out of its frame for the engines: the mask's box with a margin, and the camera of that crop."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from posekit import unit_check
from posekit.engine import Bool, Float32, Float64, Rejection, UInt8
from posekit.io.frame import Frame
from posekit.io.masks import mask_box
from posekit.units import mm_to_m

MARGIN = 0.2  # share of the mask's box added on every side
MARGIN_PX = 16  # the margin is at least this wide
CROP_PIXELS = 1 << 20  # a larger crop is thinned out: no engine looks at more pixels
MIN_DEPTH_PX = 33  # valid depth pixels needed under the mask


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A detection's mask, and the facts that the unit check needs about it."""

    box: tuple[int, int, int, int] | None  # xywh, pixels of the frame; None = the mask is empty
    mask: Bool  # (h, w), inside the box
    observation: unit_check.Observation


@dataclass(frozen=True, kw_only=True)
class CutOut:
    """A detection's pixels, thinned out where the crop has more than CROP_PIXELS."""

    rgb: UInt8  # (h, w, 3)
    depth_m: Float32  # (h, w), 0 = no reading
    mask: UInt8  # (h, w), 0 or 1
    K: Float64  # (3, 3), camera of the crop
    origin_px: tuple[int, int]  # column and row of the crop's first pixel in its image, in pixels of the crop's size
    image_size_px: tuple[int, int]  # width and height of that image, also in pixels of the crop's size

    def seed(self, object_id: str) -> int:
        """Return a seed that depends on the decoded content alone: not on encoding, other detections or the date."""
        content = hashlib.blake2b(digest_size=8)
        content.update(repr((self.mask.shape, object_id)).encode())
        for array in (self.rgb, self.depth_m, self.mask, self.K):
            content.update(np.ascontiguousarray(array).data)
        return int.from_bytes(content.digest(), "little") >> 1  # 63 bits, like the seeds that a client may give


def look(frame: Frame, mask: Bool) -> Seen:
    """Measure a detection by its mask (H, W); keep only the part inside the mask's box."""
    box = mask_box(mask)
    window = _window(box or (0, 0, 0, 0), 0, frame.size)
    inside = mask[window].copy()  # a copy, so that the whole mask can be freed
    return Seen(box=box, mask=inside, observation=unit_check.observe(frame.depth_mm(window), inside))


def why_not(seen: Seen, *, has_cad: bool) -> Rejection | None:
    """Return the reason why no engine can use a detection, None where one can."""
    if seen.box is None:
        return Rejection(code="mask_empty", detail="the mask has no pixel")
    if not has_cad:
        return Rejection(code="no_cad", detail="no CAD model was given for this detection's category")
    valid, total = seen.observation.valid_px, seen.observation.mask_px
    if valid == 0:
        detail = f"none of the {total} pixels under the mask has a depth reading"
        return Rejection(code="no_depth", detail=detail)
    if valid < MIN_DEPTH_PX:
        detail = f"{valid} valid depth pixels under the mask, more than {MIN_DEPTH_PX - 1} needed"
        return Rejection(code="mask_too_small", detail=detail)
    return None


def cut_out(frame: Frame, seen: Seen) -> CutOut:
    """Cut a detection out of its frame. The mask must have at least one pixel."""
    assert seen.box is not None
    x, y, w, h = seen.box
    margin = max(MARGIN_PX, math.ceil(MARGIN * max(w, h)))
    rows, columns = _window(seen.box, margin, frame.size)
    step = max(1, math.ceil(math.sqrt((rows.stop - rows.start) * (columns.stop - columns.start) / CROP_PIXELS)))
    thin = slice(rows.start, rows.stop, step), slice(columns.start, columns.stop, step)
    whole = np.zeros((rows.stop - rows.start, columns.stop - columns.start), dtype=np.uint8)
    whole[y - rows.start : y - rows.start + h, x - columns.start : x - columns.start + w] = seen.mask
    K = frame.K.copy()
    K[0, 2] -= columns.start
    K[1, 2] -= rows.start
    K[:2] /= step  # exact: pixel centres are whole numbers, and every step-th is kept
    image_rows = range(rows.start % step, frame.size[0], step)  # rows of the image, thinned out like the crop
    image_columns = range(columns.start % step, frame.size[1], step)
    return CutOut(
        rgb=np.ascontiguousarray(frame.rgb[thin]),
        depth_m=mm_to_m(frame.depth_mm(thin)),
        mask=np.ascontiguousarray(whole[::step, ::step]),
        K=K,
        origin_px=(columns.start // step, rows.start // step),
        image_size_px=(len(image_columns), len(image_rows)),
    )


def _window(box: tuple[int, int, int, int], margin: int, size: tuple[int, int]) -> tuple[slice, slice]:
    """Return the rows and columns of a box with a margin, clipped to the image."""
    x, y, w, h = box
    height, width = size
    rows = slice(max(0, y - margin), min(height, y + h + margin))
    return rows, slice(max(0, x - margin), min(width, x + w + margin))
