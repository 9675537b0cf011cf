"""The HTTP contract as typed structs: they validate requests with a path to the wrong field, shape the answers, and
produce the OpenAPI document. Millimetres on the wire.

Where a field takes several forms that msgspec cannot hold in one type (`cam_K` flat or 3x3, the detections' two forms,
the masks' four), it is `msgspec.Raw` here and `serve/tasks/pose/question.py` checks it and names the path.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from workers.messages import Health, Row, RowError, RowEvidence, RowHypothesis, WireSymmetries

__all__ = ["Health", "Row", "RowError", "RowEvidence", "RowHypothesis", "WireSymmetries"]


class Wire(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a client sends: unknown fields are refused."""


# ---------------------------------------------------------------------------------------------------------- requests

Unit = Literal["mm", "m", "auto"]
CadFormat = Literal["ply", "obj", "stl", "glb", "off", "zip"]
NonEmpty = Annotated[str, Meta(min_length=1, max_length=4096)]
Triple = Annotated[list[float], Meta(min_length=3, max_length=3)]


class CamParams(Wire, kw_only=True):
    """The camera, and what a raw depth value means: raw x depth_scale = millimetres (metres with depth_unit "m")."""

    cam_K: msgspec.Raw  # 9 numbers row-major, or 3x3
    depth_scale: (
        Annotated[float, Meta(gt=0, description="default 1.0 for a 16-bit PNG, required for float TIFF")] | None
    ) = None
    depth_unit: Literal["mm", "m"] = "mm"


class ObjectChoice(Wire, kw_only=True):
    """One category's CAD: exactly one of the two."""

    cad_path: NonEmpty | None = None
    object_id: NonEmpty | None = None


class InitPose(Wire, kw_only=True):
    """A pose to start from, millimetres."""

    rotation: Annotated[list[Triple], Meta(min_length=3, max_length=3)]
    translation: Triple


class Common(Wire, kw_only=True):
    """What every pose request may carry. Pictures are base64 in JSON, raw bytes in MessagePack, files in multipart."""

    rgb_image: bytes
    depth_image: bytes
    cam_params: CamParams
    cad_path: NonEmpty | None = None
    object_id: NonEmpty | None = None
    cad: bytes | None = None
    cad_format: CadFormat | None = None
    objects: dict[str | int, ObjectChoice] | None = None
    model_unit: Unit | None = None  # None = mm
    engine: Literal["geometric", "sam6d", "auto"] = "auto"
    refine: Literal["auto", "icp", "none"] = "auto"
    hypotheses: Annotated[int, Meta(ge=0, le=16)] = 0
    units: Literal["check", "strict"] = "check"
    min_score: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    deadline_ms: Annotated[int, Meta(ge=1)] | None = None
    visualize: bool = False
    output_dir: NonEmpty | None = None


class PoseRequest(Common, kw_only=True):
    """`POST /api/v1/pose_estimation`"""

    detections: msgspec.Raw
    box_format: Literal["xywh", "xyxy"] = "xywh"
    init_poses: list[InitPose | None] | None = None


class FullPipelineRequest(Common, kw_only=True):
    """`POST /api/v1/full_pipeline`: the same without detections, which the ISM server is asked for."""

    template_dir: NonEmpty
    ism_cad_path: NonEmpty | None = None


class SegDataRequest(Wire, kw_only=True):
    """`POST /api/v1/pose-estimation`, the second dialect."""

    rgb_image: bytes
    depth_image: bytes
    cam_params: CamParams
    seg_data: msgspec.Raw
    cad_path: NonEmpty | None = None
    object_id: NonEmpty | None = None
    cad: bytes | None = None
    cad_format: CadFormat | None = None
    objects: dict[str | int, ObjectChoice] | None = None
    model_unit: Unit | None = None
    template_dir: str | None = None
    det_score_thresh: float = 0.2
    output_dir: NonEmpty | None = None
    engine: Literal["geometric", "sam6d", "auto"] = "auto"
    refine: Literal["auto", "icp", "none"] = "none"
    units: Literal["check", "strict"] = "check"
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    deadline_ms: Annotated[int, Meta(ge=1)] | None = None


class Columns(Wire, kw_only=True):
    """Detections as parallel columns; only masks are required."""

    masks: list[msgspec.Raw]
    boxes: list[Annotated[list[float], Meta(min_length=4, max_length=4)]] | None = None
    scores: list[float] | None = None
    object_ids: list[int | str | None] | None = None


class Detection(msgspec.Struct, kw_only=True):
    """One item of SAM-6D's `detection_ism.json`; unknown keys are ignored."""

    segmentation: msgspec.Raw
    category_id: int | str | None = None
    bbox: Annotated[list[float], Meta(min_length=4, max_length=4)] | None = None
    score: float = 1.0


