"""The fairness benchmark: the figures of its rounds."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.service.fairness import COLUMNS, rows
from pem.bench.sample import Run, Sample


def run(latencies_s: list[float], *, poses: int = 1, seconds: float = 10.0) -> Run:
    samples = [
        Sample(
            question="q", client=0, due=1.0, sent=1.0, done=1.0 + latency_s, status=200, detections=poses, poses=poses
        )
        for latency_s in latencies_s
    ]
    return Run(mode="closed", clients=1, rate_hz=None, begun=0.0, ended=seconds, samples=samples)


def lines(found: dict[str, list[list[Run]]]) -> list[dict[str, Any]]:
    return [dict(zip(COLUMNS[1:], row, strict=True)) for row in rows(found)]


def test_the_client_is_held_against_itself_alone_over_all_rounds() -> None:
    alone, beside = lines(
        {
            "alone": [[run([0.1] * 4)], [run([0.1] * 6)]],
            "beside": [
                [run([0.4] * 3), run([1.0] * 2, poses=40, seconds=20.0)],
                [run([0.2, 0.8]), run([1.0] * 4, poses=40, seconds=20.0)],
            ],
        }
    )
    assert (alone["p50 ms"], alone["p50 / alone"], alone["requests"]) == (pytest.approx(100.0), 1.0, 10)
    assert alone["its poses/s"] == pytest.approx(10 / 20)
    assert alone["the others' poses/s"] == 0.0
    assert (beside["p50 ms"], beside["p99 ms"]) == (pytest.approx(400.0), pytest.approx(800.0))
    assert (beside["lowest"], beside["highest"]) == (pytest.approx(400.0), pytest.approx(800.0))
    assert beside["p50 / alone"] == pytest.approx(4.0)
    assert beside["the others' poses/s"] == pytest.approx(6 * 40 / 40)
    assert beside["requests"] == 5
