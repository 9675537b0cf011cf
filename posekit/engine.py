"""The interface of an engine: `onboard` and `estimate`, their inputs and outputs, and the engine's registry row.

Lengths are metres. Rotations map object to camera, in the OpenCV camera frame: `p_cam = R p_obj + t`.
This module imports only numpy and msgspec, so that every process can afford it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from posekit.settings import Table

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]

Refine = Literal["icp", "none"]  # whether poses are refined against the depth readings

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
    """A cleaned CAD model in metres: no NaN, no degenerate index, at least one face."""

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
    """One onboarded object: the named arrays that an engine computed from the CAD, as they are stored on disk.

    `arrays` holds only numpy arrays, so that they can be stored without code. `data` is the engine's own cache for a
    device; it is never stored.
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
        """Return the bytes that the stored arrays take in memory."""
        return int(sum(array.nbytes for array in self.arrays.values()))


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One detection, cut out of its image: everything an engine may look at.

    The crop is the mask's box with a margin. Pixels outside `mask` are kept, because the surroundings show what the
    camera saw through. `K` belongs to the crop: its principal point is already shifted.
    """

    object_id: str
    rgb: UInt8  # (h, w, 3)
    depth_m: Float32  # (h, w), 0 = no reading
    mask: Bool  # (h, w)
    K: Float64  # (3, 3), pixels
    seed: int
    refine: Refine = "icp"
    hypotheses: int = 0  # number of runners-up to return
    init_T_cam_obj: Float64 | None = None  # (4, 4): refine this pose instead of searching
    origin_px: tuple[int, int] = (0, 0)  # column and row of the crop's first pixel in its image, in the crop's pixels
    image_size_px: tuple[int, int] | None = None  # width and height of that image; None = the crop is all of it


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A runner-up: a pose and the engine's confidence in it."""

    T_cam_obj: Float64  # (4, 4), metres
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Why the engine believes in a pose."""

    inlier_fraction: float  # share of the readings under the mask that the pose explains
    residual_mm: float  # median difference between the depth read and the depth of the pose
    visible_overlap: float  # share of the model surface that should be visible and was seen
    free_space_violation: float  # share of that surface through which the camera saw something behind it


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A pose that the engine answers with."""

    T_cam_obj: Float64  # (4, 4), metres
    confidence: float  # 0..1, for the pose alone
    evidence: Evidence
    ambiguous: bool = False
    hypotheses: tuple[Hypothesis, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """The reason why there is no pose: a code of REJECT_CODES and a sentence with the numbers."""

    code: str
    detail: str


Outcome = Estimate | Rejection
Progress = Callable[[float], None]  # 0..1


class Engine(Protocol):
    """The interface that `workers/stages/pose.py` and `workers/stages/onboard.py` call."""

    name: str  # as in the engine's EngineSpec
    version: str  # part of the stored model's file name: a new version means onboarding anew
    device: str

    def onboard(self, object_id: str, mesh: Mesh, symmetries: Symmetries | None, progress: Progress) -> ObjectModel:
        """Compute everything that depends on the CAD alone. Symmetries from the user replace the search for them."""
        ...

    def practice_model(self, object_id: str, mesh: Mesh) -> ObjectModel:
        """Return a model for the warm-up. Shortcuts are welcome: its poses need not be good."""
        ...

    def prepare(self, model: ObjectModel) -> int:
        """Put a stored model onto the device and return the bytes it takes there. A second call does nothing."""
        ...

    def estimate(self, instances: Sequence[Instance], models: Mapping[str, ObjectModel]) -> list[Outcome]:
        """Return one outcome per instance, in order. An answer never depends on the instance's batch-mates.

        Bad data gives a Rejection, never an exception. Out-of-memory errors pass through: the caller halves the batch.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The file of weights that an engine needs. Its path stands in the engine's settings, a `WeightsTable`."""

    licence: str
    problem: Callable[[Path], str | None]  # problem that a quick look finds, None if none; names no path
    sha256: Callable[[Path], str]


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Everything that the rest of the program knows about one engine: its row in `posekit/registry.py`.

    `load`, `version` and `kernels` import what they need when they are called, so a row by itself imports no torch.
    `load` and `version` receive the engine's table of settings, or None where the engine has none.
    """

    name: str  # lower-case letters, digits and _: part of file names, routes, variables and labels
    words: str  # the engine's name in a sentence: "the network"
    load: Callable[[Any, str, int], Engine]  # table, device ("cpu", "cuda:0"), CPU threads: takes seconds
    version: Callable[[Any], str]  # version of the models that it would store with this table; quick
    kernels: Callable[[str], Mapping[str, str]] = lambda device: {}  # operation -> "compiled" or "reference"
    settings: type[Table] | None = None  # type of its settings table; the table is named after the engine
    licence: str  # licence of its code
    weights: Weights | None = None
    refine: Refine  # meaning of `refine: auto`
    refiner: str | None = None  # engine that refines its poses and starts from given ones; None: this one does
    symmetries_from: str | None = None  # engine whose found symmetries it takes over; None: it finds its own
    effort: float = 1.0  # cost of onboarding an object, as a multiple of the geometric engine's
    onboard_as: str | None = None  # stage and route of its onboarding; None: `onboard_<name>`
    stand_in: str | None = None  # engine that answers, degraded, where this one cannot be started
    hint: str = "the server's log says why"  # advice to the operator where it cannot be started

    @property
    def onboard_stage(self) -> str:
        """Return the name of the stage that onboards objects for this engine; its route is `/` and this name."""
        return self.onboard_as or f"onboard_{self.name}"

    @property
    def weights_licence(self) -> str:
        """Return the licence of its weights."""
        return self.weights.licence if self.weights is not None else "none: this engine has no weights"

    def cannot_start(self, why: str) -> str:
        """Return the operator's message for a server that cannot start because this engine cannot."""
        return f"the engine {self.name} cannot be started: {why}; {self.hint}"
