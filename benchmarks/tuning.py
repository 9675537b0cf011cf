"""The settings that decide throughput and latency, tried one by one beside the defaults, in one run.

    python -m benchmarks.tuning                     the geometric engine
    python -m benchmarks.tuning --engine sam6d      the network, with generated weights
    python -m benchmarks.tuning --try pose.workers=1,pose.threads=2 --try decode.workers=1

Each is a server of its own, in turns, `--rounds` times: 16 clients with 3 masks a request, then one client alone. `vs.`
is a setting's poses a second over the defaults'. Every answer is compared with the known pose.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmarks import generated_weights
from benchmarks.load.drive import closed_loop
from benchmarks.load.mix import Load, Mix, prepare
from benchmarks.load.report import Table, write_json
from benchmarks.load.result import Result, summarise
from benchmarks.load.server import own_server, register

DEFAULTS = "defaults"
TRIED = (
    "pose.workers=1,pose.threads=1",
    "pose.workers=1,pose.threads=2",
    "pose.workers=1,pose.threads=2,pose.batch_requests=16,pose.pass_detections=8",
    "pose.workers=3",
    "pose.batch_requests=4",
    "pose.pass_detections=2",
    "pose.pass_detections=8",
    "pose.batch_wait_ms=0",
    "pose.batch_wait_ms=50",
    "queue.passes_in_flight=1",
    "queue.passes_in_flight=4",
    "decode.workers=1",
    "decode.workers=3",
)


def main() -> int:
    """Print the table; 1 where anything failed or was answered wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=["geometric", "sam6d"], default="geometric")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--masks", type=int, default=3, help="detections in a request (default 3)")
    parser.add_argument("--seconds", type=float, default=12.0, help="measured under load, each time (default 12)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--try", dest="tried", action="append", metavar="NAME=VALUE,...", help="instead of the usual")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for standard output")
    options = parser.parse_args()

    load = prepare(Mix(masks=(options.masks,), engine=options.engine, deadline_ms=300_000))
    tried = [DEFAULTS, *(options.tried or TRIED)]
    loaded: dict[str, list[Result]] = defaultdict(list)
    alone: dict[str, list[Result]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for name in tried:
                print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
                settings = _settings(name, options.engine, Path(folder))
                under, single = _measure(settings, load, options.clients, options.seconds, Path(folder) / "data")
                loaded[name].append(under)
                alone[name].append(single)

    table = Table(["settings", "poses/s", "vs.", "p50 ms", "p99 ms", "alone p50 ms", "CPU ms a pose", "MB in all"])
    best = {name: statistics.median(result.poses_hz for result in found) for name, found in loaded.items()}
    for name in tried:
        found = loaded[name]
        table.add(
            name,
            best[name],
            best[name] / best[DEFAULTS],
            statistics.median(result.latency_ms["p50"] for result in found),
            statistics.median(result.latency_ms["p99"] for result in found),
            statistics.median(result.latency_ms["p50"] for result in alone[name]),
            statistics.median(1e3 * _cpu_s(result) / (result.poses_hz * result.seconds) for result in found),
            statistics.median(sum(usage.rss_peak_mb for usage in result.usage) for result in found),
        )
    table.print()
    everything = [result for results in (*loaded.values(), *alone.values()) for result in results]
    faults = sorted({result.fault for result in everything if result.fault is not None})
    print("; ".join(faults) or "every answer right, no errors")
    write_json(options.json, {"tuning": {"engine": options.engine, "rows": table.as_dicts()}})
    return 1 if faults else 0


def _settings(name: str, engine: str, folder: Path) -> dict[str, str]:
    settings = {} if name == DEFAULTS else dict(pair.split("=", 1) for pair in name.split(","))
    settings["engine"] = engine
    if engine == "sam6d":
        weights = folder / "generated.safetensors"
        if not weights.exists():
            generated_weights.write(weights)
        settings |= {"sam6d.weights": str(weights), "sam6d.views": "8"}
    return settings


def _measure(settings: dict[str, str], load: Load, clients: int, seconds: float, data: Path) -> tuple[Result, Result]:
    with own_server(settings, data) as target:
        register(target, load)
        under = closed_loop(target, load.questions, clients=clients, seconds=seconds, warmup_s=3.0)
        results = [summarise(asyncio.run(under))]
        single = closed_loop(target, load.questions, clients=1, seconds=seconds / 3, warmup_s=0.5)
        results.append(summarise(asyncio.run(single)))
    return results[0], results[1]


def _cpu_s(result: Result) -> float:
    return sum(usage.cpu_s for usage in result.usage)


if __name__ == "__main__":
    sys.exit(main())
