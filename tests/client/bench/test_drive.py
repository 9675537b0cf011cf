"""Closed and open loops against a server that answers as a test says."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pem.bench import drive
from pem.bench.judge import Judge
from pem.bench.result import summarise
from pem.bench.sample import Run, Target
from tests.client.bench.pose_fake import PoseFake, Reply, answer, pose, question

BUSY = (429, {"Retry-After": "1"}, {"success": False, "error": {"code": "over_capacity", "detail": "later"}})


def right(number: int, body: bytes) -> Reply:
    return 200, {}, answer(pose())


def closed(target: Target, *, clients: int = 2, seconds: float = 0.6, **how: Any) -> Run:
    questions = how.pop("questions", [question(pose())])
    how.setdefault("warmup_s", 0.1)
    return asyncio.run(drive.closed_loop(target, questions, clients=clients, seconds=seconds, **how))


def opened(target: Target, *, rate_hz: float, seconds: float = 1.0, **how: Any) -> Run:
    how.setdefault("warmup_s", 0.1)
    return asyncio.run(drive.open_loop(target, [question(pose())], rate_hz=rate_hz, seconds=seconds, **how))


def test_every_client_has_one_request_open_at_a_time():
    most: list[int] = []
    lock = threading.Lock()
    inside = 0

    def slow(number: int, body: bytes) -> Reply:
        nonlocal inside
        with lock:
            inside += 1
            most.append(inside)
        time.sleep(0.01)
        with lock:
            inside -= 1
        return right(number, body)

    with PoseFake(slow) as fake:
        run = closed(fake.target, clients=3)
    assert max(most) == 3
    assert {sample.client for sample in run.samples} == {0, 1, 2}
    assert all(sample.ok and sample.due == sample.sent for sample in run.samples)
    assert all(run.begun <= sample.done < run.ended for sample in run.samples)
    assert (run.mode, run.clients, run.rate_hz) == ("closed", 3, None)


def test_the_warm_up_is_not_counted():
    begun = time.monotonic()

    def cold(number: int, body: bytes) -> Reply:
        return right(number, body) if number == 0 or time.monotonic() - begun > 0.5 else (500, {}, {})

    with PoseFake(cold) as fake:
        run = closed(fake.target, warmup_s=0.8, seconds=0.3)
    assert len(fake.asked) > len(run.samples) + 10
    assert all(sample.ok for sample in run.samples)


def test_each_question_is_asked_alone_once_however_many_runs_there_are():
    questions = [question(pose(), body=b"%d" % index) for index in range(3)]
    judge = Judge(questions)
    bodies: list[bytes] = []

    def note(number: int, body: bytes) -> Reply:
        bodies.append(body)
        return right(number, body)

    with PoseFake(note) as fake:
        closed(fake.target, questions=questions, judge=judge, seconds=0.2)
        alone = bodies[:3]
        assert judge.knows_alone
        closed(fake.target, questions=questions, judge=judge, seconds=0.2)
    assert alone == [b"0", b"1", b"2"]
    counts = [bodies.count(b"%d" % index) for index in range(3)]
    assert max(counts) - min(counts) <= 4 * 2  # clients go through all of them


def test_what_load_makes_wrong_is_wrong_and_what_is_wrong_alone_is_not():
    questions = [question(pose(), pose(50))]

    def spoilt(number: int, body: bytes) -> Reply:
        return 200, {}, answer(pose(0 if number == 0 or number % 2 else 30), pose(90))

    with PoseFake(spoilt) as fake:
        run = closed(fake.target, questions=questions)
    assert {sample.wrong for sample in run.samples} == {0, 1}
    assert {sample.wrong_alone for sample in run.samples} == {1}
    assert len(run.wrong_alone) == 1
    assert run.wrong_alone_share == 0.5
    result = summarise(run)
    assert result.wrong == result.changed > 0
    assert "poses are wrong under load" in str(result.fault)


def test_a_client_that_is_told_to_come_back_later_does():
    with PoseFake(lambda number, body: right(number, body) if number == 0 else BUSY) as fake:
        run = closed(fake.target, clients=2, warmup_s=0.0, seconds=1.5)
    assert 2 <= len(run.samples) <= 6  # each waits its second
    assert {(sample.status, sample.error, sample.retry_after_s) for sample in run.samples} == {
        (429, "over_capacity", 1.0)
    }


def test_a_client_that_is_told_to_wait_long_waits_no_longer_than_it_is_patient(monkeypatch):
    monkeypatch.setattr(drive, "_LONGEST_WAIT_S", 0.2)
    long = (503, {"Retry-After": "3600"}, {"error": {"code": "not_ready", "detail": "later"}})
    with PoseFake(lambda number, body: right(number, body) if number == 0 else long) as fake:
        run = closed(fake.target, clients=1, warmup_s=0.0, seconds=2.0)
    assert 2 <= len(run.samples) <= 11, "2 s at one in 0.2 s, the first at once"
    assert {sample.error for sample in run.samples} == {"not_ready"}
    waited = [later.sent - before.done for before, later in itertools.pairwise(run.samples)]
    assert min(waited) >= 0.19


def test_an_answer_that_cannot_be_read_is_an_error():
    with PoseFake(lambda number, body: (200, {}, answer(pose()) if number == 0 else {"ok": True})) as fake:
        run = closed(fake.target, seconds=0.3)
    assert {(sample.status, sample.error) for sample in run.samples} == {(0, "unreadable")}


def test_a_server_that_goes_away_is_an_error_and_no_busy_loop():
    with PoseFake(right) as fake:
        judge = Judge([question(pose())])
        closed(fake.target, judge=judge, seconds=0.2)
        target = fake.target
    run = closed(target, judge=judge, clients=2, seconds=0.5)
    assert {(sample.status, sample.error) for sample in run.samples} == {(0, "refused")}
    assert len(run.samples) <= 2 * 6


def test_a_server_that_refuses_even_alone_is_not_loaded():
    unknown = (404, {}, {"error": {"code": "unknown_object", "detail": "no object part"}})
    with (
        PoseFake(lambda number, body: unknown) as fake,
        pytest.raises(drive.CannotBegin, match=r"404 unknown_object.*no object part"),
    ):
        closed(fake.target)
    assert len(fake.asked) == 1


def test_the_load_of_a_server_with_keys_carries_one():
    with PoseFake(right) as fake:
        closed(Target(url=fake.target.url, api_key="secret"), seconds=0.2)
    assert {headers["Authorization"] for _, headers in fake.asked} == {"Bearer secret"}


def test_arrivals_of_an_open_loop_are_a_poisson_process():
    with PoseFake(right) as fake:
        run = opened(fake.target, rate_hz=100, seconds=3.0, seed=3)
    due = np.array(sorted(sample.due for sample in run.samples))
    gaps = np.diff(due)
    assert len(due) == pytest.approx(300, abs=70)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.2)  # 0 for a clock, 1 for chance
    assert all(run.begun <= one < run.ended for one in due)
    assert run.rate_hz == 100


def serial(seconds: float) -> Callable[[int, bytes], Reply]:
    """Return the reply function of a server that works on one request at a time."""
    one_at_a_time = threading.Lock()

    def reply(number: int, body: bytes) -> Reply:
        with one_at_a_time:
            time.sleep(seconds)
        return right(number, body)

    return reply


def test_an_open_loop_shows_the_queue_that_a_closed_one_hides():
    with PoseFake(serial(0.05)) as fake:
        alone = closed(fake.target, clients=1, seconds=1.0)
    with PoseFake(serial(0.05)) as fake:
        run = opened(fake.target, rate_hz=40, seconds=1.5)
    many = summarise(run)
    assert many.latency_ms["p99"] > 800  # twice as many come as are done: after 1.5 s the queue is over half a second
    assert min(sample.latency_s for sample in alone.samples) < 0.4  # whoever waits for the last answer sees no queue
    assert many.requests_hz <= 21
    assert many.answered == many.offered  # those left at the end were waited for
    assert run.clients > 10


def test_what_an_open_loop_sends_late_was_due_all_the_same(monkeypatch):
    monkeypatch.setattr(drive, "_MOST_OPEN", 1)
    with PoseFake(serial(0.05)) as fake:
        run = opened(fake.target, rate_hz=40, seconds=1.0)
    late = [sample.sent - sample.due for sample in run.samples]
    assert max(late) > 0.4
    assert max(sample.latency_s for sample in run.samples) > 0.4


def test_requests_that_never_got_away_are_counted():
    with PoseFake(serial(0.4)) as fake, pytest.MonkeyPatch.context() as patch:
        patch.setattr(drive, "_MOST_OPEN", 1)
        run = opened(fake.target, rate_hz=30, seconds=0.5, timeout_s=0.9)
    assert "never_sent" in {sample.error for sample in run.samples}
    assert len(run.samples) > 5


def test_what_is_still_open_when_nobody_waits_any_longer_is_an_error_of_its_own(monkeypatch):
    monkeypatch.setattr(drive, "_MOST_OPEN", 3)
    monkeypatch.setattr(drive, "_GRACE_S", -29.8)  # so that the test need not wait for the time-out of 30 s either
    measured, enough = threading.Event(), threading.Event()

    def reply(number: int, body: bytes) -> Reply:
        if measured.is_set():
            enough.wait(20)
        return right(number, body)

    def page() -> str:
        measured.set()  # it is read where the measured part begins
        return ""

    with PoseFake(reply, page) as fake:
        run = opened(fake.target, rate_hz=40, seconds=0.8, timeout_s=30.0)
        enough.set()
    errors = [sample.error for sample in run.samples if not sample.ok]
    assert set(errors) == {"cut_off", "never_sent"}
    assert 1 <= errors.count("cut_off") <= 3, "three may be open at a time"
    numbers = sorted(sample.client for sample in run.samples)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "every request that was due is there"
    assert f"{len(errors)} requests failed" in str(summarise(run).fault)


def test_a_request_of_a_closed_loop_that_fails_after_its_end_is_an_error():
    stuck = threading.Event()

    def reply(number: int, body: bytes) -> Reply:
        if number == 1:
            stuck.wait(20)
        return right(number, body)

    with PoseFake(reply) as fake:
        run = closed(fake.target, clients=2, warmup_s=0.0, seconds=0.5, timeout_s=3.0)
        stuck.set()
    assert [sample.error for sample in run.samples if not sample.ok] == ["timeout"]
    assert summarise(run).fault == "1 requests failed"


def test_a_refusal_in_messagepack_is_told_in_words():
    unknown = {"error": {"code": "invalid_request", "detail": "no such engine", "field": "engine"}}
    asked = dataclasses.replace(question(pose()), headers={"Accept": "application/msgpack"})
    words = r"was answered 422 invalid_request: no such engine \(field engine\)$"
    with PoseFake(lambda number, body: (422, {}, unknown)) as fake, pytest.raises(drive.CannotBegin, match=words):
        closed(fake.target, questions=[asked])


def test_progress_is_told_while_it_runs(monkeypatch):
    monkeypatch.setattr(drive, "_TELL_S", 0.05)
    told: list[drive.Progress] = []
    with PoseFake(right) as fake:
        run = closed(fake.target, warmup_s=0.6, seconds=1.2, on_progress=told.append)
    assert len(told) >= 4
    assert told[0].requests == 0
    left = [one.seconds_left for one in told]
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0.0
    assert 0 < told[-1].requests <= len(run.samples)
    assert told[-1].poses_hz > 0
    assert told[-1].errors == 0


def test_progress_is_told_while_the_last_answers_of_an_open_loop_are_waited_for(monkeypatch):
    monkeypatch.setattr(drive, "_TELL_S", 0.05)
    told: list[drive.Progress] = []
    with PoseFake(serial(0.1)) as fake:
        run = opened(fake.target, rate_hz=40, seconds=0.5, on_progress=told.append)
    waiting = [one for one in told if one.seconds_left == 0.0]
    assert len(waiting) > 3
    assert waiting[0].requests < waiting[-1].requests
    assert len(run.samples) <= waiting[-1].requests


def test_what_the_counters_of_metrics_grew_by_is_kept():
    asked = itertools.count(1)

    def page() -> str:
        scrape = next(asked)
        return (
            "# TYPE pose_pass_detections histogram\n"
            f'pose_pass_detections_bucket{{le="1"}} {scrape}\n'
            f"pose_pass_detections_sum {scrape * 60}\npose_pass_detections_count {scrape * 10}\n"
            f'pose_requests_total{{route="/x",code="200"}} {scrape}\npose_queue_detections 7\n'
        )

    with PoseFake(right, page) as fake:
        run = closed(fake.target, seconds=0.2)
    assert run.metrics == {
        "pose_pass_detections_sum": 60.0,
        "pose_pass_detections_count": 10.0,
        'pose_requests_total{route="/x",code="200"}': 1.0,
    }


def test_a_run_needs_clients_a_rate_time_and_questions():
    target = Target(url="http://127.0.0.1:9")
    with pytest.raises(ValueError, match="at least one client"):
        closed(target, clients=0)
    with pytest.raises(ValueError, match="rate above 0"):
        opened(target, rate_hz=0)
    with pytest.raises(ValueError, match="nothing to ask"):
        closed(target, questions=[])
    with pytest.raises(ValueError, match="made for other questions"):
        closed(target, judge=Judge([question(pose()), question(pose())]))
