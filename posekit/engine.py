"""What an engine is: two verbs, `onboard` and `estimate`, what goes in and comes out, and one row in the registry.

Lengths are metres, rotations object-to-camera in the OpenCV camera frame: `p_cam = R p_obj + t`.
This module imports numpy and msgspec only, so that every process can afford it.
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

Refine = Literal["icp", "none"]  # whether poses are polished against the depth readings

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
    refine: Refine = "icp"
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

    name: str  # as in its EngineSpec
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


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The file that an engine computes with; its settings, a `WeightsTable`, say where it lies."""

    licence: str
    problem: Callable[[Path], str | None]  # what is wrong with it as far as a glance tells, without its path
    sha256: Callable[[Path], str]


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """All that the rest of the program knows of one engine: its row in `posekit/registry.py`.

    `load`, `version` and `kernels` import what they need when they are called; a row by itself imports no torch.
    `load` and `version` get the engine's table of settings, None where it has none.
    """

    name: str  # lower-case letters, digits and _: it is part of file names, routes, variables and labels
    words: str  # what sentences call it: "the network"
    load: Callable[[Any, str, int], Engine]  # table, device ("cpu", "cuda:0"), CPU threads: takes seconds
    version: Callable[[Any], str]  # of the models that it would store with this table; quick
    kernels: Callable[[str], Mapping[str, str]] = lambda device: {}  # operation -> "compiled" or "reference"
    settings: type[Table] | None = None  # its table; the table's name is the engine's
    licence: str  # of its code
    weights: Weights | None = None
    refine: Refine  # what `refine: auto` means
    refiner: str | None = None  # the engine that polishes its poses and starts from given ones; None: it does so itself
    symmetries_from: str | None = None  # the engine whose found symmetries it takes over; None: it finds its own
    effort: float = 1.0  # what onboarding an object takes, compared with the geometric engine
    onboard_as: str | None = None  # the stage and route of its onboarding; None: `onboard_<name>`
    stand_in: str | None = None  # the engine that answers, degraded, where this one cannot be started
    hint: str = "the server's log says why"  # what an operator can do where it cannot be started

    @property
    def onboard_stage(self) -> str:
        """The stage that onboards objects for it; the route is `/` and the same."""
        return self.onboard_as or f"onboard_{self.name}"

    @property
    def weights_licence(self) -> str:
        """The terms of its weights."""
        return self.weights.licence if self.weights is not None else "none: this engine has no weights"

    def cannot_start(self, why: str) -> str:
        """What an operator reads where the server does not start for want of this engine."""
        return f"the engine {self.name} cannot be started: {why}; {self.hint}"
