"""How many cores this process may use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Cores that this process may run on: its affinity, and a container's quota rounded down, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, min(cores, int(quota))) if quota is not None else cores


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time that the control group is given; None where it is not limited."""
    with contextlib.suppress(OSError, ValueError):
        limit, period = (cgroup / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # the first version of control groups
        limit_us = int((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())
        return None if limit_us <= 0 else limit_us / int((cgroup / "cpu" / "cpu.cfs_period_us").read_text())
    return None
