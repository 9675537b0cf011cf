"""The watch over the workers: clients' answers when all pose workers are gone, or the server has no files left."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from serve.backend.mosec import Backend
from tests.running import ANSWER_S, RunningServer, post, register, running, wait_until
from tests.serve.tiny import NAMES, ascii_ply, one, tetrahedron, tiny_scene, uploading
from workers.settings import Stages
from workers.state import WorkerState

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Start a server that these tests may harm."""
    with RunningServer(tmp_path_factory.mktemp("watch") / "data", {"pose_workers": 1}) as server:
        register(server.url, tiny_scene().instances[1].shape)
        yield server


def ask_in_background(server: RunningServer, count: int) -> tuple[list[threading.Thread], list[httpx.Response]]:
    """Send requests in the background; return where their answers will be."""
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(post(server.url, one(deadline_ms=60_000))), daemon=True)
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads, answers


def all_answered(threads: list[threading.Thread], answers: list[httpx.Response]) -> None:
    """Wait for the answers; each must be right."""
    for thread in threads:
        thread.join(90)
    assert [answer.status_code for answer in answers] == [200] * len(threads), [answer.text for answer in answers]
    assert {answer.json()["poses"][0]["object_id"] for answer in answers} == {NAMES[1]}


def test_without_any_pose_worker_it_is_not_ready_and_what_is_sent_meanwhile_is_answered(target: RunningServer) -> None:
    restarts = target.status()["tracks"]["production"]["restarts"]
    victims = [worker.pid for worker in target.workers("pose")]
    assert victims
    with target.nobody_replaced():
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: target.says(503), ANSWER_S, "readyz to say 503")
        status = target.status()
        assert status["model_loaded"] is False
        assert status["tracks"]["production"]["workers"]["pose"] == 0
        threads, answers = ask_in_background(target, 4)
        target.wait_for_queue(requests=4)
    target.wait_ready()
    assert target.workers("pose")
    all_answered(threads, answers)
    status = target.status()
    assert status["model_loaded"] is True
    assert status["tracks"]["production"]["restarts"] == restarts + len(victims)
    assert status["queue"] == {"requests": 0, "detections": 0}


def test_a_server_that_ran_out_of_files_recovers_when_they_come_back(target: RunningServer) -> None:
    target.wait_ready()
    limit = 256
    resource.prlimit(target.pid, resource.RLIMIT_NOFILE, (limit, limit))
    idle: list[socket.socket] = []

    def take_all_files() -> bool:
        """Open idle connections as long as the server has files for them; return True if the watch has none."""
        while len(idle) < 2 * limit and len(os.listdir(f"/proc/{target.pid}/fd")) < limit:
            idle.append(socket.create_connection(("127.0.0.1", target.port), timeout=ANSWER_S))
            time.sleep(0.001)
        return target.log().count("worker_watch_failed") > failures

    failures = 0
    try:
        wait_until(take_all_files, 60, "all files to be in use")
        failures = target.log().count("worker_watch_failed")
        (victim,) = target.workers("pose")
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(take_all_files, 60, "the watch to fail again")
        wait_until(lambda: target.workers("pose") and take_all_files(), 120, "a new worker, which nobody can watch")
    finally:
        for connection in idle:
            connection.close()
    assert running(target.pid)
    target.wait_ready()
    all_answered(*ask_in_background(target, 4))
    (again,) = target.workers("pose")
    with target.nobody_replaced():
        os.kill(again.pid, signal.SIGKILL)  # and this one is watched
        wait_until(lambda: target.says(503), ANSWER_S, "readyz to say 503")
    target.wait_ready()
    all_answered(*ask_in_background(target, 2))
    assert len(os.listdir(f"/proc/{target.pid}/fd")) < 100


def test_a_stop_does_not_wait_for_uploads_whose_clients_have_gone(target: RunningServer) -> None:
    target.wait_ready()
    for index in range(3):
        connection = uploading(target.port, ascii_ply(tetrahedron(45 + index)), send=None if index else 300)
        time.sleep(0.1)
        connection.close()
    begun = time.monotonic()
    assert target.stop() == 0
    assert time.monotonic() - begun < 15.0, "half of the drain limit"
    assert "request_failed" not in target.log()


WORKER = """\
import sys
from pathlib import Path
from workers.state import StateWriter
writer = StateWriter(Path(sys.argv[1]), sys.argv[2], 0)
writer.ready(cache_bytes=7)
print(flush=True)
input()
"""


def worker(run_dir: Path, stage: str, stack: ExitStack) -> subprocess.Popen[bytes]:
    """Start a process that claims to be a worker and does nothing; `stack` ends it."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(run_dir), stage], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    stack.callback(process.communicate)
    stack.callback(process.kill)
    assert process.stdout is not None
    process.stdout.readline()
    return process


async def found(backend: Backend, count: int) -> None:
    """Wait until this many workers are watched."""
    async with asyncio.timeout(60):
        while len(backend.workers) != count:
            await asyncio.sleep(0.01)


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """SIGKILL processes, with no chance for the watch to see it meanwhile."""
    for process in processes:
        process.kill()
        process.wait()


def test_each_worker_that_dies_with_the_whole_backend_is_told_of_once(tmp_path: Path) -> None:
    deaths: list[WorkerState] = []

    async def scenario(stack: ExitStack) -> None:
        backend = Backend(Stages(), tmp_path, on_worker_death=deaths.append)
        watch = asyncio.create_task(backend._watch())
        workers = [worker(tmp_path, stage, stack) for stage in ("decode", "pose")]
        await found(backend, 2)
        workers.append(worker(tmp_path, "respond", stack))  # which the watch has had no time to find
        end(workers)
        backend._everything_is_gone()
        assert not backend.workers
        assert {death.pid for death in deaths} == {process.pid for process in workers[:2]}
        assert {death.info["cache_bytes"] for death in deaths} == {7}
        await asyncio.sleep(0.5)  # the watch looks again, a few times
        watch.cancel()
        assert sorted(death.pid for death in deaths) == sorted(process.pid for process in workers)

    with ExitStack() as stack:
        asyncio.run(scenario(stack))


def test_workers_that_end_with_a_stop_are_no_deaths(tmp_path: Path) -> None:
    deaths: list[WorkerState] = []

    async def scenario(stack: ExitStack) -> None:
        backend = Backend(Stages(), tmp_path, on_worker_death=deaths.append)
        watch = asyncio.create_task(backend._watch())
        workers = [worker(tmp_path, "pose", stack)]
        await found(backend, 1)
        end(workers)
        backend._stopping = True
        backend._everything_is_gone()
        await asyncio.sleep(0.3)
        watch.cancel()
        assert not backend.workers

    with ExitStack() as stack:
        asyncio.run(scenario(stack))
    assert not deaths
