"""The contract as an OpenAPI 3.1 document, out of the structs that validate requests; and the page that shows it.

The structs give types, defaults, bounds, and the words and forms of every field. This file adds the routes, the
failures each may answer with, examples, and the values that this server knows for a field (`x-values` in the structs).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from pem import contract as schemas
from posekit.engine import REJECT_CODES
from serve.errors import CODES
from serve.gateway import examples as server_examples
from serve.objects import examples as object_examples
from serve.tasks.pose import examples as pose_examples
from serve.tasks.pose.question import ENGINES

Json = dict[str, Any]

_REF: Final = "#/components/schemas/{name}"
_JSON, _MSGPACK, _FORM = "application/json", "application/msgpack", "multipart/form-data"
_PAGE: Final = Path(__file__).parent / "static" / "docs.html"

#: schema -> name -> an example that its struct accepts
EXAMPLES: Final[dict[str, dict[str, Json]]] = {
    **pose_examples.EXAMPLES,
    **object_examples.EXAMPLES,
    **server_examples.EXAMPLES,
}

_FIELD_AT_FAULT: Final = {
    "invalid": ("cam_params.cam_K", "cam_K is singular: its focal lengths cannot be zero"),
    "units": (None, "depth looks 1000 times too small for this CAD: it seems to be metres; say depth_unit m"),
    "bad_data": ("rgb_image", "the image is neither a PNG nor a JPEG"),
    "too_large": (None, "the body is 31 MB; at most 20 MB are accepted"),
    "unknown_object": ("object_id", "no object is registered under this id or name; POST /api/v1/objects adds one"),
    "no_cad_file": ("cad_path", "no CAD file at this path under the CAD root"),
}


def failure_example(code: str, schema: str = "PoseAnswer") -> Json:
    """What a failure with this code looks like; `schema` is PoseAnswer, or SegDataAnswer in the second dialect."""
    at, detail = _FIELD_AT_FAULT.get(code, (None, CODES[code][1]))
    error = schemas.ErrorBody(code=code, detail=detail, request_id="c0ffee0123456789abcdef01", field=at)
    kind = schemas.SegDataAnswer if schema == "SegDataAnswer" else schemas.PoseAnswer
    example: Json = msgspec.to_builtins(kind(success=False, error_message=detail, error=error))
    return example


# --------------------------------------------------------------------------------------------------------------- routes

_DOOR: Final = ("key_missing", "key_wrong", "rate_limited", "internal")
_BODY: Final = ("bad_body", "bad_data", "body_timeout", "too_large", "unsupported_media_type", "invalid")
_POSE: Final = (
    *_DOOR,
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

_BASE: Final = "http://127.0.0.1:8003"
_CURL_POSE: Final = f"""\
curl -F rgb=@rgb.png -F depth=@depth.png \\
  -F 'request={{"cam_params": {{"cam_K": [600, 0, 320, 0, 600, 240, 0, 0, 1]}},
               "object_id": "mug",
               %s}};type={_JSON}' \\
  {_BASE}%s"""
_CURL_RLE: Final = '{"size": [480, 640], "counts": [96100, 200, 210900]}'


@dataclass(frozen=True, kw_only=True)
class _Route:
    """One operation: what it takes, what it answers, and how it fails."""

    method: Literal["get", "post", "delete"]
    path: str
    tag: str
    summary: str
    text: str = ""
    request: str | None = None  # schema of the body
    answer: str | None = None  # schema of the answer
    statuses: Mapping[int, str] = field(default_factory=lambda: {200: "The answer."})
    codes: Iterable[str] = _DOOR
    curl: str = ""
    parameters: tuple[str, ...] = ()
    plain: tuple[str, Json] | None = None  # media type and example of an answer that is no struct
    open: bool = False  # never asks for a key


_POSES, _OBJECTS, _SERVER, _OIP, _SECOND = "Poses", "Objects", "Server", "Open Inference Protocol", "Second dialect"
_TAGS: Final = {
    _POSES: "An image pair, instance masks and a CAD model in; one row with a pose, or the reason for none, out.",
    _OBJECTS: "CAD models, onboarded once and then asked for by name.",
    _SERVER: "How the server is, and what it measures.",
    _SECOND: "The same core in a spelling that some clients already speak.",
    _OIP: "Health and metadata as KServe and its kin ask for them.",
}
_TAKES: Final = (
    "As JSON (pictures in base64), as MessagePack (pictures as raw bytes), or as a form with the files `rgb` and "
    "`depth` and a JSON part `request`. Bodies may be gzipped. Unknown fields are refused, so that a typo never passes."
)
_LIVE: Final[tuple[str, Json]] = (_JSON, {"live": True})
_READY: Final[tuple[str, Json]] = (_JSON, {"ready": True})

_ROUTES: Final = (
    _Route(
        method="post",
        path="/api/v1/pose_estimation",
        tag=_POSES,
        summary="Poses of detected objects",
        text="One row for each detection, in the order sent; a detection without a pose says why. "
        f"Lengths are millimetres in and out. {_TAKES}",
        request="PoseRequest",
        answer="PoseAnswer",
        codes=_POSE,
        curl=_CURL_POSE % (f'"detections": {{"masks": [{_CURL_RLE}]}}', "/api/v1/pose_estimation"),
        parameters=("RequestId", "Deadline", "TraceParent"),
    ),
    _Route(
        method="post",
        path="/api/v1/full_pipeline",
        tag=_POSES,
        summary="Detection and poses",
        text="The same without detections: the configured instance-segmentation (ISM) server is asked for them first, "
        f"and the answer tells what it found. {_TAKES}",
        request="FullPipelineRequest",
        answer="PoseAnswer",
        codes=(*_POSE, "ism_failed", "no_ism"),
        curl=_CURL_POSE % ('"template_dir": "templates/mug"', "/api/v1/full_pipeline"),
        parameters=("RequestId", "Deadline", "TraceParent"),
    ),
    _Route(
        method="post",
        path="/api/v1/objects",
        tag=_OBJECTS,
        summary="Register a CAD model",
        text="PLY, OBJ, STL, GLB, OFF, or a zip of OBJ, MTL and textures; at most 80 MB. Onboarding goes on by itself; "
        "`wait` blocks until it is done.",
        request="ObjectRequest",
        answer="ObjectAnswer",
        statuses={201: "A new object.", 200: "An object that was known already."},
        codes=(*_DOOR, *_BODY, "units", "not_ready", "draining", "storage_full"),
        curl=f"curl -F file=@mug.ply -F 'request={{\"name\": \"mug\"}};type={_JSON}' '{_BASE}/api/v1/objects?wait=60'",
        parameters=("RequestId", "Wait", "TraceParent"),
    ),
    _Route(
        method="get",
        path="/api/v1/objects",
        tag=_OBJECTS,
        summary="All objects",
        answer="ObjectList",
        curl=f"curl {_BASE}/api/v1/objects",
    ),
    _Route(
        method="get",
        path="/api/v1/objects/{id}",
        tag=_OBJECTS,
        summary="One object, with the progress of its onboarding",
        answer="ObjectAnswer",
        codes=(*_DOOR, "unknown_object"),
        curl=f"curl {_BASE}/api/v1/objects/mug",
        parameters=("ObjectId",),
    ),
    _Route(
        method="delete",
        path="/api/v1/objects/{id}",
        tag=_OBJECTS,
        summary="Remove an object",
        statuses={204: "It is gone."},
        codes=(*_DOOR, "unknown_object"),
        curl=f"curl -X DELETE {_BASE}/api/v1/objects/mug",
        parameters=("ObjectId",),
    ),
    _Route(
        method="get",
        path="/api/v1/status",
        tag=_SERVER,
        summary="How the server is",
        answer="Status",
        curl=f"curl {_BASE}/api/v1/status",
    ),
    _Route(
        method="get",
        path="/api/v1/version",
        tag=_SERVER,
        summary="What answers here",
        answer="Version",
        curl=f"curl {_BASE}/api/v1/version",
    ),
    _Route(
        method="get",
        path="/livez",
        tag=_SERVER,
        summary="Liveness",
        text="Never depends on the model.",
        plain=_LIVE,
        codes=(),
        curl=f"curl {_BASE}/livez",
        open=True,
    ),
    _Route(
        method="get",
        path="/readyz",
        tag=_SERVER,
        summary="Readiness",
        text="503 while loading, warming up or draining.",
        plain=_READY,
        codes=("not_ready", "draining"),
        curl=f"curl {_BASE}/readyz",
        open=True,
    ),
    _Route(
        method="get",
        path="/metrics",
        tag=_SERVER,
        summary="Prometheus metrics",
        text="Open unless the server's settings ask for a key.",
        plain=("text/plain; version=0.0.4; charset=utf-8", {}),
        curl=f"curl {_BASE}/metrics",
    ),
    _Route(
        method="get",
        path="/openapi.json",
        tag=_SERVER,
        summary="This document",
        plain=(_JSON, {"openapi": "3.1.0"}),
        curl=f"curl {_BASE}/openapi.json",
    ),
    _Route(method="get", path="/docs", tag=_SERVER, summary="This page", plain=("text/html; charset=utf-8", {})),
    _Route(
        method="post",
        path="/api/v1/pose-estimation",
        tag=_SECOND,
        summary="Poses, in parallel arrays",
        text=f"Takes COCO detections in `seg_data` and answers with arrays over the solved ones. {_TAKES}",
        request="SegDataRequest",
        answer="SegDataAnswer",
        codes=_POSE,
        curl=_CURL_POSE % (f'"seg_data": [{{"segmentation": {_CURL_RLE}}}]', "/api/v1/pose-estimation"),
        parameters=("RequestId", "Deadline", "TraceParent"),
    ),
    _Route(
        method="get",
        path="/api/v1/health",
        tag=_SECOND,
        summary="What those clients ask first",
        answer="Health2",
        curl=f"curl {_BASE}/api/v1/health",
    ),
    _Route(method="get", path="/v2/health/live", tag=_OIP, summary="Liveness", plain=_LIVE),
    _Route(
        method="get",
        path="/v2/health/ready",
        tag=_OIP,
        summary="Readiness",
        plain=_READY,
        codes=(*_DOOR, "not_ready", "draining"),
    ),
    _Route(
        method="get",
        path="/v2/models/pem",
        tag=_OIP,
        summary="Metadata, licences of engine and weights included",
        answer="ModelMetadata",
        curl=f"curl {_BASE}/v2/models/pem",
    ),
    _Route(
        method="get",
        path="/v2/models/pem/ready",
        tag=_OIP,
        summary="Readiness of the model",
        plain=_READY,
        codes=(*_DOOR, "not_ready", "draining"),
    ),
)

_PARAMETERS: Final[dict[str, Json]] = {
    "RequestId": {
        "name": "X-Request-Id",
        "in": "header",
        "description": "Your own id for this request, echoed in the answer and in the log.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    },
    "Deadline": {
        "name": "X-Request-Deadline-Ms",
        "in": "header",
        "description": "As the field deadline_ms; the shorter one counts.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "TraceParent": {
        "name": "traceparent",
        "in": "header",
        "description": "Your span (W3C Trace Context): the server's becomes its child. A malformed one is ignored.",
        "schema": {"type": "string"},
        "example": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    },
    "Wait": {
        "name": "wait",
        "in": "query",
        "description": "Seconds to wait for the onboarding.",
        "schema": {"type": "number", "minimum": 0, "maximum": 600, "default": 0},
    },
    "ObjectId": {
        "name": "id",
        "in": "path",
        "required": True,
        "description": "The object's id or name.",
        "schema": {"type": "string", "minLength": 1},
    },
}
_HEADERS: Final[dict[str, Json]] = {
    "X-Request-Id": {"description": "Yours where it was well-formed, else ours.", "schema": {"type": "string"}},
    "Server-Timing": {
        "description": "Where the time went, as browsers show it.",
        "schema": {"type": "string"},
        "example": "total;dur=176.0, decode;dur=21.4, queue;dur=3.2, pose;dur=148.9",
    },
    "traceparent": {"description": "The server's span for this request.", "schema": {"type": "string"}},
    "Retry-After": {"description": "Whole seconds after which to try again.", "schema": {"type": "integer"}},
    "Location": {"description": "Path of the object.", "schema": {"type": "string"}},
}
_RETRY: Final = (429, 503)  # statuses that say when to come back

# ------------------------------------------------------------------------------------------------------------- document

_STRUCTS: Final = (
    schemas.PoseRequest,
    schemas.FullPipelineRequest,
    schemas.SegDataRequest,
    schemas.Columns,
    schemas.Detection,
    schemas.ObjectRequest,
    schemas.PoseAnswer,
    schemas.SegDataAnswer,
    schemas.ObjectAnswer,
    schemas.ObjectList,
    schemas.Status,
    schemas.Version,
    schemas.Health2,
    schemas.ModelMetadata,
)


def document(version: str, engines: Iterable[str] = ENGINES) -> Json:
    """The whole document, a new copy each time; requests may name `engines`, beside "auto"."""
    return copy.deepcopy(_document(version, tuple(engines)))


@cache
def _document(version: str, engines: tuple[str, ...]) -> Json:
    components = _schemas(engines)
    paths: Json = {}
    for route in _ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route, components)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "PEM Server",
            "version": version,
            "summary": "6D object pose estimation over HTTP.",
            "description": "Where is each object, and how sure are we? Lengths are millimetres; rotations are object "
            "to camera in the OpenCV camera frame (x right, y down, z forward): p_cam = R p_obj + t. "
            "Answers are JSON, or MessagePack with `Accept: application/msgpack`. "
            "Every answer carries X-Request-Id, Server-Timing and traceparent. "
            "A path that is no route answers 404 `not_found`, a method that a route does not take 405 "
            "`method_not_allowed`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "security": [{"bearer": []}, {"key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": components,
            "parameters": _PARAMETERS,
            "headers": _HEADERS,
            "examples": _examples(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer KEY`"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "`X-API-Key: KEY`"},
            },
        },
        "x-curl-base": _BASE,  # the docs page puts its own address there
        "x-errors": [{"code": code, "status": status, "text": text} for code, (status, text) in CODES.items()],
    }


def _schemas(engines: Iterable[str]) -> dict[str, Json]:
    """Every component schema, out of the structs; the requests also as the JSON part of a form."""
    _, components = msgspec.json.schema_components(_STRUCTS, ref_template=_REF)
    components = {**components, "Mask": schemas.MASK_SCHEMA}
    values: dict[str, Json] = {
        "engine": {"enum": sorted([*engines, "auto"])},
        "reject code": {"type": "string", "enum": list(REJECT_CODES)},
    }
    for component in components.values():
        for schema in component.get("properties", {}).values():
            if name := schema.pop("x-values", None):
                del schema["type"]  # "string", which the values say better
                schema.update(values[name])
    for name in ("PoseRequest", "FullPipelineRequest", "SegDataRequest"):
        components[f"{name}Part"] = _without_files(components[name])
    return components


def _without_files(schema: Json) -> Json:
    """A request as the JSON part of a form, whose pictures and mesh are files."""
    part = copy.deepcopy(schema)
    for name in ("rgb_image", "depth_image", "cad"):
        del part["properties"][name]
    part["required"] = [name for name in part["required"] if name in part["properties"]]
    part["title"] += "Part"
    part["description"] = f"The JSON part `request` of a form: {schema['title']} without what comes as files."
    return part


def _examples() -> dict[str, Json]:
    """Answers and failures that several operations share."""
    examples: dict[str, Json] = {}
    for schema in ("PoseAnswer", "SegDataAnswer"):
        for code, (_, text) in CODES.items():
            examples[f"{schema}_{code}"] = {"summary": text, "value": failure_example(code, schema)}
    return examples


def _operation(route: _Route, components: Mapping[str, Json]) -> Json:
    operation: Json = {
        "operationId": _operation_id(route),
        "tags": [route.tag],
        "summary": route.summary,
        "description": route.text,
        "responses": {str(status): _success(route, status, text) for status, text in route.statuses.items()}
        | _failures(route),
    }
    if route.parameters:
        operation["parameters"] = [{"$ref": f"#/components/parameters/{name}"} for name in route.parameters]
    if route.request is not None:
        operation["requestBody"] = {"required": True, "content": _request_content(route.request, components)}
    if route.open:
        operation["security"] = []
    if route.curl:
        operation["x-curl"] = route.curl
    return operation


def _operation_id(route: _Route) -> str:
    words = route.path.removeprefix("/api").strip("/").replace("-", "_2_").replace("{id}", "one").replace(".", "_")
    return f"{route.method}_{words.replace('/', '_')}"


def _request_content(schema: str, components: Mapping[str, Json]) -> Json:
    examples = {name: {"value": value} for name, value in EXAMPLES[schema].items()}
    if schema == "ObjectRequest":
        return {
            _FORM: {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"description": "The mesh, with its file name.", "contentMediaType": "model/*"},
                        "request": {"$ref": _REF.format(name=schema)},
                    },
                    "required": ["file"],
                },
                "encoding": {"file": {"contentType": "application/octet-stream"}, "request": {"contentType": _JSON}},
                "examples": {"named": {"value": {"file": "mug.ply", "request": EXAMPLES[schema]["named"]}}},
            }
        }
    fields = components[schema]["properties"]
    files = {
        "rgb": {"description": fields["rgb_image"]["description"], "contentMediaType": "image/png"},
        "depth": {"description": fields["depth_image"]["description"], "contentMediaType": "image/png"},
        "cad": {"description": fields["cad"]["description"], "contentMediaType": "application/octet-stream"},
    }
    return {
        _JSON: {"schema": {"$ref": _REF.format(name=schema)}, "examples": examples},
        _MSGPACK: {"schema": {"$ref": _REF.format(name=schema)}},
        _FORM: {
            "schema": {
                "type": "object",
                "properties": {**files, "request": {"$ref": _REF.format(name=f"{schema}Part")}},
                "required": ["rgb", "depth", "request"],
            },
            "encoding": {
                "rgb": {"contentType": "image/png, image/jpeg"},
                "depth": {"contentType": "image/png, image/tiff"},
                "cad": {"contentType": "application/octet-stream"},
                "request": {"contentType": _JSON},
            },
        },
    }


def _headers(status: int) -> Json:
    names = ["X-Request-Id", "Server-Timing", "traceparent", *(["Retry-After"] if status in _RETRY else [])]
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _success(route: _Route, status: int, text: str) -> Json:
    response: Json = {"description": text, "headers": _headers(status)}
    if route.request == "ObjectRequest":
        response["headers"]["Location"] = {"$ref": "#/components/headers/Location"}
    if route.answer is not None:
        schema = {"schema": {"$ref": _REF.format(name=route.answer)}}
        named = EXAMPLES.get(route.answer) or {"default": msgspec.to_builtins(_METADATA)}
        response["content"] = {
            _JSON: {**schema, "examples": {name: {"value": value} for name, value in named.items()}},
            _MSGPACK: schema,
        }
    elif route.plain is not None:
        media, example = route.plain
        is_json = media == _JSON
        response["content"] = {media: {"schema": {"type": "object" if is_json else "string"}}}
        if is_json:
            response["content"][media]["example"] = example
    return response


def _failures(route: _Route) -> Json:
    """One response for each status, with the codes that it may carry as examples."""
    schema = "SegDataAnswer" if route.answer == "SegDataAnswer" else "PoseAnswer"
    by_status: dict[int, list[str]] = {}
    for code in CODES:
        if code in set(route.codes):
            by_status.setdefault(CODES[code][0], []).append(code)
    return {
        str(status): {
            "description": "; ".join(f"`{code}`: {CODES[code][1]}" for code in codes),
            "headers": _headers(status),
            "content": {
                _JSON: {
                    "schema": {"$ref": _REF.format(name=schema)},
                    "examples": {code: {"$ref": f"#/components/examples/{schema}_{code}"} for code in codes},
                },
                _MSGPACK: {"schema": {"$ref": _REF.format(name=schema)}},
            },
        }
        for status, codes in sorted(by_status.items())
    }


# ---------------------------------------------------------------------------------------------- page and model metadata


@cache
def page() -> bytes:
    """The documentation page: one HTML file that loads nothing but ./openapi.json."""
    return _PAGE.read_bytes()


#: engine -> terms of its code and of its weights
_LICENCES: Final = {
    "geometric": ("Apache-2.0", "none: this engine has no weights"),
    "sam6d": ("Apache-2.0", "not stated by their authors: ask them before commercial use"),
}


def model_metadata(*, version: str, release: str, engine: str) -> schemas.ModelMetadata:
    """`GET /v2/models/pem`: what goes in and out, and under which terms. Shapes use -1 for any number."""
    engine_licence, weights_licence = _LICENCES[engine]
    return schemas.ModelMetadata(
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
            "engine_licence": engine_licence,
            "weights_licence": weights_licence,
            "lengths": "mm",
            "frame": "object to camera, OpenCV camera frame",
            "endpoint": "/api/v1/pose_estimation",
        },
    )


def _tensor(name: str, datatype: str, *shape: int) -> Json:
    return {"name": name, "datatype": datatype, "shape": list(shape)}


_METADATA: Final = model_metadata(version="0.1.0", release="geometric-2", engine="geometric")
