"""The load generator's measurements of processes and of /metrics."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pem.bench import observe
from pem.bench.sample import Gpu, Target

BURN = """
import time
held = bytearray(b"x") * 50_000_000
end = time.process_time() + 0.5
while time.process_time() < end:
    pass
"""
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN!r} + 'print(1, flush=True); input()'])"


@pytest.fixture
def burning() -> Iterator[subprocess.Popen[bytes]]:
    """Run a process whose child burns half a second of CPU, holds 50 MB, says so and waits for a line."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield parent
    parent.communicate(b"\n", timeout=60)


def test_the_processes_below_one_are_found_with_their_cpu_and_memory(burning):
    processes = observe.Processes(burning.pid)
    processes.begin()
    assert burning.stdout is not None
    burning.stdout.readline()
    processes.look()
    usage = {one.pid: one for one in processes.usage()}
    assert len(usage) == 2
    (child,) = usage.keys() - {burning.pid}
    assert 0.3 < usage[child].cpu_s < 2.0
    assert usage[child].rss_mb > 50
    assert usage[child].rss_peak_mb >= usage[child].rss_mb
    assert usage[burning.pid].cpu_s < 0.3
    assert observe.tree(burning.pid) == [burning.pid, child]


def test_cpu_from_before_the_beginning_does_not_count(burning):
    assert burning.stdout is not None
    burning.stdout.readline()
    processes = observe.Processes(burning.pid)
    processes.begin()
    time.sleep(0.1)
    processes.look()
    assert max(one.cpu_s for one in processes.usage()) < 0.1


def test_a_process_that_ended_keeps_what_it_used():
    waiting = BURN + "print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", waiting], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        processes = observe.Processes(os.getpid())
        processes.begin()
        assert child.stdout is not None
        child.stdout.readline()
        processes.look()
        child.communicate(b"\n", timeout=60)
    processes.look()
    (usage,) = [one for one in processes.usage() if one.pid == child.pid]
    assert usage.cpu_s > 0.3
    assert observe.tree(child.pid) == []


def test_a_server_elsewhere_has_no_processes_here():
    processes = observe.Processes(None)
    processes.begin()
    processes.look()
    assert processes.usage() == []


def test_processes_are_called_by_what_they_run():
    with subprocess.Popen([sys.executable, "-m", "http.server", "0"], stdout=-3, stderr=-3) as module:
        with subprocess.Popen(["sleep", "20"]) as program:
            time.sleep(0.2)
            names = observe.program(module.pid), observe.program(program.pid), observe.program(2**22 + 1)
            program.terminate()
        module.terminate()
    assert names == ("http.server", "sleep", "?")


def test_counters_are_read_from_a_page():
    page = """# HELP pose_requests_total Requests.
# TYPE pose_requests_total counter
pose_requests_total{route="/a b",code="200"} 3
pose_requests_total{route="/c",code="429"} 4.0 1700000000000
pose_request_duration_seconds_bucket{le="+Inf"} 7
pose_request_duration_seconds_sum 1.5e-1
pose_request_duration_seconds_count 7
pose_queue_detections 5
broken_total x
"""
    found = observe.counters(page)
    assert found == {
        'pose_requests_total{route="/a b",code="200"}': 3.0,
        'pose_requests_total{route="/c",code="429"}': 4.0,
        "pose_request_duration_seconds_sum": 0.15,
        "pose_request_duration_seconds_count": 7.0,
    }
    assert observe.family(found, "pose_requests_total") == 7.0
    assert observe.family(found, "pose_pass_detections_sum") is None


def test_a_counter_that_began_anew_counts_in_full():
    assert observe.growth({"a_total": 5, "b_total": 9}, {"a_total": 7, "b_total": 2, "c_total": 1}) == {
        "a_total": 2,
        "b_total": 2,
        "c_total": 1,
    }


def watched(seconds: float) -> observe.Observed:
    async def watch() -> observe.Observed:
        observer = observe.Observer(Target(url="http://127.0.0.1:9", pid=os.getpid()))
        await observer.begin()
        await asyncio.sleep(seconds)
        return await observer.end()

    return asyncio.run(watch())


def nvidia_smi(folder: Path, script: str) -> str:
    """Return a PATH on which nvidia-smi is this script."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_gpus_are_as_busy_as_nvidia_smi_says(tmp_path, monkeypatch):
    lines = (
        "0, NVIDIA H200, 20, 1000\\n1, NVIDIA H200, [N/A], 5\\n0, NVIDIA H200, 60, 3000\\n0, NVIDIA H200, 40, 2000\\n"
    )
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path, f"printf '{lines}'; exec sleep 60"))
    begun = time.monotonic()
    assert watched(2.0).gpus == [Gpu(name="0 NVIDIA H200", busy=pytest.approx(0.4), memory_peak_mb=3000.0)]
    assert time.monotonic() - begun < 30


def test_without_a_gpu_nothing_is_said_of_any(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path, "echo NVIDIA-SMI has failed because there is no driver; exit 9"))
    assert watched(0.3).gpus == []
    (tmp_path / "nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    seen = watched(0.1)
    assert seen.gpus == []
    assert seen.metrics == {}
    assert os.getpid() in {usage.pid for usage in seen.usage}
