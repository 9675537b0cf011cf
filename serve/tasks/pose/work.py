"""What a pose request costs, how it is split into parts, and how their answers become one solution."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import msgspec

from pem.contract import Row
from serve.backend.mosec import Interrupted
from serve.errors import from_failure, worker_lost
from serve.scheduling.queue import Gathered, Queue
from serve.scheduling.receipt import Receipt, receipt
from workers.messages import Answer, Failure, FinishPart, Job, Part, PartAnswer

UNIT: Final = "detection"  # what a pose request's cost counts
ROUTE: Final = "/pose"
FINISH: Final = "/finish"

_decoder: msgspec.msgpack.Decoder[PartAnswer | Failure] = msgspec.msgpack.Decoder(Answer)
_encode = msgspec.msgpack.encode


@dataclass
class Solution:
    """All rows of one request, in order, with what they cost."""

    rows: list[Row]
    engine: str  # another than was asked for where that answered any of the parts
    warnings: list[str]
    receipt: Receipt
    batch_detections: int
    batch_requests: int
    visualization: bytes | None = None
    output_written: bool = False


@dataclass(frozen=True)
class PoseShare:
    """Detections [start, stop) of a job; `whole` where that is all of them."""

    share_id: str
    start: int
    stop: int
    whole: bool

    @property
    def cost(self) -> int:
        """Its detections; a request without any still takes a turn."""
        return max(1, self.stop - self.start)

    def message(self, *, path: str | None, inline: bytes) -> bytes:
        """The `Part` that goes to decode."""
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
        """The job as the stages read it, which is then let go with its pictures."""
        assert self._job is not None
        job, self._job = self._job, None
        return _encode(job)

    def split(self, most: int) -> list[PoseShare]:
        """Runs of at most `most` detections, in order."""
        starts = range(0, self.cost, most) if self.cost else [0]
        bounds = [(start, min(start + most, self.cost)) for start in starts]
        return [
            PoseShare(f"{self.request_id}/{index}", start, stop, whole=len(bounds) == 1)
            for index, (start, stop) in enumerate(bounds)
        ]

    def read(self, answer: bytes) -> PartAnswer | Failure:
        """The answer to a part."""
        return _decoder.decode(answer)


async def solve(queue: Queue, work: PoseWork, client: str, deadline: float) -> Solution:
    """Rows for a job; `deadline` is monotonic. Cancelling it drops what has not started.

    Raises ApiError: what the pipeline found wrong, the deadline, or a worker lost for good.
    """
    async with queue.worked_off(work, client, deadline) as gathered:
        if len(gathered.answers) == 1 or not work.draws:
            return merged(work, gathered)
        return merged(work, gathered, await _finished(queue, work, gathered))


async def _finished(queue: Queue, work: PoseWork, gathered: Gathered[PartAnswer]) -> PartAnswer:
    """Overlay and files of a request that was split."""
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
    """What the parts, and `more` that was done for all of them, come to."""
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
