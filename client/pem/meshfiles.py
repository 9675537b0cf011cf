"""Turn a CAD model into a file's bytes, from a path, bytes, a mesh, or vertices and faces."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from pem.contract import CadFormat

FORMATS: Final = "ply, obj, stl, glb, off or zip"
_MOST_VERTICES: Final = 2**31 - 1  # a face refers to them by 32-bit indices


class TriangleMesh(Protocol):
    """A mesh of `trimesh` or of another library with the same attributes."""

    @property
    def vertices(self) -> Any:
        """Return the vertices, (n, 3)."""

    @property
    def faces(self) -> Any:
        """Return the faces, (m, 3) indices of vertices."""


Mesh = TriangleMesh | tuple[npt.ArrayLike, npt.ArrayLike]  # the pair: vertices (n, 3) and faces (m, 3)


def read_cad(
    cad: bytes | str | Path | Mesh, cad_format: CadFormat | None
) -> tuple[bytes | Path, str, CadFormat | None]:
    """Return a CAD, in any form, as (bytes or path of the file, a name for it, its format or None if unknown).

    A mesh becomes a binary PLY in its own unit. Raises ValueError or TypeError for anything that is not a mesh, and
    ValueError for bytes without a format.
    """
    if isinstance(cad, bytes):
        if cad_format is None:
            raise ValueError(f"a CAD given as bytes needs cad_format: {FORMATS}")
        return cad, f"model.{cad_format}", cad_format
    if isinstance(cad, str | Path):
        return Path(cad), Path(cad).name, cad_format
    if cad_format not in (None, "ply"):
        raise ValueError(f"a mesh is sent as PLY; leave cad_format={cad_format!r} out")
    return _ply_of(cad), "model.ply", "ply"


def _ply_of(mesh: Any) -> bytes:
    if isinstance(mesh, tuple | list) and len(mesh) == 2:
        return write_ply(*mesh)
    if hasattr(mesh, "vertices") and hasattr(mesh, "faces"):
        return write_ply(mesh.vertices, mesh.faces, _colors(mesh))
    raise TypeError(
        "a CAD is the path or the bytes of a file, a mesh with vertices and faces, or (vertices, faces), "
        f"not {type(mesh).__name__}"
    )


def write_ply(vertices: npt.ArrayLike, faces: npt.ArrayLike, colors: npt.ArrayLike | None = None) -> bytes:
    """Encode triangles as a binary little-endian PLY.

    vertices: (n, 3), finite; float32 stays, everything else becomes float64. faces: (m, 3) integers, indices of
    vertices. colors: (n, 3) uint8 RGB of the vertices, or None. Raises ValueError for anything else.
    """
    points = _numbers("vertices", vertices)
    if points.dtype != np.float32:
        points = points.astype(np.float64)
    if not np.isfinite(points).all():
        raise ValueError("vertices must be finite; some are NaN or infinite")
    corners = _numbers("faces", faces)
    if corners.dtype.kind not in "iu":
        raise ValueError(f"faces must be integers, indices of vertices, not {corners.dtype}")
    if not 0 < len(points) <= _MOST_VERTICES or len(corners) == 0:
        raise ValueError(f"a mesh needs vertices and faces; this has {len(points)} and {len(corners)}")
    if corners.min() < 0 or corners.max() >= len(points):
        wrong = int(corners.min() if corners.min() < 0 else corners.max())
        raise ValueError(f"faces must name vertices 0 to {len(points) - 1}; one names {wrong}")
    real, kind = ("float", "<f4") if points.dtype == np.float32 else ("double", "<f8")
    fields: list[tuple[str, str]] = [(axis, kind) for axis in "xyz"]
    properties = [f"property {real} {axis}" for axis in "xyz"]
    columns = dict(zip("xyz", points.T, strict=True))
    if colors is not None:
        channels = np.asarray(colors)
        if channels.shape != points.shape or channels.dtype != np.uint8:
            raise ValueError(f"colors must be {points.shape} uint8, not {channels.shape} {channels.dtype}")
        for name, channel in zip(("red", "green", "blue"), channels.T, strict=True):
            fields.append((name, "u1"))
            properties.append(f"property uchar {name}")
            columns[name] = channel
    body = np.empty(len(points), dtype=fields)
    for name, column in columns.items():
        body[name] = column
    triangles = np.empty(len(corners), dtype=[("count", "u1"), ("corners", "<i4", 3)])
    triangles["count"], triangles["corners"] = 3, corners
    header = [
        *("ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties),
        *(f"element face {len(corners)}", "property list uchar int vertex_indices", "end_header"),
    ]
    return ("\n".join(header) + "\n").encode() + body.tobytes() + triangles.tobytes()


def _numbers(what: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return `values` as an (n, 3) array of numbers. Raises ValueError if they are not."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"{what} must be (n, 3); the rows differ in length") from None
    if array.ndim != 2 or array.shape[1] != 3:
        raise ValueError(f"{what} must be (n, 3), not {array.shape}")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{what} must be numbers, not {array.dtype}")
    return array


def _colors(mesh: Any) -> npt.NDArray[np.uint8] | None:
    """Return a trimesh's RGB per vertex, (n, 3); None if its colours are of faces or in a texture."""
    visual = getattr(mesh, "visual", None)
    if getattr(visual, "kind", None) != "vertex":
        return None
    colors = np.asarray(getattr(visual, "vertex_colors", None))
    if colors.ndim != 2 or colors.shape[0] != len(mesh.vertices) or colors.dtype != np.uint8:
        return None
    return colors[:, :3]
