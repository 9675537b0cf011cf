"""Synthetic RGB-D scenes with known poses and masks: objects on a table, seen by a depth camera.

A scene is a function of its seed: the same seed gives the same bits. `degrade_mask` spoils masks on purpose,
`segment_by_depth` finds them from the depth alone, and `pose_errors` compares poses.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from posekit.engine import Bool, Float32, Float64, Mesh, Symmetries, UInt8
from posekit.render import Caster, depth_to_points, finer, pixel_rays
from posekit.synthetic.shapes import SHAPES, Shape, rotation

UInt16 = npt.NDArray[np.uint16]
MaskQuality = Literal["exact", "noisy", "under", "merged"]

MIN_VISIBLE_PX = 300  # an instance with fewer pixels is in the picture but not in the list
MIN_VISIBILITY = 0.3
PROJECTOR_OFFSET_M = 0.05  # the depth camera's pattern comes from its right
MAX_RANGE_M = 4.0  # range of the depth camera
_TO_LINEAR = ((np.arange(256) / 255) ** 2.2).astype(np.float32)
CLUTTER_TONES = ((142, 138, 130), (96, 104, 112), (176, 166, 148), (120, 104, 92))


@dataclass(frozen=True, kw_only=True)
class SceneInstance:
    """One object of a scene, with its true pose and mask."""

    shape: Shape
    T_cam_obj: Float64  # (4, 4), metres
    mask: Bool  # (H, W), the pixels that show it
    visibility: float  # visible share of its whole silhouette, which may reach beyond the picture


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture, its raw depth, and the objects in it."""

    rgb: UInt8  # (H, W, 3)
    depth_raw: UInt16  # (H, W), 0 = no reading
    depth_scale_mm: float  # raw x scale = millimetres
    K: Float64  # (3, 3), pixels
    instances: list[SceneInstance]

    @property
    def depth_m(self) -> Float32:
        """Return the depth in metres, (H, W), 0 = no reading."""
        return (self.depth_raw * (self.depth_scale_mm / 1000)).astype(np.float32)


def make_scene(
    seed: int,
    shapes: Sequence[Shape] | None = None,
    count: int = 4,
    width: int = 640,
    height: int = 480,
    noise: bool = True,
    occlusion: bool = True,
    depth_scale_mm: float = 1.0,
) -> Scene:
    """Make a random scene: up to `count` objects and some clutter, 0.5 to 1.2 m away.

    `shapes`: shapes to choose from, all of SHAPES by default; each is used once before any is used twice.
    `noise`: errors of the depth sensor and the colour camera; without it the depth is only rounded.
    `occlusion`: objects stand close together, seen from low; without it apart, seen from above.
    """
    rng = np.random.default_rng(seed)
    pool = list(shapes) if shapes is not None else [make() for make in SHAPES.values()]
    order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))])[:count]
    table = _Table(gap_m=0.004 if occlusion else 0.05)
    placed = []
    for index in order:
        T = table.place(pool[index], rng)
        if T is not None:
            placed.append((pool[index], T))
    clutter = [piece for piece in (_clutter(rng, table) for _ in range(int(rng.integers(2, 5)))) if piece is not None]
    spread = float(np.ptp([T[:2, 3] for _, T in placed], axis=0).max()) if len(placed) > 1 else 0.0
    nearest = max(0.5, min(1.0, 1.5 * spread + 0.2))
    distance = nearest + (1.2 - nearest) * float(rng.random()) ** 1.6
    elevation = float(rng.uniform(34, 58) if occlusion else rng.uniform(52, 76))
    aim = np.mean([T[:3, 3] for _, T in placed], axis=0) if placed else np.zeros(3)
    T_cam_world = _look_at(aim, distance, float(rng.uniform(0, 360)), elevation, float(rng.uniform(-6, 6)))
    focal = float(rng.uniform(570, 630)) * width / 640
    cx, cy = width / 2 - 0.5 + float(rng.uniform(-6, 6)), height / 2 - 0.5 + float(rng.uniform(-6, 6))
    K = np.array([[focal, 0, cx], [0, focal, cy], [0, 0, 1]])
    return _photograph(placed, clutter, T_cam_world, K, width, height, rng, noise, depth_scale_mm, _Look())


