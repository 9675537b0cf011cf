"""The object store on disk: one folder per CAD model, complete or absent.

    <root>/<object_id>/
        source/<files>                    the client's files
        object.json                       StoredObject
        mesh.safetensors                  the mesh in metres
        <engine>-<version>.safetensors    an engine's model of the object
        <engine>-<version>.failed.json    the reason, if onboarding failed
    <root>/.incoming-<uuid>/              being written: becomes an object by one rename
    <root>/.trash-<uuid>/                 being deleted

Every file appears under its name only when it is whole: written beside it, flushed to the disk, renamed. So a kill at
any moment leaves old or new, never half; `sweep` removes what was left behind. A name that moves is written to its new
object first: killed before the old one is written, both claim it, and the one of the greater revision has it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from posekit.engine import Mesh, ObjectModel, Symmetries
from posekit.errors import InvalidInput, StoreError, StoreFull

OBJECT_ID = re.compile(r"[0-9a-f]{64}")
_ENGINE_PART = re.compile(r"[A-Za-z0-9._]+")
_INCOMING, _TRASH, _PARTIAL = ".incoming-", ".trash-", ".partial-"


class StoredObject(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about an object, readable without opening its mesh. Lengths are millimetres."""

    object_id: str
    name: str | None  # the latest one it was given
    aliases: list[str] = []  # those before, which go on working, oldest first
    awaited: list[str] = []  # names that it takes from other objects once it is ready
    revision: int = 0  # grows with each change in the store: of two objects that claim a name, the greater has it
    cad_format: str
    model_unit: Literal["mm", "m"]
    files: list[str]
    faces: int
    watertight: bool
    extents_mm: tuple[float, float, float]
    diameter_mm: float
    warnings: list[str] = []
    declared_symmetries: dict[str, Any] | None = None  # in BOP's notation: symmetries_discrete, symmetries_continuous
    created_unix: float

    @property
    def names(self) -> list[str]:
        """Everything that the object answers to beside its id, the latest last."""
        return [*self.aliases, *([] if self.name is None else [self.name])]

    def named(self, names: Sequence[str]) -> StoredObject:
        """The same object answering to these names, the latest last."""
        return msgspec.structs.replace(self, name=names[-1] if names else None, aliases=list(names[:-1]))


_Objects = list[StoredObject]  # defined here because ObjectStore has a method named `list`
_Names = list[str]
_Paths = list[Path]


class _Failed(msgspec.Struct, frozen=True):
    error: str


class _ModelHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The part of an ObjectModel that is not an array, kept in the file's metadata. Lengths are metres."""

    object_id: str
    engine: str
    engine_version: str
    diameter_m: float
    discrete: list[list[float]]
    continuous: list[tuple[list[float], list[float]]]
    seconds: float = 0.0
    threads: int = 0


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """The facts about a stored model, readable without its arrays."""

    symmetries: Symmetries
    seconds: float  # duration of onboarding; 0 = not recorded
    threads: int  # threads that onboarding used
    nbytes: int  # size of its file


