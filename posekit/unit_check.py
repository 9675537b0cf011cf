"""The unit check: do depth, mask and model fit each other, and if not, which unit is wrong?

An object of diameter D at depth z spans at most f D / z pixels. So `size_ratio = extent_px * z / (f * D)` lies a little
below 1 if the units are right and the mask is whole, and lower if the object is partly hidden or seen end-on. (Even
seen end-on, the object spans about its middle extent, which bounds the ratio from below.) It is off by a power of ten
if a unit is wrong. The ratio alone cannot tell whether depth or model is wrong. How plausible each is by itself can:
depth cameras read 0.1 to 5 m, objects measure 10 mm to 1.5 m.

A reading's `strangeness` is how many powers of ten it lies outside the plausible range. A request is refused only if
the strangeness is large, the ratio contributes to it, and one slip would explain it: no false alarms for hidden
objects, loose masks, or unusual but consistent sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

DEPTH_MM = (100.0, 5000.0)
DIAMETER_MM = (10.0, 1500.0)
LEAST_SPAN = 0.3  # share of the model's middle extent that a mask spans at least; low, for hidden objects
MOST_SPAN = 2.2  # multiple of the model's diameter that a mask spans at most; high, for loose masks
FACTORS = (1000.0, 10.0, 25.4, 100.0)  # factors of a slip, the likelier first

_ODD = 0.3  # strangeness worth a warning: a factor of two
_WRONG = 0.15  # median strangeness of a request that a slip may explain: a factor of 1.4
_WRONG_ALONE = 0.8  # strangeness of one row among good ones; below it, a bad mask is likelier
_EXPLAINED = 0.05  # strangeness that may remain once a slip is corrected
_TYPICAL_RATIO = 0.6
_MIN_PIXELS = 16  # a smaller mask says nothing about sizes
_SPECK_PX = 200  # a smaller mask may be a speck, so it is never called too small
_MIDDLE_SHARE = 0.3  # middle extent as a share of the diameter, where unknown: a slender object
_WHOLE_IMAGE = 0.8  # of the image's longer side: a longer mask outlines no object


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The facts about one detection that the unit check needs."""

    median_depth_mm: float  # over the valid pixels under the mask; NaN if there are none
    mask_px: int
    mask_extent_px: float  # longer side of the mask, without stray pixels
    valid_px: int  # pixels under the mask with a depth reading


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of the unit check."""

    rows: list[str | None]  # per observation: why this detection alone is implausible, None if it is not
    request_error: str | None = None  # why the request is refused
    warnings: list[str] = field(default_factory=list)


class _Slip(NamedTuple):
    what: Literal["depth", "model"]
    factor: float  # the right value = the value read x factor


_SLIPS = tuple(_Slip(what, factor) for size in FACTORS for factor in (size, 1 / size) for what in ("depth", "model"))


class _Reading(NamedTuple):
    """One observation in millimetres."""

    depth_mm: float
    diameter_mm: float
    middle_mm: float  # the model's second largest extent
    extent_mm: float  # the mask's longer side at that depth
    whole_image: bool
    speck: bool

    def after(self, slip: _Slip) -> _Reading:
        if slip.what == "depth":
            return self._replace(depth_mm=self.depth_mm * slip.factor, extent_mm=self.extent_mm * slip.factor)
        return self._replace(diameter_mm=self.diameter_mm * slip.factor, middle_mm=self.middle_mm * slip.factor)

    @property
    def ratio(self) -> float:
        return self.extent_mm / self.diameter_mm

    @property
    def lengths_strange(self) -> float:
        return _outside(self.depth_mm, DEPTH_MM) + _outside(self.diameter_mm, DIAMETER_MM)

    @property
    def ratio_strange(self) -> float:
        least = 0.0 if self.speck else LEAST_SPAN * self.middle_mm
        return _outside(self.extent_mm, (max(least, 1e-12), MOST_SPAN * self.diameter_mm))

    @property
    def strangeness(self) -> float:
        return self.lengths_strange + self.ratio_strange


def observe(depth_mm: npt.NDArray[np.floating], mask: npt.NDArray[np.bool_]) -> Observation:
    """Measure one detection: depth (H, W) in millimetres, 0 = no reading; mask (H, W)."""
    readings = depth_mm[mask]
    readings = readings[readings > 0]
    return Observation(
        median_depth_mm=float(np.median(readings)) if readings.size else math.nan,
        mask_px=int(np.count_nonzero(mask)),
        mask_extent_px=float(max(_extent(mask.sum(axis=0)), _extent(mask.sum(axis=1)))),
        valid_px=int(readings.size),
    )


def judge(
    observations: Sequence[Observation],
    diameters_mm: Sequence[float | None],
    fx: float,
    fy: float,
    strict: bool = False,
    *,
    middles_mm: Sequence[float | None] | None = None,
    image_size: tuple[int, int] | None = None,
    depth_scale_given: bool = True,
    rows_only: bool = False,
) -> Verdict:
    """Judge the units of a request by all of its detections together.

    `diameters_mm` and `middles_mm` (second largest extents) have one entry per observation. A diameter of None means
    that the detection has no CAD; a missing middle extent is guessed. `image_size` (height, width) identifies masks
    that fill the image, which outline nothing. `depth_scale_given` chooses the words: whether the client gave
    depth_scale or depth_unit, or the default was taken. Detections without depth, with a tiny mask or without CAD are
    not judged. `strict` refuses what is otherwise a warning. `rows_only` judges each detection by itself, as one among
    others that are not given.
    """
    focal_px = math.sqrt(abs(fx * fy))
    longest_px = math.inf if image_size is None else _WHOLE_IMAGE * max(image_size)
    readings: dict[int, _Reading] = {}
    for index, (seen, diameter_mm) in enumerate(zip(observations, diameters_mm, strict=True)):
        depth_mm = seen.median_depth_mm
        usable = seen.mask_px >= _MIN_PIXELS and seen.valid_px > 0 and seen.mask_extent_px > 0
        if usable and diameter_mm and diameter_mm > 0 and 0 < depth_mm < math.inf and 0 < focal_px < math.inf:
            extent_mm = seen.mask_extent_px * depth_mm / focal_px
            middle_mm = (middles_mm[index] if middles_mm is not None else None) or _MIDDLE_SHARE * diameter_mm
            whole_image, speck = seen.mask_extent_px >= longest_px, seen.mask_px < _SPECK_PX
            readings[index] = _Reading(depth_mm, diameter_mm, middle_mm, extent_mm, whole_image, speck)
    rows: list[str | None] = [None] * len(observations)
    if not readings:
        return Verdict(rows=rows)
    warnings: list[str] = []
    if not rows_only:
        together = list(readings.values())
        slips = _explanations(together, _WRONG)
        if slips:
            return Verdict(rows=rows, request_error=_slip_words(together, slips, depth_scale_given))
        warnings = _oddities(together)
        if warnings and strict:
            return Verdict(rows=rows, request_error=f'{"; ".join(warnings)} (units: "check" would only warn)')
    if rows_only or len(readings) > 1:
        for index, reading in readings.items():
            slips = _explanations([reading], _WRONG_ALONE)
            if slips:
                rows[index] = _slip_words([reading], slips, depth_scale_given)
    return Verdict(rows=rows, warnings=warnings)


def _explanations(readings: Sequence[_Reading], wrong: float) -> list[_Slip]:
    """Return the slips that would explain a strangeness of at least `wrong`.

    The list is empty if the strangeness is lower or no slip helps. It holds a depth slip and a model slip if both
    explain it equally well.
    """
    lengths = _median_of([reading.lengths_strange for reading in readings])
    if lengths < 0.1 and _median_of([float(reading.whole_image) for reading in readings]):
        return []
    if _median_of([reading.strangeness for reading in readings]) < wrong:
        return []
    if _median_of([reading.ratio_strange for reading in readings]) < 0.1:
        return []
    best: dict[str, tuple[float, _Slip]] = {}
    for order, slip in enumerate(_SLIPS):
        after = [reading.after(slip) for reading in readings]
        if _median_of([reading.strangeness for reading in after]) > _EXPLAINED:
            continue
        ratio = _median_of([reading.ratio for reading in after])
        cost = abs(math.log10(ratio / _TYPICAL_RATIO)) + 0.02 * order
        if slip.what not in best or cost < best[slip.what][0]:
            best[slip.what] = cost, slip
    return [best[what][1] for what in ("depth", "model") if what in best]


def _oddities(readings: Sequence[_Reading]) -> list[str]:
    """Return sentences for oddities that no single slip explains."""
    depth_mm = _median_of([reading.depth_mm for reading in readings])
    diameter_mm = _median_of([reading.diameter_mm for reading in readings])
    ratio = _median_of([reading.ratio for reading in readings])
    extent_mm = _median_of([reading.extent_mm for reading in readings])
    found = []
    if _outside(depth_mm, DEPTH_MM) > _ODD:
        found.append(f"the depth under the masks is {_mm(depth_mm)}, unusual for a depth camera; check depth_scale")
    if _outside(diameter_mm, DIAMETER_MM) > _ODD:
        found.append(f"the model's diameter is {_mm(diameter_mm)}, an unusual size; check model_unit")
    if _median_of([reading.ratio_strange for reading in readings]) > 0.05:
        word = "larger" if ratio > 1 else "smaller"
        found.append(
            f"at a depth of {_mm(depth_mm)} the masks span {_mm(extent_mm)}, much {word} than the model's diameter of "
            f"{_mm(diameter_mm)}; check the masks, depth_scale, model_unit and cam_K"
        )
    return found


def _slip_words(readings: Sequence[_Reading], slips: Sequence[_Slip], depth_scale_given: bool) -> str:
    """Say which value is wrong, what it should be, and how to correct it; the median reading stands for all."""
    reading = sorted(readings, key=lambda one: one.ratio)[(len(readings) - 1) // 2]
    sentences = [
        _depth_words(reading, slip.factor, depth_scale_given) if slip.what == "depth" else _model_words(reading, slip)
        for slip in slips
    ]
    return sentences[0] if len(sentences) == 1 else f"either {sentences[0]}; or {sentences[1]}"


def _depth_words(reading: _Reading, factor: float, depth_scale_given: bool) -> str:
    right = (
        f"the depth reads {_mm(reading.depth_mm)} where the mask's size and the model's diameter say about "
        f"{_mm(reading.depth_mm * factor)}"
    )
    given = "depth_scale" if depth_scale_given else "depth_scale (not given, so 1.0 was taken)"
    if factor > 1:
        unit = 'set cam_params.depth_unit to "m" or ' if factor == 1000 else ""
        return f"{right}: {given} looks {factor:g} times too small; {unit}multiply depth_scale by {factor:g}"
    unit = 'leave out cam_params.depth_unit if it is "m", or ' if factor == 0.001 and depth_scale_given else ""
    return f"{right}: {given} looks {1 / factor:g} times too large; {unit}divide depth_scale by {1 / factor:g}"


def _model_words(reading: _Reading, slip: _Slip) -> str:
    size = f"{1 / slip.factor:g} times too large" if slip.factor < 1 else f"{slip.factor:g} times too small"
    right = (
        f"the model's diameter is {_mm(reading.diameter_mm)} where the mask spans {_mm(reading.extent_mm)} at a depth "
        f"of {_mm(reading.depth_mm)}: the CAD looks {size}"
    )
    again = "an object registered before has to be registered again"
    if slip.factor == 1000:
        return f'{right}, as a file in metres does; send model_unit: "m" ({again})'
    if slip.factor == 0.001:
        return f'{right}, as a file in millimetres taken for metres does; send model_unit: "mm" ({again})'
    kind = {25.4: ", as a file in inches does", 10.0: ", as a file in centimetres does"}.get(slip.factor, "")
    how = f"multiply its vertices by {slip.factor:g}" if slip.factor > 1 else f"divide them by {1 / slip.factor:g}"
    return f"{right}{kind}; {how.replace('them', 'its vertices')} so that they are millimetres"


def _outside(value: float, limits: tuple[float, float]) -> float:
    """Return how many powers of ten a positive value lies outside its limits."""
    return max(0.0, math.log10(limits[0] / value), math.log10(value / limits[1]))


def _median_of(values: Sequence[float]) -> float:
    """Return the lower median: of two values, the less strange one decides."""
    return sorted(values)[(len(values) - 1) // 2]


def _extent(counts: npt.NDArray[np.integer]) -> int:
    """Return how many columns (or rows) hold a mask's pixels, without two percent at either end."""
    total = np.cumsum(counts)
    if not total.size or total[-1] == 0:
        return 0
    first, last = np.searchsorted(total, (0.02 * total[-1], 0.98 * total[-1]))
    return int(last - first) + 1


def _mm(value: float) -> str:
    """Format millimetres with three significant digits: "0.82 mm", "820 mm", "820000 mm"."""
    if value >= 100:
        return f"{value:.0f} mm"
    return f"{value:.3g} mm"
