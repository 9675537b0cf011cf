"""Processor time and memory of each stage's processes, read from /proc on demand.

A process belongs to the stage that its worker's state names. Keepers and starting workers have no state yet: their
environment tells which they are. All other processes below the gateway are Mosec's: its main process, its HTTP front,
and multiprocessing's resource tracker.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pem.host.procfs import read
from posekit import registry

STAGES: Final = (
    "gateway",
    "mosec",
    "decode",
    "pose",
    "respond",
    "inspect",
    *(engine.onboard_stage for engine in registry.by_effort()),
    "keeper",
    "starting",  # workers whose stage is not known yet
)

KEEPER: Final = "PEM_KEEPER"  # as in workers/lifecycle.py, whose import would load Mosec


@dataclass(frozen=True, kw_only=True)
class Usage:
    """The processes of one stage, added up."""

    cpu_s: float = 0.0  # of all processes ever seen, ended ones included: only grows
    resident_bytes: int = 0  # of the running processes; a shared page counts for each of them


class Processes:
    """Adds up this process and all processes below it, by stage.

    The time that a process spent between the last look and its end is missed. Systems without /proc show zeros.
    """

    def __init__(self) -> None:
        self._spent = dict.fromkeys(STAGES, 0.0)
        self._seen: dict[tuple[int, int], float] = {}  # pid and start -> its seconds that `_spent` includes

    def look(self, stage_of: Mapping[int, str]) -> dict[str, Usage]:
        """Return the usage of each of STAGES; `stage_of`: pid of a known worker -> its stage."""
        resident = dict.fromkeys(STAGES, 0)
        seen: dict[tuple[int, int], float] = {}
        for pid in (os.getpid(), *_below(os.getpid(), stage_of)):
            reading = read(pid)
            if reading is None:
                continue
            key = pid, reading.started_ticks
            stage = self._stage(pid, stage_of)
            self._spent[stage] += max(reading.cpu_s - self._seen.get(key, 0.0), 0.0)
            seen[key] = reading.cpu_s
            resident[stage] += reading.resident_bytes
        missed = self._seen.keys() - seen.keys()
        self._seen = seen | {key: self._seen[key] for key in missed if _may_still_run(*key)}
        return {name: Usage(cpu_s=self._spent[name], resident_bytes=resident[name]) for name in STAGES}

    def _stage(self, pid: int, stage_of: Mapping[int, str]) -> str:
        if pid == os.getpid():
            return "gateway"
        stage = stage_of.get(pid)
        return stage if stage in self._spent else _stage_by_environment(pid)


def _may_still_run(pid: int, started_ticks: int) -> bool:
    """Return True if a process that a look missed may still exist. Errs towards True if its stat is unreadable."""
    reading = read(pid)
    return Path(f"/proc/{pid}").exists() if reading is None else reading.started_ticks == started_ticks


def _below(pid: int, workers: Mapping[int, str]) -> list[int]:
    """Return the processes below `pid`, except those started by any but the first thread of a process."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        children = _children(waiting.pop())
        found += children
        waiting += [child for child in children if child not in workers]  # a worker starts none
    return found


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _stage_by_environment(pid: int) -> str:
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"{KEEPER}=1".encode() in variables:
            return "keeper"
        if f"{KEEPER}=0".encode() in variables:
            return "starting"
    return "mosec"
