"""All messages between the gateway and the stages, and between stages.

gateway ──Part──▶ decode ──Cut──▶ pose ──Solved──▶ respond ──PartAnswer──▶ gateway

A `Job` is one client request, parsed and checked, with its images still encoded. The gateway writes it once (to a file
in shared memory if it is large and there is room, inline otherwise). It sends one `Part` per bounded run of the job's
detections. A large `Cut` travels as a `CutFile` in the same way. A failure of the whole request travels as `Failure`
through every later stage, because raising inside a batched stage would fail its neighbours too. All messages are
MessagePack; arrays travel as (dtype, shape, bytes).

Wire units are millimetres; from `Cut` on, everything is metres.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from pem.contract import Health, Row, WireSymmetries
from posekit.engine import Symmetries
from posekit.units import m_to_mm, mm_to_m, transform_m_to_mm, transform_mm_to_m

# ------------------------------------------------------------------------------------------------ arrays on the wire


class PackedArray(msgspec.Struct, frozen=True, array_like=True):
    """A numpy array in a message: C-contiguous bytes with dtype and shape."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def unpack(self) -> npt.NDArray[Any]:
        """Return the array, read-only, without a copy."""
        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)


def pack(array: npt.NDArray[Any]) -> PackedArray:
    """Wrap an array for a message; copy it only if it is not contiguous."""
    array = np.ascontiguousarray(array)
    return PackedArray(array.dtype.str, array.shape, array.reshape(-1).view(np.uint8).data)


# --------------------------------------------------------------------------------------------------- gateway → decode


class ObjectRef(msgspec.Struct, frozen=True, kw_only=True):
    """An onboarded object, resolved by the gateway."""

    object_id: str  # content hash: the folder's name in the object store
    diameter_mm: float
    middle_mm: float | None = None  # the second largest extent, for the unit check


class MaskSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One detection as it was sent, with its mask undecoded: exactly one of `raw` and `png`.

    `raw` is the JSON text of the mask as the client wrote it: an RLE object, a base64 string, a nested list or
    polygons. `png` is the raw bytes from MessagePack.
    """

    raw: bytes = b""  # JSON
    png: bytes = b""
    bbox: tuple[float, float, float, float] | None = None  # xywh, pixels
    score: float = 1.0
    category: int | str | None = None
    object: int | None = None  # index into Job.objects; None = row `no_cad`
    init_T_cam_obj_mm: list[float] | None = None  # 16 numbers, row-major 4x4, translation in mm


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A client's request of the task `pose`, typed and checked, pictures still encoded. Gateway and stages share it."""

    rgb: bytes
    depth: bytes
    depth_height: int = 0  # with depth_width: depth is bare little-endian float32 of this size (second dialect)
    depth_width: int = 0
    K: tuple[float, float, float, float, float, float, float, float, float]  # row-major
    depth_scale_mm: float | None  # raw value x this = millimetres; None only if the file must give it (422)
    depth_unit_given: bool = False  # the client sent depth_unit or depth_scale; the words of the unit check differ
    detections: list[MaskSpec]
    field_prefix: str = "detections.masks"  # the client's name for the masks, in error paths ("seg_data")
    field_suffix: str = ""  # after the index: "" for columns (detections.masks[3]), ".segmentation" for lists
    field_indices: list[int] | None = None  # each detection's position in the client's request, if some were left out
    rgb_field: str = "rgb_image"
    depth_field: str = "depth_image"
    hypotheses: int = 0
    units: Literal["check", "strict"] = "check"
    min_score: float = 0.0
    seed: int | None = None
    visualize: bool = False


