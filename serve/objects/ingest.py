"""Bring a CAD in: stage and inspect the files of a path, an upload or a request.

A mesh may come from anyone. It is parsed in a separate process (workers/stages/inspect_cad.py), never in this one.
"""

from __future__ import annotations

import asyncio
import errno
import filecmp
import hashlib
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from pem import contract
from posekit.errors import PoseError
from posekit.io import meshes
from posekit.store import ObjectStore
from serve.backend.mosec import Backend, BackendError, Interrupted
from serve.errors import ApiError, from_failure, from_posekit, internal_error
from serve.objects.choice import CadChoice
from serve.settings import Settings
from workers.messages import Failure, InspectAnswer, Inspected, InspectTask

log = structlog.get_logger()

FORMATS: Final = {f".{name}": name for name in meshes.FORMATS}  # file name ending -> format
_decoder: msgspec.msgpack.Decoder[Inspected | Failure] = msgspec.msgpack.Decoder(InspectAnswer)
_REMEMBERED = 4096
_MAX_COMPANIONS = 64  # files that an OBJ may refer to
_INSPECT_S = 120.0  # limit for reading one mesh, including the wait for others


@dataclass(frozen=True)
class Source:
    """A CAD that a request names or brings, not read yet."""

    key: tuple[Any, ...]  # equal for the same files in the same unit
    cad_format: str
    unit: contract.Unit | None  # None: the format's default
    field: str  # the request's field, for errors
    fill: Callable[[Path], list[str]]  # puts the files into a folder and returns their names, the CAD's first


class Ingest:
    """Stages incoming files and has them inspected."""

    def __init__(self, settings: Settings, backend: Backend, store: ObjectStore) -> None:
        self._settings = settings
        self._backend = backend
        self._store = store
        self._companions: dict[tuple[str, int, int], list[Path]] = {}  # stamp of an OBJ -> the files that it refers to

    def stage(self) -> Path:
        """Make a staging folder for an upload. The caller must pass it on or `discard` it."""
        try:
            return self._store.stage()
        except PoseError as error:
            raise from_posekit(error) from None

    def discard(self, staged: Path) -> None:
        """Delete a staging folder, if it is still there."""
        shutil.rmtree(staged, ignore_errors=True)

    async def staged(self, source: Source) -> tuple[Path, list[str]]:
        """Stage a source's files; return the folder and their names, the CAD's first."""
        staged = await asyncio.to_thread(self.stage)
        try:
            return staged, await asyncio.to_thread(source.fill, staged / "source")
        except OSError as error:
            self.discard(staged)
            if error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM):
                raise ApiError(
                    "no_cad_file", "the server cannot read the CAD file at this path", field=source.field
                ) from None
            raise ApiError(
                "storage_full", "the CAD could not be stored: " + (error.strerror or "disk error"), retry_after_s=30
            ) from None

    def cad_file(self, text: str, field: str) -> Path:
        """Return the CAD file at a path below the CAD root. Raises ApiError if none is there."""
        path = inside(self._settings.cad_path, text, field)
        format_of(path.name, f"a CAD file ends in {', '.join(FORMATS)}", field)
        if not os.path.isfile(path):  # Path.is_file raises an error if the name is too long for any file
            raise ApiError("no_cad_file", "no CAD file at this path under the CAD root", field=field)
        return path

    async def from_path(self, path: Path, unit: contract.Unit | None, field: str) -> Source:
        """Return a CAD file and the files that it refers to. Raises ApiError if they are unreadable or too large."""
        limit = self._settings.limits.object_body_mb
        try:
            companions = await self._companions_of(path)
            stamps = tuple(_stamp(one) for one in [path, *companions])
        except OSError:
            raise ApiError("no_cad_file", "the server cannot read the CAD file at this path", field=field) from None
        if sum(size for _, _, size in stamps) > limit * 2**20:
            raise ApiError("too_large", f"the CAD file is over {limit} MB", field=field)
        cad_format = FORMATS[path.suffix.lower()]
        return Source(
            ("path", stamps, unit), cad_format, unit, field, lambda folder: _copy([path, *companions], folder)
        )

    @staticmethod
    def from_inline(choice: CadChoice, unit: contract.Unit | None) -> Source:
        """Return a mesh that the request itself holds."""
        assert choice.cad is not None
        assert choice.cad_format is not None
        data, cad_format = choice.cad, choice.cad_format
        key = ("inline", hashlib.sha256(data).hexdigest(), cad_format, unit)
        return Source(key, cad_format, unit, "cad", lambda folder: _write(folder / f"model.{cad_format}", data))

    async def _companions_of(self, path: Path) -> list[Path]:
        """Return the files that a CAD file refers to; search again only when the CAD file has changed."""
        if path.suffix.lower() != ".obj":
            return []
        stamp = _stamp(path)
        if stamp not in self._companions:
            if len(self._companions) >= _REMEMBERED:
                self._companions.pop(next(iter(self._companions)))
            self._companions[stamp] = await asyncio.to_thread(_companions, path, self._settings.cad_path.resolve())
        return self._companions[stamp]

    async def inspect(self, staged: Path, cad_format: str, unit: contract.Unit | None, field: str) -> Inspected:
        """Inspect the files in a staging folder. Raises ApiError if they are no usable mesh, or no worker got to it."""
        task = InspectTask(
            task_id=f"inspect-{uuid.uuid4().hex}",
            folder=str(staged),
            cad_format=cad_format,
            model_unit=unit,
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
        answer = _decoder.decode(body)
        if isinstance(answer, Failure):
            refused = from_failure(answer)
            refused.field = field
            raise refused
        return answer


# --------------------------------------------------------------------------------------------------------------- paths


def format_of(file_name: str, otherwise: str, field: str) -> str:
    """Return the format that a file name's ending names. Raises ApiError with the words `otherwise` if none."""
    suffix = Path(file_name).suffix.lower()
    if suffix not in FORMATS:
        raise ApiError("invalid", meshes.unreadable(suffix.removeprefix(".")) or otherwise, field=field)
    return FORMATS[suffix]


def same_files(one: Path, other: Path) -> bool:
    """Return True if two folders hold files of the same names and bytes; False if one cannot be read."""
    try:
        names = sorted(path.name for path in one.iterdir())
        if names != sorted(path.name for path in other.iterdir()):
            return False
        return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)
    except OSError:
        return False


def inside(root: Path, text: str, field: str) -> Path:
    """Return the absolute path of `text` under `root`, symlinks resolved. A path outside the root is 422."""
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


_REFERENCE = re.compile(rb"^[ \t]*(mtllib|map_\w+|bump|norm|disp|decal)[ \t]+(\S.*)$", re.MULTILINE | re.IGNORECASE)


def _companions(path: Path, root: Path) -> list[Path]:
    """Return the material files and textures that an OBJ refers to; only files inside `root`."""
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
    """Return what changes when a file changes: path, mtime in ns, size."""
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4 * 2**20)


def _copy(paths: list[Path], folder: Path) -> list[str]:
    """Copy a CAD file and its companions. The CAD file gets the canonical name, which its id depends on."""
    names = []
    for index, path in enumerate(paths):
        name = f"model{path.suffix.lower()}" if index == 0 else path.name
        shutil.copyfile(path, folder / name)
        names.append(name)
    return names


def _write(path: Path, data: bytes) -> list[str]:
    path.write_bytes(data)
    return [path.name]


def declared_symmetries(request: contract.ObjectRequest) -> dict[str, Any] | None:
    """Check the symmetries that the user declared; return them in BOP's notation, None if there are none."""
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
