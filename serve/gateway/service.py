"""What the routes share: the parts of a running server, and the events that reach them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import structlog

from posekit import registry
from serve.backend.mosec import Backend
from serve.backend.run_dir import RunDir
from serve.engine_choice import Engines, Offer
from serve.errors import ApiError
from serve.gateway.exchange import Call
from serve.gateway.keys import KeyRing
from serve.objects.catalogue import Objects
from serve.scheduling.queue import Queue
from serve.settings import Settings
from serve.tasks.pose.task import PoseTask
from serve.telemetry.metrics import Metrics
from serve.telemetry.tracing import Tracing
from workers.messages import PartAnswer
from workers.state import WorkerState

log = structlog.get_logger()


class Service:
    """One running server. `routes`: route label -> the statuses that the metrics show from the start."""

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        run_dir: RunDir,
        *,
        offer: Offer,
        device: str,
        tracing: Tracing | None = None,
        routes: Mapping[str, frozenset[int]] = {},
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.device = device
        self.started = time.time()
        self.warm = False  # True once the backend was ready and the objects at start were onboarded
        self.draining = False
        self.in_flight = 0
        self._in_flight_bytes = 0
        self.keys = KeyRing(settings.keys_path)
        self.metrics = Metrics(settings.metrics.objects, routes)
        self.tracing = tracing or Tracing()
        self.engines = Engines(settings, offer, backend)
        self.objects = Objects(settings, backend, self.engines.versions)
        self.objects.onboarding.lost = backend.lost
        self.queue = Queue(
            backend,
            run_dir,
            settings.queue,
            pass_cost=backend.stages.pose.pass_detections,
            on_part=self._part_answered,
            on_dispatch=self.metrics.dispatched,
        )
        self.pose = PoseTask(
            settings,
            engines=self.engines,
            objects=self.objects,
            queue=self.queue,
            metrics=self.metrics,
            tracing=self.tracing,
        )

    async def close(self) -> None:
        """Close what requests may have opened."""
        await self.pose.close()

    # ------------------------------------------------------------------------------------------------------ state

    @property
    def ready(self) -> bool:
        """Return True if pose requests are taken."""
        return self.warm and self.backend.is_ready and not self.draining

    def kernels(self) -> dict[str, str]:
        """Return operation -> kernel, as the pose worker reports."""
        return dict(self.backend.pose_info().get("kernels") or {})

    # ----------------------------------------------------------------------------------------------------- events

    async def backend_ready(self) -> None:
        """Note that the backend can be called, for the first time or again."""
        for name, reason in self.engines.lost.items():
            weights, hint = self.settings.weights_path(name), registry.spec(name).hint
            log.error("degraded", reason=reason, weights=weights and str(weights), hint=hint)
        if not self.warm:
            await self.objects.warm_up()
            self.warm = True
            log.info("ready", engine=self.engines.engine, device=self.device, objects=self.objects.count)
        self.metrics.kernels(self.kernels())
        self.queue.wake()

    def worker_died(self, worker: WorkerState) -> None:
        """Record a worker's death in the metrics."""
        self.count_cache(worker)
        self.metrics.worker_gone(worker.pid)
        self.metrics.restarted()

    def count_cache(self, worker: WorkerState) -> None:
        """Record what a pose worker reports of its object cache."""
        info = worker.info
        if worker.stage == "pose" and "cache_hits" in info:
            self.metrics.cache(worker.pid, info["cache_hits"], info["cache_misses"], info["cache_bytes"])

    def _part_answered(self, answer: PartAnswer, waited_s: float) -> None:
        self.metrics.part(answer, self.objects.label, waited_s=waited_s)
        self.tracing.part(answer, waited_s)

    # -------------------------------------------------------------------------------------------------- admission

    def check_taking(self) -> None:
        """Raise ApiError if no work is taken now. To be called before the body is read."""
        if self.draining:
            raise ApiError("draining", "the server is shutting down", retry_after_s=5)
        if not self.warm:
            raise ApiError(
                "not_ready", "the server is loading and warming up; GET /readyz says when it is done", retry_after_s=2
            )
        if self.in_flight >= self.settings.limits.in_flight_requests:
            raise ApiError("over_capacity", f"{self.in_flight} requests are in flight already", retry_after_s=1)

    @contextlib.contextmanager
    def held(self, call: Call) -> Iterator[None]:
        """Count the request, and the memory that its body may take, from before the body is read until the answer."""
        limits = self.settings.limits
        declared = call.headers.get("content-length", "")
        limit = limits.body_mb * 2**20
        plain = declared.isdigit() and "content-encoding" not in call.headers  # compressed: may unpack to the limit
        size = min(int(declared), limit) if plain else limit
        if self._in_flight_bytes and self._in_flight_bytes + size > limits.in_flight_mb * 2**20:
            raise ApiError("over_capacity", "the requests in flight take all the memory that they may", retry_after_s=1)
        self._in_flight_bytes += size
        try:
            with self.counted():
                yield
        finally:
            self._in_flight_bytes -= size

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request in progress: a drain waits for it."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
