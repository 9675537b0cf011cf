"""Draw the overlay picture: detections and their poses over the colour image.

Each pose is shown by the outline of its rendered model, the object's axes (x red, y green, z blue) and a label with
its score. A detection without a pose is shown by a dashed grey box and the reason. Line widths follow the image's
size.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from posekit.engine import Bool, Float64, Mesh, UInt8
from posekit.render import Caster, finer

Rgb = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels, (0, 0) being the image's outer corner

PALETTE: tuple[Rgb, ...] = (
    (255, 196, 0),
    (0, 214, 255),
    (255, 84, 164),
    (126, 232, 60),
    (255, 128, 48),
    (150, 124, 255),
    (0, 224, 160),
    (255, 82, 82),
    (92, 160, 255),
    (226, 238, 80),
)
AXES: tuple[tuple[str, Rgb], ...] = (("x", (255, 64, 64)), ("y", (64, 224, 64)), ("z", (72, 128, 255)))
GREY: Rgb = (176, 180, 186)
NEAR_M = 0.01  # lines are cut off closer to the camera than this
MAX_LABEL = 32  # characters
SHIFT = 4  # OpenCV's fixed point: 1/16 pixel


@dataclass(frozen=True, kw_only=True)
class OverlayItem:
    """One detection: with a pose (`mesh` and `T_cam_obj`), or rejected (`bbox` and `code`).

    A pose without a mesh is shown by its `bbox`, dashed in the item's colour.
    """

    label: str
    mesh: Mesh | None = None
    T_cam_obj: Float64 | None = None  # (4, 4), metres
    score: float | None = None
    rejected: bool = False
    code: str | None = None  # why it was rejected
    bbox: tuple[float, float, float, float] | None = None  # x, y, width, height of its mask, pixels


@dataclass
class _Drawing:
    """An item with its computed outline, ready to be drawn."""

    item: OverlayItem
    color: Rgb
    box: Box | None = None  # None: no part of it lies in the picture
    boxed: bool = False  # without a model to draw, the mask's box is drawn instead
    depth_m: float = 0.0
    window: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, top, width, height
    cover: npt.NDArray[np.float32] | None = None  # (height, width) of the window, share of each pixel covered, 0..1
    outline: list[npt.NDArray[np.int32]] = field(default_factory=list)  # closed lines in 1/16 pixels


def draw_overlay(
    rgb: UInt8,
    K: Float64,
    poses: Sequence[OverlayItem],
    *,
    scale: float | None = None,
    axes: bool = True,
    labels: bool = True,
) -> UInt8:
    """Draw detections over an image; returns a new (H, W, 3) uint8 RGB image.

    `scale` multiplies line widths and letters; by default it is 1 for an image of 640 x 480 and grows with the
    image. Items whose model lies behind the camera or outside the image are named in the lower left corner. A mesh
    that several items share is prepared once, so pass the same `Mesh` object.
    """
    canvas: UInt8 = np.array(rgb, dtype=np.uint8, order="C")
    height, width = canvas.shape[:2]
    if not poses or not height or not width:
        return canvas
    size = scale if scale is not None else float(np.clip(np.sqrt(width * height / (640 * 480)), 0.6, 6))
    line = max(1, round(2 * size))

    casters: dict[int, Caster] = {}
    drawings = [_prepared(item, index, K, width, height, casters) for index, item in enumerate(poses)]
    far_to_near = sorted(drawings, key=lambda drawing: -drawing.depth_m)
    for drawing in far_to_near:
        _tint(canvas, drawing)
    for drawing in far_to_near:
        _stroke(canvas, drawing.outline, (0, 0, 0), line + max(2, round(1.5 * size)), 0.4)
        _stroke(canvas, drawing.outline, drawing.color, line, 1.0)
    for drawing in drawings:
        if drawing.boxed and drawing.box is not None:
            _dashed_box(canvas, drawing.box, drawing.color, line, size)
    tips: list[Box] = []
    if axes:
        for drawing in far_to_near:
            if drawing.box is not None and not drawing.boxed:
                tips += _axes(canvas, drawing.item, K, size)
    if labels:
        _labels(canvas, drawings, tips, size)
    return canvas


def item_color(index: int) -> Rgb:
    """Return the colour of the item at an index: bright, and different from its neighbours in the list."""
    if index < len(PALETTE):
        return PALETTE[index]
    r, g, b = colorsys.hsv_to_rgb((0.09 + index * 0.618034) % 1.0, 0.55 + 0.4 * (index % 3) / 2, 1.0)
    return int(255 * r), int(255 * g), int(255 * b)


# Outlines.


def _prepared(
    item: OverlayItem, index: int, K: Float64, width: int, height: int, casters: dict[int, Caster]
) -> _Drawing:
    drawing = _Drawing(item=item, color=GREY if item.rejected else item_color(index))
    if item.rejected or item.mesh is None or item.T_cam_obj is None or not np.isfinite(item.T_cam_obj).all():
        drawing.boxed = True
        if item.bbox is not None:
            x, y, w, h = item.bbox
            inside = x < width and y < height and x + w > 0 and y + h > 0
            drawing.box = (max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)) if inside else None
        return drawing
    drawing.depth_m = float(item.T_cam_obj[2, 3])
    window = _window(item.mesh, item.T_cam_obj, K, width, height)
    if window is None:
        return drawing
    if id(item.mesh) not in casters:
        casters[id(item.mesh)] = Caster([item.mesh])
    left, top, w, h = window
    fine = 2 if w * h <= 400_000 else 1  # rays per side of a pixel
    seen = casters[id(item.mesh)].silhouette(
        item.T_cam_obj, finer(K, fine), w * fine, h * fine, left * fine, top * fine
    )
    if not seen.any():
        return drawing
    rows, columns = np.nonzero(seen.any(axis=1))[0], np.nonzero(seen.any(axis=0))[0]
    drawing.box = (
        left + columns[0] / fine,
        top + rows[0] / fine,
        left + (columns[-1] + 1) / fine,
        top + (rows[-1] + 1) / fine,
    )
    drawing.window = window
    drawing.cover = seen.reshape(h, fine, w, fine).mean(axis=(1, 3), dtype=np.float32)
    drawing.outline = _outline(seen, left, top, fine)
    return drawing


def _window(mesh: Mesh, T_cam_obj: Float64, K: Float64, width: int, height: int) -> tuple[int, int, int, int] | None:
    """Return left, top, width and height of the part of the image that can show the mesh; None if none can."""
    low, high = mesh.vertices_m.min(axis=0).astype(np.float64), mesh.vertices_m.max(axis=0).astype(np.float64)
    pick = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    corners = np.where(pick, high, low) @ T_cam_obj[:3, :3].T + T_cam_obj[:3, 3]
    if corners[:, 2].max() <= NEAR_M:
        return None
    if corners[:, 2].min() <= NEAR_M:
        return 0, 0, width, height
    uv = corners @ K.T
    uv = np.clip(uv[:, :2] / uv[:, 2:], -1e7, 1e7)
    left, top = (int(value) for value in np.maximum(np.floor(uv.min(axis=0)) - 2, 0))
    right, bottom = (int(value) for value in np.minimum(np.ceil(uv.max(axis=0)) + 3, (width, height)))
    return (left, top, right - left, bottom - top) if right > left and bottom > top else None


def _outline(seen: Bool, left: int, top: int, fine: int) -> list[npt.NDArray[np.int32]]:
    """Return closed lines around a silhouette and its holes in 1/16 pixels of the image, pixel steps smoothed away."""
    # A border of empty pixels closes a silhouette that the image's edge cuts.
    padded = cv2.copyMakeBorder(seen.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    chains, _ = cv2.findContours(padded, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    lines = []
    for chain in chains:
        points = chain[:, 0].astype(np.float64) - 1
        if len(points) < 4 * fine:
            continue
        for _ in range(fine):
            points = (np.roll(points, 1, axis=0) + 2 * points + np.roll(points, -1, axis=0)) / 4
        points = (points - (fine - 1) / 2) / fine + (left, top)
        lines.append(np.rint(points * 2**SHIFT).astype(np.int32))
    return lines


# Strokes.


def _tint(canvas: UInt8, drawing: _Drawing) -> None:
    if drawing.cover is None:
        return
    left, top, w, h = drawing.window
    _blend(canvas[top : top + h, left : left + w], drawing.cover * 0.17, drawing.color)


def _blend(patch: UInt8, alpha: npt.NDArray[Any], color: Rgb) -> None:
    """Mix a colour into a view of the canvas. `alpha`: (h, w), 0..1."""
    share = alpha[..., None].astype(np.float32)
    patch[...] = np.rint(patch + (np.asarray(color, dtype=np.float32) - patch) * share).astype(np.uint8)


def _stroke(
    canvas: UInt8,
    lines: Sequence[npt.NDArray[np.int32]],
    color: Rgb,
    thickness: int,
    alpha: float,
    closed: bool = True,
) -> None:
    """Draw anti-aliased polylines given in 1/16 pixels; where they cross themselves they are not painted twice."""
    if not lines:
        return
    height, width = canvas.shape[:2]
    points = np.concatenate(lines) / 2**SHIFT
    left, top = np.clip(np.floor(points.min(axis=0)) - thickness - 2, 0, (width, height)).astype(int)
    right, bottom = np.clip(np.ceil(points.max(axis=0)) + thickness + 3, 0, (width, height)).astype(int)
    if right <= left or bottom <= top:
        return
    cover = np.zeros((bottom - top, right - left), np.uint8)
    moved = [np.clip(line - np.array([left, top]) * 2**SHIFT, -(2**29), 2**29).astype(np.int32) for line in lines]
    cv2.polylines(cover, moved, closed, 255, thickness, cv2.LINE_AA, SHIFT)
    _blend(canvas[top:bottom, left:right], cover * np.float32(alpha / 255), color)


def _fixed(points: npt.ArrayLike) -> npt.NDArray[np.int32]:
    return np.asarray(np.rint(np.clip(np.asarray(points), -1e6, 1e6) * 2**SHIFT), dtype=np.int32)


def _dashed_box(canvas: UInt8, box: Box, color: Rgb, line: int, size: float) -> None:
    left, top, right, bottom = (side - 0.5 for side in box)  # OpenCV draws about pixel centres
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    dashes = []
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        length = float(np.hypot(x1 - x0, y1 - y0))
        count = max(1, round(length / (11 * size)))
        for index in range(count):
            a, b = (index + 0.27) / count, (index + 0.73) / count
            dashes.append(_fixed([(x0 + a * (x1 - x0), y0 + a * (y1 - y0)), (x0 + b * (x1 - x0), y0 + b * (y1 - y0))]))
    _stroke(canvas, dashes, (0, 0, 0), line + 2, 0.4, closed=False)
    _stroke(canvas, dashes, color, line, 1.0, closed=False)


def _axes(canvas: UInt8, item: OverlayItem, K: Float64, size: float) -> list[Box]:
    """Draw the object's axes from its origin; return the boxes around their tips, which labels avoid."""
    if item.mesh is None or item.T_cam_obj is None:
        return []
    T = item.T_cam_obj
    tips: list[Box] = []
    length = 0.4 * float(np.linalg.norm(np.ptp(item.mesh.vertices_m, axis=0)))
    origin = T[:3, 3]
    arms = [(name, color, origin + length * T[:3, axis]) for axis, (name, color) in enumerate(AXES)]
    for name, color, tip in sorted(arms, key=lambda arm: -float(arm[2][2])):
        ends = _projected(origin, tip, K)
        if ends is None:
            continue
        start, end = ends
        span = float(np.linalg.norm(end - start))
        line = max(1, round((2 if span > 34 * size else 1) * size))
        lines = [_fixed([start, end])]
        if span > 6 * size:
            along = (end - start) / span
            side = np.array([-along[1], along[0]])
            head = min(7 * size, 0.3 * span)
            lines.append(_fixed([end - head * (along + 0.5 * side), end, end - head * (along - 0.5 * side)]))
        _stroke(canvas, lines, (0, 0, 0), line + max(2, round(size)), 0.45, closed=False)
        _stroke(canvas, lines, color, line, 1.0, closed=False)
        if span > 24 * size:
            x, y = end + (end - start) / span * 8 * size
            _letter(canvas, name, (float(x), float(y)), color, size)
            tips.append((float(x) - 5 * size, float(y) - 5 * size, float(x) + 5 * size, float(y) + 5 * size))
    return tips


