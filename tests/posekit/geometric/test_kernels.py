"""The engine's compiled loops: known answers, their references, batches, odd input, and fallbacks without them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from posekit.geometric import kernels
from posekit.geometric.engine import GeometricEngine
from posekit.geometric.model import Prepared, Shelf, prepare
from posekit.geometric.observe import Observations
from posekit.geometric.poses import Poses
from posekit.geometry import rotation_angle_deg, rotation_from_vector
from posekit.synthetic.shapes import SHAPES

POSES = 40
POINTS = 100  # no multiple of a block
SIDE = 64
K = torch.tensor([[600.0, 1.0, 120.0], [0.0, 590.0, 118.0], [0.0, 0.0, 1.0]])
PICTURE = {"cell_px": torch.tensor([4.0]), "cell_m": torch.tensor([0.004]), "rows": SIDE, "columns": SIDE - 3}

compiled = pytest.mark.skipif(kernels.kernel_for("cpu") == "reference", reason="no compiled kernels here")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def model(name: str) -> Prepared:
    """Return a prepared object, thin-walled or massive; of the carton's normals only the line is trusted."""
    stored = GeometricEngine().onboard(name, SHAPES[name]().mesh, None, lambda share: None)
    return replace(prepare(stored, torch.device("cpu")), oriented=name != "carton")


