"""A run in figures: how much, how fast, how right, and whether it was steady enough to be believed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from pem.bench.observe import family
from pem.bench.sample import STAGES, Gpu, Run, Sample, Usage

OUTSIDE: Final = "outside"  # a stage beside STAGES: what passes before the server has the body, and on the way back
TOLERANCE: Final = 0.15  # by how much a third of a steady run may differ from the whole
_PARTS: Final = 3
_FEWEST: Final = 5  # answers of a part; fewer tell nothing
_CHANCE: Final = 3.0  # standard deviations that are nobody's fault
_PERCENTILES: Final = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run comes to. Of an empty list of latencies there are no percentiles: the dictionaries are empty."""

    mode: str  # closed | open
    clients: int
    rate_hz: float | None
    seconds: float
    requests_hz: float  # answered with 200, a second
    poses_hz: float  # poses a second, without those that are wrong under load alone
    detections_hz: float  # rows a second, those without a pose among them
    latency_ms: dict[str, float]  # p50 p90 p99 p999 max mean, of the requests that were answered with 200
    stage_ms: dict[str, dict[str, float]]  # by STAGES and OUTSIDE: p50 p90 p99
    errors: dict[str, int]  # "status code-word" -> how many; 429s among them
    wrong: int  # poses that are not the known one, though they were when asked alone
    wrong_alone: int  # poses that are not the known one, with or without load
    changed: int  # rows that are others than when asked alone
    lost: int  # rows without a pose that have one, and not a wrong one, when asked alone
    rejected: int  # rows without a pose
    answered: int  # requests with 200
    offered: int  # requests altogether
    stable: bool
    why: str  # the figures that `stable` is about
    passes: dict[str, float]  # count, detections (of a pass), requests (of a pass); empty without /metrics
    usage: list[Usage]
    gpus: list[Gpu]
    refused: dict[str, float]  # the answers with Retry-After: count, p99_ms
    load_generator_cpu_s: float
    wrong_alone_named: list[str]  # the detections that are wrong without load, in words
    wrong_alone_share: float  # of all detections whose pose is known

    @property
    def failures(self) -> int:
        """Requests that ended in an error other than 429."""
        return sum(count for kind, count in self.errors.items() if not kind.startswith("429 "))

    @property
    def fault(self) -> str | None:
        """In words why the run is no success; None where every answer came and was right."""
        words = [f"{self.failures} requests failed"] if self.failures else []
        words += self.wrongs
        if not self.answered:
            words.append("nothing was answered")
        return "; ".join(words) or None

    @property
    def wrongs(self) -> list[str]:
        """What is not right in the answers that came, in words; empty where all were right."""
        return wrongs_in_words(self.wrong, self.changed, self.lost)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the keys are the fields' names."""
        return asdict(self)


def wrongs_in_words(wrong: int, changed: int, lost: int) -> list[str]:
    """What load made wrong of answers that came; what was not is left out."""
    counts = {
        "poses are wrong under load": wrong,
        "poses are lost under load": lost,
        "rows are others than when asked alone": changed,
    }
    return [f"{count} {what}" for what, count in counts.items() if count]


def summarise(run: Run) -> Result:
    """The figures of a run.

    In an open loop throughput counts what was done in the measured part and everything else what was due in it, so that
    neither a queue that is worked off afterwards nor one that was there before makes it look faster.
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
    """(whether the thirds of the measured part agree, their figures in words).

    Throughput and median latency of each third may differ from the whole by `tolerance`, and by what chance makes of so
    few answers. `done` are the answers to count; with fewer than five in a third nothing can be said, so it is not
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
    # The standard error of a median is about 1.25 deviations over the root of how many there are, and a deviation is
    # what lies between the quartiles over 1.35; taken inside the thirds, so that a trend does not excuse itself.
    quartiles = np.array([np.percentile([one.latency_s * 1e3 for one in part], (25, 75)) for part in parts])
    chance_ms = _CHANCE * 1.25 * float(np.diff(quartiles).mean()) / 1.35 / np.sqrt(counts.min())
    chance = _CHANCE * np.sqrt(counts.mean())
    if run.mode == "closed":  # nobody draws lots: an answer is early or late by a turn of the clients
        chance = min(chance, run.clients)
    even = np.abs(counts - counts.mean()).max() <= tolerance * counts.mean() + chance
    level = np.abs(medians - middle).max() <= tolerance * middle + chance_ms
    return bool(even and level), why


def stage_times(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Milliseconds that answered requests spent in each of STAGES and OUTSIDE; what nobody tells is left out."""
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
    """How many passes there were, and how they were shared."""
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
    """The named percentiles; each is a value that was seen (the next higher one), empty where there are none."""
    if not values:
        return {}
    found = np.percentile(values, list(wanted.values()), method="higher")
    return dict(zip(wanted, map(float, found), strict=True))
