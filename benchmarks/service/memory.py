"""Track the memory of a server's processes over a run, read from /proc by a thread, and report growth."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pem.bench.observe import program, stage_names, tree
from serve.telemetry import processes


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The memory of all processes at one moment."""

    when: float  # time.monotonic()
    resident_mb: dict[tuple[str, int], float]  # by name (a stage of the server, or a program) and pid


class MemoryWatch:
    """Reads the memory of a process and its descendants while the block runs."""

    def __init__(self, pid: int, every_s: float = 1.0) -> None:
        self._pid = pid
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.readings: list[Reading] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.readings.append(read(self._pid))
            if self._stop.wait(self._every_s):
                return


def read(server: int) -> Reading:
    """Read the memory of a server's processes now; processes that end meanwhile are left out."""
    stages = stage_names(server)
    found = {}
    for pid in tree(server):
        reading = processes.read(pid)
        if reading is not None and reading.resident_bytes:
            name = "gateway" if pid == server else stages.get(pid) or program(pid)
            found[name, pid] = reading.resident_bytes / 1e6
    return Reading(when=time.monotonic(), resident_mb=found)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The memory early and late in a run."""

    name: str  # a stage of the server, or a program
    pid: int | None  # None: the largest of several processes
    early_mb: float
    late_mb: float

    @property
    def share(self) -> float:
        """Return the growth: 0.1 is ten percent; negative means that it shrank."""
        return self.late_mb / self.early_mb - 1


def by_process(readings: Sequence[Reading], parts: int) -> list[Growth]:
    """Compare each process that lived through the run: the medians of the first and the last of `parts` parts."""
    early, late = _ends(readings, parts)
    found = []
    for key in early[0].resident_mb if early else ():
        if all(key in reading.resident_mb for reading in readings):
            first, last = (statistics.median(reading.resident_mb[key] for reading in end) for end in (early, late))
            found.append(Growth(name=key[0], pid=key[1], early_mb=first, late_mb=last))
    return sorted(found, key=lambda growth: -growth.late_mb)


def by_name(readings: Sequence[Reading], parts: int) -> list[Growth]:
    """Compare the largest process of each name, which may change during the run: medians as in `by_process`."""
    early, late = (_largest(end) for end in _ends(readings, parts))
    found = [
        Growth(name=name, pid=None, early_mb=statistics.median(early[name]), late_mb=statistics.median(late[name]))
        for name in early.keys() & late.keys()
    ]
    return sorted(found, key=lambda growth: -growth.late_mb)


def _ends(readings: Sequence[Reading], parts: int) -> tuple[list[Reading], list[Reading]]:
    """Return the readings of the first and of the last of `parts` equal parts of the time."""
    if not readings:
        return [], []
    begun, ended = readings[0].when, readings[-1].when
    part_s = (ended - begun) / parts
    early = [reading for reading in readings if reading.when <= begun + part_s]
    return early, [reading for reading in readings if reading.when >= ended - part_s]


def _largest(readings: Sequence[Reading]) -> dict[str, list[float]]:
    found: defaultdict[str, list[float]] = defaultdict(list)
    for reading in readings:
        largest: defaultdict[str, float] = defaultdict(float)
        for (name, _), resident_mb in reading.resident_mb.items():
            largest[name] = max(largest[name], resident_mb)
        for name, resident_mb in largest.items():
            found[name].append(resident_mb)
    return found
