"""Faces with any number of corners, as PLY and OFF list them, and their triangulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from posekit.io.meshes.raw import Int64, bad_index, check_claim


class Ragged:
    """A list property: row i is `values[starts[i] : starts[i] + sizes[i]]`."""

    def __init__(self, sizes: Int64, values: npt.NDArray[Any]) -> None:
        self.sizes, self.values = sizes, values
        self.starts: Int64 = np.cumsum(sizes) - sizes


def triangulated(polygons: Ragged, max_faces: int, field: str | None) -> tuple[Int64, Int64]:
    """Return fans of triangles (F, 3) and the polygon of each (F,). Fewer than three corners give no triangle."""
    total = int(np.maximum(polygons.sizes - 2, 0).sum())
    check_claim(total, 0, max_faces, field)
    corners = _whole(polygons.values, field)
    triangles, rows = [np.zeros((0, 3), dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for size in np.unique(polygons.sizes[polygons.sizes >= 3]):
        chosen = np.flatnonzero(polygons.sizes == size)
        grid = corners[polygons.starts[chosen, None] + np.arange(size)]  # (P, size)
        second = np.arange(1, size - 1)
        fan = np.stack([np.broadcast_to(grid[:, :1], (len(chosen), size - 2)), grid[:, second], grid[:, second + 1]], 2)
        triangles.append(fan.reshape(-1, 3))
        rows.append(np.repeat(chosen, size - 2))
    return np.concatenate(triangles), np.concatenate(rows)


def _whole(values: npt.NDArray[Any], field: str | None) -> Int64:
    """Return indices as int64; raise BadData for a value that is no index."""
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (np.abs(values) < 2**53).all()):
        raise bad_index(field)
    if values.dtype.kind == "u" and values.size and int(values.max()) >= 1 << 62:
        raise bad_index(field)
    whole = values.astype(np.int64)
    if values.dtype.kind == "f" and (whole != values).any():
        raise bad_index(field)
    return whole
