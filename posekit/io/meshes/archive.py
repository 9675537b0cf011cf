"""Unpack a mesh from a zip, in memory, checking every claim of the archive."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import PurePosixPath

from posekit.errors import BadData, InvalidInput, TooLarge
from posekit.io.meshes.formats import FORMATS, refuse_unreadable, suffix, unreadable

MAX_UNZIPPED_BYTES = 512 << 20

MAX_ZIP_FILES = 256


def expand(files: Mapping[str, bytes], field: str | None = "file") -> tuple[dict[str, bytes], str]:
    """Unpack the one zip in `files` and find the mesh in it; return its files and the mesh's format."""
    if len(files) != 1:
        raise InvalidInput("a zip is sent alone", field)
    (data,) = files.values()
    refuse_unreadable(data, field)
    inside = unzip(data, field=field)
    meshes = [name for name in inside if suffix(name) in FORMATS and suffix(name) != "zip"]
    if not meshes:
        for words in filter(None, (unreadable(suffix(name)) for name in inside)):
            raise InvalidInput(f"the zip holds no mesh; of a file in it: {words}", field)
    if len(meshes) != 1:
        what = "no mesh" if not meshes else f"{len(meshes)} meshes ({', '.join(sorted(meshes)[:5])})"
        raise InvalidInput(f"the zip holds {what}; it must hold one, with its material and texture files", field)
    return inside, suffix(meshes[0])


def unzip(
    data: bytes, max_bytes: int = MAX_UNZIPPED_BYTES, max_files: int = MAX_ZIP_FILES, field: str | None = "file"
) -> dict[str, bytes]:
    """Unpack a zip in memory to {name without folders: content}; hidden files and those of macOS are left out.

    Raises BadData for a broken archive or names that point outside it, TooLarge before more than `max_bytes` are
    unpacked or if there are more than `max_files`, InvalidInput for encryption, unusual compression and equal names.
    """
    found: dict[str, bytes] = {}
    left = max_bytes
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [entry for entry in archive.infolist() if not entry.filename.endswith("/")]
            if len(entries) > max_files:
                raise TooLarge(f"the zip holds {len(entries)} files, more than {max_files}", field)
            for entry in entries:
                path = PurePosixPath(entry.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in entry.filename or "\0" in entry.orig_filename:
                    raise BadData("the zip holds a name that leads out of it", field)
                if path.name.startswith(".") or "__MACOSX" in path.parts or not path.name:
                    continue
                if entry.flag_bits & 1:
                    raise InvalidInput("the zip is encrypted; send it without a password", field)
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise InvalidInput("the zip uses an unusual compression; send it deflated or stored", field)
                if path.name in found:
                    raise InvalidInput(f"the zip holds two files named {path.name!r}", field)
                with archive.open(entry) as file:
                    content = file.read(left + 1)
                left -= len(content)
                if left < 0:
                    raise TooLarge(f"the zip unpacks to more than {max_bytes} bytes", field)
                found[path.name] = content
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, LookupError, RuntimeError):
        raise BadData("the zip is broken and cannot be unpacked", field) from None
    return found
