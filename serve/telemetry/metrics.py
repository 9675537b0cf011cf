"""The page for Prometheus: our families and Mosec's five, seconds everywhere, few labels.

The numbers live in this process: workers report through their answers, so no shared files are needed. Mosec's own page
is read on every scrape, summed over its `connection` label (which grows with every restart of a worker) and rewritten,
since its text is in neither of the two formats that Prometheus reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, Literal

import prometheus_client
from msgspec import UnsetType
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from posekit import registry
from posekit.engine import REJECT_CODES
from serve.telemetry.processes import STAGES as PROCESS_STAGES
from serve.telemetry.processes import Processes
from workers.messages import PartAnswer
from workers.state import WorkerState

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
OTHER: Final = "other"  # the label of all values that are not on a list: clients cannot create labels

Stage = Literal["decode", "pose", "respond", "ism", "onboard"]
STAGES: Final = ("decode", "pose", "respond", "ism", "onboard")
DISPATCH_REASONS: Final = ("idle", "full", "window")

#: Close together where clients notice. A percentile is known only to lie between two bounds: likely targets are bounds.
_SECONDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0),
)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_REQUESTS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
_SCORES = tuple(round(0.05 * step, 2) for step in range(1, 21))
_MILLIMETRES = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """All metric families. Each exists from the start, with zeros for the labels that are known.

    `objects` lists the registered names that may become a label; any other object is `other`.
    `routes`: route label -> the statuses that are shown from the start.
    """

    def __init__(self, objects: Iterable[str] = (), routes: Mapping[str, Iterable[int]] = {}) -> None:
        self.registry = CollectorRegistry()
        self._objects = frozenset(objects)
        self._caches: dict[int, tuple[int, int, int]] = {}  # pid -> hits, misses, bytes as last reported
        self._models: dict[str, tuple[str, ...]] = {}  # track -> labels
        self._stages_staffed: set[str] = set()
        self._processes = Processes()

        self.requests = self._counter("pose_requests", "Requests answered, by route and HTTP status.", "route", "code")
        self.detections = self._counter(
            "pose_detections", "Detections answered, by engine and by whether they have a pose.", "engine", "status"
        )
        self.rejections = self._counter("pose_rejected", "Detections without a pose, by reason.", "reason")
        self.request_seconds = self._histogram(
            "pose_request_duration_seconds",
            "From body received to answer written: pose requests that were answered (2xx) or ran out of time (504).",
            _SECONDS,
        )
        self.stage_seconds = self._histogram(
            "pose_stage_duration_seconds", "Time a part of a request was being worked on, by stage.", _SECONDS, "stage"
        )
        self.queue_seconds = self._histogram(
            "pose_queue_wait_seconds", "Time a part of a request waited, in the gateway and between stages.", _SECONDS
        )
        self.pass_detections = self._histogram("pose_pass_detections", "Detections that shared a pass.", _COUNTS)
        self.pass_requests = self._histogram("pose_pass_requests", "Requests that shared a pass.", _REQUESTS)
        self.dispatches = self._counter(
            "pose_pass_dispatch",
            "Why work waited no longer for company; one dispatch may be several parts.",
            "reason",
        )
        self.device_busy = self._counter(
            "pose_device_busy_seconds", "Time that passes took, by device; counted when their answers arrive.", "device"
        )
        self.device_memory = self._gauge(
            "pose_device_memory_bytes", "Memory of a GPU, as its pose worker sees it.", "device", "kind"
        )
        self.waiting = self._gauge("pose_queue_detections", "Detections waiting in the gateway.")
        self.score = self._histogram("pose_score", "Confidence of the poses answered.", _SCORES, "object")
        self.residual_mm = self._histogram(
            "pose_residual_mm", "Median distance of the observed points to the posed model.", _MILLIMETRES, "object"
        )
        self.cache_hits = self._counter("pose_object_cache_hits", "Objects that a pose worker had in memory.")
        self.cache_misses = self._counter("pose_object_cache_misses", "Objects that a pose worker read from disk.")
        self.cache_bytes = self._gauge("pose_object_cache_bytes", "Memory that object models take in all workers.")
        self.model_info = self._gauge(
            "pose_model_info", "What answers on each track; always 1.", "engine", "release", "sha256", "track"
        )
        self.kernel_info = self._gauge(
            "pose_kernel_info", "Which kernel each operation runs on; always 1.", "op", "kernel"
        )
        self.is_ready = self._gauge("pose_ready", "1 while pose requests are taken, as /readyz says.")
        self.is_degraded = self._gauge("pose_degraded", "1 while the geometric engine stands in for the network.")
        self.is_draining = self._gauge("pose_draining", "1 while the server finishes and takes nothing new.")
        self.workers = self._gauge("pose_workers", "Workers that can take work now, by stage.", "stage")
        self.restarts = self._counter("pose_worker_restarts", "Worker processes that ended and were replaced.")
        self.process_cpu = _ProcessSeconds()
        self.registry.register(self.process_cpu)
        self.process_resident = self._gauge(
            "pose_process_resident_bytes", "Resident memory of the processes of a stage, shared pages in each.", "stage"
        )
        self._start_at_zero(routes)

    # ------------------------------------------------------------------------------------------------- what happened

    def request(self, route: str, code: int, seconds: float | None = None) -> None:
        """Count an answered request. `route` is its label; `seconds`, of a pose request, count only with 2xx or 504."""
        self.requests.labels(route, str(code)).inc()
        if seconds is not None and (200 <= code < 300 or code == 504):
            self.request_seconds.observe(seconds)

    def part(
        self, answer: PartAnswer, object_names: Callable[[str | None], str | None], *, waited_s: float = 0.0
    ) -> None:
        """Count the answer to a part, or to /finish (which has neither engine nor rows).

        `object_names` returns the registered name for a row's `cad_id`. `waited_s` is the part's wait in the gateway;
        its wait between the stages is added.
        """
        if answer.respond_ms:
            self.stage("respond", answer.respond_ms / 1000)
        if not answer.engine:
            return
        self.stage("decode", answer.decode_ms / 1000)
        self.stage("pose", answer.pose_ms / 1000)
        self.queue_seconds.observe(waited_s + answer.queue_ms / 1000)
        for one in answer.passes:
            self.pass_detections.observe(one.detections)
            self.pass_requests.observe(one.requests)
            self.device_busy.labels(one.device).inc(one.seconds)
        for row in answer.rows:
            self.detections.labels(answer.engine, row.status).inc()
            if not isinstance(row.error, UnsetType):
                self.rejected(row.error.code)
            if row.status != "ok":
                continue
            name = object_names(row.cad_id)
            label = name if name in self._objects else OTHER
            self.score.labels(label).observe(row.confidence)
            if not isinstance(row.evidence, UnsetType):
                self.residual_mm.labels(label).observe(row.evidence.residual_mm)

    def rejected(self, reason: str) -> None:
        """Count a detection without a pose; `part` does so for its rows."""
        self.rejections.labels(reason if reason in REJECT_CODES else OTHER).inc()

    def stage(self, stage: Stage, seconds: float) -> None:
        """Count the time that a stage worked; `part` does so for decode, pose and respond."""
        self.stage_seconds.labels(stage).observe(seconds)

    def dispatched(self, reason: str) -> None:
        """Count a dispatch into the pipeline. `reason`: one of DISPATCH_REASONS."""
        self.dispatches.labels(reason if reason in DISPATCH_REASONS else OTHER).inc()

    def restarted(self, workers: int = 1) -> None:
        """Count worker processes that ended and were replaced."""
        self.restarts.inc(workers)

    # ------------------------------------------------------------------------------------------------- how things are

    def queue(self, detections: int) -> None:
        """Set the number of detections that wait in the gateway."""
        self.waiting.set(detections)

    def ready(self, now: bool) -> None:
        """Set whether pose requests are taken."""
        self.is_ready.set(now)

    def draining(self, now: bool) -> None:
        """Set whether the server is draining."""
        self.is_draining.set(now)

    def degraded(self, now: bool) -> None:
        """Set whether the geometric engine stands in for the network."""
        self.is_degraded.set(now)

    def model(self, *, engine: str, release: str, sha256: str, track: str = "production") -> None:
        """Set what answers on a track; replaces what answered before."""
        labels = (engine, release, sha256, track)
        if (before := self._models.get(track)) is not None:
            self.model_info.remove(*before)
        self._models[track] = labels
        self.model_info.labels(*labels).set(1)

    def kernels(self, kernels: Mapping[str, str]) -> None:
        """Set operation -> the kernel that it runs on (`compiled` or `reference`)."""
        self.kernel_info.clear()
        for op, kernel in kernels.items():
            self.kernel_info.labels(op, kernel).set(1)

    def worker_counts(self, ready: Mapping[str, int]) -> None:
        """Set the workers that can take work, by stage. A stage that ever had workers stays, at zero."""
        self._stages_staffed |= ready.keys()
        for stage in self._stages_staffed:
            self.workers.labels(stage).set(ready.get(stage, 0))

    def devices(self, names: Sequence[str], workers: Iterable[WorkerState]) -> None:
        """Set the devices, by slot, and the memory that their pose workers report, added up per device."""
        for name in names:
            self.device_busy.labels(name)
        self.device_memory.clear()
        for worker in workers:
            memory = worker.info.get("device_memory")
            if worker.stage == "pose" and worker.slot < len(names) and memory:
                device = names[worker.slot]
                for kind in ("allocated", "reserved"):
                    self.device_memory.labels(device, kind).inc(memory[kind])
                self.device_memory.labels(device, "total").set(memory["total"])

    def processes(self, workers: Iterable[WorkerState]) -> None:
        """Measure this process and all below it; `workers` tells the stage of each worker."""
        usage = self._processes.look({worker.pid: worker.stage for worker in workers})
        self.process_cpu.seconds = {stage: one.cpu_s for stage, one in usage.items()}
        for stage, one in usage.items():
            self.process_resident.labels(stage).set(one.resident_bytes)

    def cache(self, pid: int, hits: int, misses: int, cached_bytes: int) -> None:
        """Add a pose worker's report on its object cache, whose counts begin at that worker's start.

        Our counters only grow: a report lower than the last one means a new worker under an old pid.
        """
        last_hits, last_misses, _ = self._caches.get(pid, (0, 0, 0))
        if hits < last_hits or misses < last_misses:
            last_hits = last_misses = 0
        self.cache_hits.inc(hits - last_hits)
        self.cache_misses.inc(misses - last_misses)
        self._caches[pid] = (hits, misses, cached_bytes)
        self._sum_cache_bytes()

    def worker_gone(self, pid: int) -> None:
        """Drop the cache memory of a worker that ended; its hits and misses stay counted."""
        self._caches.pop(pid, None)
        self._sum_cache_bytes()

    # ------------------------------------------------------------------------------------------------------- the page

    def expose(self, mosec_text: str | None = None) -> bytes:
        """Return the page, as CONTENT_TYPE. It lacks Mosec's families if Mosec's text is missing or does not parse."""
        ours = list(self.registry.collect())
        return generate_latest(_Page([*ours, *mosec_families(mosec_text, {family.name for family in ours})]))

    # ------------------------------------------------------------------------------------------------------- plumbing

    def _start_at_zero(self, routes: Mapping[str, Iterable[int]]) -> None:
        for route, statuses in routes.items():
            for status in statuses:
                self.requests.labels(route, str(status))
        for engine in registry.names():
            for status_word in ("ok", "rejected"):
                self.detections.labels(engine, status_word)
        for reason in REJECT_CODES:
            self.rejections.labels(reason)
        for stage in STAGES:
            self.stage_seconds.labels(stage)
        for reason in DISPATCH_REASONS:
            self.dispatches.labels(reason)
        for stage in PROCESS_STAGES:
            self.process_resident.labels(stage)
        for name in (*sorted(self._objects), OTHER):
            self.score.labels(name)
            self.residual_mm.labels(name)

    def _sum_cache_bytes(self) -> None:
        self.cache_bytes.set(sum(cached_bytes for _, _, cached_bytes in self._caches.values()))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=tuple(buckets))


class _ProcessSeconds(Collector):
    """A counter measured elsewhere: its values are set as totals, not as increments."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PROCESS_STAGES, 0.0)

    def collect(self) -> Iterator[Metric]:
        text = "Processor time of the processes of a stage, those that ended included."
        family = CounterMetricFamily("pose_process_cpu_seconds", text, labels=["stage"])
        for stage, seconds in self.seconds.items():
            family.add_metric([stage], seconds)
        yield family


