"""Compute an object's id from the content of its files, and from nothing else.

A mesh's content id is a sha256 over: the line `posekit-object-1`, the resolved unit, the number of files, and for each
file, in the order of the UTF-8 bytes of the names, its name and content. Every string and content is preceded by its
length in bytes; numbers are eight bytes, little-endian. A single file is named `model.<format>`, so that the client's
name for it does not matter.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

from posekit.io.meshes.formats import Unit, suffix


def content_id(unit: Unit, files: Mapping[str, bytes]) -> str:
    """Return the object's id: sha256 (64 hex digits) over unit, names and contents, in the layout described above."""
    digest = hashlib.sha256(b"posekit-object-1\n")

    def add(content: bytes) -> None:
        digest.update(struct.pack("<Q", len(content)))
        digest.update(content)

    add(unit.encode())
    digest.update(struct.pack("<Q", len(files)))
    for name in sorted(files, key=lambda name: name.encode("utf-8", "surrogatepass")):
        shown = f"model.{suffix(name)}" if len(files) == 1 else name
        add(shown.encode("utf-8", "surrogatepass"))
        add(files[name])
    return digest.hexdigest()
