"""Processes that die: each is killed with SIGKILL under load, in a running server.

What must hold each time: no client sees a wrong answer, nothing hangs past its deadline, the service is ready again by
itself (for the gateway: after its restart), and no process is left behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running import Question, RunningServer, post, register, running, wait_until

pytestmark = pytest.mark.slow

DEADLINE_S = 120.0  # of a request; on a busy machine a backend takes most of a minute to start
CLIENTS = 3
LONGEST_S = 600.0  # of one test's load


@dataclass
class Load:
    """Clients that ask the same small question for a bounded time until told to stop; every answer is judged."""

    url: str
    tree: dict[str, Any]
    truth: list[dict[str, Any]]
    stop: threading.Event = field(default_factory=threading.Event)
    good: int = 0
    refused: int = 0
    cut: int = 0  # connections that the death of the gateway itself cut
    problems: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> Load:
        self.threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()
        return self

    def _ask(self) -> None:
        end = time.monotonic() + LONGEST_S
        while not self.stop.is_set() and time.monotonic() < end:
            begun = time.monotonic()
            try:
                answer = post(self.url, self.tree, timeout=DEADLINE_S + 10)
            except httpx.TransportError as error:
                self.cut += 1
                if isinstance(error, httpx.TimeoutException):
                    self.problems.append(f"no answer within {DEADLINE_S + 10} s")
                time.sleep(0.1)
                continue
            self.longest_s = max(self.longest_s, time.monotonic() - begun)
            self._judge(answer)

    def _judge(self, answer: httpx.Response) -> None:
        if answer.status_code == 200:
            self.good += 1
            if answer.json()["poses"] != self.truth:
                self.problems.append(f"a wrong answer: {answer.text[:500]}")
        elif answer.status_code in (429, 503):
            self.refused += 1
            if "retry-after" not in answer.headers:
                self.problems.append(f"{answer.status_code} without Retry-After: {answer.text[:300]}")
            time.sleep(min(float(answer.headers.get("retry-after", 1)), 2.0))
        else:
            self.problems.append(f"{answer.status_code}: {answer.text[:300]}")

    def end(self) -> None:
        """Stop the clients and fail on anything that should not have happened."""
        self.stop.set()
        for thread in self.threads:
            thread.join(DEADLINE_S + 15)
        assert not any(thread.is_alive() for thread in self.threads), "a client hangs"
        assert not self.problems, self.problems[:3]
        assert self.longest_s < DEADLINE_S + 5


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, question: Question) -> Iterator[RunningServer]:
    """Start a server that these tests may harm."""
    with RunningServer(tmp_path_factory.mktemp("faults") / "data", {"drain_s": 8}) as one:
        register(one.url, question.scene.instances[0].shape)
        yield one


@pytest.fixture
def load(target: RunningServer, question: Question) -> Iterator[Load]:
    """Run clients on the target; the right answer is known before."""
    target.wait_ready()
    tree = question.body(indices=[0], deadline_ms=int(DEADLINE_S * 1000))
    answer = post(target.url, tree)
    assert answer.status_code == 200, answer.text
    one = Load(target.url, tree, answer.json()["poses"])
    assert one.truth[0]["status"] == "ok"
    one.start()
    wait_until(lambda: one.good >= 2, 120, "the load to be answered")
    try:
        yield one
    finally:
        one.stop.set()
        for thread in one.threads:
            thread.join(DEADLINE_S + 15)


def answered_again(load: Load, seconds: float = 240.0, more: int = 3) -> None:
    """Wait until new right answers come."""
    before = load.good
    wait_until(lambda: load.good >= before + more, seconds, "right answers after the fault")


def semaphores(server: RunningServer) -> set[Path]:
    """Return the files in shared memory through which the server's processes coordinate."""
    found: set[Path] = set()
    for pid in server.descendants():
        with contextlib.suppress(OSError):  # it has just ended
            maps = Path(f"/proc/{pid}/maps").read_text()
            found |= {Path(path) for path in re.findall(r"/dev/shm/sem\.\S+", maps)}
    return found


@pytest.mark.parametrize("stage", ["pose", "decode", "respond"])
def test_a_killed_worker_is_replaced_and_its_requests_are_sent_again(
    target: RunningServer, load: Load, stage: str
) -> None:
    for victim in target.workers(stage):
        os.kill(victim.pid, signal.SIGKILL)
    answered_again(load)
    load.end()
    assert load.refused == 0, "a lost worker's requests are sent again, not refused"
    assert target.process is not None
    assert target.process.poll() is None