@functools.cache
def demo_scene() -> Scene:
    """Make the scene of the demo and its picture: a pump housing (the first instance) among its neighbours."""
    rng = np.random.default_rng(7)
    stand = [  # name, x and y in metres, turn about the vertical and tilt before it in degrees
        ("housing", 0.0, 0.0, 24.0, 0.0),
        ("mug", -0.095, 0.105, 205.0, 0.0),
        ("bottle", 0.085, 0.135, 0.0, 0.0),
        ("stepped", 0.195, 0.03, 12.0, 90.0),
        ("gear", -0.16, -0.05, 10.0, 0.0),
        ("wedge", -0.01, 0.21, -20.0, 90.0),
        ("bolt", 0.078, -0.068, 15.0, 180.0),
    ]
    placed = []
    for name, x, y, turn, tilt in stand:
        shape = SHAPES[name]()
        T = np.eye(4)
        T[:3, :3] = rotation((0, 0, 1), turn) @ rotation((1, 0, 0), tilt)
        T[:2, 3] = x, y
        T[2, 3] = -float((shape.mesh.vertices_m @ T[2, :3]).min())
        placed.append((shape, T))
    T_cam_world = _look_at(np.array([0.01, 0.03, 0.033]), 0.55, -83.0, 33.0, 0.0)
    K = np.array([[612.0, 0, 318.7], [0, 612.0, 241.2], [0, 0, 1]])
    look = _Look(supersampling=2, shadow_rays=4, ambient_rays=4, light_m=(-0.55, -0.35, 1.1))
    return _photograph(placed, [], T_cam_world, K, 640, 480, rng, True, 1.0, look)


def many_detections_scene(seed: int, n: int = 40) -> Scene:
    """Make a scene for load tests with exactly `n` instances: rows of small objects, then the same masks again."""
    rng = np.random.default_rng(seed)
    pool = [SHAPES[name]() for name in ("bolt", "gear", "bracket", "wedge")]
    columns, rows, pitch = 8, 5, 0.125
    placed = []
    for cell in range(min(n, columns * rows)):
        shape = pool[cell % len(pool)]
        poses = _resting_rotations(shape.mesh)
        R = rotation((0, 0, 1), float(rng.uniform(0, 360))) @ poses[int(rng.integers(len(poses)))]
        posed = shape.mesh.vertices_m @ R.T
        middle = (posed.min(axis=0) + posed.max(axis=0)) / 2
        T = np.eye(4)
        T[:3, :3] = R
        T[:2, 3] = (cell % columns - 3.5) * pitch - middle[0], (cell // columns - 2) * pitch - middle[1]
        T[2, 3] = -posed[:, 2].min()
        placed.append((shape, T))
    T_cam_world = _look_at(np.zeros(3), 1.12, -90.0, 72.0, 0.0)
    K = np.array([[600.0, 0, 319.5], [0, 600.0, 239.5], [0, 0, 1]])
    scene = _photograph(placed, [], T_cam_world, K, 640, 480, rng, True, 1.0, _Look())
    found = scene.instances
    instances = [found[index % len(found)] for index in range(n)] if found else []
    return Scene(rgb=scene.rgb, depth_raw=scene.depth_raw, depth_scale_mm=1.0, K=K, instances=instances)


# Masks and poses.


def degrade_mask(
    mask: Bool,
    quality: MaskQuality,
    rng: np.random.Generator,
    neighbours: Sequence[Bool] = (),
) -> Bool:
    """Return the mask as a segmenter of a given quality would: same size, always a new array.

    "noisy": a wavering border and a few pits, overlapping the true mask to 0.7 .. 0.9 (intersection over union) at any
    size. "under": under-segmented. It includes a fifth of every neighbour within 12 pixels, the pixels nearest to the
    mask; without a neighbour it spills over its border by a fifth of its own pixels. "merged": it includes the whole
    neighbour that it touches most within 12 pixels; without one it spills over its border.
    """
    if quality == "exact" or not mask.any():
        return mask.copy()
    if quality == "noisy":
        return _wavering(mask, float(rng.uniform(0.7, 0.9)), rng)
    reach = cv2.dilate(mask.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (25, 25)))
    contact = [int(np.count_nonzero((reach > 0) & other)) for other in neighbours]
    close = [other for other, shared in zip(neighbours, contact, strict=True) if shared]
    if quality == "under":
        spoilt = mask.copy()
        for other in close or [~mask]:
            spoilt |= _nearest(mask, other, round(0.2 * np.count_nonzero(other if close else mask)))
        return spoilt
    if close:
        return np.asarray(mask | neighbours[int(np.argmax(contact))], dtype=np.bool_)
    spill = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (17, 17))
    return np.asarray(cv2.dilate(mask.astype(np.uint8), spill) > 0, dtype=np.bool_)


