"""Records of the weight files in a folder: the source of each, its licence, and its sha256.

    <folder>/sam-6d-pem-base.safetensors    the weights
    <folder>/sam-6d-pem-base.json           their WeightsEntry, written by the import
    <folder>/manifest.json                  entries that came with the folder; its files must match these too

Imports no torch, so that the gateway can afford it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from posekit.errors import BrokenCheckpoint
from posekit.store import write_atomically

T = TypeVar("T")

FILE_NAME: Final = "sam-6d-pem-base.safetensors"
ENGINE: Final = "sam6d"
SOURCE: Final = "assumed: the release of SAM-6D (JiehongLin/SAM-6D)"
LICENCE: Final = "unknown: the repository that publishes it states none"


class WeightsEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The record of one weight file. checkpoints/manifest.json explains the fields."""

    name: str
    engine: str
    source: str
    source_sha256: str
    sha256: str
    bytes: int
    licence: str


class _Manifest(msgspec.Struct, frozen=True):
    weights: list[WeightsEntry]


def files(folder: Path) -> list[Path]:
    """Return the weight files in a folder, by name; an empty list if the folder does not exist."""
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def entry(path: Path) -> WeightsEntry | None:
    """Return the record of a weight file without reading the file; None without a record, or if the size differs.

    `posekit.sam6d.checkpoint.weights.verify` checks that the bytes still match the record.
    """
    try:
        nbytes = path.stat().st_size
        return next((one for one in entries(path) if one.bytes == nbytes), None)
    except (OSError, BrokenCheckpoint):
        return None


def entries(path: Path) -> list[WeightsEntry]:
    """Return all records of a weight file: beside it, and in the folder's manifest.

    Raises BrokenCheckpoint if either of these two files cannot be read.
    """
    found = []
    with contextlib.suppress(FileNotFoundError):
        found.append(_read(_beside(path), WeightsEntry))
    with contextlib.suppress(FileNotFoundError):
        found += [row for row in _read(path.with_name("manifest.json"), _Manifest).weights if row.name == path.name]
    return found


def record(path: Path, known: WeightsEntry) -> None:
    """Write the record beside a weight file; raise StoreError if that fails."""
    text = msgspec.json.format(msgspec.json.encode(known), indent=2) + b"\n"
    write_atomically(_beside(path), text, "the entry of the weights")


def forget(path: Path) -> None:
    """Remove the record beside a weight file, if there is one."""
    _beside(path).unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_suffix(".json")


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise BrokenCheckpoint(f"{path.name}, which says what is known of the weights, cannot be read") from None
