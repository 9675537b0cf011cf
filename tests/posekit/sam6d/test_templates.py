"""Template views: the cameras' views, and folders of views from other renderers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from posekit.engine import Mesh
from posekit.errors import BadData, InvalidInput, PoseError, TooLarge
from posekit.io.images import encode_png
from posekit.sam6d.templates import (
    View,
    camera_directions,
    camera_matrix,
    looking_from,
    read_folder,
    render_views,
)
from posekit.synthetic.shapes import SHAPES

MUG = SHAPES["mug"]().mesh


def silent(done: float) -> None:
    pass


def square(half_m: float = 0.05, z_m: float = 0.0, color: tuple[int, int, int] | None = None) -> Mesh:
    corners = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * half_m + [0, 0, z_m]
    return Mesh(
        vertices_m=corners.astype(np.float32),
        faces=np.array([[0, 1, 2], [0, 2, 3]], dtype=np.int32),
        vertex_colors=None if color is None else np.tile(np.array(color, dtype=np.uint8), (4, 1)),
    )


# ------------------------------------------------------------------------------------------------------ rendering them


def test_the_cameras_stand_on_the_corners_of_an_icosphere() -> None:
    directions = camera_directions()
    assert directions.shape == (42, 3)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1)
    cosine = directions @ directions.T - 2 * np.eye(42)
    np.testing.assert_allclose(cosine.min(axis=1), -1 - 2 * np.isclose(cosine.min(axis=1), -3))  # each has its opposite
    apart = np.degrees(np.arccos(cosine.max(axis=1)))
    np.testing.assert_allclose(apart, 31.717, atol=0.01)
    assert [tuple(directions[index].round(9)) for index in (0, 11)] == [(0, 0, 1), (0, 0, -1)]


def test_cameras_look_at_the_origin_with_the_objects_z_axis_up() -> None:
    for direction in camera_directions():
        T_cam_obj = looking_from(direction, 2.0)
        R = T_cam_obj[:3, :3]
        np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(R) > 0
        np.testing.assert_allclose(-R.T @ T_cam_obj[:3, 3], 2 * direction, atol=1e-12)
        right, down, _ = R @ [0, 1, 0] if abs(direction[2]) > 0.999 else R @ [0, 0, 1]
        assert (abs(right) < 1e-12, down < 0) == (True, True)


def test_the_camera_is_the_published_one() -> None:
    K = camera_matrix()
    assert K[0, 0] == K[1, 1] == pytest.approx(711.1, abs=0.05)
    assert K[0, 2] == K[1, 2] == 255.5
    top = next(render_views(square(0.05), silent))  # 1 m wide where the camera is 2 m away
    columns = np.flatnonzero(top.mask.any(axis=0))
    assert columns[-1] + 1 - columns[0] == pytest.approx(711.1 / 2, abs=1)
    assert columns[-1] + columns[0] == 511


def test_coordinates_project_to_their_pixels_and_lie_on_the_surface() -> None:
    mesh = SHAPES["housing"]().mesh
    distance_m = 4 * float(np.abs(mesh.vertices_m).max())
    for view, direction in zip(render_views(mesh, silent, count=6), camera_directions()[::7], strict=True):
        T_cam_obj = looking_from(direction, distance_m)
        assert (view.rgb.shape, view.rgb.dtype) == ((512, 512, 3), np.uint8)
        assert (view.xyz_m.shape, view.xyz_m.dtype) == ((512, 512, 3), np.float32)
        seen = (view.xyz_m[view.mask] @ T_cam_obj[:3, :3].T + T_cam_obj[:3, 3]) @ camera_matrix().T
        np.testing.assert_allclose(seen[:, :2] / seen[:, 2:], np.argwhere(view.mask)[:, ::-1], atol=0.01)
        assert (view.xyz_m[view.mask] > mesh.vertices_m.min(axis=0) - 1e-6).all()
        assert (view.xyz_m[view.mask] < mesh.vertices_m.max(axis=0) + 1e-6).all()
        assert not view.xyz_m[~view.mask].any()
        assert not view.rgb[~view.mask].any()


def test_together_the_views_show_the_object_from_end_to_end() -> None:
    points = np.concatenate([view.xyz_m[view.mask][::50] for view in render_views(MUG, silent)])
    np.testing.assert_allclose(points.min(axis=0), MUG.vertices_m.min(axis=0), atol=1e-3)
    np.testing.assert_allclose(points.max(axis=0), MUG.vertices_m.max(axis=0), atol=1e-3)


def test_an_object_of_any_size_fills_its_views_alike() -> None:
    mesh = SHAPES["wedge"]().mesh
    small, large = (
        next(render_views(Mesh(vertices_m=mesh.vertices_m * np.float32(s), faces=mesh.faces), silent))
        for s in (1, 1024)
    )
    np.testing.assert_array_equal(small.mask, large.mask)
    np.testing.assert_array_equal(small.rgb, large.rgb)
    np.testing.assert_allclose(large.xyz_m, small.xyz_m * 1024, rtol=1e-5, atol=1e-5)


def test_the_distance_is_measured_about_the_origin_of_the_cad() -> None:
    near, far = (next(render_views(square(0.05, z_m=z), silent)).mask.sum() for z in (0, -0.1))
    assert far / near == pytest.approx((0.2 / 0.5) ** 2, rel=0.02)


def test_a_surface_is_bright_where_it_faces_the_camera() -> None:
    top, slanted, *_ = render_views(square(color=(200, 100, 50)), silent)
    np.testing.assert_array_equal(top.rgb[256, 256], (200, 100, 50))
    light = 0.05 + 0.95 / np.sqrt(5)  # seen and lit from 63 degrees off its normal
    np.testing.assert_allclose(slanted.rgb[256, 256], np.array([200, 100, 50]) * light ** (1 / 2.2), atol=1)


def test_an_object_without_colours_is_grey() -> None:
    colors = next(render_views(square(), silent)).rgb[200:300, 200:300]
    assert colors.min() > 100
    assert np.ptp(colors, axis=-1).max() == 0


def test_progress_is_told_of_every_view_after_it_was_taken() -> None:
    told: list[float] = []
    views = render_views(MUG, told.append, count=4)
    next(views)
    assert told == []
    assert len(list(views)) == 3
    assert told == [0.25, 0.5, 0.75, 1.0]


def test_fewer_views_are_spread_over_all_of_them() -> None:
    some = dict(zip((0, 14, 28), render_views(MUG, silent, count=3), strict=True))
    for index, view in enumerate(render_views(MUG, silent)):
        if index in some:
            np.testing.assert_array_equal(view.rgb, some[index].rgb)


def test_views_that_see_a_sheet_edge_on_are_left_out() -> None:
    told: list[float] = []
    views = list(render_views(square(), told.append))
    assert 0 < 42 - len(views) <= 10
    assert len(told) == 42
    assert min(view.mask.sum() for view in views) >= 4


def test_an_object_that_no_camera_sees_is_refused() -> None:
    speck = square(1e-6, z_m=1.0)
    with pytest.raises(InvalidInput, match="fewer than 4 pixels in each of 42 views"):
        list(render_views(speck, silent))


# ----------------------------------------------------------------------------------------------------- reading a folder


@pytest.fixture(scope="module")
def views() -> list[View]:
    """Return four small views of a mug."""
    return [View(*(array[::8, ::8].copy() for array in view)) for view in render_views(MUG, silent, count=4)]


def write(folder: Path, views: list[View], scale: float = 1000.0, dtype: str = "float16") -> Path:
    """Write views as the original's renderer does: float16 millimetres, -1 in the background."""
    for index, view in enumerate(views):
        (folder / f"rgb_{index}.png").write_bytes(encode_png(view.rgb))
        (folder / f"mask_{index}.png").write_bytes(encode_png(view.mask))
        np.save(folder / f"xyz_{index}.npy", np.where(view.mask[..., None], view.xyz_m * scale, -1).astype(dtype))
    return folder