def _wavering(mask: Bool, overlap: float, rng: np.random.Generator) -> Bool:
    """Return the mask with a border that wavers until the intersection over union is about `overlap`."""
    outside = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5)
    inside = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5)
    waver = _smooth_noise(rng, mask.shape, max(2.0, 0.1 * float(np.sqrt(np.count_nonzero(mask)))))
    pits = _smooth_noise(rng, mask.shape, 2.0) > 2.8
    low, high = 0.0, float(inside.max()) + 1.0  # pixels: the first wavers too little, the second too much
    for _ in range(10):
        middle = (low + high) / 2
        wavering = (inside - outside > middle * waver) & ~pits
        good = np.count_nonzero(wavering & mask) > overlap * np.count_nonzero(wavering | mask)
        low, high = (middle, high) if good else (low, middle)
    return np.asarray((inside - outside > low * waver) & ~pits, dtype=np.bool_)


def _nearest(mask: Bool, other: Bool, count: int) -> Bool:
    """Return the `count` pixels of another mask that lie nearest to this one."""
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5)
    pixels = np.flatnonzero(other)
    chosen = np.zeros(mask.shape, dtype=np.bool_)
    chosen.ravel()[pixels[np.argsort(distance.ravel()[pixels], kind="stable")[:count]]] = True
    return chosen


