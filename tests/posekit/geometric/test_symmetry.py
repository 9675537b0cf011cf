"""Symmetries found from the CAD, and poses measured modulo them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import trimesh

from posekit.engine import Symmetries
from posekit.geometric import symmetry
from posekit.geometric.symmetry import pose_difference
from posekit.synthetic.shapes import SHAPES, rotation
from tests.posekit.geometric.support import NO_SYMMETRY, at, cuboid, mesh_of, model, onboarded


@pytest.mark.parametrize("name", ["bracket", "flange", "gear", "bolt", "bottle", "adapter", "housing"])
def test_symmetries_of_known_shapes_are_found(name: str) -> None:
    wanted, found = SHAPES[name]().symmetries, model(name).symmetries
    assert len(found.discrete) == len(wanted.discrete)
    assert len(found.continuous) == len(wanted.continuous)
    for T in wanted.discrete:
        assert min(pose_difference(T, other, NO_SYMMETRY)[0] for other in found.discrete) < 2
        assert min(pose_difference(T, other, NO_SYMMETRY)[1] for other in found.discrete) < 0.002
    for (axis, _), (other, offset) in zip(wanted.continuous, found.continuous, strict=True):
        assert abs(axis @ other) == pytest.approx(1, abs=1e-3)
        assert np.linalg.norm(np.cross(offset, axis)) < 0.002


@pytest.mark.parametrize(
    "extents_mm, turns", [((60, 80, 110), 3), ((60, 60, 110), 7), ((70, 70, 70), 23)], ids=["box", "square", "cube"]
)
def test_boxes_have_the_turns_that_keep_them(extents_mm: tuple[float, float, float], turns: int) -> None:
    box = cuboid([extent / 1000 for extent in extents_mm])
    box.apply_transform(at(0.05, -0.1, 0.02, rotation((1, 2, 3), 40)))
    found = onboarded(mesh_of(box)).symmetries
    assert (len(found.discrete), len(found.continuous)) == (turns, 0)


def test_a_cylinder_has_an_axis_and_a_flip_and_a_ball_turns_every_way() -> None:
    cylinder = onboarded(mesh_of(trimesh.creation.cylinder(0.03, 0.12))).symmetries
    assert (len(cylinder.discrete), len(cylinder.continuous)) == (1, 1)
    assert len(onboarded(mesh_of(trimesh.creation.icosphere(4, 0.05))).symmetries.continuous) == 3


def test_colours_break_symmetries_and_leave_twins_to_compare() -> None:
    box = cuboid((0.06, 0.08, 0.11), cuts=4)
    red_end = np.where(box.vertices[:, 2:] > 0.02, (200, 30, 30), (30, 30, 200)).astype(np.uint8)
    made = onboarded(mesh_of(box, red_end))
    assert len(made.symmetries.discrete) == 1  # the half turn about z
    assert len(made.arrays["twins"]) >= 3  # identity and the two flips


def test_pose_difference_counts_modulo_symmetries() -> None:
    T = at(0.1, 0.2, 0.7, rotation((1, 1, 0), 40))
    turned = T @ at(0, 0, 0, rotation((0, 0, 1), 77))
    round_z = Symmetries(continuous=((np.array([0, 0, 2.0]), np.zeros(3)),))
    assert pose_difference(turned, T, NO_SYMMETRY)[0] == pytest.approx(77)
    assert pose_difference(turned, T, round_z)[0] == pytest.approx(0, abs=1e-6)
    flip = at(0, 0, 0, rotation((1, 0, 0), 180))
    both = dataclasses.replace(round_z, discrete=(flip,))
    assert pose_difference(turned @ flip, T, both)[0] == pytest.approx(0, abs=1e-5)
    moved = symmetry.moved(both, np.array([0.0, 0.1, 0]))
    assert moved.continuous[0][1].tolist() == [0.0, 0.1, 0.0]
    assert moved.discrete[0][:3, 3] == pytest.approx([0, 0.2, 0])
