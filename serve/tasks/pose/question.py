"""Turn a request's body into a checked question, by every rule of the contract that needs no decoded picture.

`pose_question`, `full_pipeline_question` and `seg_data_question` turn the three forms into one `Question`, so that the
rest of the server knows one form. Refusals are ApiErrors that name the field as the client wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np

from pem import contract as schemas
from posekit import registry
from posekit.errors import PoseError
from posekit.io import images
from serve.errors import ApiError
from serve.objects.choice import CadChoice
from serve.reading import Protocol, decode_field, validation_error
from serve.settings import Limits
from workers.messages import Asked, MaskSpec

_FOCAL_PX = (1.0, 1e6)  # range for any camera
_FARTHEST_MM = 1e6  # largest distance of an initial pose

Category = int | str | None

FILE_PARTS = {"rgb": "rgb_image", "depth": "depth_image", "cad": "cad"}
FORM_PARTS = frozenset({"request", *FILE_PARTS, *FILE_PARTS.values()})  # parts of a multipart request


@dataclass(kw_only=True)
class Question:
    """A checked pose request. `choices` are the distinct CADs, and `MaskSpec.object` indexes them."""

    asked: Asked
    choices: list[CadChoice]
    by_category: dict[str, int] | None  # `objects`: category as text -> index into choices
    model_unit: schemas.Unit | None  # None: the format's
    engine: str
    refine: Literal["auto", "icp", "none"]
    deadline_ms: int | None = None
    output_dir: str | None = None
    warnings: list[str] = field(default_factory=list)
    # full pipeline only
    template_dir: str | None = None
    ism_cad_path: str | None = None
    # second dialect only: items of seg_data that were left out, and the items as they were sent
    left_out: list[tuple[int, str, str]] = field(default_factory=list)
    coco: list[dict[str, Any]] | None = None

    def change(self, **changes: Any) -> None:
        """Replace fields of `asked`."""
        self.asked = msgspec.structs.replace(self.asked, **changes)

    def let_pictures_go(self) -> None:
        """Release the pictures: the job has them."""
        self.change(rgb=b"", depth=b"")


# ----------------------------------------------------------------------------------------------------------- questions


def pose_question(request: schemas.PoseRequest, protocol: Protocol, limits: Limits) -> Question:
    """`POST /api/v1/pose_estimation`"""
    question = _common(request, protocol, limits)
    specs, listed = _detections(request.detections, protocol, request.box_format, limits)
    if listed:
        question.change(field_prefix="detections", field_suffix=".segmentation")
    if request.init_poses is not None:
        if len(request.init_poses) != len(specs):
            raise ApiError(
                "invalid",
                f"init_poses has {len(request.init_poses)} entries for {len(specs)} masks; null means search",
                field="init_poses",
            )
        specs = [
            spec if pose is None else msgspec.structs.replace(spec, init_T_cam_obj_mm=_init_pose(pose, index))
            for index, (spec, pose) in enumerate(zip(specs, request.init_poses, strict=True))
        ]
    assign_objects(question, specs)
    return question


def full_pipeline_question(request: schemas.FullPipelineRequest, protocol: Protocol, limits: Limits) -> Question:
    """`POST /api/v1/full_pipeline`; its detections come from the ISM server later (`detections_from_ism`)."""
    question = _common(request, protocol, limits)
    question.template_dir = request.template_dir
    question.ism_cad_path = request.ism_cad_path
    return question


def seg_data_question(request: schemas.SegDataRequest, protocol: Protocol, limits: Limits) -> Question:
    """Make the question of `POST /api/v1/pose-estimation`: COCO items over the threshold, others listed as left out."""
    question = _common(request, protocol, limits)
    specs, _ = _detections(request.seg_data, protocol, "xywh", limits, name="seg_data", only_list=True)
    question.coco = _coco_items(request.seg_data, protocol, "seg_data")
    indices: list[int] = []
    kept: list[MaskSpec] = []
    for index, spec in enumerate(specs):
        if spec.score > request.det_score_thresh:
            indices.append(index)
            kept.append(spec)
        else:
            detail = f"detector score {spec.score:g} is not above det_score_thresh {request.det_score_thresh:g}"
            question.left_out.append((index, "low_confidence", detail))
    height, width = _bare_depth_size(request)
    question.change(
        field_prefix="seg_data",
        field_suffix=".segmentation",
        field_indices=indices,
        depth_height=height,
        depth_width=width,
    )
    if request.template_dir is not None:
        question.warnings.append("template_dir is not used: this server onboards the CAD model itself")
    assign_objects(question, kept)
    return question


def detections_from_ism(
    question: Question, masks: list[Any], boxes: list[list[float]], scores: list[float], ids: list[Category]
) -> None:
    """Put the ISM server's detections into the question; every detection is kept."""
    specs = [
        MaskSpec(
            raw=msgspec.json.encode(mask),
            bbox=(box[0], box[1], box[2], box[3]) if box else None,
            score=score,
            category=category,
        )
        for mask, box, score, category in zip(masks, boxes, scores, ids, strict=True)
    ]
    assign_objects(question, specs)