def _projected(a: Float64, b: Float64, K: Float64) -> tuple[Float64, Float64] | None:
    """Return the two ends of a line in the image, cut off at the camera; None if all of the line lies behind it."""
    if a[2] < NEAR_M and b[2] < NEAR_M:
        return None
    if a[2] < NEAR_M:
        a = b + (a - b) * ((b[2] - NEAR_M) / (b[2] - a[2]))
    elif b[2] < NEAR_M:
        b = a + (b - a) * ((a[2] - NEAR_M) / (a[2] - b[2]))
    start, end = K @ a, K @ b
    return start[:2] / start[2], end[:2] / end[2]


# Letters.


def _text_size(text: str, scale: float) -> tuple[int, int, int]:
    """Return width, height above and depth below the baseline, in pixels."""
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    return int(width), int(height), int(below)


def _letter(canvas: UInt8, name: str, center: tuple[float, float], color: Rgb, size: float) -> None:
    height, width = canvas.shape[:2]
    if not (0 <= center[0] < width and 0 <= center[1] < height):
        return
    scale = 0.42 * size
    w, h, _ = _text_size(name, scale)
    x, y = round(center[0] - w / 2), round(center[1] + h / 2)
    dark = (20, 20, 20)
    for dx, dy, ink in ((-1, 0, dark), (1, 0, dark), (0, -1, dark), (0, 1, dark), (0, 0, color)):
        cv2.putText(canvas, name, (x + dx, y + dy), cv2.FONT_HERSHEY_SIMPLEX, scale, ink, 1, cv2.LINE_AA)


