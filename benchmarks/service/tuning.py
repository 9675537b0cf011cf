"""Try the settings that decide throughput and latency one by one beside the defaults, in one run.

    python -m benchmarks.service.tuning                     the geometric engine
    python -m benchmarks.service.tuning --engine sam6d      the network, with generated weights
    python -m benchmarks.service.tuning --try pose.workers=1,pose.threads=2 --try decode.workers=1

Each setting gets a server of its own, in turns, `--rounds` times; each round begins with the next of them. Load: 16
clients with 3 masks a request, then one client alone. `vs.` is a setting's detections a second over the defaults' (with
generated weights there are no poses to count). Rates and percentiles are medians of the rounds; `lowest` and `highest`
are the rates of single rounds. If those of two settings overlap, `vs.` says nothing. `requests` is the number of
requests behind the figures, under load and alone, all rounds together. Every answer is compared with the known pose.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.service import trials
from pem.bench.drive import closed_loop
from pem.bench.judge import Judge
from pem.bench.mix import Load, Mix, prepare
from pem.bench.report import Table, machine_line, write_json
from pem.bench.result import Result, summarise
from pem.bench.server import own_server, register

COLUMNS = [
    "settings", "detections/s", "lowest", "highest", "vs.", "p50 ms", "p99 ms", "alone p50 ms", "CPU ms each",
    "MB in all", "requests", "alone",
]  # fmt: skip
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if anything failed or was answered wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["geometric", "sam6d"], default="geometric")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--masks", type=int, default=3, help="detections in a request (default 3)")
    parser.add_argument("--objects", type=int, help="different ones; fewer are onboarded sooner (all)")
    parser.add_argument("--seconds", type=float, default=12.0, help="measured under load, each time (default 12)")
    parser.add_argument("--warmup", type=float, default=3.0, help="seconds of load before (default 3)")
    parser.add_argument("--alone-seconds", type=float, help="measured with one client (a third of --seconds)")
    parser.add_argument("--rounds", type=int, default=2)
    trials.add_set(parser)
    trials.add_try(parser, TRIED)
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for standard output")
    options = parser.parse_args(arguments)

    load = prepare(Mix(masks=(options.masks,), objects=options.objects, engine=options.engine, deadline_ms=300_000))
    tried: dict[str, Tried] = {name: Tried() for name in trials.compared(options)}
    with tempfile.TemporaryDirectory() as folder:
        usual = trials.engine_settings(options.engine, Path(folder)) | trials.given(options)
        for number, name in trials.in_turns(list(tried), options.rounds):
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            under, single = _measure(usual | trials.settings_of(name), load, options, Path(folder) / "data")
            tried[name].loaded.append(under)
            tried[name].alone.append(single)

    table = table_of(tried)
    table.print()
    faults = [f"{name}: {fault}" for name, found in tried.items() for fault in found.faults]
    print("; ".join(faults) or "every answer right, no errors")
    print(
        f"{options.rounds} round(s) of {options.seconds:g} s with {options.clients} clients, engine {options.engine}"
        + (f", all with {', '.join(options.set)}" if options.set else "")
    )
    print(machine_line())
    figures = {"engine": options.engine, "set": trials.given(options), "rows": table.as_dicts(), "faults": faults}
    write_json(options.json, {"tuning": figures})
    return 1 if faults else 0


@dataclass(kw_only=True)
class Tried:
    """The results of one server, one for each round."""

    loaded: list[Result] = field(default_factory=list)
    alone: list[Result] = field(default_factory=list)

    @property
    def detections_hz(self) -> float:
        """Return the rows answered a second under load."""
        return statistics.median(result.detections_hz for result in self.loaded)

    @property
    def faults(self) -> list[str]:
        """Describe why rounds failed, each reason once."""
        return sorted({result.fault for result in (*self.loaded, *self.alone) if result.fault is not None})

    def row(self, defaults_hz: float) -> list[Any]:
        """Return its line of the table, in the order of COLUMNS after the first."""
        rates = [result.detections_hz for result in self.loaded]
        return [
            self.detections_hz,
            min(rates),
            max(rates),
            self.detections_hz / defaults_hz if defaults_hz else float("nan"),
            *(_median(result.latency_ms.get(name) for result in self.loaded) for name in ("p50", "p99")),
            _median(result.latency_ms.get("p50") for result in self.alone),
            _median(_cpu_ms(result) for result in self.loaded),
            _median(sum(usage.rss_peak_mb for usage in result.usage) for result in self.loaded),
            sum(result.answered for result in self.loaded),
            sum(result.answered for result in self.alone),
        ]


def table_of(tried: Mapping[str, Tried]) -> Table:
    """Make a line for each; the defaults must be among them."""
    table = Table(COLUMNS)
    for name, found in tried.items():
        table.add(name, *found.row(tried[trials.DEFAULTS].detections_hz))
    return table


def _measure(settings: dict[str, str], load: Load, options: argparse.Namespace, data: Path) -> tuple[Result, Result]:
    """Measure under load, and with one client alone."""
    judge = Judge(load.questions)
    alone_s = options.alone_seconds or options.seconds / 3
    with own_server(settings, data) as target:
        register(target, load)
        under = closed_loop(
            target,
            load.questions,
            clients=options.clients,
            seconds=options.seconds,
            warmup_s=options.warmup,
            judge=judge,
        )
        results = [summarise(asyncio.run(under))]
        single = closed_loop(target, load.questions, clients=1, seconds=alone_s, warmup_s=0.5, judge=judge)
        results.append(summarise(asyncio.run(single)))
    return results[0], results[1]


def _cpu_ms(result: Result) -> float | None:
    """Return the CPU time of all processes per detection; None if none was answered."""
    detections = result.detections_hz * result.seconds
    return 1e3 * sum(usage.cpu_s for usage in result.usage) / detections if detections else None


def _median(values: Iterable[float | None]) -> float:
    """Return the median of the values that are not None."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else float("nan")


if __name__ == "__main__":
    sys.exit(main())
