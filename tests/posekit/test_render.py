"""Ray casting against surfaces whose depth is known on paper."""

from __future__ import annotations

import numpy as np
import pytest

from posekit.engine import Mesh
from posekit.render import GREY, Caster, depth_to_points, render
from posekit.synthetic.shapes import SHAPES, rotation

K = np.array([[600.0, 0, 319.5], [0, 600.0, 239.5], [0, 0, 1]])


def square(half_m: float = 1.0, color: tuple[int, int, int] | None = None) -> Mesh:
    corners = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * half_m
    return Mesh(
        vertices_m=corners.astype(np.float32),
        faces=np.array([[0, 1, 2], [0, 2, 3]], dtype=np.int32),
        vertex_colors=None if color is None else np.tile(np.array(color, dtype=np.uint8), (4, 1)),
    )


def at(z_m: float, R: np.ndarray | None = None) -> np.ndarray:
    T = np.eye(4)
    T[:3, :3] = np.eye(3) if R is None else R
    T[2, 3] = z_m
    return T


def test_a_tilted_plane_has_the_depth_of_its_equation() -> None:
    R = rotation((1, 0.4, 0), 35)
    seen = render([square()], [at(0.8, R)], K, 640, 480)
    u, v = np.meshgrid(np.arange(640), np.arange(480))
    directions = np.stack([(u - 319.5) / 600, (v - 239.5) / 600, np.ones_like(u)], axis=-1)
    normal = R[:, 2]
    expected = 0.8 * normal[2] / (directions @ normal)
    hit = seen.depth_m > 0
    assert hit.mean() > 0.9
    assert np.abs(seen.depth_m - expected)[hit].max() < 1e-4
    assert np.allclose(np.abs(seen.normals_cam[hit] @ normal), 1, atol=1e-5)
    assert (seen.normals_cam[hit][:, 2] < 0).all()


def test_a_sphere_has_the_depth_of_its_equation() -> None:
    trimesh = pytest.importorskip("trimesh")
    ball = trimesh.creation.icosphere(subdivisions=6, radius=0.1)
    mesh = Mesh(vertices_m=ball.vertices.astype(np.float32), faces=ball.faces.astype(np.int32))
    seen = render([mesh], [at(0.7)], K, 640, 480)
    u, v = np.meshgrid(np.arange(640), np.arange(480))
    directions = np.stack([(u - 319.5) / 600, (v - 239.5) / 600, np.ones_like(u)], axis=-1)
    squared = (directions**2).sum(-1)
    root = 0.7**2 - squared * (0.7**2 - 0.1**2)
    inner = (seen.depth_m > 0) & (root > 0.1 * root.max())
    expected = (0.7 - np.sqrt(np.maximum(root, 0))) / squared
    assert inner.sum() > 10_000
    assert np.abs(seen.depth_m - expected)[inner].max() < 1e-4


def test_pixel_centres_are_whole_numbers() -> None:
    camera = np.array([[100.0, 0, 10], [0, 100.0, 10], [0, 0, 1]])
    seen = render([square(0.0351)], [at(1.0)], camera, 21, 21)  # reaches 3.51 pixels to each side of pixel 10
    assert np.array_equal(np.nonzero(seen.instance[10] == 0)[0], np.arange(7, 14))


def test_nearer_meshes_hide_farther_ones() -> None:
    seen = render([square(1.0, (10, 20, 30)), square(0.1)], [at(1.0), at(0.5)], K, 640, 480)
    assert seen.instance[240, 320] == 1
    assert seen.instance[5, 5] == 0
    assert tuple(seen.rgb[5, 5]) == (10, 20, 30)
    assert tuple(seen.rgb[240, 320]) == (GREY, GREY, GREY)
    assert seen.depth_m[240, 320] == pytest.approx(0.5, abs=1e-6)


def test_a_caster_sees_through_any_window_what_render_sees() -> None:
    mesh = SHAPES["housing"]().mesh
    T = at(0.5, rotation((1, 0.3, 0.2), 140))
    whole = render([mesh], [T], K, 640, 480)
    part = Caster([mesh]).render(T, K, 200, 150, 250, 160)
    window = np.s_[160:310, 250:450]
    same = part.instance == whole.instance[window]
    assert same.mean() > 0.999  # rounding may move a pixel of the border
    assert np.abs(part.depth_m - whole.depth_m[window])[same].max() < 1e-5
    assert np.array_equal(part.instance == 0, Caster([mesh]).silhouette(T, K, 200, 150, 250, 160))


def test_nothing_in_view_is_an_empty_picture() -> None:
    for seen in (render([], [], K, 64, 48), render([square()], [at(-1.0)], K, 64, 48)):
        assert not seen.depth_m.any()
        assert not seen.rgb.any()
        assert (seen.instance == -1).all()
        assert (seen.face == -1).all()


def test_meshes_without_as_many_poses_are_refused() -> None:
    with pytest.raises(ValueError, match="2 meshes need as many poses, got 1"):
        render([square(), square()], [at(1.0)], K, 8, 8)


def test_points_project_back_to_their_pixels() -> None:
    depth = np.full((480, 640), 0.9, dtype=np.float32)
    points = depth_to_points(depth, K)
    uv = points @ K.T
    assert np.allclose(uv[..., 0] / uv[..., 2], np.arange(640)[None], atol=1e-3)