def test_a_folder_holds_what_was_rendered(tmp_path: Path, views: list[View]) -> None:
    read = list(read_folder(write(tmp_path, views, dtype="float32"), 4, MUG))
    assert len(read) == 4
    for back, view in zip(read, views, strict=True):
        np.testing.assert_array_equal(back.rgb, view.rgb)
        np.testing.assert_array_equal(back.mask, view.mask)
        np.testing.assert_allclose(back.xyz_m, view.xyz_m, atol=1e-8)


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f4", "float64"])
def test_coordinates_come_in_millimetres_of_any_float(tmp_path: Path, views: list[View], dtype: str) -> None:
    back = next(read_folder(write(tmp_path, views, dtype=dtype), 4, MUG))
    assert back.xyz_m.dtype == np.float32
    np.testing.assert_allclose(back.xyz_m, views[0].xyz_m, atol=0.00004)


def test_pictures_come_in_any_8_bit_mode(tmp_path: Path, views: list[View]) -> None:
    folder = write(tmp_path, views)
    rgb, mask, _ = views[0]
    grey = rgb[..., 0]
    (folder / "rgb_0.png").write_bytes(encode_png(np.dstack((rgb, grey))))  # alpha
    (folder / "rgb_1.png").write_bytes(encode_png(grey))
    (folder / "mask_0.png").write_bytes(encode_png(np.dstack([mask * np.uint8(255)] * 3)))
    (folder / "mask_1.png").write_bytes(encode_png(np.where(mask, 255, 254).astype(np.uint8)))
    first, second, *_ = read_folder(folder, 4)
    np.testing.assert_array_equal(first.rgb, rgb)
    np.testing.assert_array_equal(second.rgb, np.dstack([grey] * 3))
    np.testing.assert_array_equal(first.mask, mask)
    np.testing.assert_array_equal(second.mask, mask)  # 255 only


def test_of_more_views_some_are_taken_at_even_steps(tmp_path: Path, views: list[View]) -> None:
    names = [0, 1, 0, 2, 0, 3]  # six views, of which three are asked for
    read = list(read_folder(write(tmp_path, [views[i] for i in names]), 3))
    for back in read:
        np.testing.assert_array_equal(back.rgb, views[0].rgb)
    assert len(read) == 3


