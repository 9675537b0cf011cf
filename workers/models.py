"""The object models that a pose worker holds in memory, limited in bytes."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from posekit.engine import Engine, ObjectModel
from posekit.errors import PoseError, StoreError
from posekit.store import ObjectStore

Stamp = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class _Held:
    model: ObjectModel
    stamp: Stamp  # of the file that it was loaded from
    nbytes: int


class ModelCache:
    """Models by engine and object; the least recently used are removed first.

    Each call checks the disk: a model that was stored anew is loaded anew, a deleted one is removed. The model
    requested last stays, however large it is.
    """

    def __init__(self, objects_dir: Path, *, limit_bytes: int) -> None:
        self._store = ObjectStore(objects_dir)
        self._limit_bytes = limit_bytes
        self._held: OrderedDict[tuple[str, str], _Held] = OrderedDict()
        self.hits = 0
        self.misses = 0

    @property
    def nbytes(self) -> int:
        """Return the bytes of all models held: their stored arrays, and what engines put on their device."""
        return sum(held.nbytes for held in self._held.values())

    @property
    def object_ids(self) -> list[str]:
        """Return the ids of the objects held, the least recently used first."""
        return list(dict.fromkeys(object_id for _, object_id in self._held))

    def get(self, engine: Engine, object_id: str) -> ObjectModel:
        """Return the model, ready on the engine's device. Raises StoreError if the store has none that can be used."""
        key = (engine.name, object_id)
        try:
            stamp = self._stamp(engine, object_id)
        except (OSError, PoseError) as error:
            self._held.pop(key, None)
            raise StoreError("there is no model of this object") from error
        held = self._held.get(key)
        if held is not None and held.stamp == stamp:
            self.hits += 1
            self._held.move_to_end(key)
            return held.model
        self.misses += 1
        self._held.pop(key, None)
        model = self._store.load_model(object_id, engine.name, engine.version)
        self._held[key] = _Held(model=model, stamp=stamp, nbytes=model.nbytes + _prepare(engine, model))
        while self.nbytes > self._limit_bytes and len(self._held) > 1:
            self._held.popitem(last=False)
        return model

    def warm_up(self, engines: Iterable[Engine]) -> list[str]:
        """Load the models of all registered objects, newest first, while there is room.

        Returns the objects whose model exists but cannot be used.
        """
        broken: list[str] = []
        newest_first = [stored.object_id for stored in reversed(self._store.list())]
        for engine in engines:
            for object_id in newest_first:
                if self.nbytes >= self._limit_bytes:
                    return broken
                if not self._store.has_model(object_id, engine.name, engine.version):
                    continue
                try:
                    self.get(engine, object_id)
                except MemoryError:
                    raise
                except Exception:  # one object's broken file must not block all others
                    broken.append(object_id)
        self.hits = self.misses = 0
        return broken

    def _stamp(self, engine: Engine, object_id: str) -> Stamp:
        path = self._store.folder(object_id) / f"{engine.name}-{engine.version}.safetensors"
        status = path.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino


def out_of_memory() -> tuple[type[BaseException], ...]:
    """Return the exception types of running out of memory, given the libraries that are loaded."""
    torch = sys.modules.get("torch")
    return (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)


def _prepare(engine: Engine, model: ObjectModel) -> int:
    """Call the engine's `prepare`. Arrays that are missing or do not fit make it raise many kinds of exceptions."""
    try:
        return engine.prepare(model)
    except out_of_memory():
        raise
    except Exception as error:
        raise StoreError("the object's stored model is broken; onboard it again") from error
