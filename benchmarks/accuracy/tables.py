"""Summarise the accuracy benchmark's rows: tables for people, and the same figures for a machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.accuracy.cases import SURE, Row
from pem.bench.report import Table

BANDS = ((0.0, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.01))  # of visibility
BINS = 10


def mean(values: Iterable[float]) -> float:
    """Return the mean; nan for no values."""
    found = list(values)
    return float(np.mean(found)) if found else float("nan")


def share(part: int, whole: int) -> float:
    """Return part / whole; nan if whole is 0."""
    return part / whole if whole else float("nan")


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile; nan for no values."""
    return float(np.percentile(values, percent)) if values else float("nan")


def by_quality(rows: Sequence[Row]) -> Table:
    """Make one line for each quality of mask, and one for all together if there are several."""
    table = Table(
        [
            *("masks", "instances", "AR", "VSD", "MSSD", "MSPD", "right", "mm", "deg", "sure", "right if sure"),
            *("ambiguous", "rejected", "s median", "s p90"),
        ]
    )
    qualities = list(dict.fromkeys(row.quality for row in rows))
    groups = [(quality, [row for row in rows if row.quality == quality]) for quality in qualities]
    for name, some in [*groups, ("all", list(rows))] if len(groups) > 1 else groups:
        right = [row for row in some if row.right]
        sure = [row for row in some if row.confidence > SURE]
        seconds = [row.seconds for row in some]
        table.add(
            name,
            len(some),
            mean(row.ar for row in some),
            mean(row.vsd for row in some),
            mean(row.mssd for row in some),
            mean(row.mspd for row in some),
            share(len(right), len(some)),
            percentile([row.mssd_mm or 0.0 for row in right], 50),
            percentile([row.angle_deg or 0.0 for row in right], 50),
            share(len(sure), len(some)),
            share(sum(row.right for row in sure), len(sure)),
            sum(row.ambiguous for row in some),
            sum(row.status != "ok" for row in some),
            percentile(seconds, 50),
            percentile(seconds, 90),
        )
    return table


def by_object(rows: Sequence[Row], onboarding_s: dict[str, float]) -> Table:
    """Make one line for each object, the worst first."""
    qualities = list(dict.fromkeys(row.quality for row in rows))
    columns = [f"AR {quality}" for quality in qualities]
    table = Table(["object", "instances", *columns, "right", "sure", "right if sure", "ambiguous", "onboarding s"])
    names = sorted({row.object for row in rows}, key=lambda name: mean(row.ar for row in rows if row.object == name))
    for name in names:
        own = [row for row in rows if row.object == name]
        sure = [row for row in own if row.confidence > SURE]
        table.add(
            name,
            len(own),
            *(mean(row.ar for row in own if row.quality == quality) for quality in qualities),
            share(sum(row.right for row in own), len(own)),
            share(len(sure), len(own)),
            share(sum(row.right for row in sure), len(sure)),
            sum(row.ambiguous for row in own),
            onboarding_s[name],
        )
    return table


def by_visibility(rows: Sequence[Row]) -> Table:
    """Make one line for each band of visibility."""
    qualities = list(dict.fromkeys(row.quality for row in rows))
    table = Table(["visible", "instances", *(f"AR {quality}" for quality in qualities), "right"])
    for low, high in BANDS:
        own = [row for row in rows if low <= row.visibility < high]
        if own:
            table.add(
                f"{low:.0%} to {min(high, 1):.0%}",
                len(own),
                *(mean(row.ar for row in own if row.quality == quality) for quality in qualities),
                share(sum(row.right for row in own), len(own)),
            )
    return table


@dataclass(frozen=True, kw_only=True)
class Bin:
    """The answers whose confidence lies in one tenth; the last tenth includes 1.0."""

    answers: int
    confidence: float  # mean confidence
    right: float  # share of right answers


def bins(rows: Sequence[Row]) -> list[Bin]:
    """Sort the answers into BINS equal steps of confidence; rejections have no pose and are left out."""
    answered = [row for row in rows if row.status == "ok"]
    places = [min(int(row.confidence * BINS), BINS - 1) for row in answered]
    groups = [[row for row, place in zip(answered, places, strict=True) if place == number] for number in range(BINS)]
    return [
        Bin(
            answers=len(group),
            confidence=mean(row.confidence for row in group),
            right=share(sum(row.right for row in group), len(group)),
        )
        for group in groups
    ]


def reliability(rows: Sequence[Row]) -> Table:
    """Make one line for each bin: the confidence, and the share of right answers."""
    table = Table(["confidence", "answers", "mean confidence", "right"])
    for number, one in enumerate(bins(rows)):
        table.add(f"{number / BINS:.1f} to {(number + 1) / BINS:.1f}", one.answers, one.confidence, one.right)
    return table


def failure_line(row: Row) -> str:
    """Describe one failure on one line. It can be found again: the benchmark has the same scenes every time."""
    where = f"scene {row.scene:3} #{row.index} {row.object:16} {row.quality:5} visible {row.visibility:4.0%}"
    if row.status != "ok":
        return f"{where}  {row.status}: {row.detail}"
    evidence = " ".join(f"{name} {value:.3g}" for name, value in row.evidence.items())
    ambiguous = "  ambiguous" if row.ambiguous else ""
    return (
        f"{where}  MSSD {row.mssd_mm:5.1f} mm, {row.shift_mm:5.1f} mm {row.angle_deg:5.1f} deg, AR {row.ar:.2f}"
        f"  confidence {row.confidence:.2f}  {evidence}{ambiguous}"
    )
