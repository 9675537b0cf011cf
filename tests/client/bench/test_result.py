"""The figures of runs with made-up samples, so that every figure is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from pem.bench.result import Result, summarise
from pem.bench.sample import Run, Sample


def sample(due: float, latency_s: float, *, status: int = 200, sent: float | None = None, **more: Any) -> Sample:
    figures = {"detections": 3, "poses": 3} if status == 200 else {}
    return Sample(
        question="3 masks",
        client=0,
        due=due,
        sent=due if sent is None else sent,
        done=due + latency_s,
        status=status,
        **{**figures, **more},
    )


def run(
    samples: Sequence[Sample], *, mode: Any = "closed", clients: int = 4, seconds: float = 30.0, **more: Any
) -> Run:
    rate_hz = None if mode == "closed" else 10.0
    samples = list(samples)
    return Run(mode=mode, clients=clients, rate_hz=rate_hz, begun=100.0, ended=100.0 + seconds, samples=samples, **more)


def even(per_second: int, latency_s: float = 0.1, seconds: int = 30) -> list[Sample]:
    """Make answers at regular intervals."""
    return [sample(100 + step / per_second - latency_s / 2, latency_s) for step in range(1, per_second * seconds)]


def test_percentiles_are_latencies_that_were_seen():
    latencies = np.random.default_rng(0).permutation(np.arange(1, 1001)) / 1000
    result = summarise(run([sample(100 + index / 100, latency) for index, latency in enumerate(latencies)]))
    wanted = {"p50": 501, "p90": 901, "p99": 991, "p999": 1000, "max": 1000, "mean": 500.5}
    assert result.latency_ms == pytest.approx(wanted)


def test_rates_are_a_second():
    result = summarise(run(even(10)))
    assert result.answered == result.offered == 299
    assert result.requests_hz == pytest.approx(299 / 30)
    assert result.poses_hz == result.detections_hz == pytest.approx(3 * 299 / 30)


def test_poses_that_load_makes_wrong_are_no_throughput():
    samples = [sample(100 + step, 0.1, poses=2, wrong=1, rejected=1) for step in range(30)]
    result = summarise(run(samples))
    assert (result.poses_hz, result.detections_hz) == pytest.approx((1.0, 3.0))
    assert (result.wrong, result.rejected) == (30, 30)
    assert result.fault == "30 poses are wrong under load"


def test_poses_that_load_loses_are_no_success():
    result = summarise(run([sample(100 + step, 0.1, poses=2, lost=1, rejected=1) for step in range(30)]))
    assert result.lost == 30
    assert result.fault == "30 poses are lost under load"
    assert result.wrongs == ["30 poses are lost under load"]


def test_latency_counts_from_when_a_request_was_due():
    waited = [sample(100 + step / 10, 2.0, sent=100 + step / 10 + 1.9) for step in range(200)]
    assert summarise(run(waited, mode="open")).latency_ms["p50"] == pytest.approx(2000)


def test_the_throughput_of_an_open_loop_is_what_was_done_in_the_measured_part():
    # A server that does 5 a second of 10 that come: what it does after the end is no throughput.
    done_at = [100 + (step + 1) / 5 for step in range(300)]
    due_at = [95 + step / 10 for step in range(300)]
    samples = [sample(due, done - due) for due, done in zip(due_at, done_at, strict=True)]
    measured = [one for one in samples if one.due >= 100]
    carried = [one for one in samples if one.due < 100]
    result = summarise(run(measured, mode="open", seconds=25.0, carried=carried))
    assert result.requests_hz == pytest.approx(5.0, rel=0.02)
    assert result.offered == 250
    assert result.latency_ms["max"] == pytest.approx((done_at[-1] - due_at[-1]) * 1e3)
    assert not result.stable


def test_an_even_run_is_steady():
    result = summarise(run(even(10)))
    assert result.stable, result.why
    assert result.why == "thirds: 9.9, 10.0, 10.0 requests/s; median 100, 100, 100 ms"


def test_a_run_that_gets_slower_is_not_steady():
    slower = [one for one in even(10) if one.done < 120 or round(one.done * 10) % 20 < 10]
    result = summarise(run(slower))
    assert not result.stable
    assert result.why.startswith("thirds: 9.9, 10.0, 5.0 requests/s")


def test_a_run_whose_latency_grows_is_not_steady():
    growing = [sample(100 + step / 10, 0.1 + step / 300) for step in range(290)]
    assert not summarise(run(growing)).stable


def test_a_few_answers_prove_nothing():
    result = summarise(run(even(1, seconds=14), seconds=30.0))
    assert not result.stable
    assert result.why == "too few answers to tell (9, 4, 0 in its thirds)"


def test_arrivals_by_chance_are_steady():
    rng = np.random.default_rng(1)
    steady = 0
    for _ in range(50):
        due = 100 + np.cumsum(rng.exponential(0.1, 280))
        steady += summarise(run([sample(one, rng.gamma(4, 0.03)) for one in due if one < 129], mode="open")).stable
    assert steady >= 48


def test_errors_are_counted_by_kind_and_a_429_is_no_failure():
    samples = [
        *even(10),
        *(sample(101, 0.02, status=429, error="over_capacity", retry_after_s=1.0) for _ in range(7)),
        sample(101, 0.05, status=429, error="over_capacity", retry_after_s=2.0),
        sample(101, 60.0, status=0, error="timeout"),
        sample(101, 0.1, status=503, error="not_ready", retry_after_s=2.0),
    ]
    result = summarise(run(samples))
    assert result.errors == {"429 over_capacity": 8, "0 timeout": 1, "503 not_ready": 1}
    assert result.failures == 2
    assert result.fault == "2 requests failed"
    assert result.refused == pytest.approx({"count": 9, "p99_ms": 100.0})
    assert result.latency_ms["max"] == pytest.approx(100)  # of the answered ones
    assert result.answered + sum(result.errors.values()) == result.offered


def test_nothing_answered_is_a_fault_and_no_crash():
    result = summarise(run([]))
    assert result.fault == "nothing was answered"
    assert result.latency_ms == {}
    assert result.stage_ms == {}
    assert summarise(run([sample(101, 0.01, status=429, error="over_capacity")])).fault == "nothing was answered"


def test_stages_are_told_apart_and_what_the_server_does_not_see_is_outside():
    stages = {"gateway": 5.0, "queue": 20.0, "decode": 10.0, "pose": 50.0, "respond": 1.0}
    result = summarise(run([sample(100 + step / 10, 0.1, stage_ms=stages) for step in range(100)]))
    assert {stage: figures["p50"] for stage, figures in result.stage_ms.items()} == pytest.approx(
        {**stages, "outside": 14.0}
    )
    assert set(result.stage_ms["pose"]) == {"p50", "p90", "p99"}


def test_passes_are_what_the_counters_grew_by():
    grown = {"pose_pass_detections_count": 20.0, "pose_pass_detections_sum": 90.0, "pose_pass_requests_sum": 30.0}
    assert summarise(run(even(10), metrics=grown)).passes == {"count": 20.0, "detections": 4.5, "requests": 1.5}
    assert summarise(run(even(10))).passes == {}


def test_a_result_goes_through_json():
    result = summarise(run(even(10), load_generator_cpu_s=0.5))
    tree = msgspec.json.decode(msgspec.json.encode(result.as_dict()))
    assert tree["load_generator_cpu_s"] == 0.5
    assert set(tree) == set(Result.__dataclass_fields__)
