"""A soak test: mixed traffic for a long time while workers are killed. Nothing may be wrong, lost or leaked.

Robots ask for 1 to 8 masks at a time in pictures of two sizes and in all three formats, at half of the server's
capacity; every answer is judged. Meanwhile one client sends requests that the server must refuse, another one hangs up
in the middle, and every `--kill-every` seconds a worker (decode, pose and respond in turn) is ended with SIGKILL. At
the end the server is compared with its state after a short warm-up with all of this: its processes, its open files, its
files in shared memory, its memory, and the number of series in /metrics.

    python -m benchmarks.service.soak [--minutes 20] [--kill-every 60] [--json FILE]

Prints a row a minute to standard output, then the table. Exits 1 unless every limit of it holds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import re
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.running import Running, own
from benchmarks.service import checks, memory
from benchmarks.service.checks import Check
from pem.bench import drive
from pem.bench.judge import Judge
from pem.bench.mix import FORMATS, Load, Mix, prepare
from pem.bench.observe import program, stage_names, tree
from pem.bench.report import write_json
from pem.bench.result import Result, summarise
from pem.bench.sample import Question, Run, Target
from pem.bench.server import register
from pem.wire import MSGPACK

SIZES = ((640, 480), (1280, 720))
STAGES = ("decode", "pose", "respond")  # the stages whose workers are killed, in turn
GROWTH = 0.1  # growth of memory that still counts as flat
GROWTH_MB = 2.0  # the same for a process so small that a few freed buffers are a good part of it
FILES = 8  # open files that may come and go: connections kept for a while

_ROUTE = "/api/v1/pose_estimation"
_SHARE = 0.5  # of the server's capacity
_RETURN_S = 60.0  # time limit for replacing a killed worker
_QUIET_S = 30.0  # time limit for everything to calm down once the traffic ended
_WARM_UP_S = 10.0
_PAUSE_S = 0.5  # between requests that must be refused, and between clients that hang up
_THIRDS = 3
_SHM = Path("/dev/shm")


# ------------------------------------------------------------------------------------------ what the server must refuse


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A request that must be refused, and the expected refusal."""

    name: str
    body: bytes
    status: int
    code: str
    content_type: str = MSGPACK