def _caption(item: OverlayItem, brief: bool) -> str:
    name = "".join(letter if letter.isprintable() else "?" for letter in item.label)
    name = name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 3] + "..."
    if item.rejected:
        return item.code or "rejected" if brief else f"{name}: {item.code or 'rejected'}".lstrip(": ")
    score = "" if item.score is None else f"{item.score:.2f}"
    return (score or name) if brief else f"{name} {score}".strip()


def _labels(canvas: UInt8, drawings: Sequence[_Drawing], tips: Sequence[Box], size: float) -> None:
    """Put each label near its object, where it hides least; labels without a place go to the lower left corner."""
    height, width = canvas.shape[:2]
    crowded = len(drawings) > 12
    scale = (0.36 if crowded else 0.45) * size
    pad = max(2, round(3 * size))
    taken = np.zeros((0, 4))
    boxes = np.array([drawing.box for drawing in drawings if drawing.box is not None]).reshape(-1, 4)
    letters = np.array(tips, dtype=np.float64).reshape(-1, 4)
    stray: list[tuple[str, Rgb]] = []
    # The nearest objects choose first.
    for drawing in sorted(drawings, key=lambda drawing: drawing.depth_m):
        if drawing.box is None:
            why = "" if drawing.boxed else ": outside the picture"
            stray.append((_caption(drawing.item, brief=False) + why, drawing.color))
            continue
        text = _caption(drawing.item, brief=crowded)
        w, h, below = _text_size(text, scale)
        w, h = w + 2 * pad + max(2, round(3 * size)), h + below + 2 * pad
        spots = _spots(drawing.box, w, h, pad)
        spots[:, 0] = np.clip(spots[:, 0], 0, max(0, width - w))
        spots[:, 1] = np.clip(spots[:, 1], 0, max(0, height - h))
        rectangles = np.column_stack([spots, spots + np.array([w, h])])
        cost = 12 * _overlap(rectangles, taken) + 3 * _overlap(rectangles, letters) + _overlap(rectangles, boxes)
        cost += 0.02 * w * h * np.arange(len(spots))
        best = rectangles[int(np.argmin(cost))]
        taken = np.vstack([taken, best])
        _plate(canvas, text, (int(best[0]), int(best[1])), drawing.color, scale, pad, size)
    for row, (text, color) in enumerate(reversed(stray[:8])):
        h = sum(_text_size(text, scale)[1:]) + 2 * pad
        _plate(canvas, text, (pad, height - (row + 1) * (h + pad)), color, scale, pad, size)


