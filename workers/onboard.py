"""Onboard stage. In: an object in the store. Out: its symmetries, once every engine's model is on disk, or a Failure.

On the CPU, on few threads and at low priority, so that a new object never stalls other clients' poses.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

from posekit.engine import Engine, Progress, Symmetries
from posekit.errors import PoseError, StoreError, StoreFull
from posekit.store import ObjectStore, StoredObject
from workers.engines import load_engine
from workers.jobs import failure_from
from workers.lifecycle import Stage, limit_threads
from workers.messages import Failure, Onboarded, OnboardTask, WireSymmetries, symmetries_from_wire, symmetries_to_wire
from workers.settings import objects_path

NICENESS = 10


class OnboardStage(Stage):
    """The only stage of /onboard."""

    stage_name = "onboard"
    receives = OnboardTask

    def __init__(self) -> None:
        super().__init__()
        with self.starting():
            if self.spawned:
                os.nice(NICENESS)
            threads = self.settings.onboard.threads
            self.engines: dict[str, Engine] = {
                name: load_engine(name, device="cpu", threads=threads) for name in self.settings.engines
            }
            limit_threads(threads)
            self.store = ObjectStore(objects_path(self.settings))

    def forward(self, task: OnboardTask) -> Onboarded | Failure:
        """Build what is missing; what is there already is left alone."""
        try:
            return self._onboard(task)
        except StoreFull as error:
            return failure_from(error, task.task_id)
        except PoseError as error:
            if self.store.get(task.object_id) is None:
                detail = "the object was deleted before it was onboarded"
                return Failure(part_id=task.task_id, kind="not_found", detail=detail)
            return failure_from(error, task.task_id)
        except MemoryError:
            return Failure(part_id=task.task_id, kind="too_large", detail="not enough memory to onboard this mesh")
        except Exception:
            return self.internal(task.task_id, object_id=task.object_id)

    def _onboard(self, task: OnboardTask) -> Onboarded | Failure:
        begun = time.perf_counter()
        stored = self.store.get(task.object_id)
        if stored is None:
            return Failure(part_id=task.task_id, kind="not_found", detail="no such object is in the store")
        declared = _declared(stored)
        found: list[Symmetries] = []
        for done, name in enumerate(task.engines):
            progress = self._progress(task.object_id, done, len(task.engines))
            found.append(self._build(self.engines[name], task.object_id, declared, progress))
        return Onboarded(
            task_id=task.task_id,
            object_id=task.object_id,
            symmetries=symmetries_to_wire(found[0]),
            seconds=time.perf_counter() - begun,
        )

    def _build(self, engine: Engine, object_id: str, declared: Symmetries | None, progress: Progress) -> Symmetries:
        """The symmetries of one engine's model, which is built where there is none that can be read."""
        try:
            return self.store.load_symmetries(object_id, engine.name, engine.version)
        except StoreError:
            progress(0.0)
        model = engine.onboard(object_id, self.store.load_mesh(object_id), declared, progress)
        self.store.save_model(model)
        return model.symmetries

    def _progress(self, object_id: str, done: int, engines: int) -> Progress:
        """Tell in a file how far all engines together are, 0 to 1; nothing depends on it."""
        path = progress_path(self.run_dir, object_id)

        def tell(share: float) -> None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                beside = path.with_suffix(".new")
                beside.write_text(f"{(done + min(max(share, 0.0), 1.0)) / engines:.4f}")
                beside.replace(path)
            except OSError as error:
                self.log.warning("no_progress_file", reason=str(error))

        return tell


def progress_path(run_dir: Path, object_id: str) -> Path:
    """Where the progress of an onboarding is told."""
    return run_dir / "progress" / object_id


def _declared(stored: StoredObject) -> Symmetries | None:
    """The user's symmetries, which override those found; None where the user said nothing."""
    if stored.declared_symmetries is None:
        return None
    return symmetries_from_wire(msgspec.convert(stored.declared_symmetries, WireSymmetries))
