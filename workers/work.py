"""A part of a request inside the pose stage: from crops to instances, and from outcomes to its answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from posekit.engine import Instance, Outcome, Rejection
from workers.messages import Crop, Cut, Failure, PackedArray, PassRecord, Solved
from workers.rows import make_row

_NO_PASS = PassRecord(engine="", detections=0, requests=0, seconds=0.0)


@dataclass
class Work:
    """A part, and its results so far."""

    cut: Cut
    begun_unix: float = field(default_factory=time.time)
    done_unix: float = 0.0
    late: bool = False
    outcomes: dict[int, Outcome] = field(default_factory=dict)  # by the crop's index in the request
    largest_pass: PassRecord = _NO_PASS
    pass_ids: dict[str, None] = field(default_factory=dict)  # in order, each once
    not_refined: dict[int, str] = field(default_factory=dict)  # reasons, by the crop's index in the request

    def items(self, engine: str) -> list[Item]:
        """Return the detections for `engine`."""
        return [Item(self, crop) for crop in self.cut.crops if crop.rejected is None and self.cut.engine == engine]

    def in_time(self) -> bool:
        """Return True if the deadline is still ahead; once it has passed, the whole part is late."""
        self.late = self.late or time.time() > self.cut.deadline_unix
        return not self.late

    def answer(self) -> Solved | Failure:
        """Return its rows in order, or the Failure that it is late."""
        cut = self.cut
        if self.late:
            detail = "the deadline passed before the poses were computed"
            return Failure(part_id=cut.part.part_id, code="deadline", detail=detail)
        rows = [
            make_row(crop, self._outcome(crop), min_score=cut.min_score, hypotheses=cut.hypotheses)
            for crop in cut.crops
        ]
        return Solved(
            part=cut.part,
            rows=rows,
            scores=[crop.score for crop in cut.crops],
            engine=cut.engine,
            warnings=[*cut.warnings, *self._unrefined()],
            decode_ms=cut.decode_ms,
            queue_ms=max(0.0, (self.begun_unix - cut.sent_unix) * 1000.0),
            pose_ms=max(0.0, (self.done_unix - self.begun_unix) * 1000.0),
            batch_detections=self.largest_pass.detections,
            batch_requests=self.largest_pass.requests,
            pass_ids=list(self.pass_ids),
            decode_unix=cut.sent_unix - cut.decode_ms / 1000.0,
            pose_unix=self.begun_unix,
        )

    def _unrefined(self) -> list[str]:
        why = sorted(self.not_refined.items())
        return [f"poses[{index}] is as the network found it, not refined: {reason}" for index, reason in why]

    def _outcome(self, crop: Crop) -> Outcome:
        if crop.rejected is not None:
            return Rejection(code=crop.rejected[0], detail=crop.rejected[1])
        not_loaded = f"the engine {self.cut.engine!r} is not loaded on this server"
        return self.outcomes.get(crop.index, Rejection(code="engine_error", detail=not_loaded))


@dataclass(frozen=True)
class Item:
    """One detection of a part; passes are made of items."""

    work: Work
    crop: Crop

    @property
    def object_id(self) -> str:
        """Return the object's id."""
        return self.crop.object_id or ""

    @property
    def name(self) -> str:
        """Return a name for the log."""
        return f"{self.work.cut.request_id}[{self.crop.index}]"

    def instance(self) -> Instance:
        """Return the detection as an engine takes it."""
        cut, crop, init = self.work.cut, self.crop, self.crop.init_T_cam_obj
        return Instance(
            object_id=self.object_id,
            rgb=_unpack(crop.rgb),
            depth_m=_unpack(crop.depth_m),
            mask=_unpack(crop.mask).astype(np.bool_),
            K=np.array(crop.K, dtype=np.float64).reshape(3, 3),
            seed=crop.seed,
            refine=cut.refine,
            hypotheses=cut.hypotheses,
            init_T_cam_obj=None if init is None else np.array(init, dtype=np.float64).reshape(4, 4),
            origin_px=crop.origin_px,
            image_size_px=crop.image_size_px,
        )

    def not_refined(self, why: Rejection) -> None:
        """Record why a refinement that the client asked for was not done; the client is told."""
        self.work.not_refined[self.crop.index] = why.detail

    def note(self, outcome: Outcome, record: PassRecord) -> None:
        """Record the outcome, and the pass that it came from."""
        work = self.work
        work.outcomes[self.crop.index] = outcome
        work.done_unix = time.time()
        work.pass_ids[record.pass_id] = None
        if record.detections > work.largest_pass.detections:
            work.largest_pass = record


def with_passes(answers: list[Solved | Failure], passes: list[PassRecord]) -> list[Solved | Failure]:
    """Attach the batch's passes to its first answered part, so that each is counted once."""
    for position, answer in enumerate(answers):
        if isinstance(answer, Solved):
            answers[position] = msgspec.structs.replace(answer, passes=passes)
            break
    return answers


def _unpack(packed: PackedArray | None) -> npt.NDArray[Any]:
    if packed is None:
        raise ValueError("a crop that is not rejected holds its pixels")
    return packed.unpack()
