"""Compare poses a second with other ways to serve the same engine: this server and its peers in turns, in one run.

    python -m benchmarks.service.throughput [--engine geometric] [--clients 1,8,16,32] [--seconds 15] [--rounds 2]
        [--peers fastapi-loop,fastapi-threads,fastapi-processes,fastapi-batcher,litserve,bentoml] [--json FILE]

All get the same bodies from the same clients (closed loops) and do the same work on them: checks, decoding, engine and
rows are this project's in each; only the serving differs. Every answer is judged, and compared with the one that this
server gave when asked alone. In each round all of them run one after the other, each in fresh processes. Each round
begins with the next of them, so that changes in the machine's speed affect all alike. A peer's settings can be tried:
`--peers litserve,litserve:engines=1:threads=2`.

Rates are those of all rounds together; `lowest` and `highest` are those of single rounds. `rounds`, `seconds` and
`requests` tell how much data a row has. `vs.` is this server's detections a second over the other's. Do not trust a row
with a `*`: requests failed in it, or answers were wrong, so its `vs.` is not a fair comparison (nor is that of any row
with as many clients, if the fault is this server's). Memory is the sum of the processes' resident memory; shared pages
count for each. Exits 1 if an answer was wrong or missing, or a peer did not run.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.environment import PeerFailed
from benchmarks.peers.start import PEERS, Entry, make_setup, running
from benchmarks.service.trials import engine_settings, in_turns
from pem.bench.drive import CannotBegin, closed_loop
from pem.bench.judge import Judge
from pem.bench.mix import Load, Mix, prepare
from pem.bench.report import Table, machine_line, write_json
from pem.bench.result import Result, summarise
from pem.bench.sample import Question, Run, Target
from pem.bench.server import own_server, register
from pem.host.child import ServerTrouble
from pem.host.machine import usable_cores, usable_memory_mb
from workers.settings import Pose, Stages, fitted, pose_workers

OURS = "this server"
DEADLINE_MS = 600_000  # peers refuse nobody, so nobody is to be refused here
ANSWER_LIMIT_S = 300.0
COLUMNS = [
    "server", "clients", "detections/s", "lowest", "highest", "poses/s", "p50 ms", "p99 ms", "errors",
    "without pose", "wrong", "changed", "CPU s each", "memory MB", "rounds", "seconds", "requests", "vs.",
]  # fmt: skip
MARK = "*"  # marks a row in which something went wrong

Start = Callable[[], AbstractContextManager[Target]]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """This server or a peer, taking part."""

    title: str
    start: Start
    words: str  # description of its settings


@dataclass(kw_only=True)
class Tally:
    """The results of one contender with one number of clients, over all rounds."""

    results: list[Result] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)

    def add(self, run: Run) -> None:
        """Add one round."""
        self.results.append(summarise(run))
        self.latencies_ms += [sample.latency_s * 1e3 for sample in run.samples if sample.ok]

    @property
    def detections_hz(self) -> float:
        """Return the rows answered a second."""
        return self._mean(lambda result: result.detections_hz)

    def row(self, title: str, clients: int, ours: Tally) -> list[Any]:
        """Return its figures, in the order of COLUMNS."""
        rates = [result.detections_hz for result in self.results]
        answered = self.detections_hz * sum(result.seconds for result in self.results)
        cpu_s = sum(one.cpu_s for result in self.results for one in result.usage)
        return [
            title,
            clients,
            self.detections_hz,
            min(rates),
            max(rates),
            self._mean(lambda result: result.poses_hz),
            self._percentile(50),
            self._percentile(99),
            self._sum(lambda result: sum(result.errors.values())),
            self._sum(lambda result: result.rejected),
            self._sum(lambda result: result.wrong),
            self._sum(lambda result: result.changed),
            cpu_s / answered if answered else float("nan"),
            max(round(sum(one.rss_peak_mb for one in result.usage)) for result in self.results),
            len(self.results),
            round(sum(result.seconds for result in self.results), 1),
            self._sum(lambda result: result.offered),
            ours.detections_hz / self.detections_hz if self.detections_hz else float("inf"),
        ]

    @property
    def marked(self) -> bool:
        """Return True if something in it went wrong; a refusal counts."""
        return any(result.fault is not None or result.errors for result in self.results)

    @property
    def faults(self) -> list[str]:
        """Describe why a round failed."""
        found = [(result.fault, result.errors) for result in self.results if result.fault is not None]
        return [f"{fault} {errors}" if errors else fault for fault, errors in found]

    def _mean(self, rate_hz: Callable[[Result], float]) -> float:
        seconds = sum(result.seconds for result in self.results)
        if not seconds:
            return float("nan")
        return sum(rate_hz(result) * result.seconds for result in self.results) / seconds

    def _sum(self, count: Callable[[Result], int]) -> int:
        return sum(count(result) for result in self.results)

    def _percentile(self, percent: float) -> float:
        return float(np.percentile(self.latencies_ms, percent)) if self.latencies_ms else float("nan")


@dataclass(kw_only=True)
class Contest:
    """All results."""

    tallies: dict[tuple[str, int], Tally] = field(default_factory=dict)  # by title and number of clients
    failed: dict[str, str] = field(default_factory=dict)  # contenders that did not run, and the reasons

    def table(self) -> Table:
        """Return all lines, by number of clients, for people, with a mark at the server and the `vs.` that need one."""
        table = Table(COLUMNS)
        for figures in self.figures():
            mark = figures.pop("marked")
            unlike = figures.pop("vs. marked")
            figures["server"] += f" {MARK}" if mark else ""
            figures["vs."] = f"{figures['vs.']:.3g}" + (f" {MARK}" if unlike else "")
            table.add(*figures.values())
        return table

    def figures(self) -> list[dict[str, Any]]:
        """Return all lines for machines: COLUMNS, and if anything went wrong in a row or in what its `vs.` compares."""
        rows = []
        for (title, clients), tally in sorted(self.tallies.items(), key=lambda item: item[0][1]):
            ours = self.tallies.get((OURS, clients), Tally())
            row = dict(zip(COLUMNS, tally.row(title, clients, ours), strict=True))
            rows.append(row | {"marked": tally.marked, "vs. marked": tally.marked or ours.marked})
        return rows

    @property
    def wrong_alone(self) -> list[str]:
        """Describe the detections that the engine itself gets wrong."""
        return next((tally.results[0].wrong_alone_named for tally in self.tallies.values()), [])

    @property
    def faults(self) -> list[str]:
        """Describe everything to know before trusting the figures."""
        wrong = [
            f"{title}, {n} clients: {words}" for (title, n), tally in self.tallies.items() for words in tally.faults
        ]
        return [*wrong, *(f"{title} did not run: {why}" for title, why in self.failed.items())]


def contest(
    contenders: Sequence[Contender],
    questions: Sequence[Question],
    *,
    clients: Sequence[int],
    rounds: int,
    seconds: float,
    warmup_s: float,
    tell: Callable[[str], None],
) -> Contest:
    """Run all contenders in turns.

    The first is asked every question alone before; all answers are compared with those.
    """
    found = Contest()
    judge = Judge(questions)
    for round_, contender in in_turns(contenders, rounds):
        if contender.title in found.failed:
            continue
        tell(f"round {round_ + 1} of {rounds}: {contender.title}")
        try:
            with contender.start() as target:
                for count in clients:
                    run = asyncio.run(
                        closed_loop(
                            target,
                            questions,
                            clients=count,
                            seconds=seconds,
                            warmup_s=warmup_s,
                            timeout_s=ANSWER_LIMIT_S,
                            judge=judge,
                        )
                    )
                    found.tallies.setdefault((contender.title, count), Tally()).add(run)
        except (PeerFailed, ServerTrouble, CannotBegin) as error:
            found.failed[contender.title] = str(error)
    return found


# ----------------------------------------------------------------------------------------------------- who takes part


def ourselves(stages: Stages, settings: Mapping[str, str], data: Path) -> Contender:
    """Return this server, with its defaults."""
    pose, decode = stages.pose, stages.decode
    words = (
        f"Mosec; {decode.workers} processes decode, {pose.workers} have an engine with {pose.threads} thread(s); "
        f"passes of {pose.pass_detections} detections, gathered for {pose.batch_wait_ms} ms while all of them are busy"
    )
    return Contender(title=OURS, start=partial(own_server, settings, data), words=words)


def peer(entry: Entry, stages: Stages, given: Mapping[str, Any], folder: Path) -> Contender:
    """Return a peer on the same objects."""
    setup = {**given, **entry.settings(stages)}
    words = entry.describe(make_setup({**setup, "port": 0, "ready_dir": ""}))
    return Contender(title=entry.title, start=partial(running, entry, setup, folder), words=words)


def prepare_data(load: Load, settings: Mapping[str, str], data: Path, tell: Callable[[str], None]) -> None:
    """Make a data directory in which every object is onboarded."""
    with own_server(settings, data) as target:
        register(target, load, tell)


def main() -> int:
    """Measure, print, judge."""
    options = _options()
    device = "cuda:0" if options.device == "cuda" else "cpu"
    cores = usable_cores()
    workers = pose_workers(Pose(), device, cores, usable_memory_mb())
    stages = fitted(Stages(devices=(device,) * workers), cores)
    entries = [Entry.of(text) for text in options.peers.split(",") if text]
    with tempfile.TemporaryDirectory(prefix="throughput-") as name:
        folder = Path(name)
        data = folder / "data"
        settings = {"device": options.device, "engine": options.engine}
        given: dict[str, Any] = {"data": str(data), "engine": options.engine, "device": device}
        if options.engine == "sam6d":
            if options.weights is not None:
                settings |= {"sam6d.weights": str(Path(options.weights).resolve()), "sam6d.views": str(options.views)}
            else:
                settings |= engine_settings(options.engine, folder, options.views)
            given |= {"weights": settings["sam6d.weights"], "views": options.views}
        _tell("rendering the questions")
        load = prepare(Mix(masks=(options.masks,), objects=options.objects, deadline_ms=DEADLINE_MS))
        prepare_data(load, settings, data, _tell)
        contenders = [ourselves(stages, settings, data), *(peer(one, stages, given, folder) for one in entries)]
        clients = [int(count) for count in options.clients.split(",")]
        found = contest(
            contenders,
            load.questions,
            clients=clients,
            rounds=options.rounds,
            seconds=options.seconds,
            warmup_s=options.warmup,
            tell=_tell,
        )
    found.table().print()
    print(
        f"\n{options.masks} masks a request, engine {options.engine}, {device}, {options.rounds} round(s) of "
        f"{options.seconds:g} s with {options.warmup:g} s of load before"
    )
    if any(row["vs. marked"] for row in found.figures()):
        print(
            f"{MARK} requests failed or answers were wrong, see below: such a row's figures compare what is not alike"
        )
    print(machine_line())
    for contender in contenders:
        print(f"- {contender.title}: {contender.words}")
    if found.wrong_alone:
        print(f"{len(found.wrong_alone)} detections are wrong without load as well, such as {found.wrong_alone[0]}")
    for words in found.faults:
        print(f"NOT RIGHT: {words}")
    settings_in_words = {contender.title: contender.words for contender in contenders}
    write_json(options.json, {"throughput": found.figures(), "settings": settings_in_words, "faults": found.faults})
    return 1 if found.faults else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("geometric", "sam6d"), default="geometric")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--clients", default="1,8,16,32", metavar="N,N", help="clients at a time (1,8,16,32)")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="NAME,NAME", help=f"({','.join(PEERS)})")
    parser.add_argument("--seconds", type=float, default=15.0, help="measured in each round (15)")
    parser.add_argument("--warmup", type=float, default=3.0, help="seconds of load before (3)")
    parser.add_argument("--rounds", type=int, default=2, help="how often they take turns (2)")
    parser.add_argument("--masks", type=int, default=3, help="detections of a request (3)")
    parser.add_argument("--objects", type=int, help="different CAD models; fewer are onboarded sooner (13)")
    parser.add_argument("--weights", metavar="FILE", help="of the network, as imported; without it generated ones")
    parser.add_argument(
        "--views", type=int, default=42, help="the network's, of each object; fewer onboard sooner (42)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures here (- for standard output)")
    return parser.parse_args()


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
