"""The BOP measures against errors known on paper, and against plain readings of their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.accuracy import bop
from posekit.engine import Float32, Float64, Mesh, Symmetries
from posekit.render import pixel_rays, render
from posekit.synthetic.shapes import SHAPES, rotation

WIDTH, HEIGHT = 640, 480
K = np.array([[600.0, 0, 319.5], [0, 600.0, 239.5], [0, 0, 1]])
NOWHERE = np.zeros((HEIGHT, WIDTH), dtype=np.float32)
ROUND_Z = Symmetries(continuous=((np.array([0, 0, 1.0]), np.zeros(3)),))


def pose(x: float = 0, y: float = 0, z: float = 0.8, R: Float64 | None = None) -> Float64:
    T = np.eye(4)
    T[:3, 3] = x, y, z
    if R is not None:
        T[:3, :3] = R
    return T


def square(half_m: float) -> Mesh:
    corners = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * half_m
    return Mesh(vertices_m=corners.astype(np.float32), faces=np.array([[0, 1, 2], [0, 2, 3]], dtype=np.int32))


def shape_target(name: str) -> bop.Target:
    shape = SHAPES[name]()
    return bop.prepare_target(shape.mesh, shape.symmetries)


def wall(z_m: float) -> Float32:
    return np.full((HEIGHT, WIDTH), z_m, dtype=np.float32)


def random_pose(rng: np.random.Generator) -> Float64:
    R = rotation(rng.normal(size=3).tolist(), float(rng.uniform(0, 180)))
    x, y = rng.uniform(-0.1, 0.1, 2)
    return pose(x, y, rng.uniform(0.5, 1.0), R)


@pytest.mark.parametrize("name", SHAPES)
def test_the_truth_itself_has_no_error_and_full_recall(name: str) -> None:
    shape, T = SHAPES[name](), pose(0.05, -0.02, 0.7, rotation((1, 2, 3), 50))
    target = bop.prepare_target(shape.mesh, shape.symmetries)
    depth_m = render([shape.mesh], [T], K, WIDTH, HEIGHT).depth_m
    errors = bop.pose_error(T, T, target, depth_m, K)
    assert (errors.vsd == 0).all()
    assert errors.mssd_m < 1e-9
    assert errors.mspd_px < 1e-6
    assert bop.recalls(errors, target.diameter_m, WIDTH) == bop.Recalls(vsd=1.0, mssd=1.0, mspd=1.0, ar=1.0)


def test_a_translation_is_its_own_length_in_mssd() -> None:
    target, T = shape_target("housing"), pose(R=rotation((1, 0, 1), 30))
    moved = T.copy()
    moved[:3, 3] += (0.003, -0.004, 0.012)
    assert bop.mssd_m(moved, T, target.hull_m, target.transforms) == pytest.approx(0.013)


def test_a_half_turn_is_a_diameter_in_mssd_where_the_axis_is_in_the_middle() -> None:
    mesh = square(0.1)
    error_m = bop.mssd_m(pose(R=rotation((0, 0, 1), 180)), pose(), mesh.vertices_m, np.eye(4)[None])
    assert error_m == pytest.approx(0.2 * np.sqrt(2))


def test_a_shift_along_the_view_moves_corners_by_their_perspective_in_mspd() -> None:
    mesh = square(0.1)
    error_px = bop.mspd_px(pose(z=0.9), pose(z=0.8), mesh.vertices_m, np.eye(4)[None], K)
    assert error_px == pytest.approx(600 * 0.1 * np.sqrt(2) * (1 / 0.8 - 1 / 0.9))


def test_an_estimate_behind_the_camera_has_no_place_in_the_image() -> None:
    target = shape_target("carton")
    errors = bop.pose_error(pose(z=-0.8), pose(), target, NOWHERE, K)
    assert errors.mspd_px == np.inf
    assert errors.mssd_m == pytest.approx(1.6, abs=1e-6)
    assert (errors.vsd == 1).all()
    assert bop.recalls(errors, target.diameter_m, WIDTH).ar == 0


@pytest.mark.parametrize("degrees", [1.8, 33.3, 90, 179.9, 301])
def test_a_turn_about_a_continuous_axis_costs_half_a_step_at_most(degrees: float) -> None:
    away = np.array([0.1, -0.05, 0.02])  # the axis passes through here, not through the origin
    mesh = SHAPES["bottle"]().mesh
    vertices = mesh.vertices_m + away
    target = bop.prepare_target(
        Mesh(vertices_m=vertices.astype(np.float32), faces=mesh.faces),
        Symmetries(continuous=((np.array([0, 0, 2.0]), away),)),
    )
    R = rotation((0, 0, 1), degrees)
    turn = pose(R=R)
    turn[:3, 3] = away - R @ away
    T = pose(-0.1, 0.05, 0.8, rotation((1, 1, 0), 70))
    step_m = 0.01 * target.diameter_m
    assert len(target.transforms) == pytest.approx(len(shape_target("bottle").transforms), abs=1)
    assert bop.mssd_m(T @ turn, T, target.hull_m, np.eye(4)[None]) > step_m / 2
    assert bop.mssd_m(T @ turn, T, target.hull_m, target.transforms) <= 1.001 * step_m / 2
    nearest_m = ((vertices @ T[:3, :3].T) + T[:3, 3])[:, 2].min()
    bound_px = 600 * step_m / 2 / nearest_m * 1.2  # 1.2: a way along an oblique ray shows a little larger
    assert bop.mspd_px(T @ turn, T, target.vertices_m, target.transforms, K) < bound_px


def test_turns_move_the_furthest_vertex_by_a_hundredth_of_the_diameter() -> None:
    shape = SHAPES["bottle"]()
    vertices = shape.mesh.vertices_m.astype(np.float64)
    diameter_m = 0.25
    turns = bop.symmetry_transforms(ROUND_Z, vertices, diameter_m)
    furthest = vertices[np.hypot(vertices[:, 0], vertices[:, 1]).argmax()]
    places = turns[:, :3, :3] @ furthest + turns[:, :3, 3]
    ways = np.linalg.norm(places - np.roll(places, 1, axis=0), axis=1)
    assert (turns[0] == np.eye(4)).all()
    assert ways.max() <= 0.01 * diameter_m
    assert ways.min() > 0.0097 * diameter_m


def test_a_discrete_symmetry_costs_nothing() -> None:
    target, T = shape_target("carton"), pose(R=rotation((1, 2, 0), 40))
    depth_m = render([SHAPES["carton"]().mesh], [T], K, WIDTH, HEIGHT).depth_m
    flipped = T @ pose(z=0, R=rotation((0, 1, 0), 180))
    errors = bop.pose_error(flipped, T, target, depth_m, K)
    assert errors.mssd_m < 1e-6
    assert errors.mspd_px < 1e-3
    assert errors.vsd.max() < 0.01  # outline pixels
    assert bop.mssd_m(flipped, T, target.hull_m, np.eye(4)[None]) > 0.1


def test_discrete_and_continuous_symmetries_combine() -> None:
    flip = pose(z=0, R=rotation((1, 0, 0), 180))
    mesh = SHAPES["bracket"]().mesh
    both = Symmetries(discrete=(flip,), continuous=ROUND_Z.continuous)
    target = bop.prepare_target(mesh, both)
    T = pose(R=rotation((0, 1, 1), 20))
    estimate = T @ pose(z=0, R=rotation((0, 0, 1), 123.4)) @ flip
    assert bop.mssd_m(estimate, T, target.hull_m, target.transforms) < 0.0051 * target.diameter_m
    turns = bop.symmetry_transforms(ROUND_Z, target.hull_m, target.diameter_m)
    assert len(target.transforms) == 2 * len(turns)
    assert bop.mssd_m(estimate, T, target.hull_m, turns) > 0.1 * target.diameter_m


def test_two_axes_are_not_combined_with_one_another() -> None:
    one = bop.symmetry_transforms(ROUND_Z, square(0.1).vertices_m, 0.2)
    axes = (*ROUND_Z.continuous, (np.array([0, 0, 1.0]), np.zeros(3)))
    assert len(bop.symmetry_transforms(Symmetries(continuous=axes), square(0.1).vertices_m, 0.2)) == 2 * len(one) - 1


def test_a_plane_that_moves_by_less_than_tau_is_right_and_by_more_is_wrong() -> None:
    target = bop.prepare_target(square(2.0), Symmetries(), diameter_m=0.2)  # tau = 10, 20, ... 100 mm
    # Rays are up to 1.2 times as long as their depth: a plane 22 mm further is 22 to 26.5 mm away along them.
    assert bop.vsd(pose(z=0.822), pose(), target, wall(0.8), K).tolist() == [1, 1] + [0] * 8
    assert bop.vsd(pose(z=0.778), pose(), target, wall(0.8), K).tolist() == [1, 1] + [0] * 8
    assert bop.vsd(pose(z=0.806), pose(), target, wall(0.8), K).tolist() == [0] * 10


def test_vsd_compares_distances_rather_than_depths() -> None:
    target = bop.prepare_target(square(2.0), Symmetries(), diameter_m=0.2)
    lengths = np.linalg.norm(pixel_rays(K, WIDTH, HEIGHT), axis=-1)
    wrong = (lengths * 0.009 >= 0.01).mean()
    assert 0.05 < wrong < 0.5
    assert bop.vsd(pose(z=0.809), pose(), target, wall(0.8), K)[0] == pytest.approx(wrong, abs=2e-4)


def test_a_sideways_shift_costs_what_is_seen_at_one_pose_only() -> None:
    target = bop.prepare_target(square(0.1), Symmetries())
    shifted = pose(x=-0.05)
    for depth_m in (wall(0.8), NOWHERE):  # where the camera measured nothing, the object counts as visible
        assert bop.vsd(shifted, pose(), target, depth_m, K) == pytest.approx([0.1 / 0.25] * 10, abs=0.01)


def test_an_occluder_hides_errors_behind_it() -> None:
    target = bop.prepare_target(square(0.1), Symmetries())
    columns = (np.arange(WIDTH) - K[0, 2]) / K[0, 0] * 0.8  # x at the depth of the square
    depth_m = wall(0.8)
    depth_m[:, columns < -0.05] = 0.5
    assert bop.vsd(pose(x=-0.05), pose(), target, depth_m, K) == pytest.approx([0.05 / 0.15] * 10, abs=0.01)
    depth_m[:, columns > 0.04] = 0.5
    assert (bop.vsd(pose(x=-0.05), pose(), target, depth_m, K) == 0).all()
    assert (bop.vsd(pose(x=0.3), pose(), target, depth_m, K) == 1).all()


def test_vsd_is_1_for_a_pose_far_off_and_for_an_object_that_nobody_sees() -> None:
    target, T = shape_target("mug"), pose(R=rotation((1, 0, 0), 100))
    depth_m = render([SHAPES["mug"]().mesh], [T], K, WIDTH, HEIGHT).depth_m
    for away in (pose(x=0.25), pose(x=5), pose(z=-1)):
        assert (bop.vsd(away, T, target, depth_m, K) == 1).all()
    assert (bop.vsd(T, T, target, wall(0.3), K) == 1).all()
    assert (bop.vsd(pose(x=5), pose(x=5), target, NOWHERE, K) == 1).all()


@pytest.mark.parametrize("seed", range(6))
def test_the_window_gives_what_whole_images_give(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mesh = SHAPES["elbow"]().mesh
    target = bop.prepare_target(mesh, Symmetries())
    T_true = random_pose(rng)
    T_est = T_true.copy()
    T_est[:3, 3] += rng.normal(scale=0.02, size=3)
    scene_m = render([mesh], [T_true], K, WIDTH, HEIGHT).depth_m
    scene_m[scene_m == 0] = 1.2
    scene_m[:, : WIDTH // 2] *= rng.choice([0.5, 1.0], size=(HEIGHT, 1)).astype(np.float32)
    scene_m[rng.random(scene_m.shape) < 0.1] = 0
    assert bop.vsd(T_est, T_true, target, scene_m, K) == pytest.approx(
        plain_vsd(mesh, T_est, T_true, scene_m, target.diameter_m), abs=1e-3
    )


def test_a_surface_that_reaches_behind_the_camera_is_seen_where_it_is() -> None:
    mesh = square(2.0)
    target = bop.prepare_target(mesh, Symmetries(), diameter_m=2.0)
    floor = rotation((1, 0, 0), 90)
    T_est, T_true = pose(y=0.12, z=0.5, R=floor), pose(y=0.1, z=0.5, R=floor)
    found = bop.vsd(T_est, T_true, target, NOWHERE, K)
    assert 0 < found[4] < found[0] < 1
    assert found == pytest.approx(plain_vsd(mesh, T_est, T_true, NOWHERE, 2.0), abs=1e-3)


def plain_vsd(mesh: Mesh, T_est: Float64, T_true: Float64, scene_m: Float32, diameter_m: float) -> list[float]:
    """Compute VSD word by word from its definition, on whole images."""
    lengths = np.linalg.norm(pixel_rays(K, WIDTH, HEIGHT), axis=-1)
    est = render([mesh], [T_est], K, WIDTH, HEIGHT).depth_m * lengths
    true = render([mesh], [T_true], K, WIDTH, HEIGHT).depth_m * lengths
    scene = scene_m * lengths
    seen_true = (true > 0) & ((true <= scene + 0.015) | (scene == 0))
    seen_est = (est > 0) & ((est <= scene + 0.015) | (scene == 0) | seen_true)
    return [
        float((~(seen_est & seen_true & (abs(est - true) < share * diameter_m)))[seen_est | seen_true].mean())
        for share in np.linspace(0.05, 0.5, 10)
    ]


@pytest.mark.parametrize("name", ["mug", "gear", "bottle"])
def test_hull_and_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rng = shape_target(name), np.random.default_rng(1)
    mesh = SHAPES[name]().mesh
    T_est, T_true = random_pose(rng), random_pose(rng)
    homogeneous = np.c_[mesh.vertices_m, np.ones(len(mesh.vertices_m))].T
    ways_m, ways_px = [], []
    for S in target.transforms:
        est, true = (T_est @ homogeneous)[:3], (T_true @ S @ homogeneous)[:3]
        ways_m.append(np.linalg.norm(est - true, axis=0).max())
        ways_px.append(600 * np.linalg.norm(est[:2] / est[2] - true[:2] / true[2], axis=0).max())
    for chunk in (bop.CHUNK, 7 * len(target.vertices_m), 1):
        monkeypatch.setattr(bop, "CHUNK", chunk)
        assert bop.mssd_m(T_est, T_true, target.hull_m, target.transforms) == pytest.approx(min(ways_m))
        assert bop.mspd_px(T_est, T_true, target.vertices_m, target.transforms, K) == pytest.approx(min(ways_px))
    assert len(target.hull_m) < len(mesh.vertices_m)


def test_vertices_are_thinned_beyond_their_limit_but_not_on_the_hull() -> None:
    rng = np.random.default_rng(2)
    inside = rng.uniform(-0.04, 0.04, (12_000, 3))
    box = SHAPES["carton"]().mesh.vertices_m
    vertices = np.concatenate([inside, box]).astype(np.float32)
    mesh = Mesh(vertices_m=vertices, faces=rng.integers(len(vertices), size=(100, 3)).astype(np.int32))
    target = bop.prepare_target(mesh, Symmetries())
    assert len(target.vertices_m) < bop.PROJECTED_VERTICES + len(box)
    corners = np.abs(target.vertices_m) == np.abs(box).max(axis=0)
    assert corners.all(axis=1).sum() == 8


def test_recalls_are_shares_of_the_thresholds_passed() -> None:
    vsd = np.array([1, 1, 0.3, 0.3, 0, 0, 0, 0, 0, 0.04])  # of 10 thetas pass 0, 0, 4, 4 and 6 x 10
    errors = bop.Errors(vsd=vsd, mssd_m=0.012, mspd_px=12.0)
    found = bop.recalls(errors, 0.1, 1280)  # MSSD under 15 ... 50 of 5, 10, ... mm; MSPD under 20 ... 100 of 10, ... px
    assert (found.vsd, found.mssd, found.mspd) == pytest.approx((0.68, 0.8, 0.9))
    assert found.ar == pytest.approx((0.68 + 0.8 + 0.9) / 3)
    assert bop.recalls(errors, 0.1, 640).mspd == pytest.approx(0.8)


def test_an_error_at_a_threshold_does_not_pass_it() -> None:
    errors = bop.Errors(vsd=np.full(10, 0.5), mssd_m=0.5, mspd_px=50.0)
    assert bop.recalls(errors, 1.0, 640) == bop.Recalls(vsd=0.0, mssd=0.0, mspd=0.0, ar=0.0)


def test_no_answer_has_no_recall() -> None:
    assert bop.recalls(None, 0.1, WIDTH) == bop.Recalls(vsd=0.0, mssd=0.0, mspd=0.0, ar=0.0)