def _common(request: schemas.Asked, protocol: Protocol, limits: Limits) -> Question:
    check_engine(request.engine)
    depth_scale_mm, unit_given = _depth_scale(request)
    choices, by_category = _cad_choices(request, limits)
    asked = Asked(
        rgb=_picture(request.rgb_image, "rgb_image"),
        depth=_picture(request.depth_image, "depth_image"),
        K=_intrinsics(request.cam_params.cam_K, protocol),
        depth_scale_mm=depth_scale_mm,
        depth_unit_given=unit_given,
        detections=[],
        hypotheses=getattr(request, "hypotheses", 0),
        units=request.units,
        min_score=getattr(request, "min_score", 0.0),
        seed=request.seed,
        visualize=getattr(request, "visualize", False),
    )
    return Question(
        asked=asked,
        choices=choices,
        by_category=by_category,
        model_unit=request.model_unit,
        engine=request.engine,
        refine=request.refine,
        deadline_ms=request.deadline_ms,
        output_dir=request.output_dir,
    )


def check_engine(name: str) -> None:
    """Refuse an engine that is neither "auto" nor registered, in the words that msgspec uses for closed lists."""
    if name not in registry.choices():
        raise validation_error(f"Invalid enum value {name!r} - at `$.engine`")


def _picture(data: bytes, name: str) -> bytes:
    if not data:
        raise ApiError("bad_data", f"{name} is empty", field=name)
    return data


def _bare_depth_size(request: schemas.SegDataRequest) -> tuple[int, int]:
    """Return (height, width) if the second dialect's depth is bare float32, else (0, 0)."""
    depth = request.depth_image
    if depth[:8] == b"\x89PNG\r\n\x1a\n" or _is_tiff(depth):
        return 0, 0
    try:
        info = images.inspect(request.rgb_image, "rgb_image")
    except PoseError:
        return 0, 0  # the decode stage reports what is wrong with the colour image
    return (info.height, info.width) if len(depth) == 4 * info.height * info.width else (0, 0)


def _is_tiff(data: bytes) -> bool:
    return data[:4] in (b"II*\0", b"MM\0*")


def _depth_scale(request: schemas.Asked) -> tuple[float, bool]:
    params = request.cam_params
    scale = params.depth_scale
    if scale is None:
        if _is_tiff(request.depth_image):
            raise ApiError(
                "invalid",
                "depth_scale must be given for a float TIFF: what one unit of its values is, in millimetres "
                '(1000 for metres), or with depth_unit "m" in metres (1)',
                field="cam_params.depth_scale",
            )
        scale = 1.0
    if not math.isfinite(scale):
        raise ApiError("invalid", "depth_scale must be a finite number", field="cam_params.depth_scale")
    given = params.depth_scale is not None or params.depth_unit == "m"
    return scale * (1000.0 if params.depth_unit == "m" else 1.0), given


def _intrinsics(
    raw: msgspec.Raw, protocol: Protocol
) -> tuple[float, float, float, float, float, float, float, float, float]:
    """Return nine numbers, from nine row-major or from three rows of three."""
    where = "cam_params.cam_K"
    value: object = decode_field(bytes(raw), protocol, object, where)
    if isinstance(value, list) and len(value) == 3 and all(isinstance(row, list) and len(row) == 3 for row in value):
        value = [number for row in value for number in row]
    if not isinstance(value, list) or len(value) != 9 or not all(_is_number(number) for number in value):
        raise ApiError("invalid", "cam_K must be 9 numbers in row order, or 3 rows of 3", field=where)
    try:
        K = np.array([float(number) for number in value], dtype=np.float64).reshape(3, 3)
    except OverflowError:  # an integer of hundreds of digits
        K = np.full((3, 3), math.inf)
    if not np.isfinite(K).all():
        raise ApiError("invalid", "cam_K has a number that is not finite", field=where)
    if abs(K[0, 0] * K[1, 1]) < 1e-9 or abs(np.linalg.det(K)) < 1e-9:
        raise ApiError("invalid", "cam_K is singular: its focal lengths cannot be zero", field=where)
    if not (_FOCAL_PX[0] <= K[0, 0] <= _FOCAL_PX[1] and _FOCAL_PX[0] <= K[1, 1] <= _FOCAL_PX[1]):
        least, most = _FOCAL_PX
        raise ApiError("invalid", f"the focal lengths in cam_K are pixels, between {least:g} and {most:g}", field=where)
    if not np.allclose(K[2], (0.0, 0.0, 1.0)) or abs(K[1, 0]) > 1e-9:
        raise ApiError("invalid", "cam_K must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]] in row order", field=where)
    a, b, c, d, e, f, g, h, i = (float(x) for x in K.ravel())
    return (a, b, c, d, e, f, g, h, i)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ----------------------------------------------------------------------------------------------------------------- CAD


