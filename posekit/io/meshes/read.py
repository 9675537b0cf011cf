"""Read a client's files into one mesh in the file's own unit."""

from __future__ import annotations

from collections.abc import Mapping

from posekit.errors import BadData, InvalidInput, TooLarge
from posekit.io.meshes.archive import expand
from posekit.io.meshes.formats import FORMATS, refuse_unreadable, sniff, suffix
from posekit.io.meshes.obj_glb import read_with_trimesh
from posekit.io.meshes.off import read_off
from posekit.io.meshes.ply import read_ply
from posekit.io.meshes.raw import RawMesh, cleaned
from posekit.io.meshes.stl import read_stl


def load_mesh(files: Mapping[str, bytes], cad_format: str, max_faces: int, field: str | None = "file") -> RawMesh:
    """Read a mesh. `files` maps names to contents: one file, or an OBJ with its material and texture files, or a zip.

    Several bodies become one mesh, each at its place; textures and face colours become vertex colours (vertices are
    doubled where face colours meet). Raises BadData for what is not a mesh of that format, TooLarge for more faces than
    `max_faces` (before parsing where a header tells), InvalidInput for a mesh without faces, with NaN, or without area,
    and for a known format that is not read, such as STEP.
    """
    if cad_format not in FORMATS:
        raise InvalidInput(f"cad_format {cad_format!r} is unknown; it is one of {', '.join(FORMATS)}", field)
    if cad_format == "zip":
        files, cad_format = expand(files, field)
    name, data = _main_file(files, cad_format, field)
    if not data:
        raise BadData("the mesh file is empty (0 bytes)", field)
    found = sniff(data)
    if found != cad_format:
        refuse_unreadable(data, field)
        like = f"looks like {found.upper()}" if found else "does not look like one"
        raise BadData(f"the mesh was sent as {cad_format.upper()} and {like}", field)
    others = {other: content for other, content in files.items() if other != name}
    try:
        if cad_format == "ply":
            parts = read_ply(data, others, max_faces, field)
        elif cad_format == "stl":
            parts = read_stl(data, max_faces, field)
        elif cad_format == "off":
            parts = read_off(data, max_faces, field)
        else:
            parts = read_with_trimesh(data, others, cad_format, max_faces, field)
        return cleaned(parts, max_faces, field)
    except MemoryError:
        raise TooLarge("the mesh takes more memory than there is", field) from None


def _main_file(files: Mapping[str, bytes], cad_format: str, field: str | None) -> tuple[str, bytes]:
    if len(files) == 1:
        return next(iter(files.items()))
    named = [name for name in files if suffix(name) == cad_format]
    if len(named) != 1:
        raise InvalidInput(f"{len(named)} of the files are named *.{cad_format}; exactly one must be", field)
    return named[0], files[named[0]]
