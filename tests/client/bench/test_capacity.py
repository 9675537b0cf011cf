"""The capacity answer: promises as users write them, and the search on servers of known capacity."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pem.bench import drive
from pem.bench.capacity import Capacity, Slo, find
from pem.bench.mix import Load
from pem.bench.sample import Question, Run, Sample, Target, Truth, Usage
from posekit.engine import Symmetries
from tests.benchmarks.service.queue_server import queue_server

HEARD: list[str] = []
LOAD = Load(
    questions=[
        Question(
            name="two masks",
            body=b"{}",
            content_type="application/json",
            truths=(Truth(object_name="cube", T_cam_obj=None, symmetries=Symmetries()),) * 2,
        )
    ],
    objects={},
)
TARGET = Target(url="http://127.0.0.1:1")


# ------------------------------------------------------------------------------------------------------------- promises


def test_a_promise_is_read_as_it_is_written() -> None:
    slo = Slo.parse("p50=80ms, p99=0.5s,p99.9=2s")
    assert slo.limits_ms == {"p50": 80.0, "p99": 500.0, "p99.9": 2000.0}
    assert slo.shares == pytest.approx({"p50": 0.5, "p99": 0.99, "p99.9": 0.999})
    assert str(slo) == "p50 under 80 ms and p99 under 500 ms and p99.9 under 2000 ms"


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "'' is no limit; write p99=500ms"),
        ("p99", "'p99' is no limit"),
        ("p99=500", "'p99=500' is no limit"),
        ("p99=500min", "is no limit"),
        ("p100=1s", "'p100=1s' is no limit"),
        ("p99=-1s", "is no limit"),
        ("mean=1s", "is no limit"),
        ("p99=1s,", "'' is no limit"),
        ("p0=1s", "p0 is no limit"),
        ("p99=0ms", "p99 cannot be within 0 ms"),
        ("p99=1s,p99=2s", "p99 is limited twice"),
    ],
)
def test_what_is_no_promise_is_refused_with_the_reason(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Slo.parse(text)


def test_a_broken_promise_says_by_how_much() -> None:
    slo = Slo.parse("p50=80ms,p99=500ms")
    assert slo.broken({"p50": 80.0, "p99": 500.0}) == ""
    assert slo.broken({"p50": 20.0, "p99": 501.0}) == "p99 is 501 ms, over 500 ms"


# ---------------------------------------------------------------------------------------------------- simulated servers


class Simulated:
    """M/D/1 in place of the loops: each request takes `served_s` of one worker."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, served_s: float) -> None:
        self.served_s = served_s
        self.wrong_at_hz = float("inf")  # from here on one pose is wrong
        self.refused_at_hz = float("inf")  # from here on one request is refused
        self.halting_at_hz = float(
            "inf"
        )  # from here on two requests in a hundred are in the pose stage for half a second
        self.slow_from_s = float("inf")  # trials at least so long take a quarter longer for each
        monkeypatch.setattr(drive, "closed_loop", self.closed_loop)
        monkeypatch.setattr(drive, "open_loop", self.open_loop)

    async def closed_loop(self, *_: object, clients: int, seconds: float, **__: object) -> Run:
        assert clients == 1
        count = int(seconds / self.served_s)
        return self._run([number * self.served_s for number in range(count)], seconds, None, self.served_s)

    async def open_loop(self, *_: object, rate_hz: float, seconds: float, seed: int, **__: object) -> Run:
        rng = np.random.default_rng(seed)
        due = np.cumsum(rng.exponential(1 / rate_hz, round(2 * rate_hz * seconds) + 10))
        served_s = self.served_s * (1.25 if seconds >= self.slow_from_s else 1)
        return self._run([float(moment) for moment in due if moment < seconds], seconds, rate_hz, served_s)

    def _run(self, due: list[float], seconds: float, rate_hz: float | None, served_s: float) -> Run:
        samples, free = [], 0.0
        for number, moment in enumerate(due):
            halted_s = 0.5 if number % 50 == 9 and (rate_hz or 0.0) >= self.halting_at_hz else 0.0
            free = max(free, moment) + served_s
            waited_ms = 1e3 * (free - moment - served_s)
            refused = number == 0 and (rate_hz or 0.0) >= self.refused_at_hz
            samples.append(
                Sample(
                    question="",
                    client=0,
                    due=moment,
                    sent=moment,
                    done=free + halted_s,
                    status=429 if refused else 200,
                    error="over_capacity" if refused else "",
                    detections=2,
                    poses=2,
                    wrong=int(number == 0 and (rate_hz or 0.0) >= self.wrong_at_hz),
                    stage_ms={"queue": waited_ms, "pose": 1e3 * (served_s + halted_s)},
                )
            )
        busy_s = min(seconds, served_s * len(due))
        usage = [Usage(pid=1, name="pose", cpu_s=busy_s, rss_mb=1.0, rss_peak_mb=1.0)]
        mode = "open" if rate_hz else "closed"
        return Run(mode=mode, clients=1, rate_hz=rate_hz, begun=0.0, ended=seconds, samples=samples, usage=usage)


