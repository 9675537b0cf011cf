"""A mesh as a reader returns it, in pieces, and its clean-up: checked, merged, unused vertices dropped."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from posekit.errors import BadData, InvalidInput, TooLarge

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

MAX_COORDINATE = 1e9  # in the file's unit
_GREY = np.array([128, 128, 128], dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class RawMesh:
    """A cleaned mesh in its file's unit: finite, every vertex used and unique, no degenerate face."""

    vertices: Float64  # (V, 3)
    faces: Int64  # (F, 3)
    vertex_colors: UInt8 | None = None  # (V, 3) RGB
    warnings: list[str] = field(default_factory=list)


@dataclass
class Parts:
    """The pieces of a mesh as a reader returns them. Corners index the vertices of their own piece."""

    vertices: list[Float64]
    faces: list[Int64]
    colors: list[UInt8 | None]
    warnings: list[str]


def check_claim(faces: int, vertices: int, max_faces: int, field: str | None) -> None:
    """Raise TooLarge for counts beyond the limit, before memory is taken for them."""
    if faces > max_faces:
        raise TooLarge(f"the mesh has {faces} faces, more than the limit of {max_faces}; simplify it", field)
    if vertices > 3 * max_faces:
        raise TooLarge(f"the mesh has {vertices} vertices, more than {max_faces} faces can use; simplify it", field)


def bad_index(field: str | None) -> BadData:
    """Make the error for a face that names a missing vertex."""
    return BadData("the mesh is broken: a face points to a vertex that does not exist", field)


def cleaned(parts: Parts, max_faces: int, field: str | None) -> RawMesh:
    """Join all parts into one mesh: check it, merge equal vertices, drop unused ones and degenerate faces."""
    if sum(len(faces) for faces in parts.faces) == 0:
        raise InvalidInput("the mesh has no faces; a point cloud is not enough, send a triangle mesh", field)
    for vertices, faces in zip(parts.vertices, parts.faces, strict=True):
        if faces.size and not (faces.min() >= 0 and faces.max() < len(vertices)):
            raise bad_index(field)
    offsets = np.cumsum([0] + [len(vertices) for vertices in parts.vertices])
    faces = np.concatenate([faces + offset for faces, offset in zip(parts.faces, offsets, strict=False)])
    check_claim(len(faces), 0, max_faces, field)
    used, faces = _compact(faces, int(offsets[-1]))
    vertices = np.concatenate(parts.vertices)[used]
    if not np.isfinite(vertices).all():
        raise InvalidInput("the mesh has vertices that are NaN or infinite", field)
    if np.abs(vertices).max() > MAX_COORDINATE:
        raise InvalidInput(f"the mesh has coordinates beyond {MAX_COORDINATE:g}; no unit makes that an object", field)
    colors = None
    if any(color is not None for color in parts.colors):
        filled = [
            np.tile(_GREY, (len(part), 1)) if color is None else color
            for part, color in zip(parts.vertices, parts.colors, strict=True)
        ]
        colors = np.concatenate(filled)[used]
    representative, faces = _merged(vertices, colors, faces)
    vertices = vertices[representative]
    colors = None if colors is None else colors[representative]
    corners = vertices[faces]
    twice_area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    solid = twice_area > 1e-12 * float(np.square(np.ptp(vertices, axis=0)).sum())
    dropped = len(faces) - int(solid.sum())
    notes = list(parts.warnings)
    if dropped == len(faces):
        raise InvalidInput("the mesh has no face with an area: all its triangles are degenerate", field)
    if dropped:
        notes.append(f"{dropped} degenerate faces (without area) were dropped")
    used, faces = _compact(faces[solid], len(vertices))
    return RawMesh(
        vertices=vertices[used], faces=faces, vertex_colors=None if colors is None else colors[used], warnings=notes
    )


def _compact(faces: Int64, count: int) -> tuple[Int64, Int64]:
    """Return which of `count` vertices are used, and the faces renumbered."""
    mask = np.zeros(count, dtype=bool)
    mask[faces] = True
    number = np.cumsum(mask) - 1
    return np.flatnonzero(mask), number[faces]


def _merged(vertices: Float64, colors: UInt8 | None, faces: Int64) -> tuple[Int64, Int64]:
    """Merge vertices that are equal in place and colour; return (one representative each, the faces renumbered)."""
    first, inverse = unique_rows(vertices, colors)
    return first, inverse[faces]


def unique_rows(vertices: Float64, colors: UInt8 | None = None) -> tuple[Int64, Int64]:
    """Return (index of each distinct row, in order of appearance; for each row the position of its own among them)."""
    keys = [vertices[:, 0], vertices[:, 1], vertices[:, 2]]
    if colors is not None:
        keys.append(colors.astype(np.int64) @ np.array([65536, 256, 1]))
    order = np.lexsort(keys)
    different = np.zeros(len(vertices), dtype=bool)
    different[:1] = True
    for key in keys:
        ordered = key[order]
        different[1:] |= ordered[1:] != ordered[:-1]
    group = np.cumsum(different) - 1
    first = np.minimum.reduceat(order, np.flatnonzero(different))
    appearance = np.argsort(first)
    place = np.empty(len(first), dtype=np.int64)
    place[appearance] = np.arange(len(first))
    inverse = np.empty(len(vertices), dtype=np.int64)
    inverse[order] = place[group]
    return first[appearance], inverse
