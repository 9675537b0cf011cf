"""Furthest-point sampling: known answers, the reference, ties, the op's contract, bad input."""

from __future__ import annotations

import pytest
import torch

import pointnet2_ext
from pointnet2_ext import reference

# Around the widths of vectors, warps, chunks and blocks.
SIZES = [
    *((2, n, min(n, 9)) for n in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65)),
    *((3, 513, 196), (2, 2048, 196), (1, 2049, 20), (1, 4097, 20), (1, 5000, 64)),
]


def test_picks_the_far_end_then_the_middle(device):
    line = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [5, 0, 0], [10, 0, 0]]], device=device)
    assert pointnet2_ext.furthest_point_sample(line, 3).tolist() == [[0, 4, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch, n, count", SIZES)
def test_matches_the_reference(cloud, batch, n, count, dtype):
    points = cloud(batch, n, dtype)
    picked = pointnet2_ext.furthest_point_sample(points, count)
    assert picked.dtype == torch.int64
    torch.testing.assert_close(picked, reference.furthest_point_sample(points, count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["scattered", "repeated", "on a grid", "flat", "with one far away", "tiny", "huge"])
def test_a_large_cloud_is_sampled_as_the_reference_does(cloud, kind, dtype):
    points = cloud(1, 12345, dtype)
    if kind == "repeated":
        points[:, 7400:] = points[:, :4945]
    elif kind == "on a grid":  # whole numbers: ties everywhere
        points = (5 * points).round()
    elif kind == "flat":
        points[..., 2] = 1
    elif kind == "with one far away":
        points[:, 77] = 1e6
    elif kind in ("tiny", "huge"):  # squares that are lost to zero, and to infinity
        points *= torch.finfo(dtype).tiny if kind == "tiny" else torch.finfo(dtype).max / 8
    picked = pointnet2_ext.furthest_point_sample(points, 300)
    torch.testing.assert_close(picked, reference.furthest_point_sample(points, 300))


@pytest.mark.parametrize("count", [12, 300])
def test_threads_change_nothing(cloud, with_threads, count):
    points = cloud(2, 70000)
    with_threads(1)
    alone = pointnet2_ext.furthest_point_sample(points[:1], count)
    with_threads(3)
    torch.testing.assert_close(pointnet2_ext.furthest_point_sample(points[:1], count), alone)
    torch.testing.assert_close(pointnet2_ext.furthest_point_sample(points, count)[:1], alone)


@pytest.mark.parametrize("batch, n, count", SIZES)
def test_each_pick_is_the_furthest_by_exhaustive_search(cloud, batch, n, count):
    points = cloud(batch, n, torch.float64).cpu()
    picked = pointnet2_ext.furthest_point_sample(points, min(count, 20))
    for cloud_points, row in zip(points, picked, strict=True):
        for step in range(1, len(row)):
            to_picked = (cloud_points[:, None] - cloud_points[row[:step]]).norm(dim=-1).amin(1)
            assert row[step] == to_picked.argmax()


def test_ties_go_to_the_lowest_index(device):
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]], device=device)
    assert pointnet2_ext.furthest_point_sample(corners[None], 5).tolist() == [[0, 1, 2, 3, 4]]


def test_repeated_points_go_to_the_lowest_index(cloud, device):
    points = cloud(1, 40)[:, :4].repeat(1, 512, 1)
    picked = pointnet2_ext.furthest_point_sample(points, 4).sort().values
    torch.testing.assert_close(picked, torch.arange(4, device=device)[None])


def test_when_all_distances_are_zero_the_answer_is_index_zero(device):
    same = torch.ones(2, 17, 3, device=device)
    assert pointnet2_ext.furthest_point_sample(same, 5).tolist() == [[0] * 5] * 2


def test_a_row_of_a_batch_is_answered_as_if_alone(cloud):
    points = cloud(4, 129)
    together = pointnet2_ext.furthest_point_sample(points, 32)
    alone = torch.cat([pointnet2_ext.furthest_point_sample(row[None], 32) for row in points])
    torch.testing.assert_close(together, alone)


def test_a_strided_view_gives_what_its_copy_gives(cloud):
    view = cloud(2, 66)[:, ::2]
    assert not view.is_contiguous()
    picked = pointnet2_ext.furthest_point_sample(view, 9)
    torch.testing.assert_close(picked, pointnet2_ext.furthest_point_sample(view.clone(), 9))


def test_an_empty_batch_has_an_empty_answer(device):
    assert pointnet2_ext.furthest_point_sample(torch.zeros(0, 5, 3, device=device), 2).shape == (0, 2)


@pytest.mark.parametrize("n, count", [(9, 4), (9000, 300)])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_points_that_are_not_numbers_end_in_valid_indices(cloud, value, n, count):
    for points in (torch.full_like(cloud(1, n), float(value)), cloud(1, n)):
        points[:, ::3] = float(value)
        picked = pointnet2_ext.furthest_point_sample(points, count)
        assert ((picked >= 0) & (picked < n)).all()


def test_the_op_keeps_the_contract_of_torch(cloud):
    torch.library.opcheck(torch.ops.pointnet2_ext.furthest_point_sample.default, (cloud(2, 64), 8))


@pytest.mark.parametrize(
    "points, count, message",
    [
        (torch.zeros(5, 3), 1, r"points must be \(B, N, 3\), got \(5, 3\)"),
        (torch.zeros(1, 5, 4), 1, r"points must be \(B, N, 3\), got \(1, 5, 4\)"),
        (torch.zeros(1, 5, 3), 0, "count must be between 1 and the 5 points, got 0"),
        (torch.zeros(1, 5, 3), 6, "count must be between 1 and the 5 points, got 6"),
        (torch.zeros(1, 0, 3), 1, "count must be between 1 and the 0 points, got 1"),
        (torch.zeros(1, 5, 3, dtype=torch.float16), 1, "points must be float32 or float64, got torch.float16"),
        (torch.zeros(1, 5, 3, dtype=torch.int64), 1, "points must be float32 or float64, got torch.int64"),
    ],
)
def test_bad_input_is_refused_in_words(device, points, count, message):
    with pytest.raises(ValueError, match=message):
        pointnet2_ext.furthest_point_sample(points.to(device), count)
