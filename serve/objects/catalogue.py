"""The CAD models that the service knows: registered, found by path, or sent along; onboarded once, however many ask.

An object's identity is its content (posekit/io/meshes/content.py: `content_id`). Its folder on disk is the truth
(posekit/store.py); this module adds names, the onboardings in flight, and the bound on the disk. Each engine onboards
an object by itself, the geometric one first: it takes a second, the network a minute, and a request waits only for the
engine that it wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec
import structlog

from pem import contract as schemas
from pem.contract import Health
from posekit import registry
from posekit.errors import PoseError, StoreError
from posekit.store import ObjectStore, StoredModel, StoredObject
from serve.backend.mosec import Backend, BackendError, Interrupted
from serve.errors import ApiError, from_failure, from_posekit, internal_error
from serve.objects.choice import CadChoice
from serve.settings import Settings
from workers.messages import (
    Failure,
    InspectAnswer,
    Inspected,
    InspectTask,
    ObjectRef,
    OnboardAnswer,
    OnboardTask,
    symmetries_to_wire,
)
from workers.state import progress_path

log = structlog.get_logger()

T = TypeVar("T")

FORMATS: Final = {".ply": "ply", ".obj": "obj", ".stl": "stl", ".glb": "glb", ".off": "off", ".zip": "zip"}
_decode_inspected = msgspec.msgpack.Decoder(InspectAnswer).decode
_decode_onboarded = msgspec.msgpack.Decoder(OnboardAnswer).decode
_REMEMBERED_SOURCES = 4096
_MAX_COMPANIONS = 64  # files that an OBJ may refer to
_INSPECT_S = 120.0  # for reading a mesh, waiting for others included


@dataclass
class _Model:
    """One engine's model of an object: there (`ready`), impossible (`error`), or still to be made."""

    ready: bool = False
    error: str | None = None
    facts: StoredModel | None = None
    started: float = 0.0  # its onboarding (monotonic)


@dataclass
class _Known:
    stored: StoredObject
    models: dict[str, _Model] = field(default_factory=dict)  # by engine, in the order in which they are made
    last_used: float = 0.0


@dataclass(frozen=True)
class Resolved:
    """A CAD as a pose request may use it."""

    ref: ObjectRef
    path_used: str | None = None  # relative to the CAD root, where the request named a path
    onboard_ms: float | None = None  # what this request waited for onboarding


