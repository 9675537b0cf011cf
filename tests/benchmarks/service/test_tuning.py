"""The tuning benchmark: the figures of the rounds of each setting."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.service.trials import DEFAULTS
from benchmarks.service.tuning import Tried, table_of
from pem.bench.result import Result, summarise
from pem.bench.sample import Run, Sample, Usage


def result(answers: int, *, latency_s: float = 0.5, status: int = 200) -> Result:
    """Make ten seconds with this many answers of three detections, none of them with a pose."""
    sample = Sample(question="q", client=0, due=1.0, sent=1.0, done=1.0 + latency_s, status=status, detections=3)
    usage = [Usage(pid=1, name="pose", cpu_s=6.0, rss_mb=90.0, rss_peak_mb=100.0)]
    return summarise(
        Run(mode="closed", clients=1, rate_hz=None, begun=0.0, ended=10.0, samples=[sample] * answers, usage=usage)
    )


def test_each_setting_has_the_spread_of_its_rounds_and_what_it_rests_on() -> None:
    tried = {
        DEFAULTS: Tried(loaded=[result(10), result(20), result(12)], alone=[result(2), result(3), result(4)]),
        "other": Tried(loaded=[result(24)], alone=[result(1, latency_s=0.25)]),
    }
    usual, other = table_of(tried).as_dicts()
    assert [usual[name] for name in ("detections/s", "lowest", "highest", "vs.")] == pytest.approx([3.6, 3.0, 6.0, 1.0])
    assert (usual["requests"], usual["alone"], other["requests"], other["alone"]) == (42, 9, 24, 1)
    assert other["vs."] == pytest.approx(2.0)
    assert (other["p50 ms"], other["alone p50 ms"]) == (pytest.approx(500.0), pytest.approx(250.0))
    assert usual["CPU ms each"] == pytest.approx(6000 / 36)


def test_a_setting_that_answered_nothing_has_figures_that_are_none_and_says_why() -> None:
    tried = {DEFAULTS: Tried(loaded=[result(1)], alone=[result(1)])}
    tried["broken"] = Tried(loaded=[result(4, status=500)], alone=[result(0)])
    row = table_of(tried).as_dicts()[1]
    assert row["detections/s"] == row["requests"] == 0
    assert row["p50 ms"] != row["p50 ms"]  # not a number
    assert tried[DEFAULTS].faults == []
    assert tried["broken"].faults == ["4 requests failed; nothing was answered", "nothing was answered"]


def test_an_answer_that_was_wrong_in_one_round_is_told() -> None:
    wrong = dataclasses.replace(result(3), wrong=1)
    assert Tried(loaded=[result(3), wrong], alone=[result(1)]).faults == ["1 poses are wrong under load"]