def theory_hz(served_s: float, limit_s: float, share: float = 0.99) -> float:
    """Return the rate at which this percentile of an M/D/1 queue's latency meets the limit, by Lindley's recursion."""
    rng = np.random.default_rng(0)
    between = rng.exponential(1.0, 100_000)
    low, high = 0.0, 1 / served_s
    for _ in range(12):
        rate_hz = (low + high) / 2
        steps = np.concatenate([[0.0], served_s - between[1:] / rate_hz])
        walk = np.cumsum(steps)
        waited_s = walk - np.minimum.accumulate(walk)
        fast = np.quantile(waited_s + served_s, share) <= limit_s
        low, high = (rate_hz, high) if fast else (low, rate_hz)
    return low


def found(slo: str = "p99=100ms", robots_hz: float = 0.5, seconds: float = 120.0) -> Capacity:
    HEARD.clear()
    return find(TARGET, LOAD, slo=Slo.parse(slo), robots_hz=robots_hz, tell=HEARD.append, seconds=seconds)


@pytest.mark.parametrize("robots_hz", [0.5, 4.0])
def test_the_robots_found_are_those_that_the_theory_of_queues_allows(
    monkeypatch: pytest.MonkeyPatch, robots_hz: float
) -> None:
    Simulated(monkeypatch, served_s=0.02)
    answer = found(robots_hz=robots_hz)
    allowed_hz = theory_hz(0.02, 0.1)
    assert answer.robots * robots_hz == pytest.approx(allowed_hz, abs=robots_hz + 0.1 * allowed_hz)
    assert answer.detections_hz == answer.robots * robots_hz * 2
    last = answer.trials[-1]
    assert last.held
    assert last.robots == answer.robots
    assert last.seconds == 360.0, "confirmed for longer"
    assert re.search(r"what grew most is queue \(by \d+ ms at p99\)", answer.limited_by)
    assert len(answer.trials) == len(HEARD) - 1
    assert str(answer).startswith(
        f"this machine carries {answer.robots} robots (each {robots_hz:g} requests a second with 2 masks: "
    )
    assert " detections a second) with p99 under 100 ms; " in str(answer)


def test_where_one_robot_is_too_many_the_answer_is_none_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    Simulated(monkeypatch, served_s=0.3)
    answer = found(slo="p50=100ms")
    assert answer.robots == 0
    assert answer.limited_by == "p50 is 300 ms, over 100 ms"
    assert str(answer).startswith("this machine carries 0 robots (each 0.5 requests a second with 2 masks) with p50")
    assert [trial.robots for trial in answer.trials] == [3, 1]


def test_a_number_that_does_not_hold_for_longer_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Simulated(monkeypatch, served_s=0.02)
    once = found().robots
    server.slow_from_s = 300.0
    lowered = found()
    assert lowered.robots * 0.5 == pytest.approx(theory_hz(0.025, 0.1), rel=0.15)
    assert lowered.robots < 0.8 * once
    assert lowered.trials[-1].held