def bad_requests(question: Question) -> list[Bad]:
    """Return ways to spoil a request in MessagePack."""
    tree = msgspec.msgpack.decode(question.body)

    def spoilt(name: str, status: int, code: str, **changes: Any) -> Bad:
        changed = {key: value for key, value in {**tree, **changes}.items() if value is not ...}
        return Bad(name=name, body=msgspec.msgpack.encode(changed), status=status, code=code)

    masks = len(tree["detections"]["masks"])
    strangers = {"masks": tree["detections"]["masks"], "object_ids": ["stranger"] * masks}
    return [
        spoilt("a broken PNG", 400, "bad_data", rgb_image=tree["rgb_image"][: len(tree["rgb_image"]) // 2]),
        spoilt("no camera", 422, "invalid", cam_params=...),
        spoilt("an unknown field", 422, "invalid", colour_image=tree["rgb_image"]),
        spoilt(
            "an unknown object",
            404,
            "unknown_object",
            detections=strangers,
            objects={"stranger": {"object_id": "0123456789abcdef"}},
        ),
        Bad(name="half a body", body=question.body[: len(question.body) // 2], status=400, code="bad_body"),
        Bad(name="a text", body=b"hello", status=415, code="unsupported_media_type", content_type="text/plain"),
    ]


class Troublemakers:
    """Two clients beside the traffic, in threads: one sends requests that must be refused, the other hangs up."""

    def __init__(self, target: Target, question: Question) -> None:
        self._target = target
        self._bad = bad_requests(question)
        self._question = question
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._send_bad, self._hang_up)]
        self.refused = 0
        self.hung_up = 0
        self.problems: list[str] = []

    def __enter__(self) -> Troublemakers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_QUIET_S + 10)

    def _send_bad(self) -> None:
        with httpx.Client(base_url=self._target.url, timeout=_QUIET_S + 5) as client:
            for bad in itertools.cycle(self._bad):
                try:
                    answer = client.post(_ROUTE, content=bad.body, headers={"Content-Type": bad.content_type})
                    self._judge(bad, answer)
                except (httpx.TransportError, msgspec.DecodeError) as error:
                    self.problems.append(f"{bad.name}: {error!r}")
                if self._stop.wait(_PAUSE_S):
                    return

    def _judge(self, bad: Bad, answer: httpx.Response) -> None:
        decode = msgspec.msgpack.decode if "msgpack" in answer.headers.get("content-type", "") else msgspec.json.decode
        code = (decode(answer.content).get("error") or {}).get("code")
        if (answer.status_code, code) == (bad.status, bad.code):
            self.refused += 1
        else:
            self.problems.append(f"{bad.name}: answered {answer.status_code} {code}, not {bad.status} {bad.code}")

    def _hang_up(self) -> None:
        """Hang up in turn: in the middle of the body, right after it, and while the answer is computed."""
        url = httpx.URL(self._target.url)
        head = (
            f"POST {_ROUTE} HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(self._question.body)}\r\n"
            f"Content-Type: {self._question.content_type}\r\n\r\n"
        ).encode()
        whole = head + self._question.body
        for data, pause_s in itertools.cycle(((whole[: len(whole) // 2], 0.0), (whole, 0.0), (whole, 0.05))):
            try:
                with socket.create_connection((url.host, url.port or 80), timeout=10) as connection:
                    connection.sendall(data)
                    time.sleep(pause_s)
                self.hung_up += 1
            except OSError as error:
                self.problems.append(f"a client that hangs up: {error!r}")
            if self._stop.wait(_PAUSE_S):
                return


# ------------------------------------------------------------------------------------------------------------ the kills


class Killer:
    """Kills one worker after another in a thread, and waits for each to be replaced."""

    def __init__(self, server: Running, every_s: float, staff: Counter[str]) -> None:
        self._server = server
        self._every_s = every_s
        self._staff = staff  # stage -> expected number of workers
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.kills = 0
        self.away_s: list[float] = []  # seconds until a worker was ready again
        self.problems: list[str] = []

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._thread.join(_RETURN_S + 10)

    def _run(self) -> None:
        due = time.monotonic()
        for stage in itertools.cycle(STAGES):
            due += self._every_s
            if self._stop.wait(max(0.0, due - time.monotonic())):
                return
            workers = self._server.workers(stage)
            if not workers:
                self.problems.append(f"no {stage} worker is there to be killed")
                continue
            victim = min(workers, key=lambda worker: worker.started_unix)
            os.kill(victim.pid, signal.SIGKILL)
            self.kills += 1
            self._wait_for(stage, victim.pid)

    def _wait_for(self, stage: str, killed: int) -> None:
        begun = time.monotonic()
        while time.monotonic() - begun < _RETURN_S:
            if sum(worker.pid != killed for worker in self._server.workers(stage)) >= self._staff[stage]:
                self.away_s.append(time.monotonic() - begun)
                return
            time.sleep(0.05)
        self.problems.append(f"the {stage} worker was not replaced within {_RETURN_S:g} s")


# --------------------------------------------------------------------------------------------------------- what is left


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The resources of a server at one moment."""

    processes: Counter[str]  # by stage or program
    zombies: int
    open_files: dict[int, int]  # pid -> number of open files
    files: Counter[str]  # in its run directory, without the pids in their names
    series: frozenset[str]  # on /metrics

    @classmethod
    def of(cls, server: Running) -> Snapshot:
        """Take a snapshot now."""
        pids = tree(server.pid)
        stages = stage_names(server.pid)
        return cls(
            processes=Counter("gateway" if pid == server.pid else stages.get(pid) or program(pid) for pid in pids),
            zombies=_zombies(set(pids)),
            open_files={pid: count for pid in pids if (count := _open_files(pid))},
            files=Counter(_without_pid(path, server.run_dir) for path in server.run_dir.rglob("*") if path.is_file()),
            series=frozenset(_series(server.url)),
        )

    def more_than(self, before: Snapshot, gateway: int) -> list[str]:
        """Describe what exists now and did not exist before; a few more open files are ignored."""
        new = [f"process {name} (+{count})" for name, count in (self.processes - before.processes).items()]
        new += [f"{self.zombies - before.zombies} zombies"] if self.zombies > before.zombies else []
        new += [f"file {name} (+{count})" for name, count in (self.files - before.files).items()]
        if self.files_opened(before, gateway) > FILES:
            new.append(f"{self.files_opened(before, gateway)} open files of the gateway")
        return new

    def files_opened(self, before: Snapshot, pid: int) -> int:
        """Return how many more files a process has open."""
        return self.open_files.get(pid, 0) - before.open_files.get(pid, 0)

    def most_files_opened(self, before: Snapshot) -> int:
        """Return `files_opened` of the process that opened most, among those that lived through the run."""
        survivors = self.open_files.keys() & before.open_files.keys()
        return max((self.files_opened(before, pid) for pid in survivors), default=0)


def _zombies(parents: set[int]) -> int:
    """Count dead children that nobody waited for."""
    found = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            found += state == "Z" and int(parent) in parents
    return found


def _open_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:  # it has ended
        return 0


def _without_pid(path: Path, folder: Path) -> str:
    return re.sub(r"-\d+(?=\.state$)", "", str(path.relative_to(folder)))


def _series(url: str) -> Iterator[str]:
    page = httpx.get(f"{url}/metrics", timeout=10).text
    for line in page.splitlines():
        if line and not line.startswith("#"):
            yield line.rpartition(" ")[0]


def shared_memory() -> set[str]:
    """Return the entries of /dev/shm that belong to no living process.

    What a process has mapped belongs to it, whatever its name; a server's run directory carries its pid.
    """
    with os.scandir(_SHM) as there:
        entries = {entry.name: entry.inode() for entry in there}
    mapped: set[int] = set()
    for path in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped.update(int(line.split()[4]) for line in path.read_text().splitlines() if "/dev/shm/" in line)
    free = {name for name, inode in entries.items() if inode not in mapped and not _is_alive(name)}
    return {name for name in free if (_SHM / name).exists()}


def _is_alive(name: str) -> bool:
    """Return True if this is the run directory of a living server."""
    found = re.fullmatch(r"pem-server-(\d+)-.*", name)
    return found is not None and Path(f"/proc/{found[1]}").exists()


# ------------------------------------------------------------------------------------------------------------- the soak


@dataclass(kw_only=True)
class Seen:
    """The results of a soak."""

    requests: int = 0
    poses: int = 0
    wrong: int = 0
    changed: int = 0
    unexpected: Counter[str] = field(default_factory=Counter)  # status and code -> how often
    refused: int = 0
    hung_up: int = 0
    kills: int = 0
    away_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    readings: list[memory.Reading] = field(default_factory=list)
    before: Snapshot | None = None
    halfway: frozenset[str] = frozenset()  # series of /metrics after half of the time
    after: Snapshot | None = None
    gateway: int = 0  # pid

    def add(self, run: Run, result: Result) -> None:
        """Add one stretch of traffic."""
        self.requests += result.offered
        self.poses += sum(sample.poses for sample in run.samples)
        self.wrong += result.wrong
        self.changed += result.changed
        self.unexpected.update(result.errors)


Tell = Callable[[str], None]


def soak(server: Running, load: Load, *, seconds: float, kill_every_s: float, tell: Tell) -> Seen:
    """Run warm-up, traffic with kills, and quiet; a row of figures goes to `tell` each minute.

    The warm-up has kills, too: requests that wait out an outage take memory that a fresh server never had.
    """
    target = Target(url=server.url, pid=server.pid)
    question = next(question for question in load.questions if question.content_type == MSGPACK)
    judge = Judge(load.questions)
    seen = Seen(gateway=server.pid)
    tell(f"asking each of {len(load.questions)} questions alone, then warming up")
    staff = Counter(worker.stage for worker in server.workers())
    with Troublemakers(target, question):
        rate_hz = _rate_hz(target, load, judge, min(_WARM_UP_S, seconds / 6))
        warm_up_s = min(2 * _WARM_UP_S, seconds / 3)
        with Killer(server, warm_up_s / (len(STAGES) + 1), staff):
            _traffic(target, load, judge, rate_hz=rate_hz, seconds=warm_up_s, seed=0)
    _quiet(server, None)
    seen.before = Snapshot.of(server)
    tell(f"{rate_hz:.3g} requests/s for {seconds / 60:.3g} minutes, a kill every {kill_every_s:g} s")
    stretch_s = min(60.0, seconds / _THIRDS)
    with (
        memory.MemoryWatch(server.pid, every_s=min(2.0, seconds / 20)) as watch,
        Troublemakers(target, question) as trouble,
        Killer(server, kill_every_s, staff) as killer,
    ):
        end = time.monotonic() + seconds
        for number in itertools.count():
            left_s = end - time.monotonic()
            if left_s < min(1.0, stretch_s / 2):
                break
            run = _traffic(target, load, judge, rate_hz=rate_hz, seconds=min(stretch_s, left_s), seed=number)
            result = summarise(run)
            seen.add(run, result)
            if end - time.monotonic() > seconds / 2 or not seen.halfway:
                seen.halfway = frozenset(_series(server.url))
            tell(_row(number, result, killer.kills, watch.readings[-1], _open_files(server.pid)))
    seen.readings = watch.readings
    seen.refused, seen.hung_up = trouble.refused, trouble.hung_up
    seen.kills, seen.away_s = killer.kills, killer.away_s
    seen.problems = [*trouble.problems, *killer.problems]
    _quiet(server, seen.before)
    seen.after = Snapshot.of(server)
    return seen


def _rate_hz(target: Target, load: Load, judge: Judge, seconds: float) -> float:
    """Return half of the server's capacity, in requests a second."""
    run = asyncio.run(drive.closed_loop(target, load.questions, clients=4, seconds=seconds, judge=judge))
    return max(0.5, _SHARE * summarise(run).requests_hz)


def _traffic(target: Target, load: Load, judge: Judge, *, rate_hz: float, seconds: float, seed: int) -> Run:
    """Run one stretch of traffic, until its last answer."""
    return asyncio.run(
        drive.open_loop(target, load.questions, rate_hz=rate_hz, seconds=seconds, warmup_s=0.0, seed=seed, judge=judge)
    )


def _quiet(server: Running, before: Snapshot | None) -> None:
    """Wait until nothing is being computed and, for at most _QUIET_S, until nothing exists that was not in `before`."""
    end = time.monotonic() + _QUIET_S
    while time.monotonic() < end:
        status = httpx.get(f"{server.url}/api/v1/status", timeout=10).json()
        idle = not status["queue"]["requests"]
        if idle and before is None:
            time.sleep(1.0)  # dropped connections are closed by then
            return
        if idle and before is not None and not Snapshot.of(server).more_than(before, server.pid):
            return
        time.sleep(0.25)


def _row(number: int, result: Result, kills: int, reading: memory.Reading, files: int) -> str:
    """Format one stretch as a line."""
    failed = ", ".join(f"{count} x {kind}" for kind, count in result.errors.items()) or "none"
    p99 = f"{result.latency_ms['p99']:.0f}" if result.latency_ms else "-"
    return (
        f"{number + 1:4d}  {result.requests_hz:6.2f} requests/s  {result.poses_hz:6.2f} poses/s  p99 {p99:>6} ms  "
        f"errors: {failed}  wrong: {result.wrong + result.changed}  kills: {kills}  "
        f"{sum(reading.resident_mb.values()):.0f} MB in {len(reading.resident_mb)} processes, {files} open files"
    )


def judged(seen: Seen, left_behind: Sequence[str]) -> list[Check]:
    """Return the figures and their limits. `left_behind`: new entries of /dev/shm after the stop."""
    assert seen.before is not None
    assert seen.after is not None
    processes, before = seen.after.processes, seen.before.processes
    return [
        checks.told("requests", seen.requests),
        checks.told("poses", seen.poses),
        checks.none("poses that are wrong under load alone", seen.wrong),
        checks.none("rows that are others than when asked alone", seen.changed),
        checks.none("requests without their answer", seen.unexpected.total()),
        checks.at_least("bad requests refused as they should be", seen.refused, 1),
        checks.told("clients that hung up", seen.hung_up),
        checks.none("other things that went wrong", len(seen.problems)),
        checks.at_least("workers killed", seen.kills, 1),
        checks.told("until a killed worker was replaced, median s", statistics.median(seen.away_s or [float("nan")])),
        checks.told("until a killed worker was replaced, longest s", max(seen.away_s, default=float("nan"))),
        checks.told("processes before", before.total()),
        checks.none("processes more than before", (processes - before).total()),
        checks.none("processes fewer than before", (before - processes).total()),
        checks.none("zombies", seen.after.zombies),
        checks.at_most("files open in the gateway, more", seen.after.files_opened(seen.before, seen.gateway), FILES),
        checks.at_most("files open in any other, more", seen.after.most_files_opened(seen.before), FILES),
        checks.none("files more in the run directory", (seen.after.files - seen.before.files).total()),
        checks.none("entries of /dev/shm left after the stop", len(left_behind)),
        *(
            checks.at_most(
                f"memory of {growth.name} ({growth.early_mb:.0f} MB), growth in %",
                100 * growth.share,
                100 * max(GROWTH, GROWTH_MB / growth.early_mb),
            )
            for growth in memory.by_name(seen.readings, _THIRDS)
        ),
        checks.none("series of /metrics more than halfway", len(seen.after.series - seen.halfway)),
    ]


def details(seen: Seen, left_behind: Sequence[str]) -> list[str]:
    """Explain the figures that do not hold."""
    assert seen.before is not None
    assert seen.after is not None
    lines = [f"{count} x {kind}" for kind, count in seen.unexpected.items()]
    lines += _first(seen.problems)
    lines += seen.after.more_than(seen.before, seen.gateway)
    lines += _first(f"/dev/shm/{name}" for name in left_behind)
    lines += _first(f"series {name}" for name in sorted(seen.after.series - seen.halfway))
    return lines


def _first(lines: Iterable[str], count: int = 20) -> list[str]:
    return list(itertools.islice(lines, count))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="of traffic (20)")
    parser.add_argument("--kill-every", type=float, default=60.0, metavar="SECONDS", help="a worker (60)")
    parser.add_argument("--masks", default="1,2,3,4,5,6,7,8", help="of the requests (1,2,3,4,5,6,7,8)")
    parser.add_argument("--scenes", type=int, default=2, help="pictures of each size (2)")
    parser.add_argument("--objects", type=int, default=None, help="different ones (all)")
    parser.add_argument("--engine", default="auto", help="geometric, sam6d or auto (auto)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the server")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here (- for standard output)")
    options = parser.parse_args(arguments)
    settings = {name.replace(".", "_"): value for name, value in (one.split("=", 1) for one in options.set)}

    def tell(words: str) -> None:
        print(words, flush=True)

    mix = Mix(
        masks=tuple(int(count) for count in options.masks.split(",")),
        sizes=SIZES,
        formats=FORMATS,
        engine=options.engine,
        scenes=options.scenes,
        objects=options.objects,
    )
    load = prepare(mix)
    stood = shared_memory()
    with (
        tempfile.TemporaryDirectory(prefix="pem-soak-") as folder,
        own(Path(folder) / "data", settings) as server,
    ):
        register(Target(url=server.url), load, tell)
        seen = soak(server, load, seconds=60 * options.minutes, kill_every_s=options.kill_every, tell=tell)
    left_behind = sorted(shared_memory() - stood)
    found = checks.table(judged(seen, left_behind))
    holds = checks.all_hold(judged(seen, left_behind))
    found.print()
    for line in details(seen, left_behind):
        print(line)
    figures = {"options": vars(options), "figures": found.as_dicts(), "details": details(seen, left_behind)}
    write_json(options.json, {"soak": {**figures, "holds": holds}})
    print("everything holds" if holds else "NOT everything holds")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
