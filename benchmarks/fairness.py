"""What a client with one mask sees while others send forty at a time.

    python -m benchmarks.fairness [--seconds 20] [--crowd 4]

The client is measured alone, then beside a crowd with API keys of its own (the queue takes turns between keys), then
with the crowd's key (within a key the smallest request goes first). Every answer is compared with the known pose.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import tempfile
from pathlib import Path

from benchmarks.load.drive import closed_loop
from benchmarks.load.mix import Mix, prepare
from benchmarks.load.report import Table, write_json
from benchmarks.load.result import Result, summarise
from benchmarks.load.sample import Question, Run, Target
from benchmarks.load.server import own_server, register
from serve import keys


def main() -> int:
    """Print the table; 1 where anything failed or was answered wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="measured in each situation (default 20)")
    parser.add_argument("--crowd", type=int, default=4, help="clients that send large requests (default 4)")
    parser.add_argument("--masks", type=int, default=40, help="of their requests (default 40)")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for standard output")
    options = parser.parse_args()

    small, large = (prepare(Mix(masks=(masks,), deadline_ms=300_000)) for masks in (1, options.masks))
    table = Table(["the client with one mask", "p50 ms", "p99 ms", "p50 / alone", "its poses/s", "the others' poses/s"])
    results: list[Result] = []

    with tempfile.TemporaryDirectory() as folder:
        keys_file = Path(folder) / "keys.json"
        modest, greedy = (keys.add(keys_file, name) for name in ("modest", "greedy"))
        with own_server({"keys_file": str(keys_file)}) as server:
            target = dataclasses.replace(server, api_key=modest)
            crowd = dataclasses.replace(server, api_key=greedy)
            for load in (small, large):
                register(target, load, lambda words: print(words, file=sys.stderr))

            def row(name: str, key: str | None, clients: int) -> None:
                one = dataclasses.replace(target, api_key=key)
                together = _beside(one, small.questions, crowd, large.questions, clients, options.seconds)
                found = [summarise(run) for run in asyncio.run(together)]
                results.extend(found)
                latency = found[0].latency_ms
                alone_ms = results[0].latency_ms["p50"]
                others = found[1].poses_hz if clients else 0.0
                table.add(name, latency["p50"], latency["p99"], latency["p50"] / alone_ms, found[0].poses_hz, others)

            row("alone", modest, 0)
            row(f"beside {options.crowd} with {options.masks} masks", modest, options.crowd)
            row("the same, all with one key", greedy, options.crowd)
    table.print()
    faults = [result.fault for result in results if result.fault is not None]
    print("; ".join(faults) or "every answer right")
    write_json(options.json, {"fairness": table.as_dicts()})
    return 1 if faults else 0


async def _beside(
    target: Target, small: list[Question], crowd: Target, large: list[Question], clients: int, seconds: float
) -> list[Run]:
    """The runs of the one client, and of the crowd where there is one: it begins before and ends after."""
    if not clients:
        return [await closed_loop(target, small, clients=1, seconds=seconds)]
    around = asyncio.create_task(closed_loop(crowd, large, clients=clients, seconds=seconds + 30.0, warmup_s=1.0))
    await asyncio.sleep(15.0)  # the large questions are asked alone first
    inside = await closed_loop(target, small, clients=1, seconds=seconds)
    return [inside, await around]


if __name__ == "__main__":
    sys.exit(main())
