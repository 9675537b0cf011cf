"""Run `pem bench` for given options: choose the server and the questions, run one load after the other, and report."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from pem.bench import drive, server
from pem.bench.judge import Judge, Limits
from pem.bench.mix import Load, Mix, prepare, read_request
from pem.bench.report import in_words, machine
from pem.bench.result import OUTSIDE, Result, summarise
from pem.bench.sample import STAGES, Run, Target
from pem.bench.wire import Address
from pem.client import Client, PemError
from pem.commands import common
from pem.host.child import ServerTrouble, ended_by_signals

if TYPE_CHECKING:
    from pem.bench.capacity import Capacity, Slo
    from pem.bench.sweep import Sweep

CLIENTS: Final = (1, 8, 32)  # by default
_MOST_NAMED: Final = 5  # detections that are wrong without load and are listed for people
_EVERY_S: Final = 10.0  # between lines of progress without a terminal


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All options of `pem bench`."""

    url: str | None = None  # None: start a server for this run
    api_key: str | None = None
    pid: int | None = None  # pid of a server on this machine whose processes are to be watched
    settings: dict[str, str] = field(default_factory=dict)  # of the server that this run starts
    mix: Mix
    request: Path | None = None  # a ready request, instead of the mix
    clients: tuple[int, ...] = ()  # numbers of clients, a closed loop for each
    rates_hz: tuple[float, ...] = ()  # rates, an open loop for each
    seconds: float = 20.0
    warmup_s: float = 3.0
    timeout_s: float = drive.TIMEOUT_S
    limits: Limits
    compare_alone: bool = True
    most_wrong_alone: float = 0.2  # share of the detections; a larger share is no success
    json: str | None = None
    picture: Path | None = None  # file for the picture of latency against offered load
    slo: str | None = None  # latency target for which to find the number of robots
    robots_hz: float = 0.5

    def __post_init__(self) -> None:
        """Raise ValueError for impossible options, before anything is done."""
        if self.url is not None:
            Address.of(self.url)
        for name in self.settings:
            server.variable(name)
        if any(clients < 1 for clients in self.clients):
            raise ValueError("a closed loop needs at least one client")
        if any(rate_hz <= 0 for rate_hz in self.rates_hz) or self.robots_hz <= 0:
            raise ValueError("an open loop needs a rate above 0")
        lengths = {"--duration": self.seconds, "--warmup": self.warmup_s, "--timeout": self.timeout_s}
        rates = {"--rate": math.fsum(self.rates_hz), "--robots-hz": self.robots_hz}
        for option, value in (lengths | rates).items():
            if not math.isfinite(value):
                raise ValueError(f"{option} must be a finite number, got {value:g}")
        if not 0 <= self.most_wrong_alone <= 1:
            raise ValueError(f"--most-wrong-alone is a share of the detections, 0 to 1, got {self.most_wrong_alone:g}")


@dataclass(kw_only=True)
class _Report:
    """The final report."""

    about: dict[str, Any]  # server, machine, mix
    wrong_alone: list[str] = field(default_factory=list)  # descriptions of the detections that are wrong without load
    wrong_alone_share: float = 0.0  # share of the detections with a known pose
    results: list[Result] = field(default_factory=list)
    sweep: Sweep | None = None
    capacity: Capacity | None = None

    def faults(self, most_wrong_alone: float) -> list[str]:
        """Describe why this is no success; empty if it is one."""
        found = [f"{_label(result)}: {result.fault}" for result in self.results if result.fault]
        if self.wrong_alone_share > most_wrong_alone:
            found.append(f"{self.wrong_alone_share:.0%} of the detections get a wrong pose or none even without load")
        for part in (self.sweep, self.capacity):
            found += part.faults if part is not None else []
        return found

    def public(self, faults: list[str]) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "ok": not faults,
            "faults": faults,
            **self.about,
            "wrong_alone": self.wrong_alone,
            "wrong_alone_share": self.wrong_alone_share,
            "runs": [result.as_dict() for result in self.results],
            "sweep": None if self.sweep is None else self.sweep.as_dict(),
            "capacity": None if self.capacity is None else self.capacity.as_dict(),
        }