def test_one_wrong_pose_is_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    Simulated(monkeypatch, served_s=0.02).wrong_at_hz = 10.0
    answer = found(robots_hz=1.0)
    assert answer.robots == 9
    assert answer.limited_by.startswith("10 are too many: 1 poses are wrong under load")
    assert answer.faults
    assert set(answer.faults) <= {f"{robots} robots: 1 poses are wrong under load" for robots in range(10, 100)}


def test_one_refused_request_is_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    Simulated(monkeypatch, served_s=0.02).refused_at_hz = 10.0
    answer = found(robots_hz=1.0)
    assert answer.robots == 9
    assert "requests were not answered: 1 with 429 over_capacity" in answer.limited_by
    assert answer.faults == [], "that is what the search looks for"


def test_the_stage_that_broke_the_promise_is_sought_at_the_promised_percentile(monkeypatch: pytest.MonkeyPatch) -> None:
    Simulated(monkeypatch, served_s=0.02).halting_at_hz = 10.0
    answer = found(slo="p50=90ms,p99=400ms", robots_hz=1.0)
    assert answer.robots == 9
    assert re.search(r"10 are too many: p99 is 5\d\d ms, over 400 ms", answer.limited_by)
    assert "; what grew most is pose (by 500 ms at p99)" in answer.limited_by, "at the median the queue has grown more"


def test_a_trial_has_a_hundred_requests_where_three_times_its_length_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    Simulated(monkeypatch, served_s=0.45)
    trials = found(slo="p99=2s", robots_hz=1.0, seconds=20.0).trials
    assert {trial.seconds for trial in trials if trial.robots == 1} == {60.0, 180.0}


def test_robots_that_never_ask_are_refused() -> None:
    with pytest.raises(ValueError, match="robots_hz must be positive"):
        found(robots_hz=0.0)


def test_the_table_shows_each_trial_with_its_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    Simulated(monkeypatch, served_s=0.02)
    answer = found(slo="p99=100ms,p99.9=1s")
    rows = answer.table().as_dicts()
    assert [row["robots"] for row in rows] == [trial.robots for trial in answer.trials]
    assert rows[-1]["verdict"] == "holds"
    assert rows[-1]["p99.9 ms"] <= 1000
    assert any("over 100 ms" in row["verdict"] for row in rows)
    assert answer.as_dict()["trials"][-1]["held"] is True


# ---------------------------------------------------------------------------------------------------- a real connection


@pytest.mark.slow
def test_a_really_running_queue_carries_about_what_the_theory_allows() -> None:
    slo = Slo.parse("p90=60ms")
    allowed = theory_hz(0.015, 0.06, 0.9) / 10.0
    told: list[str] = []
    for _ in range(5):  # a machine that stalls may spoil a try: it makes the answer smaller, never larger
        with queue_server(0.015) as target:
            answer = find(
                target,
                LOAD,
                slo=slo,
                robots_hz=10.0,
                tell=HEARD.append,
                seconds=1.0,
                warmup_s=0.2,
                on_progress=lambda what, now: told.append(what),
            )
        assert answer.robots <= 1.3 * allowed, answer.as_dict()
        if answer.robots >= 0.4 * allowed:
            break
    else:
        pytest.fail(f"in five tries it never carried what it can: {answer.as_dict()}")
    assert answer.trials[-1].held
    assert answer.trials[-1].stage_ms["pose"]["p50"] == pytest.approx(15.0)
    assert {"one client alone", f"{answer.robots} robots"} <= set(told)


def test_a_server_that_answers_nothing_carries_no_robot_and_its_words_say_why() -> None:
    with queue_server(0.001, broken=True) as target:
        answer = find(target, LOAD, slo=Slo.parse("p99=1s"), robots_hz=1.0, tell=HEARD.append, seconds=0.5)
    assert answer.robots == 0
    assert "answered 500" in answer.limited_by
    assert answer.trials == []


def test_the_words_of_one_robot_are_in_the_singular() -> None:
    one = Capacity(robots=1, robots_hz=2.0, masks=1.0, slo=Slo.parse("p99=1s"), limited_by="2 are too many", trials=[])
    assert str(one) == (
        "this machine carries 1 robot (each 2 requests a second with 1 mask: 2 detections a second) "
        "with p99 under 1000 ms; 2 are too many"
    )
