"""The contract as an OpenAPI 3.1 document, made from the structs that validate requests; and the page that shows it.

The structs give types, defaults, bounds, and the words and formats of every field. This file adds the routes, the
failures of each, examples, and the values that this server allows for a field (`x-values` in the structs).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec

from pem import contract
from posekit import registry
from posekit.engine import REJECT_CODES
from serve.errors import CODES
from serve.gateway import examples as server_examples
from serve.gateway.route import Route
from serve.objects import examples as object_examples
from serve.tasks.pose import examples as pose_examples

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
    """Return an example of a failure; `schema` is PoseAnswer, or SegDataAnswer in the second dialect."""
    at, detail = _FIELD_AT_FAULT.get(code, (None, CODES[code][1]))
    error = contract.ErrorBody(code=code, detail=detail, request_id="c0ffee0123456789abcdef01", field=at)
    kind = contract.SegDataAnswer if schema == "SegDataAnswer" else contract.PoseAnswer
    example: Json = msgspec.to_builtins(kind(success=False, error_message=detail, error=error))
    return example


# --------------------------------------------------------------------------------------------------------------- routes

KEY_CODES: Final = ("key_missing", "key_wrong")
BASE: Final = "http://127.0.0.1:8003"  # address in the examples; the docs page puts its own in its place
POSES, OBJECTS, SERVER, OIP, SECOND = "Poses", "Objects", "Server", "Open Inference Protocol", "Second dialect"
TAGS: Final = {
    POSES: "An image pair, instance masks and a CAD model in; one row with a pose, or the reason for none, out.",
    OBJECTS: "CAD models, onboarded once and then asked for by name.",
    SERVER: "How the server is, and what it measures.",
    SECOND: "The same core in a spelling that some clients already speak.",
    OIP: "Health and metadata as KServe and its kin ask for them.",
}
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
    contract.PoseRequest,
    contract.FullPipelineRequest,
    contract.SegDataRequest,
    contract.Columns,
    contract.Detection,
    contract.ObjectRequest,
    contract.PoseAnswer,
    contract.SegDataAnswer,
    contract.ObjectAnswer,
    contract.ObjectList,
    contract.Status,
    contract.Version,
    contract.Health2,
    contract.ModelMetadata,
)


def document(version: str, routes: Sequence[Route], engines: Sequence[str] | None = None) -> Json:
    """Return the document; requests may name `engines` (default: all). Routes without a summary are left out."""
    components = _schemas(registry.names() if engines is None else engines)
    paths: Json = {}
    for route in routes:
        if route.summary:
            paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, components)
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
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
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
        "x-curl-base": BASE,
        "x-errors": [{"code": code, "status": status, "text": text} for code, (status, text) in CODES.items()],
    }


def _schemas(engines: Sequence[str]) -> dict[str, Json]:
    """Return every component schema, made from the structs; requests also as the JSON part of a form."""
    _, components = msgspec.json.schema_components(_STRUCTS, ref_template=_REF)
    components = {**components, "Mask": contract.MASK_SCHEMA}
    values: dict[str, Json] = {
        "engine": {"enum": sorted([*engines, "auto"])},
        "reject code": {"type": "string", "enum": list(REJECT_CODES)},
    }
    for component in components.values():
        for schema in component.get("properties", {}).values():
            if name := schema.pop("x-values", None):
                del schema["type"]  # "string": the values say more
                schema.update(values[name])
    for name in ("PoseRequest", "FullPipelineRequest", "SegDataRequest"):
        components[f"{name}Part"] = _without_files(components[name])
    return components


def _without_files(schema: Json) -> Json:
    """Return the schema of a request as the JSON part of a form, whose pictures and mesh are files."""
    part = copy.deepcopy(schema)
    for name in ("rgb_image", "depth_image", "cad"):
        del part["properties"][name]
    part["required"] = [name for name in part["required"] if name in part["properties"]]
    part["title"] += "Part"
    part["description"] = f"The JSON part `request` of a form: {schema['title']} without what comes as files."
    return part


def _examples() -> dict[str, Json]:
    """Return the examples of failures, which several operations share."""
    examples: dict[str, Json] = {}
    for schema in ("PoseAnswer", "SegDataAnswer"):
        for code, (_, text) in CODES.items():
            examples[f"{schema}_{code}"] = {"summary": text, "value": failure_example(code, schema)}
    return examples


def _operation(route: Route, components: Mapping[str, Json]) -> Json:
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
        operation["requestBody"] = {"required": True, "content": _request_content(route.request.__name__, components)}
    if not set(KEY_CODES) & set(route.codes):
        operation["security"] = []
    if route.curl:
        operation["x-curl"] = route.curl
    return operation


def _operation_id(route: Route) -> str:
    words = route.path.removeprefix("/api").strip("/").replace("-", "_2_").replace("{id}", "one").replace(".", "_")
    return f"{route.method.lower()}_{words.replace('/', '_')}"


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


def _success(route: Route, status: int, text: str) -> Json:
    response: Json = {"description": text, "headers": _headers(status)}
    if route.request is contract.ObjectRequest:
        response["headers"]["Location"] = {"$ref": "#/components/headers/Location"}
    if route.answer is not None:
        schema = {"schema": {"$ref": _REF.format(name=route.answer.__name__)}}
        named = EXAMPLES[route.answer.__name__]
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


def _failures(route: Route) -> Json:
    """Return one response per failure status, with an example for each of its codes."""
    schema = route.failure.__name__
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


# ----------------------------------------------------------------------------------------------------------------- page


@cache
def page() -> bytes:
    """Return the documentation page: one HTML file that loads only ./openapi.json."""
    return _PAGE.read_bytes()
