"""Procedural objects for demos, tests and benchmarks: small parts with colours and known symmetries.

Parts are extruded outlines and surfaces of revolution, built in millimetres and returned in metres. Every part is
watertight by itself; an object of several parts is their concatenation, overlaps included.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from posekit.engine import Float64, Int32, Mesh, Symmetries, UInt8

EDGE_MM = 3.5  # length of a typical triangle's edge: the resolution of vertex colours

Rgb = tuple[int, int, int]
Paint = Rgb | Callable[[Float64], npt.NDArray[Any]]  # one colour, or vertices (V, 3) mm -> colours (V, 3)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An object with known geometry and symmetries.

    `symmetries` of the objects in SHAPES are the geometry's; their colours may tell symmetric poses apart.
    """

    name: str
    mesh: Mesh
    symmetries: Symmetries


@dataclass(frozen=True, kw_only=True)
class Part:
    """A closed surface with its colours; objects are assembled from parts."""

    vertices: Float64  # (V, 3) mm
    faces: Int32  # (F, 3), counter-clockwise seen from outside
    colors: UInt8  # (V, 3)

    def moved(self, offset: Sequence[float] = (0, 0, 0), R: Float64 | None = None) -> Part:
        """Return the part turned by R (3, 3) about the origin, then shifted by `offset` mm."""
        vertices = self.vertices if R is None else self.vertices @ R.T
        return Part(vertices=vertices + np.asarray(offset, dtype=np.float64), faces=self.faces, colors=self.colors)


# Outlines: (n, 2) mm, counter-clockwise.


def circle(radius: float, center: tuple[float, float] = (0, 0), segments: int | None = None) -> Float64:
    """Return a circle; with few `segments` a regular polygon, its first corner towards +x."""
    count = segments or max(24, int(np.ceil(2 * np.pi * radius / EDGE_MM)))
    angle = np.arange(count) * 2 * np.pi / count
    return np.asarray(center) + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1, dtype=np.float64)


def rectangle(width: float, height: float, center: tuple[float, float] = (0, 0), corner: float = 0) -> Float64:
    """Return a rectangle, `width` along x and `height` along y, with corners rounded by the radius `corner`."""
    w, h = width / 2 - corner, height / 2 - corner
    centers = np.array([[w, h], [-w, h], [-w, -h], [w, -h]]) + center
    if not corner:
        return centers
    arcs = []
    for quarter, c in enumerate(centers):
        angle = (quarter + np.linspace(0, 1, 6)) * np.pi / 2
        arcs.append(c + corner * np.stack([np.cos(angle), np.sin(angle)], axis=1))
    return np.concatenate(arcs)


def _resample(line: Float64, edge: float, closed: bool) -> Float64:
    """Return points along a polyline, its corners kept, no two further apart than `edge`."""
    ends = np.roll(line, -1, axis=0) if closed else line[1:]
    pieces = []
    for a, b in zip(line, ends, strict=False):
        steps = max(1, int(np.ceil(np.linalg.norm(b - a) / edge - 1e-9)))
        pieces.append(a + (b - a) * (np.arange(steps) / steps)[:, None])
    if not closed:
        pieces.append(line[-1:])
    return np.concatenate(pieces)


