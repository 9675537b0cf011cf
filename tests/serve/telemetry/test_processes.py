"""Time and memory of each stage's processes: their assignment to stages, and sums that only grow."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.telemetry import processes
from serve.telemetry.processes import STAGES, Processes
from tests.running import wait_until
from workers import lifecycle

SPIN = """\
import time
while time.process_time() < {seconds}: pass
print(flush=True)
input()
"""
TICKS_S = 0.03  # the kernel counts in hundredths


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Give a list for a test's processes, ended after it; hide other tests' servers, also children of this process."""
    started: list[subprocess.Popen[bytes]] = []
    really = processes._children

    def children_of(pid: int) -> list[int]:
        mine = {child.pid for child in started}
        return [child for child in really(pid) if pid != os.getpid() or child in mine]

    monkeypatch.setattr(processes, "_children", children_of)
    yield started
    for child in started:
        child.kill()
        child.communicate()


def spinning(children: list[subprocess.Popen[bytes]], seconds: float = 0.1, **variables: str) -> int:
    """Start a child that has used this much processor time, and waits; return its pid."""
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", SPIN.format(seconds=seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **variables},
    )
    children.append(child)
    assert child.stdout is not None
    child.stdout.readline()
    return child.pid


def test_every_stage_is_there_from_the_start_and_this_process_is_the_gateway() -> None:
    usage = Processes().look({})
    assert tuple(usage) == STAGES
    assert usage["gateway"].cpu_s == pytest.approx(time.process_time(), abs=0.5)
    assert usage["gateway"].resident_bytes > 10_000_000
    assert usage["pose"] == processes.Usage()


def test_a_process_belongs_to_the_stage_that_its_worker_names(children: list[subprocess.Popen[bytes]]) -> None:
    pose, decode = spinning(children, 0.2), spinning(children)
    usage = Processes().look({pose: "pose", decode: "decode"})
    assert 0.2 - TICKS_S <= usage["pose"].cpu_s < 0.6
    assert 0.1 - TICKS_S <= usage["decode"].cpu_s < 0.5
    assert usage["pose"].resident_bytes > 1_000_000


@pytest.mark.parametrize(
    "variables, stage", [({"PEM_KEEPER": "1"}, "keeper"), ({"PEM_KEEPER": "0"}, "starting"), ({}, "mosec")]
)
def test_a_process_without_a_worker_is_known_by_its_environment(
    children: list[subprocess.Popen[bytes]], variables: dict[str, str], stage: str
) -> None:
    spinning(children, **variables)
    usage = Processes().look({})
    assert {name for name, one in usage.items() if one.resident_bytes} == {"gateway", stage}
    assert usage[stage].cpu_s >= 0.1 - TICKS_S


def test_the_variable_is_the_one_that_workers_are_started_with() -> None:
    assert processes.KEEPER == lifecycle.KEEPER


def test_processor_time_only_grows_when_a_worker_is_replaced(children: list[subprocess.Popen[bytes]]) -> None:
    first = spinning(children, 0.2)
    looking = Processes()
    before = looking.look({first: "pose"})["pose"]
    children[0].kill()
    children[0].wait()
    gone = looking.look({})["pose"]
    assert gone.cpu_s == before.cpu_s
    assert gone.resident_bytes == 0
    second = spinning(children, 0.2)
    assert looking.look({second: "pose"})["pose"].cpu_s >= before.cpu_s + 0.2 - TICKS_S


def test_processes_that_one_look_does_not_find_are_not_counted_again(
    children: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = spinning(children, 0.3)
    looking = Processes()
    before = looking.look({pid: "pose"})["pose"]
    with monkeypatch.context() as failing:
        failing.setattr(processes, "_children", lambda _: [])
        missed = looking.look({pid: "pose"})["pose"]
    assert missed == processes.Usage(cpu_s=before.cpu_s)
    again = looking.look({pid: "pose"})["pose"]
    assert again.cpu_s <= before.cpu_s + TICKS_S
    assert again.resident_bytes > 1_000_000


def test_a_look_without_files_left_counts_nothing_again(children: list[subprocess.Popen[bytes]]) -> None:
    pid = spinning(children, 0.3)
    looking = Processes()
    before = looking.look({pid: "pose"})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        blind = looking.look({pid: "pose"})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {name: usage.cpu_s for name, usage in blind.items()} == {name: one.cpu_s for name, one in before.items()}
    assert blind["pose"].resident_bytes == 0
    again = looking.look({pid: "pose"})
    assert again["pose"].cpu_s <= before["pose"].cpu_s + TICKS_S
    assert again["gateway"].cpu_s <= before["gateway"].cpu_s + 0.25


def test_what_has_ended_is_forgotten(children: list[subprocess.Popen[bytes]]) -> None:
    pid = spinning(children)
    looking = Processes()
    looking.look({pid: "pose"})
    children[0].kill()
    children[0].wait()
    looking.look({})
    assert {key[0] for key in looking._seen} == {os.getpid()}


def test_a_worker_that_gets_its_stage_late_takes_nothing_back(children: list[subprocess.Popen[bytes]]) -> None:
    pid = spinning(children, PEM_KEEPER="0")
    looking = Processes()
    starting = looking.look({})["starting"].cpu_s
    later = looking.look({pid: "pose"})
    assert later["starting"].cpu_s == starting >= 0.1 - TICKS_S
    assert later["starting"].resident_bytes == 0 < later["pose"].resident_bytes


def test_children_of_children_are_found(children: list[subprocess.Popen[bytes]]) -> None:
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-S', '-c', 'input()'], check=False)"
    child = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    children.append(child)
    one_python = processes.read(child.pid)
    assert one_python is not None
    looking = Processes()
    wait_until(lambda: len(processes._below(os.getpid(), {})) >= 2, 10, "the grandchild")
    assert looking.look({})["mosec"].resident_bytes > 0
    assert len(processes._below(os.getpid(), {child.pid: "pose"})) == 1, "a worker's children are not looked for"


def test_a_process_that_is_gone_has_no_reading() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert processes.read(child.pid) is None


def test_looking_is_cheap(children: list[subprocess.Popen[bytes]]) -> None:
    stages = {spinning(children, 0.0): "pose" for _ in range(8)}
    looking = Processes()
    looking.look(stages)
    begun = time.process_time()
    for _ in range(20):
        looking.look(stages)
    assert (time.process_time() - begun) / 20 < 0.005
    assert Path("/proc/self/stat").exists()