class Job(Asked, frozen=True, kw_only=True):
    """A request after all choices that the client may leave open are made: what the stages read."""

    request_id: str
    objects: list[ObjectRef]
    engine: str = "geometric"
    refine: Literal["icp", "none"] = "icp"
    deadline_unix: float  # time.time() after which no work is started
    max_megapixels: float = 50.0  # decoded size limit of colour and depth
    max_mask_megapixels: float = 500.0  # limit for all masks together; each is decoded alone
    output_dir: str | None = None  # absolute, already checked to be inside the output root

    def mask_field(self, index: int) -> str:
        """Return the client's name for mask `index`: `detections.masks[3]`, `detections[3].segmentation`."""
        sent = self.field_indices[index] if self.field_indices is not None else index
        return f"{self.field_prefix}[{sent}]{self.field_suffix}"


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Detections [start, stop) of a job. Part 0 also judges the units over all of the job's detections."""

    part_id: str
    start: int
    stop: int
    path: str | None = None  # file with the encoded Job
    job: bytes = b""  # the encoded Job itself if there is no file
    finish: bool = False  # the only part of its request: respond also draws the overlay and writes files


class FinishPart(msgspec.Struct, frozen=True, kw_only=True, tag="finish"):
    """Input of route /finish: overlay and files of a request that was split. `rows` are all of its rows, in order."""

    part_id: str
    path: str | None = None
    job: bytes = b""
    rows: list[Row]


# ------------------------------------------------------------------------------------------------ failures of requests


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag="failure"):
    """The whole request cannot be answered. Travels to the end of the pipeline as a value."""

    part_id: str
    code: str  # one of the codes in serve/errors.py, which maps it to a status
    detail: str  # for the client: contains no server path
    field: str | None = None


# ---------------------------------------------------------------------------------------------------- decode → pose


class Crop(msgspec.Struct, frozen=True, kw_only=True):
    """One detection cut out of its image, or the reason why it cannot be used."""

    index: int  # index of the detection in the request
    object_id: str | None = None  # content hash
    bbox: tuple[float, float, float, float]  # xywh as answered: the client's box, or the mask's
    category: int | str | None = None
    score: float = 1.0
    rejected: tuple[str, str] | None = None  # (code, detail)
    rgb: PackedArray | None = None  # (h, w, 3) uint8
    depth_m: PackedArray | None = None  # (h, w) float32; 0 = no reading
    mask: PackedArray | None = None  # (h, w) uint8, 0 or 1
    K: tuple[float, ...] = ()  # 9 numbers, camera of the crop
    seed: int = 0
    init_T_cam_obj: tuple[float, ...] | None = None  # 16 numbers, metres
    origin_px: tuple[int, int] = (0, 0)  # column and row of the crop's first pixel in its image
    image_size_px: tuple[int, int] | None = None  # width and height of that image, in pixels of the crop's size


class Cut(msgspec.Struct, frozen=True, kw_only=True, tag="cut"):
    """A part after decoding."""

    part: Part
    request_id: str = ""  # the job's id: parts of one request count as one when passes are counted
    crops: list[Crop]
    engine: str
    refine: Literal["icp", "none"]
    hypotheses: int
    min_score: float
    deadline_unix: float
    warnings: list[str] = []
    decode_ms: float = 0.0
    sent_unix: float = 0.0  # time when decode handed it on; pose measures its wait from here


class CutFile(msgspec.Struct, frozen=True, kw_only=True, tag="cut_file"):
    """A large Cut, written beside its job's file. The receiver removes the file (see `workers/jobs.py`)."""

    part_id: str
    path: str


# ----------------------------------------------------------------------------------------------- pose → respond, rows


class PassRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One pass of the pose stage. It travels with the first request that took part, so that it is counted once."""

    engine: str
    detections: int
    requests: int
    seconds: float
    pass_id: str = ""  # 32 hexadecimal digits of a trace, then 16 of its one span; traces link to it
    begun_unix: float = 0.0
    device: str = "cpu"


class PartResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a part and its cost: made by the pose stage, passed on by respond, read by the gateway."""

    rows: list[Row] = []
    engine: str = ""
    warnings: list[str] = []
    decode_ms: float = 0.0
    queue_ms: float = 0.0  # wait between decode and pose
    pose_ms: float = 0.0
    batch_detections: int = 0  # size of the largest pass that this part was in
    batch_requests: int = 0
    passes: list[PassRecord] = []
    pass_ids: list[str] = []  # ids of the passes that this part was in
    decode_unix: float = 0.0  # time when its decoding began
    pose_unix: float = 0.0  # time when its batch began in the pose stage


