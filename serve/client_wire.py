"""What the client says and hears: its errors, what it may ask, how arrays become a request, and an answer typed poses.

No connection is made here; see `serve/client.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, TypeVar

import httpx
import msgspec
import numpy as np
import numpy.typing as npt

from posekit.rle import Rle, encode_rle
from serve import imagefiles
from serve.schemas import CadFormat, FoundDetections, PoseAnswer, Row, RowError, RowEvidence, Timing, Unit

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
Float64 = npt.NDArray[np.float64]
T = TypeVar("T")

# ------------------------------------------------------------------------------------------------------------- errors


class PemError(Exception):
    """Base of everything that this client raises on purpose."""


class ConnectionFailed(PemError):
    """No server answers at the address, or the connection broke."""


class TimedOut(ConnectionFailed):
    """The server did not answer within the client's own time."""


class NoPose(PemError):
    """The pose of a detection that has none was asked for."""


class OnboardingFailed(PemError):
    """The server could not build its models of a CAD object, or not in time."""


class RequestRefused(PemError):
    """The server answered that it will not, or cannot; the subclasses say whose fault it is."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        field: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{detail} [{status} {code}{f', at {field}' if field else ''}]")
        self.status = status
        self.code = code  # stable, see serve.errors.CODES
        self.detail = detail
        self.field = field  # path of the request field at fault
        self.request_id = request_id  # the server's log has it
        self.retry_after_s = retry_after_s


class BadInput(RequestRefused):
    """The request itself is wrong (400, 405, 408, 413, 415, 422): sending it again will not help."""


class KeyRefused(RequestRefused):
    """The API key is missing or wrong (401, 403)."""


class NotFound(RequestRefused):
    """No such object or CAD file (404)."""


class Overloaded(RequestRefused):
    """Over capacity, or not ready (429, 503), after all retries; `retry_after_s` says when to come back."""


class DeadlinePassed(RequestRefused):
    """The deadline passed before the answer was ready (504)."""


class ServerFailed(RequestRefused):
    """The server's fault (500), or that of the ISM server behind it (502)."""


_BY_STATUS: Final[dict[int, type[RequestRefused]]] = {
    401: KeyRefused,
    403: KeyRefused,
    404: NotFound,
    429: Overloaded,
    503: Overloaded,
    504: DeadlinePassed,
}


# ------------------------------------------------------------------------------------------------------------ questions

Picture = npt.NDArray[Any] | bytes
Mask = npt.NDArray[Any] | Rle | Mapping[str, Any] | bytes | Sequence[Any]
Progress = Callable[[str, float], None]  # what is going on ("upload", "onboarding"), 0..1


class PoseOptions(TypedDict, total=False):
    """What `estimate` and `full_pipeline` take besides the pictures; what is left out is the server's default.

    The CAD comes by exactly one of `object_id`, `cad_path`, `cad` and `objects`.
    """

    object_id: str  # hash or name of a registered object
    cad_path: str  # a mesh under the server's CAD root
    cad: bytes | str | Path  # the mesh itself, or the file that holds it (at most 10 MB; else objects.add)
    cad_format: CadFormat  # of `cad`; taken from a file's name where it is left out
    objects: Mapping[int | str, str | Mapping[str, str]]  # category -> object id or name, or {"cad_path": ...}
    model_unit: Unit  # of `cad` or `cad_path`: "mm" unless told
    depth_scale: float  # raw value x this = millimetres (metres with depth_unit="m"); required for float depth
    depth_unit: Literal["mm", "m"]
    engine: Literal["geometric", "sam6d", "auto"]
    refine: Literal["auto", "icp", "none"]
    hypotheses: int  # runners-up to return with each pose
    units: Literal["check", "strict"]
    min_score: float
    seed: int
    deadline_ms: int  # for the whole call, retries included
    visualize: bool  # the overlay into PoseResult.visualization
    output_dir: str  # relative to the server's output root


class DetectionOptions(PoseOptions, total=False):
    """What `estimate` takes about the detections besides their masks; each as long as the masks."""

    boxes: npt.ArrayLike  # (n, 4) pixels
    box_format: Literal["xywh", "xyxy"]
    scores: npt.ArrayLike  # (n,)
    object_ids: Sequence[int | str | None]  # categories
    init_poses: Sequence[npt.ArrayLike | None]  # T_cam_obj_mm (4, 4) to refine without a search; None = search
    detections: Sequence[Mapping[str, Any]]  # SAM-6D's list in place of masks


class ObjectOptions(TypedDict, total=False):
    """What `objects.add` takes besides the CAD. Symmetries are BOP's, in millimetres."""

    name: str
    model_unit: Unit  # "mm" unless told
    cad_format: CadFormat  # required with bytes, else taken from the file's name
    symmetries_discrete: Sequence[npt.ArrayLike]  # (4, 4) each
    symmetries_continuous: Sequence[Mapping[str, npt.ArrayLike]]  # {"axis": (3,), "offset": (3,)} each
    wait: bool  # until it is ready; True unless told
    wait_timeout_s: float  # 600 unless told
    on_progress: Progress


