"""Turn an encoded job into crops: the decode stage's work. Imports OpenCV, so the stage imports this when it starts."""

from __future__ import annotations

import time

import msgspec

from posekit import unit_check
from posekit.crops import Seen, cut_out, look, why_not
from posekit.engine import Bool
from posekit.errors import TooLarge, UnitsImplausible
from posekit.io.frame import Frame, camera_warnings, decode_frame
from posekit.io.masks import decode_mask
from posekit.units import transform_mm_to_m
from workers.jobs import read_job
from workers.messages import Crop, Cut, Failure, Job, MaskSpec, ObjectRef, Part, pack


def cut(part: Part) -> Cut | Failure:
    """Decode a part's detections. Raises PoseError for errors that affect the whole request."""
    begun = time.perf_counter()
    job = read_job(part.path, part.job)
    if time.time() > job.deadline_unix:
        detail = "the deadline passed before the pictures were decoded"
        return Failure(part_id=part.part_id, code="deadline", detail=detail)
    frame = _frame(job)
    _check_masks_together(job, frame)

    judges_all = part.start == 0
    crops: list[Crop] = []
    observed: dict[int, unit_check.Observation] = {}
    for index in range(len(job.detections)) if judges_all else range(part.start, part.stop):
        seen = look(frame, _mask(job, frame, index))
        observed[index] = seen.observation
        if part.start <= index < part.stop:
            crops.append(_crop(job, frame, index, seen))
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
        warnings=[*camera_warnings(frame), *warnings] if judges_all else [],
        decode_ms=(time.perf_counter() - begun) * 1000.0,
        sent_unix=time.time(),
    )


def _frame(job: Job) -> Frame:
    bare = (job.depth_height, job.depth_width) if job.depth_height and job.depth_width else None
    return decode_frame(
        job.rgb,
        job.depth,
        job.K,
        job.depth_scale_mm,
        bare_depth_size=bare,
        max_megapixels=job.max_megapixels,
        rgb_field=job.rgb_field,
        depth_field=job.depth_field,
    )


def _check_masks_together(job: Job, frame: Frame) -> None:
    """Raise TooLarge if all masks together decode to too much. The image's size tells, so none is decoded for this."""
    height, width = frame.size
    megapixels = len(job.detections) * height * width / 1e6
    if megapixels > job.max_mask_megapixels:
        raise TooLarge(
            f"{len(job.detections)} masks of {width} x {height} pixels decode to {megapixels:.0f} megapixels, more "
            f"than the limit of {job.max_mask_megapixels:g}; send fewer detections in a request, or smaller images",
            job.field_prefix,
        )


# ------------------------------------------------------------------------------------------------------- one detection


def _mask(job: Job, frame: Frame, index: int) -> Bool:
    spec = job.detections[index]
    return decode_mask(spec.png or spec.raw, *frame.size, job.mask_field(index), job.max_mask_megapixels * 1e6)


def _crop(job: Job, frame: Frame, index: int, seen: Seen) -> Crop:
    """Return the detection as the engine will see it, or with the reason for its rejection."""
    spec, reference = job.detections[index], _reference(job, index)
    x, y, w, h = seen.box or (0, 0, 0, 0)
    crop = Crop(
        index=index,
        object_id=None if reference is None else reference.object_id,
        bbox=(float(x), float(y), float(w), float(h)) if spec.bbox is None else spec.bbox,
        category=spec.category,
        score=spec.score,
    )
    rejection = why_not(seen, has_cad=crop.object_id is not None)
    if rejection is not None:
        return _rejected(crop, (rejection.code, rejection.detail))
    pixels = cut_out(frame, seen)
    return msgspec.structs.replace(
        crop,
        rgb=pack(pixels.rgb),
        depth_m=pack(pixels.depth_m),
        mask=pack(pixels.mask),
        K=tuple(float(x) for x in pixels.K.ravel()),
        seed=job.seed if job.seed is not None else pixels.seed(crop.object_id or ""),
        init_T_cam_obj=_init(spec),
        origin_px=pixels.origin_px,
        image_size_px=pixels.image_size_px,
    )


def _rejected(crop: Crop, reason: tuple[str, str]) -> Crop:
    """Return the crop without its pixels; an earlier reason stays."""
    return Crop(
        index=crop.index,
        object_id=crop.object_id,
        bbox=crop.bbox,
        category=crop.category,
        score=crop.score,
        rejected=crop.rejected or reason,
    )


def _init(spec: MaskSpec) -> tuple[float, ...] | None:
    if spec.init_T_cam_obj_mm is None:
        return None
    return tuple(float(x) for x in transform_mm_to_m(spec.init_T_cam_obj_mm).ravel())


# --------------------------------------------------------------------------------------------------------------- units


def _judge_units(
    job: Job, frame: Frame, observed: dict[int, unit_check.Observation], judges_all: bool
) -> tuple[dict[int, str], list[str]]:
    """Return detections that are implausible by themselves, by index, and warnings about the request.

    Raises UnitsImplausible if the request as a whole is; only the part that has seen all detections can tell.
    """
    references = [_reference(job, index) for index in observed]
    verdict = unit_check.judge(
        list(observed.values()),
        [None if one is None else one.diameter_mm for one in references],
        float(frame.K[0, 0]),
        float(frame.K[1, 1]),
        strict=job.units == "strict",
        middles_mm=[None if one is None else one.middle_mm for one in references],
        image_size=frame.size,
        depth_scale_given=job.depth_unit_given,
        rows_only=not judges_all,  # as the part that sees all detections would judge each
    )
    if verdict.request_error is not None:
        field = "cam_params.depth_scale" if "depth_scale" in verdict.request_error else "model_unit"
        raise UnitsImplausible(verdict.request_error, field)
    wrong = {index: words for index, words in zip(observed, verdict.rows, strict=True) if words is not None}
    return wrong, verdict.warnings


def _reference(job: Job, index: int) -> ObjectRef | None:
    number = job.detections[index].object
    return None if number is None else job.objects[number]