class Solved(PartResult, frozen=True, kw_only=True, tag="solved"):
    """A part after the pose stage."""

    part: Part
    scores: list[float]  # the detector's scores, one per row, for detection_pem.json


class PartAnswer(PartResult, frozen=True, kw_only=True, tag="answer"):
    """The answer to the gateway for a part, or for /finish (then only what respond did matters)."""

    part_id: str
    respond_ms: float = 0.0
    respond_unix: float = 0.0
    visualization: bytes | None = None  # PNG
    output_written: bool = False


def shared(kind: type[msgspec.Struct], value: msgspec.Struct) -> dict[str, Any]:
    """Return the fields of `kind`, a base of `value`'s class, for building another struct with the same base."""
    return {name: getattr(value, name) for name in kind.__struct_fields__}


PoseInput = Cut | CutFile | Failure
RespondInput = Solved | FinishPart | Failure
Answer = PartAnswer | Failure

OUTPUT_FILES = ("detection_pem.json", "poses.npz", "vis_pem.png")  # written into an output_dir by /pose and /finish

# ------------------------------------------------------------------------------------------------------- CAD objects


class InspectTask(msgspec.Struct, frozen=True, kw_only=True):
    """Task of route /inspect: parse the mesh in `folder`, find its unit, judge its health, write `mesh.safetensors`."""

    task_id: str
    folder: str  # holds exactly the client's files, already named safely
    cad_format: str  # ply | obj | stl | glb | off | zip
    model_unit: Literal["mm", "m", "auto"] | None  # None: the format's
    max_faces: int


class Inspected(msgspec.Struct, frozen=True, kw_only=True, tag="inspected"):
    """A mesh that can be used."""

    task_id: str
    object_id: str  # sha256 over the resolved unit and the sorted names and bytes of its files
    model_unit: Literal["mm", "m"]
    health: Health


class OnboardTask(msgspec.Struct, frozen=True, kw_only=True):
    """Task of routes /onboard and /onboard_sam6d: build an engine's model of an object whose folder is in the store."""

    task_id: str
    object_id: str


class Onboarded(msgspec.Struct, frozen=True, kw_only=True, tag="onboarded"):
    """The engine's model is on disk."""

    task_id: str
    object_id: str
    symmetries: WireSymmetries
    seconds: float


InspectAnswer = Inspected | Failure
OnboardAnswer = Onboarded | Failure


def symmetries_to_wire(symmetries: Symmetries) -> WireSymmetries:
    """Convert metres to BOP's millimetres."""
    discrete = [_numbers(transform_m_to_mm(T_obj_obj)) for T_obj_obj in symmetries.discrete]
    continuous = [
        {"axis": _numbers(axis), "offset": _numbers(m_to_mm(np.asarray(offset_m, dtype=np.float64)))}
        for axis, offset_m in symmetries.continuous
    ]
    return WireSymmetries(symmetries_discrete=discrete, symmetries_continuous=continuous)


def symmetries_from_wire(wire: WireSymmetries) -> Symmetries:
    """Convert BOP's millimetres to metres. The gateway has already checked the shapes."""
    discrete = tuple(transform_mm_to_m(numbers) for numbers in wire.symmetries_discrete)
    continuous = tuple(
        (np.array(entry["axis"], dtype=np.float64), mm_to_m(np.array(entry["offset"], dtype=np.float64)))
        for entry in wire.symmetries_continuous
    )
    return Symmetries(discrete=discrete, continuous=continuous)


def _numbers(values: npt.ArrayLike) -> list[float]:
    return [float(x) for x in np.asarray(values).ravel()]
