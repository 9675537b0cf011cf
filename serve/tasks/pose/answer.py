"""From a solution to the answer in the dialect of its question."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import msgspec

from pem import contract, rle
from pem.contract import Row
from posekit.io import images, masks
from serve.objects.catalogue import Resolved
from serve.tasks.asker import Asker
from serve.tasks.pose.question import Question
from serve.tasks.pose.work import Solution

Answer = contract.PoseAnswer | contract.SegDataAnswer


def pose_answer(
    asker: Asker,
    question: Question,
    resolved: list[Resolved],
    solution: Solution,
    *,
    release: str,
    degraded: bool,
    ism_ms: float | None,
    found: contract.FoundDetections | None,
) -> Answer:
    """The answer of all three pose routes; also notes what the log is to say."""
    rows, notes = solution.rows, asker.notes
    notes.engine, notes.release = solution.engine, release
    notes.poses = sum(row.status == "ok" for row in rows)
    notes.rejected = dict(Counter(row.error.code for row in rows if row.error is not msgspec.UNSET))
    waits = [one.onboard_ms for one in resolved if one.onboard_ms is not None]
    notes.timing = contract.Timing(
        decode_ms=_ms(solution.receipt.decode_ms),
        queue_ms=_ms(solution.receipt.queue_ms),
        pose_ms=_ms(solution.receipt.pose_ms),
        respond_ms=_ms(solution.receipt.respond_ms),
        onboard_ms=_ms(max(waits)) if waits else None,
        ism_ms=_ms(ism_ms) if ism_ms is not None else None,
        total_ms=_ms((time.monotonic() - asker.body_received) * 1e3),
        batch_detections=solution.batch_detections,
        batch_requests=solution.batch_requests,
    )
    paths = [one.path_used for one in resolved if one.path_used is not None]
    common: dict[str, Any] = {
        "success": True,
        "inference_time": round(time.monotonic() - asker.body_received, 6),
        "cad_path_used": paths[0] if paths else None,
        "output_dir_used": question.output_dir if solution.output_written else None,
        "warnings": [*question.warnings, *solution.warnings],
    }
    if question.coco is not None:
        return _second_dialect(question, question.coco, rows, common)
    answer = contract.PoseAnswer(
        poses=rows, timing=notes.timing, engine=solution.engine, degraded=degraded, release=release, **common
    )
    if question.asked.visualize and solution.visualization is not None:
        answer.visualization = solution.visualization
    if found is not None:
        answer.detections = found
    return answer


def _ms(value: float) -> float:
    return round(value, 3)


def _second_dialect(
    question: Question, coco: list[dict[str, Any]], rows: list[Row], common: dict[str, Any]
) -> contract.SegDataAnswer:
    answer = contract.SegDataAnswer(**common)
    answer.rejected = [
        contract.RejectedDetection(index=i, code=code, detail=detail) for i, code, detail in question.left_out
    ]
    asked = question.asked
    for index, spec, row in zip(asked.field_indices or (), asked.detections, rows, strict=True):
        if row.rotation is not None and row.translation is not None:
            answer.detections.append(coco[index])
            answer.pose_scores.append(row.confidence * spec.score)
            answer.pred_rot.append(row.rotation)
            answer.pred_trans.append(row.translation)
        elif row.error is not msgspec.UNSET:
            answer.rejected.append(
                contract.RejectedDetection(index=index, code=row.error.code, detail=row.error.detail)
            )
    answer.rejected.sort(key=lambda item: item.index)
    answer.num_detections = len(answer.detections)
    return answer


def _as_rle(mask: bytes, height: int, width: int) -> dict[str, Any]:
    value = masks.parse(mask)
    if isinstance(value, dict) and isinstance(value.get("counts"), str):
        return value
    return dict(rle.encode_rle(masks.decode_mask(value, height, width, None, height * width)))


def found_detections(question: Question, rows: list[Row]) -> contract.FoundDetections:
    """The ISM server's detections, masks as compressed RLE whatever they came as."""
    info = images.inspect(question.asked.rgb, "rgb_image")
    return contract.FoundDetections(
        masks=[_as_rle(spec.raw, info.height, info.width) for spec in question.asked.detections],
        boxes=[list(row.bbox) for row in rows],
        scores=[spec.score for spec in question.asked.detections],
        object_ids=[spec.category for spec in question.asked.detections],
    )
