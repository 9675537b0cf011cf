"""How the settings of the stages follow the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serve.settings import Settings
from workers.machine import usable_cores
from workers.settings import Decode, Pose, Stages, fitted


def stages(device: str, cores: int, monkeypatch: pytest.MonkeyPatch, pose: Pose | None = None) -> Stages:
    """What a server on such a machine gives to its workers."""
    monkeypatch.setattr("serve.settings.usable_cores", lambda: cores)
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


def test_a_container_s_quota_counts_as_its_cores(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path) == cores  # no control group at all
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == cores
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("20000 100000\n")
    assert usable_cores(tmp_path) == 1


def test_the_first_version_of_control_groups_is_understood(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
