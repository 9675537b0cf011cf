"""From an encoded job to crops: the decode stage's work. Imports OpenCV: the stage imports it when it starts."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from posekit import units
from posekit.engine import Bool, Float32, Float64, UInt8
from posekit.errors import InvalidInput, TooLarge, UnitsImplausible
from posekit.io import images, masks
from workers.jobs import read_job
from workers.messages import Crop, Cut, Failure, Job, MaskSpec, ObjectRef, Part, pack

MARGIN = 0.2  # of the mask's box, on every side
MARGIN_PX = 16  # at least
CROP_PIXELS = 1 << 20  # a larger crop is thinned out: no engine looks at more
MIN_DEPTH_PX = 33  # valid depth under the mask


def cut(part: Part) -> Cut | Failure:
    """Decode a part's detections. Raises PoseError for what spoils the request."""
    begun = time.perf_counter()
    job = read_job(part.path, part.job)
    if time.time() > job.deadline_unix:
        detail = "the deadline passed before the pictures were decoded"
        return Failure(part_id=part.part_id, code="deadline", detail=detail)
    frame = _decode_frame(job)
    _check_masks_together(job, frame)

    judges_all = part.start == 0
    crops: list[Crop] = []
    observed: dict[int, units.Observation] = {}
    for index in range(len(job.detections)) if judges_all else range(part.start, part.stop):
        seen = _observe(job, frame, index)
        observed[index] = seen.observation
        if part.start <= index < part.stop:
            crops.append(_crop(job, frame, seen))
    wrong, warnings = _judge_units(job, frame, observed, judges_all)
    crops = [_rejected(crop, ("units", wrong[crop.index])) if crop.index in wrong else crop for crop in crops]

    draws = part.finish and (job.visualize or job.output_dir is not None)
    return Cut(
        part=msgspec.structs.replace(part, finish=draws, job=part.job if draws else b""),
        request_id=job.request_id,
        crops=crops,
        engine=job.engine,
        refine=job.refine,
        hypotheses=job.hypotheses,
        min_score=job.min_score,
        deadline_unix=job.deadline_unix,
        warnings=[*_camera_warnings(job, frame), *warnings] if judges_all else [],
        decode_ms=(time.perf_counter() - begun) * 1000.0,
        sent_unix=time.time(),
    )


# ----------------------------------------------------------------------------------------------------------- the frame


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """A decoded image pair."""

    rgb: UInt8  # (H, W, 3)
    depth_raw: npt.NDArray[Any]  # (H, W) uint16 or float32, 0 = no reading
    depth_scale_mm: float
    K: Float64  # (3, 3)

    @property
    def size(self) -> tuple[int, int]:
        return self.rgb.shape[0], self.rgb.shape[1]

    def depth_mm(self, window: tuple[slice, slice]) -> Float32:
        """Millimetres, 0 where there is no reading or the scaled value is no number."""
        with np.errstate(over="ignore", invalid="ignore"):
            depth_mm = self.depth_raw[window].astype(np.float32) * np.float32(self.depth_scale_mm)
        return np.where(np.isfinite(depth_mm), depth_mm, np.float32(0))


def _decode_frame(job: Job) -> _Frame:
    scale_mm = job.depth_scale_mm
    if job.depth_height and job.depth_width:
        depth_raw: npt.NDArray[Any] = images.decode_depth_raw_f32(
            job.depth, job.depth_height, job.depth_width, job.depth_field
        )
        scale_mm = 1.0 if scale_mm is None else scale_mm
    else:
        if scale_mm is None and images.depth_is_float(job.depth):
            raise InvalidInput("depth_scale must be given for a float TIFF", "cam_params.depth_scale")
        depth_raw = images.decode_depth(job.depth, job.max_megapixels, job.depth_field)
    rgb = images.decode_color(job.rgb, job.max_megapixels, job.rgb_field)
    if rgb.shape[:2] != depth_raw.shape:
        height, width = rgb.shape[:2]
        raise InvalidInput(
            f"the depth image is {depth_raw.shape[1]} x {depth_raw.shape[0]} pixels, the colour image {width} x "
            f"{height}: register the depth to the colour image, so that the two have one size",
            job.depth_field,
        )
    K = np.array(job.K, dtype=np.float64).reshape(3, 3)
    return _Frame(rgb=rgb, depth_raw=depth_raw, depth_scale_mm=1.0 if scale_mm is None else scale_mm, K=K)