def _cad_choices(request: schemas.Asked, limits: Limits) -> tuple[list[CadChoice], dict[str, int] | None]:
    given = [n for n in ("cad_path", "object_id", "cad", "objects") if getattr(request, n) is not None]
    if len(given) != 1:
        what = f"{' and '.join(given)} are given" if given else "none is given"
        raise ApiError(
            "invalid",
            f"the CAD comes by exactly one of cad_path, object_id, cad and objects; {what}",
            field=given[1] if given else "object_id",
        )
    if request.cad_format is not None and request.cad is None:
        raise ApiError("invalid", "cad_format belongs to `cad`, which is not given", field="cad_format")
    if request.cad is not None:
        if request.cad_format is None:
            raise ApiError("invalid", "cad needs cad_format: ply, obj, stl, glb, off or zip", field="cad_format")
        if len(request.cad) > limits.inline_cad_mb * 2**20:
            raise ApiError(
                "too_large",
                f"cad is over {limits.inline_cad_mb} MB; register it with POST /api/v1/objects",
                field="cad",
            )
        if not request.cad:
            raise ApiError("bad_data", "cad is empty", field="cad")
        return [CadChoice(field="cad", cad=request.cad, cad_format=request.cad_format)], None
    if request.objects is None:
        name = given[0]
        choice = CadChoice(field=name, cad_path=request.cad_path, object_id=request.object_id)
        _no_unit_for(request, by_id=request.object_id is not None)
        return [choice], None
    choices: list[CadChoice] = []
    by_category: dict[str, int] = {}
    for category, entry in request.objects.items():
        where = f"objects.{category}"
        if (entry.cad_path is None) == (entry.object_id is None):
            raise ApiError("invalid", f"{where} needs exactly one of cad_path and object_id", field=where)
        name = "cad_path" if entry.cad_path is not None else "object_id"
        same = (entry.cad_path, entry.object_id)
        for index, earlier in enumerate(choices):
            if (earlier.cad_path, earlier.object_id) == same:
                by_category[str(category)] = index
                break
        else:
            by_category[str(category)] = len(choices)
            choices.append(CadChoice(field=f"{where}.{name}", cad_path=entry.cad_path, object_id=entry.object_id))
    _no_unit_for(request, by_id=bool(choices) and all(choice.object_id is not None for choice in choices))
    return choices, by_category


def _no_unit_for(request: schemas.Asked, *, by_id: bool) -> None:
    if by_id and request.model_unit is not None:
        raise ApiError(
            "invalid", "model_unit cannot be given with object_id: the object already has its unit", field="model_unit"
        )


def assign_objects(question: Question, specs: list[MaskSpec]) -> None:
    """Set the detections, each with its CAD; a category without an entry gets None (the row `no_cad`)."""
    if (by := question.by_category) is None:
        question.change(detections=[msgspec.structs.replace(spec, object=0) for spec in specs])
    else:
        question.change(detections=[msgspec.structs.replace(spec, object=by.get(str(spec.category))) for spec in specs])


# ---------------------------------------------------------------------------------------------------------- detections


def _detections(
    raw: msgspec.Raw,
    protocol: Protocol,
    box_format: str,
    limits: Limits,
    *,
    name: str = "detections",
    only_list: bool = False,
) -> tuple[list[MaskSpec], bool]:
    """Parse detections in either form; return their specs, and True if the form was the list."""
    data = bytes(raw)
    if _is_list(data, protocol):
        items = decode_field(data, protocol, list[schemas.Detection], name)
        columns = [
            (i.segmentation, i.bbox, i.score, i.category_id, f"{name}[{n}].segmentation") for n, i in enumerate(items)
        ]
    elif only_list:
        raise ApiError("invalid", f"{name} must be a list of COCO detections", field=name)
    else:
        columns = _columns(decode_field(data, protocol, schemas.Columns, name), name)
    if len(columns) > limits.detections:
        raise ApiError("invalid", f"{len(columns)} detections; at most {limits.detections} in one request", field=name)
    specs = []
    for mask, box, score, category, where in columns:
        json_text, png = _mask(bytes(mask), protocol, where)
        if not math.isfinite(score):
            raise ApiError("invalid", "a score must be a finite number", field=where)
        if isinstance(category, int) and not -(2**63) <= category < 2**63:
            raise ApiError("invalid", "a category must be an integer of at most 64 bits", field=where)
        specs.append(
            MaskSpec(raw=json_text, png=png, bbox=_box(box, box_format, where), score=float(score), category=category)
        )
    return specs, _is_list(data, protocol)


