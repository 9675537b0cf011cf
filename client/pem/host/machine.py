"""The number of cores and the memory that this process may use.

Control groups limit both: the process's group, or any above it. Groups that a container hides are left out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


def usable_cores(cgroup: Path = _CGROUP, proc: Path = _PROC) -> int:
    """Return the cores that this process may use: its affinity and the smallest quota, rounded down, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas(cgroup, proc))]))


def usable_memory_mb(cgroup: Path = _CGROUP, proc: Path = _PROC) -> int | None:
    """Return the usable memory in millions of bytes: the machine's or the smallest limit; None if unknown."""
    limits = [*_memory_limits(cgroup, proc), *_machine_memory(proc)]
    return min(limits) // 1_000_000 if limits else None


def _quotas(cgroup: Path, proc: Path) -> Iterator[float]:
    """Yield the CPU quota of each control group that has one, in cores."""
    for folder in _groups(cgroup, _own_group(proc, "")):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # "max" is no number
            limit, period = (folder / "cpu.max").read_text().split()
            yield int(limit) / int(period)
    for folder in _groups(cgroup / "cpu", _own_group(proc, "cpu")):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            limit_us = int((folder / "cpu.cfs_quota_us").read_text())
            if limit_us > 0:
                yield limit_us / int((folder / "cpu.cfs_period_us").read_text())


def _memory_limits(cgroup: Path, proc: Path) -> Iterator[int]:
    """Yield the memory limit in bytes of each control group that has one (version 1 says 2**63 if not)."""
    for folder in _groups(cgroup, _own_group(proc, "")):
        with contextlib.suppress(OSError, ValueError):
            yield int((folder / "memory.max").read_text())
    for folder in _groups(cgroup / "memory", _own_group(proc, "memory")):
        with contextlib.suppress(OSError, ValueError):
            yield int((folder / "memory.limit_in_bytes").read_text())


def _machine_memory(proc: Path) -> Iterator[int]:
    """Yield the machine's memory in bytes."""
    with contextlib.suppress(OSError, ValueError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                yield int(line.split()[1]) * 1024


def _own_group(proc: Path, controller: str) -> str:
    """Return the path of this process's control group: of a version 1 controller, or "" for version 2."""
    with contextlib.suppress(OSError, ValueError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                return path
    return "/"


def _groups(root: Path, path: str) -> list[Path]:
    """Return the folders of a control group and of all above it, up to `root`; some may not exist."""
    own = root / path.lstrip("/")
    return [folder for folder in (own, *own.parents) if folder.is_relative_to(root)]
