"""Find how many robots a machine can serve: the largest number for which a latency target holds.

A robot asks a few times a second and does not wait for earlier answers, so N robots are an open loop of N times their
rate. The search tries numbers of robots, each with a run of its own, and confirms the result with a longer run.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pem.bench import drive
from pem.bench.judge import Judge
from pem.bench.mix import Load
from pem.bench.report import Table
from pem.bench.result import Result, stage_times, summarise
from pem.bench.sample import Run, Target, Usage
from pem.bench.sweep import SHARES, percentiles

_REQUESTS = 100  # requests of a trial, at least: with fewer, p99 is the slowest one
_LONGEST = 3.0  # a trial lasts at most this many times its usual length to have that many
_LIMITS = 10.0  # a trial lasts at least this many times the longest allowed latency, to show a growing queue
_CONFIRM = 3.0  # length of the confirming run, in trials
_FINE = 50  # the search stops at one robot in this many: finer differences are noise of the arrivals
_STEP_DOWN = 0.05  # share of the robots removed if the longer run does not hold
_MOST_DOUBLINGS = 20
_ALONE_S = 6.0

_LIMIT = re.compile(r"\s*p(\d{1,2}(?:\.\d+)?)\s*=\s*(\d+(?:\.\d+)?)\s*(ms|s)\s*")


@dataclass(frozen=True, kw_only=True)
class Slo:
    """A latency target. `p99=500ms`: 99 % of requests are answered within 500 ms."""

    limits_ms: dict[str, float]  # by percentile as written: "p99", "p99.9"

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Parse `p99=500ms` or `p50=0.1s,p99.9=2s`. Raises ValueError with the problem."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            found = _LIMIT.fullmatch(part)
            if found is None:
                raise ValueError(
                    f"{part.strip()!r} is no limit; write p99=500ms or p99.9=2s, several with commas between"
                )
            percent, value, unit = found.groups()
            name = f"p{percent}"
            limit_ms = float(value) * (1000 if unit == "s" else 1)
            if float(percent) == 0:
                raise ValueError("p0 is no limit: it is the fastest request of all")
            if limit_ms == 0:
                raise ValueError(f"{name} cannot be within 0 {unit}")
            if name in limits:
                raise ValueError(f"{name} is limited twice")
            limits[name] = limit_ms
        return cls(limits_ms=limits)

    @property
    def shares(self) -> dict[str, float]:
        """Return the percentiles as shares of one."""
        return {name: float(name[1:]) / 100 for name in self.limits_ms}

    def broken(self, latency_ms: dict[str, float]) -> str:
        """Describe the limits that these latencies (by percentile) exceed; "" if all hold."""
        over = self.over(latency_ms)
        return ", ".join(f"{name} is {latency_ms[name]:.0f} ms, over {self.limits_ms[name]:g} ms" for name in over)

    def over(self, latency_ms: dict[str, float]) -> list[str]:
        """Return the percentiles over their limits, the one furthest over (as a ratio) first."""
        ratios = {name: latency_ms[name] / limit_ms for name, limit_ms in self.limits_ms.items() if name in latency_ms}
        return sorted((name for name, ratio in ratios.items() if ratio > 1), key=lambda name: -ratios[name])

    def __str__(self) -> str:
        return " and ".join(f"{name} under {limit_ms:g} ms" for name, limit_ms in self.limits_ms.items())


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One number of robots, and the result of its run."""

    robots: int
    rate_hz: float  # requests a second of all robots together
    seconds: float
    requests: int
    latency_ms: dict[str, float]  # p50, p90, p99 and the target's percentiles; empty: no request was answered
    why_not: str  # the reason why the target was missed; empty: it held
    stage_ms: dict[str, dict[str, float]] = field(default_factory=dict)  # by STAGES and OUTSIDE, as latency_ms
    busy: dict[str, float] = field(default_factory=dict)  # stage -> cores that its processes kept busy
    wrongs: list[str] = field(default_factory=list)  # descriptions of wrong answers

    @property
    def held(self) -> bool:
        """Return True if the target held, and every request was answered correctly."""
        return not self.why_not


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The result of the search, with its trials."""

    robots: int
    robots_hz: float  # requests a second of each robot
    masks: float  # mean detections of a request
    slo: Slo
    limited_by: str  # description of the limit
    trials: list[Trial]  # in order; the last one that held with `robots` robots is the proof
    alone: Result | None = None  # one client alone, where the search begins; None: not a single request was answered

    @property
    def detections_hz(self) -> float:
        """Return the detections a second at this number of robots."""
        return self.robots * self.robots_hz * self.masks

    @property
    def faults(self) -> list[str]:
        """Describe why this is no success: no robot can be served, or an answer was wrong under any load.

        A request that fails because there are too many robots is no fault: the search looks for it.
        """
        found = [] if self.robots else ["not even one robot can be served"]
        if self.alone is not None and self.alone.fault:
            found.append(f"one client alone: {self.alone.fault}")
        return found + [f"{_robots(trial.robots)}: {words}" for trial in self.trials for words in trial.wrongs]

    def __str__(self) -> str:
        masks = f"{self.masks:.3g} mask{'' if self.masks == 1 else 's'}"
        each = f"each {self.robots_hz:g} requests a second with {masks}"
        if not self.robots:
            return f"this machine carries 0 robots ({each}) with {self.slo}: {self.limited_by}"
        each += f": {self.detections_hz:.3g} detections a second"
        carries = f"this machine carries {_robots(self.robots)} ({each}) with {self.slo}"
        return f"{carries}; {self.limited_by}"

    def as_dict(self) -> dict[str, Any]:
        """Return the result for a machine: rates a second, latencies in milliseconds."""
        return {
            "robots": self.robots,
            "robots_hz": self.robots_hz,
            "masks": self.masks,
            "detections_hz": self.detections_hz,
            "slo_ms": self.slo.limits_ms,
            "limited_by": self.limited_by,
            "trials": [
                {
                    "robots": trial.robots,
                    "rate_hz": trial.rate_hz,
                    "seconds": trial.seconds,
                    "requests": trial.requests,
                    "latency_ms": trial.latency_ms,
                    "held": trial.held,
                    "why_not": trial.why_not,
                    "stage_ms": trial.stage_ms,
                    "busy_cores": trial.busy,
                    "wrongs": trial.wrongs,
                }
                for trial in self.trials
            ],
        }

    def table(self) -> Table:
        """Return the trials in order."""
        names = [*SHARES, *(name for name in self.slo.limits_ms if name not in SHARES)]
        table = Table(["robots", "requests/s", "seconds", "requests", *(f"{name} ms" for name in names), "verdict"])
        for trial in self.trials:
            latencies = [trial.latency_ms.get(name) for name in names]
            table.add(trial.robots, trial.rate_hz, trial.seconds, trial.requests, *latencies, trial.why_not or "holds")
        return table


def find(
    target: Target,
    load: Load,
    *,
    slo: Slo,
    robots_hz: float,
    tell: Callable[[str], None],
    seconds: float = 20.0,
    warmup_s: float = 3.0,
    timeout_s: float = drive.TIMEOUT_S,
    judge: Judge | None = None,
    on_progress: Callable[[str, drive.Progress], None] | None = None,
) -> Capacity:
    """Find the largest whole number of robots, each asking `robots_hz` times a second, that the target can serve.

    It can serve them if every request is answered, no pose is wrong and the latency target holds; latency counts from
    when a request is due. The search starts at half of what one client alone achieves. It doubles or halves until it
    has one number that holds and one that does not, and halves the gap between them down to one robot or one in 50. The
    number found must then hold for three times as long; while it does not, it is lowered by a twentieth.

    A trial measures for `seconds`, or longer if that is needed for 100 requests or for ten times the longest allowed
    latency (a queue that grows by a tenth would not exceed the limit sooner), but never for more than three times as
    long. With fewer requests p99 is the slowest of them. `tell` gets a line after each trial, `on_progress` the current
    run and its progress; `warmup_s`, `timeout_s` and `judge` are those of the loops.

    0 robots: not even one can be served, and `limited_by` gives the reason, also if the server answers nothing at all.
    Raises ValueError for a rate that is not positive.
    """
    if robots_hz <= 0:
        raise ValueError(f"robots_hz must be positive, got {robots_hz:g}")
    search = _Search(
        target=target,
        load=load,
        slo=slo,
        robots_hz=robots_hz,
        tell=tell,
        seconds=seconds,
        warmup_s=warmup_s,
        timeout_s=timeout_s,
        judge=judge or Judge(load.questions),
        on_progress=on_progress,
    )
    try:
        robots = search.confirmed(search.largest())
        limited_by = search.limited_by(robots)
    except drive.CannotBegin as error:
        robots, limited_by = 0, str(error)
    return Capacity(
        robots=robots,
        robots_hz=robots_hz,
        masks=math.fsum(len(question.truths) for question in load.questions) / len(load.questions),
        slo=slo,
        limited_by=limited_by,
        trials=search.trials,
        alone=search.alone,
    )


@dataclass(kw_only=True)
class _Search:
    target: Target
    load: Load
    slo: Slo
    robots_hz: float
    tell: Callable[[str], None]
    seconds: float
    warmup_s: float
    timeout_s: float
    judge: Judge
    on_progress: Callable[[str, drive.Progress], None] | None
    trials: list[Trial] = field(default_factory=list)
    alone: Result | None = None
    _alone_ms: dict[str, dict[str, float]] = field(default_factory=dict)  # as in Trial.stage_ms

    def largest(self) -> int:
        """Find the number with trials of the usual length."""
        robots = self._start()
        holds, fails = 0, 0
        for _ in range(_MOST_DOUBLINGS):
            if not self._holds(robots):
                fails = robots
                break
            holds, robots = robots, 2 * robots
        while fails - holds > max(1, holds // _FINE):
            robots = (holds + fails) // 2
            if self._holds(robots):
                holds = robots
            else:
                fails = robots
        return holds

    def confirmed(self, robots: int) -> int:
        """Return this number, or the next lower one that holds in a longer run; 0 if none does."""
        step = max(1, round(_STEP_DOWN * robots))
        while robots > 0 and not self._holds(robots, _CONFIRM):
            robots -= step
        return max(robots, 0)

    def limited_by(self, robots: int) -> str:
        """Describe what grew up to the first number that failed, or why not even one robot can be served."""
        failed = min((trial for trial in self.trials if not trial.held), key=lambda t: t.robots, default=None)
        if failed is None:
            return "nothing limited it in the trials made"
        if not robots:
            return failed.why_not
        told = f"{failed.robots} are too many: {failed.why_not}"
        name = next(iter(self.slo.over(failed.latency_ms)), max(self.slo.limits_ms, key=lambda name: float(name[1:])))
        grew = {stage: ms[name] - self._alone_ms.get(stage, {}).get(name, 0.0) for stage, ms in failed.stage_ms.items()}
        stage = max(grew, key=lambda stage: grew[stage], default="")
        if stage and grew[stage] > 0:
            told += f"; what grew most is {stage} (by {grew[stage]:.0f} ms at {name})"
        if "pose" in failed.busy:
            told += f"; the pose stage kept {failed.busy['pose']:.2f} cores busy"
        return told

    def _start(self) -> int:
        """Return half of what one client alone achieves."""
        run = asyncio.run(
            drive.closed_loop(
                self.target,
                self.load.questions,
                clients=1,
                seconds=min(self.seconds, _ALONE_S),
                warmup_s=self.warmup_s,
                timeout_s=self.timeout_s,
                judge=self.judge,
                on_progress=self._watched("one client alone"),
            )
        )
        self.alone = summarise(run)
        self._alone_ms = _stage_ms(run, self._shares)
        answered_hz = self.alone.requests_hz
        self.tell(f"one client alone: {answered_hz:.3g} requests/s")
        return max(1, round(answered_hz / 2 / self.robots_hz))

    @property
    def _shares(self) -> dict[str, float]:
        return SHARES | self.slo.shares

    def _watched(self, what: str) -> Callable[[drive.Progress], None] | None:
        on_progress = self.on_progress
        return None if on_progress is None else lambda now: on_progress(what, now)

    def _holds(self, robots: int, times: float = 1.0) -> bool:
        trial = self._try(robots, times)
        self.trials.append(trial)
        self.tell(f"{_robots(robots)} ({trial.rate_hz:.3g} requests/s): {trial.why_not or 'holds'}")
        return trial.held

    def _try(self, robots: int, times: float) -> Trial:
        rate_hz = robots * self.robots_hz
        needed_s = max(_REQUESTS / rate_hz, _LIMITS * max(self.slo.limits_ms.values()) / 1e3)
        seconds = times * min(max(self.seconds, needed_s), _LONGEST * self.seconds)
        run = asyncio.run(
            drive.open_loop(
                self.target,
                self.load.questions,
                rate_hz=rate_hz,
                seconds=seconds,
                warmup_s=self.warmup_s,
                seed=len(self.trials),
                timeout_s=self.timeout_s,
                judge=self.judge,
                on_progress=self._watched(_robots(robots)),
            )
        )
        latencies_ms = [sample.latency_s * 1e3 for sample in run.samples if sample.ok]
        latency_ms = percentiles(latencies_ms, self._shares) if latencies_ms else {}
        result = summarise(run)
        return Trial(
            robots=robots,
            rate_hz=rate_hz,
            seconds=seconds,
            requests=len(run.samples),
            latency_ms=latency_ms,
            why_not=_failures(run, result) or self.slo.broken(latency_ms),
            stage_ms=_stage_ms(run, self._shares),
            busy=_busy(run.usage, run.seconds),
            wrongs=result.wrongs,
        )


def _robots(count: int) -> str:
    return f"{count} robot{'' if count == 1 else 's'}"


def _failures(run: Run, result: Result) -> str:
    """Describe failures other than latency; "" if every request was answered correctly."""
    if not run.samples:
        return "no request fell due: the trial was too short"
    failed = Counter(f"{sample.status} {sample.error}".strip() for sample in run.samples if not sample.ok)
    if failed:
        counts = ", ".join(f"{count} with {kind}" for kind, count in failed.most_common(3))
        return f"{failed.total()} of {len(run.samples)} requests were not answered: {counts}"
    return result.fault or ""


def _stage_ms(run: Run, shares: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return these percentiles of each stage's time, OUTSIDE included; empty if the answers do not report it."""
    times = stage_times([sample for sample in run.samples if sample.ok])
    return {stage: percentiles(values_ms, shares) for stage, values_ms in times.items()}


def _busy(usage: list[Usage], seconds: float) -> dict[str, float]:
    """Return stage -> cores that its processes kept busy."""
    busy: defaultdict[str, float] = defaultdict(float)
    for process in usage:
        busy[process.name] += process.cpu_s / seconds
    return dict(busy)