def _inside(points: Float64, loops: Sequence[Float64]) -> npt.NDArray[np.bool_]:
    """Apply the even-odd rule over all loops, so that a hole is just one more loop."""
    odd = np.zeros(len(points), dtype=np.bool_)
    x, y = points[:, :1], points[:, 1:]
    for loop in loops:
        a, b = loop, np.roll(loop, -1, axis=0)
        crosses = (a[:, 1] > y) != (b[:, 1] > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            at = a[:, 0] + (y - a[:, 1]) / (b[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0])
        odd ^= (np.count_nonzero(crosses & (x < at), axis=1) % 2).astype(np.bool_)
    return odd


# Solids.


def extrude(
    outline: Float64, height: float, paint: Paint, holes: Sequence[Float64] = (), edge: float = EDGE_MM
) -> Part:
    """Make a prism from z = 0 to `height`. Holes are outlines inside `outline`, each in any direction."""
    from scipy.spatial import Delaunay, cKDTree

    loops = [_resample(outline, edge, closed=True)]
    loops += [_resample(_clockwise(hole), edge, closed=True) for hole in holes]
    border = np.concatenate(loops)
    low, high = outline.min(axis=0), outline.max(axis=0)
    grid = np.stack(np.meshgrid(*(np.arange(a, b, edge) for a, b in zip(low, high, strict=True))), axis=-1)
    grid[1::2, :, 0] += edge / 2
    inner = grid.reshape(-1, 2)
    inner = inner[_inside(inner, loops)]
    inner = inner[cKDTree(border).query(inner)[0] > 0.8 * edge]
    flat = np.concatenate([border, inner])

    triangles = Delaunay(flat).simplices
    corners = flat[triangles]
    edges = corners[:, 1:] - corners[:, :1]
    area = edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0]
    triangles = np.where((area < 0)[:, None], triangles[:, ::-1], triangles)
    triangles = triangles[(np.abs(area) > 1e-6) & _inside(corners.mean(axis=1), loops)]

    layers = max(1, int(np.ceil(height / edge)))
    count, rim = len(flat), len(border)
    levels = height * np.arange(1, layers) / layers
    vertices = np.concatenate(
        [
            np.column_stack([flat, np.zeros(count)]),
            np.column_stack([flat, np.full(count, height)]),
            *[np.column_stack([border, np.full(rim, z)]) for z in levels],
        ]
    )
    starts = [0, *(2 * count + rim * i for i in range(layers - 1)), count]
    here = np.arange(rim)
    ahead = np.concatenate(
        [
            start + np.roll(np.arange(len(loop)), -1)
            for start, loop in zip(np.cumsum([0, *map(len, loops)]), loops, strict=False)
        ]
    )
    faces = [triangles[:, ::-1], triangles + count]
    for below, above in itertools.pairwise(starts):
        faces.append(np.stack([below + here, below + ahead, above + ahead], axis=1))
        faces.append(np.stack([below + here, above + ahead, above + here], axis=1))
    return painted(vertices, np.concatenate(faces), paint)


def revolve(profile: Sequence[tuple[float, float]], paint: Paint, edge: float = EDGE_MM) -> Part:
    """Turn a profile of (radius, z) about z. It starts and ends on the axis, with the outside to its right."""
    line = _resample(np.asarray(profile, dtype=np.float64), edge, closed=False)
    segments = max(48, int(np.ceil(2 * np.pi * line[:, 0].max() / edge)))
    angle = np.arange(segments) * 2 * np.pi / segments
    vertices: list[tuple[float, float, float]] = []
    rings = []
    for radius, z in line:
        start = len(vertices)
        if radius < 1e-9:
            vertices.append((0.0, 0.0, z))
            rings.append(np.full(segments, start))
        else:
            vertices.extend(zip(radius * np.cos(angle), radius * np.sin(angle), np.full(segments, z), strict=True))
            rings.append(start + np.arange(segments))
    faces = []
    for below, above in itertools.pairwise(rings):
        below_ahead, above_ahead = np.roll(below, -1), np.roll(above, -1)
        faces.append(np.stack([below, below_ahead, above_ahead], axis=1))
        faces.append(np.stack([below, above_ahead, above], axis=1))
    all_faces = np.concatenate(faces)
    a, b, c = all_faces.T
    return painted(np.asarray(vertices), all_faces[(a != b) & (b != c) & (a != c)], paint)


def bent(part: Part, radius: float) -> Part:
    """Bend a part that stands along z around the y axis; its middle line becomes an arc of `radius` about x = 0.

    Height z becomes the angle z / radius, from the +x axis towards +z.
    """
    x, y, z = part.vertices.T
    angle = z / radius
    vertices = np.stack([(radius + x) * np.cos(angle), y, (radius + x) * np.sin(angle)], axis=1)
    return Part(vertices=vertices, faces=part.faces, colors=part.colors)