def test_a_view_that_shows_nothing_is_left_out(tmp_path: Path, views: list[View]) -> None:
    folder = write(tmp_path, views)
    nothing = np.zeros_like(views[0].mask)
    (folder / "mask_2.png").write_bytes(encode_png(nothing))
    assert len(list(read_folder(folder, 4))) == 3
    for index in range(4):
        (folder / f"mask_{index}.png").write_bytes(encode_png(nothing.astype(np.uint8) + np.uint8(1)))
    with pytest.raises(InvalidInput, match="none of 4 masks marks 4 pixels of the object with 255"):
        read_folder(folder, 4)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def claiming(shape: str) -> Callable[[Path], None]:
    """Return a function that writes an array file whose header claims this shape."""
    header = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}".encode()
    start = b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little")
    return lambda path: path.write_bytes(start + header + bytes(200))  # type: ignore[func-returns-value]


def holding(array: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.save(path, array)


def with_a_hole(path: Path) -> None:
    xyz = np.load(path)
    xyz[::2] = np.nan
    np.save(path, xyz)


def of_16_bits(path: Path) -> None:
    path.write_bytes(encode_png(np.zeros((64, 64), np.uint16)))


def of_size(height: int, width: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(encode_png(np.zeros((height, width, 3), np.uint8)))  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    "name, spoil, error, words",
    [
        ("rgb_3.png", Path.unlink, InvalidInput, "holds rgb_i.png"),
        ("mask_2.png", Path.unlink, InvalidInput, "for every i from 0 to 3"),
        ("xyz_3.npy", Path.unlink, InvalidInput, "is missing"),
        ("rgb_3.png", cut_short, BadData, "cut short"),
        ("mask_3.png", lambda path: path.write_bytes(b""), BadData, "empty"),
        ("mask_3.png", of_size(64, 63), InvalidInput, "63 x 64 pixels, rgb_3.png 64 x 64"),
        ("rgb_3.png", of_size(8000, 6300), TooLarge, "50 megapixels"),
        ("rgb_3.png", of_16_bits, InvalidInput, "16 bits"),
        ("xyz_3.npy", cut_short, BadData, "cut short"),
        ("xyz_3.npy", claiming("((((("), BadData, "no array file"),
        ("xyz_3.npy", claiming("-" * 5000 + "1"), BadData, "no array file"),
        ("xyz_3.npy", claiming("(True, 64, 3)"), BadData, "no array file"),
        ("xyz_3.npy", claiming(f"({10**30}, 64, 3)"), BadData, "no array file"),
        ("xyz_3.npy", claiming("(1000000000, 64, 3)"), BadData, "no array file"),
        ("xyz_3.npy", lambda path: path.write_bytes(b""), BadData, "no array file"),
        ("xyz_3.npy", holding(np.array([[print]], dtype=object)), BadData, "no array file"),
        ("xyz_3.npy", holding(np.zeros((64, 63, 3), np.float32)), InvalidInput, r"\(64, 64, 3\) are needed"),
        ("xyz_3.npy", holding(np.zeros((64, 64, 3), np.int16)), InvalidInput, "int16"),
        ("xyz_3.npy", holding(np.full((64, 64, 3), 1e300)), InvalidInput, "no number"),
        ("xyz_3.npy", with_a_hole, InvalidInput, "no number under mask_3.png"),
    ],
)  # fmt: skip
def test_a_file_at_fault_is_named_before_any_view_is_handed_out(
    tmp_path: Path, views: list[View], name: str, spoil: Callable[[Path], None], error: type[PoseError], words: str
) -> None:
    spoil(write(tmp_path, views) / name)
    with pytest.raises(error, match=words) as raised:
        read_folder(tmp_path, 4)
    assert type(raised.value) is error
    assert name in raised.value.detail
    assert str(tmp_path) not in raised.value.detail


def test_an_empty_folder_or_none_says_what_it_should_hold(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InvalidInput, match=r"rgb_0\.png is missing, with 125 more"):
            read_folder(folder)


def test_a_folder_in_metres_is_refused(tmp_path: Path, views: list[View]) -> None:
    with pytest.raises(InvalidInput, match="look like metres"):
        read_folder(write(tmp_path, views, scale=1.0), 4, MUG)


def test_a_folder_of_another_object_or_frame_is_refused(tmp_path: Path, views: list[View]) -> None:
    write(tmp_path, views)
    moved = Mesh(vertices_m=MUG.vertices_m - MUG.vertices_m.mean(axis=0), faces=MUG.faces)
    for mesh in (SHAPES["bolt"]().mesh, moved, square(1.0)):
        with pytest.raises(InvalidInput, match="of another object, or of one with another origin"):
            read_folder(tmp_path, 4, mesh)


def test_colours_are_red_first_on_disk_and_here(tmp_path: Path, views: list[View]) -> None:
    folder = write(tmp_path, views)
    bgr = cv2.imread(str(folder / "rgb_0.png"))
    np.testing.assert_array_equal(next(read_folder(folder, 4)).rgb, bgr[..., ::-1])