class ClientOptions(TypedDict, total=False):
    """How a client behaves."""

    timeout_s: float  # for one answer; 60 unless told
    retries: int  # of what was refused with Retry-After, or whose connection broke; 3 unless told
    retry_budget_s: float  # for sleeping between them, altogether; 30 unless told
    deadline_s: float  # for a pose request, retries included; the server starts nothing that would come too late
    use_json: bool  # JSON in place of MessagePack


#: Options that go to the server as they are.
_PLAIN: Final = (
    *("object_id", "cad_path", "cad_format", "model_unit", "engine", "refine", "hypotheses", "units", "min_score"),
    *("seed", "visualize", "output_dir", "box_format", "template_dir", "ism_cad_path"),
)


def pose_request(
    rgb: Picture, depth: Picture, K: npt.ArrayLike, masks: Sequence[Mask] | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The body of a pose request, pictures encoded, masks as RLE; `masks` is None where there are none to send.

    ValueError and TypeError say what cannot be sent, before anything is.
    """
    body: dict[str, Any] = {
        "rgb_image": encode_rgb(rgb),
        "depth_image": encode_depth(depth, options.get("depth_scale")),
        "cam_params": _camera(K, options),
    }
    given = {name: value for name, value in options.items() if value is not None}
    body |= {name: value for name, value in given.items() if name in _PLAIN}
    if "cad" in given:
        body["cad"], body["cad_format"] = _cad(given["cad"], given.get("cad_format"))
    if "objects" in given:
        body["objects"] = {
            category: {"object_id": choice} if isinstance(choice, str) else dict(choice)
            for category, choice in given["objects"].items()
        }
    if "detections" in given:
        if masks is not None:
            raise ValueError("give masks or detections, not both")
        body["detections"] = [dict(item) for item in given["detections"]]
    elif masks is not None:
        body["detections"] = _columns(masks, given)
    if "init_poses" in given:
        body["init_poses"] = [_init_pose(pose) for pose in given["init_poses"]]
    return body


def encode_rgb(rgb: Picture) -> bytes:
    """A colour image as the server takes it: (H, W, 3) or (H, W) uint8 as PNG, bytes (a PNG or JPEG) as they are."""
    if isinstance(rgb, bytes):
        return rgb
    if rgb.dtype != np.uint8 or not (rgb.ndim == 2 or (rgb.ndim == 3 and rgb.shape[2] == 3)):
        raise ValueError(f"rgb must be (H, W, 3) uint8 in RGB order, not {rgb.shape} {rgb.dtype}")
    return imagefiles.write_png(rgb)


def encode_depth(depth: Picture, depth_scale: float | None) -> bytes:
    """A depth image as the server takes it, without loss: (H, W) integers as 16-bit PNG, (H, W) floats as TIFF, bytes
    (a 16-bit PNG or float TIFF) as they are."""
    if isinstance(depth, bytes):
        return depth
    if depth.ndim != 2:
        raise ValueError(f"depth must be (H, W), not {depth.shape}")
    if depth.dtype.kind == "f":
        if depth_scale is None:
            raise ValueError("float depth needs depth_scale: 1000 where it holds metres, 1 where it holds millimetres")
        return imagefiles.write_float_tiff(depth)
    if depth.dtype == np.uint8:
        raise ValueError("8-bit depth has lost its data; give the sensor's 16-bit or float values")
    if depth.dtype.kind not in "iu" or depth.size == 0 or depth.min() < 0 or depth.max() > 65_535:
        raise ValueError("depth must hold 16-bit values (0 to 65535) or floats")
    return imagefiles.write_png(depth.astype(np.uint16, copy=False))


def encode_mask(mask: Mask) -> Any:
    """A mask as the server takes it: an (H, W) array becomes a COCO RLE, every other form goes as it is."""
    if not isinstance(mask, np.ndarray):
        return dict(mask) if isinstance(mask, Mapping) else mask
    if mask.ndim != 2:
        raise ValueError(f"a mask must be (H, W), not {mask.shape}")
    return encode_rle(mask != 0)


def _camera(K: npt.ArrayLike, options: Mapping[str, Any]) -> dict[str, Any]:
    matrix = np.asarray(K, dtype=np.float64)
    if matrix.size != 9:
        raise ValueError(f"K must be (3, 3), not {matrix.shape}")
    camera: dict[str, Any] = {"cam_K": matrix.ravel().tolist()}
    camera |= {name: options[name] for name in ("depth_scale", "depth_unit") if options.get(name) is not None}
    return camera


def _cad(cad: bytes | str | Path, cad_format: str | None) -> tuple[bytes, str]:
    if isinstance(cad, bytes):
        if cad_format is None:
            raise ValueError("cad given as bytes needs cad_format: ply, obj, stl, glb, off or zip")
        return cad, cad_format
    path = Path(cad)
    return path.read_bytes(), cad_format or path.suffix.lower().removeprefix(".")


def _columns(masks: Sequence[Mask], options: Mapping[str, Any]) -> dict[str, Any]:
    columns: dict[str, Any] = {"masks": [encode_mask(mask) for mask in masks]}
    for name in ("boxes", "scores"):
        if name in options:
            columns[name] = np.asarray(options[name], dtype=np.float64).tolist()
    if "object_ids" in options:
        ids = options["object_ids"]
        columns["object_ids"] = [item.item() if isinstance(item, np.generic) else item for item in ids]
    return columns


def _init_pose(T_cam_obj_mm: npt.ArrayLike | None) -> dict[str, Any] | None:
    if T_cam_obj_mm is None:
        return None
    T = np.asarray(T_cam_obj_mm, dtype=np.float64)
    if T.shape != (4, 4):
        raise ValueError(f"an initial pose must be (4, 4), not {T.shape}")
    return {"rotation": T[:3, :3].tolist(), "translation": T[:3, 3].tolist()}


# -------------------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True, kw_only=True, eq=False)
class Hypothesis:
    """A runner-up."""

    T_cam_obj_mm: Float64  # (4, 4)
    confidence: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Pose:
    """One detection's answer, in the order sent. `R`, `t_mm` and `T_cam_obj_mm` raise NoPose where it was rejected."""

    index: int
    status: Literal["ok", "rejected"]
    object_id: int | str | None  # the detection's category, echoed
    cad_id: str | None  # content hash of the CAD
    confidence: float  # 0..1, about the pose alone
    bbox: tuple[float, float, float, float]  # xywh
    evidence: RowEvidence | None
    error: RowError | None  # code and detail of a rejected detection
    ambiguous: bool
    hypotheses: tuple[Hypothesis, ...]
    row: Row  # as the server wrote it

    @property
    def ok(self) -> bool:
        """Whether there is a pose."""
        return self.row.rotation is not None and self.row.translation is not None

    @property
    def R(self) -> Float64:  # noqa: N802
        """Rotation object to camera, (3, 3)."""
        return self.T_cam_obj_mm[:3, :3]

    @property
    def t_mm(self) -> Float64:
        """Translation object to camera, (3,), millimetres."""
        return self.T_cam_obj_mm[:3, 3]

    @property
    def T_cam_obj_mm(self) -> Float64:  # noqa: N802
        """The pose as (4, 4): `p_cam = R p_obj + t`, millimetres."""
        if self.row.rotation is None or self.row.translation is None:
            why = f"{self.error.code}: {self.error.detail}" if self.error else self.status
            raise NoPose(f"detection {self.index} has no pose ({why})")
        return _matrix(self.row.rotation, self.row.translation)


@dataclass(frozen=True, kw_only=True, eq=False)
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

    def overlay(self) -> npt.NDArray[np.uint8]:
        """The visualization as (H, W, 3) uint8; ValueError where none was asked for."""
        if self.visualization is None:
            raise ValueError("there is no visualization: ask with visualize=True")
        return imagefiles.read_png(self.visualization)


def _matrix(rotation: Sequence[Sequence[float]], translation_mm: Sequence[float]) -> Float64:
    T = np.eye(4)
    T[:3, :3] = rotation
    T[:3, 3] = translation_mm
    return T


def _pose(index: int, row: Row) -> Pose:
    hypotheses = () if row.hypotheses is msgspec.UNSET else row.hypotheses
    return Pose(
        index=index,
        status=row.status,
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


def pose_result(response: httpx.Response) -> PoseResult:
    answer = decoded(response, PoseAnswer)
    return PoseResult(
        poses=[_pose(index, row) for index, row in enumerate(answer.poses)],
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


def decoded(response: httpx.Response, type_: type[T]) -> T:
    packed = response.headers.get("content-type", "").startswith(MSGPACK)
    try:
        if packed:
            return msgspec.msgpack.decode(response.content, type=type_)
        return msgspec.json.decode(response.content, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PemError(f"{response.request.url} does not answer as a PEM server does: {error}") from None


class _ErrorBody(msgspec.Struct):
    code: str
    detail: str
    request_id: str | None = None
    field: str | None = None


class _ErrorAnswer(msgspec.Struct):
    error: _ErrorBody


def refused(response: httpx.Response) -> RequestRefused:
    status = response.status_code
    kind = _BY_STATUS.get(status, BadInput if status < 500 else ServerFailed)
    retry_after_s = _retry_after(response)
    try:
        error = decoded(response, _ErrorAnswer).error
    except PemError:  # a proxy's page, or no PEM server at all
        words = f"{response.request.url} answered {status} {response.reason_phrase}"
        request_id = response.headers.get("x-request-id")
        return kind(status, "unknown", words, request_id=request_id, retry_after_s=retry_after_s)
    return kind(
        status,
        error.code,
        error.detail,
        field=error.field,
        request_id=error.request_id,
        retry_after_s=retry_after_s,
    )


def _retry_after(response: httpx.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else None
