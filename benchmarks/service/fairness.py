"""Measure what a client with one mask experiences while others send forty at a time.

    python -m benchmarks.service.fairness [--seconds 20] [--crowd 4] [--set pose.workers=1]
    python -m benchmarks.service.fairness --try queue.passes_in_flight=1 --try pose.pass_detections=8 --rounds 2

The client is measured alone, then beside a crowd with API keys of its own (the queue takes turns between keys), then
with the crowd's key (within a key the smallest request goes first). Every answer is compared with the known pose.

With `--try`, a server with other settings takes its turn beside the one with the defaults; `--set` applies to all of
them. Percentiles are those of all rounds together. `lowest` and `highest` are the medians of single rounds. `requests`
is the number of the one client's requests behind the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.service import trials
from pem.bench.drive import closed_loop
from pem.bench.mix import Load, Mix, prepare
from pem.bench.report import Table, machine_line, write_json
from pem.bench.result import summarise
from pem.bench.sample import Question, Run, Target
from pem.bench.server import own_server, register
from serve.gateway import keys

COLUMNS = [
    "settings", "the client with one mask", "p50 ms", "lowest", "highest", "p99 ms", "p50 / alone", "its poses/s",
    "the others' poses/s", "requests",
]  # fmt: skip
Runs = list[Run]  # of the one client, and of the crowd if there is one
_ONE, _CROWD = slice(0, 1), slice(1, None)  # indices into Runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if anything failed or was answered wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="measured in each situation (default 20)")
    parser.add_argument("--rounds", type=int, default=1, help="how often the settings take turns (default 1)")
    parser.add_argument("--crowd", type=int, default=4, help="clients that send large requests (default 4)")
    parser.add_argument("--masks", type=int, default=40, help="of their requests (default 40)")
    parser.add_argument("--objects", type=int, help="different ones; fewer are onboarded sooner (all)")
    trials.add_set(parser)
    trials.add_try(parser)
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for standard output")
    options = parser.parse_args(arguments)

    small, large = (
        prepare(Mix(masks=(masks,), objects=options.objects, deadline_ms=300_000)) for masks in (1, options.masks)
    )
    crowd = f"beside {options.crowd} with {options.masks} masks"
    found: dict[str, dict[str, list[Runs]]] = defaultdict(lambda: defaultdict(list))  # by settings, then by situation
    with tempfile.TemporaryDirectory() as folder:
        for number, name in trials.in_turns(trials.compared(options), options.rounds):
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            settings = trials.given(options) | trials.settings_of(name)
            for situation, runs in _measure(settings, small, large, options, Path(folder), crowd).items():
                found[name][situation].append(runs)

    table = Table(COLUMNS)
    for name in trials.compared(options):
        for row in rows(found[name]):
            table.add(name, *row)
    table.print()
    faults = [
        f"{name}, {situation}: {fault}"
        for name, each in found.items()
        for situation, rounds in each.items()
        for runs in rounds
        for fault in (summarise(run).fault for run in runs)
        if fault is not None
    ]
    print("; ".join(faults) or "every answer right")
    words = f"{options.rounds} round(s) of {options.seconds:g} s in each situation"
    print(words + (f", all with {', '.join(options.set)}" if options.set else ""))
    print(machine_line())
    write_json(options.json, {"fairness": table.as_dicts(), "set": trials.given(options), "faults": faults})
    return 1 if faults else 0


def rows(found: dict[str, list[Runs]]) -> list[list[Any]]:
    """Return the lines of one server, in the order of COLUMNS after the first.

    found: its rounds by situation, alone first.
    """
    lines = []
    alone_ms = 0.0
    for situation, rounds in found.items():
        ones = [[sample.latency_s * 1e3 for sample in runs[0].samples if sample.ok] for runs in rounds]
        latencies_ms = [latency_ms for one in ones for latency_ms in one]
        p50, p99 = (_percentile(latencies_ms, percent) for percent in (50, 99))
        alone_ms = alone_ms or p50
        medians = [_percentile(one, 50) for one in ones]
        mine_hz, others_hz = (_poses_hz([run for runs in rounds for run in runs[part]]) for part in (_ONE, _CROWD))
        line = [situation, p50, min(medians), max(medians), p99, p50 / alone_ms, mine_hz, others_hz, len(latencies_ms)]
        lines.append(line)
    return lines


def _percentile(latencies_ms: Sequence[float], percent: float) -> float:
    """Return a percentile that is one of the values; NaN for no values."""
    return float(np.percentile(latencies_ms, percent, method="higher")) if latencies_ms else float("nan")


def _poses_hz(runs: Sequence[Run]) -> float:
    seconds = sum(run.seconds for run in runs)
    return sum(summarise(run).poses_hz * run.seconds for run in runs) / seconds if seconds else 0.0


def _measure(
    settings: dict[str, str], small: Load, large: Load, options: argparse.Namespace, folder: Path, beside: str
) -> dict[str, Runs]:
    """Measure the situations in order, on a server of its own."""
    keys_file = folder / "keys.json"
    keys_file.unlink(missing_ok=True)
    modest, greedy = (keys.add(keys_file, name) for name in ("modest", "greedy"))
    with own_server({**settings, "keys_file": str(keys_file)}, folder / "data") as server:
        target = dataclasses.replace(server, api_key=modest)
        crowd = dataclasses.replace(server, api_key=greedy)
        for load in (small, large):
            register(target, load, lambda words: print(words, file=sys.stderr))

        def run(key: str, clients: int) -> Runs:
            one = dataclasses.replace(target, api_key=key)
            return asyncio.run(_beside(one, small.questions, crowd, large.questions, clients, options.seconds))

        return {
            "alone": run(modest, 0),
            beside: run(modest, options.crowd),
            "the same, all with one key": run(greedy, options.crowd),
        }


async def _beside(
    target: Target, small: list[Question], crowd: Target, large: list[Question], clients: int, seconds: float
) -> Runs:
    """Return the runs of the one client, and of the crowd if there is one, which begins before and ends after it."""
    if not clients:
        return [await closed_loop(target, small, clients=1, seconds=seconds)]
    around = asyncio.create_task(closed_loop(crowd, large, clients=clients, seconds=seconds + 30.0, warmup_s=1.0))
    await asyncio.sleep(15.0)  # first ask the large questions alone
    inside = await closed_loop(target, small, clients=1, seconds=seconds)
    return [inside, await around]


if __name__ == "__main__":
    sys.exit(main())