class ObjectStore:
    """The objects under one folder. Several processes may share it: the file system's rename decides who was first."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        with _disk("the object store cannot be created"):
            self.root.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------------------------------------ coming and going

    def stage(self) -> Path:
        """Create a folder to prepare an object in, with an empty `source/` inside. `commit` makes it an object."""
        staged = self.root / f"{_INCOMING}{uuid.uuid4().hex}"
        with _disk("the object cannot be stored"):
            (staged / "source").mkdir(parents=True)
        return staged

    def commit(self, staged: Path, stored: StoredObject) -> bool:
        """Turn a staged folder into the object `stored`. If the object exists, remove the folder and return False.

        The source files and the mesh must be in place before.
        """
        folder = self.folder(stored.object_id)
        try:
            write_atomically(staged / "object.json", msgspec.json.encode(stored))
            with _disk("the object cannot be stored"):
                for source in _entries(staged / "source"):
                    _sync(source)
                _sync(staged / "source")
                try:
                    staged.rename(folder)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                        raise
                    if self.get(stored.object_id) is not None:
                        return False
                    self._discard(folder)  # a broken folder must not block the object for ever
                    staged.rename(folder)
                _sync(self.root)
            return True
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def list(self) -> _Objects:
        """Return all readable objects, oldest first; broken folders are left out."""
        found = []
        for folder in self._children():
            if OBJECT_ID.fullmatch(folder.name):
                stored = self.get(folder.name)
                if stored is not None:
                    found.append(stored)
        return sorted(found, key=lambda stored: (stored.created_unix, stored.object_id))

    def get(self, object_id: str) -> StoredObject | None:
        """Return one object, or None if no such object can be read (malformed ids included)."""
        if not OBJECT_ID.fullmatch(object_id):
            return None
        try:
            stored = msgspec.json.decode((self.root / object_id / "object.json").read_bytes(), type=StoredObject)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        return stored if stored.object_id == object_id else None

    def replace(self, stored: StoredObject) -> None:
        """Write what is known of an object anew (names, declared symmetries); StoreError where there is none."""
        if self.get(stored.object_id) is None:
            raise StoreError("there is no such object")
        write_atomically(self.folder(stored.object_id) / "object.json", msgspec.json.encode(stored))

    def remove(self, object_id: str) -> bool:
        """Delete an object at one moment, as a whole; return False if there was none."""
        folder = self.folder(object_id)
        if not folder.is_dir():
            return False
        with _disk("the object cannot be removed"):
            return self._discard(folder)

    def sweep(self) -> int:
        """Remove leftovers of interrupted work, and return how many. Call it at start, while nothing else writes."""
        removed = 0
        for entry in self._children():
            if entry.name.startswith((_INCOMING, _TRASH, _PARTIAL)):
                removed += _delete(entry)
            elif OBJECT_ID.fullmatch(entry.name):
                removed += sum(_delete(inside) for inside in _entries(entry) if inside.name.startswith(_PARTIAL))
        return removed

    def broken(self) -> _Names:
        """Return the ids of folders that exist but cannot be read as an object, for the log."""
        return [
            entry.name for entry in self._children() if OBJECT_ID.fullmatch(entry.name) and self.get(entry.name) is None
        ]

    def folder(self, object_id: str) -> Path:
        """Return an object's folder; raise InvalidInput for an id that is no content hash: no id leaves the root."""
        if not OBJECT_ID.fullmatch(object_id):
            raise InvalidInput("an object's id is 64 hexadecimal characters", "object_id")
        return self.root / object_id

    def bytes_used(self) -> int:
        """Return the bytes in all files below the root."""
        total = 0
        for directory, _, names in os.walk(self.root):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(directory, name)).st_size
        return total

    # ------------------------------------------------------------------------------------------------ meshes and models

    def save_mesh(self, folder: Path, mesh: Mesh) -> None:
        """Write the mesh into a staged (or stored) object's folder."""
        arrays: dict[str, npt.NDArray[Any]] = {"vertices_m": mesh.vertices_m, "faces": mesh.faces}
        if mesh.vertex_colors is not None:
            arrays["vertex_colors"] = mesh.vertex_colors
        _save_arrays(folder / "mesh.safetensors", arrays, {})

    def load_mesh(self, object_id: str) -> Mesh:
        """Read an object's mesh; raise StoreError if it is missing or broken."""
        arrays, _ = _load_arrays(self.folder(object_id) / "mesh.safetensors")
        vertices_m, faces = arrays.get("vertices_m"), arrays.get("faces")
        if (
            vertices_m is None
            or faces is None
            or vertices_m.dtype != np.float32
            or faces.dtype != np.int32
            or vertices_m.shape[1:] != (3,)
            or faces.shape[1:] != (3,)
        ):
            raise StoreError("the stored mesh is broken; register the object again")
        return Mesh(vertices_m=vertices_m, faces=faces, vertex_colors=arrays.get("vertex_colors"))

    def save_model(self, model: ObjectModel, *, seconds: float = 0.0, threads: int = 0) -> None:
        """Write an engine's model of an object, and the time it took, beside the object, which must exist."""
        header = _ModelHeader(
            object_id=model.object_id,
            engine=model.engine,
            engine_version=model.engine_version,
            diameter_m=float(model.diameter_m),
            discrete=[[float(x) for x in T.ravel()] for T in model.symmetries.discrete],
            continuous=[
                ([float(x) for x in axis], [float(x) for x in offset_m])
                for axis, offset_m in model.symmetries.continuous
            ],
            seconds=seconds,
            threads=threads,
        )
        path = self._model_path(model.object_id, model.engine, model.engine_version)
        _save_arrays(path, model.arrays, {"model": msgspec.json.encode(header).decode()})

    def load_model(self, object_id: str, engine: str, version: str) -> ObjectModel:
        """Read an engine's model of an object; raise StoreError if it is missing, broken or of another object."""
        arrays, metadata = _load_arrays(self._model_path(object_id, engine, version))
        header, symmetries = _read_header(metadata)
        if (header.object_id, header.engine, header.engine_version) != (object_id, engine, version):
            raise StoreError("the object's stored model belongs to another object or engine; onboard it again")
        return ObjectModel(
            object_id=object_id,
            engine=engine,
            engine_version=version,
            diameter_m=header.diameter_m,
            symmetries=symmetries,
            arrays=arrays,
        )

    def describe_model(self, object_id: str, engine: str, version: str) -> StoredModel:
        """Return the facts about a stored model without reading its arrays; StoreError as in `load_model`."""
        metadata, nbytes = _load_metadata(self._model_path(object_id, engine, version))
        header, symmetries = _read_header(metadata)
        return StoredModel(symmetries=symmetries, seconds=header.seconds, threads=header.threads, nbytes=nbytes)

    def remove_models(self, object_id: str) -> None:
        """Remove all engines' models of an object, so that it is onboarded anew."""
        with _disk("the object cannot be changed"):
            for path in self.folder(object_id).glob("*-*.safetensors"):
                path.unlink(missing_ok=True)

    def has_model(self, object_id: str, engine: str, version: str) -> bool:
        """Return True if an engine of this version has onboarded the object."""
        return self._model_path(object_id, engine, version).is_file()

    # --------------------------------------------------------------------------------------------------------- failures

    def fail(self, object_id: str, engine: str, version: str, error: str) -> None:
        """Record why an engine's onboarding failed, so that clients are told and it is not tried for ever."""
        write_atomically(self._failure_path(object_id, engine, version), msgspec.json.encode(_Failed(error)))

    def failure(self, object_id: str, engine: str, version: str) -> str | None:
        """Return why an engine's onboarding failed; None if it has not failed."""
        path = self._failure_path(object_id, engine, version)
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Failed).error
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return "onboarding failed; the reason cannot be read any more"

    def clear_failures(self, object_id: str) -> None:
        """Remove all records of failures, before onboarding is tried again."""
        with _disk("the object cannot be changed"):
            for path in self.folder(object_id).glob("*.failed.json"):
                path.unlink(missing_ok=True)

    # ---------------------------------------------------------------------------------------------------------- private

    def _children(self) -> _Paths:
        return _entries(self.root)

    def _discard(self, folder: Path) -> bool:
        trash = self.root / f"{_TRASH}{uuid.uuid4().hex}"
        try:
            folder.rename(trash)
        except FileNotFoundError:  # another process was faster
            return False
        _delete(trash)
        return True

    def _model_path(self, object_id: str, engine: str, version: str) -> Path:
        if not (_ENGINE_PART.fullmatch(engine) and _ENGINE_PART.fullmatch(version)):
            raise StoreError("an engine's name and version are letters, digits, dots and underscores")
        return self.folder(object_id) / f"{engine}-{version}.safetensors"

    def _failure_path(self, object_id: str, engine: str, version: str) -> Path:
        return self._model_path(object_id, engine, version).with_suffix(".failed.json")


