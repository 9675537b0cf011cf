"""Latency against offered load: an open loop at one rate after the other, and where the server stops being worth more.

An open loop sends when a request is due, whether or not earlier ones were answered, so that waiting is seen for what it
is. One step of a sweep is one such loop; the knee is the load at which a server should be run (see `knee`).
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.load import drive
from benchmarks.load.judge import Judge
from benchmarks.load.mix import Load
from benchmarks.load.report import Table
from benchmarks.load.result import summarise
from benchmarks.load.sample import Run, Target

#: Steps of a sweep whose rates nobody named, in parts of the closed-loop throughput: close together near the end of it.
STEPS = (0.1, 0.3, 0.5, 0.65, 0.8, 0.9, 1.0, 1.3)
CLIENTS = 8  # of the closed loop that finds this throughput
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

_KEEPS_UP = 0.97  # of the offered requests must be answered as fast as they come
_NEAR_THE_BEST = 0.9  # of the largest power


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step: what was offered, and what became of it."""

    offered_hz: float  # requests that fell due, a second: near the rate asked for, arrivals being random
    answered_hz: float  # see `answered_hz`
    latency_ms: dict[str, float]  # by SHARES, of the answered ones, from when they were due; empty: none was answered
    requests: int
    refused: int  # 429
    failed: int  # anything else but 200
    wrong: int  # poses that are not the known one

    @property
    def keeps_up(self) -> bool:
        """Whether the server answers what is offered."""
        return bool(self.latency_ms) and self.answered_hz >= _KEEPS_UP * self.offered_hz

    @property
    def power(self) -> float:
        """Answers a second for each second of p99 latency; 0 where nothing was answered."""
        return self.answered_hz / (self.latency_ms["p99"] / 1e3) if self.latency_ms else 0.0


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Latency against offered load."""

    points: list[Point]  # by rising load
    knee: Point | None  # one of `points`
    seconds: float  # that each step was measured for
    closed_loop_hz: float | None = None  # requests a second with 8 clients, where the rates came from it

    def as_dict(self) -> dict[str, Any]:
        """For a machine: rates in requests a second, latencies in milliseconds."""
        return {
            "seconds": self.seconds,
            "closed_loop_hz": self.closed_loop_hz,
            "knee_hz": self.knee.offered_hz if self.knee else None,
            "points": self.table().as_dicts(),
        }

    def table(self) -> Table:
        """For people: one row for each step."""
        table = Table(
            ["offered/s", "answered/s", "p50 ms", "p90 ms", "p99 ms", "requests", "429", "failed", "wrong", "knee"]
        )
        for point in self.points:
            latencies = [point.latency_ms.get(name) for name in SHARES]
            counts = (point.requests, point.refused, point.failed, point.wrong)
            mark = "knee" if point is self.knee else ""
            table.add(point.offered_hz, point.answered_hz, *latencies, *counts, mark)
        return table


def sweep(
    target: Target,
    load: Load,
    *,
    rates: Sequence[float] | None,
    seconds: float,
    tell: Callable[[str], None],
    warmup_s: float = 3.0,
    judge: Judge | None = None,
) -> Sweep:
    """Offer one rate (requests a second) after the other for so many seconds each, and find the knee.

    `rates` None: STEPS of what 8 clients that wait for their answers get through, which is measured first. `tell` gets
    a line after each step; `warmup_s` and `judge` are those of the loops. Raises ValueError for rates that are not
    positive, and where the closed loop is not answered at all, since there is no throughput then to take parts of;
    drive.CannotBegin as the loops do.
    """
    judge = judge or Judge(load.questions)
    closed_loop_hz = None
    if rates is None:
        tell(f"closed loop with {CLIENTS} clients, to know what to offer")
        run = asyncio.run(
            drive.closed_loop(target, load.questions, clients=CLIENTS, seconds=seconds, warmup_s=warmup_s, judge=judge)
        )
        closed_loop_hz = summarise(run).requests_hz
        if not closed_loop_hz:
            raise ValueError("not one request of the closed loop was answered: no rates can be derived from it")
        tell(f"{closed_loop_hz:.3g} requests/s")
        rates = [step * closed_loop_hz for step in STEPS]
    if not rates or min(rates) <= 0:
        raise ValueError(f"rates must be positive, got {list(rates)}")
    points = []
    for number, rate_hz in enumerate(sorted(rates)):
        run = asyncio.run(
            drive.open_loop(
                target,
                load.questions,
                rate_hz=rate_hz,
                seconds=seconds,
                warmup_s=warmup_s,
                seed=number,
                judge=judge,
            )
        )
        point = measured(run)
        points.append(point)
        p99 = f"p99 {point.latency_ms['p99']:.0f} ms" if point.latency_ms else "no answer"
        tell(f"{point.offered_hz:.3g} requests/s offered, {point.answered_hz:.3g} answered, {p99}")
    return Sweep(points=points, knee=knee(points), seconds=seconds, closed_loop_hz=closed_loop_hz)


def measured(run: Run) -> Point:
    """What a run of an open loop comes to."""
    latencies_ms = [sample.latency_s * 1e3 for sample in run.samples if sample.ok]
    refused = sum(sample.status == 429 for sample in run.samples)
    return Point(
        offered_hz=len(run.samples) / run.seconds,
        answered_hz=answered_hz(run),
        latency_ms=percentiles(latencies_ms, SHARES) if latencies_ms else {},
        requests=len(run.samples),
        refused=refused,
        failed=len(run.samples) - len(latencies_ms) - refused,
        wrong=sum(sample.wrong for sample in run.samples),
    )


def percentiles(values: Sequence[float], shares: dict[str, float]) -> dict[str, float]:
    """The values that so large shares of `values` do not exceed, by name; of two neighbours the higher one."""
    found = np.quantile(values, list(shares.values()), method="higher")
    return dict(zip(shares, (float(value) for value in found), strict=True))


def answered_hz(run: Run) -> float:
    """Answers (200) a second, of an open loop.

    A server that falls behind answers everything in the end, only later, and one that is fast has its last answers
    after the end too. So the answers are not counted in a window: the rate of those requests that were answered is
    lowered by how much later, in the last third of them, answers came than in the first. Medians, since a single slow
    answer is no queue.
    """
    answered = sorted((sample.due, sample.latency_s) for sample in run.samples if sample.ok)
    third = len(answered) // 3
    rate_hz = len(answered) / run.seconds
    if not third:
        return rate_hz
    came_s, later_s = (
        statistics.median(one[column] for one in answered[-third:])
        - statistics.median(one[column] for one in answered[:third])
        for column in (0, 1)
    )
    return rate_hz * came_s / (came_s + later_s) if came_s > 0 and later_s > 0 else rate_hz


def knee(points: Sequence[Point]) -> Point | None:
    """The highest load that a server should be given, one of the points; None where it keeps up with none.

    A point counts only where the server keeps up: it answers 97 % of what is offered as fast as that comes. Among
    these, power (answers a second over p99 latency; Kleinrock 1979) says what one buys with waiting. It rises while
    more load costs little, and falls when each further request a second makes everybody wait. Around its largest value
    it is flat: for M/M/1, where it peaks at half of the service rate, it is within 10 % of that from 34 % to 66 %, and
    noise would place a plain maximum anywhere in between. So the knee is the highest load whose power is within 10 %
    of the largest, and below which nothing has failed to keep up. No bound on the latency has to be known for that.
    """
    keeping_up: list[Point] = []
    for point in sorted(points, key=lambda point: point.offered_hz):
        if not point.keeps_up:
            break
        keeping_up.append(point)
    best = max((point.power for point in keeping_up), default=0.0)
    return next((point for point in reversed(keeping_up) if point.power >= _NEAR_THE_BEST * best), None)
