"""ONE table of routes: path, method, handler, request and answer, words, examples, labels, who may call.

A new route is a new row here and a handler in pose_routes.py, object_routes.py or server_routes.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

import msgspec

from pem import contract
from serve import __version__
from serve.errors import CODES
from serve.gateway import object_routes, openapi, pose_routes, server_routes
from serve.gateway.exchange import JSON, Answer, Call
from serve.gateway.openapi import OBJECTS, OIP, POSES, SECOND, SERVER
from serve.gateway.route import DOOR, Failure, Json, Route
from serve.gateway.service import Service
from serve.telemetry.logs import Quiet
from serve.telemetry.metrics import OTHER

_BODY: Final = ("bad_body", "bad_data", "body_timeout", "too_large", "unsupported_media_type", "invalid")
_POSE: Final = (
    *DOOR,
    *_BODY,
    "units",
    "unknown_object",
    "no_cad_file",
    "deadline_too_short",
    "over_capacity",
    "not_ready",
    "draining",
    "onboarding",
    "onboarding_failed",
    "worker_lost",
    "storage_full",
    "deadline",
)

_CURL_POSE: Final = f"""\
curl -F rgb=@rgb.png -F depth=@depth.png \\
  -F 'request={{"cam_params": {{"cam_K": [600, 0, 319.5, 0, 600, 239.5, 0, 0, 1]}},
               "object_id": "mug",
               %s}};type={JSON}' \\
  {openapi.BASE}%s"""
_CURL_RLE: Final = '{"size": [480, 640], "counts": [96100, 200, 210900]}'


async def _openapi_json(service: Service, call: Call) -> Answer:
    """`GET /openapi.json`"""
    return Answer(200, _document())


@cache
def _document() -> bytes:
    return msgspec.json.encode(openapi.document(__version__, ROUTES))


async def _docs(service: Service, call: Call) -> Answer:
    """`GET /docs`"""
    unframed = {"Content-Security-Policy": "frame-ancestors 'none'"}  # no page of another host clicks on this one
    return Answer(200, openapi.page(), "text/html; charset=utf-8", unframed)


_TAKES: Final = (
    "As JSON (pictures in base64), as MessagePack (pictures as raw bytes), or as a form with the files `rgb` and "
    "`depth` and a JSON part `request`. Bodies may be gzipped. Unknown fields are refused, so that a typo never passes."
)
_LIVE: Final[tuple[str, Json]] = (JSON, {"live": True})
_READY: Final[tuple[str, Json]] = (JSON, {"ready": True})

#: Every route. The gateway, the OpenAPI document, metrics, logs and traces read this table.
ROUTES: Final = (
    Route(method="GET", path="/", handler=server_routes.root, label=OTHER),
    Route(
        method="POST",
        path="/api/v1/pose_estimation",
        handler=pose_routes.pose_estimation,
        timed=True,
        tag=POSES,
        summary="Poses of detected objects",
        text="One row for each detection, in the order sent; a detection without a pose says why. "
        f"Lengths are millimetres in and out. {_TAKES}",
        request=contract.PoseRequest,
        answer=contract.PoseAnswer,
        codes=_POSE,
        curl=_CURL_POSE % (f'"detections": {{"masks": [{_CURL_RLE}]}}', "/api/v1/pose_estimation"),
        parameters=("RequestId", "Deadline", "TraceParent"),
    ),
    Route(
        method="POST",
        path="/api/v1/full_pipeline",
        handler=pose_routes.full_pipeline,
        timed=True,
        tag=POSES,
        summary="Detection and poses",
        text="The same without detections: the configured instance-segmentation (ISM) server is asked for them first, "
        f"and the answer tells what it found. {_TAKES}",
        request=contract.FullPipelineRequest,
        answer=contract.PoseAnswer,
        codes=(*_POSE, "ism_failed", "no_ism"),
        curl=_CURL_POSE % ('"template_dir": "templates/mug"', "/api/v1/full_pipeline"),
        parameters=("RequestId", "Deadline", "TraceParent"),
    ),
    Route(
        method="GET",
        path="/api/v1/objects",
        handler=object_routes.list_objects,
        tag=OBJECTS,
        summary="All objects",
        answer=contract.ObjectList,
        curl=f"curl {openapi.BASE}/api/v1/objects",
    ),
    Route(
        method="POST",
        path="/api/v1/objects",
        handler=object_routes.add_object,
        tag=OBJECTS,
        summary="Register a CAD model",
        text="PLY, OBJ, STL, GLB, OFF, or a zip of OBJ, MTL and textures; at most 80 MB. Onboarding goes on by itself; "
        "`wait` blocks until it is done. A taken name is refused, or moved with `replace`.",
        request=contract.ObjectRequest,
        answer=contract.ObjectAnswer,
        statuses={201: "A new object.", 200: "An object that was known already."},
        codes=(*DOOR, *_BODY, "units", "not_ready", "draining", "storage_full"),
        curl=f'curl -F file=@mug.ply -F \'request={{"name": "mug"}};type={JSON}\' '
        f"'{openapi.BASE}/api/v1/objects?wait=60'",
        parameters=("RequestId", "Wait", "TraceParent"),
    ),
    Route(
        method="GET",
        path="/api/v1/objects/{id}",
        handler=object_routes.get_object,
        quiet="watch",
        tag=OBJECTS,
        summary="One object, with the progress of its onboarding",
        answer=contract.ObjectAnswer,
        codes=(*DOOR, "unknown_object"),
        curl=f"curl {openapi.BASE}/api/v1/objects/mug",
        parameters=("ObjectId",),
    ),
    Route(
        method="DELETE",
        path="/api/v1/objects/{id}",
        handler=object_routes.delete_object,
        tag=OBJECTS,
        summary="Remove a name or an object",
        text="By a name: takes that name away, and the object with its last one. By its id: removes the object with "
        "all of its names.",
        statuses={204: "It is gone."},
        codes=(*DOOR, "unknown_object"),
        curl=f"curl -X DELETE {openapi.BASE}/api/v1/objects/mug",
        parameters=("ObjectId",),
    ),
    Route(
        method="GET",
        path="/api/v1/status",
        handler=server_routes.status,
        tag=SERVER,
        summary="How the server is",
        answer=contract.Status,
        curl=f"curl {openapi.BASE}/api/v1/status",
    ),
    Route(
        method="GET",
        path="/api/v1/version",
        handler=server_routes.version,
        tag=SERVER,
        summary="What answers here",
        answer=contract.Version,
        curl=f"curl {openapi.BASE}/api/v1/version",
    ),
    Route(
        method="GET",
        path="/livez",
        handler=server_routes.livez,
        quiet="probe",
        who="anyone",
        tag=SERVER,
        summary="Liveness",
        text="Never depends on the model.",
        plain=_LIVE,
        codes=(),
        curl=f"curl {openapi.BASE}/livez",
    ),
    Route(
        method="GET",
        path="/readyz",
        handler=server_routes.readyz,
        quiet="probe",
        who="anyone",
        counted=(200, 503),
        tag=SERVER,
        summary="Readiness",
        text="503 while loading, warming up or draining.",
        plain=_READY,
        codes=("not_ready", "draining"),
        curl=f"curl {openapi.BASE}/readyz",
    ),
    Route(
        method="GET",
        path="/metrics",
        handler=server_routes.metrics_page,
        quiet="probe",
        who="as the settings say",
        tag=SERVER,
        summary="Prometheus metrics",
        text="Open unless the server's settings ask for a key.",
        plain=("text/plain; version=0.0.4; charset=utf-8", {}),
        curl=f"curl {openapi.BASE}/metrics",
    ),
    Route(
        method="GET",
        path="/openapi.json",
        handler=_openapi_json,
        tag=SERVER,
        summary="This document",
        plain=(JSON, {"openapi": "3.1.0"}),
        curl=f"curl {openapi.BASE}/openapi.json",
    ),
    Route(
        method="GET",
        path="/docs",
        handler=_docs,
        who="anyone",
        tag=SERVER,
        summary="This page",
        plain=("text/html; charset=utf-8", {}),
    ),
    Route(
        method="POST",
        path="/api/v1/pose-estimation",
        handler=pose_routes.seg_data,
        timed=True,
        failure=contract.SegDataAnswer,
        tag=SECOND,
        summary="Poses, in parallel arrays",
        text=f"Takes COCO detections in `seg_data` and answers with arrays over the solved ones. {_TAKES}",
        request=contract.SegDataRequest,
        answer=contract.SegDataAnswer,
        codes=_POSE,
        curl=_CURL_POSE % (f'"seg_data": [{{"segmentation": {_CURL_RLE}}}]', "/api/v1/pose-estimation"),
        parameters=("RequestId", "Deadline", "TraceParent"),
    ),
    Route(
        method="GET",
        path="/api/v1/health",
        handler=server_routes.health,
        quiet="probe",
        tag=SECOND,
        summary="What those clients ask first",
        answer=contract.Health2,
        curl=f"curl {openapi.BASE}/api/v1/health",
    ),
    Route(
        method="GET",
        path="/v2/health/live",
        handler=server_routes.livez,
        quiet="probe",
        tag=OIP,
        summary="Liveness",
        plain=_LIVE,
    ),
    Route(
        method="GET",
        path="/v2/health/ready",
        handler=server_routes.readyz,
        quiet="probe",
        counted=(200, 503),
        tag=OIP,
        summary="Readiness",
        plain=_READY,
        codes=(*DOOR, "not_ready", "draining"),
    ),
    Route(
        method="GET",
        path="/v2/models/pem",
        handler=server_routes.model,
        tag=OIP,
        summary="Metadata, licences of engine and weights included",
        answer=contract.ModelMetadata,
        curl=f"curl {openapi.BASE}/v2/models/pem",
    ),
    Route(
        method="GET",
        path="/v2/models/pem/ready",
        handler=server_routes.readyz,
        quiet="probe",
        counted=(200, 503),
        tag=OIP,
        summary="Readiness of the model",
        plain=_READY,
        codes=(*DOOR, "not_ready", "draining"),
    ),
)


@dataclass(frozen=True)
class Found:
    """The routes of a path, by method."""

    label: str
    quiet: Quiet
    timed: bool
    failure: Failure  # the struct of its failures
    name: str  # the text in place of `{id}`
    methods: Mapping[str, Route]


def _by_path() -> dict[str, Found]:
    found: dict[str, dict[str, Route]] = {}
    for route in ROUTES:
        found.setdefault(route.path, {})[route.method] = route
    return {
        path: Found(first.label or path, first.quiet, first.timed, first.failure, "", methods)
        for path, methods in found.items()
        for first in [next(iter(methods.values()))]
    }


_PATHS: Final = _by_path()
_TEMPLATES: Final = {path.removesuffix("{id}"): path for path in _PATHS if path.endswith("{id}")}
NOWHERE: Final = Found(OTHER, None, False, contract.PoseAnswer, "", {})


def find(path: str) -> Found:
    """Return the routes of a path; NOWHERE if there are none."""
    if path in _PATHS and not path.endswith("{id}"):
        return _PATHS[path]
    for prefix, template in _TEMPLATES.items():
        if path.startswith(prefix):  # also with nothing after it: the handler refuses the empty name
            found, name = _PATHS[template], path[len(prefix) :]
            label = found.label if "/" not in name else OTHER  # object names have no slash: clients cannot make labels
            return replace(found, label=label, name=name)
    return NOWHERE


def counted() -> dict[str, frozenset[int]]:
    """Return label -> the statuses that the metrics show from the start."""
    every = {200, *(status for status, _ in CODES.values())}
    labels: dict[str, frozenset[int]] = {}
    for route in ROUTES:
        label = route.label or route.path
        if label != OTHER:
            labels[label] = labels.get(label, frozenset()) | (every if route.timed else set(route.counted))
    return labels
