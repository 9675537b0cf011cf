"""The objects of the accuracy benchmark: random members of families of parts, with their true symmetries.

    shapes = objects(seed=0, count=24)

A symmetry is listed if shape and colour agree on it: a box whose sides are painted differently has none. Frames are
as different as in real CAD files: axes point along any side, origins lie in a corner or beside the part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from posekit.engine import Float64, Symmetries
from posekit.synthetic.shapes import (
    ABOUT_Z,
    Paint,
    Part,
    Rgb,
    Shape,
    assembled,
    bands,
    bent,
    box,
    circle,
    extrude,
    painted,
    rectangle,
    revolve,
    rotation,
    turns,
)

Member = tuple[list[Part], Symmetries]
Random = np.random.Generator
Maker = Callable[[Random], Member]

X, Y, Z = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
UP_TO_X = rotation(Y, 90)  # turns a part's z axis into x
NONE = Symmetries()

COLORS: tuple[Rgb, ...] = (
    (176, 180, 186),
    (118, 124, 132),
    (66, 72, 82),
    (206, 150, 60),
    (190, 108, 70),
    (196, 58, 52),
    (232, 128, 36),
    (238, 200, 70),
    (70, 150, 84),
    (40, 132, 140),
    (44, 104, 176),
    (110, 80, 150),
    (236, 232, 222),
    (146, 104, 74),
)
SIGNALS: tuple[Rgb, ...] = (  # any two can be told apart in light and in shade
    (200, 50, 46),
    (240, 204, 60),
    (64, 156, 78),
    (40, 100, 184),
    (124, 74, 156),
    (240, 236, 228),
    (44, 48, 56),
)


def objects(seed: int, count: int) -> list[Shape]:
    """Make `count` objects of 60 to 250 mm. Each family has a member before any has two; so do a family's variants."""
    shapes = []
    for index in range(count):
        place, member = index % len(FAMILIES), index // len(FAMILIES)
        name, variants = list(FAMILIES.items())[place]
        order = np.random.default_rng([seed, place]).permutation(len(variants))
        rng = np.random.default_rng([seed, place, 1 + member])
        parts, symmetries = variants[order[member % len(variants)]](rng)
        shapes.append(assembled(f"{name}-{1 + member}", *_reframed(parts, symmetries, rng)))
    return shapes


# Random choices.


