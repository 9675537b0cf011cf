"""Points on a mesh's surface, and how far it reaches."""

from __future__ import annotations

import numpy as np
import pytest

from posekit.engine import Mesh
from posekit.surface import diameter_of, sample_surface
from posekit.synthetic.box import box_mesh
from posekit.synthetic.shapes import SHAPES


def test_points_are_spread_by_area_and_always_the_same() -> None:
    points, normals, colours, spacing = sample_surface(box_mesh(), 4000)
    again = sample_surface(box_mesh(), 4000)
    np.testing.assert_array_equal(points, again[0])
    assert colours is None
    areas = {0: 2 * 0.06 * 0.04, 1: 2 * 0.10 * 0.04, 2: 2 * 0.10 * 0.06}  # of the sides across x, y, z
    for axis, area in areas.items():
        share = (np.abs(normals[:, axis]) > 0.9).mean()
        assert share == pytest.approx(area / sum(areas.values()), abs=0.01)
    assert spacing == pytest.approx(np.sqrt(sum(areas.values()) / 4000))
    assert (np.isclose(np.abs(points), [0.05, 0.03, 0.02]).any(axis=1)).all(), "every point lies on a side"


def test_colours_are_those_of_the_corners_around() -> None:
    mesh = SHAPES["housing"]().mesh
    _, _, colours, _ = sample_surface(mesh, 100)
    assert mesh.vertex_colors is not None
    assert colours is not None
    assert colours.shape == (100, 3)
    assert (colours >= mesh.vertex_colors.min(axis=0)).all()
    assert (colours <= mesh.vertex_colors.max(axis=0)).all()


def test_a_mesh_without_area_gives_points_all_the_same() -> None:
    line = Mesh(
        vertices_m=np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0]], np.float32), faces=np.array([[0, 1, 2]], np.int32)
    )
    points, normals, _, _ = sample_surface(line, 50)
    assert np.isfinite(points).all()
    assert not normals.any()


def test_a_diameter_is_the_longest_distance_of_a_solid_and_of_a_sheet() -> None:
    corners = box_mesh().vertices_m.astype(np.float64)
    assert diameter_of(corners) == pytest.approx(np.sqrt(0.10**2 + 0.06**2 + 0.04**2))
    assert diameter_of(corners * [1, 1, 0]) == pytest.approx(np.hypot(0.10, 0.06))
    assert diameter_of(corners[:1]) == 0.0