def _spots(box: Box, w: int, h: int, gap: int) -> Float64:
    """Return upper left corners for a label, best first: above, below, beside, then inside and further off."""
    left, top, right, bottom = box
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    spots = [
        (middle_x - w / 2, top - h - gap),
        (left, top - h - gap),
        (right - w, top - h - gap),
        (middle_x - w / 2, bottom + gap),
        (right + gap, middle_y - h / 2),
        (left - w - gap, middle_y - h / 2),
        (right + gap, top),
        (left - w - gap, top),
        (right + gap, bottom - h),
        (left - w - gap, bottom - h),
        (middle_x - w / 2, top + gap),
        (middle_x - w / 2, bottom - h - gap),
        (middle_x - w / 2, top - 2 * h - 2 * gap),
        (middle_x - w / 2, bottom + h + 2 * gap),
    ]
    return np.rint(np.array(spots, dtype=np.float64))


def _overlap(rectangles: Float64, others: Float64) -> Float64:
    """Return for each rectangle the summed area that other boxes share with it; both (n, 4)."""
    low = np.maximum(rectangles[:, None, :2], others[None, :, :2])
    high = np.minimum(rectangles[:, None, 2:], others[None, :, 2:])
    return np.asarray(np.clip(high - low, 0, None).prod(axis=2).sum(axis=1), dtype=np.float64)


def _plate(canvas: UInt8, text: str, corner: tuple[int, int], color: Rgb, scale: float, pad: int, size: float) -> None:
    """Draw white text on a dark plate with a bar of the item's colour at its left."""
    height, width = canvas.shape[:2]
    w, h, below = _text_size(text, scale)
    bar = max(2, round(3 * size))
    left, top = max(0, corner[0]), max(0, corner[1])
    right, bottom = min(width, left + w + 2 * pad + bar), min(height, top + h + below + 2 * pad)
    if right <= left or bottom <= top:
        return
    _blend(canvas[top:bottom, left:right], np.full((bottom - top, right - left), 0.74), (22, 24, 28))
    canvas[top:bottom, left : min(left + bar, right)] = color
    at = (left + bar + pad, top + pad + h)
    cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)