class Objects:
    """The CAD store as the gateway sees it."""

    def __init__(self, settings: Settings, backend: Backend, engine_versions: Mapping[str, str]) -> None:
        self._settings = settings
        self._backend = backend
        self._default = next(iter(engine_versions))
        self._versions = {name: engine_versions[name] for name in registry.names() if name in engine_versions}
        self.lost: Callable[[], Collection[str]] = tuple  # engines that do not answer: nothing waits for their models
        self._store = ObjectStore(settings.objects_path)
        self._known: dict[str, _Known] = {}
        self._names: dict[str, str] = {}
        self._onboarding: dict[tuple[str, str], asyncio.Task[None]] = {}  # by object and engine
        self._ingesting: dict[tuple[Any, ...], asyncio.Task[str]] = {}
        self._sources: dict[tuple[Any, ...], str] = {}  # what a path or an inline CAD turned out to be
        self._companions: dict[tuple[str, int, int], list[Path]] = {}  # an OBJ's stamp -> the files it refers to

    # ------------------------------------------------------------------------------------------------------- start

    def load(self) -> None:
        """Read what is on disk; sweep what interrupted work left."""
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

    def _learn(self, stored: StoredObject) -> _Known:
        known = _Known(stored, models={engine: _Model() for engine in self._versions}, last_used=time.time())
        for engine, model in known.models.items():
            model.error = self._store.failure(stored.object_id, engine, self._versions[engine])
            self._look(known, engine)
        self._known[stored.object_id] = known
        self._names |= dict.fromkeys(_names(stored), stored.object_id)
        return known

    def _look(self, known: _Known, engine: str) -> None:
        """Take note of the model that is on disk, if there is one: `pem objects templates` may have put it there."""
        model, version = known.models[engine], self._versions[engine]
        with contextlib.suppress(StoreError):
            model.facts = self._store.describe_model(known.stored.object_id, engine, version)
            model.ready, model.error = True, None

    @property
    def _engines(self) -> list[str]:
        """Those that answer, the quickest to onboard first."""
        lost = self.lost()
        return [engine for engine in self._versions if engine not in lost]

    async def warm_up(self) -> None:
        """Onboard whatever is not yet (interrupted, or a new engine version).

        The service says ready once every object can be used by the quickest engine; the others go on behind it.
        """
        everything = [task for known in self._known.values() for task in self._onboard_all(known)]
        first = [task for (_, engine), task in self._onboarding.items() if engine == self._engines[0]]
        if everything:
            log.info("onboarding_at_start", models=len(everything), waiting_for=len(first))
            await asyncio.gather(*first, return_exceptions=True)

    # ----------------------------------------------------------------------------------------------------- answers

    @property
    def count(self) -> int:
        """Objects registered."""
        return len(self._known)

    def label(self, object_id: str | None) -> str:
        """The name for a metric's label: one of the object's that is on the settings' list, or `other`."""
        known = self._known.get(object_id or "")
        names = _names(known.stored) if known is not None else []
        return next((name for name in self._settings.metrics.objects if name in names), "other")

    def listing(self) -> list[schemas.ObjectAnswer]:
        """All of them, oldest first."""
        return [self._answer(known) for known in sorted(self._known.values(), key=lambda k: k.stored.created_unix)]

    def get(self, id_or_name: str) -> schemas.ObjectAnswer:
        """One of them; 404 where there is none."""
        known = self._find(id_or_name, "object_id")
        for engine in self._versions:
            self._look(known, engine)
        return self._answer(known)

    def _find(self, id_or_name: str, field: str | None) -> _Known:
        known = self._known.get(self._names.get(id_or_name, id_or_name))
        if known is None:
            shown = id_or_name if len(id_or_name) <= 80 else id_or_name[:77] + "..."
            raise ApiError(
                "unknown_object",
                f"no object is registered as {shown!r}; POST /api/v1/objects registers one",
                field=field,
            )
        return known

    def _answer(self, known: _Known) -> schemas.ObjectAnswer:
        stored = known.stored
        models = {engine: known.models[engine] for engine in self._engines}
        errors = [model.error for model in models.values() if model.error]
        alone = self._default in models and self._settings.stand_in(self._default) is None
        usable = models[self._default].ready if alone else any(model.ready for model in models.values())
        status: Literal["ready", "failed", "onboarding"] = "ready" if usable else "failed"
        if any(not model.ready and not model.error for model in models.values()):
            status = "onboarding"
        facts = [model.facts for model in models.values() if model.facts is not None]
        return schemas.ObjectAnswer(
            object_id=stored.object_id,
            name=stored.name,
            status=status,
            progress=1.0 if status == "ready" else self._progress(known),
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

    def _model_answer(self, known: _Known, engine: str) -> schemas.ObjectModelAnswer:
        model, facts = known.models[engine], known.models[engine].facts
        if model.error:
            return schemas.ObjectModelAnswer(status="failed", progress=0.0, error=model.error)
        if not model.ready:
            progress = self._progress_of(known.stored.object_id, engine)
            status: Literal["queued", "onboarding"] = "queued" if progress is None else "onboarding"
            return schemas.ObjectModelAnswer(status=status, progress=progress or 0.0)
        ready = schemas.ObjectModelAnswer(status="ready", progress=1.0)
        if facts is not None:
            ready.bytes = facts.nbytes
            ready.seconds = round(facts.seconds, 3) or None
            ready.threads = facts.threads or None
        return ready

    def _progress(self, known: _Known) -> float:
        """Of an object with everything that onboards it, 0 to 1."""
        done = total = 0.0
        for engine in self._engines:
            model, effort = known.models[engine], registry.spec(engine).effort
            ended = model.ready or model.error is not None
            done += effort * (1.0 if ended else self._progress_of(known.stored.object_id, engine) or 0.0)
            total += effort
        return min(done / total, 0.99)

    def _progress_of(self, object_id: str, engine: str) -> float | None:
        """Of one engine's onboarding; None where it has not begun."""
        try:
            value = float(progress_path(self._backend.run_dir, object_id, engine).read_text())
        except (OSError, ValueError):
            return None
        return min(max(value, 0.0), 0.99) if math.isfinite(value) else 0.0

    # ------------------------------------------------------------------------------------------- use by a pose request

    async def resolve(
        self, choice: CadChoice, unit: Literal["mm", "m", "auto"], deadline: float, engine: str
    ) -> Resolved:
        """The object behind a request's CAD, onboarded for `engine`; waits for that until `deadline` (monotonic).

        Raises ApiError: unknown or forbidden CAD, a mesh that cannot be used, `onboarding` where that lasts too long,
        `onboarding_failed` where it cannot be.
        """
        begun = time.monotonic()
        path_used: str | None = None
        if choice.object_id is not None:
            known = self._find(choice.object_id, choice.field)
        else:
            if choice.cad_path is not None:
                path = self._cad_file(choice.cad_path, choice.field)
                path_used = str(path.relative_to(self._settings.cad_path.resolve()))
                key, ingest = await self._from_path(path, unit, choice.field)
            else:
                key, ingest = self._from_inline(choice, unit)
            known = await self._until(self._once(key, ingest), deadline, "the CAD is still being read", None)
        known.last_used = time.time()
        model = known.models[engine]
        if not model.ready:
            self._look(known, engine)
        waited: float | None = None
        if not model.ready and model.error is None:
            self._onboard_all(known)
            await self._until(
                self._onboard(known, engine), deadline, "the CAD is still being onboarded", (known, engine)
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
        onboarding: tuple[_Known, str] | None,
    ) -> T:
        """Wait for shared work until the deadline; the work itself goes on."""
        future = asyncio.ensure_future(work)
        try:
            return await asyncio.wait_for(asyncio.shield(future), max(deadline - time.monotonic(), 0.0))
        except TimeoutError:
            left_s = 2.0
            if onboarding is not None:
                known, engine = onboarding
                elapsed = time.monotonic() - known.models[engine].started
                progress = self._progress_of(known.stored.object_id, engine) or 0.0
                left_s = elapsed / progress - elapsed if progress > 0.05 else elapsed
            raise ApiError(
                "onboarding", f"{words}; it goes on, ask again", retry_after_s=min(max(left_s, 1.0), 60.0)
            ) from None

    def _cad_file(self, text: str, field: str) -> Path:
        path = inside(self._settings.cad_path, text, field)
        if path.suffix.lower() not in FORMATS:
            raise ApiError("invalid", f"a CAD file ends in {', '.join(FORMATS)}", field=field)
        if not os.path.isfile(path):  # unlike Path.is_file, also where the name is too long for any file
            raise ApiError("no_cad_file", "no CAD file at this path under the CAD root", field=field)
        return path

    async def _from_path(
        self, path: Path, unit: str, field: str
    ) -> tuple[tuple[Any, ...], Callable[[], Coroutine[Any, Any, str]]]:
        limit = self._settings.limits.object_body_mb
        try:
            companions = await self._companions_of(path)
            stamps = tuple(_stamp(one) for one in [path, *companions])
        except OSError:
            raise ApiError("no_cad_file", "the server cannot read the CAD file at this path", field=field) from None
        if sum(size for _, _, size in stamps) > limit * 2**20:
            raise ApiError("too_large", f"the CAD file is over {limit} MB", field=field)

        async def ingest() -> str:
            staged, names = await self._staged_with(lambda folder: _copy([path, *companions], folder), field)
            known, _ = await self._ingest(staged, names, FORMATS[path.suffix.lower()], unit, field=field)
            return known.stored.object_id

        return ("path", stamps, unit), ingest

    async def _companions_of(self, path: Path) -> list[Path]:
        """The files that belong to a CAD file, found anew only when that has changed."""
        if path.suffix.lower() != ".obj":
            return []
        stamp = _stamp(path)
        if stamp not in self._companions:
            if len(self._companions) >= _REMEMBERED_SOURCES:
                self._companions.pop(next(iter(self._companions)))
            self._companions[stamp] = await asyncio.to_thread(_companions, path, self._settings.cad_path.resolve())
        return self._companions[stamp]

    def _from_inline(
        self, choice: CadChoice, unit: str
    ) -> tuple[tuple[Any, ...], Callable[[], Coroutine[Any, Any, str]]]:
        assert choice.cad is not None
        assert choice.cad_format is not None
        data, cad_format = choice.cad, choice.cad_format

        async def ingest() -> str:
            name = f"model.{cad_format}"
            staged, names = await self._staged_with(lambda folder: _write(folder / name, data), "cad")
            known, _ = await self._ingest(staged, names, cad_format, unit, field="cad")
            return known.stored.object_id

        return ("inline", hashlib.sha256(data).hexdigest(), cad_format, unit), ingest

    async def _once(self, key: tuple[Any, ...], ingest: Callable[[], Coroutine[Any, Any, str]]) -> _Known:
        """Read a CAD once, however many ask at the same time, and remember what it was."""
        known = self._known.get(self._sources.get(key, ""))
        if known is not None:
            return known
        task = self._ingesting.get(key)
        if task is None:
            task = asyncio.create_task(ingest())
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

    # ------------------------------------------------------------------------------------------------- registration

    def stage(self) -> Path:
        """A staged folder for an upload; give it to `register` or `discard` it."""
        return self._staged()

    def discard(self, staged: Path) -> None:
        """An upload that came to nothing."""
        shutil.rmtree(staged, ignore_errors=True)

    async def register(
        self, staged: Path, file_name: str, request: schemas.ObjectRequest
    ) -> tuple[schemas.ObjectAnswer, bool]:
        """An uploaded CAD -> its answer, and whether it is new. Starts the onboarding and does not wait for it."""
        try:
            suffix = Path(file_name).suffix.lower()
            cad_format = request.cad_format or FORMATS.get(suffix)
            if cad_format is None:
                raise ApiError(
                    "invalid",
                    "the file name does not tell the format: "
                    f"end it in one of {', '.join(FORMATS)}, or send cad_format",
                    field="file",
                )
            if request.name is not None and re.fullmatch(r"[0-9a-f]{64}", request.name):
                raise ApiError("invalid", "a name must not look like an object id", field="name")
            name = f"model.{cad_format}"
            (staged / "source" / "upload").rename(staged / "source" / name)
            declared = _declared(request)
            known, created = await self._ingest(
                staged, [name], cad_format, request.model_unit, field="file", name=request.name, declared=declared
            )
            if any(model.error for model in known.models.values()):  # asked for once more: perhaps the reason is gone
                for model in known.models.values():
                    model.error = None
                self._store.clear_failures(known.stored.object_id)
            self._onboard_all(known)
            return self._answer(known), created
        finally:
            self.discard(staged)

    async def wait(self, object_id: str, seconds: float) -> bool:
        """Until its onboarding has ended, at most so long; False, at once, where none is going on."""
        tasks = self._onboardings(object_id)
        if not tasks:
            return False
        await asyncio.wait(tasks, timeout=seconds)
        return True

    def _onboardings(self, object_id: str) -> set[asyncio.Task[None]]:
        """Those of an object that are going on."""
        return {task for (of, _), task in self._onboarding.items() if of == object_id}

    def remove(self, id_or_name: str) -> None:
        """Forget an object and delete its folder."""
        known = self._find(id_or_name, "object_id")
        object_id = known.stored.object_id
        try:
            self._store.remove(object_id)
        except PoseError as error:
            raise from_posekit(error) from None
        self._known.pop(object_id, None)
        for engine in self._versions:
            self._onboarding.pop((object_id, engine), None)  # what still runs is nobody's: added anew, onboarded anew
        for name in _names(known.stored):
            self._names.pop(name, None)
        log.info("object_removed", object_id=object_id, name=known.stored.name)

    def _staged(self) -> Path:
        try:
            return self._store.stage()
        except PoseError as error:
            raise from_posekit(error) from None

    async def _staged_with(self, fill: Callable[[Path], list[str]], field: str) -> tuple[Path, list[str]]:
        """A staged folder and the names of the files that `fill` put into its source folder."""
        staged = await asyncio.to_thread(self._staged)
        try:
            return staged, await asyncio.to_thread(fill, staged / "source")
        except OSError as error:
            self.discard(staged)
            if error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM):
                raise ApiError("no_cad_file", "the server cannot read the CAD file at this path", field=field) from None
            raise ApiError(
                "storage_full", "the CAD could not be stored: " + (error.strerror or "disk error"), retry_after_s=30
            ) from None

    async def _ingest(
        self,
        staged: Path,
        files: list[str],
        cad_format: str,
        unit: str,
        *,
        field: str,
        name: str | None = None,
        declared: dict[str, Any] | None = None,
    ) -> tuple[_Known, bool]:
        """A staged CAD -> the object it is, and whether it is new. The staged folder is gone afterwards."""
        object_id = ""
        try:
            inspected = await self._inspect(staged, cad_format, unit, field)
            object_id = inspected.object_id
            self._check_name(name, object_id)
            known = self._known.get(object_id)
            if known is not None:
                running = self._onboardings(object_id)
                if running and declared not in (None, known.stored.declared_symmetries):
                    await asyncio.wait(running)  # or a model with other symmetries would come after the change
                self._update(known, name, declared)
                return known, False
            if name is not None:
                self._names[name] = object_id  # taken from here on, not only once it is stored
            await self._make_room()
            health = inspected.health
            stored = StoredObject(
                object_id=object_id,
                name=name,
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
                self._update(self._known[object_id], name, declared)
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
            self.discard(staged)
            if name is not None and self._names.get(name) == object_id and object_id not in self._known:
                del self._names[name]

    async def _inspect(self, staged: Path, cad_format: str, unit: str, field: str) -> Inspected:
        task = InspectTask(
            task_id=f"inspect-{uuid.uuid4().hex}",
            folder=str(staged),
            cad_format=cad_format,
            model_unit=unit,  # type: ignore[arg-type]
            max_faces=self._settings.onboard.max_faces,
        )
        try:
            call = self._backend.call_with_retries("/inspect", task.task_id, msgspec.msgpack.encode(task), retries=1)
            body = await asyncio.wait_for(call, _INSPECT_S)
        except TimeoutError:
            raise ApiError(
                "onboarding", "the server did not get to reading this CAD; send it again", retry_after_s=30
            ) from None
        except Interrupted:
            raise ApiError(
                "bad_data", "the process that read this mesh died over it, twice; is it a mesh?", field=field
            ) from None
        except BackendError as error:
            log.error("inspect_failed", error=str(error))
            raise internal_error() from None
        answer: InspectAnswer = _decode_inspected(body)
        if isinstance(answer, Failure):
            refused = from_failure(answer)
            refused.field = field
            raise refused
        return answer

    def _check_name(self, name: str | None, object_id: str) -> None:
        taken_by = self._names.get(name or "")
        if taken_by is not None and taken_by != object_id:
            raise ApiError(
                "invalid",
                f"the name {name!r} belongs to object {taken_by[:12]}...; delete that one or choose another",
                field="name",
            )

    def _update(self, known: _Known, name: str | None, declared: dict[str, Any] | None) -> None:
        """A known object that is registered once more, perhaps under one more name or with other symmetries."""
        changes: dict[str, Any] = {}
        if name is not None and name != known.stored.name:
            changes["name"] = name
            changes["aliases"] = [one for one in _names(known.stored) if one != name]  # somebody may be using them
        if declared is not None and declared != known.stored.declared_symmetries:
            changes["declared_symmetries"] = declared
        if not changes:
            return
        stored = msgspec.structs.replace(known.stored, **changes)
        self._store.replace(stored)
        if "declared_symmetries" in changes:
            self._store.remove_models(stored.object_id)
            known.models = {engine: _Model(error=model.error) for engine, model in known.models.items()}
        self._names |= dict.fromkeys(_names(stored), stored.object_id)
        known.stored = stored
        log.info("object_changed", object_id=stored.object_id, name=stored.name, aliases=stored.aliases)

    async def _make_room(self) -> None:
        """Keep the store below its bound: unnamed objects leave first, least recently used."""
        limit = self._settings.storage.objects_mb * 2**20
        while await asyncio.to_thread(self._store.bytes_used) > limit:
            idle = [
                known
                for known in self._known.values()
                if known.stored.name is None
                and not self._onboardings(known.stored.object_id)
                and time.time() - known.last_used > 60
            ]
            if not idle:
                raise ApiError(
                    "storage_full",
                    "the object store is full; remove objects that are no longer needed",
                    retry_after_s=60,
                )
            object_id = min(idle, key=lambda known: known.last_used).stored.object_id
            self._known.pop(object_id, None)
            await asyncio.to_thread(self._store.remove, object_id)
            log.warning("object_evicted", object_id=object_id, reason="storage.objects_mb is reached")

    # --------------------------------------------------------------------------------------------------- onboarding

    def _onboard_all(self, known: _Known) -> list[asyncio.Task[None]]:
        """Onboard an object for every engine that answers and has neither a model of it nor a reason for none."""
        missing = [name for name in self._engines if not known.models[name].ready and known.models[name].error is None]
        return [self._onboard(known, engine) for engine in missing]

    def _onboard(self, known: _Known, engine: str) -> asyncio.Task[None]:
        """The one onboarding of this object for this engine."""
        key = (known.stored.object_id, engine)
        task = self._onboarding.get(key)
        if task is None:
            known.models[engine].started = time.monotonic()
            task = asyncio.create_task(self._run_onboarding(known, engine))
            self._onboarding[key] = task
            task.add_done_callback(lambda done: self._onboarding_ended(key, done))
        return task

    def _onboarding_ended(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        if self._onboarding.get(key) is task:
            del self._onboarding[key]
        if not task.cancelled():
            task.exception()  # looked at, also where nobody waited

    async def _run_onboarding(self, known: _Known, engine: str) -> None:
        object_id, model = known.stored.object_id, known.models[engine]
        spec = registry.spec(engine)
        finding = self._onboarding.get((object_id, spec.symmetries_from or ""))
        if finding is not None:
            await asyncio.wait({finding})  # the symmetries that it finds serve this engine, too
        task = OnboardTask(task_id=f"onboard-{uuid.uuid4().hex}", object_id=object_id)
        begun = time.monotonic()
        error: str
        try:
            body = await self._backend.call_with_retries(
                f"/{spec.onboard_stage}", task.task_id, msgspec.msgpack.encode(task), retries=1
            )
            answer = _decode_onboarded(body)
            if isinstance(answer, Failure):
                error = answer.detail
                if answer.code in ("storage_full", "not_ready"):  # says nothing about the CAD: not to be remembered
                    log.error("onboarding_failed", object_id=object_id, engine=engine, error=error)
                    raise from_failure(answer)
            else:
                self._look(known, engine)
                model.ready, model.error = True, None
                seconds = round(time.monotonic() - begun, 3)
                log.info("object_ready", object_id=object_id, name=known.stored.name, engine=engine, seconds=seconds)
                return
        except Interrupted:
            error = "the process that onboarded it died over it, twice"
        except (BackendError, msgspec.DecodeError) as problem:
            error = "an internal error happened; the server's log has it"
            log.error("onboarding_error", object_id=object_id, engine=engine, error=str(problem))
        finally:
            with contextlib.suppress(OSError):
                progress_path(self._backend.run_dir, object_id, engine).unlink(missing_ok=True)
        if self._known.get(object_id) is not known:
            return  # deleted meanwhile
        model.error = error
        log.error("onboarding_failed", object_id=object_id, name=known.stored.name, engine=engine, error=error)
        with contextlib.suppress(PoseError):
            await asyncio.to_thread(self._store.fail, object_id, engine, self._versions[engine], error)


# --------------------------------------------------------------------------------------------------------------- paths


def inside(root: Path, text: str, field: str) -> Path:
    """The absolute path that `text` means under `root`, symlinks resolved; 422 for anything outside."""
    outside = ApiError("invalid", "this path is outside the root that the server allows", field=field)
    if "\0" in text:
        raise outside
    try:
        base = root.resolve()
        path = (base / text).resolve()
    except (OSError, RuntimeError, ValueError):
        raise outside from None
    if not path.is_relative_to(base):
        raise outside
    return path


def _names(stored: StoredObject) -> list[str]:
    """Everything that an object answers to beside its id."""
    return [*stored.aliases, *([stored.name] if stored.name is not None else [])]


_REFERENCE = re.compile(rb"^[ \t]*(mtllib|map_\w+|bump|norm|disp|decal)[ \t]+(\S.*)$", re.MULTILINE | re.IGNORECASE)


def _companions(path: Path, root: Path) -> list[Path]:
    """What an OBJ refers to beside itself: material files and their textures, inside the root only."""
    found: list[Path] = []
    queue = [path]
    while queue and len(found) < _MAX_COMPANIONS:
        current = queue.pop()
        try:
            text = _beginning(current) if current.suffix.lower() in (".obj", ".mtl") else b""
        except OSError:
            continue
        for _, reference in _REFERENCE.findall(text):
            name = os.fsdecode(reference).split()[-1].replace("\\", "/")
            candidate = (path.parent / name).resolve()
            if candidate.is_relative_to(root) and candidate.is_file() and candidate not in found and candidate != path:
                found.append(candidate)
                queue.append(candidate)
    return sorted(found)


def _stamp(path: Path) -> tuple[str, int, int]:
    """What tells a file from what it was before."""
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4 * 2**20)


def _copy(paths: list[Path], folder: Path) -> list[str]:
    """Copy a CAD file and its companions; the CAD file gets the canonical name, on which its id depends."""
    names = []
    for index, path in enumerate(paths):
        name = f"model{path.suffix.lower()}" if index == 0 else path.name
        shutil.copyfile(path, folder / name)
        names.append(name)
    return names


def _write(path: Path, data: bytes) -> list[str]:
    path.write_bytes(data)
    return [path.name]


def _declared(request: schemas.ObjectRequest) -> dict[str, Any] | None:
    """The user's symmetries in BOP's spelling, checked; None where none are declared."""
    if request.symmetries_discrete is None and request.symmetries_continuous is None:
        return None
    discrete = [[float(x) for x in numbers] for numbers in request.symmetries_discrete or []]
    for index, numbers in enumerate(discrete):
        R = [numbers[0:3], numbers[4:7], numbers[8:11]]
        orthonormal = all(
            abs(sum(R[i][k] * R[j][k] for k in range(3)) - (i == j)) < 1e-3 for i in range(3) for j in range(3)
        )
        cross = (R[0][1] * R[1][2] - R[0][2] * R[1][1], R[0][2] * R[1][0] - R[0][0] * R[1][2])
        mirrors = cross[0] * R[2][0] + cross[1] * R[2][1] + (R[0][0] * R[1][1] - R[0][1] * R[1][0]) * R[2][2] < 0
        if not all(map(math.isfinite, numbers)) or not orthonormal or mirrors or numbers[12:] != [0.0, 0.0, 0.0, 1.0]:
            raise ApiError(
                "invalid",
                "a discrete symmetry is a rigid 4x4 transform in row order, in millimetres",
                field=f"symmetries_discrete[{index}]",
            )
    continuous = []
    for index, entry in enumerate(request.symmetries_continuous or []):
        length = math.sqrt(sum(x * x for x in entry.axis))
        if not all(map(math.isfinite, [*entry.axis, *entry.offset])) or length < 1e-9:
            raise ApiError(
                "invalid",
                "a continuous symmetry needs an axis that is not zero",
                field=f"symmetries_continuous[{index}]",
            )
        continuous.append({"axis": [x / length for x in entry.axis], "offset": [float(x) for x in entry.offset]})
    return {"symmetries_discrete": discrete, "symmetries_continuous": continuous}
