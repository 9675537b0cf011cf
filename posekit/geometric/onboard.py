"""Compute the geometric engine's model of an object from the CAD alone. The same mesh always gives the same arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from posekit.engine import Float64, Mesh, Progress, Symmetries
from posekit.geometric import symmetry
from posekit.geometry import rotation_looking_from, view_directions
from posekit.surface import diameter_of, sample_surface

SAMPLES = 8192
DENSE_SAMPLES = 65536  # for drawing the object
VIEWS = 240
VIEW_SAMPLES = 256
FIELD_CELLS = 56**3
FIELD_MARGIN = 0.12  # share of the diameter, added on every side
THIN = 0.25  # share of the diameter: on a thinner wall, a point may be mistaken for one of the other side


def build(
    mesh: Mesh, declared: Symmetries | None, progress: Progress
) -> tuple[float, Symmetries, dict[str, npt.NDArray[Any]]]:
    """Return the diameter in metres, the symmetries in the object frame, and the arrays that `model.prepare` reads."""
    vertices = mesh.vertices_m[np.unique(mesh.faces)].astype(np.float64)
    centre = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
    diameter = max(diameter_of(vertices), 1e-6)
    points, normals, colours, spacing = sample_surface(mesh, SAMPLES)
    points = points - centre
    outward = outward_normals(mesh)
    normals = normals * (outward or 1)
    dense_points, dense_normals, dense_colours, dense_spacing = sample_surface(mesh, DENSE_SAMPLES)
    progress(0.1)
    tree = cKDTree(points)
    nearest, origin, cell = nearest_grid(points, tree, diameter)
    progress(0.4)
    directions, seen, seen_centre = visible_samples(points, spacing)
    progress(0.7)

    def nearest_of(queries: Float64) -> symmetry.Indices:
        x, y, z = ((queries - origin) / cell).astype(np.int64).clip(0, np.array(nearest.shape) - 1).T
        return np.asarray(nearest[x, y, z], dtype=np.intp)

    thickness_m = np.zeros(len(points))
    if outward:
        thickness_m = thicknesses(points, normals, nearest_of, spacing, THIN * diameter)
    surface = symmetry.Surface(
        points=points,
        normals=normals,
        colours=colours,
        tree=tree,
        nearest=nearest_of,
        diameter=diameter,
        spacing=spacing,
    )
    found = symmetry.find(surface)
    symmetries = declared if declared is not None else symmetry.moved(found.symmetries, centre)
    progress(1.0)
    arrays: dict[str, npt.NDArray[Any]] = {
        "points_m": points.astype(np.float32),
        "normals": normals.astype(np.float32),
        "thickness_m": thickness_m.astype(np.float32),
        "oriented": np.array([outward != 0]),
        "centre_m": centre.astype(np.float32),
        "spacing_m": np.array([spacing], dtype=np.float32),
        "dense_points_m": (dense_points - centre).astype(np.float32),
        "dense_normals": np.rint(dense_normals * 127).astype(np.int8),
        "dense_spacing_m": np.array([dense_spacing], dtype=np.float32),
        "field_nearest": nearest,
        "field_origin_m": origin.astype(np.float32),
        "field_cell_m": np.array([cell], dtype=np.float32),
        "view_directions": directions.astype(np.float32),
        "view_samples": seen,
        "view_centres_m": seen_centre.astype(np.float32),
        "twins": found.twins.astype(np.float32),
    }
    if colours is not None and dense_colours is not None:
        arrays["colours"] = colours
        arrays["dense_colours"] = dense_colours
    return diameter, symmetries, arrays


def outward_normals(mesh: Mesh) -> int:
    """Return 1 if the order of a face's corners makes normals point outwards, -1 if inwards, 0 if it tells nothing.

    It tells where nearly every edge is passed once in each direction. Of several shells the largest decides.
    """
    # Files repeat corners at creases and seams: merge corners with the same bits.
    bits = (np.ascontiguousarray(mesh.vertices_m, dtype=np.float32) + np.float32(0)).view(np.uint32).astype(np.uint64)
    mixed = (bits * np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)).sum(axis=1)
    _, corner = np.unique(mixed ^ (mixed >> np.uint64(29)), return_inverse=True)
    faces = corner.reshape(-1)[mesh.faces].astype(np.int64)
    faces = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])]
    if not len(faces):
        return 0
    start, end = faces[:, [0, 1, 2]].ravel(), faces[:, [1, 2, 0]].ravel()
    count = int(faces.max()) + 1
    there, back = np.sort(start * count + end), np.sort(end * count + start)
    repeated = np.mean(there[1:] == there[:-1])
    paired = np.mean(there[np.searchsorted(there, back).clip(max=len(there) - 1)] == back)
    if repeated > 0.02 or paired < 0.98:
        return 0
    vertices = np.zeros((count, 3))
    vertices[corner.reshape(-1)] = mesh.vertices_m
    a, b, c = (vertices[faces[:, i]] - vertices.mean(axis=0) for i in range(3))
    volumes = np.einsum("ij,ij->i", a, np.cross(b, c))
    graph = coo_matrix((np.ones(len(start)), (start, end)), shape=(count, count))
    shell = connected_components(graph, directed=False)[1][faces[:, 0]]
    of_shell = np.bincount(shell, weights=volumes)
    largest = of_shell[np.abs(of_shell).argmax()]
    return int(np.sign(largest))


def thicknesses(
    points: Float64, normals: Float64, nearest_of: Callable[[Float64], symmetry.Indices], spacing: float, most: float
) -> Float64:
    """Return the depth of the wall below each sample in metres (S,); 0 where no opposite side lies within `most`."""
    found = np.zeros(len(points))
    for depth in np.arange(0.5 * spacing, most, 0.5 * spacing):
        index = nearest_of(points - depth * normals)
        away = points - points[index]
        below = (away * normals).sum(axis=1)
        beside = np.linalg.norm(away - below[:, None] * normals, axis=1)
        opposite = (
            ((normals * normals[index]).sum(axis=1) < -0.8) & (beside < 2 * spacing) & (below > 0) & (below <= most)
        )
        found = np.where((found == 0) & opposite, below, found)
    return found


def nearest_grid(points: Float64, tree: cKDTree, diameter: float) -> tuple[npt.NDArray[np.int32], Float64, float]:
    """Find the nearest sample for each cell of a grid of cubes: (X, Y, Z).

    Also returns the grid's corner and the side of a cell, in metres.
    """
    low = points.min(axis=0) - FIELD_MARGIN * diameter
    size = points.max(axis=0) + FIELD_MARGIN * diameter - low
    cell = float(np.cbrt(np.prod(size) / FIELD_CELLS))
    counts = np.ceil(size / cell).astype(int)
    axes = [low[i] + (np.arange(counts[i]) + 0.5) * cell for i in range(3)]
    middles = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    _, index = tree.query(middles)
    return index.reshape(counts).astype(np.int32), low, cell


def visible_samples(points: Float64, spacing: float) -> tuple[Float64, npt.NDArray[np.int32], Float64]:
    """Return what is seen from each of VIEWS directions: directions (V, 3), samples (V, M), their mean position (V, 3).

    Samples are splatted into an orthographic depth map. Each pixel answers with the sample in front, so that the
    samples of a view are even over the picture, like the pixels of a camera.
    """
    directions = view_directions(VIEWS)
    R_views = rotation_looking_from(directions).numpy()
    pixel = 1.5 * spacing
    seen = np.empty((VIEWS, VIEW_SAMPLES), dtype=np.int32)
    centres = np.empty((VIEWS, 3))
    for view, R in enumerate(R_views):
        local = points @ R.T
        column, row = (np.floor((local[:, :2] - local[:, :2].min(axis=0)) / pixel).astype(int) + 1).T
        width, height = column.max() + 2, row.max() + 2
        flat = row * width + column
        order = np.lexsort((local[:, 2], flat))
        first = order[np.flatnonzero(np.diff(flat[order], prepend=-1))]  # the front sample of each occupied pixel
        front = np.full((height, width), np.inf)
        front[row[first], column[first]] = local[first, 2]
        near = front.copy()  # a pixel without a front sample would show the back through the gap: look around it
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                np.minimum(near, np.roll(front, (dy, dx), axis=(0, 1)), out=near)
        shown = first[local[first, 2] <= near[row[first], column[first]] + 3 * pixel]
        seen[view] = shown[(np.arange(VIEW_SAMPLES) * len(shown)) // VIEW_SAMPLES]
        centres[view] = points[shown].mean(axis=0)
    # Neighbouring entries are neighbouring pixels. A fixed shuffle makes every prefix cover the whole view.
    shuffle = np.argsort((np.arange(1, VIEW_SAMPLES + 1) * 0.6180339887498949) % 1.0, kind="stable")
    return directions.numpy(), seen[:, shuffle], centres
