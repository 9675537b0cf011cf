"""Overload a server with three times the load that it can carry, and measure how soon it recovers.

The capacity is measured before and after, with clients that wait for their answers: machines change their speed.
Between the two, `--times` as many requests come in an open loop, whether or not they are answered. Each has a deadline,
and the server must refuse at once what it cannot answer in time. A lone client from another address asks now and then
meanwhile; its waits show how the server shares its time, and when it has recovered. The load generator runs on the same
cores, so its own share of them is reported.

    python -m benchmarks.service.overload [--seconds 60] [--times 3] [--deadline-ms 5000] [--set pose.threads=1]
        [--json FILE]

Exits 1 unless every limit of the table holds. Some of the limits need an explanation:

- The rate of answers, to the load and to the lone client, is compared with the mean of the two capacities.
- Time to a refusal is counted from when the request was sent; delays of the generator itself are reported separately.
- The server must answer what it has let in, for up to a deadline after the load's last request. So the lone client's
  first request after that one must be answered within 2 s. A lone request must take no longer than before the load
  2 s after the load's last answer, and 2 s (or a deadline, if longer) after its last request. With `--deadline-ms 2000`
  or less this means that the server has recovered 2 s after the load.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import httpx
import numpy as np

from benchmarks.service import checks, memory, trials
from benchmarks.service.checks import Check
from pem.bench import drive
from pem.bench.judge import Judge
from pem.bench.mix import Load, Mix, prepare
from pem.bench.report import machine_line, write_json
from pem.bench.result import summarise
from pem.bench.sample import Question, Run, Sample, Target
from pem.bench.server import own_server, register
from serve.telemetry.processes import STAGES

LONE_ADDRESS = "127.0.0.2"  # on the loopback interface, like the load's: to the server a different client
LONE_REQUESTS = 12  # before the load, to learn the usual latency
USUAL = 1.5  # times the median of these; or the slowest of these

OFFERED_SHARE = 0.8  # of the intended requests: arrivals are random
THROUGHPUT_SHARE = 0.9  # of the capacity
REFUSED_WITHIN_MS = 50.0
GROWTH = 0.1
RECOVERED_WITHIN_S = 2.0

_PAUSE_UNDER_LOAD_S = 1.0
_PAUSE_AFTER_S = 0.05
_GIVE_UP_S = 30.0
_PARTS = 5  # of the run; the first and the last are compared


@dataclass(frozen=True, kw_only=True)
class Lone:
    """One request of the lone client."""

    sent: float  # time.monotonic()
    done: float
    status: int  # 0: no answer

    @property
    def latency_ms(self) -> float:
        """Return the time from sending to the answer."""
        return (self.done - self.sent) * 1e3


class LoneClient:
    """Asks one question at a time from an address of its own."""

    def __init__(self, target: Target, question: Question) -> None:
        self._url = f"{target.url}/api/v1/pose_estimation"
        self._body = question.body
        self._headers = {"Content-Type": question.content_type, **question.headers}
        if target.api_key:
            self._headers["Authorization"] = f"Bearer {target.api_key}"
        self.asked: list[Lone] = []

    def ask(self, times: int) -> list[Lone]:
        """Ask `times` requests, one after the other."""
        with self._client() as client:
            return [self._ask(client) for _ in range(times)]

    def keep_asking(self, over: threading.Event, stop: threading.Event) -> None:
        """Ask until told to stop: seldom during the load, often once it is `over`. Answers go to `asked`."""
        with self._client() as client:
            while not stop.is_set():
                self.asked.append(self._ask(client))
                if over.is_set():
                    time.sleep(_PAUSE_AFTER_S)
                else:
                    over.wait(_PAUSE_UNDER_LOAD_S)

    def _client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(local_address=LONE_ADDRESS)
        return httpx.Client(transport=transport, headers=self._headers, timeout=_GIVE_UP_S)

    def _ask(self, client: httpx.Client) -> Lone:
        sent = time.monotonic()
        try:
            status = client.post(self._url, content=self._body).status_code
        except httpx.TransportError:
            status = 0
        return Lone(sent=sent, done=time.monotonic(), status=status)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All measurements of the run."""

    usual: list[Lone]  # before the load
    capacity: Sequence[Run]  # before and after
    overload: Run
    lone: list[Lone]  # during the load, and after it until latencies were usual again
    readings: list[memory.Reading] = field(default_factory=list)  # of the memory, during the measured part

    @property
    def usual_ms(self) -> float:
        """Return the longest latency of a lone request that counts as usual."""
        latencies_ms = [one.latency_ms for one in self.usual]
        return max(USUAL * statistics.median(latencies_ms), *latencies_ms)

    @property
    def capacity_hz(self) -> float:
        """Return the requests a second, the mean of both measurements."""
        return statistics.mean(summarise(run).requests_hz for run in self.capacity)

    @property
    def answered_hz(self) -> float:
        """Return the requests a second that were answered in the measured part, the lone client's included."""
        run = self.overload
        lone = sum(one.status == 200 and run.begun <= one.done < run.ended for one in self.lone)
        return summarise(run).requests_hz + lone / run.seconds

    @property
    def load_over(self) -> float:
        """Return when the last request of the load was answered or refused."""
        return max((sample.done for sample in self.overload.samples), default=self.overload.ended)

    def recovered(self, since: float) -> float:
        """Return the seconds from `since` until a lone request sent after it had its usual answer; inf: never."""
        usual_ms = self.usual_ms
        found = [one.done for one in self.lone if one.sent >= since and is_usual(one, usual_ms)]
        return min(found) - since if found else float("inf")