def segment_by_depth(depth_m: Float32, K: Float64, min_height_m: float = 0.01, min_area_px: int = 300) -> list[Bool]:
    """Find masks of things on the largest plane, left to right, from the depth (H, W) in metres alone.

    The plane is found by RANSAC with a fixed seed. Points above it are projected onto it, cell by cell, and split where
    the footprints are apart; things closer than about 1 cm become one. Without a plane the list is empty.
    """
    points = depth_to_points(depth_m, K).astype(np.float64)
    seen = depth_m > 0
    plane = _largest_plane(points[seen])
    if plane is None:
        return []
    normal, offset = plane
    rises = points @ normal + offset
    above = seen & (rises > min_height_m) & (rises < 0.5)

    # Readings at depth jumps lie between things, so they must not connect them.
    kernel = np.ones((3, 3), np.uint8)
    nearest_m = cv2.erode(np.where(seen, depth_m, 99).astype(np.float32), kernel)
    cores = above & (cv2.dilate(depth_m.astype(np.float32), kernel) - nearest_m < 0.02)
    across = _turned_down(normal)[:2]
    cells = np.floor(points[cores] @ across.T / 0.004).astype(np.int64)
    if not len(cells):
        return []
    cells -= cells.min(axis=0)
    if cells.max() > 2000:  # readings 10 m apart are no table
        return []
    footprint = np.zeros(cells.max(axis=0) + 1, dtype=np.int64)
    np.add.at(footprint, (cells[:, 0], cells[:, 1]), 1)
    filled = cv2.morphologyEx((footprint > 2).astype(np.uint8), cv2.MORPH_CLOSE, kernel)
    _, cell_owner = cv2.connectedComponents(filled, connectivity=4)
    labels = np.zeros(depth_m.shape, dtype=np.int64)
    labels[cores] = cell_owner[cells[:, 0], cells[:, 1]]

    # Assign pixels left out at the jumps to the nearest part within a few pixels.
    distance, nearest = cv2.distanceTransformWithLabels(
        (labels == 0).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    owner_of = np.zeros(int(nearest.max()) + 1, dtype=np.int64)
    owner_of[nearest[labels > 0]] = labels[labels > 0]
    owner = np.where(above & (distance < 4), owner_of[nearest], 0)
    kept = [index for index in range(1, int(labels.max()) + 1) if np.count_nonzero(labels == index) >= min_area_px]
    kept.sort(key=lambda index: float(np.nonzero(owner == index)[1].mean()))
    return [np.asarray(owner == index, dtype=np.bool_) for index in kept]


def pose_errors(T_est: Float64, T_true: Float64, symmetries: Symmetries) -> tuple[float, float]:
    """Return (rotation in degrees, translation in millimetres) between two (4, 4) poses in metres, modulo symmetries.

    The truth is first replaced by its symmetric equivalent nearest in rotation (in translation where rotations tie).
    """
    best = (np.inf, np.inf)
    for discrete in (np.eye(4), *symmetries.discrete):
        candidate = T_true @ discrete
        turned = [candidate @ _nearest_turn(T_est, candidate, *axis) for axis in symmetries.continuous] or [candidate]
        for T in turned:
            delta = T[:3, :3].T @ T_est[:3, :3]
            sine = np.linalg.norm(delta - delta.T) / np.sqrt(8)
            degrees = float(np.degrees(np.arctan2(sine, (np.trace(delta) - 1) / 2)))
            millimetres = float(np.linalg.norm(T_est[:3, 3] - T[:3, 3]) * 1000)
            if (round(degrees, 3), millimetres) < (round(best[0], 3), best[1]):
                best = (degrees, millimetres)
    return best


def _nearest_turn(T_est: Float64, T: Float64, axis: Float64, offset_m: Float64) -> Float64:
    """Return the turn about an axis through `offset_m` that brings T's rotation closest to the estimate's."""
    a = np.asarray(axis, dtype=np.float64) / np.linalg.norm(axis)
    M = T_est[:3, :3].T @ T[:3, :3]
    cross = np.array([[0, -a[2], a[1]], [a[2], 0, -a[0]], [-a[1], a[0], 0]])
    along = float(a @ M @ a)
    angle = np.degrees(np.arctan2(np.trace(M @ cross), np.trace(M) - along))
    turn = np.eye(4)
    turn[:3, :3] = rotation(a.tolist(), float(angle))
    turn[:3, 3] = offset_m - turn[:3, :3] @ offset_m
    return turn


def _largest_plane(points: Float64) -> tuple[Float64, float] | None:
    """Return (unit normal towards the camera, offset) of the plane with most points, None if points are too few."""
    if len(points) < 500:
        return None
    rng = np.random.default_rng(0)
    sample = points[rng.integers(len(points), size=3000)]
    a, b, c = sample[rng.integers(len(sample), size=(3, 200))]
    normals = np.cross(b - a, c - a)
    lengths = np.linalg.norm(normals, axis=1)
    usable = lengths > 1e-6
    normals, a = normals[usable] / lengths[usable, None], a[usable]
    near = np.abs(sample @ normals.T - np.einsum("ij,ij->i", a, normals)) < 0.006
    if not near.size:
        return None
    inliers = sample[near[:, int(near.sum(axis=0).argmax())]]
    for _ in range(3):
        middle = inliers.mean(axis=0)
        normal = np.linalg.svd(inliers - middle, full_matrices=False)[2][2]
        inliers = sample[np.abs((sample - middle) @ normal) < 0.006]
        if len(inliers) < 3:
            return None
    normal = -normal if middle @ normal > 0 else normal
    return normal, float(-middle @ normal)


# Put things on the table. The world's z points up, the table's top is z = 0.


class _Table:
    """The free space on the table: a grid of 4 mm cells, 0.8 m wide."""

    CELL_M = 0.004
    HALF_M = 0.4

    def __init__(self, gap_m: float) -> None:
        size = int(2 * self.HALF_M / self.CELL_M)
        self._taken = np.zeros((size, size), np.uint8)
        self._gap = gap_m

    def place(self, shape: Shape, rng: np.random.Generator) -> Float64 | None:
        """Return a resting pose T_world_obj as near to the middle as there is room; None without room."""
        rotations = _resting_rotations(shape.mesh)
        R = rotation((0, 0, 1), float(rng.uniform(0, 360))) @ rotations[int(rng.integers(len(rotations)))]
        return self.put(shape.mesh, R, rng)

    def put(self, mesh: Mesh, R: Float64, rng: np.random.Generator) -> Float64 | None:
        posed = mesh.vertices_m @ R.T
        hull = cv2.convexHull(posed[:, :2].astype(np.float32))[:, 0]
        middle = (posed[:, :2].min(axis=0) + posed[:, :2].max(axis=0)) / 2
        for attempt in range(80):
            radius = 0.03 + 0.32 * attempt / 80
            at = rng.normal(0, radius / 1.5, 2)
            cells = np.rint((hull - middle + at + self.HALF_M) / self.CELL_M).astype(np.int32)
            footprint = np.zeros_like(self._taken)
            cv2.fillConvexPoly(footprint, cells, 1)
            inside = cells.min() > 2 and cells.max() < len(self._taken) - 3
            if inside and not (footprint & self._taken).any():
                reach = 2 * round(self._gap / self.CELL_M) + 1
                self._taken[cv2.dilate(footprint, np.ones((reach, reach), np.uint8)) > 0] = 1
                T = np.eye(4)
                T[:3, :3] = R
                T[:3, 3] = *(at - middle), -float(posed[:, 2].min())
                return T
        return None


def _resting_rotations(mesh: Mesh) -> list[Float64]:
    """Return rotations (3, 3) that put the mesh down on a face of its hull with the centre of mass over that face."""
    from scipy.spatial import ConvexHull

    corners = mesh.vertices_m[mesh.faces].astype(np.float64)
    volumes = np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2]))
    center = np.einsum("i,ij->j", volumes, corners.sum(axis=1)) / (4 * volumes.sum())
    hull = ConvexHull(mesh.vertices_m)
    normals = hull.equations[:, :3]
    a, b, c = (hull.points[hull.simplices[:, i]] for i in range(3))
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    left = np.ones(len(normals), dtype=np.bool_)
    found: list[tuple[float, Float64]] = []
    for index in np.argsort(-areas, kind="stable"):
        if not left[index]:
            continue
        same = left & (normals @ normals[index] > 0.99999)
        left &= ~same
        R = _turned_down(normals[index])
        support = cv2.convexHull((hull.points[np.unique(hull.simplices[same])] @ R.T)[:, :2].astype(np.float32))
        over = (R @ center)[:2].astype(np.float32)
        if cv2.pointPolygonTest(support, (float(over[0]), float(over[1])), True) > 0.0005:
            found.append((float(areas[same].sum()), R))
    widest = max((area for area, _ in found), default=0.0)
    return [R for area, R in found if area > 0.05 * widest] or [np.eye(3)]


