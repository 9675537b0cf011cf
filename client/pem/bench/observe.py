"""Measure the cost of a run: CPU and memory of every process of the server, its GPUs, and its own counters.

Processes are read from /proc and GPUs from nvidia-smi, so both are known only if the server runs on this machine.
`/metrics` is read from wherever the server is. What is not available is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pem.bench.here import stage_names
from pem.bench.sample import Gpu, Target, Usage
from pem.bench.wire import Address, Connection, NoAnswer
from pem.host.procfs import Reading, read

_EVERY_S: Final = 1.0
_SERIES: Final = re.compile(r"^([a-zA-Z_:][\w:]*(?:\{.*\})?)\s+(\S+)(?:\s+\d+)?$")
_COUNTER: Final = re.compile(r"^\w+(_total|_sum|_count)(\{|$)")


# ------------------------------------------------------------------------------------------------------------ metrics


def key_headers(target: Target) -> dict[str, str]:
    """Return the headers that carry the client's key."""
    return {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}


async def scrape(target: Target, timeout_s: float = 10.0) -> dict[str, float]:
    """Return every counter on /metrics by its series (`name{label="value"}`); empty without such a page."""
    address = Address.of(target.url)
    connection = Connection(address, timeout_s)
    try:
        answer = await connection.ask(address.head("GET", "/metrics", 0, key_headers(target)))
    except NoAnswer:
        return {}
    finally:
        connection.close()
    return counters(answer.body.decode("utf-8", "replace")) if answer.status == 200 else {}


def counters(page: str) -> dict[str, float]:
    """Return the counters of a Prometheus text page, and the sums and counts of its histograms."""
    found = {}
    for line in page.splitlines():
        if (match := _SERIES.match(line)) is not None and _COUNTER.match(match[1]):
            with contextlib.suppress(ValueError):
                found[match[1]] = float(match[2])
    return found


