"""From a solution to the answer in the dialect of its question."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import msgspec

from pem import contract as schemas
from pem import rle
from pem.contract import Row
from posekit.errors import PoseError
from posekit.io import images, masks
from serve.gateway.exchange import Answer, Call
from serve.objects.catalogue import Resolved
from serve.scheduling.queue import Solution
from serve.tasks.pose.question import Question


def pose_answer(
    call: Call,
    question: Question,
    resolved: list[Resolved],
    solution: Solution,
    *,
    degraded: bool,
    ism_ms: float | None,
    found: schemas.FoundDetections | None,
) -> Answer:
    """The answer of all three pose routes; also notes on `call` what the log is to say."""
    rows = solution.rows
    call.poses = sum(row.status == "ok" for row in rows)
    call.rejected = dict(Counter(row.error.code for row in rows if row.error is not msgspec.UNSET))
    waits = [one.onboard_ms for one in resolved if one.onboard_ms is not None]
    call.timing = schemas.Timing(
        decode_ms=_ms(solution.receipt.decode_ms),
        queue_ms=_ms(solution.receipt.queue_ms),
        pose_ms=_ms(solution.receipt.pose_ms),
        respond_ms=_ms(solution.receipt.respond_ms),
        onboard_ms=_ms(max(waits)) if waits else None,
        ism_ms=_ms(ism_ms) if ism_ms is not None else None,
        total_ms=_ms((time.monotonic() - call.body_received) * 1e3),
        batch_detections=solution.batch_detections,
        batch_requests=solution.batch_requests,
    )
    paths = [one.path_used for one in resolved if one.path_used is not None]
    common: dict[str, Any] = {
        "success": True,
        "inference_time": round(time.monotonic() - call.body_received, 6),
        "cad_path_used": paths[0] if paths else None,
        "output_dir_used": question.output_dir if solution.output_written else None,
        "warnings": [*question.warnings, *solution.warnings],
    }
    if question.kept is not None:
        data, content_type = call.encode(_second_dialect(question, rows, common))
    else:
        answer = schemas.PoseAnswer(
            poses=rows,
            timing=call.timing,
            engine=solution.engine,
            degraded=degraded,
            release=call.release,
            **common,
        )
        if question.visualize and solution.visualization is not None:
            answer.visualization = solution.visualization
        if found is not None:
            answer.detections = found
        data, content_type = call.encode(answer)
    return Answer(200, data, content_type)


def _ms(value: float) -> float:
    return round(value, 3)


def bare_depth_size(question: Question) -> tuple[int, int]:
    """(height, width) where the second dialect's depth is bare float32, else (0, 0)."""
    depth = question.depth
    if question.kept is None or depth[:8] == b"\x89PNG\r\n\x1a\n" or depth[:4] in (b"II*\0", b"MM\0*"):
        return 0, 0
    try:
        info = images.inspect(question.rgb, "rgb_image")
    except PoseError:
        return 0, 0  # decode says what is wrong with the colour image
    return (info.height, info.width) if len(depth) == 4 * info.height * info.width else (0, 0)


def _second_dialect(question: Question, rows: list[Row], common: dict[str, Any]) -> schemas.SegDataAnswer:
    assert question.kept is not None
    answer = schemas.SegDataAnswer(**common)
    answer.rejected = [
        schemas.RejectedDetection(index=i, code=code, detail=detail) for i, code, detail in question.left_out
    ]
    for index, spec, row in zip(question.kept, question.detections, rows, strict=True):
        if row.rotation is not None and row.translation is not None:
            answer.detections.append(question.coco[index])
            answer.pose_scores.append(row.confidence * spec.score)
            answer.pred_rot.append(row.rotation)
            answer.pred_trans.append(row.translation)
        elif row.error is not msgspec.UNSET:
            answer.rejected.append(schemas.RejectedDetection(index=index, code=row.error.code, detail=row.error.detail))
    answer.rejected.sort(key=lambda item: item.index)
    answer.num_detections = len(answer.detections)
    return answer


def _as_rle(mask: bytes, height: int, width: int) -> dict[str, Any]:
    value = masks.parse(mask)
    if isinstance(value, dict) and isinstance(value.get("counts"), str):
        return value
    return dict(rle.encode_rle(masks.decode_mask(value, height, width, None, height * width)))


def found_detections(question: Question, rows: list[Row]) -> schemas.FoundDetections:
    """The ISM server's detections, masks as compressed RLE whatever they came as."""
    info = images.inspect(question.rgb, "rgb_image")
    return schemas.FoundDetections(
        masks=[_as_rle(spec.raw, info.height, info.width) for spec in question.detections],
        boxes=[list(row.bbox) for row in rows],
        scores=[spec.score for spec in question.detections],
        object_ids=[spec.category for spec in question.detections],
    )
