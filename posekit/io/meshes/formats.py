"""The mesh formats that can be read, and how to recognise one from its bytes."""

from __future__ import annotations

import re
from typing import Final, Literal

from posekit.errors import InvalidInput

Unit = Literal["mm", "m"]

FORMATS = ("ply", "obj", "stl", "glb", "off", "zip")
UNIT_OF: Final[dict[str, Unit]] = {"glb": "m"}  # of a format that defines its unit; a file of any other is in mm

_NO_TRIANGLES = (
    "a CAD format without triangles: export the part from the CAD program as a mesh (STL, PLY, OBJ or GLB), or "
    "tessellate the file with a tool such as FreeCAD or Gmsh"
)
_UNREADABLE: Final = {  # ending -> what the file is and what to do
    "step": f"this is a STEP file, {_NO_TRIANGLES}",
    "iges": f"this is an IGES file, {_NO_TRIANGLES}",
    "dae": "this is a COLLADA (DAE) file, which is not read: export the model as GLB or OBJ, from Blender for instance",
    "3mf": "this is a 3MF file, which is not read: export the part as STL, PLY or OBJ from the slicer or CAD program",
    "gltf": "this is a glTF in text form, whose data lies in other files: export the model as GLB, which holds it all",
}
_UNREADABLE_ENDINGS: Final = {"stp": "step", "p21": "step", "igs": "iges"}


def suffix(name: str) -> str:
    """Return the part of a name after its last dot, in lower case; "" without a dot."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def unreadable(ending: str) -> str | None:
    """Say what to do with a known format that is not read, by its ending; None for any other ending."""
    return _UNREADABLE.get(_UNREADABLE_ENDINGS.get(ending, ending))


def refuse_unreadable(data: bytes, field: str | None) -> None:
    """Raise InvalidInput, which says what to do, where the bytes are of a known format that is not read."""
    start = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
    found = None
    if start.startswith(b"ISO-10303-21"):
        found = "step"
    elif re.match(rb"[^\r\n]{72}S {0,6}0{0,6}1\r?\n", data):  # lines of 80 characters; 73: the section, 74: its line
        found = "iges"
    elif start.startswith(b"<") and b"<COLLADA" in start:
        found = "dae"
    elif data.startswith(b"PK\x03\x04") and re.search(rb"3D/[\w .-]+\.model", data[-65536:], re.IGNORECASE):
        found = "3mf"  # the list of a zip's files is at its end
    elif start.startswith(b"{") and b'"asset"' in data and b'"meshes"' in data:
        found = "gltf"
    if found is not None:
        raise InvalidInput(_UNREADABLE[found], field)


def sniff(data: bytes) -> str | None:
    """Return the format that the bytes themselves claim to be: "ply", "stl", "glb", "off", "obj", "zip", or None."""
    if data.startswith(b"glTF"):
        return "glb"
    if data.startswith(b"PK\x03\x04") or data.startswith(b"PK\x05\x06"):
        return "zip"
    if re.match(rb"ply[ \t]*\r?\n", data):
        return "ply"
    if len(data) >= 84 and len(data) == 84 + 50 * int.from_bytes(data[80:84], "little"):
        return "stl"
    start = data[:65536].lstrip(b"\xef\xbb\xbf \t\r\n")
    if re.match(rb"solid\b", start, re.IGNORECASE) and re.search(rb"\bfacet\b|endsolid", data, re.IGNORECASE):
        return "stl"
    if re.match(rb"(?:\s*#[^\n]*\n)*\s*(?:ST)?C?N?OFF\b", start):
        return "off"
    if b"\0" not in start and re.search(rb"^\s*v\s+[-+.\d]", data, re.MULTILINE):
        return "obj"
    if len(data) >= 84 and b"\0" in data[:84] and int.from_bytes(data[80:84], "little") * 50 > len(data):
        return "stl"  # binary and cut short; the STL reader says so
    return None
