"""Inspect stage. In: a folder with a client's mesh files. Out: the mesh's properties, or a Failure with what is wrong.

Meshes are untrusted, so they are parsed in this process, whose memory is limited and on which nothing else depends.
"""

from __future__ import annotations

import resource
from pathlib import Path

from pem.contract import Health
from posekit.errors import PoseError
from workers.jobs import failure_from
from workers.lifecycle import Stage, limit_threads
from workers.messages import Failure, Inspected, InspectTask
from workers.settings import objects_path

MEMORY_BYTES = 8 << 30


class InspectStage(Stage):
    """The only stage of /inspect."""

    stage_name = "inspect"
    receives = InspectTask

    def __init__(self) -> None:
        super().__init__()
        with self.starting():
            from posekit.io import meshes
            from posekit.store import ObjectStore

            limit_threads(self.settings.onboard.threads)
            if self.spawned:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            self.meshes = meshes
            self.store = ObjectStore(objects_path(self.settings))

    def forward(self, task: InspectTask) -> Inspected | Failure:
        """Parse, find the unit, judge the health; write the mesh in metres into the folder."""
        try:
            return self._inspect(task)
        except PoseError as error:
            return failure_from(error, task.task_id)
        except MemoryError:
            return Failure(part_id=task.task_id, code="too_large", detail="the mesh takes more memory than there is")
        except Exception:
            return self.internal(task.task_id)

    def _inspect(self, task: InspectTask) -> Inspected:
        folder = Path(task.folder)
        files = {path.name: path.read_bytes() for path in sorted((folder / "source").iterdir())}
        cad_format: str = task.cad_format
        if cad_format == "zip":  # an object is identified by its files, however they were packed
            files, cad_format = self.meshes.expand(files)
        raw = self.meshes.load_mesh(files, cad_format, task.max_faces)
        unit, guessed = self.meshes.resolve_unit(raw, task.model_unit, cad_format)
        mesh = self.meshes.to_mesh(raw, unit)
        health = self.meshes.health(raw, mesh)
        self.store.save_mesh(folder, mesh)
        return Inspected(
            task_id=task.task_id,
            object_id=self.meshes.content_id(unit, files),
            model_unit=unit,
            health=Health(
                faces=health.faces,
                watertight=health.watertight,
                extents_mm=health.extents_mm,
                diameter_mm=health.diameter_mm,
                warnings=[*health.warnings, *([] if guessed is None else [guessed])],
            ),
        )