def _turned_down(normal: Float64) -> Float64:
    """Return a rotation that takes a unit vector to -z."""
    side = np.cross(normal, (1.0, 0, 0) if abs(normal[0]) < 0.9 else (0, 1.0, 0))
    side /= np.linalg.norm(side)
    return np.stack([side, np.cross(side, normal), -normal])


def _clutter(rng: np.random.Generator, table: _Table) -> tuple[Mesh, Float64] | None:
    """Return a plain block that is no object of the scene."""
    size = rng.uniform((0.03, 0.03, 0.02), (0.1, 0.08, 0.07))
    corner = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = np.array([face for a, b, c, d in quads for face in ((a, b, c), (a, c, d))], dtype=np.int32)
    tone = np.array(CLUTTER_TONES[int(rng.integers(len(CLUTTER_TONES)))], dtype=np.uint8)
    mesh = Mesh(vertices_m=(corner * size).astype(np.float32), faces=faces, vertex_colors=np.tile(tone, (8, 1)))
    T = table.put(mesh, rotation((0, 0, 1), float(rng.uniform(0, 360))), rng)
    return None if T is None else (mesh, T)


def _look_at(target: Float64, distance: float, azimuth_deg: float, elevation_deg: float, roll_deg: float) -> Float64:
    """Return T_cam_world of a camera at `distance` from its target, seen from a direction above the table."""
    azimuth, elevation = np.radians(azimuth_deg), np.radians(elevation_deg)
    towards = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    z = -towards
    x = np.cross(z, (0, 0, 1.0))
    x /= np.linalg.norm(x)
    R = rotation((0, 0, 1), roll_deg) @ np.stack([x, np.cross(z, x), z])
    T = np.eye(4)
    T[:3, :3] = R
    T[:3, 3] = -R @ (target + distance * towards)
    return T