def is_usual(one: Lone, usual_ms: float) -> bool:
    """Return True if a lone request was answered as without load."""
    return one.status == 200 and one.latency_ms <= usual_ms


def measure(
    target: Target,
    load: Load,
    *,
    times: float,
    seconds: float,
    capacity_seconds: float,
    clients: int,
    deadline_ms: int,
    tell: Callable[[str], None],
) -> Measured:
    """Run lone requests, the closed loop, the overload, and the recovery. The objects must be registered."""
    assert target.pid is not None, "memory is read where the server runs"
    judge = Judge(load.questions)
    client = LoneClient(target, load.questions[0])
    client.ask(2)
    usual = client.ask(LONE_REQUESTS)
    tell(f"a lone request takes {statistics.median(one.latency_ms for one in usual):.0f} ms")
    closed = partial(drive.closed_loop, target, load.questions, clients=clients, seconds=capacity_seconds, judge=judge)
    before = asyncio.run(closed())
    capacity_hz = summarise(before).requests_hz
    if not capacity_hz:
        raise SystemExit("the closed loop was not answered: there is no capacity to overload")
    rate_hz = times * capacity_hz
    tell(f"capacity {capacity_hz:.3g} requests/s with {clients} clients; now {rate_hz:.3g} a second for {seconds:g} s")

    over, stop = threading.Event(), threading.Event()
    asking = threading.Thread(target=client.keep_asking, args=(over, stop), daemon=True)

    def on_progress(progress: drive.Progress) -> None:
        if progress.seconds_left <= 0:
            over.set()

    with memory.MemoryWatch(target.pid) as watch:
        asking.start()
        overload = asyncio.run(
            drive.open_loop(
                target,
                load.questions,
                rate_hz=rate_hz,
                seconds=seconds,
                warmup_s=deadline_ms / 1e3 + 1.0,  # until the queue has reached its full length
                judge=judge,
                on_progress=on_progress,
            )
        )
    over.set()
    readings = [reading for reading in watch.readings if overload.begun <= reading.when <= overload.ended]
    measured = Measured(usual=usual, capacity=[before], overload=overload, lone=client.asked, readings=readings)
    end = time.monotonic() + _GIVE_UP_S
    while measured.recovered(measured.load_over) == float("inf") and time.monotonic() < end:
        time.sleep(_PAUSE_AFTER_S)
    stop.set()
    asking.join(_GIVE_UP_S + 1)
    tell("the capacity once more")
    return dataclasses.replace(measured, capacity=[before, asyncio.run(closed())])