# ----------------------------------------------------------------------------------------------------------- the disk


def write_atomically(path: Path, data: bytes, what: str = "the object") -> None:
    """Write a file so that it is seen whole or not at all, even through a crash. Errors call it `what`.

    Raises StoreFull if the disk (or the quota) is full, StoreError for any other problem.
    """
    partial = path.with_name(f"{_PARTIAL}{uuid.uuid4().hex}")
    with _disk(f"{what} cannot be written"):
        try:
            with open(partial, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            _sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _disk(what: str) -> Iterator[None]:
    """Turn the operating system's errors into ours, without its paths."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(f"{what}: the disk is full") from error
        raise StoreError(f"{what}: {error.strerror or type(error).__name__}") from error


def _sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _delete(entry: Path) -> bool:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            entry.unlink(missing_ok=True)
    return not entry.exists()


def _save_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]], metadata: dict[str, str]) -> None:
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_atomically(path, save(contiguous, metadata=metadata))


def _load_arrays(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise StoreError("the object's folder lacks a file; register the object again") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        raise StoreError("a file of the object is broken; register the object again") from None


def _load_metadata(path: Path) -> tuple[dict[str, str], int]:
    """Return a file's metadata and its size in bytes."""
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {}), path.stat().st_size
    except (OSError, SafetensorError):
        raise StoreError("the object's stored model is missing or broken; onboard it again") from None


def _read_header(metadata: Mapping[str, str]) -> tuple[_ModelHeader, Symmetries]:
    try:
        header = msgspec.json.decode(metadata.get("model", ""), type=_ModelHeader)
        symmetries = Symmetries(
            discrete=tuple(np.array(numbers, dtype=np.float64).reshape(4, 4) for numbers in header.discrete),
            continuous=tuple(
                (np.array(axis, dtype=np.float64).reshape(3), np.array(offset_m, dtype=np.float64).reshape(3))
                for axis, offset_m in header.continuous
            ),
        )
    except (msgspec.MsgspecError, ValueError):
        raise StoreError("the object's stored model is broken; onboard it again") from None
    return header, symmetries
