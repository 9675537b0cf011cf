"""The routes about the server itself: for people, probes, Prometheus and model registries."""

from __future__ import annotations

import time
from typing import Literal

from pem import contract
from posekit import registry
from serve import __version__
from serve.errors import ApiError
from serve.gateway.exchange import Answer, Call
from serve.gateway.service import Service
from serve.telemetry.metrics import CONTENT_TYPE


async def status(service: Service, call: Call) -> Answer:
    """`GET /api/v1/status`"""
    backend, engines, queue = service.backend, service.engines, service.queue
    state: Literal["starting", "ready", "stopped"] = (
        "ready" if backend.is_ready else "stopped" if backend.state == "stopped" else "starting"
    )
    track = contract.Track(
        state=state,
        release=engines.release,
        workers=backend.worker_counts(),
        restarts=backend.restarts + backend.worker_restarts,
    )
    return call.answer(
        contract.Status(
            server="draining" if service.draining else "running",
            model_loaded=service.warm and backend.is_ready,
            device=service.device,
            uptime=round(time.time() - service.started, 3),
            version=__version__,
            engine=engines.engine,
            release=engines.release,
            kernels=service.kernels(),
            tracks={backend.name: track},
            objects=service.objects.count,
            queue=contract.QueueState(requests=queue.requests, detections=queue.cost),
            detections_per_second=round(queue.per_second(engines.engine), 3),
            engines=engines.answering,
            degraded=engines.degraded is not None,
            degraded_reason=engines.degraded,
        )
    )


async def version(service: Service, call: Call) -> Answer:
    """`GET /api/v1/version`"""
    engines = service.engines
    return call.answer(
        contract.Version(
            version=__version__,
            engine=engines.engine,
            release=engines.release,
            checkpoint=engines.checkpoint,
            sha256=engines.sha256,
            engines=engines.answering,
            degraded=engines.degraded is not None,
        )
    )


async def livez(service: Service, call: Call) -> Answer:
    """`GET /livez`: 200 as long as the server can answer at all."""
    return call.answer({"live": True})


async def readyz(service: Service, call: Call) -> Answer:
    """`GET /readyz`: 200 when pose requests are taken, else 503 with the reason."""
    if service.ready:
        return call.answer({"ready": True})
    if service.draining:
        raise ApiError("draining", "the server is shutting down", retry_after_s=5)
    what = "restarting its workers" if service.warm else "loading and warming up"
    raise ApiError("not_ready", f"the server is {what}", retry_after_s=2)


async def health(service: Service, call: Call) -> Answer:
    """`GET /api/v1/health`, for the clients of the second dialect."""
    return call.answer(
        contract.Health2(
            status="healthy" if service.ready else "unhealthy",
            model={"loaded": service.warm and service.backend.is_ready, "device": service.device},
            timestamp=time.time(),
        )
    )


async def metrics_page(service: Service, call: Call) -> Answer:
    """`GET /metrics`"""
    metrics, backend, engines = service.metrics, service.backend, service.engines
    workers = list(backend.workers.values())
    for worker in workers:
        service.count_cache(worker)
    metrics.model(engine=engines.engine, release=engines.release, sha256=engines.sha256 or "")
    metrics.ready(service.ready)
    metrics.degraded(engines.degraded is not None)
    metrics.queue(service.queue.waiting)
    metrics.draining(service.draining)
    metrics.worker_counts(backend.worker_counts())
    metrics.devices(backend.stages.devices, workers)
    metrics.processes(workers)
    return Answer(200, metrics.expose(await backend.metrics_text()), CONTENT_TYPE)


async def root(service: Service, call: Call) -> Answer:
    """`GET /`: send a browser on to the docs."""
    return Answer(307, headers={"Location": "/docs"})


async def model(service: Service, call: Call) -> Answer:
    """`GET /v2/models/pem`: inputs, outputs and licences."""
    return call.answer(model_metadata(__version__, service.engines.release, service.engines.engine))


def model_metadata(version: str, release: str, engine: str) -> contract.ModelMetadata:
    """Return the inputs, outputs and licences of an engine. In shapes, -1 means any number."""
    spec = registry.spec(engine)
    return contract.ModelMetadata(
        name="pem",
        versions=[release],
        platform="pem-server",
        inputs=[
            _tensor("rgb_image", "BYTES", 1),
            _tensor("depth_image", "BYTES", 1),
            _tensor("cam_K", "FP64", 3, 3),
            _tensor("masks", "BYTES", -1),
            _tensor("object_id", "BYTES", 1),
        ],
        outputs=[
            _tensor("rotation", "FP64", -1, 3, 3),
            _tensor("translation", "FP64", -1, 3),
            _tensor("confidence", "FP64", -1),
        ],
        parameters={
            "server_version": version,
            "engine": engine,
            "engine_licence": spec.licence,
            "weights_licence": spec.weights_licence,
            "lengths": "mm",
            "frame": "object to camera, OpenCV camera frame",
            "endpoint": "/api/v1/pose_estimation",
        },
    )


def _tensor(name: str, datatype: str, *shape: int) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}
