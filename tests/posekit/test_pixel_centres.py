"""Pixel centres have integer coordinates, as in OpenCV, in every step that a frame passes through.

Half a pixel is 0.6 mm at 0.7 m with a focal length of 600 pixels, and shows in every test here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import open3d as o3d
import pytest
import torch
import trimesh

from posekit import crops, geometry
from posekit.engine import Float64, Instance, Mesh
from posekit.geometric import observe
from posekit.io.frame import Frame
from posekit.overlay import OverlayItem, draw_overlay
from posekit.render import Caster, depth_to_points, finer, pixel_rays, render
from posekit.sam6d import crops as network_crops
from posekit.sam6d.templates import SIDE_PX, camera_matrix
from tests.posekit.geometric.support import SHAPES, at, cleaned, cut, photograph, solved
from tests.posekit.geometric.support import rotation as turned

K = np.array([[600.0, 0, 319.5], [0, 600.0, 239.5], [0, 0, 1]])
CENTRE_M = np.array([0.08, -0.05, 0.7])
RADIUS_M = 0.1


@pytest.fixture(scope="module")
def frame() -> Frame:
    """Render a ball off the middle of the picture; depth in tenths of a millimetre."""
    ball = trimesh.creation.icosphere(subdivisions=5, radius=RADIUS_M)
    mesh = Mesh(vertices_m=ball.vertices.astype(np.float32), faces=ball.faces.astype(np.int32))
    seen = render([mesh], [at(*CENTRE_M)], K, 640, 480)
    depth_raw = np.rint(seen.depth_m * 10_000).astype(np.uint16)
    return Frame(rgb=seen.rgb, depth_raw=depth_raw, depth_scale_mm=0.1, K=K)


def instance(frame: Frame) -> Instance:
    """Return the ball as the engines get it."""
    one = crops.cut_out(frame, crops.look(frame, frame.depth_raw > 0))
    mask = one.mask.astype(np.bool_)
    more = {"origin_px": one.origin_px, "image_size_px": one.image_size_px}
    return Instance(object_id="ball", rgb=one.rgb, depth_m=one.depth_m, mask=mask, K=one.K, seed=1, **more)


def centre_of(points: npt.NDArray[np.floating]) -> Float64:
    """Return the centre of the ball that fits the points (n, 3) best."""
    p = points.reshape(-1, 3).astype(np.float64)
    p = p[p[:, 2] > 0]
    unknown = np.linalg.lstsq(np.column_stack([2 * p, np.ones(len(p))]), (p**2).sum(axis=1), rcond=None)[0]
    return np.asarray(unknown[:3], dtype=np.float64)


def by_torch(frame: Frame) -> npt.NDArray[np.floating]:
    v, u = np.nonzero(frame.depth_raw)
    depth_m = frame.depth_mm(np.s_[:, :])[v, u] / 1000
    pixels = (torch.from_numpy(u).float(), torch.from_numpy(v).float(), torch.from_numpy(depth_m))
    return geometry.backproject(*pixels, torch.from_numpy(frame.K).float()).numpy()


def by_the_geometric_engine(frame: Frame) -> npt.NDArray[np.floating]:
    one = cleaned(instance(frame), 2 * RADIUS_M)
    return observe.together([one], torch.tensor([2 * RADIUS_M])).points[0].numpy()


def by_the_network(frame: Frame) -> npt.NDArray[np.floating]:
    seen = network_crops.instance_input(instance(frame), RADIUS_M, np.random.default_rng(0))
    assert isinstance(seen, network_crops.NetworkInput)
    return seen.points_m


@pytest.mark.parametrize(
    "points_of",
    [
        lambda frame: depth_to_points(frame.depth_mm(np.s_[:, :]) / 1000, frame.K),
        by_torch,
        by_the_geometric_engine,
        by_the_network,
    ],
    ids=["numpy", "torch", "geometric", "sam6d"],
)
@pytest.mark.parametrize("thinned", [False, True])
def test_a_rendered_ball_is_where_its_depth_says(
    frame: Frame,
    monkeypatch: pytest.MonkeyPatch,
    points_of: Callable[[Frame], npt.NDArray[np.floating]],
    thinned: bool,
) -> None:
    if thinned:
        monkeypatch.setattr(crops, "CROP_PIXELS", 20_000)
        monkeypatch.setattr(observe, "MASK_SIDE", 40)
    assert np.abs(centre_of(points_of(frame)) - CENTRE_M)[:2].max() < 1e-4


def test_a_pose_of_a_picture_without_noise_is_not_shifted() -> None:
    T = at(-0.03, 0.02, 0.7, turned((1, 0.3, 0.2), 140))
    scene = photograph([SHAPES["tee"]()], [T])
    origin = SHAPES["tee"]().mesh.vertices_m.mean(axis=0)
    found = solved(cut(scene, 0)).T_cam_obj
    shift_m = (found[:3, :3] - T[:3, :3]) @ origin + found[:3, 3] - T[:3, 3]
    assert np.abs(shift_m)[:2].max() < 1.5e-4


def test_a_finer_picture_has_its_pixels_around_the_coarse_ones() -> None:
    for n in (1, 2, 3):
        fine = pixel_rays(finer(K, n), 8 * n, 6 * n).reshape(6, n, 8, n, 3)
        np.testing.assert_allclose(fine.mean(axis=(1, 3)), pixel_rays(K, 8, 6), atol=1e-12)


def test_rays_of_open3d_count_pixels_from_the_corner() -> None:
    """Its own pinhole has the first pixel's centre at (0.5, 0.5): a K that is half a pixel on gives our rays."""
    corner = K + np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    rays = o3d.t.geometry.RaycastingScene.create_rays_pinhole(corner, np.eye(4), 640, 480).numpy()
    theirs = rays[..., 3:] / rays[..., 5:]
    np.testing.assert_allclose(theirs, pixel_rays(K, 640, 480), atol=1e-6)


def test_templates_look_through_the_middle_of_their_picture() -> None:
    middle = pixel_rays(camera_matrix(), SIDE_PX, SIDE_PX).mean(axis=(0, 1))
    np.testing.assert_allclose(middle, [0, 0, 1], atol=1e-12)


def test_an_outline_and_a_box_are_drawn_around_what_they_show() -> None:
    half_m = 0.03025  # 36.3 pixels at half a metre
    corners = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * half_m
    square = Mesh(vertices_m=corners.astype(np.float32), faces=np.array([[0, 1, 2], [0, 2, 3]], dtype=np.int32))
    camera = np.array([[600.0, 0, 320], [0, 600.0, 240], [0, 0, 1]])
    T = at(0.05, -0.025, 0.5)  # on pixel (380, 210)
    grey = np.full((480, 640, 3), 128, np.uint8)
    assert Caster([square]).silhouette(T, camera, 640, 480).sum() == 73 * 73
    outlined = OverlayItem(label="square", mesh=square, T_cam_obj=T, score=0.9)
    boxed = OverlayItem(label="square", rejected=True, code="no_fit", bbox=(380 - 36, 210 - 36, 73, 73))
    for item in (outlined, boxed):
        drawn = draw_overlay(grey, camera, [item], axes=False, labels=False)
        rows, columns = np.nonzero((drawn != grey).any(axis=-1))
        weight = np.abs(drawn.astype(float) - grey).sum(axis=-1)[rows, columns]
        middle = np.average(columns, weights=weight), np.average(rows, weights=weight)
        np.testing.assert_allclose(middle, (380, 210), atol=0.25)  # dashes and smoothed corners are not all alike
