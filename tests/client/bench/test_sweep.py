"""The sweep: the knee of made-up queues, and the figures of a run of an open loop."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from pem.bench import drive
from pem.bench import sweep as sweeping
from pem.bench.mix import Load
from pem.bench.sample import Question, Run, Sample, Target
from pem.bench.sweep import STEPS, Point, Sweep, answered_hz, knee, measured, percentiles, step_seconds, sweep
from tests.benchmarks.service.queue_server import queue_server

SERVICE_HZ = 40.0
LOAD = Load(
    questions=[Question(name="any", body=b"{}", content_type="application/json", truths=())],
    objects={},
)


def point(offered_hz: float, p99_ms: float | None = 100.0, answered_hz: float | None = None) -> Point:
    """Make a step at which every percentile is the same."""
    return Point(
        offered_hz=offered_hz,
        answered_hz=offered_hz if answered_hz is None else answered_hz,
        latency_ms={} if p99_ms is None else dict.fromkeys(("p50", "p90", "p99"), p99_ms),
        seconds=20.0,
        requests=500,
        refused=0,
        failed=0,
        wrong=0,
    )


def curve(kind: str, noise: float, seed: int, steps: tuple[float, ...] = STEPS) -> list[Point]:
    """Make the steps of a server with one worker and Poisson arrivals: M/M/1 or M/D/1, with noise in every latency."""
    rng = random.Random(seed)
    found = []
    for rho in steps:
        if rho >= 1:
            found.append(point(rho * SERVICE_HZ, 20_000.0, SERVICE_HZ))
            continue
        waited_s = rho / (1 - rho) / SERVICE_HZ / (1 if kind == "M/M/1" else 2)
        # the tail of M/M/1 is exponential; that of M/D/1's waiting nearly so
        p99_s = 4.6 * (waited_s + 1 / SERVICE_HZ) if kind == "M/M/1" else 1 / SERVICE_HZ + 4.6 * waited_s
        found.append(point(rho * SERVICE_HZ, 1e3 * p99_s * rng.uniform(1 - noise, 1 + noise)))
    return found


@pytest.mark.parametrize("kind, least, most", [("M/M/1", 0.5, 0.65), ("M/D/1", 0.5, 0.65)])
def test_the_knee_of_a_queue_is_where_theory_has_it_also_with_noise(kind: str, least: float, most: float) -> None:
    for seed in range(100):
        found = knee(curve(kind, 0.05, seed))
        assert found is not None
        assert least <= found.offered_hz / SERVICE_HZ <= most


def test_the_knee_comes_nearer_to_the_theory_the_finer_the_steps() -> None:
    steps = tuple(step / 100 for step in range(5, 130, 2))
    found = knee(curve("M/M/1", 0.0, 0, steps))
    assert found is not None
    assert found.offered_hz / SERVICE_HZ == pytest.approx(0.5 + 0.1**0.5 / 2, abs=0.02)  # 4 rho (1 - rho) >= 0.9


def test_a_server_that_is_as_fast_under_load_as_alone_has_its_knee_where_it_stops_keeping_up() -> None:
    flat = [point(step * SERVICE_HZ, 100.0, min(step, 1.0) * SERVICE_HZ) for step in STEPS]
    found = knee(flat)
    assert found is not None
    assert found.offered_hz == SERVICE_HZ


def test_a_step_after_one_that_the_server_did_not_keep_up_with_is_no_knee() -> None:
    lucky = [point(10.0), point(20.0, answered_hz=15.0), point(30.0)]
    assert knee(lucky) is lucky[0]


def test_a_server_that_keeps_up_with_nothing_has_no_knee() -> None:
    assert knee([point(10.0, answered_hz=9.0), point(20.0, p99_ms=None, answered_hz=0.0)]) is None
    assert knee([]) is None


def test_steps_without_a_p99_are_compared_by_p90() -> None:
    few = dataclasses.replace(point(5.0), latency_ms={"p50": 20.0, "p90": 30.0})
    slow = dataclasses.replace(point(10.0), latency_ms={"p50": 20.0, "p90": 90.0, "p99": 100.0})
    found = knee([few, slow])
    assert found is few, "5 a second at 30 ms is more than 10 at 90 ms"
    assert found.tail == "p90"
    assert knee([dataclasses.replace(few, latency_ms={**few.latency_ms, "p99": 80.0}), slow]) is slow


def run_of(served_s: float, rate_hz: float, seconds: float, most_waiting: int = 10**9) -> Run:
    """Make a run of evenly spaced requests to a worker with a fixed time each; it refuses more than may wait."""
    samples, free = [], 0.0
    for number in range(round(rate_hz * seconds)):
        due = number / rate_hz
        refused = (free - due) / served_s > most_waiting
        free = free if refused else max(free, due) + served_s
        done, status = (due + 0.001, 429) if refused else (free, 200)
        samples.append(Sample(question="", client=0, due=due, sent=due, done=done, status=status))
    return Run(mode="open", clients=1, rate_hz=rate_hz, begun=0.0, ended=seconds, samples=samples)


def test_a_server_that_keeps_up_answers_what_is_offered_however_slow_it_is() -> None:
    kept_up = measured(run_of(served_s=0.099, rate_hz=10.0, seconds=20.0))
    assert kept_up.answered_hz == pytest.approx(10.0)
    assert kept_up.keeps_up
    assert kept_up.latency_ms["p99"] == pytest.approx(99.0)


def test_a_server_that_falls_behind_does_not_keep_up_although_it_answers_everything_in_the_end() -> None:
    behind = measured(run_of(served_s=0.125, rate_hz=10.0, seconds=20.0))
    assert behind.failed == behind.refused == 0
    assert behind.answered_hz == pytest.approx(8.0, rel=0.02)
    assert not behind.keeps_up


def test_a_single_slow_answer_is_no_queue() -> None:
    run = run_of(served_s=0.05, rate_hz=2.0, seconds=8.0)
    late = dataclasses.replace(run.samples[14], done=run.samples[14].done + 3.0)
    run = dataclasses.replace(run, samples=[*run.samples[:14], late, run.samples[15]])
    assert measured(run).answered_hz == pytest.approx(2.0)


def test_a_server_that_refuses_what_it_cannot_do_answers_as_much_as_it_can() -> None:
    run = run_of(served_s=0.125, rate_hz=24.0, seconds=60.0, most_waiting=4)
    assert answered_hz(run) == pytest.approx(8.0, rel=0.03)
    assert measured(run).refused > 900


def test_what_was_not_answered_has_no_latency_and_does_not_break_the_table() -> None:
    lost = Sample(question="", client=0, due=0.0, sent=0.0, done=60.0, status=0, error="timeout")
    run = Run(mode="open", clients=1, rate_hz=1.0, begun=0.0, ended=1.0, samples=[lost])
    found = measured(run)
    assert (found.answered_hz, found.latency_ms, found.failed, found.power("p90")) == (0.0, {}, 1, 0.0)
    swept = Sweep(points=[found], knee=None)
    row = swept.table().as_dicts()[0]
    assert (row["failed"], row["p99 ms"], row["knee"]) == (1, None, "")
    assert (swept.as_dict()["points"][0]["latency_ms"], swept.as_dict()["knee_hz"]) == ({}, None)
    swept.table().print()


@pytest.mark.parametrize("requests, known", [(99, False), (100, True)])
def test_fewer_than_a_hundred_answers_have_no_99th_percentile(requests: int, known: bool) -> None:
    found = measured(run_of(served_s=0.01, rate_hz=10.0, seconds=requests / 10))
    assert found.requests == requests
    assert set(found.latency_ms) == ({"p50", "p90", "p99"} if known else {"p50", "p90"})
    assert found.tail == ("p99" if known else "p90")


def test_a_step_lasts_until_it_can_have_a_hundred_answers_or_forty_seconds() -> None:
    assert step_seconds(100.0, 12.0) == 12.0
    assert step_seconds(6.5, 12.0) == 20.0, "130 requests: a hundred come nearly for sure"
    assert step_seconds(0.5, 12.0) == 40.0
    assert step_seconds(0.5, 60.0) == 60.0


@pytest.mark.parametrize("what, words", [("wrong", "wrong under load"), ("changed", "others"), ("lost", "lost")])
def test_rows_that_load_makes_others_are_a_fault_of_their_step(what: str, words: str) -> None:
    run = run_of(served_s=0.01, rate_hz=10.0, seconds=20.0)
    bad = dataclasses.replace(run.samples[7], **{what: 1})
    found = measured(dataclasses.replace(run, samples=[bad, *run.samples[:7], *run.samples[8:]]))
    (fault,) = Sweep(points=[found], knee=None).faults
    assert fault.startswith("10 requests/s: 1 ")
    assert words in fault
    assert Sweep(points=[measured(run)], knee=None).faults == []


def test_a_step_tells_all_that_a_single_run_does() -> None:
    point = Sweep(points=[measured(run_of(served_s=0.01, rate_hz=10.0, seconds=20.0))], knee=None).as_dict()["points"][
        0
    ]
    assert set(point["run"]["latency_ms"]) >= {"p50", "p99", "p999"}
    assert {"stage_ms", "usage", "passes", "errors", "load_generator_cpu_s"} <= set(point["run"])


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(1, 102)]
    assert percentiles(values, {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}) == {"p50": 51.0, "p99": 100.0, "p99.9": 101.0}
    assert percentiles([1.0, 2.0], {"p50": 0.5}) == {"p50": 2.0}
    assert percentiles([7.0], {"p50": 0.5, "p99": 0.99}) == {"p50": 7.0, "p99": 7.0}


def test_without_rates_parts_of_the_closed_loops_throughput_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def closed_loop(*_: Any, clients: int, seconds: float, timeout_s: float, **__: Any) -> Run:
        assert (clients, timeout_s) == (8, 7.0)
        samples = [Sample(question="", client=0, due=0.0, sent=0.0, done=1.0, status=200)] * round(20 * seconds)
        return Run(mode="closed", clients=8, rate_hz=None, begun=0.0, ended=seconds, samples=samples)

    async def open_loop(*_: Any, rate_hz: float, seconds: float, timeout_s: float, **__: Any) -> Run:
        assert timeout_s == 7.0
        return run_of(served_s=0.05, rate_hz=rate_hz, seconds=seconds)

    monkeypatch.setattr(drive, "closed_loop", closed_loop)
    monkeypatch.setattr(drive, "open_loop", open_loop)
    heard: list[str] = []
    found = sweep(Target(url="http://127.0.0.1:1"), LOAD, rates=None, seconds=60.0, timeout_s=7.0, tell=heard.append)
    assert found.closed_loop_hz == 20.0
    assert [point.offered_hz for point in found.points] == pytest.approx([20 * step for step in STEPS], rel=0.01)
    assert found.knee is not None
    assert found.knee.offered_hz == pytest.approx(20.0, rel=0.01), "arrivals at even distances never wait before that"
    assert found.as_dict()["knee_hz"] == found.knee.offered_hz
    assert len(heard) == 2 + len(STEPS)


@pytest.mark.parametrize("rates", [[], [0.0, 1.0], [-1.0]])
def test_rates_that_are_not_positive_are_refused(rates: list[float]) -> None:
    with pytest.raises(ValueError, match="rates must be positive"):
        sweep(Target(url="http://127.0.0.1:1"), LOAD, rates=rates, seconds=1.0, tell=print)


@pytest.mark.slow
def test_a_really_running_queue_keeps_up_below_its_rate_and_not_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "LONGEST_S", 2.0)
    told: list[str] = []
    for _ in range(5):  # a machine that stalls may spoil a try: the queue keeps up, its host does not
        with queue_server(0.02) as target:
            found = sweep(
                target,
                LOAD,
                rates=[75.0, 8.0, 25.0],
                seconds=2.0,
                warmup_s=0.2,
                tell=lambda words: None,
                on_progress=lambda what, now: told.append(what),
            )
        offered = [point.offered_hz for point in found.points]
        assert offered == sorted(offered)
        assert not found.points[2].keeps_up
        assert found.points[2].answered_hz < 1.15 * 50.0
        assert found.points[0].latency_ms["p50"] >= 20.0
        assert found.faults == []
        if [point.keeps_up for point in found.points] == [True, True, False] and found.points[2].answered_hz > 40.0:
            break
    else:
        pytest.fail(f"in five tries it never kept up with what it can do: {found.as_dict()}")
    assert found.knee in found.points[:2]
    assert set(told) == {"8 requests/s", "25 requests/s", "75 requests/s"}
