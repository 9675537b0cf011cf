"""Detections in requests: the forms of a mask, columns, and SAM-6D's list; and the detections of an ISM server."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from pem.contract.common import Box, Wire

MASK_SCHEMA: Final[dict[str, Any]] = {
    "title": "Mask",
    "description": "One instance mask of the image's size, in any of these forms.",
    "anyOf": [
        {
            "title": "RLE",
            "description": "COCO run-length encoding, compressed or as a list of counts.",
            "type": "object",
            "properties": {
                "size": {
                    "description": "Height, width.",
                    "type": "array",
                    "items": {"type": "integer", "minimum": 0},
                    "minItems": 2,
                    "maxItems": 2,
                },
                "counts": {
                    "description": "COCO's compressed string, or run lengths that begin with zeros.",
                    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer", "minimum": 0}}],
                },
            },
            "required": ["size", "counts"],
        },
        {
            "title": "PNG",
            "description": "PNG, inside where not zero; base64 in JSON, raw bytes in MessagePack.",
            "type": "string",
            "contentEncoding": "base64",
            "contentMediaType": "image/png",
            "pattern": r"^(data:image/png;base64,)?iVBORw0KGgo[A-Za-z0-9+/\s]+={0,2}\s*$",
        },
        {
            "title": "Nested list",
            "description": "One list for each row of the image.",
            "type": "array",
            "minItems": 1,
            "items": {"type": "array", "minItems": 1, "items": {"enum": [0, 1, False, True]}},
        },
        {
            "title": "Polygons",
            "description": "`[x, y, x, y, ...]` in pixels each, (0, 0) being the image's outer corner.",
            "type": "array",
            "items": {"type": "array", "items": {"type": "number"}, "minItems": 6},
        },
        {
            "title": "Polygon",
            "description": "One polygon.",
            "type": "array",
            "items": {"type": "number"},
            "minItems": 6,
        },
    ],
}

# The OpenAPI document holds MASK_SCHEMA once, under this name.
Mask = Annotated[msgspec.Raw, Meta(extra_json_schema={"$ref": "#/components/schemas/Mask"})]


class Columns(Wire, kw_only=True):
    """Detections as parallel columns; only masks are required."""

    masks: Annotated[list[Mask], Meta(description="One for each detection.")]
    boxes: Annotated[
        list[Box] | None, Meta(description="Pixels, see box_format; the masks' own boxes unless given.")
    ] = None
    scores: Annotated[
        list[float] | None,
        Meta(description="The detector's; 1.0 unless given. They do not change a pose's confidence."),
    ] = None
    object_ids: Annotated[
        list[int | str | None] | None,
        Meta(description="Category of each detection: integer, string or null, echoed in its row."),
    ] = None


class Detection(msgspec.Struct, kw_only=True):
    """One item of SAM-6D's `detection_ism.json`; unknown keys are ignored."""

    segmentation: Annotated[Mask, Meta(description="The mask.")]
    category_id: Annotated[
        int | str | None, Meta(description="Echoed in the row as object_id, and the key into `objects`.")
    ] = None
    bbox: Annotated[Box | None, Meta(description="Pixels, see box_format; the mask's own box unless given.")] = None
    score: Annotated[float, Meta(description="The detector's.")] = 1.0


class FoundDetections(msgspec.Struct, kw_only=True):
    """What the ISM server found: masks as compressed RLE, boxes xywh."""

    masks: Annotated[list[dict[str, Any]], Meta(description="Compressed COCO RLE.")]
    boxes: Annotated[list[list[float]], Meta(description="x, y, width, height in pixels.")]
    scores: Annotated[list[float], Meta(description="The detector's.")]
    object_ids: Annotated[list[int | str | None], Meta(description="As the ISM server gave them.")]
