"""Latency against offered load: an open loop at one rate after the other, and where the server stops being worth more.

An open loop sends when a request is due, whether or not earlier ones were answered, so that waiting is seen for what it
is. One step of a sweep is one such loop; the knee is the load at which a server should be run (see `knee`). A step at a
low rate lasts longer, so that its 99th percentile is one; where that would take too long it has none.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pem.bench import drive
from pem.bench.judge import Judge
from pem.bench.mix import Load
from pem.bench.report import Table
from pem.bench.result import Result, summarise, wrongs_in_words
from pem.bench.sample import Run, Target

#: Steps of a sweep whose rates nobody named, in parts of the closed-loop throughput: close together near the end of it.
STEPS = (0.1, 0.3, 0.5, 0.65, 0.8, 0.9, 1.0, 1.3)
CLIENTS = 8  # of the closed loop that finds this throughput
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
ENOUGH = 100  # answers; of fewer the 99th percentile is the slowest one, and left out
LONGEST_S = 40.0  # that a step lasts to have that many, where it is not asked to last longer

_REQUESTS = (
    130  # to wait for, where `ENOUGH` are wanted: arrivals are random, and fewer than 100 come once in 200 times
)
_KEEPS_UP = 0.97  # of the offered requests must be answered as fast as they come
_NEAR_THE_BEST = 0.9  # of the largest power


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step: what was offered, and what became of it."""

    offered_hz: float  # requests that fell due, a second: near the rate asked for, arrivals being random
    answered_hz: float  # see `answered_hz`
    latency_ms: dict[str, float]  # by SHARES, from when they were due; no p99 of fewer than ENOUGH, empty of none
    seconds: float  # that it was measured for
    requests: int
    refused: int  # 429
    failed: int  # anything else but 200
    wrong: int  # poses that are not the known one
    changed: int = 0  # rows that are others than when asked alone
    lost: int = 0  # rows without a pose that have one when asked alone
    result: Result | None = field(default=None, repr=False)  # all that is known of the step

    @property
    def keeps_up(self) -> bool:
        """Whether the server answers what is offered."""
        return bool(self.latency_ms) and self.answered_hz >= _KEEPS_UP * self.offered_hz

    @property
    def tail(self) -> str:
        """The highest percentile that is known: p99, or p90 where there were too few answers."""
        return "p99" if "p99" in self.latency_ms else "p90"

    def power(self, name: str) -> float:
        """Answers a second for each second of this percentile's latency; 0 where it is not known."""
        return self.answered_hz / (self.latency_ms[name] / 1e3) if name in self.latency_ms else 0.0

    @property
    def faults(self) -> list[str]:
        """In words what was not answered (429 is an answer) or not right; empty where there is nothing."""
        failed = [f"{self.failed} requests failed"] if self.failed else []
        return failed + wrongs_in_words(self.wrong, self.changed, self.lost)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Latency against offered load."""

    points: list[Point]  # by rising load
    knee: Point | None  # one of `points`
    closed_loop: Result | None = None  # with 8 clients, where the rates came from it

    @property
    def closed_loop_hz(self) -> float | None:
        """Requests a second with 8 clients, where the rates came from it."""
        return self.closed_loop.requests_hz if self.closed_loop is not None else None

    @property
    def faults(self) -> list[str]:
        """Why this is no success, in words, each with its step; empty where it is one."""
        fault = self.closed_loop.fault if self.closed_loop is not None else None
        found = [f"closed loop with {CLIENTS} clients: {fault}"] if fault else []
        for point in self.points:
            found += [f"{point.offered_hz:.3g} requests/s: {words}" for words in point.faults]
        return found

    def as_dict(self) -> dict[str, Any]:
        """For a machine: rates in requests a second, latencies in milliseconds; `run` as of a single run."""
        return {
            "closed_loop_hz": self.closed_loop_hz,
            "closed_loop": self.closed_loop.as_dict() if self.closed_loop is not None else None,
            "knee_hz": self.knee.offered_hz if self.knee else None,
            "points": [
                {
                    "offered_hz": point.offered_hz,
                    "answered_hz": point.answered_hz,
                    "keeps_up": point.keeps_up,
                    "knee": point is self.knee,
                    "seconds": point.seconds,
                    "latency_ms": point.latency_ms,
                    "requests": point.requests,
                    "refused": point.refused,
                    "failed": point.failed,
                    "wrong": point.wrong,
                    "changed": point.changed,
                    "lost": point.lost,
                    "run": point.result.as_dict() if point.result is not None else None,
                }
                for point in self.points
            ],
        }

    def table(self) -> Table:
        """For people: one row for each step."""
        counted = ["requests", "429", "failed", "wrong", "changed", "lost"]
        table = Table(["offered/s", "answered/s", "p50 ms", "p90 ms", "p99 ms", "seconds", *counted, "knee"])
        for point in self.points:
            latencies = [point.latency_ms.get(name) for name in SHARES]
            counts = (point.requests, point.refused, point.failed, point.wrong, point.changed, point.lost)
            mark = "knee" if point is self.knee else ""
            table.add(point.offered_hz, point.answered_hz, *latencies, point.seconds, *counts, mark)
        return table


def sweep(
    target: Target,
    load: Load,
    *,
    rates: Sequence[float] | None,
    seconds: float,
    tell: Callable[[str], None],
    warmup_s: float = 3.0,
    timeout_s: float = drive.TIMEOUT_S,
    judge: Judge | None = None,
    on_progress: Callable[[str, drive.Progress], None] | None = None,
) -> Sweep:
    """Offer one rate (requests a second) after the other for so many seconds each, and find the knee.

    A step with fewer than ENOUGH requests in `seconds` lasts until it has them, LONGEST_S at most.

    `rates` None: STEPS of what 8 clients that wait for their answers get through, which is measured first. `tell` gets
    a line after each step, `on_progress` what runs now and how far it is; `warmup_s`, `timeout_s` and `judge` are those
    of the loops. Raises ValueError for rates that are not positive, and where the closed loop is not answered at all,
    since there is no throughput then to take parts of; drive.CannotBegin as the loops do.
    """

    def watched(what: str) -> Callable[[drive.Progress], None] | None:
        return None if on_progress is None else lambda now: on_progress(what, now)

    judge = judge or Judge(load.questions)
    closed_loop = None
    if rates is None:
        tell(f"closed loop with {CLIENTS} clients, to know what to offer")
        run = asyncio.run(
            drive.closed_loop(
                target,
                load.questions,
                clients=CLIENTS,
                seconds=seconds,
                warmup_s=warmup_s,
                timeout_s=timeout_s,
                judge=judge,
                on_progress=watched(f"{CLIENTS} clients"),
            )
        )
        closed_loop = summarise(run)
        if not closed_loop.requests_hz:
            raise ValueError("not one request of the closed loop was answered: no rates can be derived from it")
        tell(f"{closed_loop.requests_hz:.3g} requests/s")
        rates = [step * closed_loop.requests_hz for step in STEPS]
    if not rates or min(rates) <= 0:
        raise ValueError(f"rates must be positive, got {list(rates)}")
    points = []
    for number, rate_hz in enumerate(sorted(rates)):
        run = asyncio.run(
            drive.open_loop(
                target,
                load.questions,
                rate_hz=rate_hz,
                seconds=step_seconds(rate_hz, seconds),
                warmup_s=warmup_s,
                seed=number,
                timeout_s=timeout_s,
                judge=judge,
                on_progress=watched(f"{rate_hz:.3g} requests/s"),
            )
        )
        point = measured(run)
        points.append(point)
        tail = f"{point.tail} {point.latency_ms[point.tail]:.0f} ms" if point.latency_ms else "no answer"
        tell(f"{point.offered_hz:.3g} requests/s offered, {point.answered_hz:.3g} answered, {tail}")
    return Sweep(points=points, knee=knee(points), closed_loop=closed_loop)


def step_seconds(rate_hz: float, seconds: float) -> float:
    """How long a step at this rate is measured for, where `seconds` are asked for."""
    return max(seconds, min(_REQUESTS / rate_hz, LONGEST_S))


def measured(run: Run) -> Point:
    """What a run of an open loop comes to."""
    latencies_ms = [sample.latency_s * 1e3 for sample in run.samples if sample.ok]
    refused = sum(sample.status == 429 for sample in run.samples)
    shares = {name: share for name, share in SHARES.items() if name != "p99" or len(latencies_ms) >= ENOUGH}
    result = summarise(run)
    return Point(
        offered_hz=len(run.samples) / run.seconds,
        answered_hz=answered_hz(run),
        latency_ms=percentiles(latencies_ms, shares) if latencies_ms else {},
        seconds=run.seconds,
        requests=len(run.samples),
        refused=refused,
        failed=len(run.samples) - len(latencies_ms) - refused,
        wrong=result.wrong,
        changed=result.changed,
        lost=result.lost,
        result=result,
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

    Where one of these points had too few answers for a p99, all are compared by p90.
    """
    keeping_up: list[Point] = []
    for point in sorted(points, key=lambda point: point.offered_hz):
        if not point.keeps_up:
            break
        keeping_up.append(point)
    name = "p99" if all("p99" in point.latency_ms for point in keeping_up) else "p90"
    best = max((point.power(name) for point in keeping_up), default=0.0)
    return next((point for point in reversed(keeping_up) if point.power(name) >= _NEAR_THE_BEST * best), None)
