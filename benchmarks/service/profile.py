"""Profile the CPU time of requests: every process of the service under load, and the most expensive functions inside.

    python -m benchmarks.service.profile                     the geometric engine
    python -m benchmarks.service.profile --engine sam6d      the network, with generated weights

A closed loop keeps a server of its own busy. The CPU seconds of each process come from /proc. Meanwhile py-spy samples
the gateway and one worker of each stage (it needs root, or kernel.yama.ptrace_scope = 0). A function's own time
is that of its lines and of compiled code that they call; waiting is not counted. Time in a third-party library is
listed with the function of this project that called it, `caller > called`. Torch's way to a compiled operator does not
tell which operator it is: it is listed as `caller > compiled`, and the wrapper has the kernel's name. `line` is the
line of the caller with the most time, and its share.

Then torch's own profiler runs the work of the pose stage on the same requests, in one pass on one thread, in this
process: the operators with the most time of their own, compiled kernels by their names.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from msgspec import convert

from benchmarks.service.trials import engine_settings
from pem.bench.drive import closed_loop
from pem.bench.mix import Load, Mix, prepare
from pem.bench.observe import stage_names
from pem.bench.report import Table, machine_line, write_json
from pem.bench.result import summarise
from pem.bench.sample import Run, Target
from pem.bench.server import own_server, register
from workers.settings import EngineName

RATE_HZ = 200  # samples a second
PROFILED = ("gateway", "decode", "pose", "respond")
WARMUP_S = 4.0
_OURS = {("serve",), ("workers",), ("posekit",), ("pointnet2_ext",)}  # packages whose functions can be changed here
_WRAPPERS = {("Linear.forward", "posekit/sam6d/quick/cpu.py")}  # wrappers of an operator: their callers count
_TO_OPERATORS = "torch/_ops.py"
_REQUESTS_PROFILED = 4


def main() -> int:
    """Print the tables; return 1 if anything was answered wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["geometric", "sam6d"], default="geometric")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--masks", type=int, default=3, help="detections in a request (default 3)")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--top", type=int, default=10, help="how many costs to list (default 10)")
    parser.add_argument("--objects", type=int, help="different ones; fewer are onboarded sooner (all)")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for standard output")
    options = parser.parse_args()
    if shutil.which(_py_spy()) is None:
        parser.error("py-spy is not installed here: pip install py-spy")

    load = prepare(Mix(masks=(options.masks,), objects=options.objects, engine=options.engine, deadline_ms=300_000))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = engine_settings(options.engine, folder)
        with own_server(settings, folder / "data") as target:
            register(target, load, lambda words: print(words, file=sys.stderr))
            run, stacks = asyncio.run(_profiled(target, load, options.clients, options.seconds, folder))
        result = summarise(run)
        shares = _by_process(run, result.requests_hz * run.seconds)
        shares.print()
        print()
        costs = by_function(stacks, run, options.top)
        costs.print()
        print(flush=True)
        operators = _operators(load, settings, folder, options.top)
        operators.print()
    print(
        f"\n{result.detections_hz:.3g} detections/s, {result.poses_hz:.3g} poses/s, {result.answered} requests in "
        f"{result.seconds:.0f} s; {result.fault or 'every answer right'}"
    )
    print(f"engine {options.engine}, {options.clients} clients with {options.masks} masks a request")
    print(machine_line())
    tables = {"processes": shares.as_dicts(), "costs": costs.as_dicts(), "operators": operators.as_dicts()}
    write_json(options.json, {"profile_service": {**tables, "result": result.as_dict()}})
    return 0 if result.fault is None else 1


async def _profiled(
    target: Target, load: Load, clients: int, seconds: float, folder: Path
) -> tuple[Run, dict[str, Counter[str]]]:
    """Return a run under load, and by stage the number of py-spy samples of each stack."""
    spies: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}

    async def spy() -> None:
        await asyncio.sleep(WARMUP_S)
        for stage, pid in _pids(target).items():
            raw = folder / f"{stage}.raw"
            command = [_py_spy(), "record", "--pid", str(pid), "--format", "raw", "--output", str(raw)]
            command += ["--duration", str(int(seconds)), "--rate", str(RATE_HZ), "--threads", "--nonblocking"]
            spies[stage] = (subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), raw)

    spying = asyncio.create_task(spy())
    run = await closed_loop(target, load.questions, clients=clients, seconds=seconds, warmup_s=WARMUP_S)
    await spying
    stacks: dict[str, Counter[str]] = {}
    for stage, (process, raw) in spies.items():
        process.wait(60)
        stacks[stage] = Counter()
        for line in raw.read_text().splitlines() if raw.exists() else []:
            stack, _, count = line.rpartition(" ")
            stacks[stage][stack] += int(count)
    return run, stacks


def _pids(target: Target) -> dict[str, int]:
    """Return the pid of one process of each stage."""
    assert target.pid is not None
    found = {stage: pid for pid, stage in stage_names(target.pid).items()} | {"gateway": target.pid}
    return {stage: found[stage] for stage in PROFILED if stage in found}


