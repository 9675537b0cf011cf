"""Ball query: known answers, the reference, ties, the op's contract, bad input."""

from __future__ import annotations

import pytest
import torch

import pointnet2_ext
from pointnet2_ext import reference

# Around the widths of vectors, warps and pages.
SIZES = [
    *((2, n, 3, 9) for n in (1, 7, 8, 9, 15, 16, 17, 31, 32, 127, 128, 129)),
    *((2, 33, 33, 8), (3, 513, 65, 32), (1, 5000, 20, 40), (2, 2048, 196, 64)),
]


def test_returns_the_first_hits_in_ascending_order(device):
    line = torch.tensor([[[3.0, 0, 0], [0, 0, 0], [1, 0, 0], [9, 0, 0], [2, 0, 0]]], device=device)
    center = torch.zeros(1, 1, 3, device=device)
    assert pointnet2_ext.ball_query(line, center, 2.5, 2).tolist() == [[[1, 2]]]
    assert pointnet2_ext.ball_query(line, center, 3.5, 4).tolist() == [[[0, 1, 2, 4]]]


def test_slots_left_over_repeat_the_first_hit(device):
    points = torch.tensor([[[9.0, 0, 0], [1, 0, 0], [9, 9, 0], [0, 1, 0]]], device=device)
    assert pointnet2_ext.ball_query(points, torch.zeros(1, 1, 3, device=device), 2.0, 5).tolist() == [[[1, 3, 1, 1, 1]]]


def test_a_center_without_a_hit_gets_index_zero(device):
    points = torch.full((1, 6, 3), 9.0, device=device)
    assert pointnet2_ext.ball_query(points, torch.zeros(1, 2, 3, device=device), 1.0, 3).tolist() == [[[0] * 3] * 2]


def test_a_point_at_exactly_the_radius_is_outside(device):
    points = torch.tensor([[[9.0, 0, 0], [2, 0, 0], [1.5, 0, 0]]], device=device)
    assert pointnet2_ext.ball_query(points, torch.zeros(1, 1, 3, device=device), 2.0, 2).tolist() == [[[2, 2]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("batch, n, m, count", SIZES)
def test_matches_the_reference(cloud, batch, n, m, count, radius, dtype):
    points, centers = cloud(batch, n, dtype), cloud(batch, m, dtype, seed=1)
    indices = pointnet2_ext.ball_query(points, centers, radius, count)
    assert indices.dtype == torch.int64
    torch.testing.assert_close(indices, reference.ball_query(points, centers, radius, count))


@pytest.mark.parametrize("count", [1, 7, 8, 32, 2048])
def test_repeated_points_are_hits_each(cloud, count):
    points = cloud(1, 2048)
    points[:, 1229:] = points[:, :819]
    indices = pointnet2_ext.ball_query(points, points, 0.3, count)
    torch.testing.assert_close(indices, reference.ball_query(points, points, 0.3, count))


def test_threads_change_nothing(cloud, with_threads):
    points = cloud(1, 2048)
    with_threads(1)
    alone = pointnet2_ext.ball_query(points, points, 0.3, 16)
    with_threads(3)
    torch.testing.assert_close(pointnet2_ext.ball_query(points, points, 0.3, 16), alone)


def test_points_that_are_not_numbers_are_no_hits(cloud):
    points = cloud(1, 40)
    points[:, ::2] = float("nan")
    indices = pointnet2_ext.ball_query(points, points[:, 1:2], 100.0, 40)
    assert indices[0, 0].tolist() == [*range(1, 40, 2), *[1] * 20]


@pytest.mark.parametrize("batch, n, m, count", SIZES[:-1])
def test_matches_a_search_written_as_loops(cloud, batch, n, m, count):
    points, centers = cloud(batch, n, torch.float64).cpu(), cloud(batch, m, torch.float64, seed=2).cpu()
    indices = pointnet2_ext.ball_query(points, centers, 0.7, count)
    for row, (cloud_points, row_centers) in zip(indices, zip(points, centers, strict=True), strict=True):
        for slots, center in zip(row, row_centers, strict=True):
            hits = ((cloud_points - center).norm(dim=-1) < 0.7).nonzero().flatten().tolist()[:count] or [0]
            assert slots.tolist() == hits + hits[:1] * (count - len(hits))


def test_no_centers_give_an_empty_answer(cloud):
    points = cloud(2, 5)
    assert pointnet2_ext.ball_query(points, points[:, :0], 1.0, 4).shape == (2, 0, 4)


def test_a_row_of_a_batch_is_answered_as_if_alone(cloud):
    points, centers = cloud(4, 129), cloud(4, 40, seed=1)
    together = pointnet2_ext.ball_query(points, centers, 0.5, 16)
    rows = zip(points, centers, strict=True)
    alone = torch.cat([pointnet2_ext.ball_query(p[None], c[None], 0.5, 16) for p, c in rows])
    torch.testing.assert_close(together, alone)


def test_strided_views_give_what_their_copies_give(cloud):
    points, centers = cloud(2, 66)[:, ::2], cloud(2, 20, seed=1)[:, ::2]
    indices = pointnet2_ext.ball_query(points, centers, 0.5, 9)
    torch.testing.assert_close(indices, pointnet2_ext.ball_query(points.clone(), centers.clone(), 0.5, 9))


def test_the_op_keeps_the_contract_of_torch(cloud):
    arguments = (cloud(2, 64), cloud(2, 9, seed=1), 0.5, 8)
    torch.library.opcheck(torch.ops.pointnet2_ext.ball_query.default, arguments)


POINTS, CENTERS = torch.zeros(1, 5, 3), torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    "points, centers, radius, count, message",
    [
        (POINTS[0], CENTERS, 1.0, 1, r"points must be \(B, N, 3\), got \(5, 3\)"),
        (POINTS, CENTERS[..., :2], 1.0, 1, r"centers must be \(B, N, 3\), got \(1, 2, 2\)"),
        (POINTS, CENTERS.repeat(2, 1, 1), 1.0, 1, "points and centers must have the same batch, got 1 and 2"),
        (POINTS, CENTERS.double(), 1.0, 1, "the same dtype and device, got torch.float32 on .* torch.float64 on"),
        (POINTS[:, :0], CENTERS, 1.0, 1, "points must hold at least 1 point, got 0"),
        (POINTS, CENTERS, 0.0, 1, "radius must be a positive number, got 0.0"),
        (POINTS, CENTERS, float("nan"), 1, "radius must be a positive number, got nan"),
        (POINTS, CENTERS, 1.0, 0, "count must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused_in_words(device, points, centers, radius, count, message):
    with pytest.raises(ValueError, match=message):
        pointnet2_ext.ball_query(points.to(device), centers.to(device), radius, count)