# Take the picture.


@dataclass(frozen=True, kw_only=True)
class _Look:
    """The effort spent on the colours."""

    supersampling: int = 1  # rays per side of a pixel
    shadow_rays: int = 1
    ambient_rays: int = 0
    light_m: tuple[float, float, float] = (0.5, -0.4, 1.3)


def _photograph(
    placed: Sequence[tuple[Shape, Float64]],
    clutter: Sequence[tuple[Mesh, Float64]],
    T_cam_world: Float64,
    K: Float64,
    width: int,
    height: int,
    rng: np.random.Generator,
    noise: bool,
    depth_scale_mm: float,
    look: _Look,
) -> Scene:
    meshes = [shape.mesh for shape, _ in placed] + [mesh for mesh, _ in clutter] + [_plane(0.75), _plane(30.0)]
    poses = [T for _, T in placed] + [T for _, T in clutter] + [np.eye(4), _shifted(-0.7)]
    caster = Caster(meshes, poses)
    seen = caster.render(T_cam_world, K, width, height)
    instances = []
    alone: dict[int, Caster] = {}
    for index, (shape, T_world_obj) in enumerate(placed):
        mask = np.asarray(seen.instance == index, dtype=np.bool_)
        visible = int(mask.sum())
        if visible < MIN_VISIBLE_PX:
            continue
        T_cam_obj = T_cam_world @ T_world_obj
        if id(shape) not in alone:
            alone[id(shape)] = Caster([shape.mesh])
        visibility = visible / max(visible, _silhouette_px(alone[id(shape)], shape.mesh, T_cam_obj, K))
        if visibility >= MIN_VISIBILITY:
            instances.append(SceneInstance(shape=shape, T_cam_obj=T_cam_obj, mask=mask, visibility=visibility))

    rgb = _colors(caster, len(meshes), T_cam_world, K, width, height, rng, look)
    depth_m = seen.depth_m
    if noise:
        depth_m = _sensed(caster, depth_m, seen.normals_cam, T_cam_world, K, rng)
        rgb = rgb + rng.normal(0, 2.2, rgb.shape)
    raw = np.rint(depth_m.astype(np.float64) * 1000 / depth_scale_mm)
    return Scene(
        rgb=np.clip(np.rint(rgb), 0, 255).astype(np.uint8),
        depth_raw=np.where(raw > 65535, 0, raw).astype(np.uint16),
        depth_scale_mm=depth_scale_mm,
        K=K,
        instances=instances,
    )


