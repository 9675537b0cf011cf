import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posekit import geometry
from tests.fuzzing import examples

angles = st.floats(-3.0, 3.0)
vectors = st.tuples(angles, angles, angles)


def rotation(vector: tuple[float, float, float]) -> torch.Tensor:
    return geometry.rotation_from_vector(torch.tensor(vector, dtype=torch.float64))


@settings(max_examples=examples(30), deadline=None)
@given(vectors)
def test_a_rotation_vector_gives_a_rotation_that_turns_back(vector: tuple[float, float, float]) -> None:
    R = rotation(vector)
    back = rotation((-vector[0], -vector[1], -vector[2]))
    assert torch.allclose(R @ back, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert torch.linalg.det(R).item() == pytest.approx(1.0)


def test_the_angle_between_rotations_is_exact_for_tiny_turns_and_half_turns() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    assert geometry.rotation_angle_deg(rotation((1e-7, 0, 0)), eye).item() == pytest.approx(math.degrees(1e-7))
    assert geometry.rotation_angle_deg(rotation((0, math.pi, 0)), eye).item() == pytest.approx(180.0)


@settings(max_examples=examples(30), deadline=None)
@given(vectors, vectors)
def test_alignment_recovers_a_known_motion(turn: tuple[float, float, float], shift: tuple[float, float, float]) -> None:
    source = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = source @ rotation(turn).mT + torch.tensor(shift, dtype=torch.float64)
    R, t = geometry.align_points(source, target, torch.ones(20, dtype=torch.float64))
    assert torch.allclose(R, rotation(turn), atol=1e-9)
    assert torch.allclose(t, torch.tensor(shift, dtype=torch.float64), atol=1e-9)


def test_alignment_never_mirrors_and_points_without_weight_do_not_vote() -> None:
    generator = torch.Generator().manual_seed(2)
    source = torch.randn(10, 3, generator=generator)
    R, _ = geometry.align_points(source, source * torch.tensor([1.0, 1.0, -1.0]), torch.ones(10))
    assert torch.linalg.det(R).item() == pytest.approx(1.0, abs=1e-5)
    weight = torch.ones(10)
    weight[0] = 0
    target = source.clone()
    target[0] += 100
    R, t = geometry.align_points(source, target, weight)
    assert torch.allclose(R, torch.eye(3), atol=1e-5)
    assert torch.allclose(t, torch.zeros(3), atol=1e-5)


def test_each_row_of_a_batch_is_its_own() -> None:
    generator = torch.Generator().manual_seed(3)
    source, target = torch.randn(2, 4, 12, 3, generator=generator)
    weight = torch.rand(4, 12, generator=generator)
    together = geometry.align_points(source, target, weight)
    for row in range(4):
        alone = geometry.align_points(source[row], target[row], weight[row])
        assert torch.allclose(together[0][row], alone[0], atol=1e-5)
        assert torch.allclose(together[1][row], alone[1], atol=1e-5)


def test_projection_undoes_backprojection() -> None:
    K = torch.tensor([[500.0, 2.0, 7.5], [0, 510.0, 4.25], [0, 0, 1]])
    v, u = torch.meshgrid(torch.arange(9.0), torch.arange(16.0), indexing="ij")
    depth_m = torch.rand(9, 16, generator=torch.Generator().manual_seed(4)) + 0.5
    again = geometry.project(geometry.backproject(u, v, depth_m, K), K)
    assert torch.allclose(again[0], u, atol=1e-3)
    assert torch.allclose(again[1], v, atol=1e-3)


def test_each_instance_of_a_batch_is_projected_by_its_own_camera() -> None:
    K = torch.tensor([[[500.0, 2.0, 7.5], [0, 510.0, 4.25], [0, 0, 1]], [[300.0, 0, 80], [0, 310.0, 60], [0, 0, 1]]])
    points = torch.rand(2, 4, 5, 3, generator=torch.Generator().manual_seed(5)) + 0.5
    u, v = geometry.project(points, K)
    for index in range(2):
        alone = geometry.project(points[index], K[index])
        assert torch.allclose(u[index], alone[0])
        assert torch.allclose(v[index], alone[1])
    assert torch.allclose(geometry.backproject(u, v, points[..., 2], K), points, atol=1e-5)


def test_points_behind_the_camera_land_far_outside_any_image() -> None:
    K = torch.tensor([[500.0, 0, 320], [0, 500.0, 240], [0, 0, 1]])
    u, _ = geometry.project(torch.tensor([[0.1, 0.0, -1.0]]), K)
    assert u.abs().item() > 1e6


def test_view_directions_leave_no_large_gap() -> None:
    directions = geometry.view_directions(240)
    assert torch.allclose(directions.norm(dim=1), torch.ones(240, dtype=torch.float64))
    probes = torch.nn.functional.normalize(
        torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)), dim=1
    )
    nearest = torch.rad2deg(torch.acos((probes @ directions.mT).max(dim=1).values.clamp(max=1)))
    assert nearest.max() < 12


def test_a_view_looks_at_the_object_and_a_ray_is_met_by_the_z_axis() -> None:
    directions = torch.cat((geometry.view_directions(50), torch.eye(3).double(), -torch.eye(3).double()))
    R = geometry.rotation_looking_from(directions)
    z = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    assert torch.allclose((R @ directions[:, :, None])[..., 0], -z.expand(56, 3), atol=1e-9)
    assert torch.allclose(torch.linalg.det(R), torch.ones(56, dtype=torch.float64))
    assert torch.allclose(geometry.rotation_from_z_to(directions) @ z, directions, atol=1e-9)


def test_a_rotation_grid_holds_every_view_with_every_roll() -> None:
    grid = geometry.rotation_grid(geometry.view_directions(7), 4)
    assert grid.shape == (7, 4, 3, 3)
    assert geometry.rotation_angle_deg(grid[:, 0], grid[:, 1]).tolist() == pytest.approx([90.0] * 7)
