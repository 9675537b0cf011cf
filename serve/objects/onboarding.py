"""Onboarding: build each engine's model of an object, once, however many requests ask for it.

Each engine onboards an object separately, the quickest first: the geometric engine takes a second, the network a
minute. A request waits only for the engine that it wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import msgspec
import structlog

from posekit import registry
from posekit.errors import PoseError, StoreError
from posekit.store import ObjectStore, StoredModel, StoredObject
from serve.backend.mosec import Backend, BackendError, Interrupted
from serve.errors import from_failure
from workers.messages import Failure, OnboardAnswer, Onboarded, OnboardTask
from workers.state import progress_path

log = structlog.get_logger()

_decoder: msgspec.msgpack.Decoder[Onboarded | Failure] = msgspec.msgpack.Decoder(OnboardAnswer)


@dataclass
class Model:
    """One engine's model of an object: finished (`ready`), failed (`error`), or still to be made."""

    ready: bool = False
    error: str | None = None
    facts: StoredModel | None = None
    started: float = 0.0  # when its onboarding began (monotonic)


@dataclass
class Known:
    """A registered object: its stored facts and its models."""

    stored: StoredObject
    models: dict[str, Model] = field(default_factory=dict)  # by engine, in the order of onboarding
    last_used: float = 0.0
    missed: list[str] = field(default_factory=list)  # names that it waited for and did not get, because it failed


class Onboarding:
    """Starts onboardings and tracks those in progress."""

    def __init__(self, backend: Backend, store: ObjectStore, engine_versions: Mapping[str, str]) -> None:
        self.versions = {name: engine_versions[name] for name in registry.names() if name in engine_versions}
        self.lost: Callable[[], Collection[str]] = tuple  # engines that cannot answer: nothing waits for them
        self.is_known: Callable[[Known], bool] = lambda known: True  # returns True if an object is still registered
        self.ended: Callable[[Known], None] = lambda known: None  # called after each onboarding of an object
        self._backend = backend
        self._store = store
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}  # by object and engine

    def known(self, stored: StoredObject) -> Known:
        """Return an object as it is stored on disk."""
        known = Known(stored, models={engine: Model() for engine in self.versions}, last_used=time.time())
        for engine, model in known.models.items():
            model.error = self._store.failure(stored.object_id, engine, self.versions[engine])
            self.look(known, engine)
        return known

    def look(self, known: Known, engine: str) -> None:
        """Check the disk for a model and record it: `pem objects templates` may have put one there."""
        model, version = known.models[engine], self.versions[engine]
        with contextlib.suppress(StoreError):
            model.facts = self._store.describe_model(known.stored.object_id, engine, version)
            model.ready, model.error = True, None

    @property
    def engines(self) -> list[str]:
        """Return the engines that can answer, the quickest to onboard first."""
        lost = self.lost()
        return [engine for engine in self.versions if engine not in lost]

    def onboard_all(self, known: Known) -> list[asyncio.Task[None]]:
        """Start onboarding for every usable engine that has neither a model of the object nor a recorded failure."""
        missing = [name for name in self.engines if not known.models[name].ready and known.models[name].error is None]
        return [self.onboard(known, engine) for engine in missing]

    def onboard(self, known: Known, engine: str) -> asyncio.Task[None]:
        """Return the task that onboards this object for this engine; start it if there is none."""
        key = (known.stored.object_id, engine)
        task = self._tasks.get(key)
        if task is None:
            known.models[engine].started = time.monotonic()
            task = asyncio.create_task(self._run(known, engine))
            self._tasks[key] = task
            task.add_done_callback(lambda done: self._ended(key, known, done))
        return task

    def _ended(self, key: tuple[str, str], known: Known, task: asyncio.Task[None]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
        if not task.cancelled():
            task.exception()  # marks it as seen: asyncio warns of errors that nobody fetched
            self.ended(known)

    async def _run(self, known: Known, engine: str) -> None:
        object_id, model = known.stored.object_id, known.models[engine]
        spec = registry.spec(engine)
        finding = self._tasks.get((object_id, spec.symmetries_from or ""))
        if finding is not None:
            await asyncio.wait({finding})  # this engine uses the symmetries that the other one finds
        task = OnboardTask(task_id=f"onboard-{uuid.uuid4().hex}", object_id=object_id)
        begun = time.monotonic()
        error: str
        try:
            body = await self._backend.call_with_retries(
                f"/{spec.onboard_stage}", task.task_id, msgspec.msgpack.encode(task), retries=1
            )
            answer = _decoder.decode(body)
            if isinstance(answer, Failure):
                error = answer.detail
                if answer.code in ("storage_full", "not_ready"):  # not the fault of the CAD: do not store it
                    log.error("onboarding_failed", object_id=object_id, engine=engine, error=error)
                    raise from_failure(answer)
            else:
                self.look(known, engine)
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
        if not self.is_known(known):
            return  # deleted during the onboarding
        model.error = error
        log.error("onboarding_failed", object_id=object_id, name=known.stored.name, engine=engine, error=error)
        with contextlib.suppress(PoseError):
            await asyncio.to_thread(self._store.fail, object_id, engine, self.versions[engine], error)

    def progress(self, known: Known) -> float:
        """Return the progress of an object over all usable engines, 0 to 0.99, weighted by effort."""
        done = total = 0.0
        for engine in self.engines:
            model, effort = known.models[engine], registry.spec(engine).effort
            ended = model.ready or model.error is not None
            done += effort * (1.0 if ended else self.progress_of(known.stored.object_id, engine) or 0.0)
            total += effort
        return min(done / total, 0.99) if total else 0.0

    def progress_of(self, object_id: str, engine: str) -> float | None:
        """Return the progress of one engine's onboarding, 0 to 0.99; None if it has not begun."""
        try:
            value = float(progress_path(self._backend.run_dir, object_id, engine).read_text())
        except (OSError, ValueError):
            return None
        return min(max(value, 0.0), 0.99) if math.isfinite(value) else 0.0

    async def wait(self, object_id: str, seconds: float) -> bool:
        """Wait for the onboardings of an object, at most `seconds`; return False at once if none is in progress."""
        tasks = self.of(object_id)
        if not tasks:
            return False
        await asyncio.wait(tasks, timeout=seconds)
        return True

    def of(self, object_id: str) -> set[asyncio.Task[None]]:
        """Return the onboardings of an object that are in progress."""
        return {task for (of, _), task in self._tasks.items() if of == object_id}

    def forget(self, object_id: str) -> None:
        """Forget the onboardings of an object that is gone. If it is added again, it is onboarded again."""
        for engine in self.versions:
            self._tasks.pop((object_id, engine), None)

    def first(self) -> list[asyncio.Task[None]]:
        """Return the onboardings in progress for the quickest usable engine."""
        return [task for (_, engine), task in self._tasks.items() if engine == self.engines[0]]
