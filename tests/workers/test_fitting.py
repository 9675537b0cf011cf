"""How the settings of the stages follow the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pem.host.machine import usable_cores, usable_memory_mb
from serve.settings import Settings
from workers.settings import Decode, Pose, Stages, fitted, pose_workers


def stages(
    device: str, cores: int, monkeypatch: pytest.MonkeyPatch, pose: Pose | None = None, memory_mb: int = 64_000
) -> Stages:
    """Return the settings that a server on such a machine gives to its workers."""
    monkeypatch.setattr("serve.settings.usable_cores", lambda: cores)
    monkeypatch.setattr("serve.settings.usable_memory_mb", lambda: memory_mb)
    settings = Settings(pose=pose or Pose())
    return settings.stages(run_dir=Path("/run"), devices=tuple(device.split(",")), engines=("geometric",))


@pytest.mark.parametrize(
    "cores, workers, threads, decoders", [(1, 1, 1, 2), (2, 2, 1, 2), (4, 4, 1, 2), (16, 4, 4, 8), (64, 4, 4, 8)]
)
def test_a_cpu_gets_a_worker_for_each_core_up_to_four(
    cores: int, workers: int, threads: int, decoders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stages("cpu", cores, monkeypatch)
    assert found.devices == ("cpu",) * workers
    assert (found.pose.workers, found.pose.threads, found.decode.workers) == (workers, threads, decoders)
    assert (found.pose.pass_detections, found.pose.batch_requests) == (4, 1)


@pytest.mark.parametrize("memory_mb, workers, threads", [(500, 1, 4), (3_900, 1, 4), (4_295, 2, 4), (6_442, 3, 2)])
def test_a_cpu_gets_no_more_workers_than_its_memory_has_room_for(
    memory_mb: int, workers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stages("cpu", 8, monkeypatch, memory_mb=memory_mb)
    assert (found.devices, found.pose.threads) == (("cpu",) * workers, threads)


def test_memory_bounds_neither_a_gpus_worker_nor_what_is_set_nor_what_nobody_knows() -> None:
    assert pose_workers(Pose(), "cuda:0", 8, 500) == 1
    assert pose_workers(Pose(workers=3), "cpu", 8, 500) == 3
    assert pose_workers(Pose(), "cpu", 8, None) == 4


def test_each_gpu_gets_one_worker_that_gathers_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    found = stages("cuda:0,cuda:1", 32, monkeypatch)
    assert found.devices == ("cuda:0", "cuda:1")
    assert (found.pose.pass_detections, found.pose.batch_requests) == (8, 16)


def test_what_is_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Pose(workers=3, threads=2, pass_detections=7, batch_requests=5)
    found = stages("cpu", 2, monkeypatch, own)
    assert found.pose == own
    assert found.devices == ("cpu",) * 3
    assert fitted(Stages(decode=Decode(workers=5)), 2).decode.workers == 5


def test_fitting_twice_changes_nothing() -> None:
    once = fitted(Stages(devices=("cpu", "cpu")), 2)
    assert fitted(once, 64) == once


def write(path: Path, text: str) -> None:
    """Write one file of a made-up machine, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this process may run on eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.usefixtures("eight_cores")
def test_a_container_s_quota_counts_as_its_cores(tmp_path: Path) -> None:
    cgroup, proc = tmp_path / "cgroup", tmp_path / "proc"
    assert usable_cores(cgroup, proc) == 8  # no control group at all
    for limit, cores in {"max 100000": 8, "350000 100000": 3, "20000 100000": 1, "nonsense": 8}.items():
        write(cgroup / "cpu.max", f"{limit}\n")
        assert usable_cores(cgroup, proc) == cores, limit


@pytest.mark.usefixtures("eight_cores")
def test_the_first_version_of_control_groups_is_understood(tmp_path: Path) -> None:
    for limit_us, cores in {"300000": 3, "-1": 8}.items():
        write(tmp_path / "cpu" / "cpu.cfs_quota_us", f"{limit_us}\n")
        write(tmp_path / "cpu" / "cpu.cfs_period_us", "100000\n")
        assert usable_cores(tmp_path, tmp_path / "proc") == cores


@pytest.mark.usefixtures("eight_cores")
def test_the_smallest_limit_on_the_way_up_from_the_own_group_counts(tmp_path: Path) -> None:
    cgroup, proc = tmp_path / "cgroup", tmp_path / "proc"
    write(proc / "self" / "cgroup", "0::/system.slice/pem.service\n")
    write(cgroup / "system.slice" / "pem.service" / "cpu.max", "600000 100000\n")
    write(cgroup / "system.slice" / "pem.service" / "memory.max", "max\n")
    write(cgroup / "system.slice" / "memory.max", "6000000000\n")
    write(cgroup / "other.slice" / "cpu.max", "100000 100000\n")  # not above it
    write(cgroup / "other.slice" / "memory.max", "1000000000\n")
    assert (usable_cores(cgroup, proc), usable_memory_mb(cgroup, proc)) == (6, 6000)
    write(cgroup / "system.slice" / "cpu.max", "400000 100000\n")
    write(cgroup / "memory.max", "5000000000\n")
    assert (usable_cores(cgroup, proc), usable_memory_mb(cgroup, proc)) == (4, 5000)


@pytest.mark.usefixtures("eight_cores")
def test_groups_of_the_first_version_are_walked_by_their_controller(tmp_path: Path) -> None:
    cgroup, proc = tmp_path / "cgroup", tmp_path / "proc"
    write(proc / "self" / "cgroup", "5:memory:/jobs/mine\n4:cpu,cpuacct:/jobs/many/mine\n1:name=systemd:/\n0::/\n")
    write(cgroup / "cpu" / "jobs" / "cpu.cfs_quota_us", "250000\n")
    write(cgroup / "cpu" / "jobs" / "cpu.cfs_period_us", "50000\n")
    write(cgroup / "cpu" / "jobs" / "mine" / "cpu.cfs_quota_us", "50000\n")  # memory's path, not cpu's
    write(cgroup / "cpu" / "jobs" / "mine" / "cpu.cfs_period_us", "50000\n")
    write(cgroup / "memory" / "jobs" / "mine" / "memory.limit_in_bytes", "3000000000\n")
    write(cgroup / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    assert (usable_cores(cgroup, proc), usable_memory_mb(cgroup, proc)) == (5, 3000)


@pytest.mark.usefixtures("eight_cores")
def test_a_path_that_the_container_does_not_show_leaves_the_limits_that_it_does(tmp_path: Path) -> None:
    cgroup, proc = tmp_path / "cgroup", tmp_path / "proc"
    write(cgroup / "cpu.max", "200000 100000\n")
    write(cgroup / "memory.max", "4000000000\n")
    for path in ("/docker/0123abcd", "/../../elsewhere"):
        write(proc / "self" / "cgroup", f"0::{path}\n")
        assert (usable_cores(cgroup, proc), usable_memory_mb(cgroup, proc)) == (2, 4000), path


def test_memory_is_the_machine_s_where_nothing_limits_it(tmp_path: Path) -> None:
    cgroup, proc = tmp_path / "cgroup", tmp_path / "proc"
    assert usable_memory_mb(cgroup, proc) is None
    write(proc / "meminfo", "MemTotal:        8000000 kB\nMemFree:         1000000 kB\n")
    assert usable_memory_mb(cgroup, proc) == 8192
    write(cgroup / "memory.max", "9000000000\n")  # more than there is
    assert usable_memory_mb(cgroup, proc) == 8192
