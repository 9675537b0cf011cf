"""Summarise a run: how much, how fast, how right, and if it was steady enough to be trusted."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from pem.bench.observe import family
from pem.bench.sample import STAGES, Gpu, Run, Sample, Usage

OUTSIDE: Final = "outside"  # a stage beside STAGES: time before the server has the body, and on the way back
TOLERANCE: Final = 0.15  # how far a third of a steady run may differ from the whole
_PARTS: Final = 3
_FEWEST: Final = 5  # answers of a part; fewer tell nothing
_CHANCE: Final = 3.0  # standard deviations that count as chance
_PERCENTILES: Final = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9}


@dataclass(frozen=True, kw_only=True)
class Result:
    """The figures of a run. Without latencies there are no percentiles: the dictionaries are empty."""

    mode: str  # closed | open
    clients: int
    rate_hz: float | None
    seconds: float
    requests_hz: float  # requests answered with 200, a second
    poses_hz: float  # poses a second, without those that are wrong only under load
    detections_hz: float  # rows a second, including those without a pose
    latency_ms: dict[str, float]  # p50 p90 p99 p999 max mean, of the requests answered with 200
    stage_ms: dict[str, dict[str, float]]  # by STAGES and OUTSIDE: p50 p90 p99
    errors: dict[str, int]  # "status code-word" -> count, 429s included
    wrong: int  # poses that differ from the known one, but were right when asked alone
    wrong_alone: int  # poses that differ from the known one, with or without load
    changed: int  # rows that differ from those given alone
    lost: int  # rows without a pose that had one, and not a wrong one, when asked alone
    rejected: int  # rows without a pose
    answered: int  # requests answered with 200
    offered: int  # all requests
    stable: bool
    why: str  # the figures behind `stable`
    passes: dict[str, float]  # count, detections (of a pass), requests (of a pass); empty without /metrics
    usage: list[Usage]
    gpus: list[Gpu]
    refused: dict[str, float]  # answers with Retry-After: count, p99_ms
    load_generator_cpu_s: float
    wrong_alone_named: list[str]  # descriptions of the detections that are wrong without load
    wrong_alone_share: float  # share of the detections with a known pose

    @property
    def failures(self) -> int:
        """Return the number of requests that ended in an error other than 429."""
        return sum(count for kind, count in self.errors.items() if not kind.startswith("429 "))

    @property
    def fault(self) -> str | None:
        """Describe why the run is no success; None if every answer came and was right."""
        words = [f"{self.failures} requests failed"] if self.failures else []
        words += self.wrongs
        if not self.answered:
            words.append("nothing was answered")
        return "; ".join(words) or None

    @property
    def wrongs(self) -> list[str]:
        """Describe what is wrong in the answers; empty if all are right."""
        return wrongs_in_words(self.wrong, self.changed, self.lost)

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON; the keys are the fields' names."""
        return asdict(self)


def wrongs_in_words(wrong: int, changed: int, lost: int) -> list[str]:
    """Describe what load made wrong in answers; zeros are left out."""
    counts = {
        "poses are wrong under load": wrong,
        "poses are lost under load": lost,
        "rows are others than when asked alone": changed,
    }
    return [f"{count} {what}" for what, count in counts.items() if count]


def summarise(run: Run) -> Result:
    """Return the figures of a run.

    In an open loop, throughput counts what was done in the measured part, and everything else counts what was due in
    it. So neither a queue that is worked off afterwards nor one that existed before makes the server look faster.
    """
    good = [sample for sample in run.samples if sample.ok]
    done = [sample for sample in (*run.samples, *run.carried) if sample.ok and run.begun <= sample.done < run.ended]
    refused = [sample for sample in run.samples if sample.retry_after_s is not None]
    stable, why = steadiness(run, done)
    return Result(
        mode=run.mode,
        clients=run.clients,
        rate_hz=run.rate_hz,
        seconds=run.seconds,
        requests_hz=len(done) / run.seconds,
        poses_hz=sum(sample.poses - sample.wrong for sample in done) / run.seconds,
        detections_hz=sum(sample.detections for sample in done) / run.seconds,
        latency_ms=_spread([sample.latency_s * 1e3 for sample in good]),
        stage_ms=_stages(good),
        errors=dict(Counter(f"{one.status} {one.error}" for one in run.samples if not one.ok).most_common()),
        wrong=sum(sample.wrong for sample in good),
        wrong_alone=sum(sample.wrong_alone for sample in good),
        changed=sum(sample.changed for sample in good),
        lost=sum(sample.lost for sample in good),
        rejected=sum(sample.rejected for sample in good),
        answered=len(good),
        offered=len(run.samples),
        stable=stable,
        why=why,
        passes=_passes(run.metrics),
        usage=run.usage,
        gpus=run.gpus,
        refused={"count": len(refused), **_percentiles([one.latency_s * 1e3 for one in refused], {"p99_ms": 99.0})},
        load_generator_cpu_s=run.load_generator_cpu_s,
        wrong_alone_named=run.wrong_alone,
        wrong_alone_share=run.wrong_alone_share,
    )