def judged(measured: Measured, *, times: float, deadline_ms: int) -> list[Check]:
    """Return the figures and their limits."""
    run = measured.overload
    capacity_hz = measured.capacity_hz
    overload = summarise(run)
    answered = [sample for sample in run.samples if sample.ok]
    refused = [sample for sample in run.samples if sample.status == 429]
    first_after = next((one for one in measured.lone if one.sent >= run.ended), None)
    under_load_ms = [one.latency_ms for one in measured.lone if run.begun <= one.sent < run.ended]
    return [
        *(
            checks.told(f"capacity {when}, requests/s", summarise(one).requests_hz)
            for when, one in zip(("before", "after"), measured.capacity, strict=False)
        ),
        checks.told("offered, requests/s", len(run.samples) / run.seconds),
        checks.at_least(
            "offered, times the capacity", len(run.samples) / run.seconds / capacity_hz, OFFERED_SHARE * times
        ),
        checks.at_least("answered, requests/s", measured.answered_hz, THROUGHPUT_SHARE * capacity_hz),
        checks.at_most("p99 of the answered, ms", _p99_ms([one.latency_s for one in answered]), deadline_ms),
        checks.none("poses that are wrong under load alone", overload.wrong),
        checks.at_least("refused with 429", len(refused), 1),
        checks.none("neither answered nor refused", len(run.samples) - len(answered) - len(refused)),
        checks.none("refused without Retry-After", sum(sample.retry_after_s is None for sample in refused)),
        checks.at_most("p99 to a refusal, ms", _p99_ms(_taken_s(refused)), REFUSED_WITHIN_MS),
        checks.told("longest to a refusal, ms", 1e3 * max(_taken_s(refused), default=0.0)),
        *_memory(memory.by_process(measured.readings, _PARTS)),
        checks.told("a lone request without load, median ms", statistics.median(o.latency_ms for o in measured.usual)),
        checks.told("a lone request under load, median ms", statistics.median(under_load_ms or [float("nan")])),
        checks.told("a lone request under load, longest ms", max(under_load_ms, default=float("nan"))),
        checks.at_most("first lone request after the load, s", _answered_s(first_after), RECOVERED_WITHIN_S),
        checks.at_most(
            "usual again after the load's last answer, s", measured.recovered(measured.load_over), RECOVERED_WITHIN_S
        ),
        checks.at_most(
            "usual again after the load's last request, s",
            measured.recovered(run.ended),
            max(RECOVERED_WITHIN_S, deadline_ms / 1e3),
        ),
        checks.told("sent late by the generator, p99 ms", _p99_ms([one.sent - one.due for one in run.samples])),
        checks.told("CPU of the pose workers, cores", _cores(run, "pose")),
        checks.told("CPU of the gateway, cores", _cores(run, "gateway")),
        checks.told("CPU of this load generator, cores", run.load_generator_cpu_s / run.seconds),
    ]


def _cores(run: Run, stage: str) -> float:
    return sum(usage.cpu_s for usage in run.usage if usage.name == stage) / run.seconds


def _memory(found: Sequence[memory.Growth]) -> list[Check]:
    """Check each process of a stage, and of all others the one that grew most."""
    others = [growth.share for growth in found if growth.name not in STAGES]
    return [
        *(
            checks.at_most(
                f"memory of {growth.name} ({growth.early_mb:.0f} MB), growth in %", 100 * growth.share, 100 * GROWTH
            )
            for growth in found
            if growth.name in STAGES
        ),
        checks.at_most("memory of any other process, growth in %", 100 * max(others, default=0.0), 100 * GROWTH),
    ]


def _taken_s(samples: Sequence[Sample]) -> list[float]:
    return [sample.done - sample.sent for sample in samples]


def _p99_ms(seconds: Sequence[float]) -> float:
    return 1e3 * float(np.quantile(seconds, 0.99, method="higher")) if seconds else 0.0


def _answered_s(one: Lone | None) -> float:
    """Return the seconds until the answer; inf if there was none."""
    return one.latency_ms / 1e3 if one is not None and one.status == 200 else float("inf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload (60), after a deadline of warm-up")
    parser.add_argument("--times", type=float, default=3.0, help="the capacity is offered (3)")
    parser.add_argument("--deadline-ms", type=int, default=5000, help="of each request (5000)")
    parser.add_argument("--masks", type=int, default=3, help="of each request (3)")
    parser.add_argument("--objects", type=int, default=None, help="different ones (all)")
    parser.add_argument("--clients", type=int, default=16, help="of the closed loop (16)")
    parser.add_argument("--capacity-seconds", type=float, default=20.0, help="of the closed loop (20)")
    parser.add_argument("--engine", default="auto", help="geometric, sam6d or auto (auto)")
    trials.add_set(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the figures here (- for standard output)")
    options = parser.parse_args(arguments)

    def tell(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    mix = Mix(masks=(options.masks,), engine=options.engine, deadline_ms=options.deadline_ms, objects=options.objects)
    load = prepare(mix)
    with own_server(trials.given(options)) as target:
        register(target, load, tell)
        try:
            measured = measure(
                target,
                load,
                times=options.times,
                seconds=options.seconds,
                capacity_seconds=options.capacity_seconds,
                clients=options.clients,
                deadline_ms=options.deadline_ms,
                tell=tell,
            )
        except drive.CannotBegin as error:
            raise SystemExit(str(error)) from None
    found = judged(measured, times=options.times, deadline_ms=options.deadline_ms)
    table = checks.table(found)
    table.print()
    errors = summarise(measured.overload).errors
    print("not answered: " + (", ".join(f"{count} x {kind}" for kind, count in errors.items()) or "none"))
    print(machine_line())
    holds = checks.all_hold(found)
    write_json(
        options.json,
        {"overload": {"options": vars(options), "figures": table.as_dicts(), "errors": errors, "holds": holds}},
    )
    print("everything holds" if holds else "NOT everything holds")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
