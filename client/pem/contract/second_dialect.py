"""The second dialect: the same request and answer under the names that some clients already use."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pem.contract.common import Asked, ErrorBody, RejectCode


class SegDataRequest(Asked, kw_only=True):
    """Detections and CAD in, as the second dialect spells them."""

    depth_image: Annotated[
        bytes,
        Meta(
            description="Depth image: 16-bit PNG or 32-bit float TIFF, registered to the colour image and of its size; "
            "0 and NaN mean no reading. 8-bit depth has lost its data and is refused. "
            "Bare little-endian float32 of the colour image's size is accepted."
        ),
    ]
    seg_data: Annotated[
        msgspec.Raw,
        Meta(
            description="COCO detections, as SAM-6D's detection_ism.json has them.",
            extra_json_schema={"type": "array", "items": {"$ref": "#/components/schemas/Detection"}},
        ),
    ]
    template_dir: Annotated[
        str | None, Meta(description="Accepted for the sake of existing clients, and not used: a warning says so.")
    ] = None
    det_score_thresh: Annotated[
        float, Meta(description="Detections are used whose score is strictly above it; the others are in `rejected`.")
    ] = 0.2
    refine: Annotated[Literal["auto", "icp", "none"], Meta(description="none unless asked.")] = "none"


class RejectedDetection(msgspec.Struct, kw_only=True):
    """A detection of the second dialect that has no pose."""

    index: Annotated[int, Meta(description="In seg_data.")]
    code: Annotated[RejectCode, Meta(description="A closed list, which the metrics share.")]
    detail: Annotated[str, Meta(description="In words, with the numbers.")]


class SegDataAnswer(msgspec.Struct, kw_only=True):
    """The second dialect's answer: parallel arrays over the solved detections."""

    success: Annotated[bool, Meta(description="The request was processed.")]
    detections: Annotated[
        list[dict[str, Any]], Meta(description="The solved detections as they were sent; all arrays run along them.")
    ] = []
    pose_scores: Annotated[list[float], Meta(description="Confidence of the pose x the detector's score.")] = []
    pred_rot: Annotated[list[list[list[float]]], Meta(description="3 rows of 3 each, object to camera.")] = []
    pred_trans: Annotated[list[list[float]], Meta(description="Millimetres.")] = []
    num_detections: Annotated[int, Meta(description="Length of the arrays.")] = 0
    inference_time: Annotated[float, Meta(description="Seconds.")] = 0.0
    template_dir_used: Annotated[str | None, Meta(description="Always null: templates are made from the CAD.")] = None
    cad_path_used: Annotated[str | None, Meta(description="The CAD file, below the CAD root.")] = None
    output_dir_used: Annotated[str | None, Meta(description="Where files were written, below the output root.")] = None
    error_message: Annotated[str | None, Meta(description="The failure in words.")] = None
    rejected: Annotated[list[RejectedDetection], Meta(description="The detections without a pose.")] = []
    warnings: Annotated[list[str], Meta(description="What was odd and did not stop the answer.")] = []
    error: Annotated[ErrorBody | UnsetType, Meta(description="The failure for programs.")] = UNSET


class Health2(msgspec.Struct, kw_only=True):
    """What clients of the second dialect ask first."""

    status: Annotated[Literal["healthy", "unhealthy"], Meta(description="healthy: poses can be asked for.")]
    model: Annotated[dict[str, Any], Meta(description="`{loaded, device}`")]
    timestamp: Annotated[float, Meta(description="Unix seconds.")]