def run(plan: Plan) -> int:
    """Run the plan and report; return 0 if every answer came and was right (429 is an answer), else 1.

    Raises ValueError for an impossible plan, PemError if the server refuses the objects, NoServerHere if the plan needs
    an installed pem-server and there is none.
    """
    slo = _slo(plan)
    load = _load(plan)
    try:
        with ended_by_signals(), _target(plan) as target, _registered(target, load):
            report = _Report(about=_about(plan, target, load))
            _measure(plan, target, load, slo, report)
    except (ServerTrouble, drive.CannotBegin) as error:
        common.fail(str(error))
    faults = report.faults(plan.most_wrong_alone)
    if plan.picture is not None and report.sweep is not None:
        from pem.bench import chart

        common.write_file(plan.picture, chart.draw(report.sweep).encode())
    common.write_json(plan.json, report.public(faults))
    if plan.json != "-":
        _show(plan, report)
    for fault in faults:
        common.stderr().print(f"[bold red]no success:[/] {escape(fault)}")
    return 1 if faults else 0


# ---------------------------------------------------------------------------------------------------------- beforehand


@contextmanager
def _registered(target: Target, load: Load) -> Iterator[None]:
    """Register the load's objects with the server while the block runs."""
    with ExitStack() as stack:
        with common.step("registering the objects") as tell:
            stack.enter_context(server.registered(target, load, tell))
        yield


def _slo(plan: Plan) -> Slo | None:
    if plan.slo is None:
        return None
    from pem.bench.capacity import Slo

    return Slo.parse(plan.slo)


def _load(plan: Plan) -> Load:
    if plan.request is not None:
        try:
            return Load(questions=[read_request(plan.request)], objects={})
        except OSError as error:
            common.fail(f"cannot read {plan.request}: {error.strerror}", 2)
    with common.step("drawing the scenes"):
        return prepare(plan.mix)


@contextmanager
def _target(plan: Plan) -> Iterator[Target]:
    """Yield the server to be asked; one that this run started stops with the block."""
    if plan.url is not None:
        yield Target(url=plan.url.rstrip("/"), api_key=plan.api_key, pid=plan.pid)
        return
    with ExitStack() as stack:
        with common.step("starting a server"):
            target = stack.enter_context(server.own_server(plan.settings))
        yield target


def _about(plan: Plan, target: Target, load: Load) -> dict[str, Any]:
    """Return the context of the figures: the asking machine, the server, the questions."""
    return {
        "machine": machine(),
        "server": {"url": target.url, "own": plan.url is None, "settings": plan.settings, **_status(target)},
        "questions": [
            {"name": question.name, "bytes": len(question.body), "detections": len(question.truths)}
            for question in load.questions
        ],
        "mix": None if plan.request is not None else asdict(plan.mix),
        "warmup_s": plan.warmup_s,
    }


def _status(target: Target) -> dict[str, Any]:
    """Return the server's status; empty for other pose servers, which have none."""
    try:
        with Client(target.url, target.api_key or "", timeout_s=10.0, retries=0) as client:
            status = client.status()
    except PemError:
        return {}
    return {name: getattr(status, name) for name in ("engine", "release", "device", "version", "kernels")} | {
        "workers": {name: track.workers for name, track in status.tracks.items()}
    }


# ---------------------------------------------------------------------------------------------------------------- runs


def _measure(plan: Plan, target: Target, load: Load, slo: Slo | None, report: _Report) -> None:
    judge = Judge(load.questions, plan.limits, compare_alone=plan.compare_alone)
    asked_for_more = plan.rates_hz or plan.picture is not None or slo is not None
    for clients in plan.clients or (() if asked_for_more else CLIENTS):
        what = f"{clients} client{'' if clients == 1 else 's'}"
        with _watched(what) as watch:
            closed = drive.closed_loop(
                target,
                load.questions,
                clients=clients,
                seconds=plan.seconds,
                warmup_s=plan.warmup_s,
                timeout_s=plan.timeout_s,
                judge=judge,
                on_progress=watch.of(what),
            )
            report.results.append(_run(closed, watch, what))
    for rate_hz in () if plan.picture is not None else plan.rates_hz:
        what = f"{rate_hz:g} requests a second"
        with _watched(what) as watch:
            open_ = drive.open_loop(
                target,
                load.questions,
                rate_hz=rate_hz,
                seconds=plan.seconds,
                warmup_s=plan.warmup_s,
                seed=plan.mix.seed,
                timeout_s=plan.timeout_s,
                judge=judge,
                on_progress=watch.of(what),
            )
            report.results.append(_run(open_, watch, what))
    if plan.picture is not None:
        from pem.bench import sweep

        with _watched("offering more and more") as watch:
            report.sweep = sweep.sweep(
                target,
                load,
                rates=plan.rates_hz or None,
                seconds=plan.seconds,
                warmup_s=plan.warmup_s,
                timeout_s=plan.timeout_s,
                judge=judge,
                tell=lambda words: watch.line(f"offering more and more: {words}"),
                on_progress=watch.now,
            )
    if slo is not None:
        from pem.bench import capacity

        with _watched("counting robots") as watch:
            report.capacity = capacity.find(
                target,
                load,
                slo=slo,
                robots_hz=plan.robots_hz,
                seconds=plan.seconds,
                warmup_s=plan.warmup_s,
                timeout_s=plan.timeout_s,
                judge=judge,
                tell=lambda words: watch.line(f"counting robots: {words}"),
                on_progress=watch.now,
            )
    report.wrong_alone, report.wrong_alone_share = judge.wrong_alone, judge.wrong_alone_share


