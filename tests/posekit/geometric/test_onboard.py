"""What onboarding computes from the CAD alone: arrays, outward directions, and thickness of walls."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh
from scipy.spatial import cKDTree

from posekit.engine import Float64, Mesh, Symmetries
from posekit.geometric import VERSION, onboard
from posekit.geometric.symmetry import Indices
from posekit.synthetic.shapes import SHAPES
from tests.posekit.geometric.support import cuboid, engine, mesh_of, model, of_shells, onboarded

BOX_M = (0.06, 0.08, 0.11)


def test_onboarding_twice_gives_the_same_arrays_and_reports_progress_up_to_one() -> None:
    shares: list[float] = []
    again = engine().onboard("wedge", SHAPES["wedge"]().mesh, None, shares.append)
    first = model("wedge")
    assert first.arrays.keys() == again.arrays.keys()
    assert all(first.arrays[name].tobytes() == again.arrays[name].tobytes() for name in first.arrays)
    assert (first.diameter_m, first.engine, first.engine_version) == (again.diameter_m, "geometric", VERSION)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_preparing_is_idempotent_and_a_model_is_small() -> None:
    made = model("wedge")
    assert engine().prepare(made) == engine().prepare(made) > 0
    assert made.nbytes < 4_000_000


def test_declared_symmetries_override_those_found() -> None:
    declared = Symmetries(continuous=((np.array([0.0, 0, 1]), np.zeros(3)),))
    _, symmetries, _ = onboard.build(SHAPES["bolt"]().mesh, declared, lambda share: None)
    assert symmetries is declared


def test_a_single_triangle_is_onboarded_too() -> None:
    sheet = Mesh(
        vertices_m=np.array([[0, 0, 0], [0.1, 0, 0], [0, 0.05, 0]], np.float32), faces=np.array([[0, 1, 2]], np.int32)
    )
    made = onboarded(sheet)
    assert made.diameter_m == pytest.approx(np.hypot(0.1, 0.05), rel=1e-5)
    assert all(np.isfinite(array).all() for array in made.arrays.values())
    assert not made.arrays["oriented"][0]
    assert not made.arrays["thickness_m"].any()


# ---------------------------------------------------------------------------------------------------- outward_normals


def test_faces_of_a_box_tell_which_way_is_out_and_turned_over_the_contrary() -> None:
    solid = cuboid(BOX_M, cuts=1)
    assert onboard.outward_normals(mesh_of(solid)) == 1
    solid.invert()
    assert onboard.outward_normals(mesh_of(solid)) == -1


def test_where_the_box_lies_does_not_matter() -> None:
    solid = cuboid(BOX_M, cuts=1)
    solid.apply_translation((5, -3, 1))
    assert onboard.outward_normals(mesh_of(solid)) == 1


def test_faces_in_any_order_of_corners_tell_nothing() -> None:
    solid = cuboid(BOX_M, cuts=2)
    over = np.random.default_rng(0).random(len(solid.faces)) < 0.5
    faces = np.where(over[:, None], solid.faces[:, ::-1], solid.faces)
    assert onboard.outward_normals(mesh_of(trimesh.Trimesh(solid.vertices, faces, process=False))) == 0


def test_an_open_sheet_tells_nothing() -> None:
    solid = cuboid(BOX_M, cuts=2)
    for kept in (solid.face_normals[:, 2] > 0.5, solid.face_normals[:, 2] < 0.5):  # the lid, the box without it
        sheet = trimesh.Trimesh(solid.vertices, solid.faces[kept], process=False)
        assert onboard.outward_normals(mesh_of(sheet)) == 0


def test_a_cavity_inside_a_box_does_not_turn_it_inside_out() -> None:
    solid, cavity = cuboid(BOX_M, cuts=1), cuboid((0.03, 0.04, 0.05), cuts=2)
    cavity.invert()
    for shells in ([solid, cavity], [cavity, solid]):
        assert onboard.outward_normals(of_shells(*shells)) == 1


def test_of_several_shells_the_largest_decides() -> None:
    solid, crumb = cuboid(BOX_M, cuts=1), cuboid((0.01, 0.01, 0.01))
    crumb.invert()
    for x_m in (-0.1, 0.1):
        crumb.apply_translation((x_m, 0, 0))
        assert onboard.outward_normals(of_shells(crumb, solid)) == 1
        crumb.apply_translation((-x_m, 0, 0))


def test_corners_that_a_file_repeats_for_every_face_are_one_corner() -> None:
    solid = cuboid(BOX_M, cuts=1)
    corners = solid.vertices[solid.faces].reshape(-1, 3)
    faces = np.arange(len(corners)).reshape(-1, 3)
    assert onboard.outward_normals(mesh_of(trimesh.Trimesh(corners, faces, process=False))) == 1


@pytest.mark.parametrize("name", SHAPES)
def test_of_every_shape_it_is_known_which_way_is_out(name: str) -> None:
    assert onboard.outward_normals(SHAPES[name]().mesh) == 1


def test_a_model_turned_inside_out_is_stored_with_normals_that_point_outwards() -> None:
    solid = cuboid(BOX_M, cuts=1)
    solid.invert()
    made = onboarded(mesh_of(solid))
    assert made.arrays["oriented"][0]
    assert ((made.arrays["points_m"] * made.arrays["normals"]).sum(axis=1) > 0).all()


# -------------------------------------------------------------------------------------------------------- thicknesses


def measured(extents_m: tuple[float, float, float], most_m: float) -> tuple[Float64, Float64, float]:
    """Return thicknesses below the samples of a box (S,), their normals (S, 3) and their spacing."""
    points, normals, _, spacing = onboard.sample_surface(mesh_of(cuboid(extents_m)), onboard.SAMPLES)
    tree = cKDTree(points)

    def nearest_of(queries: Float64) -> Indices:
        return np.asarray(tree.query(queries)[1], dtype=np.intp)

    return onboard.thicknesses(points, normals, nearest_of, spacing, most_m), normals, spacing


@pytest.mark.parametrize("thickness_m", [0.002, 0.004, 0.008])
def test_the_thickness_of_a_plate_is_found_below_its_two_sides(thickness_m: float) -> None:
    found, normals, spacing = measured((0.1, 0.08, thickness_m), 0.02)
    sides = np.abs(normals[:, 2]) > 0.9
    known = found[sides] > 0
    assert known.mean() > 0.99
    assert np.abs(found[sides][known] - thickness_m).max() < spacing
    assert not found[~sides].any()


def test_a_solid_thicker_than_asked_for_has_no_thickness() -> None:
    assert not measured((0.1, 0.08, 0.06), 0.02)[0].any()
    assert measured((0.1, 0.08, 0.018), 0.02)[0].any()


def test_an_angle_is_as_thick_as_its_sheet() -> None:
    found = model("bracket").arrays["thickness_m"]
    assert np.median(found[found > 0]) == pytest.approx(0.007, abs=1e-4)
    assert (found > 0).mean() > 0.5


# --------------------------------------------------------------------------------------------------------------- views


def test_samples_of_a_view_are_those_that_face_it() -> None:
    made = onboarded(mesh_of(cuboid(BOX_M)))
    directions = made.arrays["view_directions"]
    normals = made.arrays["normals"][made.arrays["view_samples"]]  # (V, M, 3)
    facing = (normals * directions[:, None]).sum(axis=-1)
    assert (facing > -0.05).mean() > 0.98


def test_the_field_names_the_nearest_sample_of_each_cell() -> None:
    arrays = model("wedge").arrays
    points, nearest = arrays["points_m"].astype(np.float64), arrays["field_nearest"]
    cells = np.stack(np.unravel_index(np.arange(0, nearest.size, 997), nearest.shape), axis=-1)
    middles = arrays["field_origin_m"] + (cells + 0.5) * arrays["field_cell_m"]
    distance = np.linalg.norm(middles - points[nearest[tuple(cells.T)]], axis=1)
    assert distance == pytest.approx(cKDTree(points).query(middles)[0], abs=1e-6)
