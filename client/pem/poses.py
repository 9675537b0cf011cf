"""Typed answers: for each detection a pose, or the reason for none; tables and pictures in notebooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import httpx
import msgspec
import numpy as np
import numpy.typing as npt

from pem import imagefiles, notebook
from pem.contract import FoundDetections, PoseAnswer, Row, RowError, RowEvidence, Timing
from pem.errors import NoPose
from pem.wire import decoded

Float64 = npt.NDArray[np.float64]
_COLUMNS: Final = ("#", "object", "t (mm)", "rotation vector (deg)", "confidence", "status")


@dataclass(frozen=True, kw_only=True, eq=False)
class Hypothesis:
    """A runner-up pose."""

    T_cam_obj_mm: Float64  # (4, 4)
    confidence: float


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Pose:
    """The answer for one detection. `R`, `t_mm` and `T_cam_obj_mm` raise NoPose if the detection was rejected."""

    index: int
    status: Literal["ok", "rejected"]
    object: str | None  # the object as the request named it: its id or name, its cad_path, or the CAD's file
    object_id: int | str | None  # the detection's category, echoed
    cad_id: str | None  # content hash of the CAD
    confidence: float  # 0..1, of the pose alone, whatever the detection's score
    bbox: tuple[float, float, float, float]  # xywh
    evidence: RowEvidence | None
    error: RowError | None  # code and detail of a rejected detection
    ambiguous: bool
    hypotheses: tuple[Hypothesis, ...]
    row: Row  # as the server wrote it

    def __repr__(self) -> str:
        if not self.ok:
            return f"Pose({self.status}, object={self._name!r}, error={self.error.code if self.error else None})"
        t_mm = ", ".join(f"{value:.1f}" for value in self.t_mm)
        return f"Pose({self.status}, object={self._name!r}, t_mm=({t_mm}), confidence={self.confidence:.2f})"

    def _repr_html_(self) -> str:
        return notebook.table(_COLUMNS, [self._cells()])

    def _cells(self) -> list[str]:
        """Return the pose as texts, one per name in _COLUMNS."""
        name = "-" if self._name is None else str(self._name)
        if not self.ok:
            why = f"{self.error.code}: {self.error.detail}" if self.error else self.status
            return [str(self.index), name, "-", "-", f"{self.confidence:.2f}", why]
        vectors = np.round([self.t_mm, rotation_vector_deg(self.R)], 1) + 0.0  # no -0.0
        t_mm, turn = (" ".join(f"{value:.1f}" for value in vector) for vector in vectors)
        status = self.status + (" (ambiguous)" if self.ambiguous else "")
        return [str(self.index), name, t_mm, turn, f"{self.confidence:.2f}", status]

    @property
    def _name(self) -> int | str | None:
        return self.object_id if self.object is None else self.object

    @property
    def ok(self) -> bool:
        """Return True if there is a pose."""
        return self.row.rotation is not None and self.row.translation is not None

    @property
    def R(self) -> Float64:  # noqa: N802
        """Return the rotation from object to camera, (3, 3)."""
        return self.T_cam_obj_mm[:3, :3]

    @property
    def t_mm(self) -> Float64:
        """Return the translation from object to camera, (3,), in millimetres."""
        return self.T_cam_obj_mm[:3, 3]

    @property
    def T_cam_obj_mm(self) -> Float64:  # noqa: N802
        """Return the pose as a (4, 4) matrix, in millimetres: `p_cam = R p_obj + t`."""
        if self.row.rotation is None or self.row.translation is None:
            why = f"{self.error.code}: {self.error.detail}" if self.error else self.status
            raise NoPose(f"detection {self.index} has no pose ({why})")
        return _matrix(self.row.rotation, self.row.translation)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PoseResult:
    """The answer to a pose request: one pose or rejection per detection, in the order sent."""

    poses: list[Pose]
    warnings: list[str]
    engine: str | None
    degraded: bool  # the geometric engine stood in for the network
    inference_time_s: float
    timing: Timing | None  # the server's receipt, milliseconds
    request_id: str | None
    visualization: bytes | None  # PNG, with visualize=True
    detections: FoundDetections | None  # what the ISM server found (full_pipeline)
    answer: PoseAnswer  # as the server wrote it

    def __repr__(self) -> str:
        rows = "".join(f"\n  {pose.index}: {pose!r}" for pose in self.poses)
        return f"PoseResult({len(self.poses)} pose{'' if len(self.poses) == 1 else 's'}, engine={self.engine}){rows}"

    def _repr_html_(self) -> str:
        picture = "" if self.visualization is None else notebook.picture(self.visualization)
        return notebook.table(_COLUMNS, [pose._cells() for pose in self.poses]) + picture

    def overlay(self) -> npt.NDArray[np.uint8]:
        """Return the visualization as (H, W, 3) uint8. Raises ValueError if the request did not ask for one."""
        if self.visualization is None:
            raise ValueError("there is no visualization: ask with visualize=True")
        return imagefiles.read_png(self.visualization)


def _matrix(rotation: Sequence[Sequence[float]], translation_mm: Sequence[float]) -> Float64:
    T = np.eye(4)
    T[:3, :3] = rotation
    T[:3, 3] = translation_mm
    return T


def _pose(index: int, row: Row, name: str | None) -> Pose:
    hypotheses = () if row.hypotheses is msgspec.UNSET else row.hypotheses
    return Pose(
        index=index,
        status=row.status,
        object=name,
        object_id=row.object_id,
        cad_id=row.cad_id,
        confidence=row.confidence,
        bbox=row.bbox,
        evidence=None if row.evidence is msgspec.UNSET else row.evidence,
        error=None if row.error is msgspec.UNSET else row.error,
        ambiguous=row.ambiguous is True,
        hypotheses=tuple(
            Hypothesis(T_cam_obj_mm=_matrix(h.rotation, h.translation), confidence=h.confidence) for h in hypotheses
        ),
        row=row,
    )


def pose_result(response: httpx.Response, asked_for: Callable[[int | str | None], str | None]) -> PoseResult:
    """Decode the answer to a pose request; `asked_for`: category of a detection -> its object."""
    answer = decoded(response, PoseAnswer)
    return PoseResult(
        poses=[_pose(index, row, asked_for(row.object_id)) for index, row in enumerate(answer.poses)],
        warnings=answer.warnings,
        engine=answer.engine,
        degraded=answer.degraded,
        inference_time_s=answer.inference_time,
        timing=answer.timing,
        request_id=response.headers.get("x-request-id"),
        visualization=None if answer.visualization is msgspec.UNSET else answer.visualization,
        detections=None if answer.detections is msgspec.UNSET else answer.detections,
        answer=answer,
    )


def rotation_vector_deg(R: Float64) -> Float64:
    """Return the axis of a rotation (3, 3) times its angle in degrees, (3,). The angle is at most 180."""
    # The quaternion is the eigenvector of the largest eigenvalue of this matrix, whatever the angle.
    xx, yy, zz = np.diag(R)
    x, y, z = R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]
    xy, xz, yz = R[0, 1] + R[1, 0], R[0, 2] + R[2, 0], R[1, 2] + R[2, 1]
    symmetric = [
        [xx + yy + zz, x, y, z],
        [x, xx - yy - zz, xy, xz],
        [y, xy, yy - xx - zz, yz],
        [z, xz, yz, zz - xx - yy],
    ]
    quaternion = np.linalg.eigh(np.array(symmetric))[1][:, -1]
    w, axis = (quaternion[0], quaternion[1:]) if quaternion[0] >= 0 else (-quaternion[0], -quaternion[1:])
    length = float(np.linalg.norm(axis))
    return np.zeros(3) if length < 1e-12 else axis / length * np.degrees(2 * np.arctan2(length, w))