def _by_process(run: Run, requests: float) -> Table:
    """Tabulate CPU by stage: seconds, share, milliseconds per request."""
    table = Table(["stage", "processes", "CPU s", "share", "CPU ms a request", "peak MB each"])
    stages: dict[str, list[tuple[float, float]]] = {}
    for usage in run.usage:
        stages.setdefault(usage.name, []).append((usage.cpu_s, usage.rss_peak_mb))
    total_s = sum(usage.cpu_s for usage in run.usage) or 1.0
    for stage, found in sorted(stages.items(), key=lambda item: -sum(cpu_s for cpu_s, _ in item[1])):
        cpu_s = sum(one for one, _ in found)
        each_ms = 1e3 * cpu_s / requests if requests else float("nan")
        if cpu_s >= 0.001 * total_s:
            table.add(stage, len(found), cpu_s, cpu_s / total_s, each_ms, max(mb for _, mb in found))
    return table


def by_function(stacks: Mapping[str, Counter[str]], run: Run, top: int) -> Table:
    """Tabulate the functions with the most time of their own, over all stages, scaled by their stage's CPU seconds.

    stacks: by stage, the number of py-spy samples of each stack: "a (x.py:1);b (y.py:2)", the innermost last.
    """
    table = Table(["rank", "stage", "function", "line", "share of all CPU", "share of its stage"])
    cpu_s = {stage: sum(usage.cpu_s for usage in run.usage if usage.name == stage) for stage in stacks}
    total_s = sum(usage.cpu_s for usage in run.usage) or 1.0
    costs: list[tuple[float, float, str, str, str]] = []
    for stage, counted in stacks.items():
        samples = sum(counted.values()) or 1
        own: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for stack, count in counted.items():
            function, line = place(stack)
            own[function][line] += count
        for function, lines in own.items():
            share = lines.total() / samples
            [(line, most)] = lines.most_common(1)
            words = f"{line} ({most / lines.total():.0%})" if line else ""
            costs.append((cpu_s[stage] * share / total_s, share, stage, function, words))
    for rank, (of_all, of_stage, stage, function, line) in enumerate(sorted(costs, reverse=True)[:top], start=1):
        table.add(rank, stage, function, line, of_all, of_stage)
    return table


def place(stack: str) -> tuple[str, str]:
    """Return the function that a stack's time is assigned to, and its line ("x.py:12", empty if unknown).

    It is the innermost function of this project and, if that is not the innermost of all, what it called.
    """
    frames = stack.split(";")
    inner = _Frame.of(frames[-1])
    ours = [frame for frame in map(_Frame.of, reversed(frames)) if frame.ours]
    mine = next((frame for frame in ours if (frame.name, frame.path) not in _WRAPPERS), inner)
    if mine == inner:
        return inner.function, inner.line
    called = "compiled" if inner.path == _TO_OPERATORS else inner.function
    return f"{mine.function} > {called if mine == ours[0] else ours[0].function}", mine.line


@dataclass(frozen=True)
class _Frame:
    name: str
    path: str  # from the package on; empty if unknown
    number: str

    @classmethod
    def of(cls, text: str) -> _Frame:
        """Parse "name (posekit/x.py:12)"."""
        name, _, place = text.partition(" (")
        path, _, number = place.rstrip(")").rpartition(":")
        return cls(name, path, number)

    @property
    def ours(self) -> bool:
        return Path(self.path).parts[:1] in _OURS

    @property
    def function(self) -> str:
        return f"{self.name} ({'/'.join(Path(self.path).parts[-2:])})" if self.path else self.name

    @property
    def line(self) -> str:
        return f"{Path(self.path).name}:{self.number}" if self.path else ""


def _operators(load: Load, settings: Mapping[str, str], folder: Path, top: int) -> Table:
    """Tabulate torch's operators in the pose stage's work on some of the requests, the most expensive first.

    `folder`: has the server's data directory; the server no longer runs.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.peers.serving import Decoder, Poses, Setup

    torch.set_num_threads(1)
    setup = Setup(
        data=str(folder / "data"),
        port=0,
        ready_dir=str(folder),
        engine=convert(settings["engine"], EngineName),
        weights=settings.get("sam6d.weights", ""),
        views=int(settings.get("sam6d.views", 42)),
    )
    decoder, poses = Decoder(setup), Poses(setup)
    cuts = [decoder.decode(question.body) for question in load.questions[:_REQUESTS_PROFILED]]
    poses.together(cuts[:1])
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for cut in cuts:
            poses.together([cut])
    found = sorted(recorded.key_averages(), key=lambda one: -one.self_cpu_time_total)
    total_us = sum(one.self_cpu_time_total for one in found) or 1.0
    detections = sum(len(cut.crops) for cut in cuts)
    table = Table(["operator", "its own ms a detection", "share", "calls a detection"])
    for one in found[:top]:
        own_us = one.self_cpu_time_total
        table.add(one.key, own_us / 1e3 / detections, own_us / total_us, one.count / detections)
    return table


def _py_spy() -> str:
    """Return the program of this environment, else the one on the path."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else "py-spy"


if __name__ == "__main__":
    sys.exit(main())
