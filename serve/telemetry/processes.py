"""What each stage's processes take: processor time and memory, read from /proc when somebody asks.

A process belongs to the stage that its worker's state names. Keepers and workers that are only just starting have no
state: their environment tells. What is left below the gateway is Mosec's: its main process, its HTTP front, and
multiprocessing's resource tracker.
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
    "starting",  # a worker before its stage is known
)

KEEPER: Final = "PEM_KEEPER"  # of workers/lifecycle.py, which brings Mosec along when it is imported


@dataclass(frozen=True, kw_only=True)
class Usage:
    """One stage's processes together."""

    cpu_s: float = 0.0  # of all that were ever seen, the ended ones included: only grows
    resident_bytes: int = 0  # of those there now; pages that several share count for each


class Processes:
    """Adds up this process and everything below it, by stage.

    What a process spent between the last look and its death is not known. Nothing is there on systems without /proc.
    """

    def __init__(self) -> None:
        self._spent = dict.fromkeys(STAGES, 0.0)
        self._seen: dict[tuple[int, int], float] = {}  # pid and start -> seconds of it that are in `_spent`

    def look(self, stage_of: Mapping[int, str]) -> dict[str, Usage]:
        """Usage by stage, each of STAGES; `stage_of` gives the stage of each known worker's pid."""
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
    """Whether a process is there that a look did not come upon; without files left nobody can tell: then it may be."""
    reading = read(pid)
    return Path(f"/proc/{pid}").exists() if reading is None else reading.started_ticks == started_ticks


def _below(pid: int, workers: Mapping[int, str]) -> list[int]:
    """The processes below `pid`; those that threads other than a process's first have started are not looked for."""
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