class _Page(Collector):
    """A collector of finished families."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


_MOSEC_HELP: Final = {
    "throughput": "Answers of the Mosec backend, by endpoint and HTTP status.",
    "process_duration_second": "Seconds that a Mosec stage took for one batch; stage total: whole requests.",
    "batch_size": "Items in one batch of a Mosec stage.",
    "batch_duration_second": "Seconds that a Mosec stage spent gathering one batch.",
    "remaining_task": "Tasks inside the Mosec backend.",
}

_CONNECTION: Final = re.compile(r',?connection="[^"]*"')
#: Mosec declares a counter by its samples' name without `_total`, as OpenMetrics does.
_COUNTER: Final = re.compile(r"^# TYPE (\S+?)(?:_total)? counter$", re.MULTILINE)


def mosec_families(text: str | None, taken: Iterable[str] = ()) -> list[Metric]:
    """Return Mosec's five families from its text, summed over the label `connection`; [] if the text does not parse."""
    if not text:
        return []
    try:
        text = _COUNTER.sub(r"# TYPE \1_total counter", _without_connections(text))
        parsed = list(text_string_to_metric_families(text))
    except (ValueError, KeyError, IndexError):
        return []
    refused = set(taken)
    families = []
    for family in parsed:
        help_text = next((words for ending, words in _MOSEC_HELP.items() if family.name.endswith("_" + ending)), None)
        if help_text is None or family.name in refused:
            continue
        refused.add(family.name)
        families.append(_in_order(family, help_text))
    return families