def box(size: Sequence[float], paint: Paint, center: Sequence[float] = (0, 0, 0)) -> Part:
    """Make a cuboid around `center`. A paint that depends on the place sees it on z = 0, around the z axis."""
    part = extrude(rectangle(size[0], size[1]), size[2], paint)
    return part.moved((center[0], center[1], center[2] - size[2] / 2))


def _clockwise(loop: Float64) -> Float64:
    x, y = loop.T
    signed = float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))
    return loop[::-1] if signed > 0 else loop


def painted(vertices: Float64, faces: npt.NDArray[Any], paint: Paint) -> Part:
    """Make a part from vertices (V, 3) in mm and faces (F, 3)."""
    colors = paint(vertices) if callable(paint) else np.tile(np.asarray(paint), (len(vertices), 1))
    return Part(vertices=vertices, faces=faces.astype(np.int32), colors=np.asarray(colors, dtype=np.uint8))


def assembled(name: str, parts: Sequence[Part], symmetries: Symmetries | None = None) -> Shape:
    """Join several parts into one object in metres; `symmetries` in metres, None if there are none."""
    offsets = np.cumsum([0, *(len(part.vertices) for part in parts)])
    faces = [part.faces + offset for part, offset in zip(parts, offsets, strict=False)]
    mesh = Mesh(
        vertices_m=(np.concatenate([part.vertices for part in parts]) / 1000).astype(np.float32),
        faces=np.concatenate(faces).astype(np.int32),
        vertex_colors=np.concatenate([part.colors for part in parts]),
    )
    return Shape(name=name, mesh=mesh, symmetries=symmetries or Symmetries())


# Paint.


def bands(axis: int, width: float, *colors: Rgb) -> Paint:
    """Paint stripes of `width` mm across an axis."""

    def paint(vertices: Float64) -> npt.NDArray[Any]:
        return np.take(np.asarray(colors), np.floor(vertices[:, axis] / width).astype(int) % len(colors), axis=0)

    return paint


def _checks(width: float, *colors: Rgb) -> Paint:
    def paint(vertices: Float64) -> npt.NDArray[Any]:
        cells = np.floor(vertices / width + 1e-3).astype(int).sum(axis=1)
        return np.asarray(np.take(np.asarray(colors), cells % len(colors), axis=0))

    return paint


def _steps(axis: int, *colors_up_to: tuple[float, Rgb]) -> Paint:
    """Paint each colour up to its height in mm along an axis, the last one beyond it too."""
    limits = [limit for limit, _ in colors_up_to[:-1]]
    colors = [color for _, color in colors_up_to]

    def paint(vertices: Float64) -> npt.NDArray[Any]:
        return np.take(np.asarray(colors), np.searchsorted(limits, vertices[:, axis]), axis=0)

    return paint


# Rotations and symmetries.


def rotation(axis: Sequence[float], degrees: float) -> Float64:
    """Return the (3, 3) rotation about an axis through the origin, right-handed."""
    x, y, z = np.asarray(axis, dtype=np.float64) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross), dtype=np.float64)


def turns(axis: Sequence[float], count: int, point_mm: Sequence[float] = (0, 0, 0)) -> tuple[Float64, ...]:
    """Return the `count - 1` rotations about an axis through a point that map the object onto itself."""
    point = np.asarray(point_mm) / 1000
    found = []
    for turn in range(1, count):
        T = np.eye(4)
        T[:3, :3] = rotation(axis, 360 * turn / count)
        T[:3, 3] = point - T[:3, :3] @ point
        found.append(T)
    return tuple(found)


ABOUT_Z = Symmetries(continuous=((np.array([0.0, 0.0, 1.0]), np.zeros(3)),))


# The objects.


