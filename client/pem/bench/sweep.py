"""Measure latency against offered load: open loops at rising rates, and the load at which to run the server.

An open loop sends each request when it is due, whether or not earlier ones were answered, so that waiting is measured
in full. One step of a sweep is one such loop. The knee is the load at which a server should be run (see `knee`). A step
at a low rate lasts longer, to have enough answers for a 99th percentile; if that would take too long, it has none.
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

#: Default rates of a sweep, as shares of the closed-loop throughput: close together near its end.
STEPS = (0.1, 0.3, 0.5, 0.65, 0.8, 0.9, 1.0, 1.3)
CLIENTS = 8  # clients of the closed loop that finds this throughput
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
ENOUGH = 100  # answers needed for a 99th percentile; of fewer it would be the slowest one
LONGEST_S = 40.0  # longest duration of a step that needs so many, unless it is asked to last longer

_REQUESTS = (
    130  # to wait for, where `ENOUGH` are wanted: arrivals are random, and fewer than 100 come once in 200 times
)
_KEEPS_UP = 0.97  # share of the offered requests that must be answered as fast as they come
_NEAR_THE_BEST = 0.9  # share of the largest power


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step: the offered load and its result."""

    offered_hz: float  # requests that were due, a second; near the rate asked for, since arrivals are random
    answered_hz: float  # see `answered_hz`
    latency_ms: dict[str, float]  # by SHARES, from when they were due; without p99 if fewer than ENOUGH, empty if none
    seconds: float  # length of the measured part
    requests: int
    refused: int  # 429
    failed: int  # answers other than 200 and 429
    wrong: int  # poses that differ from the known one
    changed: int = 0  # rows that differ from those given alone
    lost: int = 0  # rows without a pose that had one alone
    result: Result | None = field(default=None, repr=False)  # all figures of the step

    @property
    def keeps_up(self) -> bool:
        """Return True if the server answers what is offered."""
        return bool(self.latency_ms) and self.answered_hz >= _KEEPS_UP * self.offered_hz

    @property
    def tail(self) -> str:
        """Return the highest known percentile: p99, or p90 if there were too few answers."""
        return "p99" if "p99" in self.latency_ms else "p90"

    def power(self, name: str) -> float:
        """Return answers a second divided by the seconds of this percentile's latency; 0 if unknown."""
        return self.answered_hz / (self.latency_ms[name] / 1e3) if name in self.latency_ms else 0.0

    @property
    def faults(self) -> list[str]:
        """Describe what was not answered (429 is an answer) or wrong; empty if nothing."""
        failed = [f"{self.failed} requests failed"] if self.failed else []
        return failed + wrongs_in_words(self.wrong, self.changed, self.lost)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Latency against offered load."""

    points: list[Point]  # by rising load
    knee: Point | None  # one of `points`
    closed_loop: Result | None = None  # with 8 clients, if the rates were derived from it

    @property
    def closed_loop_hz(self) -> float | None:
        """Return the requests a second with 8 clients, if the rates were derived from it."""
        return self.closed_loop.requests_hz if self.closed_loop is not None else None

    @property
    def faults(self) -> list[str]:
        """Describe why this is no success, each reason with its step; empty if it is one."""
        fault = self.closed_loop.fault if self.closed_loop is not None else None
        found = [f"closed loop with {CLIENTS} clients: {fault}"] if fault else []
        for point in self.points:
            found += [f"{point.offered_hz:.3g} requests/s: {words}" for words in point.faults]
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the sweep for a machine: rates in requests a second, latencies in ms; `run` as of a single run."""
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
        """Return the sweep for people: one row for each step."""
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
    """Offer one rate (requests a second) after the other for `seconds` each, and find the knee.

    A step with fewer than ENOUGH requests in `seconds` lasts until it has them, LONGEST_S at most.

    `rates` None: STEPS of the throughput of 8 clients that wait for their answers, which is measured first. `tell` gets
    a line after each step, `on_progress` the current run and its progress; `warmup_s`, `timeout_s` and `judge` are
    those of the loops. Raises ValueError for rates that are not positive, and if the closed loop gets no answer at all,
    since there is no throughput to take shares of; drive.CannotBegin as the loops do.
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
    """Return how long a step at this rate is measured, if `seconds` are asked for."""
    return max(seconds, min(_REQUESTS / rate_hz, LONGEST_S))


def measured(run: Run) -> Point:
    """Summarise a run of an open loop."""
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
    """Return, by name, the values that these shares of `values` do not exceed; of two neighbours the higher one."""
    found = np.quantile(values, list(shares.values()), method="higher")
    return dict(zip(shares, (float(value) for value in found), strict=True))


def answered_hz(run: Run) -> float:
    """Return the answers (200) a second of an open loop.

    A server that falls behind answers everything in the end, only later, and a fast server also has its last answers
    after the end. So answers are not counted in a window. Instead, the rate of the answered requests is lowered by how
    much later answers came in their last third than in the first. Medians are compared, since a single slow answer is
    no queue.
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
    """Return the highest load that a server should be given, one of the points; None if it keeps up with none.

    A point counts only if the server keeps up: it answers 97 % of the offered requests as fast as they come. Among
    these points, power (answers a second over p99 latency; Kleinrock 1979) tells what waiting buys. It rises while more
    load costs little, and falls when each further request a second makes everybody wait. Around its maximum it is flat:
    for M/M/1, where it peaks at half of the service rate, it is within 10 % of that from 34 % to 66 %, and noise would
    place a plain maximum anywhere in between. So the knee is the highest load whose power is within 10 % of the
    maximum, and below which every point keeps up. No limit on the latency has to be known for that.

    If one of these points had too few answers for a p99, all are compared by p90.
    """
    keeping_up: list[Point] = []
    for point in sorted(points, key=lambda point: point.offered_hz):
        if not point.keeps_up:
            break
        keeping_up.append(point)
    name = "p99" if all("p99" in point.latency_ms for point in keeping_up) else "p90"
    best = max((point.power(name) for point in keeping_up), default=0.0)
    return next((point for point in reversed(keeping_up) if point.power(name) >= _NEAR_THE_BEST * best), None)
