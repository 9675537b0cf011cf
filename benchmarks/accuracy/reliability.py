"""Draw the reliability diagram with OpenCV: the share of right answers by confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from benchmarks.accuracy.cases import SURE, Row
from benchmarks.accuracy.tables import BINS, Bin, bins, share
from posekit.engine import UInt8

Rgb = tuple[int, int, int]

WIDTH, HEIGHT = 1000, 896
LEFT, RIGHT = 96, 968  # of the axes
TOP, BOTTOM = 140, 660
COUNTS_TOP, COUNTS_BOTTOM = 704, 820
FINE = 2  # drawn this much larger, then reduced, for smooth edges

INK: Rgb = (34, 40, 49)
PALE: Rgb = (120, 128, 138)
GRID: Rgb = (228, 231, 235)
BAR: Rgb = (64, 121, 191)
SURE_BAR: Rgb = (34, 94, 168)
COUNT: Rgb = (164, 184, 208)
IDEAL: Rgb = (214, 96, 38)


def draw(rows: Sequence[Row]) -> UInt8:
    """Draw the diagram of these answers as (HEIGHT, WIDTH, 3) uint8 RGB; rejections have no pose and are left out."""
    canvas = _Canvas()
    found = bins(rows)
    answers = sum(one.answers for one in found)
    sure = [row for row in rows if row.confidence > SURE]
    canvas.text((LEFT, 46), "What a confidence is worth", 30, INK, weight=600)
    right = share(sum(row.right for row in sure), len(sure))
    told = f"of {len(sure)} answers with more than {SURE:g}, {right:.1%} are right" if sure else "no answer is sure"
    canvas.text((LEFT, 80), f"{answers} answers to {len(rows)} questions; {told}", 20, PALE)
    _axes(canvas)
    most = max(1, max(one.answers for one in found))
    for number, one in enumerate(found):
        _bar(canvas, number, one, most)
    canvas.line(_at(0, 0), _at(1, 1), IDEAL, 2, dashed=True)
    return canvas.picture()


def _axes(canvas: _Canvas) -> None:
    for step in range(0, 11, 2):
        value = step / 10
        canvas.line(_at(0, value), _at(1, value), GRID if step else INK, 1.5)
        canvas.text((LEFT - 14, _at(0, value)[1] + 6), f"{value:.0%}", 18, PALE, align=1.0)
    for step in range(BINS + 1):
        canvas.text((_at(step / BINS, 0)[0], BOTTOM + 27), f"{step / BINS:.1f}", 18, PALE, align=0.5)
    canvas.text((LEFT, TOP - 12), "right (MSSD under a tenth of the diameter), with 95% intervals", 16, PALE)
    canvas.text((RIGHT, TOP - 12), "mean confidence", 16, IDEAL, align=1.0)
    canvas.line((LEFT, COUNTS_BOTTOM), (RIGHT, COUNTS_BOTTOM), INK, 1.5)
    canvas.text((LEFT, COUNTS_TOP + 6), "answers", 16, PALE)
    canvas.text(((LEFT + RIGHT) / 2, HEIGHT - 30), "confidence", 20, INK, align=0.5)


def _bar(canvas: _Canvas, number: int, one: Bin, most: int) -> None:
    """Draw a bin: its share as a bar, the 95 % interval as a whisker, its mean confidence as a dot, its count below."""
    low, high = (number + 0.1) / BINS, (number + 0.9) / BINS
    middle = (low + high) / 2
    x0, x1, x = _at(low, 0)[0], _at(high, 0)[0], _at(middle, 0)[0]
    height = (COUNTS_BOTTOM - COUNTS_TOP - 34) * one.answers / most
    canvas.box((x0, COUNTS_BOTTOM - height), (x1, COUNTS_BOTTOM), COUNT)
    canvas.text((x, COUNTS_BOTTOM - height - 6), str(one.answers), 16, PALE, align=0.5)
    if not one.answers:
        return
    canvas.box((x0, _at(0, one.right)[1]), (x1, BOTTOM), SURE_BAR if number / BINS >= SURE else BAR)
    floor, ceiling = interval(round(one.right * one.answers), one.answers)
    canvas.line(_at(middle, floor), _at(middle, ceiling), INK, 2)
    for value in (floor, ceiling):
        y = _at(0, value)[1]
        canvas.line((x - 7, y), (x + 7, y), INK, 2)
    canvas.dot(_at(one.confidence, one.confidence), 6, IDEAL)


def interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of the true share if `right` of `count` were seen (Wilson 1927)."""
    z = 1.96
    centre = (right + z * z / 2) / (count + z * z)
    reach = z * math.sqrt(right * (count - right) / count + z * z / 4) / (count + z * z)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _at(x: float, y: float) -> tuple[float, float]:
    """Map a point of the diagram, both 0..1, into the picture."""
    return LEFT + x * (RIGHT - LEFT), BOTTOM - y * (BOTTOM - TOP)


class _Canvas:
    """A white picture to draw on, in final pixels."""

    def __init__(self) -> None:
        self._pixels = np.full((HEIGHT * FINE, WIDTH * FINE, 3), 255, np.uint8)
        self._font = cv2.FontFace("sans")

    def line(
        self, a: tuple[float, float], b: tuple[float, float], color: Rgb, width: float, dashed: bool = False
    ) -> None:
        ends = np.array([a, b], dtype=np.float64)
        pieces = int(np.linalg.norm(ends[1] - ends[0]) / 14) if dashed else 1
        for piece in range(pieces):
            share_end = 0.6 if dashed else 1.0
            start, stop = (ends[0] + (ends[1] - ends[0]) * (piece + part) / pieces for part in (0.0, share_end))
            cv2.line(self._pixels, _fine(start), _fine(stop), color, round(width * FINE), cv2.LINE_AA)

    def box(self, a: tuple[float, float], b: tuple[float, float], color: Rgb) -> None:
        cv2.rectangle(self._pixels, _fine(a), _fine(b), color, cv2.FILLED)

    def dot(self, at: tuple[float, float], radius: float, color: Rgb) -> None:
        cv2.circle(self._pixels, _fine(at), round((radius + 2) * FINE), (255, 255, 255), cv2.FILLED, cv2.LINE_AA)
        cv2.circle(self._pixels, _fine(at), round(radius * FINE), color, cv2.FILLED, cv2.LINE_AA)

    def text(
        self, at: tuple[float, float], text: str, size: int, color: Rgb, align: float = 0.0, weight: int = 400
    ) -> None:
        """Write text. `at`: the left end of its base line, moved left by the share `align` of the text's width."""
        box = cv2.getTextSize((0, 0), text, (0, 0), self._font, size * FINE, weight)
        x, y = _fine(at)
        cv2.putText(self._pixels, text, (round(x - align * box[2]), y), color, self._font, size * FINE, weight)

    def picture(self) -> UInt8:
        small = cv2.resize(self._pixels, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
        return np.asarray(small, dtype=np.uint8)


def _fine(at: Sequence[float] | npt.NDArray[np.float64]) -> tuple[int, int]:
    return round(float(at[0]) * FINE), round(float(at[1]) * FINE)