def _bracket() -> Shape:
    """Steel angle 110 x 70 x 50 mm; the origin lies in the outer corner."""
    steel, dark = (150, 158, 168), (70, 80, 96)
    long = extrude(rectangle(110, 50, (55, 25)), 7, steel, [circle(7, (45, 25)), circle(9, (85, 25))])
    short = extrude(rectangle(70, 50, (35, 25)), 7, dark, [rectangle(26, 12, (42, 25), corner=5)])
    upright = short.moved((7, 0, 0), rotation((0, 1, 0), -90))
    rib = extrude(np.array([[0.0, 0.0], [34, 0], [0, 34]]), 6, (214, 122, 40), edge=3)
    return assembled("bracket", [long, upright, rib.moved((6, 9, 6), rotation((1, 0, 0), 90))])


def _mug() -> Shape:
    """Mug of 80 mm with a handle towards +x; the origin lies in the middle of its foot."""

    def paint(vertices: Float64) -> npt.NDArray[Any]:
        x, y, z = vertices.T
        wave = (z > 30 + 5 * np.sin(5 * np.arctan2(y, x))) & (z < 62 + 5 * np.sin(5 * np.arctan2(y, x)))
        outside = np.hypot(x, y) > 38.5
        return np.where((wave & outside)[:, None], (36, 110, 168), (238, 232, 220))

    profile = [(0, 0), (36, 0), (40, 4), (40, 93), (39, 95), (37.5, 95), (36.5, 93), (36.5, 7), (34, 5), (0, 5)]
    handle = extrude(circle(5.5, segments=20), 26 * np.pi, (36, 110, 168))
    around = bent(handle, 26).moved((0, 0, 0), rotation((0, 1, 0), 90)).moved((38, 0, 48))
    return assembled("mug", [revolve(profile, paint), around])


def _flange() -> Shape:
    """Flange of 120 mm with a hub, six holes and a notch in the rim."""
    notch = np.array([[52.0, 7.0], [52, -7]])
    rim = circle(60)
    rim = rim[np.abs(np.arctan2(rim[:, 1], rim[:, 0])) > 0.12]
    outline = np.concatenate([notch[::-1], rim[np.argsort(np.mod(np.arctan2(rim[:, 1], rim[:, 0]), 2 * np.pi))]])
    angles = np.radians(30 + 60 * np.arange(6))
    holes = [circle(6, (44 * float(np.cos(a)), 44 * float(np.sin(a)))) for a in angles]
    plate = extrude(np.roll(outline, -1, axis=0), 12, (168, 172, 176), [*holes, circle(20)])
    hub = extrude(circle(30), 26, (120, 128, 140), [circle(20)])
    return assembled("flange", [plate, hub.moved((0, 0, 11))])


def _gear() -> Shape:
    """Gear of 96 mm with 16 teeth and a hub on one side."""
    teeth = 16
    corner = np.array([[-0.30, 40.0], [-0.14, 48], [0.14, 48], [0.30, 40]])
    angle = ((np.arange(teeth)[:, None] + corner[:, 0]) * 2 * np.pi / teeth).ravel()
    radius = np.tile(corner[:, 1], teeth)
    outline = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)

    def paint(vertices: Float64) -> npt.NDArray[Any]:
        ring = np.hypot(vertices[:, 0], vertices[:, 1])
        return np.where(((ring > 24) & (ring < 35))[:, None], (150, 96, 30), (206, 150, 60))

    wheel = extrude(outline, 16, paint, [circle(9)])
    hub = extrude(circle(18), 14, (206, 150, 60), [circle(9)])
    return assembled("gear", [wheel, hub.moved((0, 0, 15))], Symmetries(discrete=turns((0, 0, 1), teeth)))


def _bolt() -> Shape:
    """Hexagon bolt of 90 mm; the six-fold symmetry is that of its head."""
    head = extrude(circle(21, segments=6), 14, (172, 172, 178))
    shank = revolve([(0, 0), (10, 0), (11.5, 2), (11.5, 76), (0, 76)], bands(2, 4, (120, 122, 128), (150, 152, 160)))
    return assembled("bolt", [head.moved((0, 0, 75)), shank], Symmetries(discrete=turns((0, 0, 1), 6)))