def _camera_warnings(job: Job, frame: _Frame) -> list[str]:
    (height, width), cx, cy = frame.size, frame.K[0, 2], frame.K[1, 2]
    if 0 <= cx <= width and 0 <= cy <= height:
        return []
    return [
        f"the principal point ({cx:g}, {cy:g}) of cam_K lies outside of the {width} x {height} image: "
        "is cam_K that of another image size?"
    ]


def _check_masks_together(job: Job, frame: _Frame) -> None:
    """Each mask has the image's size, so what they decode to together is known before the first is decoded."""
    height, width = frame.size
    megapixels = len(job.detections) * height * width / 1e6
    if megapixels > job.max_mask_megapixels:
        raise TooLarge(
            f"{len(job.detections)} masks of {width} x {height} pixels decode to {megapixels:.0f} megapixels, more "
            f"than the limit of {job.max_mask_megapixels:g}; send fewer detections in a request, or smaller images",
            job.field_prefix,
        )


# ------------------------------------------------------------------------------------------------------- one detection


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A detection's mask."""

    index: int
    box: tuple[int, int, int, int] | None  # xywh; None = no pixel
    mask: Bool  # (h, w), inside the box
    observation: units.Observation


def _observe(job: Job, frame: _Frame, index: int) -> _Seen:
    height, width = frame.size
    spec = job.detections[index]
    mask = masks.decode_mask(spec.png or spec.raw, height, width, job.mask_field(index), job.max_mask_megapixels * 1e6)
    box = masks.mask_box(mask)
    window = _window(box or (0, 0, 0, 0), 0, frame.size)
    inside = mask[window].copy()  # the whole mask is let go
    return _Seen(index=index, box=box, mask=inside, observation=units.observe(frame.depth_mm(window), inside))


