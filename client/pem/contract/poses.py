"""The pose routes of the first dialect: requests, and answers of one row for each detection."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pem.contract.common import Asked, ErrorBody, NonEmpty, RejectCode, Triple, Wire
from pem.contract.detections import FoundDetections

# ---------------------------------------------------------------------------------------------------------- requests


class InitPose(Wire, kw_only=True):
    """A pose to start from, millimetres."""

    rotation: Annotated[list[Triple], Meta(min_length=3, max_length=3, description="3 rows of 3, object to camera.")]
    translation: Annotated[Triple, Meta(description="Millimetres.")]


class Common(Asked, kw_only=True):
    """What both requests of the first dialect may carry."""

    hypotheses: Annotated[int, Meta(ge=0, le=16, description="How many runners-up to return with each pose.")] = 0
    min_score: Annotated[
        float, Meta(ge=0, le=1, description="Confidence below it turns a pose into the row `low_confidence`.")
    ] = 0.0
    visualize: Annotated[bool, Meta(description="Return an overlay PNG in `visualization`.")] = False


class PoseRequest(Common, kw_only=True):
    """Detections and CAD in."""

    detections: Annotated[
        msgspec.Raw,
        Meta(
            description="Columns `{masks, boxes, scores, object_ids}`, or SAM-6D's list of "
            "`{segmentation, category_id, bbox, score}`. None at all is a valid question.",
            extra_json_schema={
                "anyOf": [
                    {"$ref": "#/components/schemas/Columns"},
                    {"title": "SAM-6D list", "type": "array", "items": {"$ref": "#/components/schemas/Detection"}},
                ]
            },
        ),
    ]
    box_format: Annotated[
        Literal["xywh", "xyxy"], Meta(description="How boxes are written: xywh, or xyxy as some ISM servers do.")
    ] = "xywh"
    init_poses: Annotated[
        list[InitPose | None] | None,
        Meta(
            description="One for each mask, null to search: refine these poses instead (tracking). "
            "The geometric engine's refiner does that for either engine."
        ),
    ] = None


class FullPipelineRequest(Common, kw_only=True):
    """CAD in; the ISM server is asked for the detections."""

    template_dir: Annotated[
        NonEmpty, Meta(description="The ISM server's own path of the object's templates, passed on to it.")
    ]
    ism_cad_path: Annotated[
        NonEmpty | None, Meta(description="The ISM server's own path of the CAD, passed on to it.")
    ] = None


# ------------------------------------------------------------------------------------------------------------ answers


class RowEvidence(msgspec.Struct, frozen=True, kw_only=True):
    """Why the engine believes in a pose."""

    inlier_fraction: Annotated[float, Meta(description="Of the readings under the mask: how many the pose explains.")]
    residual_mm: Annotated[
        float, Meta(description="Median difference between the depth read and the depth of the posed model.")
    ]
    visible_overlap: Annotated[
        float, Meta(description="Of the model's surface that should be visible: how much was seen there.")
    ]
    free_space_violation: Annotated[
        float, Meta(description="Of the same: where the camera saw through it, to something behind.")
    ]


class RowError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a detection has no pose."""

    code: Annotated[RejectCode, Meta(description="A closed list, which the metrics share.")]
    detail: Annotated[str, Meta(description="In words, with the numbers.")]


class RowHypothesis(msgspec.Struct, frozen=True, kw_only=True):
    """A runner-up."""

    rotation: Annotated[list[list[float]], Meta(description="3 rows of 3, object to camera.")]
    translation: Annotated[list[float], Meta(description="Millimetres.")]
    confidence: Annotated[float, Meta(description="0 to 1.")]


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """One detection's answer: a pose, or why there is none."""

    object_id: Annotated[int | str | None, Meta(description="The detection's category as it was sent.")]
    cad_id: Annotated[str | None, Meta(description="Content hash of its CAD.")]
    rotation: Annotated[
        list[list[float]] | None,
        Meta(
            description="3 rows of 3, object to camera: p_cam = R p_obj + t, OpenCV camera frame. Null where rejected."
        ),
    ]
    translation: Annotated[list[float] | None, Meta(description="Millimetres. Null where rejected.")]
    confidence: Annotated[
        float, Meta(description="0 to 1, about the pose alone; never multiplied by the detector's score.")
    ]
    bbox: Annotated[tuple[float, float, float, float], Meta(description="x, y, width, height in pixels.")]
    status: Annotated[Literal["ok", "rejected"], Meta(description="rejected: there is no pose, and `error` says why.")]
    evidence: Annotated[RowEvidence | UnsetType, Meta(description="What speaks for the pose.")] = UNSET
    ambiguous: Annotated[bool | UnsetType, Meta(description="Another pose fits nearly as well.")] = UNSET
    hypotheses: Annotated[list[RowHypothesis] | UnsetType, Meta(description="Runners-up, where asked for.")] = UNSET
    error: Annotated[RowError | UnsetType, Meta(description="Why there is no pose.")] = UNSET


class Timing(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A receipt, milliseconds: `queue_ms` is all waiting, in the gateway and between stages."""

    decode_ms: Annotated[float, Meta(description="Images and masks decoded, point clouds cut.")]
    queue_ms: Annotated[float, Meta(description="All waiting, in the gateway and between stages.")]
    pose_ms: Annotated[float, Meta(description="In the engine, with whatever shared its passes.")]
    batch_detections: Annotated[int, Meta(description="Detections in the largest pass this request rode in.")]
    batch_requests: Annotated[int, Meta(description="Requests that shared that pass.")]
    respond_ms: Annotated[float | None, Meta(description="Overlay and files.")] = None
    onboard_ms: Annotated[float | None, Meta(description="Waited for the CAD to be onboarded.")] = None
    ism_ms: Annotated[float | None, Meta(description="The ISM server's call.")] = None
    total_ms: Annotated[float | None, Meta(description="All of it.")] = None


class PoseAnswer(msgspec.Struct, kw_only=True):
    """The answer of the pose routes; failures have the same shape with `success: false` and an `error`."""

    success: Annotated[bool, Meta(description="The request was processed, even where every row is rejected.")]
    poses: Annotated[list[Row], Meta(description="One row for each detection sent, in the order sent.")] = []
    inference_time: Annotated[float, Meta(description="Seconds from the body received to the answer written.")] = 0.0
    timing: Annotated[Timing | None, Meta(description="Where the time went.")] = None
    cad_path_used: Annotated[str | None, Meta(description="The CAD file, below the CAD root.")] = None
    output_dir_used: Annotated[str | None, Meta(description="Where files were written, below the output root.")] = None
    error_message: Annotated[str | None, Meta(description="The failure in words.")] = None
    warnings: Annotated[list[str], Meta(description="What was odd and did not stop the answer.")] = []
    engine: Annotated[str | None, Meta(description="Which engine answered.")] = None
    degraded: Annotated[
        bool, Meta(description="The geometric engine stood in for the network; a warning says why.")
    ] = False
    release: Annotated[str | None, Meta(description="What answered, for comparing answers over time.")] = None
    visualization: Annotated[bytes | UnsetType, Meta(description="Overlay PNG, where asked for.")] = UNSET
    detections: Annotated[
        FoundDetections | UnsetType, Meta(description="What the ISM server found (full pipeline only).")
    ] = UNSET
    error: Annotated[ErrorBody | UnsetType, Meta(description="The failure for programs.")] = UNSET