def _without_connections(text: str) -> str:
    """Return the text with samples summed over `connection`, line by line: every restart adds samples."""
    lines: dict[str, float | None] = {}  # text before the value -> sum of the values; None: not a sample
    for line in text.splitlines():
        if line.startswith("#"):
            if line.startswith("# TYPE"):
                lines[line] = None
        elif line:
            series, _, value = _CONNECTION.sub("", line).replace("{,", "{").rpartition(" ")
            lines[series] = (lines.get(series) or 0.0) + float(value)
    return "".join(f"{line}\n" if value is None else f"{line} {value!r}\n" for line, value in lines.items())


def _in_order(family: Metric, help_text: str) -> Metric:
    """Return the family with our help text, a histogram's buckets in order."""
    ordered = Metric(family.name, help_text, family.type)
    found = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in family.samples}
    for (name, labels), value in sorted(found.items(), key=_histogram_order):
        ordered.add_sample(name, dict(labels), value)
    return ordered


def _histogram_order(
    item: tuple[tuple[str, tuple[tuple[str, str], ...]], float],
) -> tuple[tuple[tuple[str, str], ...], int, float]:
    (name, labels), _ = item
    series = tuple(pair for pair in labels if pair[0] != "le")
    bound = dict(labels).get("le")
    kind = 0 if bound is not None else 1 if name.endswith("_count") else 2
    return series, kind, float(bound) if bound is not None else 0.0
