"""The benchmark's objects: sound meshes, and complete symmetries that shape and colour agree on."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.accuracy.objects import FAMILIES, objects
from posekit.engine import Float64
from posekit.io.meshes import diameter_m, is_watertight
from posekit.synthetic.scenes import pose_errors
from posekit.synthetic.shapes import Shape, rotation

EVERY_VARIANT = len(FAMILIES) * max(len(variants) for variants in FAMILIES.values())
SHAPES = objects(0, EVERY_VARIANT)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)


def parts(shape: Shape) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the closed surfaces of an object, as vertex numbers and faces."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    faces, count = shape.mesh.faces, len(shape.mesh.vertices_m)
    links = coo_array((np.ones(2 * len(faces)), (faces[:, [0, 0]].ravel(), faces[:, [1, 2]].ravel())), (count, count))
    found, label = connected_components(links, directed=False)
    return [(np.flatnonzero(label == part), faces[label[faces[:, 0]] == part]) for part in range(found)]


class Skin:
    """The visible outside of an object: its surface, and the place of each colour on it."""

    def __init__(self, shape: Shape) -> None:
        import open3d as o3d
        from scipy.spatial import cKDTree

        self._tensor = o3d.core.Tensor
        mesh = shape.mesh
        assert mesh.vertex_colors is not None
        outside = np.ones(len(mesh.vertices_m), dtype=np.bool_)
        for numbers, faces in parts(shape):
            others = np.setdiff1d(np.arange(len(mesh.vertices_m)), numbers)
            depth = self._scene(mesh.vertices_m, faces).compute_signed_distance(self._tensor(mesh.vertices_m[others]))
            outside[others] &= depth.numpy() > -5e-5
        seen = mesh.faces[outside[mesh.faces].all(axis=1)]
        corners = mesh.vertices_m[seen].astype(np.float64)
        areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
        self.middle = np.average(corners.mean(axis=1), axis=0, weights=areas)
        self.points = mesh.vertices_m[outside].astype(np.float64)
        colors = mesh.vertex_colors[outside]
        self._kinds, self._kind = np.unique(colors, axis=0, return_inverse=True)
        self._trees = [cKDTree(self.points[self._kind == kind]) for kind in range(len(self._kinds))]
        self._surface = self._scene(mesh.vertices_m, mesh.faces)

    def _scene(self, vertices_m: np.ndarray, faces: np.ndarray) -> object:
        import open3d as o3d

        scene = o3d.t.geometry.RaycastingScene()
        scene.add_triangles(self._tensor(vertices_m), self._tensor(faces.astype(np.uint32)))
        return scene

    def gaps_mm(self, T: Float64, step: int = 1) -> tuple[float, float]:
        """Return the largest gaps of every `step`-th moved vertex to the surface and to a vertex of the same colour."""
        moved = self.points[::step] @ T[:3, :3].T + T[:3, 3]
        surface = self._surface.compute_distance(self._tensor(moved.astype(np.float32))).numpy()  # type: ignore[attr-defined]
        kind = self._kind[::step]
        color = max(float(tree.query(moved[kind == at])[0].max(initial=0)) for at, tree in enumerate(self._trees))
        return float(surface.max() * 1000), color * 1000


def turn(axis: np.ndarray, degrees: float, point: np.ndarray) -> Float64:
    T = np.eye(4)
    T[:3, :3] = rotation(axis.tolist(), degrees)
    T[:3, 3] = point - T[:3, :3] @ point
    return T


def likely_turns(middle: np.ndarray) -> list[Float64]:
    """Return turns by 1/2 to 1/20 circle about the frame's axes, and half turns about lines across every 15 degrees."""
    found = [turn(axis, 360 / count, middle) for axis in np.eye(3) for count in range(2, 21)]
    for axis in np.eye(3):
        first = np.roll(axis, 1)
        found += [turn(rotation(axis.tolist(), degrees) @ first, 180, middle) for degrees in range(15, 180, 15)]
    return found


def test_a_seed_gives_the_same_objects() -> None:
    for one, other in zip(objects(7, 14), objects(7, 14), strict=True):
        assert one.name == other.name
        assert np.array_equal(one.mesh.vertices_m, other.mesh.vertices_m)
        assert np.array_equal(one.mesh.vertex_colors, other.mesh.vertex_colors)  # type: ignore[arg-type]
    assert not np.array_equal(objects(8, 1)[0].mesh.vertices_m, objects(7, 1)[0].mesh.vertices_m)


def test_every_family_appears_once_before_any_appears_twice() -> None:
    names = [shape.name for shape in SHAPES]
    count = len(FAMILIES)
    assert count >= 12
    assert len(set(names)) == len(names)
    for start in range(0, len(names), count):
        assert {name.rpartition("-")[0] for name in names[start : start + count]} == set(FAMILIES)


def test_more_objects_begin_with_the_same_ones() -> None:
    for few, many in zip(objects(0, 5), SHAPES, strict=False):
        assert np.array_equal(few.mesh.vertices_m, many.mesh.vertices_m)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_meshes_are_closed_small_and_of_the_size_of_things_on_a_desk(seed: int) -> None:
    for shape in objects(seed, EVERY_VARIANT):
        mesh = shape.mesh
        assert 0.06 <= diameter_m(mesh.vertices_m) <= 0.25, shape.name
        assert len(mesh.faces) <= 20_000, shape.name
        for numbers, faces in parts(shape):
            vertices = mesh.vertices_m.astype(np.float64)
            corners = vertices[faces] - vertices[numbers].mean(axis=0)
            assert is_watertight(mesh.vertices_m, faces), shape.name
            assert np.linalg.det(corners).sum() > 0, f"{shape.name} is inside out"


def test_cartons_differ_in_colour_only() -> None:
    cartons = [shape for shape in SHAPES if shape.name.startswith("carton")]
    sizes = [np.sort(np.ptp(shape.mesh.vertices_m, axis=0)) for shape in cartons]
    assert sum(np.allclose(size, (0.056, 0.084, 0.118), atol=1e-5) for size in sizes) >= 3


@each_shape
def test_symmetries_map_shape_and_colours_onto_themselves(shape: Shape) -> None:
    skin = Skin(shape)
    poses = list(shape.symmetries.discrete)
    for axis, offset in shape.symmetries.continuous:
        poses += [turn(axis, degrees, offset) for degrees in (13, 77, 180)]
    for T in poses:
        surface_mm, color_mm = skin.gaps_mm(T)
        assert surface_mm < 0.3
        assert color_mm < 6


@pytest.mark.slow
@each_shape
def test_no_symmetry_is_missing(shape: Shape) -> None:
    skin = Skin(shape)
    for T in likely_turns(skin.middle):
        if pose_errors(T, np.eye(4), shape.symmetries)[0] > 1.5:
            assert any(surface > 0.8 or color > 8 for surface, color in (skin.gaps_mm(T, step) for step in (20, 1)))