def _columns(columns: schemas.Columns, name: str) -> list[tuple[msgspec.Raw, list[float] | None, float, Category, str]]:
    count = len(columns.masks)
    for column in ("boxes", "scores", "object_ids"):
        values = getattr(columns, column)
        if values is not None and len(values) != count:
            raise ApiError("invalid", f"{column} has {len(values)} entries for {count} masks", field=f"{name}.{column}")
    boxes: list[list[float] | None] = [*columns.boxes] if columns.boxes is not None else [None] * count
    scores = columns.scores if columns.scores is not None else [1.0] * count
    ids: list[Category] = [*columns.object_ids] if columns.object_ids is not None else [None] * count
    where = [f"{name}.masks[{index}]" for index in range(count)]
    return list(zip(columns.masks, boxes, scores, ids, where, strict=True))


def _box(box: list[float] | None, box_format: str, where: str) -> tuple[float, float, float, float] | None:
    if box is None:
        return None
    if not all(math.isfinite(number) for number in box):
        raise ApiError("invalid", "a box has a number that is not finite", field=where)
    x, y, w, h = box
    w, h = (w - x, h - y) if box_format == "xyxy" else (w, h)
    if not (math.isfinite(w) and math.isfinite(h)):
        raise ApiError("invalid", "a box is larger than any number", field=where)
    return x, y, w, h


def _mask(data: bytes, protocol: Protocol, where: str) -> tuple[bytes, bytes]:
    """Return (JSON text, PNG bytes) of a mask, one of them empty. Only its type is checked: decode reads the pixels."""
    if protocol == "json":
        if data[:1] not in (b"{", b"[", b'"'):
            raise _mask_error(where)
        return data, b""
    value = decode_field(data, protocol, Any, where)
    if isinstance(value, bytes):
        return b"", value
    if not isinstance(value, dict | list | str):
        raise _mask_error(where)
    try:
        return msgspec.json.encode(_text_counts(value)), b""
    except (TypeError, ValueError, UnicodeDecodeError):
        raise _mask_error(where) from None


def _text_counts(value: Any) -> Any:
    """Convert RLE counts sent as bytes, as pycocotools makes them, to ASCII text."""
    if isinstance(value, dict) and isinstance(value.get("counts"), bytes):
        return {**value, "counts": value["counts"].decode("ascii")}
    return value


def _mask_error(where: str) -> ApiError:
    return ApiError("invalid", "a mask is an RLE object, a PNG, a nested 0/1 list or a list of polygons", field=where)


def _init_pose(pose: schemas.InitPose, index: int) -> list[float]:
    R = np.array(pose.rotation, dtype=np.float64)
    t = np.array(pose.translation, dtype=np.float64)
    where = f"init_poses[{index}]"
    if not (np.isfinite(R).all() and np.isfinite(t).all()):
        raise ApiError("invalid", "an initial pose has a number that is not finite", field=where)
    if np.abs(t).max() > _FARTHEST_MM:
        raise ApiError("invalid", "an initial pose is more than a kilometre away", field=f"{where}.translation")
    if not np.allclose(R @ R.T, np.eye(3), atol=1e-3) or np.linalg.det(R) < 0:
        raise ApiError(
            "invalid", "rotation is not a rotation matrix (orthonormal, determinant +1)", field=f"{where}.rotation"
        )
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = R, t
    return [float(x) for x in T.ravel()]


# ----------------------------------------------------------------------------------------------------------- raw fields


def _is_list(data: bytes, protocol: Protocol) -> bool:
    if protocol == "json":
        return data[:1] == b"["
    return bool(data) and (0x90 <= data[0] <= 0x9F or data[0] in (0xDC, 0xDD))


def _coco_items(raw: msgspec.Raw, protocol: Protocol, name: str) -> list[dict[str, Any]]:
    """Return COCO items as they were sent, unknown keys included, since the answer repeats them in any form."""
    items = decode_field(bytes(raw), protocol, list[dict[str, Any]], name)
    try:
        items = msgspec.json.decode(msgspec.json.encode(items), type=list[dict[str, Any]])
        msgspec.msgpack.encode(items)
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError):
        raise ApiError(
            "invalid", f"{name} holds a value that JSON and MessagePack cannot both say", field=name
        ) from None
    return items


def header_deadline_ms(headers: Mapping[str, str]) -> int | None:
    """Return `X-Request-Deadline-Ms`, checked."""
    text = headers.get("x-request-deadline-ms")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ApiError(
            "invalid",
            "X-Request-Deadline-Ms must be a whole number of milliseconds, at least 1",
            field="X-Request-Deadline-Ms",
        )
    return int(text)
