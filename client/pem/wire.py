"""What the client says and hears: its errors, what it may ask, how arrays become a request, and an answer typed poses.

No connection is made here; see `client/pem/client.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, TypeVar

import httpx
import msgspec
import numpy as np
import numpy.typing as npt

from pem import imagefiles
from pem.contract import CadFormat, FoundDetections, PoseAnswer, Row, RowError, RowEvidence, Timing, Unit
from pem.rle import Rle, encode_rle

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

Picture = npt.NDArray[Any] | bytes | str | Path  # an array, the bytes of an image file, or its path
Camera = npt.ArrayLike | Mapping[str, Any]  # K (3, 3), or a loaded camera.json
Mask = npt.NDArray[Any] | Rle | Mapping[str, Any] | bytes | str | Path | Sequence[Any]
Progress = Callable[[str, float], None]  # what is going on ("upload", "onboarding"), 0..1
ALREADY_KNOWN: Final = "already known"  # told once, at 1.0, of an object that the server had before


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
    depth_scale: float  # raw value x this = millimetres (metres with depth_unit="m"); float depth needs one of the two
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
    #: refined without a search (None = search): T_cam_obj_mm (4, 4), a Pose, or a dict of rotation and translation (mm)
    init_poses: Sequence[npt.ArrayLike | Pose | Mapping[str, npt.ArrayLike] | None]
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
    on_progress: Progress  # told of "upload", "onboarding", and ALREADY_KNOWN


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


def check_options(verb: str, given: Mapping[str, Any], kind: type, *named: str) -> None:
    """TypeError for an option that `kind` (a TypedDict) lacks, with the nearest of its own and of those `named`."""
    known = [*named, *kind.__annotations__]
    for option in given:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise TypeError(f"{verb}() has no option {option!r}; {hint}")


def pose_request(
    rgb: Picture, depth: Picture, K: Camera, masks: Sequence[Mask] | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The body of a pose request, pictures encoded, masks as RLE; `masks` is None where there are none to send.

    ValueError and TypeError say what cannot be sent, before anything is.
    """
    camera = _camera(K, options)
    if camera.get("depth_unit") == "m" and isinstance(depth, np.ndarray) and depth.dtype.kind == "f":
        camera.setdefault("depth_scale", 1.0)
    body: dict[str, Any] = {
        "rgb_image": encode_rgb(rgb),
        "depth_image": encode_depth(depth, camera.get("depth_scale")),
        "cam_params": camera,
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
    """A colour image as the server takes it: (H, W, 3) or (H, W) uint8 as PNG, a file (bytes or path) as it is."""
    if not isinstance(rgb, np.ndarray):
        return _file_bytes("rgb", rgb)
    if rgb.dtype != np.uint8 or not (rgb.ndim == 2 or (rgb.ndim == 3 and rgb.shape[2] == 3)):
        raise ValueError(f"rgb must be (H, W, 3) uint8 in RGB order, not {rgb.shape} {rgb.dtype}")
    return imagefiles.write_png(rgb)


def encode_depth(depth: Picture, depth_scale: float | None) -> bytes:
    """A depth image as the server takes it, without loss: (H, W) integers as 16-bit PNG, (H, W) floats as TIFF, a file
    (16-bit PNG or float TIFF, bytes or path) as it is."""
    if not isinstance(depth, np.ndarray):
        return _file_bytes("depth", depth)
    if depth.ndim != 2:
        raise ValueError(f"depth must be (H, W), not {depth.shape}")
    if depth.dtype.kind == "f":
        if depth_scale is None:
            raise ValueError('float depth needs depth_unit="m" where it holds metres, depth_scale=1 where millimetres')
        return imagefiles.write_float_tiff(depth)
    if depth.dtype == np.uint8:
        raise ValueError("8-bit depth has lost its data; give the sensor's 16-bit or float values")
    if depth.dtype.kind not in "iu" or depth.size == 0 or depth.min() < 0 or depth.max() > 65_535:
        raise ValueError("depth must hold 16-bit values (0 to 65535) or floats")
    return imagefiles.write_png(depth.astype(np.uint16, copy=False))


def encode_mask(mask: Mask) -> Any:
    """A mask as the server takes it: an (H, W) array becomes a COCO RLE, a path its bytes, the rest goes as it is."""
    if isinstance(mask, str | Path):
        return Path(mask).read_bytes()
    if not isinstance(mask, np.ndarray):
        return dict(mask) if isinstance(mask, Mapping) else mask
    if mask.ndim != 2:
        raise ValueError(f"a mask must be (H, W), not {mask.shape}")
    return encode_rle(mask != 0)


def _file_bytes(what: str, file: Any) -> bytes:
    if isinstance(file, bytes):
        return file
    if isinstance(file, str | Path):
        return Path(file).read_bytes()
    raise TypeError(f"{what} must be an array, the bytes of an image file or its path, not {type(file).__name__}")


def _camera(K: Camera, options: Mapping[str, Any]) -> dict[str, Any]:
    """`cam_params`: what a camera file says of the depth holds where the options do not say otherwise."""
    said: dict[str, Any] = {}
    if isinstance(K, Mapping):
        if "cam_K" not in K:
            raise TypeError(f"K is a dict without cam_K (it has {', '.join(map(str, K)) or 'nothing'})")
        said, K = dict(K), K["cam_K"]
    matrix = np.asarray(K, dtype=np.float64)
    if matrix.size != 9:
        raise ValueError(f"K must be (3, 3), not {matrix.shape}")
    said |= {name: value for name, value in options.items() if value is not None}
    return {"cam_K": matrix.ravel().tolist()} | {
        name: said[name] for name in ("depth_scale", "depth_unit") if said.get(name) is not None
    }


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


def _init_pose(pose: npt.ArrayLike | Pose | Mapping[str, npt.ArrayLike] | None) -> dict[str, Any] | None:
    if pose is None:
        return None
    if isinstance(pose, Mapping):
        if set(pose) != {"rotation", "translation"}:
            raise ValueError(f"an initial pose as a dict has rotation and translation, not {', '.join(map(str, pose))}")
        R, t_mm = (np.asarray(pose[name], dtype=np.float64) for name in ("rotation", "translation"))
    else:
        T = np.asarray(pose.T_cam_obj_mm if isinstance(pose, Pose) else pose, dtype=np.float64)
        if T.shape != (4, 4):
            raise ValueError(f"an initial pose must be (4, 4), not {T.shape}")
        R, t_mm = T[:3, :3], T[:3, 3]
    if R.shape != (3, 3) or t_mm.shape != (3,):
        raise ValueError(f"an initial pose is a rotation (3, 3) and a translation (3,), not {R.shape}, {t_mm.shape}")
    return {"rotation": R.tolist(), "translation": t_mm.tolist()}


# -------------------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True, kw_only=True, eq=False)
class Hypothesis:
    """A runner-up."""

    T_cam_obj_mm: Float64  # (4, 4)
    confidence: float


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        if not self.ok:
            return f"Pose({self.status}, object={self.object_id!r}, error={self.error.code if self.error else None})"
        t_mm = ", ".join(f"{value:.1f}" for value in self.t_mm)
        return f"Pose({self.status}, object={self.object_id!r}, t_mm=({t_mm}), confidence={self.confidence:.2f})"

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