def _silhouette_px(caster: Caster, mesh: Mesh, T_cam_obj: Float64, K: Float64) -> int:
    """Return the pixels that the object would fill if it stood alone and the picture had no borders."""
    points = (mesh.vertices_m @ T_cam_obj[:3, :3].T + T_cam_obj[:3, 3]) @ K.T
    uv = points[:, :2] / np.maximum(points[:, 2:], 1e-3)
    low, high = np.floor(uv.min(axis=0)).astype(int) - 1, np.ceil(uv.max(axis=0)).astype(int) + 2
    w, h = np.minimum(high - low, 4000)
    return int(caster.silhouette(T_cam_obj, K, int(w), int(h), int(low[0]), int(low[1])).sum())


def _colors(
    caster: Caster,
    mesh_count: int,
    T_cam_world: Float64,
    K: Float64,
    width: int,
    height: int,
    rng: np.random.Generator,
    look: _Look,
) -> Float64:
    """Render the picture under one soft lamp and an even sky: (height, width, 3), 0..255, not yet rounded."""
    n = look.supersampling
    R = T_cam_world[:3, :3]
    eye = -R.T @ T_cam_world[:3, 3]
    directions = (pixel_rays(finer(K, n), width * n, height * n) @ R).astype(np.float32)
    hits = caster.cast(eye, directions)
    hit = np.isfinite(hits["t_hit"])
    instance = np.where(hit, hits["geometry_ids"].astype(np.int64), -1).astype(np.int32)
    face = np.where(hit, hits["primitive_ids"].astype(np.int64), -1).astype(np.int32)
    points = eye.astype(np.float32) + directions * np.where(hit, hits["t_hit"], 0)[..., None]
    normals = hits["primitive_normals"]
    normals = np.where(_dot(normals, directions)[..., None] > 0, -normals, normals)
    albedo = caster.colors(instance, face, hits["primitive_uvs"])
    on_table = instance == mesh_count - 2
    albedo[on_table] = _wood(points[on_table])
    albedo[instance == mesh_count - 1] = (118, 122, 128)

    lifted = points + np.float32(4e-4) * normals
    lamp = np.asarray(look.light_m, dtype=np.float32)
    lit = np.zeros(instance.shape, dtype=np.float32)
    for _ in range(look.shadow_rays):
        wide = np.float32(0.07 if look.shadow_rays > 1 else 0)
        lit += ~caster.blocked(lifted, lamp + wide * rng.standard_normal(points.shape, np.float32) - lifted)
    to_lamp = _unit(lamp - points)
    facing = np.clip(_dot(normals, to_lamp), 0, 1) * lit / look.shadow_rays
    sky = 0.62 + 0.38 * normals[..., 2]
    free = np.ones(instance.shape, dtype=np.float32)
    for _ in range(look.ambient_rays):
        around = normals + _unit(rng.standard_normal(points.shape, np.float32))
        free -= np.float32(0.7 / look.ambient_rays) * caster.blocked(lifted, around * np.float32(0.07))
    gleam = np.clip(_dot(normals, _unit(to_lamp - _unit(directions))), 0, 1) ** 40 * (facing > 0) * ~on_table
    linear = _TO_LINEAR[albedo] * (0.42 * sky * free + 0.86 * facing)[..., None] + 0.07 * gleam[..., None]
    linear[~hit] = 0.3
    picture = 255 * np.clip(linear, 0, 1) ** np.float32(1 / 2.2)
    return np.asarray(picture.reshape(height, n, width, n, 3).mean(axis=(1, 3)), dtype=np.float64)