def shelf(*names: str) -> Shelf:
    return Shelf.of([model(name) for name in names or ("mug",)])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observed(on: Shelf, exact: bool = False) -> tuple[Poses, Tensor, Tensor]:
    """Return poses from right to absurd, and noisy points and normals (B, N, 3) of the first, some of them wrong."""
    B = len(on.diameter_m)
    turn = random(B, POSES, 3, seed=0) * torch.linspace(0, 2, POSES)[:, None]
    shift = random(B, POSES, 3, seed=1) * torch.linspace(0, 0.1, POSES)[:, None]
    R = rotation_from_vector(turn) @ rotation_from_vector(random(B, 1, 3, seed=2))
    t = torch.tensor([0.02, -0.01, 0.6]) + shift
    t[:, -4:] = torch.tensor([[0.0, 0, -0.5], [0, 0, 0.01], [0, 0, 0], [300, -100, 1e4]])  # behind, inside, far
    sample = torch.arange(POINTS) * (on.samples // POINTS)
    seen = on.surface[on.first_sample[:, None] + sample]
    points, normals = seen[..., :3] @ R[:, 0].mT + t[:, :1], seen[..., 3:6] @ R[:, 0].mT
    if not exact:
        points = points + 0.001 * random(B, POINTS, 3, seed=3)
        normals = normals * torch.where(torch.arange(POINTS) % 7 == 0, -1.0, 1.0)[:, None]
    return Poses(R, t), points, normals


def intrinsics(on: Shelf) -> Tensor:
    return K.expand(len(on.diameter_m), 3, 3)


def picture(on: Shelf, run=kernels.front, **changes) -> tuple[Tensor, Tensor]:
    wanted = {**PICTURE, **changes}
    B = len(on.diameter_m)
    wanted |= {name: wanted[name].expand(B) for name in ("cell_px", "cell_m")}
    return run(on, observed(on)[0], intrinsics(on), **wanted)


def almost_all_close(ours: Tensor, theirs: Tensor, scale: Tensor | float) -> None:
    """Assert equality up to float32's rounding, except for rare points that fall to the other side of a cell's edge."""
    off = ((ours - theirs).abs() / scale).flatten(2 if ours.dim() > 2 else 1)
    assert torch.isfinite(off).all()
    assert off.max() < 0.05
    assert (off < 1e-4).float().mean() > 0.97


# ---- front


@pytest.mark.parametrize("names", [("mug",), ("housing", "mug", "carton")])
@pytest.mark.parametrize("cell_px", [1.0, 4.0, 1e4])
def test_front_matches_its_reference(names, cell_px):
    on = shelf(*names)
    size = torch.tensor([cell_px])
    depth_m, sample = picture(on, cell_px=size)
    depth_there_m, sample_there = picture(on, kernels.front_reference, cell_px=size)
    assert (depth_m.dtype, sample.dtype) == (torch.float32, torch.int64)
    same = torch.isinf(depth_m) == torch.isinf(depth_there_m)
    assert same.float().mean() > 0.999
    both = torch.isfinite(depth_m) & torch.isfinite(depth_there_m)
    close = (depth_m - depth_there_m)[both].abs() < 2.1e-5 + 1e-6 * depth_m[both]
    assert close.float().mean() > 0.995
    assert (sample == sample_there).float().mean() > 0.995


def test_front_gives_each_cell_a_sample_that_lies_there_at_that_depth():
    on = shelf("housing", "mug")
    poses = observed(on)[0].pick(torch.arange(4).expand(2, -1))
    depth_m, sample = kernels.front(
        on, poses, intrinsics(on), cell_px=torch.full((2,), 4.0), cell_m=torch.zeros(2) + 0.004, rows=SIDE, columns=SIDE
    )
    drawn = torch.isfinite(depth_m)
    assert 0.05 < drawn.float().mean() < 0.9
    at = on.dense[sample.reshape(2, -1), :3].reshape(2, 4, -1, 3)
    z = poses.to_camera(at)[..., 2].reshape(depth_m.shape)
    assert (depth_m - z)[drawn].abs().max() < 2e-5
    assert (sample - on.first_dense[:, None, None, None])[~drawn].unique().tolist() == [0]


def points_as_shelf(points: list[list[float]]) -> Shelf:
    dense = torch.cat((torch.tensor(points), torch.zeros(len(points), 3)), dim=1)
    return replace(shelf(), dense=dense, dense_samples=len(points), first_dense=torch.zeros(1, dtype=torch.int64))


def drawn_by_hand(points: list[list[float]]) -> tuple[list[list[float]], list[list[int]]]:
    """Draw points (metres) into a picture of 3 x 3 cells, each 1 m wide at 1 m of depth, the middle one on the axis."""
    camera = torch.tensor([[[1.0, 0, 1], [0, 1, 1], [0, 0, 1]]])
    poses = Poses(torch.eye(3)[None, None], torch.zeros(1, 1, 3))
    depth_m, sample = kernels.front(
        points_as_shelf(points), poses, camera, cell_px=torch.ones(1), cell_m=torch.full((1,), 0.01), rows=3, columns=3
    )
    return depth_m[0, 0].tolist(), sample[0, 0].tolist()


def test_the_nearer_sample_wins_and_of_equal_ones_the_lower():
    depth_m, sample = drawn_by_hand([[0, 0, 1.2], [0, 0, 1.1], [0, 0, 1.1], [0, 0, -1], [9, 0, 1]])
    assert sample[1][1] == 1
    assert depth_m[1][1] == pytest.approx(1.1, abs=1e-5)
    assert sum(depth < 9 for row in depth_m for depth in row) == 1


def test_a_gap_shows_what_the_third_of_its_neighbours_shows():
    around = [[-1, 0, 1.0], [1.02, 0, 1.02], [0, -1.01, 1.01]]
    for behind in ([], [[0.0, 0.0, 1.5]]):
        depth_m, sample = drawn_by_hand(around + behind)
        assert sample[1][1] == 1
        assert depth_m[1][1] == pytest.approx(1.02, abs=1e-5)
    depth_m, sample = drawn_by_hand([*around, [0, 0, 1.04]])  # less than three cells behind: not a gap
    assert sample[1][1] == 3
    depth_m, sample = drawn_by_hand([*around[:2], [0, 0, 1.5]])  # two neighbours do not make a gap
    assert sample[1][1] == 2


# ---- explain


@pytest.mark.parametrize("names", [("mug",), ("carton",), ("housing", "mug", "carton")])
def test_explain_matches_its_reference(names):
    on = shelf(*names)
    assert on.oriented.tolist() == [name != "carton" for name in names]
    tolerance_m = 0.02 * on.diameter_m
    ours = kernels.explain(on, *observed(on), tolerance_m=tolerance_m)
    theirs = kernels.explain_reference(on, *observed(on), tolerance_m=tolerance_m)
    assert ours.shape == (len(names), POSES)
    almost_all_close(ours, theirs, 1.0)


def test_the_true_pose_explains_everything_and_a_far_one_nothing():
    on = shelf("housing")
    explained = kernels.explain(on, *observed(on, exact=True), tolerance_m=0.02 * on.diameter_m)
    assert explained[0, 0] > 0.95
    assert explained[0, -1] == 0


# ---- normal equations


@pytest.mark.parametrize("names", [("mug",), ("carton",), ("housing", "mug", "carton")])
@pytest.mark.parametrize("trusting", [False, True])
def test_normal_equations_match_their_reference(names, trusting):
    on = shelf(*names)
    trust = random(len(names), POSES, POINTS, seed=9).abs() if trusting else None
    reach_m = 0.1 * on.diameter_m
    hessian, gradient = kernels.normal_equations(on, *observed(on), reach_m=reach_m, trust=trust)
    hessian_there, gradient_there = kernels.normal_equations_reference(on, *observed(on), reach_m=reach_m, trust=trust)
    assert (hessian.shape, gradient.shape) == ((len(names), POSES, 6, 6), (len(names), POSES, 6, 1))
    assert torch.equal(hessian, hessian.mT)
    size = hessian_there.abs().amax(dim=(2, 3), keepdim=True).clamp(min=1e-3)
    almost_all_close(hessian, hessian_there, size)
    almost_all_close(gradient, gradient_there, size * reach_m[:, None, None, None])


def test_where_no_point_pulls_both_are_zero():
    on = shelf("mug")
    poses, points, normals = observed(on)
    trust = torch.ones(1, POSES, POINTS)
    trust[:, ::2] = 0
    hessian, gradient = kernels.normal_equations(on, poses, points, normals, reach_m=0.1 * on.diameter_m, trust=trust)
    assert not hessian[:, ::2].any()
    assert not gradient[:, ::2].any()
    assert not hessian[:, -1].any()  # kilometres away
    assert hessian[:, 1].any()


def test_a_solved_step_brings_a_shifted_pose_back():
    on = shelf("housing")
    poses, points, normals = observed(on, exact=True)
    off_m = torch.tensor([0.002, -0.003, 0.002])
    shifted = Poses(poses.R[:, :1], poses.t[:, :1] + off_m)
    hessian, gradient = kernels.normal_equations(on, shifted, points, normals, reach_m=0.1 * on.diameter_m)
    step = torch.linalg.solve(hessian, -gradient)[0, 0, :, 0]
    assert (poses.R[0, 0] @ step[3:] - off_m).norm() < 0.3 * off_m.norm()
    assert step[:3].norm() < 0.3 * off_m.norm()


def test_a_prefix_of_trust_and_one_row_for_all_give_what_their_copies_give():
    on = shelf("mug")
    run = partial(kernels.normal_equations, on, *observed(on), reach_m=0.1 * on.diameter_m)
    wide = random(1, POSES, 3 * POINTS, seed=4).abs()
    for view in (wide[..., :POINTS], wide[..., ::3], wide[:, :1, :POINTS].expand(-1, POSES, -1)):
        for mine, other in zip(run(trust=view), run(trust=view.clone()), strict=True):
            assert torch.equal(mine, other)


# ---- outline pull and depth pull

MODEL_POINTS = 70


def crops(on: Shelf) -> Observations:
    """Return each object at its first pose before a wall 0.4 m behind it, one pixel per cell; some lack a reading."""
    drawn_m = picture(on)[0][:, 0]  # (B, rows, columns)
    mask = torch.isfinite(drawn_m)
    depth_m = torch.where(mask, drawn_m, 1.0) + 0.001 * random(*drawn_m.shape, seed=5)
    depth_m = depth_m.where(random(*drawn_m.shape, seed=6) < 1.5, 0.0)
    far = torch.where(depth_m > 0, depth_m, torch.inf)
    nearest_m = -torch.nn.functional.max_pool2d(-far, 3, stride=1, padding=1)
    B, rows, columns = drawn_m.shape
    camera = intrinsics(on) / 4
    camera[:, :2, 2] -= 0.375  # the middles of cells that are four pixels wide
    camera[:, 2, 2] = 1.0
    nothing = torch.zeros(0)
    return Observations(
        **dict.fromkeys(("points", "normals", "colours", "members", "seed_points", "seed_centres", "noise_m"), nothing),
        **dict.fromkeys(("rgb", "grey"), nothing),
        K=camera,
        width=torch.full((B,), columns),
        height=torch.full((B,), rows),
        depth_m=depth_m.flatten(),
        nearest_depth_m=nearest_m.flatten(),
        mask=mask.flatten(),
        to_border=4 * random(B * rows * columns, 2, seed=7),
        first_pixel=torch.arange(B) * rows * columns,
    )


def surface_of(on: Shelf) -> Tensor:
    """Return surface points with their normals for every pose, (B, H, M, 6), object frame."""
    sample = on.first_sample[:, None] + torch.arange(MODEL_POINTS) * (on.samples // MODEL_POINTS)
    return on.surface[sample][..., :6][:, None].expand(-1, POSES, -1, -1)


def outline(on: Shelf, poses: Poses, run=kernels.outline_pull, seen: Observations | None = None):
    limits = {"reach_m": 0.1 * on.diameter_m, "through_m": 0.02 * on.diameter_m}
    return run(on, seen or crops(on), poses, surface_of(on)[..., :3], **limits)


def depth(on: Shelf, poses: Poses, run=kernels.depth_pull, seen: Observations | None = None):
    visible = random(len(on.diameter_m), POSES, MODEL_POINTS, seed=8) < 1
    return run(on, seen or crops(on), poses, surface_of(on), visible, reach_m=0.05 * on.diameter_m)


PULLS = [(outline, kernels.outline_pull_reference), (depth, kernels.depth_pull_reference)]


@pytest.mark.parametrize("names", [("mug",), ("housing", "mug", "carton")])
@pytest.mark.parametrize("pull, reference", PULLS, ids=["outline", "depth"])
def test_a_pull_matches_its_reference(names, pull, reference):
    on = shelf(*names)
    poses = observed(on)[0]
    hessian, gradient = pull(on, poses)
    hessian_there, gradient_there = pull(on, poses, reference)
    assert (hessian.shape, gradient.shape) == ((len(names), POSES, 6, 6), (len(names), POSES, 6, 1))
    assert torch.equal(hessian, hessian.mT)
    pulled = hessian_there.abs().amax(dim=(2, 3)) > 0
    assert 0.3 < pulled.float().mean() < 1  # most poses are pulled, and those behind the camera are not
    size = hessian_there.abs().amax(dim=(2, 3), keepdim=True).clamp(min=1e-3)
    almost_all_close(hessian, hessian_there, size)
    almost_all_close(gradient, gradient_there, size * 0.1 * on.diameter_m[:, None, None, None])


def test_the_outline_does_not_pull_a_pose_that_keeps_inside_it():
    on = shelf("housing")
    true = Poses(*(part[:, :1].expand(-1, POSES, *part.shape[2:]) for part in (observed(on)[0].R, observed(on)[0].t)))
    seen = crops(on)
    everywhere = replace(seen, mask=torch.ones_like(seen.mask))
    hessian, gradient = outline(on, true, seen=everywhere)
    assert not hessian.any()
    assert not gradient.any()


def test_the_depth_draws_a_pose_that_is_too_near_back_along_its_rays():
    on = shelf("housing")
    poses = observed(on)[0]
    depth_m, sample = picture(on)
    surface = on.dense[sample[0, 0][torch.isfinite(depth_m[0, 0])]][None, None]  # what the first pose shows
    near = Poses(poses.R[:, :1], poses.t[:, :1] - torch.tensor([0, 0, 0.004]))
    visible = torch.ones(surface.shape[:3], dtype=torch.bool)
    hessian, gradient = kernels.depth_pull(on, crops(on), near, surface, visible, reach_m=0.1 * on.diameter_m)
    step = torch.linalg.solve(hessian, gradient)[0, 0, :, 0]
    assert (step[3:] - torch.tensor([0, 0, 0.004])).norm() < 0.001
    assert step[:3].norm() < 0.001


@compiled
@pytest.mark.parametrize("pull, reference", PULLS, ids=["outline", "depth"])
def test_a_pull_has_the_same_bits_alone_and_in_company(pull, reference):
    names = ("housing", "mug", "carton")
    on = shelf(*names)
    seen, poses = crops(on), observed(on)[0]
    both = pull(on, poses, seen=seen)
    pixels = len(seen.depth_m) // 3
    for index in range(3):
        row, cells = slice(index, index + 1), slice(index * pixels, (index + 1) * pixels)
        maps = {name: getattr(seen, name)[cells] for name in ("depth_m", "nearest_depth_m", "mask", "to_border")}
        maps |= {"K": seen.K[row], "width": seen.width[row], "height": seen.height[row]}
        own = replace(seen, **maps, first_pixel=seen.first_pixel[:1])
        one = shelf(names[index])
        if pull is depth and index:
            continue  # which of its points are visible is drawn for all three at once
        for together, single in zip(both, pull(one, Poses(poses.R[row], poses.t[row]), seen=own), strict=True):
            assert torch.equal(together[index], single[0])


@compiled
@pytest.mark.parametrize("pull, reference", PULLS, ids=["outline", "depth"])
def test_poses_that_are_not_numbers_pull_nowhere(pull, reference):
    on = shelf("mug")
    poses = observed(on)[0]
    R, t = poses.R.clone(), poses.t.clone()
    R[:, 0], t[:, 1], t[:, 2] = torch.nan, torch.nan, torch.inf
    for answer in pull(on, Poses(R, t)):
        assert torch.isfinite(answer).all()
        assert not answer[:, :3].any()


@compiled
def test_maps_that_end_before_their_crop_are_refused():
    on = shelf("mug")
    seen = crops(on)
    with pytest.raises(RuntimeError, match="the maps end before crop 0"):
        depth(on, observed(on)[0], seen=replace(seen, height=seen.height + 1))


# ---- moved


def equations(B: int) -> tuple[Tensor, Tensor]:
    """Return normal equations of a few dozen points, with steps of a few degrees and of tenths of the radius."""
    jacobian, residual = random(B, POSES, 30, 6, seed=10), 0.03 * random(B, POSES, 30, 1, seed=11)
    return jacobian.mT @ jacobian, jacobian.mT @ residual


def move(on: Shelf, in_camera: bool, run=kernels.moved, equal=None, most=0.4) -> Poses:
    hessian, gradient = equal or equations(len(on.diameter_m))
    limits = {"radius_m": on.diameter_m / 2, "most_turn": most, "most_shift": most}
    return run(observed(on)[0], hessian, gradient, **limits, in_camera=in_camera)


@pytest.mark.parametrize("names", [("mug",), ("housing", "mug", "carton")])
@pytest.mark.parametrize("in_camera", [False, True])
@pytest.mark.parametrize("most", [0.01, 10.0])
def test_moved_matches_its_reference(names, in_camera, most):
    on = shelf(*names)
    ours, theirs = (move(on, in_camera, run, most=most) for run in (kernels.moved, kernels.moved_reference))
    assert (ours.R.shape, ours.t.shape) == ((len(names), POSES, 3, 3), (len(names), POSES, 3))
    assert (ours.R - theirs.R).abs().max() < 1e-5  # the reference solves in float32
    near = theirs.t.norm(dim=-1) < 10
    assert (ours.t - theirs.t)[near].abs().max() < 1e-6
    assert (ours.R - observed(on)[0].R).abs().amax(dim=(2, 3)).min() > 1e-3


@pytest.mark.parametrize("in_camera", [False, True])
def test_a_pose_without_a_step_stays_where_it_is(in_camera):
    on = shelf("mug")
    poses, (hessian, gradient) = observed(on)[0], equations(1)
    hessian[:, ::2], gradient[:, ::2] = 0, 0
    hessian[:, 2], gradient[:, 4] = torch.nan, torch.nan
    moved = move(on, in_camera, equal=(hessian, gradient))
    assert torch.equal(moved.R[:, ::2], poses.R[:, ::2])
    assert torch.equal(moved.t[:, ::2], poses.t[:, ::2])
    assert not torch.equal(moved.t[:, 1::2], poses.t[:, 1::2])


def test_a_step_moves_the_pose_in_the_camera_and_the_observation_in_the_object():
    on = shelf("mug")
    before = observed(on)[0].pick(torch.zeros(1, 1, dtype=torch.int64))
    radius_m = on.diameter_m / 2
    turn, shift_m = torch.tensor([0.1, -0.2, 0.05]), torch.tensor([0.01, 0.0, -0.02])
    gradient = 1e6 * torch.cat((turn * radius_m, shift_m)).reshape(1, 1, 6, 1)
    run = partial(kernels.moved, before, 1e6 * torch.eye(6).expand(1, 1, 6, 6), gradient, radius_m=radius_m)
    there = run(most_turn=1.0, most_shift=1.0, in_camera=True)
    assert torch.allclose(there.R, rotation_from_vector(turn) @ before.R, atol=1e-3)  # a thousandth of it is damped
    assert torch.allclose(there.t, before.t + shift_m, atol=1e-4)
    point = torch.tensor([0.03, -0.05, 0.6])
    seen = run(most_turn=1.0, most_shift=1.0, in_camera=False)
    in_object = before.to_object(point.reshape(1, 1, 3))[0, 0, 0]
    again = seen.to_object(point.reshape(1, 1, 3))[0, 0, 0]
    assert torch.allclose(again, rotation_from_vector(-turn) @ in_object - shift_m, atol=1e-3)


def test_no_step_is_larger_than_allowed():
    on = shelf("mug")
    hessian, gradient = equations(1)
    before, moved = observed(on)[0], move(on, True, equal=(hessian, 1e6 * gradient), most=0.1)
    angle_deg = rotation_angle_deg(moved.R, before.R)
    assert angle_deg.max() < torch.rad2deg(torch.tensor(0.1 * 3**0.5)) + 0.01
    assert angle_deg.min() > torch.rad2deg(torch.tensor(0.09))
    shift_m = (moved.t - before.t)[:, :-1].abs()  # the last is so far away that float32 has no room for a step
    assert shift_m.max() < 0.1 * on.diameter_m.item() / 2 + 1e-6


# ---- distinct


def crowd(B: int) -> tuple[Poses, Tensor]:
    """Return poses in a few dozen heaps, the first ones the loosest, and numbers to rank them; some poses are NaN."""
    heap = torch.arange(300) % 40
    turn = random(B, 40, 3, seed=20)[:, heap] + 0.05 * random(B, 300, 3, seed=21)
    t = 0.1 * random(B, 40, 3, seed=22)[:, heap] + 0.005 * random(B, 300, 3, seed=23)
    t[:, 7] = torch.nan
    return Poses(rotation_from_vector(turn), t), random(B, 300, seed=24)


@pytest.mark.parametrize("count", [1, 12, 250])
def test_distinct_gives_the_indices_of_its_reference(count):
    for angle_deg in (3.0, 10.0):
        chosen = [
            run(*crowd(3), count, angle_deg, torch.tensor([0.01, 0.02, 0.03]))
            for run in (kernels.distinct, kernels.distinct_reference)
        ]
        assert torch.equal(*chosen)
        assert chosen[0].shape == (3, count)


# ---- spread


def spread_of(on: Shelf, run=kernels.spread) -> Tensor:
    depth_m, sample = picture(on)
    B = len(on.diameter_m)
    rays = torch.nn.functional.normalize(random(B, *depth_m.shape[2:], 3, seed=30), dim=-1)
    noise_m, cell_m = torch.linspace(0.001, 0.003, B), torch.linspace(0.004, 0.006, B)
    return run(on, observed(on)[0], depth_m, sample, rays, noise_m=noise_m, cell_m=cell_m)


@pytest.mark.parametrize("names", [("mug",), ("housing", "mug", "carton")])
def test_spread_matches_its_reference(names):
    on = shelf(*names)
    ours, theirs = spread_of(on), spread_of(on, kernels.spread_reference)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7)  # a root of a difference: near 1 digits are lost
    there = torch.isfinite(picture(on)[0])
    assert torch.equal(ours[0][~there[0]].unique(), torch.tensor([0.001]))
    assert ours[there].unique().numel() > 1000


def test_a_slanted_surface_is_read_less_well_than_one_that_faces_the_camera():
    dense = torch.tensor([[0, 0, 0, 0, 0, -1.0], [0, 0, 0, 0, 3**0.5 / 2, 0.5], [0, 0, 0, 1, 0, 0]])
    on = replace(shelf(), dense=dense)
    poses = Poses(torch.eye(3)[None, None], torch.zeros(1, 1, 3))
    rays = torch.tensor([0, 0, 1.0]).expand(1, 1, 3, 3)
    sample = torch.arange(3).reshape(1, 1, 1, 3)
    size = {"noise_m": torch.tensor([0.003]), "cell_m": torch.tensor([0.004 / 0.6])}
    spread_m = kernels.spread(on, poses, torch.ones(1, 1, 1, 3), sample, rays, **size)[0, 0, 0]
    slant = (1 - 0.15**2) ** 0.5 / 0.15  # no surface counts as more slanted than that
    expected = [0.003, (0.003**2 + 3 * 0.004**2) ** 0.5, (0.003**2 + (0.004 * slant) ** 2) ** 0.5]
    assert spread_m.tolist() == pytest.approx(expected, rel=1e-5)


# ---- colour cost


def painted(*names: str) -> Shelf:
    """Return objects in colours that change from place to place, some of them black."""
    on = shelf(*names)
    bright = (128 + 90 * torch.sin(80 * on.dense[:, :3])).round()
    bright[::17] = 0
    return replace(on, dense_colours=bright.to(torch.uint8))


def colours_of(on: Shelf, run=kernels.colour_cost, grey=False, use=None, seen=None) -> Tensor:
    B = len(on.diameter_m)
    depth_m, sample = picture(on)
    rows, columns = depth_m.shape[2:]
    rays = torch.nn.functional.normalize(torch.tensor([0, 0, 1.0]) + 0.1 * random(B, rows, columns, 3, seed=40), dim=-1)
    if seen is None:  # the first pose, in a light of its own
        albedo = on.dense_colours[sample[:, 0]] / 255.0
        shade = 0.7 + 0.2 * torch.linspace(-1, 1, columns)
        seen = (albedo * shade[:, None] + 0.02 * random(B, rows, columns, 3, seed=41)).clamp(0, 1)
        seen = seen.mean(dim=-1, keepdim=True).expand_as(seen) if grey else seen
    observations = replace(crops(on), grey=torch.full((B,), grey))
    use = torch.isfinite(depth_m) if use is None else use
    return run(on, observations, observed(on)[0], sample, seen, rays, use)


@pytest.mark.parametrize("names", [("mug",), ("housing", "mug", "carton")])
@pytest.mark.parametrize("grey", [False, True])
def test_colour_cost_matches_its_reference(names, grey):
    on = painted(*names)
    ours, theirs = (colours_of(on, run, grey) for run in (kernels.colour_cost, kernels.colour_cost_reference))
    assert ours.shape == theirs.shape
    almost_all_close(ours, theirs, 1.0)
    drawn = torch.isfinite(picture(on)[0])
    assert not ours[~drawn].any()
    assert ours[drawn].max() <= kernels.WRONG_COLOUR + kernels.WRONG_BRIGHTNESS
    assert ours[:, 0].sum() < 0.3 * ours[:, 1:-4].sum(dim=(2, 3)).mean(dim=1).sum()  # the first pose is the right one


def test_light_costs_nothing_and_another_hue_the_most():
    on = replace(shelf(), dense_colours=torch.tensor([[200, 40, 40]], dtype=torch.uint8).repeat(len(shelf().dense), 1))
    drawn = torch.isfinite(picture(on)[0])[:, 0]
    red = torch.tensor([200, 40, 40]) / 255.0
    for light in (1.0, 0.4):
        cost = colours_of(on, seen=(light * red).expand(*drawn.shape, 3))[:, 0][drawn]
        assert cost.max() < 0.01
    blue = colours_of(on, seen=torch.tensor([0.1, 0.2, 0.9]).expand(*drawn.shape, 3))[:, 0][drawn]
    assert blue.min() >= kernels.WRONG_COLOUR


def test_cells_that_do_not_count_cost_nothing_and_change_nothing():
    on = painted("mug")
    drawn = torch.isfinite(picture(on)[0])
    half = drawn & (torch.arange(drawn.shape[-1]) % 2 == 0)
    seen = torch.rand(1, *drawn.shape[2:], 3, generator=torch.Generator().manual_seed(42))
    cost = colours_of(on, use=half, seen=seen)
    spoilt = torch.where(half.any(dim=1)[..., None], seen, 1 - seen)
    assert torch.equal(cost, colours_of(on, use=half, seen=spoilt))
    assert not cost[~half].any()
    assert not colours_of(on, use=torch.zeros_like(half)).any()


# ---- all of them


def alone(on: Shelf, index: int, names: tuple[str, ...]) -> tuple[Shelf, Poses, Tensor, Tensor]:
    poses, points, normals = observed(on)
    row = slice(index, index + 1)
    return shelf(names[index]), Poses(poses.R[row], poses.t[row]), points[row], normals[row]


@compiled
def test_an_instance_has_the_same_bits_alone_and_in_company():
    names = ("housing", "mug", "carton")
    on = shelf(*names)
    poses, points, normals = observed(on)
    size = {"cell_px": torch.tensor([4.0, 3.0, 5.0]), "cell_m": torch.tensor([0.004, 0.003, 0.005])}
    depth_m, sample = kernels.front(on, poses, intrinsics(on), **size, rows=SIDE, columns=SIDE)
    near = kernels.explain(on, poses, points, normals, tolerance_m=0.02 * on.diameter_m)
    equations_there = kernels.normal_equations(on, poses, points, normals, reach_m=0.1 * on.diameter_m)
    steps = equations(3)
    moved = kernels.moved(poses, *steps, radius_m=on.diameter_m / 2, most_turn=0.4, most_shift=1.0, in_camera=False)
    for index in range(3):
        one, pose, seen, facing = alone(on, index, names)
        own = {name: value[index : index + 1] for name, value in size.items()}
        depth_alone_m, sample_alone = kernels.front(one, pose, K[None], **own, rows=SIDE, columns=SIDE)
        assert torch.equal(depth_m[index], depth_alone_m[0])
        assert torch.equal(sample[index] - on.first_dense[index], sample_alone[0])
        equal = tuple(part[index : index + 1] for part in steps)
        limits = {"most_turn": 0.4, "most_shift": 1.0, "in_camera": False}
        moved_alone = kernels.moved(pose, *equal, radius_m=one.diameter_m / 2, **limits)
        assert torch.equal(moved.R[index], moved_alone.R[0])
        assert torch.equal(moved.t[index], moved_alone.t[0])
        near_alone = kernels.explain(one, pose, seen, facing, tolerance_m=0.02 * one.diameter_m)
        equations_alone = kernels.normal_equations(one, pose, seen, facing, reach_m=0.1 * one.diameter_m)
        for together, single in zip((near, *equations_there), (near_alone, *equations_alone), strict=True):
            assert torch.equal(together[index], single[0])


@compiled
def test_a_picture_has_the_same_bits_alone_and_in_company():
    names = ("housing", "mug", "carton")
    on = painted(*names)
    poses = observed(on)[0]
    depth_m, sample = picture(on)
    rays = torch.tensor([0, 0, 1.0]).expand(3, *depth_m.shape[2:], 3)
    seen, use = random(3, *depth_m.shape[2:], 3, seed=43).abs(), torch.isfinite(depth_m)
    crop, size = replace(crops(on), grey=torch.zeros(3, dtype=torch.bool)), {"noise_m": on.cell_m, "cell_m": on.cell_m}
    spread_m = kernels.spread(on, poses, depth_m, sample, rays, **size)
    cost = kernels.colour_cost(on, crop, poses, sample, seen, rays, use)
    for index in range(3):
        row = slice(index, index + 1)
        pose, shown = Poses(poses.R[row], poses.t[row]), (sample[row], seen[row], rays[row], use[row])
        own = {name: value[row] for name, value in size.items()}
        spread_alone_m = kernels.spread(on, pose, depth_m[row], sample[row], rays[row], **own)
        assert torch.equal(spread_m[row], spread_alone_m)
        cost_alone = kernels.colour_cost(on, replace(crop, grey=crop.grey[row]), pose, *shown)
        assert torch.equal(cost[row], cost_alone)


@compiled
def test_points_and_poses_that_are_not_numbers_end_in_numbers():
    on = shelf("mug")
    poses, points, normals = observed(on)
    R, t, points = poses.R.clone(), poses.t.clone(), points.clone()
    R[:, 0], t[:, 1], t[:, 2], points[:, 0] = torch.nan, torch.nan, torch.inf, torch.nan
    odd = Poses(R, t)
    answers = [
        kernels.explain(on, odd, points, normals, tolerance_m=0.02 * on.diameter_m),
        *kernels.normal_equations(on, odd, points, normals, reach_m=0.1 * on.diameter_m),
    ]
    assert all(torch.isfinite(answer).all() for answer in answers)
    depth_m, sample = kernels.front(on, odd, intrinsics(on), **PICTURE)
    assert torch.isinf(depth_m[:, :3]).all()
    assert ((sample >= 0) & (sample < on.dense_samples)).all()


@compiled
def test_the_ops_keep_what_their_schemas_promise():
    on = shelf("mug")
    poses, points, normals = observed(on)
    tables = kernels._tables(on)
    calls = {
        "front": (on.dense, on.first_dense, on.dense_samples, poses.R, poses.t, K[None], *PICTURE.values()),
        "explain": (points, normals, poses.R, poses.t, on.cell_m, on.cell_m, *tables),
        "normal_equations": (points, normals, poses.R, poses.t, None, *[on.cell_m] * 4, *tables),
    }
    seen, surface = crops(on), surface_of(on)
    size = (seen.first_pixel, seen.width, seen.height)
    calls["outline_pull"] = (
        *(surface[..., :3], poses.R, poses.t, seen.K, seen.depth_m, seen.nearest_depth_m, seen.mask, seen.to_border),
        *(*size, *[on.cell_m] * 3),
    )
    visible = torch.ones(surface.shape[:3], dtype=torch.bool)
    calls["depth_pull"] = (
        *(surface, visible, poses.R, poses.t, seen.K, seen.depth_m, seen.mask, *size, on.cell_m, on.cell_m),
    )
    hessian, gradient = equations(1)
    calls["moved"] = (hessian, gradient, poses.R, poses.t, on.cell_m, 0.4, 1.0, True)
    calls["distinct"] = (poses.R, poses.t, torch.arange(POSES)[None], 5, 2.9, on.cell_m)
    depth_m, sample = picture(on)
    rays = random(1, *depth_m.shape[2:], 3, seed=44)
    calls["spread"] = (on.dense, poses.R, depth_m, sample, rays, on.cell_m, on.cell_m)
    dense_colours, grey = painted("mug").dense_colours, torch.zeros(1, dtype=torch.bool)
    calls["colour_cost"] = (
        *(on.dense, dense_colours, grey, poses.R, sample, rays, rays, torch.isfinite(depth_m), 0.1, 0.3, 3.0, 0.8),
    )
    assert calls.keys() == set(kernels.OPS)
    for op, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.posekit, op).default, arguments, test_utils="test_schema")


