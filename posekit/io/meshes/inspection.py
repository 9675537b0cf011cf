"""Interpret a mesh in metres, and report what is likely to cause trouble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from posekit.engine import Mesh
from posekit.io.meshes.formats import UNIT_OF, Unit
from posekit.io.meshes.raw import Float64, Int64, RawMesh, unique_rows
from posekit.units import METRES_OF, MM_PER_M, m_to_mm

MANY_FACES = 500_000  # more than any pose engine gains from
METRES_BELOW = 3.0  # unit "auto": an object of 5 mm to 3 m, so a smaller diameter is in metres
SMALL_MM, LARGE_MM = 5.0, 3000.0


@dataclass(frozen=True, kw_only=True)
class HealthReport:
    """A CAD model's properties and problems, for the person who sent it."""

    faces: int
    watertight: bool
    extents_mm: tuple[float, float, float]
    diameter_mm: float
    warnings: list[str]


def resolve_unit(raw: RawMesh, unit: Literal["mm", "m", "auto"] | None, cad_format: str) -> tuple[Unit, str | None]:
    """The unit of a mesh's file (None: its format's), and for `auto` a sentence that reports the guess.

    Objects for pose estimation measure 5 mm to 3 m: a diameter below 3 is in metres, any other in millimetres.
    """
    if unit is None:
        return UNIT_OF.get(cad_format, "mm"), None
    if unit != "auto":
        return unit, None
    diameter = diameter_m(raw.vertices)
    guess: Unit = "m" if diameter < METRES_BELOW else "mm"
    other: Unit = "mm" if guess == "m" else "m"
    named = {"m": "metres", "mm": "millimetres"}[guess]
    return guess, (
        f'model_unit "auto" took the file to be in {named}: its diameter reads {diameter:.4g}; if that is wrong, send '
        f'model_unit: "{other}"'
    )


def to_mesh(raw: RawMesh, unit: Unit) -> Mesh:
    """Return the mesh in metres, as the engines take it."""
    return Mesh(
        vertices_m=(raw.vertices * METRES_OF[unit]).astype(np.float32),
        faces=raw.faces.astype(np.int32),
        vertex_colors=raw.vertex_colors,
    )


def health(raw: RawMesh, mesh: Mesh) -> HealthReport:
    """Report a mesh's properties, and what is likely to cause trouble, for the person who sent it."""
    vertices = mesh.vertices_m.astype(np.float64)
    extents = m_to_mm(np.ptp(vertices, axis=0))
    diameter_mm = diameter_m(vertices) * MM_PER_M
    watertight = is_watertight(vertices, mesh.faces)
    notes = list(raw.warnings)
    if diameter_mm < SMALL_MM:
        notes.append(f'the object is only {diameter_mm:.3g} mm across; if the file is in metres, send model_unit: "m"')
    elif diameter_mm > LARGE_MM:
        notes.append(f'the object is {diameter_mm:.0f} mm across; if the file is in millimetres, send model_unit: "mm"')
    if not watertight:
        notes.append("the mesh is not watertight: it has holes or edges that do not belong to exactly two faces")
    if len(mesh.faces) > MANY_FACES:
        notes.append(f"the mesh has {len(mesh.faces)} faces; some ten thousand give the same poses, sooner")
    centre_mm = float(np.linalg.norm(vertices.min(axis=0) + vertices.max(axis=0))) * 500.0
    if centre_mm > 5.0 * diameter_mm:
        notes.append(
            f"the mesh lies {centre_mm:.0f} mm from its own origin, which is what translations refer to; is that meant?"
        )
    return HealthReport(
        faces=len(mesh.faces),
        watertight=watertight,
        extents_mm=(float(extents[0]), float(extents[1]), float(extents[2])),
        diameter_mm=diameter_mm,
        warnings=notes,
    )


def is_watertight(vertices: npt.NDArray[Any], faces: npt.NDArray[Any]) -> bool:
    """Return True if every edge belongs to exactly two faces. Vertices at the same place count as one."""
    _, place = unique_rows(vertices.astype(np.float64))
    corners = place[faces]
    edges = np.sort(np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]]), axis=1)
    _, counts = np.unique(edges[:, 0] * len(vertices) + edges[:, 1], return_counts=True)
    return bool((counts == 2).all())


def diameter_m(vertices: npt.NDArray[Any]) -> float:
    """Return the largest distance between two of (V, 3) vertices, in their own unit (metres in, metres out).

    Exact up to 1000 vertices. Beyond that, the search starts from the extreme points of 256 directions and walks to the
    furthest vertex and back until that gains nothing: a lower bound, in practice the diameter itself.
    """
    points = np.unique(_extreme_points(vertices.astype(np.float64)), axis=0)
    squared = np.square(points[:, None] - points[None]).sum(axis=2)
    largest = float(squared.max(initial=0.0))
    everything = vertices.astype(np.float64) if len(points) < len(vertices) else points
    for start in np.unique(np.unravel_index(np.argsort(squared, axis=None)[-16:], squared.shape)[0]):
        here, reached = points[start], -1.0
        for _ in range(100):  # two or three in practice
            distances = np.square(everything - here).sum(axis=1)
            furthest = int(distances.argmax())
            if distances[furthest] <= reached:
                break
            here, reached = everything[furthest], float(distances[furthest])
        largest = max(largest, reached)
    return float(np.sqrt(largest))


def _extreme_points(points: Float64) -> Float64:
    """Return the outermost points in 256 directions spread evenly over the sphere; all points if there are few."""
    if len(points) <= 1000:
        return points
    index = np.arange(256) + 0.5
    z, turn = 1.0 - index / 256.0, np.pi * (1.0 + 5.0**0.5) * index  # half the sphere: both ends of a line are kept
    radius = np.sqrt(1.0 - z * z)
    directions = np.column_stack([radius * np.cos(turn), radius * np.sin(turn), z])
    across = np.ascontiguousarray(points.T)
    chosen: list[Int64] = []
    for block in np.split(directions, 32):
        along = block @ across  # (8, V)
        chosen += [along.argmin(axis=1), along.argmax(axis=1)]
    return points[np.unique(np.concatenate(chosen))]