def test_a_killed_mosec_process_takes_nothing_with_it(target: RunningServer, load: Load) -> None:
    before, shared = set(target.descendants()), semaphores(target)
    assert shared
    (main,) = target.children()
    os.kill(main, signal.SIGKILL)
    wait_until(lambda: not any(running(pid) for pid in before), 30, "the old backend's processes to be gone")
    wait_until(lambda: not any(path.exists() for path in shared), 30, "what they shared to be gone from shared memory")
    answered_again(load)
    load.end()
    target.wait_ready()


def test_the_gateway_leaves_no_process_behind_and_a_new_one_takes_over(target: RunningServer, load: Load) -> None:
    orphans = target.descendants()
    assert len(orphans) > 5
    old_run_dir = target.run_dir
    target.kill()
    wait_until(lambda: not any(running(pid) for pid in orphans), 30, "the gateway's processes to be gone")
    target.start()
    assert not old_run_dir.exists(), "the new gateway sweeps what the old one left in shared memory"
    answered_again(load)
    load.end()


def test_a_worker_stuck_in_native_code_does_not_hold_up_the_stop(
    start_server: Callable[..., RunningServer], question: Question
) -> None:
    drain_s = 6.0
    server = start_server(drain_s=drain_s)
    register(server.url, question.scene.instances[0].shape)
    for pose in server.workers("pose"):  # whichever of them gets the request
        os.kill(pose.pid, signal.SIGSTOP)  # as deaf as a process inside a long native call
    results: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: results.append(post(server.url, question.body(indices=[0]))), daemon=True)
    thread.start()
    server.wait_for_queue(requests=1)
    everything, shared = server.descendants(), semaphores(server)
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
    wait_until(lambda: server.says(503), drain_s, "readyz to say 503 first")
    assert server.stop() == 0
    assert time.monotonic() - begun < drain_s + 10, "it is killed, not waited for"
    thread.join(30)
    assert results, "the request in flight hangs"
    assert results[0].status_code == 503
    assert "retry-after" in results[0].headers
    wait_until(lambda: not any(running(pid) for pid in everything), 30, "all processes to be gone")
    assert not any(path.exists() for path in shared)


def test_a_stop_lets_requests_in_flight_finish(start_server: Callable[..., RunningServer], question: Question) -> None:
    server = start_server()
    register(server.url, question.scene.instances[0].shape)
    tree = question.body(indices=[0] * 12)
    results: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: results.append(post(server.url, tree)), daemon=True)
    with server.paused("pose"):  # or a fast machine would be done before the stop is asked for
        thread.start()
        server.wait_for_queue(requests=1)
        server.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        wait_until(lambda: server.says(503), 20, "readyz to say 503")
        refused = post(server.url, question.body(indices=[0]))
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    assert server.stop() == 0
    thread.join(30)
    assert [answer.status_code for answer in results] == [200]
    assert len(results[0].json()["poses"]) == 12


def test_a_request_that_kills_its_worker_every_time_is_given_up_and_others_are_not(
    start_server: Callable[..., RunningServer], question: Question
) -> None:
    count = 24  # in one part, so that the worker holds it for long enough to be seen
    server = start_server(pose_workers=1, pose_threads=1, pose_pass_detections=count)
    register(server.url, question.scene.instances[0].shape)
    stop = threading.Event()
    victims: set[int] = set()

    def executioner() -> None:
        """Kill whichever pose worker holds the poisoned request, as a crash over its content would."""
        while not stop.is_set():
            for worker in server.workers("pose"):
                if any(part.startswith("poison") for part in worker.holding):
                    os.kill(worker.pid, signal.SIGKILL)
                    victims.add(worker.pid)
            time.sleep(0.002)

    thread = threading.Thread(target=executioner, daemon=True)
    thread.start()
    answers: dict[str, httpx.Response] = {}

    def ask(name: str, detections: int) -> None:
        tree = question.body(indices=[0] * detections, deadline_ms=240_000)
        answers[name] = post(server.url, tree, X_Request_Id=name, timeout=250)

    asked = {"poison": count, "innocent-1": 4, "innocent-2": 4}
    askers = [threading.Thread(target=ask, args=one, daemon=True) for one in asked.items()]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(260)
    stop.set()
    thread.join(30)
    assert answers.keys() == asked.keys(), "a request hangs"
    assert answers["poison"].status_code == 503
    assert answers["poison"].json()["error"]["code"] == "worker_lost"
    assert [answers[f"innocent-{i}"].status_code for i in (1, 2)] == [200, 200]
    assert len(victims) == 3, "sent once and again twice"
    server.wait_ready()
    assert server.stop() == 0