@compiled
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda poses, points: (poses, points.double()), r"points must be Float, got Double"),
        (lambda poses, points: (poses, points[..., :2]), r"points must be \[1, 100, 3\], got \[1, 100, 2\]"),
        (lambda poses, points: (Poses(poses.R[:, :3], poses.t), points), r"R must be \[1, 40, 3, 3\], got \[1, 3, 3"),
        (lambda poses, points: (poses, points[:, :0]), r"normals must be \[1, 0, 3\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_words(change, message):
    on = shelf("mug")
    poses, points, normals = observed(on)
    with pytest.raises(RuntimeError, match=message):
        kernels.explain(on, *change(poses, points), normals, tolerance_m=on.cell_m)


@compiled
def test_tables_that_end_too_early_are_refused():
    on = shelf("mug")
    seen = observed(on)
    for broken in (replace(on, surface=on.surface[1:]), replace(on, nearest=on.nearest[1:])):
        with pytest.raises(RuntimeError, match="must lie"):
            kernels.explain(broken, *seen, tolerance_m=on.cell_m)
    with pytest.raises(RuntimeError, match="must lie within the points"):
        picture(replace(on, dense=on.dense[1:]))


@compiled
def test_samples_that_do_not_exist_are_refused():
    on = painted("mug")
    short = replace(on, dense=on.dense[:100], dense_colours=on.dense_colours[:100])
    drawn_m, sample = picture(on)
    rays = torch.ones(1, *drawn_m.shape[2:], 3)
    poses, crop = observed(on)[0], replace(crops(on), grey=torch.zeros(1, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="sample must lie within the dense ones"):
        kernels.spread(short, poses, drawn_m, sample, rays, noise_m=on.cell_m, cell_m=on.cell_m)
    with pytest.raises(RuntimeError, match="sample must lie within the dense ones"):
        kernels.colour_cost(short, crop, poses, sample, rays, rays, torch.isfinite(drawn_m))


# ---- without them


def test_without_a_library_the_references_answer(monkeypatch):
    on = shelf("mug")
    monkeypatch.setattr(kernels, "_compiled", False)
    assert kernels.kernels("cpu") == dict.fromkeys(kernels.OPS, "reference")
    seen, limits = observed(on), {"tolerance_m": 0.02 * on.diameter_m}
    paint, few = painted("mug"), (*crowd(1), 5, 3.0, torch.tensor([0.01]))
    pairs = [
        (picture(on), picture(on, kernels.front_reference)),
        ([kernels.explain(on, *seen, **limits)], [kernels.explain_reference(on, *seen, **limits)]),
        (
            kernels.normal_equations(on, *seen, reach_m=on.diameter_m),
            kernels.normal_equations_reference(on, *seen, reach_m=on.diameter_m),
        ),
        *((pull(on, seen[0]), pull(on, seen[0], reference)) for pull, reference in PULLS),
        *(
            ([part.R, part.t], [other.R, other.t])
            for part, other in [(move(on, True), move(on, True, kernels.moved_reference))]
        ),
        ([kernels.distinct(*few)], [kernels.distinct_reference(*few)]),
        ([spread_of(on)], [spread_of(on, kernels.spread_reference)]),
        ([colours_of(paint)], [colours_of(paint, kernels.colour_cost_reference)]),
    ]
    for ours, theirs in pairs:
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.slow
def test_a_copy_of_the_package_without_its_library_says_so_and_works(tmp_path):
    package = Path(kernels.__file__).parents[1]
    shutil.copytree(package, tmp_path / "posekit", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        "import posekit\nfrom posekit.geometric import kernels\n"
        f"assert posekit.__file__.startswith({str(tmp_path)!r})\n"
        "print(kernels.kernel_for('cpu'), kernels.kernel_for('cuda'))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == ["reference", "reference"]
    assert "the slower torch reference answers; rebuild with: pip install" in answer.stderr


def test_kernel_for_says_compiled_exactly_where_the_library_lies():
    built = (Path(kernels.__file__).parent / "_kernels_cpu.so").exists()
    assert kernels.kernel_for(torch.device("cpu")) == ("compiled" if built else "reference")
    assert kernels.kernel_for("cuda:1") == "reference"
