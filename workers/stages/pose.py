"""Pose stage. In: parts of requests, as crops. Out: their rows, or the Failure that explains why not.

The only batched stage, one process per device. A batch holds parts of whichever requests were waiting. Their crops run
in passes of bounded size, in order of arrival, so that several requests share a pass and a large one takes several.
No error of a single part is raised: the others in the batch would fail with it.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Sequence
from functools import partial

import msgspec

from posekit import registry
from posekit.engine import Engine, Instance, ObjectModel, Outcome, Rejection
from posekit.errors import StoreError
from workers.engines import kernels, load_engine, practise
from workers.jobs import GivenUp, take
from workers.lifecycle import DEVICE, DEVICE_NAME, INTERNAL_DETAIL, Stage, limit_threads
from workers.messages import Cut, CutFile, Failure, PassRecord, PoseInput, Solved
from workers.models import ModelCache, out_of_memory
from workers.refine import refined
from workers.settings import objects_path
from workers.work import Item, Work, with_passes


class PoseStage(Stage):
    """Computes all poses of one device."""

    stage_name = "pose"
    receives = PoseInput

    def __init__(self) -> None:
        super().__init__()
        with self.starting():
            own = self.settings.pose
            device = os.environ.get(DEVICE) or "cpu"
            self.device = os.environ.get(DEVICE_NAME) or device
            self.engines: dict[str, Engine] = {}
            rates: dict[str, float] = {}
            for name in self.settings.engines:
                with self.engine_start(name):
                    engine = load_engine(name, self.settings, device=device, threads=own.threads)
                    limit_threads(1)  # for each of them
                    rates[name] = practise(engine, own.pass_detections, self.run_dir / "practice")
                    self.engines[name] = engine
            self.models = ModelCache(objects_path(self.settings), limit_bytes=own.object_cache_mb * 1_000_000)
            broken = self.models.warm_up(self.engines.values())
            self.state.update(
                engines={name: engine.version for name, engine in self.engines.items()},
                device=device,
                kernels=kernels(device, self.engines),
                detections_per_second=rates,
                broken_objects=broken,
            )
            self._tell_cache()

    def deserialize_ipc(self, data: bytes) -> Cut | Failure:
        """Decode a message of the decode stage, from its file if it is large."""
        message: Cut | CutFile | Failure = super().deserialize_ipc(data)
        if not isinstance(message, CutFile):
            return message
        try:
            return msgspec.msgpack.decode(take(message.path), type=Cut)
        except GivenUp:
            detail = "the request was given up before it was worked on"
            return Failure(part_id=message.part_id, code="internal", detail=detail)
        except (OSError, msgspec.DecodeError):  # raising it would fail the whole batch
            return self.internal(message.part_id)

    def forward(self, batch: list[Cut | Failure] | Cut | Failure) -> list[Solved | Failure] | Solved | Failure:
        """Return every part's rows, in order; a failure of an earlier stage passes through.

        Mosec passes a list, except if a batch has room for one part only.
        """
        return self._solve_parts(batch) if isinstance(batch, list) else self._solve_parts([batch])[0]

    def _solve_parts(self, batch: list[Cut | Failure]) -> list[Solved | Failure]:
        works = [Work(self._for_an_engine_here(item)) if isinstance(item, Cut) else item for item in batch]
        passes: list[PassRecord] = []
        for name, engine in self.engines.items():
            waiting = deque(item for work in works if isinstance(work, Work) for item in work.items(name))
            while taken := self._take(waiting):
                passes.append(self._run_pass(engine, taken))
        self._tell_cache()
        return with_passes([self._answer(work) if isinstance(work, Work) else work for work in works], passes)

    def _for_an_engine_here(self, cut: Cut) -> Cut:
        """Redirect a part to the stand-in of its engine, if this worker lost that engine after the part was sent."""
        engine = registry.standing_in(cut.engine, self.state.state.info.get("lost", {}))
        if engine == cut.engine:
            return cut
        return msgspec.structs.replace(cut, engine=engine, refine=registry.spec(engine).refine)

    def _take(self, waiting: deque[Item]) -> list[Item]:
        """Take the next pass: the first detections whose deadline has not passed."""
        taken: list[Item] = []
        while waiting and len(taken) < self.settings.pose.pass_detections:
            item = waiting.popleft()
            if item.work.in_time():
                taken.append(item)
        return taken

    def _run_pass(self, engine: Engine, taken: list[Item]) -> PassRecord:
        begun, begun_unix = time.perf_counter(), time.time()
        outcomes = self._solve(engine, taken)
        record = PassRecord(
            engine=engine.name,
            detections=len(taken),
            requests=len({item.work.cut.request_id for item in taken}),
            seconds=time.perf_counter() - begun,
            pass_id=secrets.token_hex(24),
            begun_unix=begun_unix,
            device=self.device,
        )
        for item, outcome in zip(taken, outcomes, strict=True):
            item.note(outcome, record)
        return record

    def _solve(self, engine: Engine, items: Sequence[Item]) -> list[Outcome]:
        """Return one outcome per detection. Out of memory, or after an exception, smaller passes find the cause."""
        try:
            return self._estimate(engine, items)
        except out_of_memory() as error:
            self.log.warning("out_of_memory", detections=len(items), reason=str(error))
            pieces, detail = 2, "not enough memory for this detection, even alone"
        except Exception:
            self.log.exception("engine_failed", engine=engine.name, detections=[item.name for item in items])
            self._leave_if_the_device_is_lost()
            pieces, detail = len(items), INTERNAL_DETAIL
        if len(items) == 1:
            return [Rejection(code="engine_error", detail=detail)]
        _free_device_memory()
        size = -(-len(items) // pieces)
        return [out for start in range(0, len(items), size) for out in self._solve(engine, items[start : start + size])]

    def _estimate(self, engine: Engine, items: Sequence[Item]) -> list[Outcome]:
        """Return the engine's outcomes; detections whose object has no usable model become `no_cad`."""
        instances = [item.instance() for item in items]
        refiner = registry.spec(engine.name).refiner
        if refiner is None:
            return self._ask(engine, instances)
        return refined(
            instances,
            network=partial(self._ask, engine),
            refiner=partial(self._ask, self.engines[refiner]),
            kept=lambda index, why: items[index].not_refined(why),
        )

    def _ask(self, engine: Engine, instances: Sequence[Instance]) -> list[Outcome]:
        models: dict[str, ObjectModel] = {}
        for object_id in dict.fromkeys(instance.object_id for instance in instances):
            try:
                models[object_id] = self.models.get(engine, object_id)
            except StoreError as error:
                why = {"reason": error.detail, "cause": repr(error.__cause__)}
                self.log.warning("no_model", engine=engine.name, object_id=object_id, **why)
                self._leave_if_the_device_is_lost()  # a lost device makes `prepare` fail for good models, too
        good = [instance for instance in instances if instance.object_id in models]
        outcomes = iter(engine.estimate(good, models) if good else [])
        return [next(outcomes) if instance.object_id in models else NO_MODEL for instance in instances]

    def _answer(self, work: Work) -> Solved | Failure:
        try:
            return work.answer()
        except Exception:
            return self.internal(work.cut.part.part_id)

    def _tell_cache(self) -> None:
        cache = self.models
        self.state.update(
            cache_hits=cache.hits, cache_misses=cache.misses, cache_bytes=cache.nbytes, objects=cache.object_ids
        )
        try:
            memory = _device_memory()
        except Exception as error:  # the batch's answers are still good
            self.log.warning("device_memory_unknown", reason=str(error))
            self._leave_if_the_device_is_lost()
            return
        if memory is not None:
            self.state.update(device_memory=memory)

    def _leave_if_the_device_is_lost(self) -> None:
        """Exit if the GPU has become unusable for this process: a new one takes over, and the gateway asks it again."""
        if not _device_works():
            self.log.error("device_lost")
            os._exit(1)


NO_MODEL = Rejection(
    code="no_cad",
    detail="the object's model is missing or unreadable on the server (was it just deleted?); register its CAD again",
)


def _device_memory() -> dict[str, int] | None:
    """Return bytes of GPU memory: `allocated` by tensors, `reserved` by torch, `total`; None on a CPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    _, total = torch.cuda.mem_get_info()
    return {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(), "total": total}


def _free_device_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _device_works() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