class ObjectRequest(Wire, kw_only=True):
    """The JSON part `request` of `POST /api/v1/objects`."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")] | None = None
    model_unit: Unit = "mm"
    cad_format: CadFormat | None = None
    symmetries_discrete: list[Annotated[list[float], Meta(min_length=16, max_length=16)]] | None = None
    symmetries_continuous: list[ContinuousSymmetry] | None = None


class ContinuousSymmetry(Wire, kw_only=True):
    """A rotation axis and a point on it (mm), as BOP writes them."""

    axis: Triple
    offset: Triple


# ----------------------------------------------------------------------------------------------------------- answers


class ErrorBody(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What went wrong; `field` is the path of the field at fault."""

    code: str
    detail: str
    request_id: str
    field: str | None = None


class Timing(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A receipt, milliseconds: `queue_ms` is all waiting, in the gateway and between stages."""

    decode_ms: float
    queue_ms: float
    pose_ms: float
    batch_detections: int
    batch_requests: int
    respond_ms: float | None = None
    onboard_ms: float | None = None
    ism_ms: float | None = None
    total_ms: float | None = None


class PoseAnswer(msgspec.Struct, kw_only=True):
    """The answer of the pose routes; failures have the same shape with `success: false` and an `error`."""

    success: bool
    poses: list[Row] = []
    inference_time: float = 0.0  # seconds
    timing: Timing | None = None
    cad_path_used: str | None = None
    output_dir_used: str | None = None
    error_message: str | None = None
    warnings: list[str] = []
    engine: str | None = None
    degraded: bool = False
    release: str | None = None
    visualization: bytes | msgspec.UnsetType = msgspec.UNSET  # PNG; base64 in JSON
    detections: FoundDetections | msgspec.UnsetType = msgspec.UNSET  # full_pipeline only
    error: ErrorBody | msgspec.UnsetType = msgspec.UNSET


class FoundDetections(msgspec.Struct, kw_only=True):
    """What the ISM server found: masks as compressed RLE, boxes xywh."""

    masks: list[dict[str, Any]]
    boxes: list[list[float]]
    scores: list[float]
    object_ids: list[int | str | None]


class RejectedDetection(msgspec.Struct, kw_only=True):
    """A detection of the second dialect that has no pose."""

    index: int
    code: str
    detail: str


class SegDataAnswer(msgspec.Struct, kw_only=True):
    """The second dialect's answer: parallel arrays over the solved detections."""

    success: bool
    detections: list[dict[str, Any]] = []
    pose_scores: list[float] = []
    pred_rot: list[list[list[float]]] = []
    pred_trans: list[list[float]] = []  # mm
    num_detections: int = 0
    inference_time: float = 0.0
    template_dir_used: str | None = None
    cad_path_used: str | None = None
    output_dir_used: str | None = None
    error_message: str | None = None
    rejected: list[RejectedDetection] = []
    warnings: list[str] = []
    error: ErrorBody | msgspec.UnsetType = msgspec.UNSET


class ObjectModelAnswer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one engine has made of an object."""

    status: Literal["queued", "onboarding", "ready", "failed"]
    progress: float
    seconds: float | None = None  # that onboarding took
    threads: int | None = None  # on so many CPU threads
    bytes: int | None = None  # on disk
    error: str | None = None


class ObjectAnswer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One CAD object."""

    object_id: str
    name: str | None
    status: Literal["onboarding", "ready", "failed"]
    progress: float
    model_unit: Literal["mm", "m"]
    health: Health
    symmetries: WireSymmetries | None
    created: float | None = None  # unix seconds
    onboard_seconds: float | None = None
    engines: dict[str, ObjectModelAnswer] = {}
    error: str | None = None


class ObjectList(msgspec.Struct, kw_only=True):
    """`GET /api/v1/objects`"""

    objects: list[ObjectAnswer]


class QueueState(msgspec.Struct, kw_only=True):
    """What waits or runs right now."""

    requests: int
    detections: int


class Track(msgspec.Struct, kw_only=True):
    """One backend."""

    state: Literal["starting", "ready", "stopped"]
    release: str
    workers: dict[str, int]
    restarts: int


class Status(msgspec.Struct, kw_only=True):
    """`GET /api/v1/status`"""

    server: Literal["running", "draining"]
    model_loaded: bool
    device: str
    uptime: float  # seconds since start
    version: str
    engine: str
    release: str
    kernels: dict[str, str]
    tracks: dict[str, Track]
    objects: int
    queue: QueueState
    detections_per_second: float
    engines: dict[str, str]  # name -> release
    degraded: bool
    degraded_reason: str | None


class Version(msgspec.Struct, kw_only=True):
    """`GET /api/v1/version`"""

    version: str
    engine: str
    release: str
    checkpoint: str | None
    sha256: str | None
    engines: dict[str, str]  # name -> release
    degraded: bool


class Health2(msgspec.Struct, kw_only=True):
    """`GET /api/v1/health`, the second dialect."""

    status: Literal["healthy", "unhealthy"]
    model: dict[str, Any]
    timestamp: float


class ModelMetadata(msgspec.Struct, kw_only=True):
    """`GET /v2/models/pem` (Open Inference Protocol)."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    parameters: dict[str, Any]
