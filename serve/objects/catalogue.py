"""The CAD models that the service knows: registered, found by path, or sent along; onboarded once, however many ask.

An object's identity is its content (posekit/io/meshes/content.py: `content_id`). Its folder on disk is the truth
(posekit/store.py); this module adds the limit on disk space. ingest.py reads the files, onboarding.py builds the
engines' models, and names.py keeps the names.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import structlog

from pem import contract as schemas
from pem.contract import Health
from posekit.errors import PoseError
from posekit.store import ObjectStore, StoredObject
from serve.backend.mosec import Backend
from serve.errors import ApiError, from_posekit
from serve.objects.choice import CadChoice
from serve.objects.ingest import FORMATS, Ingest, Source, declared_symmetries, format_of, same_files
from serve.objects.names import Names
from serve.objects.onboarding import Known, Model, Onboarding
from serve.settings import Settings
from workers.messages import Inspected, ObjectRef, symmetries_to_wire

log = structlog.get_logger()

T = TypeVar("T")

_REMEMBERED_SOURCES = 4096
_METRES = {"m": "metres", "mm": "millimetres"}


@dataclass(frozen=True)
class Resolved:
    """A CAD that a pose request may use."""

    ref: ObjectRef
    path_used: str | None = None  # relative to the CAD root, if the request named a path
    onboard_ms: float | None = None  # how long this request waited for onboarding


class Objects:
    """The CAD store as the gateway sees it."""

    def __init__(self, settings: Settings, backend: Backend, engine_versions: Mapping[str, str]) -> None:
        self._settings = settings
        self._default = next(iter(engine_versions))
        self._store = ObjectStore(settings.objects_path)
        self.ingest = Ingest(settings, backend, self._store)
        self.onboarding = Onboarding(backend, self._store, engine_versions)
        self._known: dict[str, Known] = {}
        self._names = Names(self._store, self._known)
        self.onboarding.is_known = lambda known: self._known.get(known.stored.object_id) is known
        self.onboarding.ended = self._settle
        self._ingesting: dict[tuple[Any, ...], asyncio.Task[str]] = {}
        self._sources: dict[tuple[Any, ...], str] = {}  # key of a source -> the object that it turned out to be

    # ------------------------------------------------------------------------------------------------------- start

    def load(self) -> None:
        """Read the stored objects; delete what interrupted work left behind."""
        swept = self._store.sweep()
        if swept:
            log.info("objects_swept", leftovers=swept)
        for object_id in self._store.broken():
            log.error(
                "object_broken",
                object_id=object_id,
                hint="its folder cannot be read; remove it and register the CAD again",
            )
        for stored in self._store.list():
            self._learn(stored)
        self._names.tidy()
        for known in self._known.values():
            self._settle(known)

    def _learn(self, stored: StoredObject) -> Known:
        known = self._known[stored.object_id] = self.onboarding.known(stored)
        self._names.learn(known)
        return known

    async def warm_up(self) -> None:
        """Onboard the objects that lack a model: after an interruption, or for a new engine version.

        Returns once the quickest engine has tried every object, and the service becomes ready. The others go on.
        """
        everything = [task for known in self._known.values() for task in self.onboarding.onboard_all(known)]
        first = self.onboarding.first()
        if everything:
            log.info("onboarding_at_start", models=len(everything), waiting_for=len(first))
            await asyncio.gather(*first, return_exceptions=True)

    # ----------------------------------------------------------------------------------------------------- answers

    @property
    def count(self) -> int:
        """Return the number of registered objects."""
        return len(self._known)

    def label(self, object_id: str | None) -> str:
        """Return an object's label in metrics: the first of the settings' list that is a name of it, or `other`."""
        known = self._known.get(object_id or "")
        names = known.stored.names if known is not None else []
        return next((name for name in self._settings.metrics.objects if name in names), "other")

    def listing(self) -> list[schemas.ObjectAnswer]:
        """Return all objects, oldest first."""
        return [self._answer(known) for known in sorted(self._known.values(), key=lambda k: k.stored.created_unix)]

    def get(self, id_or_name: str) -> schemas.ObjectAnswer:
        """Return one object; 404 if there is none."""
        known = self._find(id_or_name, "object_id")
        for engine in self.onboarding.versions:
            self.onboarding.look(known, engine)
        self._settle(known)
        return self._answer(known)

    def _find(self, id_or_name: str, field: str | None) -> Known:
        known = self._known.get(self._names.holder(id_or_name) or id_or_name)
        if known is None:
            shown = id_or_name if len(id_or_name) <= 80 else id_or_name[:77] + "..."
            raise ApiError(
                "unknown_object",
                f"no object is registered as {shown!r}; POST /api/v1/objects registers one",
                field=field,
            )
        return known

    def _status(self, known: Known) -> Literal["ready", "failed", "onboarding"]:
        models = {engine: known.models[engine] for engine in self.onboarding.engines}
        if any(not model.ready and not model.error for model in models.values()):
            return "onboarding"
        alone = self._default in models and self._settings.stand_in(self._default) is None
        usable = models[self._default].ready if alone else any(model.ready for model in models.values())
        return "ready" if usable else "failed"

    def _settle(self, known: Known) -> None:
        """Give an object the names that it waits for once it is ready; if it failed, their holders keep them."""
        if not known.stored.awaited or not self.onboarding.is_known(known):
            return
        status = self._status(known)
        if status == "ready" or (status == "failed" and any(model.error for model in known.models.values())):
            self._names.settle(known, ready=status == "ready")

    def _answer(self, known: Known) -> schemas.ObjectAnswer:
        stored = known.stored
        models = {engine: known.models[engine] for engine in self.onboarding.engines}
        errors = [model.error for model in models.values() if model.error]
        status = self._status(known)
        if status == "failed" and errors:
            errors[0] = "; ".join([errors[0], *map(self._not_moved, known.missed or stored.awaited)])
        facts = [model.facts for model in models.values() if model.facts is not None]
        return schemas.ObjectAnswer(
            object_id=stored.object_id,
            name=stored.name,
            names=stored.names,
            pending_names=stored.awaited,
            status=status,
            progress=1.0 if status == "ready" else self.onboarding.progress(known),
            model_unit=stored.model_unit,
            health=Health(
                faces=stored.faces,
                watertight=stored.watertight,
                extents_mm=stored.extents_mm,
                diameter_mm=stored.diameter_mm,
                warnings=stored.warnings,
            ),
            symmetries=symmetries_to_wire(facts[0].symmetries) if facts else None,
            created=stored.created_unix,
            onboard_seconds=round(math.fsum(one.seconds for one in facts), 3) or None,
            engines={engine: self._model_answer(known, engine) for engine in models},
            error=errors[0] if errors else None,
        )

    def _not_moved(self, name: str) -> str:
        holder = self._names.holder(name)
        return f"the name {name!r} was not moved" + (f" and stays with object {holder[:12]}..." if holder else "")

    def _model_answer(self, known: Known, engine: str) -> schemas.ObjectModelAnswer:
        model, facts = known.models[engine], known.models[engine].facts
        if model.error:
            return schemas.ObjectModelAnswer(status="failed", progress=0.0, error=model.error)
        if not model.ready:
            progress = self.onboarding.progress_of(known.stored.object_id, engine)
            status: Literal["queued", "onboarding"] = "queued" if progress is None else "onboarding"
            return schemas.ObjectModelAnswer(status=status, progress=progress or 0.0)
        ready = schemas.ObjectModelAnswer(status="ready", progress=1.0)
        if facts is not None:
            ready.bytes = facts.nbytes
            ready.seconds = round(facts.seconds, 3) or None
            ready.threads = facts.threads or None
        return ready

    # ------------------------------------------------------------------------------------------- use by a pose request

    async def resolve(self, choice: CadChoice, unit: schemas.Unit | None, deadline: float, engine: str) -> Resolved:
        """Return the object of a request's CAD, onboarded for `engine`; wait for that until `deadline` (monotonic).

        `unit` is the unit of a file's numbers; None: its format's default. Raises ApiError for an unknown or forbidden
        CAD, for an unusable mesh, with `onboarding` if onboarding lasts too long, and `onboarding_failed` if it fails.
        """
        begun = time.monotonic()
        path_used: str | None = None
        if choice.object_id is not None:
            known = self._find(choice.object_id, choice.field)
        else:
            if choice.cad_path is not None:
                path = self.ingest.cad_file(choice.cad_path, choice.field)
                path_used = str(path.relative_to(self._settings.cad_path.resolve()))
                source = await self.ingest.from_path(path, unit, choice.field)
            else:
                source = self.ingest.from_inline(choice, unit)
            known = await self._until(self._once(source), deadline, "the CAD is still being read", None)
        known.last_used = time.time()
        model = known.models[engine]
        if not model.ready:
            self.onboarding.look(known, engine)
        waited: float | None = None
        if not model.ready and model.error is None:
            self.onboarding.onboard_all(known)
            await self._until(
                self.onboarding.onboard(known, engine), deadline, "the CAD is still being onboarded", (known, engine)
            )
            waited = (time.monotonic() - begun) * 1e3
        if model.error is not None:
            raise ApiError("onboarding_failed", f"this CAD could not be onboarded: {model.error}", field=choice.field)
        stored = known.stored
        ref = ObjectRef(
            object_id=stored.object_id, diameter_mm=stored.diameter_mm, middle_mm=sorted(stored.extents_mm)[1]
        )
        return Resolved(ref, path_used, waited)

    async def _until(
        self,
        work: asyncio.Future[T] | Coroutine[Any, Any, T],
        deadline: float,
        words: str,
        onboarding: tuple[Known, str] | None,
    ) -> T:
        """Wait for shared work until the deadline. The work goes on after it."""
        future = asyncio.ensure_future(work)
        try:
            return await asyncio.wait_for(asyncio.shield(future), max(deadline - time.monotonic(), 0.0))
        except TimeoutError:
            left_s = 2.0
            if onboarding is not None:
                known, engine = onboarding
                elapsed = time.monotonic() - known.models[engine].started
                progress = self.onboarding.progress_of(known.stored.object_id, engine) or 0.0
                left_s = elapsed / progress - elapsed if progress > 0.05 else elapsed
            raise ApiError(
                "onboarding", f"{words}; it goes on, ask again", retry_after_s=min(max(left_s, 1.0), 60.0)
            ) from None

    async def _once(self, source: Source) -> Known:
        """Read a CAD once, however many requests ask at the same time, and remember its object."""
        key = source.key
        known = self._known.get(self._sources.get(key, ""))
        if known is not None:
            return known
        task = self._ingesting.get(key)
        if task is None:
            task = asyncio.create_task(self._read(source))
            self._ingesting[key] = task
            task.add_done_callback(lambda done: (self._ingesting.pop(key, None), done.cancelled() or done.exception()))
        object_id = await asyncio.shield(task)
        if len(self._sources) >= _REMEMBERED_SOURCES:
            self._sources.pop(next(iter(self._sources)))
        self._sources[key] = object_id
        known = self._known.get(object_id)
        if known is None:
            raise ApiError("unknown_object", "the object was removed while this request was coming; send it again")
        return known

    async def _read(self, source: Source) -> str:
        staged, names = await self.ingest.staged(source)
        known, _ = await self._enter(staged, names, source.cad_format, source.unit, field=source.field)
        return known.stored.object_id

    # ------------------------------------------------------------------------------------------------- registration

    async def register(
        self, staged: Path, file_name: str, request: schemas.ObjectRequest
    ) -> tuple[schemas.ObjectAnswer, bool]:
        """Register an uploaded CAD and start its onboarding; return its answer, and True if it is new."""
        try:
            cad_format = request.cad_format or format_of(
                file_name,
                f"the file name does not tell the format: end it in one of {', '.join(FORMATS)}, or send cad_format",
                "file",
            )
            if request.name is not None and re.fullmatch(r"[0-9a-f]{64}", request.name):
                raise ApiError("invalid", "a name must not look like an object id", field="name")
            if request.replace and request.name is None:
                raise ApiError("invalid", "replace moves a name to this object; give the name", field="replace")
            name = f"model.{cad_format}"
            (staged / "source" / "upload").rename(staged / "source" / name)
            known, created = await self._enter(
                staged,
                [name],
                cad_format,
                request.model_unit,
                field="file",
                name=request.name,
                replace=request.replace,
                declared=declared_symmetries(request),
            )
            if any(model.error for model in known.models.values()):  # registered again: the cause may be gone
                known.missed = []
                for model in known.models.values():
                    model.error = None
                self._store.clear_failures(known.stored.object_id)
            self.onboarding.onboard_all(known)
            self._settle(known)
            return self._answer(known), created
        finally:
            self.ingest.discard(staged)

    def remove(self, id_or_name: str) -> None:
        """Remove a name, and the object with its last name; given an id, remove the object with all its names."""
        known = self._find(id_or_name, "object_id")
        object_id = known.stored.object_id
        left = [name for name in known.stored.names if name != id_or_name]
        try:
            self._names.settle_claims(known)
            if left and id_or_name in known.stored.names:
                self._names.change(known, known.stored.named(left))
                log.info("object_changed", object_id=object_id, names=left)
                return
            self._store.remove(object_id)
        except PoseError as error:
            raise from_posekit(error) from None
        self._known.pop(object_id, None)
        self.onboarding.forget(object_id)
        self._names.forget(known)
        log.info("object_removed", object_id=object_id, name=known.stored.name)

    async def _enter(
        self,
        staged: Path,
        files: list[str],
        cad_format: str,
        unit: schemas.Unit | None,
        *,
        field: str,
        name: str | None = None,
        replace: bool = False,
        declared: dict[str, Any] | None = None,
    ) -> tuple[Known, bool]:
        """Enter a staged CAD; return its object, and True if it is new. The staging folder is gone afterwards."""
        object_id = ""
        try:
            inspected = await self.ingest.inspect(staged, cad_format, unit, field)
            object_id = inspected.object_id
            known = self._known.get(object_id)
            if known is not None and declared not in (None, known.stored.declared_symmetries):
                if running := self.onboarding.of(object_id):
                    await asyncio.wait(running)  # else a model with the old symmetries would arrive after the change
                known = self._known.get(object_id)
            if name is not None and not replace:
                await self._check_name(name, inspected, staged)
            if known is not None:
                self._update(known, name, declared, replace=replace)
                return known, False
            awaited = [name] if name is not None and self._names.holder(name) not in (None, object_id) else []
            if name is not None and not awaited:
                self._names.reserve(name, object_id)  # before it is stored, so that no other request takes the name
            await self._make_room()
            if name is not None and replace:
                self._names.wait_no_more(name, object_id)
            health = inspected.health
            stored = StoredObject(
                object_id=object_id,
                name=None if awaited else name,
                awaited=awaited,
                revision=self._names.next_revision(),
                cad_format=cad_format,
                model_unit=inspected.model_unit,
                files=sorted(files),
                faces=health.faces,
                watertight=health.watertight,
                extents_mm=health.extents_mm,
                diameter_mm=health.diameter_mm,
                warnings=health.warnings,
                declared_symmetries=declared,
                created_unix=time.time(),
            )
            created = await asyncio.to_thread(self._store.commit, staged, stored)
            if object_id not in self._known:
                self._learn(stored)
            if not created:  # another request was faster with the same files
                self._update(self._known[object_id], name, declared, replace=replace)
            self._names.tidy()
            log.info(
                "object_added",
                object_id=object_id,
                name=name,
                faces=health.faces,
                diameter_mm=round(health.diameter_mm, 1),
            )
            return self._known[object_id], created
        except PoseError as error:
            raise from_posekit(error) from None
        except OSError as error:
            raise ApiError(
                "storage_full", "the CAD could not be stored: " + (error.strerror or "disk error"), retry_after_s=30
            ) from None
        finally:
            self.ingest.discard(staged)
            if name is not None:
                self._names.release(name, object_id)

    async def _check_name(self, name: str, inspected: Inspected, staged: Path) -> None:
        """Refuse a name that another object holds or waits for."""
        taken_by = self._names.kept_from(inspected.object_id, name)
        if taken_by is None:
            return
        known = self._known.get(taken_by)
        words = f"the name {name!r} belongs to object {taken_by[:12]}..."
        if known is not None and known.stored.model_unit != inspected.model_unit:
            ours, its = staged / "source", self._store.folder(taken_by) / "source"
            if await asyncio.to_thread(same_files, ours, its):
                before, now = known.stored.model_unit, inspected.model_unit
                raise ApiError(
                    "invalid",
                    f"{words}, which is this same file in {_METRES[before]}, while this request takes it to be in "
                    f'{_METRES[now]}; send model_unit: "{before}" to mean that object, or replace: true to give the '
                    f"name to the file in {_METRES[now]}",
                    field="name",
                )
        if self._names.holder(name) is None:
            words = f"object {taken_by[:12]}... takes the name {name!r} as soon as it is ready"
        raise ApiError(
            "invalid",
            f"{words}; send replace: true to give the name to this one, choose another name, or delete that object",
            field="name",
        )

    def _update(
        self, known: Known, name: str | None, declared: dict[str, Any] | None, *, replace: bool = False
    ) -> None:
        """Update a known object that is registered again, perhaps with another name or other symmetries."""
        object_id = known.stored.object_id
        if name is not None and replace:
            self._names.wait_no_more(name, object_id)
        stored = known.stored
        if name is not None and self._names.holder(name) in (None, object_id):
            if name != stored.name:  # earlier names stay: clients may be using them
                stored = stored.named([*(one for one in stored.names if one != name), name])
            stored = msgspec.structs.replace(stored, awaited=[one for one in stored.awaited if one != name])
        elif name is not None and name not in stored.awaited:
            stored = msgspec.structs.replace(stored, awaited=[*stored.awaited, name])
        anew = declared is not None and declared != stored.declared_symmetries
        if anew:
            stored = msgspec.structs.replace(stored, declared_symmetries=declared)
            self._store.remove_models(object_id)  # first: without them a failure now costs an onboarding and no more
            known.models = {engine: Model(error=model.error) for engine, model in known.models.items()}
        if stored != known.stored:
            self._names.change(known, stored)
            log.info("object_changed", object_id=object_id, names=stored.names)

    async def _make_room(self) -> None:
        """Remove unnamed objects, least recently used first, until the store is below its limit, or raise ApiError."""
        limit = self._settings.storage.objects_mb * 2**20
        while await asyncio.to_thread(self._store.bytes_used) > limit:
            idle = [
                known
                for known in self._known.values()
                if not (known.stored.names or known.stored.awaited)
                and not self.onboarding.of(known.stored.object_id)
                and time.time() - known.last_used > 60
            ]
            if not idle:
                raise ApiError(
                    "storage_full",
                    "the object store is full; remove objects that are no longer needed",
                    retry_after_s=60,
                )
            known = min(idle, key=lambda known: known.last_used)
            object_id = known.stored.object_id
            self._known.pop(object_id, None)
            self._names.forget(known)
            await asyncio.to_thread(self._store.remove, object_id)
            log.warning("object_evicted", object_id=object_id, reason="storage.objects_mb is reached")