def growth(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Return how much each counter grew; one that fell was restarted, and counts in full."""
    return {
        series: value - (before[series] if before.get(series, 0.0) <= value and series in before else 0.0)
        for series, value in after.items()
    }


def family(metrics: dict[str, float], name: str) -> float | None:
    """Return the sum over all labels of a counter; None if the page has no such counter."""
    values = [value for series, value in metrics.items() if series == name or series.startswith(f"{name}{{")]
    return sum(values) if values else None


# ---------------------------------------------------------------------------------------------------------- processes


@dataclass(kw_only=True)
class _Process:
    """One process during a run."""

    name: str
    first_cpu_s: float
    last: Reading
    peak_bytes: int


class Processes:
    """Measures CPU and memory of a process and its descendants, from `begin` to `end`, with `look` in between."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self._seen: dict[int, _Process] = {}
        self._children: dict[int, list[int]] = {}

    def begin(self) -> None:
        """Start counting CPU."""
        self._seen = {}
        self.look(first=True)

    def look(self, *, first: bool = False) -> None:
        """Read all processes once; a new process counts in full."""
        if self._pid is None:
            return
        for pid in tree(self._pid):
            reading = read(pid)
            if reading is None:
                continue
            process = self._seen.get(pid)
            if process is None or process.last.started_ticks != reading.started_ticks:
                self._seen[pid] = _Process(
                    name=program(pid),
                    first_cpu_s=reading.cpu_s if first else 0.0,
                    last=reading,
                    peak_bytes=reading.resident_bytes,
                )
            else:
                process.last = reading
                process.peak_bytes = max(process.peak_bytes, reading.resident_bytes)
        self._name()

    def _name(self) -> None:
        """Name our own server's processes by their stages; a worker reports its name only once it is up."""
        assert self._pid is not None
        stages = stage_names(self._pid)
        if stages and self._pid in self._seen:
            self._seen[self._pid].name = "gateway"
        for pid, process in self._seen.items():
            process.name = stages.get(pid, process.name)

    def usage(self) -> list[Usage]:
        """Return every process that was seen, ended ones too; busiest first."""
        found = [
            Usage(
                pid=pid,
                name=process.name,
                cpu_s=process.last.cpu_s - process.first_cpu_s,
                rss_mb=process.last.resident_bytes / 1e6,
                rss_peak_mb=process.peak_bytes / 1e6,
            )
            for pid, process in self._seen.items()
        ]
        return sorted(found, key=lambda usage: -usage.cpu_s)


def tree(pid: int) -> list[int]:
    """Return a process and its running descendants; empty if it does not run."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                above = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                children.setdefault(int(above), []).append(int(entry.name))
    found = [pid] if any(pid in below for below in children.values()) else []
    for parent in found:
        found += children.get(parent, [])
    return found


def program(pid: int) -> str:
    """Name a process by its command line: the module or script of an interpreter, else the program's name."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
    except OSError:
        return "?"
    if not words[0]:
        return "?"
    name = Path(words[0]).name
    if not name.startswith("python"):
        return name
    for flag, word in itertools.pairwise(words[1:]):
        if flag == "-m":
            return word
        if flag == "-c":
            return _of_code(word)
    scripts = [Path(word).name for word in words[1:] if not word.startswith("-")]
    return scripts[0] if scripts else name


def _of_code(code: str) -> str:
    """Name what `python -c` runs: multiprocessing's helpers show it in their first import."""
    match = re.match(r"from ([\w.]+) import", code)
    return match[1] if match else "python -c"


# --------------------------------------------------------------------------------------------------------------- GPUs


class _Gpus:
    """Runs nvidia-smi once a second while wanted; does nothing if there is none."""

    _QUERY: Final = "index,name,utilization.gpu,memory.used"

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._busy: dict[str, list[float]] = {}
        self._used_mb: dict[str, float] = {}

    async def begin(self) -> None:
        if shutil.which("nvidia-smi") is None:
            return
        query = [f"--query-gpu={self._QUERY}", "--format=csv,noheader,nounits", "--loop=1"]
        with contextlib.suppress(OSError):
            self._process = await asyncio.create_subprocess_exec(
                "nvidia-smi", *query, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
            )
            self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            index, name, busy, used_mb = (part.strip() for part in line.decode(errors="replace").split(","))
            gpu = f"{index} {name}"
            with contextlib.suppress(ValueError):  # "[N/A]" if the device does not report it
                percent, megabytes = float(busy), float(used_mb)
                self._busy.setdefault(gpu, []).append(percent)
                self._used_mb[gpu] = max(self._used_mb.get(gpu, 0.0), megabytes)

    async def end(self) -> list[Gpu]:
        if self._process is None or self._reader is None:
            return []
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        await self._process.wait()
        with contextlib.suppress(ValueError):  # a line that is no reading
            await self._reader
        return [
            Gpu(name=gpu, busy=sum(busy) / len(busy) / 100, memory_peak_mb=self._used_mb[gpu])
            for gpu, busy in sorted(self._busy.items())
        ]


# ----------------------------------------------------------------------------------------------------------- together


@dataclass(frozen=True, kw_only=True)
class Observed:
    """The cost of a run."""

    usage: list[Usage]
    gpus: list[Gpu]
    metrics: dict[str, float]
    own_cpu_s: float


class Observer:
    """Watches a server between `begin` and `end`."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._processes = Processes(target.pid)
        self._gpus = _Gpus()
        self._looking: asyncio.Task[None] | None = None
        self._metrics: dict[str, float] = {}
        self._own_cpu_s = 0.0

    async def begin(self) -> None:
        """Start counting."""
        self._metrics = await scrape(self._target)
        if self._target.pid is not None:
            await self._gpus.begin()
        self._own_cpu_s = time.process_time()
        self._processes.begin()
        self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            self._processes.look()

    async def end(self) -> Observed:
        """Stop watching; return the result."""
        if self._looking is not None:
            self._looking.cancel()
        self._processes.look()
        own_cpu_s = time.process_time() - self._own_cpu_s
        metrics = await scrape(self._target)
        return Observed(
            usage=self._processes.usage(),
            gpus=await self._gpus.end(),
            metrics=growth(self._metrics, metrics) if metrics else {},
            own_cpu_s=own_cpu_s,
        )
