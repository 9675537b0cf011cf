"""Onboard stages. In: an object in the store. Out: its symmetries, once the engine's model is on disk, or a Failure.

There is one stage per registered engine, so that an object is ready for the geometric engine in a second while the
network renders another one's templates for a minute. Stages run on the CPU, on few threads and at low priority, so
that a new object never stalls other clients' poses.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import ClassVar, Final

import msgspec

from pem.contract import WireSymmetries
from posekit import registry
from posekit.engine import Engine, EngineSpec, Progress, Symmetries
from posekit.errors import PoseError, StoreError, StoreFull
from posekit.store import ObjectStore, StoredObject
from workers.engines import load_engine
from workers.jobs import failure_from
from workers.lifecycle import Stage, limit_threads
from workers.messages import Failure, Onboarded, OnboardTask, symmetries_from_wire, symmetries_to_wire
from workers.settings import EngineTables, objects_path
from workers.state import progress_path

NICENESS = 10


class EngineOnboardStage(Stage):
    """The only stage of an engine's onboarding route: builds that engine's models."""

    engine_name: ClassVar[str]
    receives = OnboardTask

    def __init__(self) -> None:
        super().__init__()
        with self.starting():
            if self.spawned:
                os.nice(NICENESS)
            self.threads = self.settings.onboard.threads
            self.engine: Engine | None = None
            with self.engine_start(self.engine_name):
                self.engine = load_engine(self.engine_name, self.settings, device="cpu", threads=self.threads)
            limit_threads(self.threads)
            self.store = ObjectStore(objects_path(self.settings))

    def forward(self, task: OnboardTask) -> Onboarded | Failure:
        """Build the model if it is missing; an existing one is left alone."""
        if self.engine is None:
            detail = f"the engine {self.engine_name!r} could not be started"
            return Failure(part_id=task.task_id, code="not_ready", detail=detail)
        try:
            return self._onboard(self.engine, task)
        except StoreFull as error:
            return failure_from(error, task.task_id)
        except PoseError as error:
            if self.store.get(task.object_id) is None:
                detail = "the object was deleted before it was onboarded"
                return Failure(part_id=task.task_id, code="unknown_object", detail=detail)
            return failure_from(error, task.task_id)
        except MemoryError:
            return Failure(part_id=task.task_id, code="too_large", detail="not enough memory to onboard this mesh")
        except Exception:
            return self.internal(task.task_id, object_id=task.object_id)

    def _onboard(self, engine: Engine, task: OnboardTask) -> Onboarded | Failure:
        begun = time.perf_counter()
        stored = self.store.get(task.object_id)
        if stored is None:
            return Failure(part_id=task.task_id, code="unknown_object", detail="no such object is in the store")
        return Onboarded(
            task_id=task.task_id,
            object_id=task.object_id,
            symmetries=symmetries_to_wire(self._build(engine, stored)),
            seconds=time.perf_counter() - begun,
        )

    def _build(self, engine: Engine, stored: StoredObject) -> Symmetries:
        """Return the symmetries of the engine's model, after building the model if no readable one exists."""
        object_id = stored.object_id
        with contextlib.suppress(StoreError):
            return self.store.describe_model(object_id, engine.name, engine.version).symmetries
        progress = self._progress(object_id)
        progress(0.0)
        begun = time.perf_counter()
        symmetries = known_symmetries(self.store, stored, engine.name, self.settings)
        model = engine.onboard(object_id, self.store.load_mesh(object_id), symmetries, progress)
        with contextlib.suppress(StoreError):  # if `pem objects templates` stored a model meanwhile, that one stays
            return self.store.describe_model(object_id, engine.name, engine.version).symmetries
        self.store.save_model(model, seconds=time.perf_counter() - begun, threads=self.threads)
        return model.symmetries

    def _progress(self, object_id: str) -> Progress:
        """Write how far the engine is, 0 to 1, to a file; nothing depends on it."""
        path = progress_path(self.run_dir, object_id, self.engine_name)

        def tell(share: float) -> None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                beside = path.with_suffix(".new")
                beside.write_text(f"{min(max(share, 0.0), 1.0):.4f}")
                beside.replace(path)
            except OSError as error:
                self.log.warning("no_progress_file", reason=str(error))

        return tell


def known_symmetries(store: ObjectStore, stored: StoredObject, engine: str, tables: EngineTables) -> Symmetries | None:
    """Return the user's symmetries, else those that another engine found, for an engine that takes them over."""
    if stored.declared_symmetries is not None:
        return symmetries_from_wire(msgspec.convert(stored.declared_symmetries, WireSymmetries))
    if (finder := registry.spec(engine).symmetries_from) is not None:
        with contextlib.suppress(PoseError):
            version = registry.spec(finder).version(tables.own(finder))
            return store.describe_model(stored.object_id, finder, version).symmetries
    return None


def _stage_of(spec: EngineSpec) -> type[EngineOnboardStage]:
    """Make the stage class of one engine: OnboardSam6dStage for the stage `onboard_sam6d`."""
    name = "".join(word.capitalize() for word in spec.onboard_stage.split("_")) + "Stage"
    return type(
        name,
        (EngineOnboardStage,),
        {
            "__module__": __name__,
            "__doc__": f"The only stage of /{spec.onboard_stage}: the models of {spec.words}.",
            "stage_name": spec.onboard_stage,
            "engine_name": spec.name,
        },
    )


#: Engine -> its stage. Each class is also a name of this module: Mosec's processes import it by that name.
STAGES: Final = {each.name: _stage_of(each) for each in registry.by_effort()}
globals().update({stage.__name__: stage for stage in STAGES.values()})
