"""Sample a mesh's surface and measure its diameter, for onboarding."""

from __future__ import annotations

import numpy as np
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import pdist

from posekit.engine import Float64, Mesh, UInt8


def diameter_of(vertices: Float64) -> float:
    """Return the largest distance between two vertices; for very fine hulls, between an even selection of them."""
    try:
        corners = vertices[ConvexHull(vertices).vertices]
    except QhullError:  # flat: a sheet has no hull in space
        corners = vertices
    if len(corners) > 2000:
        corners = corners[:: len(corners) // 2000 + 1]
    return float(pdist(corners).max()) if len(corners) > 1 else 0.0


def sample_surface(mesh: Mesh, count: int) -> tuple[Float64, Float64, UInt8 | None, float]:
    """Spread `count` points by area: positions (S, 3) in metres, face normals (S, 3), colours (S, 3), their spacing.

    No randomness: faces are taken at even steps of the summed area, places in them from a low-discrepancy sequence.
    """
    corners = mesh.vertices_m[mesh.faces].astype(np.float64)  # (F, 3, 3)
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(cross, axis=1) / 2
    if not area.sum() > 0:
        area = np.ones(len(area))
    summed = np.cumsum(area)
    face = np.searchsorted(summed, (np.arange(count) + 0.5) * (summed[-1] / count)).clip(max=len(area) - 1)
    steps = np.arange(1, count + 1)[:, None] * np.array([0.7548776662466927, 0.5698402909980532])
    a, b = (steps % 1.0).T
    beyond = a + b > 1
    a, b = np.where(beyond, 1 - a, a), np.where(beyond, 1 - b, b)
    weight = np.stack((1 - a - b, a, b), axis=1)[:, :, None]
    points = (corners[face] * weight).sum(axis=1)
    normals = cross[face] / np.maximum(np.linalg.norm(cross[face], axis=1, keepdims=True), 1e-30)
    colours = None
    if mesh.vertex_colors is not None:
        colours = np.rint((mesh.vertex_colors[mesh.faces[face]] * weight).sum(axis=1)).astype(np.uint8)
    return points, normals, colours, float(np.sqrt(summed[-1] / count))
