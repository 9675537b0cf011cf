"""The HTTP contract as typed structs: they validate requests, naming the wrong field's path, shape the answers, and
produce the OpenAPI document. Each field carries its description. Lengths on the wire are millimetres.

A field with several forms that msgspec cannot hold in one type (`cam_K` flat or 3x3, the detections' two forms, a
mask's five) is `msgspec.Raw` here, with the schema of its forms. The server checks it and names the path.
"""

from __future__ import annotations

from pem.contract.common import (
    Asked,
    CadFormat,
    CamParams,
    ErrorBody,
    NonEmpty,
    ObjectChoice,
    Triple,
    Unit,
    Wire,
)
from pem.contract.detections import MASK_SCHEMA, Columns, Detection, FoundDetections
from pem.contract.objects import (
    ContinuousSymmetry,
    Health,
    ObjectAnswer,
    ObjectList,
    ObjectModelAnswer,
    ObjectRequest,
    WireSymmetries,
)
from pem.contract.poses import (
    Common,
    FullPipelineRequest,
    InitPose,
    PoseAnswer,
    PoseRequest,
    Row,
    RowError,
    RowEvidence,
    RowHypothesis,
    Timing,
)
from pem.contract.second_dialect import Health2, RejectedDetection, SegDataAnswer, SegDataRequest
from pem.contract.server import ModelMetadata, QueueState, Status, Track, Version

__all__ = [
    "MASK_SCHEMA",
    "Asked",
    "CadFormat",
    "CamParams",
    "Columns",
    "Common",
    "ContinuousSymmetry",
    "Detection",
    "ErrorBody",
    "FoundDetections",
    "FullPipelineRequest",
    "Health",
    "Health2",
    "InitPose",
    "ModelMetadata",
    "NonEmpty",
    "ObjectAnswer",
    "ObjectChoice",
    "ObjectList",
    "ObjectModelAnswer",
    "ObjectRequest",
    "PoseAnswer",
    "PoseRequest",
    "QueueState",
    "RejectedDetection",
    "Row",
    "RowError",
    "RowEvidence",
    "RowHypothesis",
    "SegDataAnswer",
    "SegDataRequest",
    "Status",
    "Timing",
    "Track",
    "Triple",
    "Unit",
    "Version",
    "Wire",
    "WireSymmetries",
]