def _bottle() -> Shape:
    """Bottle of 190 mm; the origin lies in the middle of its foot."""
    green = (40, 120, 80)
    paint = _steps(2, (35, green), (100, (240, 226, 180)), (108, (190, 60, 50)), (172, green), (0, (210, 60, 48)))
    arc = [(33 - 20 * (1 - np.cos(a)), 118 + 32 * np.sin(a)) for a in np.linspace(0, np.pi / 2, 12)]
    profile = [(0, 0), (30, 0), (33, 3), (33, 118), *arc[1:], (13, 172), (15.5, 172), (15.5, 190), (0, 190)]
    return assembled("bottle", [revolve(profile, paint)], ABOUT_Z)


def _stepped() -> Shape:
    """Staircase of four unequal steps, 120 x 60 x 72 mm."""
    steps = [(0, 0), (120, 0), (120, 16), (86, 16), (86, 34), (60, 34), (60, 58), (26, 58), (26, 72), (0, 72)]
    outline = np.array(steps, dtype=np.float64)
    paint = _steps(1, (16.5, (64, 92, 150)), (34.5, (92, 130, 190)), (58.5, (150, 178, 214)), (0, (226, 232, 238)))
    return assembled("stepped", [extrude(outline, 60, paint).moved((-50, -30, -30))])


def _carton() -> Shape:
    """Box of 130 x 90 x 60 mm whose sides differ in colour only."""

    def paint(vertices: Float64) -> npt.NDArray[Any]:
        towards = [(206, 62, 54), (240, 196, 70), (52, 120, 190)]  # +x, +y, +z
        away = [(236, 236, 228), (70, 160, 90), (230, 126, 50)]
        colors = np.array([*towards, *away])
        nearest = np.concatenate([vertices / (65, 45, 30), -vertices / (65, 45, 30)], axis=1).argmax(axis=1)
        x, y, z = vertices.T
        label = (np.abs(x) < 40) & (np.abs(y) < 14) & (np.abs(z) > 29)
        return np.where(label[:, None], (40, 44, 60), colors[nearest])

    symmetries = Symmetries(discrete=turns((1, 0, 0), 2) + turns((0, 1, 0), 2) + turns((0, 0, 1), 2))
    return assembled("carton", [box((130, 90, 60), paint)], symmetries)


def _tee() -> Shape:
    """T-profile, 100 mm long; half a turn about its stem maps it onto itself."""
    outline = np.array([[-40.0, 50], [-40, 38], [-6, 38], [-6, 0], [6, 0], [6, 38], [40, 38], [40, 50]])
    part = extrude(outline, 100, bands(2, 12.5, (186, 190, 196), (126, 134, 146))).moved((0, -28, -50))
    return assembled("tee", [part], Symmetries(discrete=turns((0, 1, 0), 2)))


def _adapter() -> Shape:
    """Conical adapter, 100 mm wide and 84 mm high, hollow."""
    profile = [(0, 6), (0, 0), (50, 0), (50, 14), (44, 14), (22, 58), (22, 84), (17, 84), (17, 58), (36, 20), (0, 20)]
    paint = _steps(2, (14.5, (60, 64, 74)), (36, (226, 140, 40)), (58.5, (236, 186, 70)), (0, (60, 64, 74)))
    return assembled("adapter", [revolve(profile[1:], paint).moved((0, 0, -42))], ABOUT_Z)


def _elbow() -> Shape:
    """Pipe elbow with a collar at each end and a longer straight piece at one of them."""
    copper, brass = (190, 108, 70), (214, 172, 84)
    ring, bore = circle(17), circle(13)
    arc = bent(extrude(ring, 45 * np.pi / 2, copper, [bore]), 45)
    straight = extrude(ring, 40, copper, [bore]).moved((45, 0, -40))
    collar = extrude(circle(23), 12, brass, [bore])
    far = collar.moved((0, 0, 0), rotation((0, 1, 0), -90)).moved((0, 0, 45))
    parts = [arc, straight, collar.moved((45, 0, -46)), far]
    return assembled("elbow", [part.moved((-25, 0, -15)) for part in parts])