def _crop(job: Job, frame: _Frame, seen: _Seen) -> Crop:
    """The detection as the engine will see it, or the reason why not."""
    spec = job.detections[seen.index]
    reference = None if spec.object is None else job.objects[spec.object]
    x, y, w, h = mask_box = seen.box or (0, 0, 0, 0)
    crop = Crop(
        index=seen.index,
        object_id=None if reference is None else reference.object_id,
        bbox=(float(x), float(y), float(w), float(h)) if spec.bbox is None else spec.bbox,
        category=spec.category,
        score=spec.score,
    )
    reason = _why_not(seen, crop.object_id)
    if reason is not None:
        return _rejected(crop, reason)
    margin = max(MARGIN_PX, math.ceil(MARGIN * max(w, h)))
    window = _window(mask_box, margin, frame.size)
    rows, columns = window
    step = max(1, math.ceil(math.sqrt((rows.stop - rows.start) * (columns.stop - columns.start) / CROP_PIXELS)))
    thin = slice(rows.start, rows.stop, step), slice(columns.start, columns.stop, step)
    whole = np.zeros((rows.stop - rows.start, columns.stop - columns.start), dtype=np.uint8)
    whole[y - rows.start : y - rows.start + h, x - columns.start : x - columns.start + w] = seen.mask
    rgb = np.ascontiguousarray(frame.rgb[thin])
    depth_m = frame.depth_mm(thin) / np.float32(1000.0)
    mask = np.ascontiguousarray(whole[::step, ::step])
    K = frame.K.copy()
    K[0, 2] -= columns.start
    K[1, 2] -= rows.start
    K[:2] /= step  # exact: pixel centres are whole numbers, and every step-th is kept
    image_rows = range(rows.start % step, frame.size[0], step)  # of the image, thinned out to go with the crop
    image_columns = range(columns.start % step, frame.size[1], step)
    return msgspec.structs.replace(
        crop,
        rgb=pack(rgb),
        depth_m=pack(depth_m),
        mask=pack(mask),
        K=tuple(float(x) for x in K.ravel()),
        seed=job.seed if job.seed is not None else _seed_from(rgb, depth_m, mask, K, crop.object_id or ""),
        init_T_cam_obj=_metres(spec),
        origin_px=(columns.start // step, rows.start // step),
        image_size_px=(len(image_columns), len(image_rows)),
    )


def _why_not(seen: _Seen, object_id: str | None) -> tuple[str, str] | None:
    if seen.box is None:
        return "mask_empty", "the mask has no pixel"
    if object_id is None:
        return "no_cad", "no CAD model was given for this detection's category"
    valid, total = seen.observation.valid_px, seen.observation.mask_px
    if valid == 0:
        return "no_depth", f"none of the {total} pixels under the mask has a depth reading"
    if valid < MIN_DEPTH_PX:
        return "mask_too_small", f"{valid} valid depth pixels under the mask, more than {MIN_DEPTH_PX - 1} needed"
    return None


def _rejected(crop: Crop, reason: tuple[str, str]) -> Crop:
    """The crop without its pixels; the first reason stays."""
    return Crop(
        index=crop.index,
        object_id=crop.object_id,
        bbox=crop.bbox,
        category=crop.category,
        score=crop.score,
        rejected=crop.rejected or reason,
    )


def _window(box: tuple[int, int, int, int], margin: int, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a box with a margin, inside the image."""
    x, y, w, h = box
    height, width = size
    rows = slice(max(0, y - margin), min(height, y + h + margin))
    return rows, slice(max(0, x - margin), min(width, x + w + margin))


def _seed_from(rgb: UInt8, depth_m: Float32, mask: UInt8, K: Float64, object_id: str) -> int:
    """A seed that depends on the decoded content alone: not on the encoding, the request's other rows, or the day."""
    content = hashlib.blake2b(digest_size=8)
    content.update(repr((mask.shape, object_id)).encode())
    for array in (rgb, depth_m, mask, K):
        content.update(np.ascontiguousarray(array).data)
    return int.from_bytes(content.digest(), "little") >> 1  # 63 bits, as the seeds that a client may give


def _metres(spec: MaskSpec) -> tuple[float, ...] | None:
    if spec.init_T_cam_obj_mm is None:
        return None
    T_cam_obj = np.array(spec.init_T_cam_obj_mm, dtype=np.float64).reshape(4, 4)
    T_cam_obj[:3, 3] /= 1000.0
    return tuple(float(x) for x in T_cam_obj.ravel())


# --------------------------------------------------------------------------------------------------------------- units


def _judge_units(
    job: Job, frame: _Frame, observed: dict[int, units.Observation], judges_all: bool
) -> tuple[dict[int, str], list[str]]:
    """Detections that are implausible alone, by index, and warnings about the request.

    Raises UnitsImplausible where the request as a whole is; only the part that has seen all detections can tell.
    """

    references = [_reference(job, index) for index in observed]
    verdict = units.judge(
        list(observed.values()),
        [None if one is None else one.diameter_mm for one in references],
        float(frame.K[0, 0]),
        float(frame.K[1, 1]),
        strict=job.units == "strict",
        middles_mm=[None if one is None else one.middle_mm for one in references],
        image_size=frame.size,
        depth_scale_given=job.depth_unit_given,
        rows_only=not judges_all,  # as the part that sees all of them would judge each
    )
    if verdict.request_error is not None:
        field = "cam_params.depth_scale" if "depth_scale" in verdict.request_error else "model_unit"
        raise UnitsImplausible(verdict.request_error, field)
    wrong = {index: words for index, words in zip(observed, verdict.rows, strict=True) if words is not None}
    return wrong, verdict.warnings


def _reference(job: Job, index: int) -> ObjectRef | None:
    number = job.detections[index].object
    return None if number is None else job.objects[number]