def _sensed(
    caster: Caster,
    depth_m: Float32,
    normals_cam: Float32,
    T_cam_world: Float64,
    K: Float64,
    rng: np.random.Generator,
) -> Float32:
    """Return depth as a structured-light sensor reports it: noise of 1-3 mm, steps, shadows, holes, flying pixels."""
    shape = depth_m.shape
    true = depth_m.astype(np.float64)
    points_cam = depth_to_points(depth_m, K).astype(np.float64)
    R, t = T_cam_world[:3, :3], T_cam_world[:3, 3]
    start = (points_cam + 5e-4 * normals_cam - t) @ R
    projector = (np.array([PROJECTOR_OFFSET_M, 0, 0]) - t) @ R
    hole = caster.blocked(start, projector - start)

    kernel = np.ones((3, 3), np.uint8)
    near, far = cv2.erode(true, kernel), cv2.dilate(true, kernel)
    edge = far - near > 0.015
    chance = rng.random(shape)
    flying = edge & (chance < 0.25)
    depth = np.where(flying, near + (far - near) * rng.random(shape), true)
    hole |= edge & (chance > 0.7)

    facing = -(normals_cam * points_cam).sum(-1) / np.maximum(np.linalg.norm(points_cam, axis=-1), 1e-9)
    hole |= rng.random(shape) < np.clip((0.25 - facing) / 0.2, 0, 1)
    hole |= _smooth_noise(rng, shape, 4.0) > 3.2
    hole |= rng.random(shape) < 0.003

    sigma_m = 0.001 * (np.maximum(true, 0.1) / 0.5) ** 1.25
    errors = 0.6 * rng.normal(size=shape) + 0.8 * _smooth_noise(rng, shape, 1.2)
    depth = depth + sigma_m * errors
    base = float(K[0, 0]) * PROJECTOR_OFFSET_M
    disparity = np.rint(base / np.maximum(depth, 0.05) * 16) / 16
    depth = base / np.maximum(disparity, 1e-3)
    return np.where(hole | (true <= 0) | (true > MAX_RANGE_M), 0, depth).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma_px: float) -> Float64:
    """Return normal noise of unit variance that is smooth over `sigma_px` pixels."""
    noise = cv2.GaussianBlur(rng.normal(size=shape), (0, 0), sigma_px)
    return np.asarray(noise * (2 * np.sqrt(np.pi) * sigma_px), dtype=np.float64)


def _wood(points: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Colour a light, quiet wooden table top: (n, 3) colours of (n, 3) world points."""
    x, y = points[:, 0], points[:, 1]
    board = np.floor((y + 3) / 0.11)
    along = x + 0.37 * np.mod(board * 7, 5)
    grain = np.sin(58 * (y + 0.012 * np.sin(9 * along + board)) + 3 * np.sin(3.1 * along + 2 * board))
    fine = np.sin(410 * y + 11 * np.sin(6 * along + board))
    seam = np.abs(np.mod(y + 3, 0.11) - 0.055) > 0.0542
    tone = 1 + 0.035 * grain + 0.015 * fine + 0.03 * np.sin(board * 2.4) - 0.16 * seam
    return np.asarray(np.array([206.0, 184, 156], dtype=np.float32) * tone[:, None])


def _plane(half_m: float) -> Mesh:
    corners = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * half_m
    return Mesh(vertices_m=corners.astype(np.float32), faces=np.array([[0, 1, 2], [0, 2, 3]], dtype=np.int32))


def _shifted(z_m: float) -> Float64:
    T = np.eye(4)
    T[2, 3] = z_m
    return T


def _dot(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(np.einsum("...i,...i->...", a, b))


def _unit(vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray(vectors / np.sqrt(_dot(vectors, vectors))[..., None])
