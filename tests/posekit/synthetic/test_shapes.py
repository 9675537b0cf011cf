"""The procedural objects: sound meshes, and true symmetries."""

from __future__ import annotations

import io

import numpy as np
import pytest

from posekit.engine import Mesh
from posekit.render import Caster
from posekit.synthetic.scenes import pose_errors
from posekit.synthetic.shapes import SHAPES, mesh_to_ply, rotation

trimesh = pytest.importorskip("trimesh")


def surface_gap_mm(mesh: Mesh, T: np.ndarray) -> float:
    """Return the largest distance of a moved mesh's vertices to the mesh."""
    import open3d as o3d

    moved = (mesh.vertices_m @ T[:3, :3].T + T[:3, 3]).astype(np.float32)
    scene = Caster([mesh])._scene
    return float(scene.compute_distance(o3d.core.Tensor(moved)).numpy().max() * 1000)


@pytest.mark.parametrize("name", SHAPES)
def test_every_part_is_watertight_with_its_outside_outside(name: str) -> None:
    mesh = SHAPES[name]().mesh
    whole = trimesh.Trimesh(mesh.vertices_m, mesh.faces, process=False)
    for part in whole.split(only_watertight=False):
        assert part.is_watertight
        assert part.volume > 0


@pytest.mark.parametrize("name", SHAPES)
def test_objects_have_the_size_of_things_on_a_desk(name: str) -> None:
    shape = SHAPES[name]()
    extents = np.ptp(shape.mesh.vertices_m, axis=0)
    assert shape.name == name
    assert 0.06 <= np.linalg.norm(extents) <= 0.25
    assert shape.mesh.vertices_m.dtype == np.float32
    assert shape.mesh.faces.dtype == np.int32
    assert shape.mesh.vertex_colors is not None
    assert shape.mesh.vertex_colors.shape == shape.mesh.vertices_m.shape


@pytest.mark.parametrize("name", SHAPES)
def test_symmetries_map_the_object_onto_itself(name: str) -> None:
    shape = SHAPES[name]()
    for T in shape.symmetries.discrete:
        assert surface_gap_mm(shape.mesh, T) < 0.2
    for axis, offset in shape.symmetries.continuous:
        for degrees in (13, 77, 180):
            T = np.eye(4)
            T[:3, :3] = rotation(axis, degrees)
            T[:3, 3] = offset - T[:3, :3] @ offset
            assert surface_gap_mm(shape.mesh, T) < 0.2


@pytest.mark.parametrize("name", [name for name, make in SHAPES.items() if not make().symmetries.continuous])
def test_no_half_or_quarter_turn_is_missing_from_the_symmetries(name: str) -> None:
    shape = SHAPES[name]()
    low, high = shape.mesh.vertices_m.min(axis=0), shape.mesh.vertices_m.max(axis=0)
    middle = ((low + high) / 2).astype(np.float64)
    for axis in np.eye(3):
        for degrees in (60, 90, 180):
            T = np.eye(4)
            T[:3, :3] = rotation(axis, degrees)
            T[:3, 3] = middle - T[:3, :3] @ middle
            known = pose_errors(T, np.eye(4), shape.symmetries)[0] < 1
            assert known or surface_gap_mm(shape.mesh, T) > 1.5


@pytest.mark.parametrize("unit, factor", [("mm", 1000), ("m", 1)])
def test_ply_keeps_vertices_faces_and_colours(unit: str, factor: int) -> None:
    mesh = SHAPES["mug"]().mesh
    read = trimesh.load(io.BytesIO(mesh_to_ply(mesh, unit)), file_type="ply", process=False)  # type: ignore[arg-type]
    assert np.allclose(read.vertices, mesh.vertices_m * factor, rtol=1e-6)
    assert np.array_equal(read.faces, mesh.faces)
    assert np.array_equal(read.visual.vertex_colors[:, :3], mesh.vertex_colors)


def test_ply_of_a_mesh_without_colours_has_none() -> None:
    colored = SHAPES["wedge"]().mesh
    data = mesh_to_ply(Mesh(vertices_m=colored.vertices_m, faces=colored.faces))
    assert b"red" not in data[:400]
    assert len(trimesh.load(io.BytesIO(data), file_type="ply", process=False).faces) == len(colored.faces)
