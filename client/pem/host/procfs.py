"""Read one process's CPU time and memory from /proc; without /proc nothing is known."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Reading(NamedTuple):
    """One process at one moment."""

    cpu_s: float  # user and system, since it started
    resident_bytes: int
    started_ticks: int  # since boot; tells a process from a later one with the same pid


def read(pid: int) -> Reading | None:
    """Read one process; None if it is gone. A zombie counts; its memory is 0."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    resident_bytes = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return Reading(cpu_s=cpu_s, resident_bytes=resident_bytes, started_ticks=int(fields[19]))
