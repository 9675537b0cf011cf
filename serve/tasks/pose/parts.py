"""The cost of a pose request, its split into parts, and the merge of their answers into the client's."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from pem import contract, rle
from pem.contract import Row
from posekit.io import images, masks
from serve.backend.mosec import Interrupted
from serve.errors import from_failure, worker_lost
from serve.objects.catalogue import Resolved
from serve.scheduling.queue import Gathered, Queue
from serve.scheduling.receipt import Receipt, receipt
from serve.tasks.asker import Asker
from serve.tasks.pose.question import Question
from workers.messages import Answer as Reply
from workers.messages import Failure, FinishPart, Job, Part, PartAnswer

UNIT: Final = "detection"  # unit of a pose request's cost
ROUTE: Final = "/pose"
FINISH: Final = "/finish"

Answer = contract.PoseAnswer | contract.SegDataAnswer

_decoder: msgspec.msgpack.Decoder[PartAnswer | Failure] = msgspec.msgpack.Decoder(Reply)
_encode = msgspec.msgpack.encode


@dataclass
class Solution:
    """All rows of one request, in order, with their cost."""

    rows: list[Row]
    engine: str  # another engine than requested, if it answered any of the parts
    warnings: list[str]
    receipt: Receipt
    batch_detections: int
    batch_requests: int
    visualization: bytes | None = None
    output_written: bool = False


@dataclass(frozen=True)
class PoseShare:
    """Detections [start, stop) of a job; `whole` if these are all."""

    share_id: str
    start: int
    stop: int
    whole: bool

    @property
    def cost(self) -> int:
        """Return the number of detections; a request without any still takes a turn."""
        return max(1, self.stop - self.start)

    def message(self, *, path: str | None, inline: bytes) -> bytes:
        """Return the encoded `Part` for decode."""
        return _encode(
            Part(part_id=self.share_id, start=self.start, stop=self.stop, path=path, job=inline, finish=self.whole)
        )


class PoseWork:
    """A job on its way through the queue."""

    route = ROUTE

    def __init__(self, job: Job) -> None:
        self.request_id = job.request_id
        self.engine = job.engine
        self.cost = len(job.detections)
        self.draws = job.visualize or job.output_dir is not None
        self._job: Job | None = job

    def encoded(self) -> bytes:
        """Return the job as the stages read it, and release the job with its pictures."""
        assert self._job is not None
        job, self._job = self._job, None
        return _encode(job)

    def split(self, most: int) -> list[PoseShare]:
        """Return runs of at most `most` detections, in order."""
        starts = range(0, self.cost, most) if self.cost else [0]
        bounds = [(start, min(start + most, self.cost)) for start in starts]
        return [
            PoseShare(f"{self.request_id}/{index}", start, stop, whole=len(bounds) == 1)
            for index, (start, stop) in enumerate(bounds)
        ]

    def read(self, answer: bytes) -> PartAnswer | Failure:
        """Decode the answer to a part."""
        return _decoder.decode(answer)


async def solve(queue: Queue, work: PoseWork, client: str, deadline: float) -> Solution:
    """Return the rows of a job; `deadline` is monotonic. Cancelling drops what has not started.

    Raises ApiError: for errors that the pipeline found, for the deadline, or for a worker lost for good.
    """
    async with queue.worked_off(work, client, deadline) as gathered:
        if len(gathered.answers) == 1 or not work.draws:
            return merged(work, gathered)
        return merged(work, gathered, await _finished(queue, work, gathered))


async def _finished(queue: Queue, work: PoseWork, gathered: Gathered[PartAnswer]) -> PartAnswer:
    """Have overlay and files made for a request that was split."""
    message = FinishPart(
        part_id=f"{work.request_id}/finish",
        path=gathered.path,
        job=gathered.inline,
        rows=[row for answer in gathered.answers for row in answer.rows],
    )
    try:
        answer = _decoder.decode(await queue.call_again(FINISH, message.part_id, _encode(message)))
    except Interrupted:
        raise worker_lost() from None
    if isinstance(answer, Failure):
        raise from_failure(answer)
    queue.on_part(answer, 0.0)
    return answer


def merged(work: PoseWork, gathered: Gathered[PartAnswer], *more: PartAnswer) -> Solution:
    """Merge the answers of the parts, and of `more` messages for the whole request."""
    answers = gathered.answers
    largest = max(answers, key=lambda answer: answer.batch_detections)
    return Solution(
        rows=[row for answer in answers for row in answer.rows],
        engine=next((answer.engine for answer in answers if answer.engine != work.engine), work.engine),
        warnings=list(dict.fromkeys(warning for answer in answers for warning in answer.warnings)),
        receipt=receipt([*answers, *more], arrived_unix=gathered.arrived_unix, done_unix=time.time()),
        batch_detections=largest.batch_detections,
        batch_requests=largest.batch_requests,
        visualization=next((one.visualization for one in (*more, *answers) if one.visualization is not None), None),
        output_written=any(one.output_written for one in (*more, *answers)),
    )


# -------------------------------------------------------------------------------------------------------------- answer


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
    """Make the answer of all three pose routes, and note what the log is to contain."""
    rows, notes = solution.rows, asker.notes
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
    """Return the ISM server's detections, with masks as compressed RLE whatever their form was."""
    info = images.inspect(question.asked.rgb, "rgb_image")
    return contract.FoundDetections(
        masks=[_as_rle(spec.raw, info.height, info.width) for spec in question.asked.detections],
        boxes=[list(row.bbox) for row in rows],
        scores=[spec.score for spec in question.asked.detections],
        object_ids=[spec.category for spec in question.asked.detections],
    )
