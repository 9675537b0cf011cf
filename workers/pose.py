"""Pose stage. In: parts of requests, as crops. Out: their rows, or the Failure that explains why not.

The only batched stage, one process per device. A batch holds parts of whichever requests were waiting; their crops run
in passes of bounded size, in order of arrival, so that several requests share a pass and a large one takes several.
Nothing here raises for one part's sake: the others in the batch would fail with it.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from posekit.engine import Engine, Instance, ObjectModel, Outcome, Rejection
from posekit.errors import StoreError
from workers.engines import load_engine, practise
from workers.lifecycle import DEVICE, INTERNAL_DETAIL, Stage, limit_threads
from workers.messages import Crop, Cut, Failure, PackedArray, PassRecord, PoseInput, Solved
from workers.models import ModelCache
from workers.rows import make_row
from workers.settings import objects_path


class PoseStage(Stage):
    """Everything that one device computes."""

    stage_name = "pose"
    receives = PoseInput

    def __init__(self) -> None:
        super().__init__()
        with self.starting():
            own = self.settings.pose
            device = os.environ.get(DEVICE) or "cpu"
            self.engines: dict[str, Engine] = {
                name: load_engine(name, device=device, threads=own.threads) for name in self.settings.engines
            }
            limit_threads(own.threads)
            self.models = ModelCache(objects_path(self.settings), limit_bytes=own.object_cache_mb * 1_000_000)
            broken = self.models.warm_up(self.engines.values())
            rates = [practise(e, own.pass_detections, self.run_dir / "practice") for e in self.engines.values()]
            self.state.update(
                engines={name: engine.version for name, engine in self.engines.items()},
                device=device,
                detections_per_second=min(rates),
                broken_objects=broken,
            )
            self._tell_cache()

    def forward(self, batch: list[Cut | Failure]) -> list[Solved | Failure]:
        """Every part's rows, in order; a failure of an earlier stage passes through."""
        works = [_Work(item) if isinstance(item, Cut) else item for item in batch]
        passes: list[PassRecord] = []
        for name, engine in self.engines.items():
            waiting = deque(item for work in works if isinstance(work, _Work) for item in work.to_do(name))
            while taken := self._take(waiting):
                passes.append(self._run_pass(engine, taken))
        self._tell_cache()
        return _with_passes([work.answer() if isinstance(work, _Work) else work for work in works], passes)

    def _take(self, waiting: deque[_Item]) -> list[_Item]:
        """The next pass: the first detections whose deadline has not passed."""
        taken: list[_Item] = []
        while waiting and len(taken) < self.settings.pose.pass_detections:
            work, crop = waiting.popleft()
            if work.in_time():
                taken.append((work, crop))
        return taken

    def _run_pass(self, engine: Engine, taken: list[_Item]) -> PassRecord:
        begun = time.perf_counter()
        outcomes = self._solve(engine, taken)
        record = PassRecord(
            detections=len(taken),
            requests=len({work.cut.request_id for work, _ in taken}),
            seconds=time.perf_counter() - begun,
        )
        for (work, crop), outcome in zip(taken, outcomes, strict=True):
            work.note(crop, outcome, record)
        return record

    def _solve(self, engine: Engine, items: Sequence[_Item]) -> list[Outcome]:
        """One outcome per detection. Short of memory, or after an exception, smaller passes find whose fault it was."""
        try:
            return self._estimate(engine, items)
        except _out_of_memory() as error:
            self.log.warning("out_of_memory", detections=len(items), reason=str(error))
            pieces, detail = 2, "not enough memory for this detection, even alone"
        except Exception:
            ids = [f"{work.cut.request_id}[{crop.index}]" for work, crop in items]
            self.log.exception("engine_failed", engine=engine.name, detections=ids)
            pieces, detail = len(items), INTERNAL_DETAIL
        if len(items) == 1:
            return [Rejection(code="engine_error", detail=detail)]
        _free_device_memory()
        size = -(-len(items) // pieces)
        return [out for start in range(0, len(items), size) for out in self._solve(engine, items[start : start + size])]

    def _estimate(self, engine: Engine, items: Sequence[_Item]) -> list[Outcome]:
        """The engine's outcomes; detections whose object has no usable model become `no_cad`."""
        models: dict[str, ObjectModel] = {}
        missing: dict[str, Rejection] = {}
        for object_id in dict.fromkeys(crop.object_id or "" for _, crop in items):
            try:
                models[object_id] = self.models.get(engine, object_id)
            except StoreError as error:
                self.log.warning("no_model", engine=engine.name, object_id=object_id, reason=error.detail)
                missing[object_id] = Rejection(code="no_cad", detail=NO_MODEL)
        good = [_instance(work.cut, crop) for work, crop in items if crop.object_id in models]
        outcomes = iter(engine.estimate(good, models) if good else [])
        return [next(outcomes) if crop.object_id in models else missing[crop.object_id or ""] for _, crop in items]

    def _tell_cache(self) -> None:
        cache = self.models
        self.state.update(
            cache_hits=cache.hits, cache_misses=cache.misses, cache_bytes=cache.nbytes, objects=cache.object_ids
        )


NO_MODEL = "the object's model is missing or unreadable on the server (was it just deleted?); register its CAD again"


_NO_PASS = PassRecord(detections=0, requests=0, seconds=0.0)


@dataclass
class _Work:
    """A part while it is inside the stage."""

    cut: Cut
    begun_unix: float = field(default_factory=time.time)
    done_unix: float = 0.0
    late: bool = False
    outcomes: dict[int, Outcome] = field(default_factory=dict)  # by the crop's index
    largest_pass: PassRecord = _NO_PASS

    def to_do(self, engine: str) -> list[_Item]:
        return [(self, crop) for crop in self.cut.crops if crop.rejected is None and self.cut.engine == engine]

    def in_time(self) -> bool:
        self.late = self.late or time.time() > self.cut.deadline_unix
        return not self.late

    def note(self, crop: Crop, outcome: Outcome, record: PassRecord) -> None:
        self.outcomes[crop.index] = outcome
        self.done_unix = time.time()
        if record.detections > self.largest_pass.detections:
            self.largest_pass = record

    def answer(self) -> Solved | Failure:
        cut = self.cut
        if self.late:
            return Failure(
                part_id=cut.part.part_id, kind="deadline", detail="the deadline passed before the poses were computed"
            )
        rows = [
            make_row(crop, self._outcome(crop), min_score=cut.min_score, hypotheses=cut.hypotheses)
            for crop in cut.crops
        ]
        return Solved(
            part=cut.part,
            rows=rows,
            scores=[crop.score for crop in cut.crops],
            engine=cut.engine,
            warnings=cut.warnings,
            decode_ms=cut.decode_ms,
            queue_ms=max(0.0, (self.begun_unix - cut.sent_unix) * 1000.0),
            pose_ms=max(0.0, (self.done_unix - self.begun_unix) * 1000.0),
            batch_detections=self.largest_pass.detections,
            batch_requests=self.largest_pass.requests,
        )

    def _outcome(self, crop: Crop) -> Outcome:
        if crop.rejected is not None:
            code, detail = crop.rejected
            return Rejection(code=code, detail=detail)
        not_loaded = Rejection(
            code="engine_error", detail=f"the engine {self.cut.engine!r} is not loaded on this server"
        )
        return self.outcomes.get(crop.index, not_loaded)


_Item = tuple[_Work, Crop]


def _instance(cut: Cut, crop: Crop) -> Instance:
    """A crop as the engine wants it."""
    init = crop.init_T_cam_obj
    return Instance(
        object_id=crop.object_id or "",
        rgb=_array(crop.rgb),
        depth_m=_array(crop.depth_m),
        mask=_array(crop.mask).astype(np.bool_),
        K=np.array(crop.K, dtype=np.float64).reshape(3, 3),
        seed=crop.seed,
        refine=cut.refine,
        hypotheses=cut.hypotheses,
        init_T_cam_obj=None if init is None else np.array(init, dtype=np.float64).reshape(4, 4),
    )


def _array(packed: PackedArray | None) -> np.ndarray:
    if packed is None:
        raise ValueError("a crop that is not rejected holds its pixels")
    return packed.unpack()


def _with_passes(answers: list[Solved | Failure], passes: list[PassRecord]) -> list[Solved | Failure]:
    """The batch's passes ride on its first answered part, so that each is counted once."""
    for position, answer in enumerate(answers):
        if isinstance(answer, Solved):
            answers[position] = msgspec.structs.replace(answer, passes=passes)
            break
    return answers


def _out_of_memory() -> tuple[type[BaseException], ...]:
    """What running out of memory looks like, on this device and with what is loaded."""
    torch = sys.modules.get("torch")
    return (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)


def _free_device_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