def _between(rng: Random, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def _colors(rng: Random, count: int) -> list[Rgb]:
    """Choose colours that differ from each other, in any order."""
    return [COLORS[index] for index in rng.permutation(len(COLORS))[:count]]


def _signals(rng: Random, count: int) -> list[Rgb]:
    """Choose colours for objects whose poses only colour can tell apart."""
    return [SIGNALS[index] for index in rng.permutation(len(SIGNALS))[:count]]


def _finish(rng: Random, axis: int) -> Paint:
    """Choose a finish: most parts have one colour, some are banded across an axis."""
    one, two = _colors(rng, 2)
    return one if rng.random() < 0.65 else bands(axis, _between(rng, 12, 30), one, two)


def _reframed(parts: Sequence[Part], symmetries: Symmetries, rng: Random) -> Member:
    """Put the object into another frame: axes exchanged, origin elsewhere; every third object keeps its own."""
    if rng.random() < 1 / 3:
        return list(parts), symmetries
    T = np.eye(4)
    T[:3, :3] = rotation(X, 90 * int(rng.integers(4))) @ rotation((X, Y, Z)[rng.integers(3)], 90)
    T[:3, :3] = np.rint(T[:3, :3])
    T[:3, 3] = rng.uniform(-80, 80, 3) / 1000
    back = np.linalg.inv(T)
    moved = [part.moved((1000 * T[:3, 3]).tolist(), T[:3, :3]) for part in parts]
    discrete = tuple(T @ S @ back for S in symmetries.discrete)
    continuous = tuple((T[:3, :3] @ axis, T[:3, :3] @ offset + T[:3, 3]) for axis, offset in symmetries.continuous)
    return moved, Symmetries(discrete=discrete, continuous=continuous)


# Symmetries and paint.


def _turned(count: int) -> Symmetries:
    """Return the symmetries of a part that looks the same `count` times in a turn about z."""
    return Symmetries(discrete=turns(Z, count))


def _dihedral(count: int, middle_mm: float, first_deg: float = 0.0) -> Symmetries:
    """Return the symmetries of a prism: turns about z, and half turns about lines across z at height `middle_mm`.

    `first_deg`: direction of one of these lines, from x.
    """
    angles = np.radians(first_deg + 180 * np.arange(count) / count)
    flips = [turns((float(np.cos(a)), float(np.sin(a)), 0), 2, (0, 0, middle_mm))[0] for a in angles]
    return Symmetries(discrete=(*turns(Z, count), *flips))


def _round(height_mm: float | None = None) -> Symmetries:
    """Return the symmetries of a part turned about z; with its height, also those of standing on its head."""
    if height_mm is None:
        return ABOUT_Z
    return Symmetries(discrete=turns(X, 2, (0, 0, height_mm / 2)), continuous=ABOUT_Z.continuous)


def _painted_over(parts: Sequence[Part], paint: Callable[[Float64], npt.NDArray[Any]]) -> list[Part]:
    """Paint by the place in the finished object, so that surfaces that coincide agree."""
    return [replace(part, colors=np.asarray(paint(part.vertices), dtype=np.uint8)) for part in parts]


# More outlines and solids.


def _keyed(radius: float, half_width: float, depth: float) -> Float64:
    """Return a circle with a rectangular key towards +x: `depth` beyond the circle, a notch if negative."""
    start = float(np.arcsin(half_width / radius))
    angle = np.linspace(start, 2 * np.pi - start, max(24, round(2 * radius)))
    arc = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.concatenate([arc, [[radius + depth, -half_width], [radius + depth, half_width]]])


def _toothed(teeth: int, root: float, tip: float) -> Float64:
    """Return a gear's outline; the middle of a tooth points towards +x."""
    corner = np.array([[-0.30, root], [-0.14, tip], [0.14, tip], [0.30, root]])
    angle = ((np.arange(teeth)[:, None] + corner[:, 0]) * 2 * np.pi / teeth).ravel()
    radius = np.tile(corner[:, 1], teeth)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _slot(length: float, width: float, center: tuple[float, float]) -> Float64:
    return rectangle(length, width, center, corner=0.49 * width)


def _on_circle(count: int, radius: float, hole: float, first_deg: float = 0.0) -> list[Float64]:
    """Return equal holes on a pitch circle."""
    angles = np.radians(first_deg) + np.arange(count) * 2 * np.pi / count
    return [circle(hole, (radius * float(np.cos(a)), radius * float(np.sin(a)))) for a in angles]


def _loft(sections: Float64, paint: Paint) -> Part:
    """Make a solid through cross-sections (S, n, 3) mm, each counter-clockwise seen against the direction of travel."""
    count, corners = sections.shape[:2]
    vertices = np.concatenate([sections.reshape(-1, 3), sections[[0, -1]].mean(axis=1)])
    here = np.arange(corners)
    ahead = np.roll(here, -1)
    faces = []
    for below, above in itertools.pairwise(corners * np.arange(count)):
        faces.append(np.stack([below + here, below + ahead, above + ahead], axis=1))
        faces.append(np.stack([below + here, above + ahead, above + here], axis=1))
    last = corners * (count - 1)
    faces.append(np.stack([np.full(corners, count * corners), ahead, here], axis=1))
    faces.append(np.stack([np.full(corners, count * corners + 1), last + here, last + ahead], axis=1))
    return painted(vertices, np.concatenate(faces), paint)


def _swept(spine: Float64, sections: Float64, paint: Paint) -> Part:
    """Carry sections (S, n, 2) along a spine (S, 2) in the xz plane; their second axis stays y."""
    tangent = np.gradient(spine, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    normal = np.stack([tangent[:, 1], np.zeros(len(spine)), -tangent[:, 0]], axis=1)
    at = np.stack([spine[:, 0], np.zeros(len(spine)), spine[:, 1]], axis=1)
    return _loft(at[:, None] + sections[..., :1] * normal[:, None] + sections[..., 1:] * np.array(Y), paint)


def _rounded(half_x: float, half_y: float, power: float, points: int = 48) -> Float64:
    """Return a superellipse: an ellipse for power 2, nearly a rectangle for 8."""
    angle = np.arange(points) * 2 * np.pi / points
    c, s = np.cos(angle), np.sin(angle)
    radius = (np.abs(c) ** power + np.abs(s) ** power) ** (-1 / power)
    return np.stack([half_x * radius * c, half_y * radius * s], axis=1)


# Profiles: sheets and bars.


def _angle(rng: Random) -> Member:
    """An L of two unequal legs, one with a slot, the other with a hole off its middle."""
    long, short, width, sheet = (_between(rng, *r) for r in ((95, 165), (45, 75), (45, 80), (5, 9)))
    paint = _finish(rng, 1)
    slot = _slot(_between(rng, 18, 28), _between(rng, 8, 12), (0.7 * long, 0.38 * width))
    leg = extrude(rectangle(long, width, (long / 2, width / 2)), sheet, paint, [slot])
    hole = circle(_between(rng, 5, 9), (0.6 * short, 0.66 * width))
    upright = extrude(rectangle(short, width, (short / 2, width / 2)), sheet, paint, [hole])
    return [leg, upright.moved((sheet, 0, 0), rotation(Y, -90))], NONE


def _channel(rng: Random) -> Member:
    """A U whose web has a slot near one end; its flanges may differ in height."""
    length, width, sheet = (_between(rng, *r) for r in ((110, 190), (40, 75), (5, 8)))
    low = _between(rng, 22, 34)
    high = low + (_between(rng, 12, 20) if rng.random() < 0.5 else 0)
    paint = _colors(rng, 1)[0]
    slot = _slot(_between(rng, 20, 34), _between(rng, 9, 14), (_between(rng, 0.2, 0.3) * length, 0))
    web = extrude(rectangle(length, width), sheet, paint, [slot])
    flanges = [
        box((length, sheet, height), paint, (0, side * (width - sheet) / 2, height / 2))
        for side, height in ((-1, low), (1, high))
    ]
    return [web, *flanges], NONE


def _tee(rng: Random) -> Member:
    """A T-profile: half a turn about its stem maps it onto itself."""
    length, width, height = (_between(rng, *r) for r in ((60, 170), (46, 80), (36, 65)))
    w, t = width / 2, _between(rng, 8, 12)
    outline = [(-w, height), (-w, height - t), (-t / 2, height - t), (-t / 2, 0)]
    outline += [(-x, y) for x, y in reversed(outline)]
    part = extrude(np.array(outline), length, _colors(rng, 1)[0]).moved((0, 0, -length / 2))
    return [part], Symmetries(discrete=turns(Y, 2))


def _zed(rng: Random) -> Member:
    """A Z-profile: half a turn about its length maps it onto itself."""
    length, height, top, t = (_between(rng, *r) for r in ((54, 160), (40, 70), (22, 40), (7, 10)))
    half = [(t / 2, -height / 2), (t / 2, height / 2 - t), (top, height / 2 - t), (top, height / 2)]
    outline = np.array([*half, *((-x, -y) for x, y in half)])
    return [extrude(outline, length, _colors(rng, 1)[0])], _turned(2)


def _tube(rng: Random) -> Member:
    """A rectangular tube; where the bore is off its middle, one half turn is left of three."""
    length, width, height = (_between(rng, *r) for r in ((80, 180), (46, 70), (26, 40)))
    off = _between(rng, 6, 9) if rng.random() < 0.5 else 0.0
    bore = rectangle(width - 10 - 2 * off, height - 10, (off, 0))
    part = extrude(rectangle(width, height), length, _colors(rng, 1)[0], [bore])
    return [part], Symmetries(discrete=turns(X, 2, (0, 0, length / 2))) if off else _dihedral(2, length / 2)


# Brackets.


def _ribbed(rng: Random) -> Member:
    """An angle bracket with bolt holes and a rib beside its middle."""
    long, width, sheet = (_between(rng, *r) for r in ((70, 140), (44, 64), (5, 9)))
    short = _between(rng, 0.55, 0.65) * long
    plain, other = _colors(rng, 2)
    holes = [circle(_between(rng, 0.05, 0.07) * long, (x * long, width / 2)) for x in (0.55, 0.82)]
    leg = extrude(rectangle(long, width, (long / 2, width / 2)), sheet, plain, holes)
    hole = circle(_between(rng, 0.11, 0.15) * short, (0.66 * short, width / 2))
    upright = extrude(rectangle(short, width, (short / 2, width / 2)), sheet, plain, [hole])
    side = _between(rng, 0.42, 0.5) * short
    rib = extrude(np.array([[0.0, 0], [side, 0], [0, side]]), 6, other if rng.random() < 0.5 else plain, edge=3)
    rib = rib.moved((sheet - 1, _between(rng, 9, 14), sheet - 1), rotation(X, 90))
    return [leg, upright.moved((sheet, 0, 0), rotation(Y, -90)), rib], NONE


def _bearing(rng: Random) -> Member:
    """A bearing block that stands off the middle of its base."""
    length, width, radius = (_between(rng, *r) for r in ((110, 160), (36, 56), (20, 28)))
    plain, other = _colors(rng, 2)
    holes = [circle(_between(rng, 5, 7), (x * length, 0)) for x in (-0.4, 0.4)]
    base = extrude(rectangle(length, width, corner=6), 10, plain, holes)
    height = _between(rng, 14, 30)
    angle = np.linspace(0, np.pi, 24)
    arch = np.stack([radius * np.cos(angle), height + radius * np.sin(angle)], axis=1)
    outline = np.concatenate([[[-radius, 0], [radius, 0]], arch])
    block = extrude(outline, 0.7 * width, other, [circle(0.55 * radius, (0, height))])
    return [base, block.moved((0.12 * length, 0.35 * width, 9), rotation(X, 90))], NONE


def _corner(rng: Random) -> Member:
    """Three unequal plates that meet in a corner."""
    a = _between(rng, 65, 130)
    b, c = _between(rng, 0.66, 0.74) * a, _between(rng, 0.42, 0.5) * a
    sheet = _between(rng, 5, 8)
    one, two = _colors(rng, 2)
    hole = circle(_between(rng, 0.06, 0.08) * a, (0.6 * a, 0.62 * b))
    floor = extrude(rectangle(a, b, (a / 2, b / 2)), sheet, one, [hole])
    back = box((a, sheet, c), one, (a / 2, sheet / 2, c / 2))
    side = box((sheet, b, c), two if rng.random() < 0.5 else one, (sheet / 2, b / 2, c / 2))

    def paint(vertices: Float64) -> npt.NDArray[Any]:
        on_side = (vertices[:, 0] < sheet + 0.1) & (vertices[:, 1] > sheet) & (vertices[:, 2] > sheet)
        return np.where(on_side[:, None], side.colors[0], one)

    return _painted_over([floor, back, side], paint), NONE


# Flanges.


def _disc_and_hub(rng: Random, outline: Float64, radius: float, holes: list[Float64]) -> list[Part]:
    """Make a plate with a bore, and a hub on one of its sides."""
    bore, rim = _between(rng, 0.26, 0.34) * radius, _between(rng, 0.44, 0.52) * radius
    plate, hub = _colors(rng, 2)
    sheet = _between(rng, 8, 14)
    collar = extrude(circle(rim), _between(rng, 12, 40), hub, [circle(bore)])
    return [extrude(outline, sheet, plate, [*holes, circle(bore)]), collar.moved((0, 0, sheet - 1))]


def _flange(rng: Random) -> Member:
    """Equal holes around a hub."""
    radius, count = _between(rng, 29, 75), int(rng.integers(3, 9))
    holes = _on_circle(count, 0.76 * radius, _between(rng, 0.08, 0.12) * radius)
    return _disc_and_hub(rng, circle(radius), radius, holes), _turned(count)


def _notched_flange(rng: Random) -> Member:
    """Equal holes around a hub, and a notch in the rim."""
    radius, count = _between(rng, 36, 75), int(rng.integers(4, 9))
    holes = _on_circle(count, 0.72 * radius, 0.09 * radius, 180 / count)
    outline = _keyed(radius, _between(rng, 5, 9), -_between(rng, 9, 13))
    return _disc_and_hub(rng, outline, radius, holes), NONE


def _unequal_flange(rng: Random) -> Member:
    """One of the holes is larger than the others."""
    radius, count = _between(rng, 36, 75), int(rng.integers(3, 7))
    holes = _on_circle(count, 0.74 * radius, 0.08 * radius)
    holes[0] = circle(0.15 * radius, (0.74 * radius, 0))
    return _disc_and_hub(rng, circle(radius), radius, holes), NONE


def _flat_flange(rng: Random) -> Member:
    """A ring with equal holes and no hub: it may also lie on its other side."""
    radius, count, sheet = _between(rng, 29, 75), int(rng.integers(3, 9)), _between(rng, 10, 20)
    holes = [*_on_circle(count, 0.74 * radius, 0.1 * radius), circle(_between(rng, 0.34, 0.48) * radius)]
    return [extrude(circle(radius), sheet, _colors(rng, 1)[0], holes)], _dihedral(count, sheet / 2)


# Mugs.


def _cup(rng: Random, radius: float, height: float, flare: float, paint: Paint) -> Part:
    wall = _between(rng, 3, 4.5)
    foot = radius / flare
    inner, deep = radius - wall, foot - wall
    outside = [(0, 0), (foot - 3, 0), (foot, 3), (radius, height - 1.5), (radius - 1.5, height)]
    inside = [(inner + 0.5, height), (inner, height - 2), (deep, 8), (deep - 3, 6), (0, 6)]
    return revolve([*outside, *inside], paint, edge=5)


def _handle(radius: float, reach: float, thick: float, height: float, paint: Paint) -> Part:
    """Make a half ring towards +x that grows out of a wall at `radius`."""
    ring = bent(extrude(circle(thick, segments=20), reach * np.pi, paint), reach)
    return ring.moved((0, 0, 0), rotation(Y, 90)).moved((radius - 1.5, 0, height / 2))


def _mug(rng: Random) -> Member:
    radius, height = _between(rng, 26, 46), _between(rng, 58, 125)
    cup, other = _colors(rng, 2)
    low, high = 0.3 * height, _between(rng, 0.55, 0.75) * height
    striped = rng.random() < 0.5

    def paint(vertices: Float64) -> npt.NDArray[Any]:
        within = (vertices[:, 2] > low) & (vertices[:, 2] < high) & (np.hypot(*vertices.T[:2]) > radius - 2)
        return np.where((striped & within)[:, None], other, cup)

    body = _cup(rng, radius, height, 1.02, paint)
    return [body, _handle(radius, 0.27 * height, _between(rng, 4.5, 7), height, other)], NONE


def _bowl(rng: Random) -> Member:
    """A cup with two equal handles: half a turn maps it onto itself."""
    radius, height = _between(rng, 32, 58), _between(rng, 46, 80)
    cup, other = _colors(rng, 2)
    body = _cup(rng, radius, height, 1.12, cup)
    handle = _handle(radius - 2, 0.28 * height, 5, height, other)
    return [body, handle, handle.moved(R=rotation(Z, 180))], _turned(2)


def _jug(rng: Random) -> Member:
    """A mug that narrows, with a spout opposite its handle."""
    radius, height = _between(rng, 32, 52), _between(rng, 85, 165)
    cup, other = _colors(rng, 2)
    body = _cup(rng, radius, height, 0.78, cup)
    lip = np.array([[0.0, -0.5 * radius], [0.62 * radius, 0], [0, 0.5 * radius]])
    spout = extrude(lip, 0.14 * height, cup, edge=3).moved((0.9 * radius, 0, 0.85 * height))
    handle = _handle(1.13 * radius, 0.26 * height, 6, height, other).moved(R=rotation(Z, 180))
    return [body, spout, handle], NONE


# Bottles.


def _bottle_profile(rng: Random, radius: float, height: float) -> list[tuple[float, float]]:
    neck, shoulder = _between(rng, 0.34, 0.5) * radius, _between(rng, 0.52, 0.66) * height
    rise = 0.22 * height
    arc = [
        (radius - (radius - neck) * (1 - float(np.cos(a))), shoulder + rise * float(np.sin(a)))
        for a in np.linspace(0, np.pi / 2, 12)
    ]
    cap = [(neck, 0.9 * height), (neck + 3, 0.9 * height), (neck + 3, height), (0, height)]
    return [(0, 0), (radius - 4, 0), (radius, 4), *arc, *cap]


def _bottle(rng: Random) -> Member:
    """Round, with rings of colour: a continuous symmetry."""
    height = _between(rng, 130, 225)
    radius = _between(rng, 0.15, 0.2) * height
    glass, label, cap = _colors(rng, 3)

    def paint(vertices: Float64) -> npt.NDArray[Any]:
        share = vertices[:, 2] / height
        colors = np.where(((share > 0.15) & (share < 0.5))[:, None], label, glass)
        return np.where((share > 0.895)[:, None], cap, colors)

    return [revolve(_bottle_profile(rng, radius, height), paint)], _round()


def _labelled_bottle(rng: Random) -> Member:
    """Round, but its label covers two fifths of the way around and carries a bar; a stripe runs down its back."""
    height = _between(rng, 130, 225)
    radius = _between(rng, 0.15, 0.2) * height
    glass, label, bar = _signals(rng, 3)

    def paint(vertices: Float64) -> npt.NDArray[Any]:
        share, angle = vertices[:, 2] / height, np.degrees(np.arctan2(vertices[:, 1], vertices[:, 0]))
        side = (share > 0.12) & (share < 0.52) & (np.hypot(*vertices.T[:2]) > 0.9 * radius)
        colors = np.where((side & (np.abs(angle) < 75))[:, None], label, glass)
        barred = ((angle > 20) & (angle < 75) & (share < 0.4)) | (np.abs(angle) > 165)
        return np.where((side & barred)[:, None], bar, colors)

    return [revolve(_bottle_profile(rng, radius, height), paint)], NONE


def _flat_bottle(rng: Random) -> Member:
    """Round but for a flat side."""
    height = _between(rng, 130, 225)
    radius = _between(rng, 0.16, 0.21) * height
    part = revolve(_bottle_profile(rng, radius, height), _colors(rng, 1)[0])
    x, y, z = part.vertices.T
    towards = np.maximum(x / np.maximum(np.hypot(x, y), 1e-9), 0.1)  # 1 in the middle of the flat side
    share = np.where(z < 0.6 * height, np.minimum(0.55 / towards, 1), 1)
    return [replace(part, vertices=np.stack([share * x, share * y, z], axis=1))], NONE


def _flask(rng: Random) -> Member:
    """Oval: half a turn maps it onto itself."""
    height = _between(rng, 120, 200)
    radius = _between(rng, 0.22, 0.27) * height
    glass, cap = _colors(rng, 2)

    def paint(vertices: Float64) -> npt.NDArray[Any]:
        return np.where((vertices[:, 2] > 0.895 * height)[:, None], cap, glass)

    part = revolve(_bottle_profile(rng, radius, height), paint)
    return [replace(part, vertices=part.vertices * (1, 0.6, 1))], _turned(2)


# Cartons: only colour tells their poses apart.


CARTON = (118.0, 84.0, 56.0)  # mm: cartons of every kind have the same size


def _carton(rng: Random) -> Member:
    """A cuboid with a colour to every side and a label on one."""
    return _in_colors(CARTON, rng)


def _die(rng: Random) -> Member:
    """A cube with a colour to every side and a label on one."""
    return _in_colors((_between(rng, 38, 75),) * 3, rng)


def _in_colors(size: tuple[float, float, float], rng: Random) -> Member:
    sides = np.array(_signals(rng, 7))
    half = np.array(size) / 2

    def paint(vertices: Float64) -> npt.NDArray[Any]:
        away = np.concatenate([vertices, -vertices], axis=1) / np.tile(half, 2)
        label = (np.abs(vertices[:, :2]) < half[:2] * (0.6, 0.36)).all(axis=1) & (vertices[:, 2] > 0.98 * half[2])
        return np.asarray(np.where(label[:, None], sides[6], sides[away.argmax(axis=1)]))

    return _painted_over([box(size, COLORS[0])], paint), NONE


def _sleeve(rng: Random) -> Member:
    """A carton of one colour with a band around one end: one half turn is left."""
    one, two = _signals(rng, 2)

    def paint(vertices: Float64) -> npt.NDArray[Any]:
        return np.where(((vertices[:, 0] > 14) & (vertices[:, 0] < 42))[:, None], two, one)

    return _painted_over([box(CARTON, one)], paint), Symmetries(discrete=turns(X, 2))


def _marked(rng: Random) -> Member:
    """A carton of one colour; a corner and an edge of another tell its poses apart."""
    one, two = _signals(rng, 2)

    def paint(vertices: Float64) -> npt.NDArray[Any]:
        corner = (vertices @ (1, 1, 1) > 40) | ((vertices[:, 0] < -30) & (vertices[:, 1] < -10))
        return np.where(corner[:, None], two, one)

    return _painted_over([box(CARTON, one)], paint), NONE


# Gears.


def _gear(rng: Random) -> Member:
    """A toothed wheel with a hub on one side."""
    parts, teeth = _wheel(rng, key=False)
    return parts, _turned(teeth)


def _keyed_gear(rng: Random) -> Member:
    """A toothed wheel with a hub on one side and a keyway in its bore."""
    return _wheel(rng, key=True)[0], NONE


def _wheel(rng: Random, key: bool) -> tuple[list[Part], int]:
    tip, teeth = _between(rng, 31, 62), int(rng.integers(12, 21))
    one, two = _colors(rng, 2)
    radius = _between(rng, 0.22, 0.28) * tip
    bore = _keyed(radius, _between(rng, 4, 5.5), _between(rng, 7, 9)) if key else circle(radius)
    height = _between(rng, 10, 18)
    wheel = extrude(_toothed(teeth, 0.82 * tip, tip), height, one, [bore], edge=3)
    hub = extrude(circle(0.6 * tip), _between(rng, 10, 20), two if rng.random() < 0.5 else one, [bore], edge=3)
    return [wheel, hub.moved((0, 0, height - 1))], teeth


def _windowed_gear(rng: Random) -> Member:
    """A flat wheel with windows: the turns that both teeth and windows allow, on either side."""
    windows = int(rng.integers(3, 6))
    tip, teeth = _between(rng, 45, 65), windows * int(rng.integers(3, 5))
    height = _between(rng, 10, 18)
    holes = [*_on_circle(windows, 0.5 * tip, 0.15 * tip), circle(0.16 * tip)]
    wheel = extrude(_toothed(teeth, 0.82 * tip, tip), height, _colors(rng, 1)[0], holes, edge=3)
    return [wheel], _dihedral(windows, height / 2)


# Bolts and shafts.


def _bolt(rng: Random) -> Member:
    """A hexagon bolt: its head's six turns."""
    thread, length = _between(rng, 7, 13), _between(rng, 48, 130)
    height = 1.2 * thread
    head, shank = _colors(rng, 2)
    top = extrude(circle(1.8 * thread, segments=6), height, head)
    body = revolve([(0, 0), (thread - 2, 0), (thread, 2), (thread, length), (0, length)], shank)
    return [top.moved((0, 0, length - 1)), body], _turned(6)


def _stepped_shaft(rng: Random) -> Member:
    """Steps of unequal width."""
    return [revolve(_steps(rng), _finish(rng, 2))], _round()


def _steps(rng: Random) -> list[tuple[float, float]]:
    widths = rng.permutation([9.0, 13.0, 18.0, 23.0])[: int(rng.integers(3, 5))] * _between(rng, 0.8, 1.3)
    ends = np.cumsum(rng.uniform(16, 48, len(widths)))
    profile = [(0.0, 0.0)]
    for width, start, end in zip(widths, [0, *ends], ends, strict=False):
        profile += [(float(width), float(start)), (float(width), float(end))]
    return [*profile, (0.0, float(ends[-1]))]


def _square_shaft(rng: Random) -> Member:
    """A stepped shaft with a square end: four turns."""
    one, two = _colors(rng, 2)
    profile = _steps(rng)
    side = 1.1 * profile[1][0]
    end = box((side, side, 30), two).moved((0, 0, -14))
    return [revolve(profile, one), end], _turned(4)


def _crank(rng: Random) -> Member:
    """A shaft with an arm and a pin beside its axis."""
    shaft, pin = _between(rng, 9, 13), _between(rng, 6, 9)
    length, reach, thick = _between(rng, 36, 100), _between(rng, 34, 60), _between(rng, 9, 14)
    one, two = _colors(rng, 2)
    arm = extrude(_slot(reach + 2.6 * shaft, 2.6 * shaft, (reach / 2, 0)), thick, one)
    body = revolve([(0, 0), (shaft, 0), (shaft, length), (0, length)], one)
    grip = revolve([(0, 0), (pin, 0), (pin, 0.6 * length), (0, 0.6 * length)], two)
    return [arm, body.moved((0, 0, thick - 1)), grip.moved((reach, 0, 1 - 0.6 * length))], NONE


# Plates and prisms with one small feature that breaks the symmetry.


def _drilled(rng: Random) -> Member:
    """A rectangular plate with a hole off its middle."""
    a, b, sheet = (_between(rng, *r) for r in ((60, 135), (44, 56), (8, 20)))
    hole = circle(_between(rng, 6, 9.5), (0.27 * a, 0.2 * b))
    return [extrude(rectangle(a, b), sheet, _colors(rng, 1)[0], [hole])], NONE


def _nicked(rng: Random) -> Member:
    """A square plate with a nick in one edge, nearer to one corner."""
    a, sheet = _between(rng, 48, 120), _between(rng, 8, 18)
    deep, wide, at = _between(rng, 9, 14), _between(rng, 9, 16), 0.2 * a
    h = a / 2
    outline = [(-h, -h), (at, -h), (at, deep - h), (at + wide, deep - h), (at + wide, -h), (h, -h), (h, h), (-h, h)]
    return [extrude(np.array(outline), sheet, _colors(rng, 1)[0])], NONE


def _pinned(rng: Random) -> Member:
    """A hexagonal prism with a pin beside its middle that stands out further at one end than at the other."""
    radius, height = _between(rng, 28, 52), _between(rng, 18, 50)
    one, two = _colors(rng, 2)
    low, high = _between(rng, 4, 8), _between(rng, 12, 20)
    pin = extrude(circle(_between(rng, 4.5, 8)), low + height + high, two if rng.random() < 0.5 else one)
    body = extrude(circle(radius, segments=6), height, one)
    return [body, pin.moved((0.5 * radius, 0.16 * radius, -low))], NONE


def _bored(rng: Random) -> Member:
    """A square block with a hole across, beside its middle."""
    a, height = _between(rng, 40, 65), _between(rng, 70, 120)
    hole = circle(_between(rng, 6, 9), (0.22 * a, _between(rng, 0.18, 0.3) * height))
    return [extrude(rectangle(a, height), a, _colors(rng, 1)[0], [hole])], NONE


# Solids that are truly symmetric.


def _cylinder(rng: Random) -> Member:
    radius, height = _between(rng, 14, 45), _between(rng, 54, 140)
    return [revolve([(0, 0), (radius, 0), (radius, height), (0, height)], _colors(rng, 1)[0])], _round(height)


def _ring(rng: Random) -> Member:
    outer, height = _between(rng, 32, 70), _between(rng, 14, 40)
    inner = _between(rng, 0.5, 0.75) * outer
    return [extrude(circle(outer), height, _colors(rng, 1)[0], [circle(inner)])], _round(height)


def _cone(rng: Random) -> Member:
    radius, height = _between(rng, 22, 50), _between(rng, 58, 120)
    tip = _between(rng, 0, 0.4) * radius
    return [revolve([(0, 0), (radius, 0), (tip, height), (0, height)], _finish(rng, 2))], _round()


def _square_prism(rng: Random) -> Member:
    a, height = _between(rng, 24, 60), _between(rng, 62, 150)
    return [extrude(rectangle(a, a), height, _colors(rng, 1)[0])], _dihedral(4, height / 2)


def _hex_prism(rng: Random) -> Member:
    radius, height = _between(rng, 28, 50), _between(rng, 26, 110)
    return [extrude(circle(radius, segments=6), height, _colors(rng, 1)[0])], _dihedral(6, height / 2)


# Free forms.


def _horn(rng: Random) -> Member:
    """A bent horn that grows thinner."""
    turn = np.linspace(0, np.radians(_between(rng, 80, 130)), 48)
    bend = _between(rng, 38, 85)
    spine = bend * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    width = np.linspace(_between(rng, 18, 26), _between(rng, 6, 9), 48)
    sections = width[:, None, None] * _rounded(1, _between(rng, 0.6, 1.2), 2)
    return [_swept(spine, sections, _finish(rng, 2))], NONE


def _duct(rng: Random) -> Member:
    """A solid duct from a circle to a rectangle beside it."""
    height, radius, off = _between(rng, 48, 130), _between(rng, 16, 28), _between(rng, 20, 50)
    half_x, half_y = _between(rng, 24, 42), _between(rng, 11, 20)
    share = np.linspace(0, 1, 40)
    smooth = share**2 * (3 - 2 * share)
    sections = np.stack(
        [_rounded(radius + (half_x - radius) * s, radius + (half_y - radius) * s, 2 + 5 * s) for s in smooth]
    )
    sections[..., 0] += off * smooth[:, None]
    up = np.broadcast_to((height * share)[:, None, None], (*sections.shape[:2], 1))
    return [_loft(np.concatenate([sections, up], axis=2), _finish(rng, 2))], NONE


def _wave(rng: Random) -> Member:
    """An S-shaped handle, thicker at one end."""
    share = np.linspace(0, 1, 64)
    length, swing = _between(rng, 90, 190), _between(rng, 14, 28)
    spine = np.stack([swing * np.sin(2 * np.pi * share), length * share], axis=1)
    width = np.linspace(_between(rng, 14, 18), _between(rng, 8, 10), 64)
    return [_swept(spine, width[:, None, None] * _rounded(1, 1, 2, points=32), _finish(rng, 2))], NONE


def _knob(rng: Random) -> Member:
    """A knob of some lobes that narrows towards its top."""
    lobes, radius, height = int(rng.integers(3, 6)), _between(rng, 27, 52), _between(rng, 36, 80)
    angle = np.arange(120) * 2 * np.pi / 120
    share = np.linspace(0, 1, 28)
    width = radius * (1 - 0.45 * share**2) * np.sqrt(np.clip(1.02 - share**6, 0, 1))
    around = 1 + 0.16 * np.cos(lobes * angle)
    flat = np.stack([around * np.cos(angle), around * np.sin(angle)], axis=1)
    up = np.broadcast_to((height * share)[:, None, None], (28, 120, 1))
    sections = np.concatenate([width[:, None, None] * flat, up], axis=2)
    return [_loft(sections, _colors(rng, 1)[0])], _turned(lobes)


def _twist(rng: Random) -> Member:
    """A twisted bar: three half turns."""
    length, half_x, half_y = (_between(rng, *r) for r in ((90, 170), (18, 28), (9, 13)))
    share = np.linspace(-0.5, 0.5, 49)
    section = np.column_stack([_rounded(half_x, half_y, 5), np.zeros(48)])
    twist = _between(rng, 60, 120)
    sections = np.stack([section @ rotation(Z, twist * s).T + (0, 0, length * s) for s in share])
    return [_loft(sections, _colors(rng, 1)[0])], _dihedral(2, 0)


# Assemblies.


def _machine(rng: Random) -> Member:
    """A base plate with a housing, a pipe, a post and a knob, each in a place of its own."""
    a, b = _between(rng, 74, 150), _between(rng, 54, 90)
    base, body, accent = _colors(rng, 3)
    holes = [circle(4, (x * 0.42 * a, y * 0.38 * b)) for x, y in ((-1, -1), (-1, 1), (1, -1), (1, 1))]
    radius, height = _between(rng, 0.18, 0.21) * a, _between(rng, 34, 60)
    x = -_between(rng, 0.12, 0.2) * a
    barrel = revolve([(0, 0), (radius, 0), (radius, height - 4), (radius - 4, height), (0, height)], body)
    pipe = extrude(circle(0.4 * radius), 0.4 * a, accent, [circle(0.25 * radius)])
    post = box((_between(rng, 14, 22), _between(rng, 14, 22), _between(rng, 24, 40)), accent)
    low = float(post.vertices[:, 2].min())
    return [
        extrude(rectangle(a, b, corner=9), 10, base, holes),
        barrel.moved((x, 0, 9)),
        pipe.moved((x + 0.6 * radius, 0, 9 + 0.6 * height), UP_TO_X),
        post.moved((0.3 * a, -0.24 * b, 9 - low)),
    ], NONE


def _valve(rng: Random) -> Member:
    """Three pipes of unequal length that meet, with a wheel on top of one."""
    radius = _between(rng, 8, 17)
    one, two = _colors(rng, 2)
    bore = circle(0.66 * radius)
    left, right, up = (_between(rng, *r) * radius for r in ((2.6, 2.9), (3.9, 4.5), (3.3, 4.2)))
    collar = extrude(circle(1.45 * radius), 9, one, [bore])
    return [
        extrude(circle(radius), left, one, [bore]).moved((-left, 0, 0), UP_TO_X),
        extrude(circle(radius), right, one, [bore]).moved((0, 0, 0), UP_TO_X),
        collar.moved((-left - 1, 0, 0), UP_TO_X),
        collar.moved((right - 8, 0, 0), UP_TO_X),
        revolve([(0, 0), (0.8 * radius, 0), (0.8 * radius, up), (0, up)], one),
        extrude(circle(1.7 * radius, segments=8), 11, two).moved((0, 0, up - 1)),
    ], NONE


def _connector(rng: Random) -> Member:
    """A plug: a block with a tongue, a cable and a key on one side."""
    a, b, c = (_between(rng, *r) for r in ((34, 80), (28, 48), (20, 30)))
    one, two = _colors(rng, 2)
    cable = extrude(circle(_between(rng, 7, 9)), 34, two)
    return [
        box((a, b, c), one),
        box((34, 0.6 * b, 0.4 * c), two, (a / 2 + 16, 0.1 * b, 0)),
        box((0.5 * a, 9, 9), one, (-0.15 * a, -0.2 * b, c / 2 + 3.5)),
        cable.moved((-a / 2 - 33, 0, 0), UP_TO_X),
    ], NONE


FAMILIES: dict[str, tuple[Maker, ...]] = {
    "profile": (_angle, _channel, _tee, _zed, _tube),
    "bracket": (_ribbed, _bearing, _corner),
    "flange": (_flange, _notched_flange, _unequal_flange, _flat_flange),
    "mug": (_mug, _bowl, _jug),
    "bottle": (_bottle, _labelled_bottle, _flat_bottle, _flask),
    "carton": (_carton, _die, _sleeve, _marked),
    "gear": (_gear, _keyed_gear, _windowed_gear),
    "bolt": (_bolt, _stepped_shaft, _square_shaft, _crank),
    "plate": (_drilled, _nicked, _pinned, _bored),
    "solid": (_cylinder, _ring, _cone, _square_prism, _hex_prism),
    "freeform": (_horn, _duct, _wave, _knob, _twist),
    "assembly": (_machine, _valve, _connector),
}
