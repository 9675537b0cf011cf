"""Where a request's CPU goes: every process of the service under load, and inside them the functions that cost most.

    python -m benchmarks.profile_service                     the geometric engine
    python -m benchmarks.profile_service --engine sam6d      the network, with generated weights
    python -m benchmarks.profile_service --torch             torch's own profiler over one pass, besides

A server of its own is kept busy by a closed loop. The CPU seconds of each process come from /proc; py-spy samples the
gateway and one worker of each stage meanwhile (it needs root, or kernel.yama.ptrace_scope = 0). A function's own time
is that of its lines and of what they call in compiled code; time spent waiting is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks import generated_weights
from benchmarks.load.drive import closed_loop
from benchmarks.load.mix import Load, Mix, prepare
from benchmarks.load.observe import stage_names
from benchmarks.load.report import Table, write_json
from benchmarks.load.result import summarise
from benchmarks.load.sample import Run, Target
from benchmarks.load.server import own_server, register

RATE_HZ = 200  # samples a second
PROFILED = ("gateway", "decode", "pose", "respond")
WARMUP_S = 4.0


def main() -> int:
    """Print the tables; 1 where anything was answered wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=["geometric", "sam6d"], default="geometric")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--masks", type=int, default=3, help="detections in a request (default 3)")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--top", type=int, default=10, help="how many costs to list (default 10)")
    parser.add_argument("--torch", action="store_true", help="run torch's profiler over one pass of the engine as well")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for standard output")
    options = parser.parse_args()
    if shutil.which(_py_spy()) is None:
        parser.error("py-spy is not installed here: pip install py-spy")

    load = prepare(Mix(masks=(options.masks,), engine=options.engine, deadline_ms=120_000))
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(options.engine, Path(folder))
        with own_server(settings) as target:
            register(target, load, lambda words: print(words, file=sys.stderr))
            run, stacks = asyncio.run(_profiled(target, load, options.clients, options.seconds, Path(folder)))
    result = summarise(run)

    shares = _by_process(run, result.requests_hz * run.seconds)
    shares.print()
    costs = _by_function(stacks, run, options.top)
    costs.print()
    print(f"{result.poses_hz:.1f} poses/s, {result.requests_hz:.1f} requests/s; {result.fault or 'every answer right'}")
    tables = {"processes": shares.as_dicts(), "costs": costs.as_dicts(), "result": result.as_dict()}
    write_json(options.json, {"profile_service": tables})
    if options.torch:
        _torch_profile(options.engine, options.masks)
    return 0 if result.fault is None else 1


def _settings(engine: str, folder: Path) -> dict[str, str]:
    if engine == "geometric":
        return {"engine": engine}
    weights = folder / "generated.safetensors"
    generated_weights.write(weights)
    return {"engine": engine, "sam6d.weights": str(weights), "sam6d.views": "8"}


async def _profiled(
    target: Target, load: Load, clients: int, seconds: float, folder: Path
) -> tuple[Run, dict[str, Counter[str]]]:
    """A run under load, and by stage how many samples py-spy took of each stack."""
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
    """One process of each stage that is looked into."""
    assert target.pid is not None
    found = {stage: pid for pid, stage in stage_names(target.pid).items()} | {"gateway": target.pid}
    return {stage: found[stage] for stage in PROFILED if stage in found}


def _by_process(run: Run, requests: float) -> Table:
    """CPU by stage: seconds, share, milliseconds a request."""
    table = Table(["stage", "processes", "CPU s", "share", "CPU ms a request", "peak MB each"])
    stages: dict[str, list[tuple[float, float]]] = {}
    for usage in run.usage:
        stages.setdefault(usage.name, []).append((usage.cpu_s, usage.rss_peak_mb))
    total_s = sum(usage.cpu_s for usage in run.usage) or 1.0
    for stage, found in sorted(stages.items(), key=lambda item: -sum(cpu_s for cpu_s, _ in item[1])):
        cpu_s = sum(one for one, _ in found)
        if cpu_s >= 0.001 * total_s:
            table.add(stage, len(found), cpu_s, cpu_s / total_s, 1e3 * cpu_s / requests, max(mb for _, mb in found))
    return table


def _by_function(stacks: dict[str, Counter[str]], run: Run, top: int) -> Table:
    """The functions with the most time of their own, over all stages, scaled by the CPU seconds of their stage."""
    table = Table(["rank", "stage", "function", "share of all CPU", "share of its stage"])
    cpu_s = {stage: sum(usage.cpu_s for usage in run.usage if usage.name == stage) for stage in stacks}
    total_s = sum(usage.cpu_s for usage in run.usage) or 1.0
    costs: list[tuple[float, float, str, str]] = []
    for stage, counted in stacks.items():
        samples = sum(counted.values()) or 1
        own: Counter[str] = Counter()
        for stack, count in counted.items():
            own[_function(stack.split(";")[-1])] += count
        costs += [
            (cpu_s[stage] * count / samples / total_s, count / samples, stage, name) for name, count in own.items()
        ]
    for rank, (of_all, of_stage, stage, name) in enumerate(sorted(costs, reverse=True)[:top], start=1):
        table.add(rank, stage, name, of_all, of_stage)
    return table


def _function(frame: str) -> str:
    """A frame without its line: "name (posekit/x.py:12)" -> "name (posekit/x.py)"."""
    name, _, place = frame.partition(" (")
    path = place.rstrip(")").rpartition(":")[0]
    return f"{name} ({'/'.join(Path(path).parts[-2:])})" if path else frame


def _torch_profile(engine_name: str, detections: int) -> None:
    """Torch's operators in one pass, those that cost most first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from workers.engines import box_instance, box_mesh, load_engine
    from workers.settings import Sam6d, Stages

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "generated.safetensors"
        if engine_name == "sam6d":
            generated_weights.write(weights)
        stages = Stages(sam6d=Sam6d(weights=str(weights), views=8))
        engine = load_engine(engine_name, stages, device="cpu", threads=1)
        model = engine.practice_model("box", box_mesh())
        engine.prepare(model)
        instances = [box_instance(seed, "box") for seed in range(detections)]
        engine.estimate(instances, {"box": model})
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            engine.estimate(instances, {"box": model})
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=40))


def _py_spy() -> str:
    """The program of this environment, or whichever is on the path."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else "py-spy"


if __name__ == "__main__":
    sys.exit(main())
