"""What an engine is: two verbs, `onboard` and `estimate`, and what goes in and comes out.

Lengths are metres, rotations object-to-camera in the OpenCV camera frame: `p_cam = R p_obj + t`.
This module imports numpy only, so that every process can afford it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]

#: The closed list of reasons for which a detection has no pose; answer rows and metrics share it.
REJECT_CODES = (
    "mask_empty",
    "mask_too_small",
    "no_depth",
    "no_cad",
    "units",
    "no_fit",
    "low_confidence",
    "engine_error",
)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A CAD model in metres, cleaned: no NaN, no degenerate index, at least one face."""

    vertices_m: Float32  # (V, 3)
    faces: Int32  # (F, 3)
    vertex_colors: UInt8 | None = None  # (V, 3) RGB; None = the file has no colour


@dataclass(frozen=True, kw_only=True)
class Symmetries:
    """An object's symmetries as BOP writes them, in metres about the CAD's own frame."""

    discrete: tuple[Float64, ...] = ()  # each (4, 4)
    continuous: tuple[tuple[Float64, Float64], ...] = ()  # (axis (3,), offset_m (3,))


@dataclass(frozen=True, kw_only=True)
class ObjectModel:
    """One onboarded object: what an engine computed from the CAD, as named arrays (what goes to disk).

    `arrays` hold only numpy arrays, so that they can be stored without code; `data` is where an engine keeps
    what it makes of them for a device (never stored).
    """

    object_id: str
    engine: str
    engine_version: str
    diameter_m: float
    symmetries: Symmetries
    arrays: Mapping[str, npt.NDArray[Any]]
    data: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes that the stored arrays take in memory."""
        return int(sum(array.nbytes for array in self.arrays.values()))


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One detection, cut out of its image: everything an engine may look at.

    The crop is the mask's box with a margin; pixels outside `mask` are kept, since the surroundings tell what the
    camera saw through. `K` belongs to the crop (principal point already shifted).
    """

    object_id: str
    rgb: UInt8  # (h, w, 3)
    depth_m: Float32  # (h, w), 0 = no reading
    mask: Bool  # (h, w)
    K: Float64  # (3, 3), pixels
    seed: int
    refine: Literal["icp", "none"] = "icp"
    hypotheses: int = 0  # runners-up to return
    init_T_cam_obj: Float64 | None = None  # (4, 4): refine this pose, no search
    origin_px: tuple[int, int] = (0, 0)  # column and row of the crop's first pixel in its image, in the crop's pixels
    image_size_px: tuple[int, int] | None = None  # width and height of that image; None = the crop is all of it


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A runner-up: a pose and how sure the engine was of it."""

    T_cam_obj: Float64  # (4, 4), metres
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Why the engine believes in a pose."""

    inlier_fraction: float  # of the readings under the mask: how many the pose explains
    residual_mm: float  # median difference between the depth read and the pose's
    visible_overlap: float  # of the model's surface that should be visible: how much was seen there
    free_space_violation: float  # of the same: how much the camera saw through, to something behind


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A pose that the engine stands for."""

    T_cam_obj: Float64  # (4, 4), metres
    confidence: float  # 0..1, about the pose alone
    evidence: Evidence
    ambiguous: bool = False
    hypotheses: tuple[Hypothesis, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Why there is no pose: a code of REJECT_CODES and a sentence with the numbers."""

    code: str
    detail: str


Outcome = Estimate | Rejection
Progress = Callable[[float], None]  # 0..1


class Engine(Protocol):
    """What `workers/stages/pose.py` and `workers/stages/onboard.py` need of an engine."""

    name: str  # "geometric", "sam6d"
    version: str  # part of the stored model's file name: a new version onboards anew
    device: str

    def onboard(self, object_id: str, mesh: Mesh, symmetries: Symmetries | None, progress: Progress) -> ObjectModel:
        """Compute everything that depends on the CAD alone; `symmetries` given by the user override those found."""
        ...

    def practice_model(self, object_id: str, mesh: Mesh) -> ObjectModel:
        """A model for a first exercise, where a shortcut is welcome: its poses need not be good."""
        ...

    def prepare(self, model: ObjectModel) -> int:
        """Put a stored model onto the device (idempotent); returns the bytes it takes there."""
        ...

    def estimate(self, instances: Sequence[Instance], models: Mapping[str, ObjectModel]) -> list[Outcome]:
        """One outcome per instance, in order. An answer never depends on the instance's batch-mates.

        Raises nothing for bad data (that is a Rejection); out-of-memory passes through, for the caller to halve.
        """
        ...