def _run(load: Coroutine[Any, Any, Run], watch: _Watch, what: str) -> Result:
    """Make the run and say in a line what it came to."""
    result = summarise(asyncio.run(load))
    latencies = [f"{name} {result.latency_ms[name]:.0f} ms" for name in ("p50", "p99") if name in result.latency_ms]
    rates = f"{result.requests_hz:.1f} requests/s, {result.poses_hz:.1f} poses/s"
    watch.line(f"{what}: {', '.join([rates, *latencies])}" + (f"; {result.fault}" if result.fault else ""))
    return result


@dataclass(kw_only=True)
class _Watch:
    """Shows what runs now: a line that is rewritten on a terminal, else a new line every ten seconds."""

    console: Console
    status: Status | None  # None: no terminal
    said_s: float = field(default_factory=time.monotonic)

    def line(self, words: str) -> None:
        """Print a line that stays."""
        self.console.print(escape(words))
        self.said_s = time.monotonic()

    def now(self, what: str, now: drive.Progress) -> None:
        """Show the progress of a run."""
        done = f"{now.requests} answers, {now.poses_hz:.1f} rows/s, {now.errors} errors"
        words = f"{what} ({now.seconds_left:.0f} s left, {done})"
        if self.status is not None:
            self.status.update(escape(words))
        elif time.monotonic() - self.said_s >= _EVERY_S:
            self.line(words)

    def of(self, what: str) -> Callable[[drive.Progress], None]:
        """Return `now` for one run."""
        return lambda now: self.now(what, now)


@contextmanager
def _watched(what: str) -> Iterator[_Watch]:
    console = common.stderr()
    if not console.is_terminal:
        yield _Watch(console=console, status=None)
        return
    with console.status(escape(what)) as status:
        yield _Watch(console=console, status=status)


# -------------------------------------------------------------------------------------------------------------- output


def _show(plan: Plan, report: _Report) -> None:
    console = common.stdout()
    console.print(escape(_heading(report.about)), soft_wrap=True)
    if report.results:
        console.print(_figures(report.results))
        console.print(_stages(report.results))
        if any(result.usage for result in report.results):
            console.print(_processes(report.results))
        for words in _remarks(report.results):
            console.print(escape(words), soft_wrap=True)
    for words in _wrong_alone(report):
        console.print(escape(words), soft_wrap=True)
    if report.sweep is not None:
        report.sweep.table().print()
        console.print(escape(f"picture: {plan.picture}"), soft_wrap=True)
    if report.capacity is not None:
        report.capacity.table().print()
        console.print(escape(str(report.capacity)), soft_wrap=True)


def _heading(about: dict[str, Any]) -> str:
    kinds = list(dict.fromkeys(question["name"] for question in about["questions"]))
    shown = "; ".join(kinds[:4]) + (f"; and {len(kinds) - 4} more" if len(kinds) > 4 else "")
    there = about["server"]
    engine = f"{there['release']} on {there['device']}" if "release" in there else there["url"]
    return f"{engine}: {shown}\nasked from {in_words(about['machine'])}"


