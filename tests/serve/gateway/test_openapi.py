"""The OpenAPI document: sound in itself, and in agreement with what the server accepts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import msgspec
import pytest
from jsonschema import Draft202012Validator

from pem import contract as schemas
from posekit.engine import REJECT_CODES
from posekit.errors import PoseError
from posekit.io.masks import decode_mask
from serve.errors import CODES, ApiError
from serve.gateway import openapi
from serve.gateway.openapi import EXAMPLES
from serve.gateway.routes import ROUTES
from serve.gateway.server_routes import model_metadata
from serve.reading import decode
from serve.settings import Limits
from serve.tasks.pose import question as parse

Json = dict[str, Any]

DOCUMENT = json.loads(msgspec.json.encode(openapi.document("1.2.3", ROUTES)))
SCHEMAS: Json = DOCUMENT["components"]["schemas"]
OPERATIONS = [
    pytest.param(path, method, operation, id=f"{method} {path}")
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]
EACH_OPERATION = pytest.mark.parametrize("path, method, operation", OPERATIONS)
REQUESTS = {
    "PoseRequest": (schemas.PoseRequest, parse.pose_question),
    "FullPipelineRequest": (schemas.FullPipelineRequest, parse.full_pipeline_question),
    "SegDataRequest": (schemas.SegDataRequest, parse.seg_data_question),
}
PNG = EXAMPLES["PoseRequest"]["registered object"]["detections"]["masks"][1]


def walk(value: Any) -> Iterator[Json]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from walk(item)


def resolve(reference: str) -> Any:
    target: Any = DOCUMENT
    for name in reference.removeprefix("#/").split("/"):
        target = target[name.replace("~1", "/")]
    return target


def accepted(schema: Json, value: Any) -> bool:
    """Return True if a value fits a schema of this document."""
    return bool(Draft202012Validator({**schema, "components": DOCUMENT["components"]}).is_valid(value))


def component(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


# ------------------------------------------------------------------------------------------------------------ structure


def test_the_document_says_which_it_is() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    assert DOCUMENT["info"]["version"] == "1.2.3"


def test_each_call_gives_a_document_of_its_own() -> None:
    openapi.document("1.2.3", ROUTES)["paths"].clear()
    assert openapi.document("1.2.3", ROUTES)["paths"]


def test_every_reference_leads_somewhere() -> None:
    references = [node["$ref"] for node in walk(DOCUMENT) if isinstance(node.get("$ref"), str)]
    assert references
    for reference in references:
        assert reference.startswith("#/components/")
        resolve(reference)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_component_is_a_schema_of_draft_2020_12(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])
    used = json.dumps(DOCUMENT)
    assert f'"#/components/schemas/{name}"' in used


def test_every_route_of_the_server_is_described_with_its_methods() -> None:
    served = {(route.path, route.method.lower()) for route in ROUTES}
    described = {(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert described == {(path, method) for path, method in served if path != "/"}


def test_operations_have_names_of_their_own_and_known_tags() -> None:
    operations = [operation for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert {tag for operation in operations for tag in operation["tags"]} == {tag["name"] for tag in DOCUMENT["tags"]}


@EACH_OPERATION
def test_an_operation_is_complete(path: str, method: str, operation: Json) -> None:
    assert re.fullmatch(r"[a-z0-9_]+", operation["operationId"])
    assert operation["summary"]
    for status, response in operation["responses"].items():
        assert 200 <= int(status) < 600
        assert response["description"]
        assert {"X-Request-Id", "Server-Timing"} <= set(response["headers"])
        assert ("Retry-After" in response["headers"]) == (status in ("429", "503"))
        assert status == "204" or response["content"]
    named = {resolve(parameter["$ref"])["name"] for parameter in operation.get("parameters", [])}
    assert set(re.findall(r"{(\w+)}", path)) <= named
    if method == "post":
        assert "X-Request-Id" in named
        assert "multipart/form-data" in operation["requestBody"]["content"]


@EACH_OPERATION
def test_an_answer_that_is_no_struct_says_what_it_is(path: str, method: str, operation: Json) -> None:
    for response in operation["responses"].values():
        for media, content in response.get("content", {}).items():
            assert "schema" in content
            if media == "application/json":
                assert "examples" in content or "example" in content


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_field_is_without_words(name: str) -> None:
    for key, schema in SCHEMAS[name].get("properties", {}).items():
        assert schema.get("description"), f"{name}.{key}"
    assert SCHEMAS[name].get("description")


def test_nothing_is_said_that_only_readers_of_the_code_understand() -> None:
    for private in ("api.md", "design.md", "posekit", "msgspec", ".py"):
        assert private not in json.dumps({**DOCUMENT, "components": {"schemas": SCHEMAS}})


def test_the_values_that_only_the_server_knows_are_filled_in() -> None:
    assert "x-values" not in json.dumps(DOCUMENT)
    for name in REQUESTS:
        assert SCHEMAS[name]["properties"]["engine"]["enum"] == ["auto", "geometric", "sam6d"]
        assert SCHEMAS[f"{name}Part"]["properties"]["engine"] == SCHEMAS[name]["properties"]["engine"]
    for name in ("RowError", "RejectedDetection"):
        assert SCHEMAS[name]["properties"]["code"]["enum"] == list(REJECT_CODES)


def test_another_engine_is_shown_where_requests_may_name_it() -> None:
    document = openapi.document("1.2.3", ROUTES, engines=("geometric", "toy"))
    shown = document["components"]["schemas"]["PoseRequest"]["properties"]["engine"]
    assert (shown["enum"], shown["default"]) == (["auto", "geometric", "toy"], "auto")


@pytest.mark.parametrize("code", [code for code in CODES if code not in ("not_found", "method_not_allowed")])
def test_every_code_is_shown_under_its_status(code: str) -> None:
    status = str(CODES[code][0])
    shown = [
        response
        for node in walk(DOCUMENT["paths"])
        if isinstance(response := node.get(status), dict)
        and code in response.get("content", {}).get("application/json", {}).get("examples", {})
    ]
    assert shown


def test_the_table_of_failures_is_the_servers_own() -> None:
    assert {(row["code"], row["status"]) for row in DOCUMENT["x-errors"]} == {(c, s) for c, (s, _) in CODES.items()}


def test_both_ways_to_present_a_key_are_described_and_probes_need_none() -> None:
    assert DOCUMENT["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert DOCUMENT["components"]["securitySchemes"]["key"]["name"] == "X-API-Key"
    assert {} in DOCUMENT["security"]
    for path in ("/livez", "/readyz"):
        assert DOCUMENT["paths"][path]["get"]["security"] == []


@pytest.mark.parametrize("name", REQUESTS)
def test_the_json_part_of_a_form_leaves_out_what_comes_as_files(name: str) -> None:
    part, whole = SCHEMAS[f"{name}Part"], SCHEMAS[name]
    assert set(whole["properties"]) - set(part["properties"]) == {"rgb_image", "depth_image", "cad"}
    assert set(part["required"]) == set(whole["required"]) - {"rgb_image", "depth_image"}


def test_pictures_are_base64_strings_in_json() -> None:
    picture = SCHEMAS["PoseRequest"]["properties"]["rgb_image"]
    assert (picture["type"], picture["contentEncoding"]) == ("string", "base64")


# ------------------------------------------------------------------------------------------------------------- examples

ALL_EXAMPLES = [
    pytest.param(schema, value, id=f"{schema} {name}")
    for schema, named in EXAMPLES.items()
    for name, value in named.items()
]


@pytest.mark.parametrize("schema, value", ALL_EXAMPLES)
def test_an_example_fits_its_schema_and_decodes_with_its_struct(schema: str, value: Json) -> None:
    jsonschema.validate(value, {**component(schema), "components": DOCUMENT["components"]}, Draft202012Validator)
    msgspec.json.decode(msgspec.json.encode(value), type=getattr(schemas, schema))


@pytest.mark.parametrize("schema, value", [p for p in ALL_EXAMPLES if p.values[0] in REQUESTS])
def test_a_request_example_is_a_question_that_the_server_takes(schema: str, value: Json) -> None:
    struct, question = REQUESTS[schema]
    request = decode(msgspec.json.encode(value), "json", struct)
    asked = question(request, "json", Limits())  # type: ignore[operator]
    for spec in asked.asked.detections:
        assert decode_mask(spec.png or spec.raw, 4, 4, None, 16).sum() == 4


@EACH_OPERATION
def test_every_json_example_of_an_operation_fits_its_schema(path: str, method: str, operation: Json) -> None:
    contents = [response.get("content", {}) for response in operation["responses"].values()]
    contents.append(operation.get("requestBody", {}).get("content", {}))
    for content in contents:
        media = content.get("application/json", {})
        for example in media.get("examples", {}).values():
            value = resolve(example["$ref"])["value"] if "$ref" in example else example["value"]
            assert accepted(media["schema"], value)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("schema", ["PoseAnswer", "SegDataAnswer"])
def test_a_failure_example_is_a_failed_answer(schema: str, code: str) -> None:
    example = resolve(f"#/components/examples/{schema}_{code}")["value"]
    answer = msgspec.convert(example, getattr(schemas, schema))
    assert not answer.success
    assert answer.error.code == code
    assert answer.error.detail == answer.error_message


def test_the_model_metadata_fits_its_schema_and_names_both_licences() -> None:
    for engine in ("geometric", "sam6d"):
        metadata = model_metadata(version="1", release="r", engine=engine)
        value = msgspec.to_builtins(metadata)
        assert accepted(component("ModelMetadata"), value)
        assert value["parameters"]["engine_licence"]
        assert value["parameters"]["weights_licence"]


# -------------------------------------------------------------------------------------- fields that take several forms

K = [600, 0, 2, 0, 600.5, 2, 0, 0, 1]


def takes_camera(cam_params: Json) -> bool:
    base = EXAMPLES["PoseRequest"]["registered object"]
    try:
        request = decode(msgspec.json.encode({**base, "cam_params": cam_params}), "json", schemas.PoseRequest)
        parse.pose_question(request, "json", Limits())
    except ApiError:
        return False
    return True


@pytest.mark.parametrize(
    "cam_K, good",
    [
        (K, True),
        ([K[:3], K[3:6], K[6:]], True),
        (K[:8], False),
        ([K[:3], K[3:6]], False),
        ([K[:3], K[3:6], K[6:8]], False),
        ([str(x) for x in K], False),
        ({"fx": 600}, False),
        (None, False),
        ("eye", False),
    ],
)
def test_the_forms_of_the_camera_matrix_are_those_that_the_server_takes(cam_K: Any, good: bool) -> None:
    cam_params = {"cam_K": cam_K}
    assert accepted(component("CamParams"), cam_params) is good
    assert takes_camera(cam_params) is good


ROWS = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
MASKS = [
    pytest.param({"size": [4, 4], "counts": [5, 2, 2, 2, 5]}, True, id="rle list"),
    pytest.param({"size": [4, 4], "counts": "52203"}, True, id="rle string"),
    pytest.param(PNG, True, id="png"),
    pytest.param("data:image/png;base64," + PNG, True, id="data url"),
    pytest.param(ROWS, True, id="nested list"),
    pytest.param([[bool(x) for x in row] for row in ROWS], True, id="nested list of booleans"),
    pytest.param([[1, 1, 3, 1, 3, 3, 1, 3]], True, id="polygons"),
    pytest.param([[1.0, 1, 3, 1, 3, 3], [1, 1.5, 3, 3, 1, 3]], True, id="two polygons"),
    pytest.param([1, 1, 3, 1, 3, 3, 1, 3], True, id="one polygon"),
    pytest.param([], True, id="no polygon"),
    pytest.param({"size": [4, 4]}, False, id="rle without counts"),
    pytest.param({"counts": "52203"}, False, id="rle without size"),
    pytest.param({"size": [4], "counts": "52203"}, False, id="rle of one side"),
    pytest.param({"size": [4.5, 4], "counts": "52203"}, False, id="rle of half a row"),
    pytest.param({"size": [4, 4], "counts": [5, 2, -2, 2, 9]}, False, id="rle with a negative run"),
    pytest.param({"size": [4, 4], "counts": None}, False, id="rle of nothing"),
    pytest.param("not a picture", False, id="text"),
    pytest.param("", False, id="empty text"),
    pytest.param([[1, 1, 3]], False, id="polygon of three numbers"),
    pytest.param([[0, 2], ["a", 1]], False, id="letters"),
    pytest.param([[1, 1, 3, None, 3, 3]], False, id="polygon with a hole"),
    pytest.param(7, False, id="number"),
    pytest.param(None, False, id="null"),
    pytest.param(True, False, id="boolean"),
]


@pytest.mark.parametrize("mask, good", MASKS)
def test_the_forms_of_a_mask_are_those_that_the_server_takes(mask: Any, good: bool) -> None:
    assert accepted(component("Mask"), mask) is good
    assert takes_mask(mask) is good


def takes_mask(mask: Any) -> bool:
    base = EXAMPLES["PoseRequest"]["registered object"]
    body = msgspec.json.encode({**base, "detections": {"masks": [mask]}})
    try:
        question = parse.pose_question(decode(body, "json", schemas.PoseRequest), "json", Limits())
        spec = question.asked.detections[0]
        decode_mask(spec.png or spec.raw, 4, 4, None, 16)
    except (ApiError, PoseError):
        return False
    return True


SQUARE = MASKS[0].values[0]
DETECTIONS = [
    pytest.param({"masks": []}, True, id="none"),
    pytest.param([], True, id="none, as a list"),
    pytest.param({"masks": [SQUARE, PNG, ROWS]}, True, id="columns, only masks"),
    pytest.param(
        {"masks": [SQUARE], "boxes": [[1, 1, 2, 2]], "scores": [1], "object_ids": ["mug"]}, True, id="columns, all"
    ),
    pytest.param({"masks": [SQUARE], "boxes": None, "object_ids": [None]}, True, id="columns with nulls"),
    pytest.param([{"segmentation": SQUARE}], True, id="list, only masks"),
    pytest.param(
        [{"segmentation": SQUARE, "category_id": 5, "bbox": [1, 1, 2, 2], "score": 0.5, "image_id": 0, "time": 1.5}],
        True,
        id="list with unknown keys",
    ),
    pytest.param({}, False, id="no masks"),
    pytest.param({"masks": SQUARE}, False, id="a mask in place of masks"),
    pytest.param({"masks": [SQUARE], "labels": [1]}, False, id="columns with an unknown key"),
    pytest.param({"masks": [SQUARE], "boxes": [[1, 1, 2]]}, False, id="a box of three"),
    pytest.param({"masks": [SQUARE], "scores": ["high"]}, False, id="a score in words"),
    pytest.param([{"bbox": [1, 1, 2, 2]}], False, id="list without a mask"),
    pytest.param([SQUARE], False, id="list of masks"),
    pytest.param(None, False, id="null"),
    pytest.param("all", False, id="text"),
]


@pytest.mark.parametrize("detections, good", DETECTIONS)
def test_the_forms_of_detections_are_those_that_the_server_takes(detections: Any, good: bool) -> None:
    base = EXAMPLES["PoseRequest"]["registered object"]
    assert accepted(component("PoseRequest"), {**base, "detections": detections}) is good
    assert takes_detections("PoseRequest", {**base, "detections": detections}) is good


@pytest.mark.parametrize("detections, good", [p for p in DETECTIONS if isinstance(p.values[0], list)])
def test_the_second_dialect_takes_the_list(detections: Any, good: bool) -> None:
    base = EXAMPLES["SegDataRequest"]["default"]
    assert accepted(component("SegDataRequest"), {**base, "seg_data": detections}) is good
    assert takes_detections("SegDataRequest", {**base, "seg_data": detections}) is good


def takes_detections(schema: str, body: Json) -> bool:
    struct, question = REQUESTS[schema]
    try:
        question(decode(msgspec.json.encode(body), "json", struct), "json", Limits())  # type: ignore[operator]
    except ApiError:
        return False
    return True


@pytest.mark.parametrize(
    "change",
    [
        {"rgb_image": None},
        {"hypotheses": -1},
        {"min_score": 1.5},
        {"deadline_ms": 0},
        {"cad_path": ""},
        {"unit": "mm"},
        {"objects": {"5": "mug"}},
        {"init_poses": [{"rotation": [[1, 0, 0]], "translation": [0, 0, 0]}]},
    ],
)
def test_what_the_structs_refuse_the_document_refuses(change: Json) -> None:
    body = {**EXAMPLES["PoseRequest"]["registered object"], **change}
    assert not accepted(component("PoseRequest"), body)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode(body), type=schemas.PoseRequest)


@pytest.mark.parametrize("schema", REQUESTS)
@pytest.mark.parametrize("engine", ["auto", "geometric", "sam6d"])
def test_an_engine_that_the_document_names_is_taken(schema: str, engine: str) -> None:
    body = {**next(iter(EXAMPLES[schema].values())), "engine": engine}
    assert accepted(component(schema), body)
    assert takes_detections(schema, body)


@pytest.mark.parametrize("schema", REQUESTS)
@pytest.mark.parametrize("engine", ["magic", "", "AUTO", "it's", "base64"])
def test_another_engine_is_refused_in_the_words_of_a_closed_list(schema: str, engine: str) -> None:
    body = {**next(iter(EXAMPLES[schema].values())), "engine": engine}
    assert not accepted(component(schema), body)
    struct, question = REQUESTS[schema]

    class Closed(msgspec.Struct):
        engine: Literal["auto", "geometric", "sam6d"]

    with pytest.raises(ApiError) as words:
        decode(msgspec.json.encode({"engine": engine}), "json", Closed)
    with pytest.raises(ApiError) as refusal:
        question(decode(msgspec.json.encode(body), "json", struct), "json", Limits())  # type: ignore[operator]
    told = [(error.value.code, error.value.detail, error.value.field) for error in (words, refusal)]
    assert told[0] == told[1]


def test_the_engines_that_may_be_named_are_those_registered() -> None:
    for engine in ("auto", "geometric", "sam6d"):
        parse.check_engine(engine)
    with pytest.raises(ApiError, match="Invalid enum value 'toy', at engine"):
        parse.check_engine("toy")