def _wedge() -> Shape:
    """Wedge of 110 x 50 x 44 mm."""
    outline = np.array([[0.0, 0], [110, 0], [110, 8], [14, 44], [0, 44]])
    paint = _checks(14, (184, 52, 66), (232, 216, 206))
    return assembled("wedge", [extrude(outline, 50, paint).moved((-45, -18, -25))])


def _housing() -> Shape:
    """Pump housing of 150 mm, without any symmetry: the demo's object."""
    blue, steel, orange, dark = (38, 98, 168), (176, 182, 190), (232, 128, 36), (52, 58, 70)
    holes = [circle(5, (x, y)) for x, y in ((-58, -34), (-58, 34), (58, -34), (58, 34))]
    base = extrude(rectangle(136, 88, corner=10), 12, steel, holes)
    body = revolve([(0, 0), (33, 0), (33, 44), (29, 50), (22, 50), (22, 30), (0, 30)], blue).moved((-24, 2, 11))
    lid = extrude(circle(14, segments=6), 10, orange).moved((-24, 2, 40))
    pipe = extrude(circle(13), 52, blue, [circle(9)]).moved((0, 0, 0), rotation((0, 1, 0), 90)).moved((4, 2, 34))
    collar = extrude(circle(20), 8, orange, [circle(9)]).moved((0, 0, 0), rotation((0, 1, 0), 90)).moved((54, 2, 34))
    post = box((16, 20, 30), dark, (40, -26, 26))
    plug = revolve([(0, 0), (7, 0), (7, 14), (0, 14)], orange).moved((40, -26, 40))
    rib = extrude(np.array([[0.0, 0], [30, 0], [0, 26]]), 8, blue, edge=3)
    rib = rib.moved((-28, 32, 11), rotation((1, 0, 0), 90) @ rotation((0, 1, 0), 0)).moved((0, 8, 0))
    return assembled("housing", [base, body, lid, pipe, collar, post, plug, rib])


SHAPES: dict[str, Callable[[], Shape]] = {
    "bracket": functools.cache(_bracket),
    "mug": functools.cache(_mug),
    "flange": functools.cache(_flange),
    "gear": functools.cache(_gear),
    "bolt": functools.cache(_bolt),
    "bottle": functools.cache(_bottle),
    "stepped": functools.cache(_stepped),
    "carton": functools.cache(_carton),
    "tee": functools.cache(_tee),
    "adapter": functools.cache(_adapter),
    "elbow": functools.cache(_elbow),
    "wedge": functools.cache(_wedge),
    "housing": functools.cache(_housing),
}


def mesh_to_ply(mesh: Mesh, unit: Literal["mm", "m"] = "mm") -> bytes:
    """Write a mesh as a binary PLY file, with its colours if it has any; lengths in `unit`."""
    fields: list[tuple[str, str]] = [("x", "<f4"), ("y", "<f4"), ("z", "<f4")]
    if mesh.vertex_colors is not None:
        fields += [("red", "u1"), ("green", "u1"), ("blue", "u1")]
    vertices = np.zeros(len(mesh.vertices_m), dtype=fields)
    lengths = mesh.vertices_m * np.float32(1000 if unit == "mm" else 1)
    for index, name in enumerate("xyz"):
        vertices[name] = lengths[:, index]
    if mesh.vertex_colors is not None:
        for index, name in enumerate(("red", "green", "blue")):
            vertices[name] = mesh.vertex_colors[:, index]
    faces = np.zeros(len(mesh.faces), dtype=[("count", "u1"), ("corners", "<i4", 3)])
    faces["count"] = 3
    faces["corners"] = mesh.faces
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment lengths in {unit}",
        f"element vertex {len(vertices)}",
        *(f"property {'float' if kind == '<f4' else 'uchar'} {name}" for name, kind in fields),
        f"element face {len(faces)}",
        "property list uchar int vertex_indices",
        "end_header",
    ]
    return ("\n".join(header) + "\n").encode() + vertices.tobytes() + faces.tobytes()