def steadiness(run: Run, done: Sequence[Sample], tolerance: float = TOLERANCE) -> tuple[bool, str]:
    """Return (True if the thirds of the measured part agree, their figures in words).

    Throughput and median latency of each third may differ from the whole by `tolerance`, and by the chance variation of
    so few answers. `done`: the answers to count. With fewer than five in a third nothing can be said, so it is not
    steady.
    """
    edges = np.linspace(run.begun, run.ended, _PARTS + 1)
    parts = [[one for one in done if low <= one.done < high] for low, high in itertools.pairwise(edges)]
    counts = np.array([len(part) for part in parts], dtype=np.float64)
    if counts.min() < _FEWEST:
        return False, f"too few answers to tell ({', '.join(f'{count:.0f}' for count in counts)} in its thirds)"
    medians = np.array([np.median([one.latency_s * 1e3 for one in part]) for part in parts])
    seconds = run.seconds / _PARTS
    rates = ", ".join(f"{count / seconds:.1f}" for count in counts)
    why = f"thirds: {rates} requests/s; median {', '.join(f'{median:.0f}' for median in medians)} ms"
    middle = float(np.median([one.latency_s * 1e3 for one in done]))
    # The standard error of a median is about 1.25 standard deviations over the root of the count. The standard
    # deviation is estimated as the quartile distance over 1.35, inside the thirds: a trend must not excuse itself.
    quartiles = np.array([np.percentile([one.latency_s * 1e3 for one in part], (25, 75)) for part in parts])
    chance_ms = _CHANCE * 1.25 * float(np.diff(quartiles).mean()) / 1.35 / np.sqrt(counts.min())
    chance = _CHANCE * np.sqrt(counts.mean())
    if run.mode == "closed":  # no random arrivals: an answer is early or late by a turn of the clients
        chance = min(chance, run.clients)
    even = np.abs(counts - counts.mean()).max() <= tolerance * counts.mean() + chance
    level = np.abs(medians - middle).max() <= tolerance * middle + chance_ms
    return bool(even and level), why


def stage_times(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Return the milliseconds of answered requests in each of STAGES and OUTSIDE; unreported ones are left out."""
    timed = [sample for sample in samples if sample.stage_ms]
    by_stage = {stage: [sample.stage_ms[stage] for sample in timed if stage in sample.stage_ms] for stage in STAGES}
    by_stage[OUTSIDE] = [
        max(0.0, sample.latency_s * 1e3 - sum(sample.stage_ms.values()))
        for sample in timed
        if "gateway" in sample.stage_ms
    ]
    return {stage: values for stage, values in by_stage.items() if values}


def _stages(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    wanted = {name: _PERCENTILES[name] for name in ("p50", "p90", "p99")}
    return {stage: _percentiles(values, wanted) for stage, values in stage_times(samples).items()}


def _passes(metrics: dict[str, float]) -> dict[str, float]:
    """Return the number of passes, and how requests shared them."""
    count = family(metrics, "pose_pass_detections_count")
    if not count:
        return {}
    detections = family(metrics, "pose_pass_detections_sum") or 0.0
    requests = family(metrics, "pose_pass_requests_sum") or 0.0
    return {"count": count, "detections": detections / count, "requests": requests / count}


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {**_percentiles(values, _PERCENTILES), "max": max(values), "mean": float(np.mean(values))}


def _percentiles(values: Sequence[float], wanted: dict[str, float]) -> dict[str, float]:
    """Return the named percentiles, each an observed value (the next higher one); empty without values."""
    if not values:
        return {}
    found = np.percentile(values, list(wanted.values()), method="higher")
    return dict(zip(wanted, map(float, found), strict=True))