def _figures(results: list[Result]) -> Table:
    """Make one row for each run: load, speed, correctness."""
    latencies_ms = ("p50\nms", "p90\nms", "p99\nms", "p99.9\nms", "max\nms")
    shared = ("rows\na pass", "requests\na pass")
    table = _table("load", "requests\n/s", "poses\n/s", *latencies_ms, "429", "errors", "wrong", *shared, "steady")
    for result in results:
        latencies = [_ms(result.latency_ms.get(name)) for name in ("p50", "p90", "p99", "p999", "max")]
        passes = [_two(result.passes.get(name)) for name in ("detections", "requests")]
        refused = sum(count for kind, count in result.errors.items() if kind.startswith("429 "))
        bad = result.wrong + result.changed + result.lost
        table.add_row(
            _label(result),
            f"{result.requests_hz:.1f}",
            f"{result.poses_hz:.1f}",
            *latencies,
            str(refused),
            _alarm(result.failures),
            _alarm(bad),
            *passes,
            "yes" if result.stable else "[yellow]no[/]",
        )
    return table


def _stages(results: list[Result]) -> Table:
    """Tabulate where a request's time goes: median and 99th percentile of each stage."""
    stages = [stage for stage in (*STAGES, OUTSIDE) if any(stage in result.stage_ms for result in results)]
    table = _table("load", *(f"{stage}\np50 / p99 ms" for stage in stages))
    for result in results:
        shown = [result.stage_ms.get(stage, {}) for stage in stages]
        table.add_row(_label(result), *(f"{_ms(one.get('p50'))} / {_ms(one.get('p99'))}" for one in shown))
    return table


def _processes(results: list[Result]) -> Table:
    """Tabulate CPU of each kind of process in each run, as a share of one core, and the peak memory of each kind."""
    names = list(dict.fromkeys(usage.name for result in results for usage in result.usage))
    table = _table("processes", "count", *(f"CPU\n{_label(result)}" for result in results), "memory\nat most")
    for name in names:
        groups = [[usage for usage in result.usage if usage.name == name] for result in results]
        cpu = [
            sum(usage.cpu_s for usage in group) / result.seconds for group, result in zip(groups, results, strict=True)
        ]
        if max(cpu) < 0.005:
            continue  # processes that only wait
        peak_mb = max(sum(usage.rss_peak_mb for usage in group) for group in groups)
        count = max(len(group) for group in groups)
        table.add_row(name, str(count), *(f"{share:.0%}" for share in cpu), f"{peak_mb:.0f} MB")
    own = [result.load_generator_cpu_s / result.seconds for result in results]
    table.add_row("load generator", "1", *(f"{share:.0%}" for share in own), "")
    return table


def _remarks(results: list[Result]) -> Iterator[str]:
    """Yield remarks that do not fit into the tables."""
    for result in results:
        if result.errors:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in result.errors.items())
            yield f"{_label(result)}: not answered: {kinds}"
        if result.changed:
            yield f"{_label(result)}: {result.changed} rows are others than when their question was asked alone"
        if result.lost:
            yield f"{_label(result)}: {result.lost} poses are lost that their question has when asked alone"
        if result.rejected:
            yield f"{_label(result)}: {result.rejected} rows without a pose"
        if not result.stable:
            yield f"{_label(result)}: not steady: {result.why}"
        for gpu in result.gpus:
            busy = f"busy {gpu.busy:.0%} of the time, {gpu.memory_peak_mb:.0f} MB at most"
            yield f"{_label(result)}: GPU {gpu.name} {busy}"


def _wrong_alone(report: _Report) -> Iterator[str]:
    """Yield what the engine gets wrong without load, if anything."""
    if report.wrong_alone:
        yield f"wrong without any load, and counted apart ({report.wrong_alone_share:.1%}):"
        yield from (f"  {words}" for words in report.wrong_alone[:_MOST_NAMED])
        if len(report.wrong_alone) > _MOST_NAMED:
            yield f"  and {len(report.wrong_alone) - _MOST_NAMED} more"


def _label(result: Result) -> str:
    if result.mode == "open":
        return f"{result.rate_hz:g} requests/s"
    return f"{result.clients} client{'' if result.clients == 1 else 's'}"


def _table(*columns: str) -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in columns:
        first = column in ("load", "processes")
        table.add_column(column, justify="left" if first else "right", no_wrap=first, overflow="fold")
    return table


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _alarm(count: int) -> str:
    return f"[red]{count}[/]" if count else "0"
