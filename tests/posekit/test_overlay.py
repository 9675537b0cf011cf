"""The overlay picture: lines lie on the model, and odd items do no harm."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest

from posekit.overlay import OverlayItem, draw_overlay, item_color
from posekit.render import render
from posekit.synthetic.shapes import SHAPES, rotation

K = np.array([[600.0, 0, 319.5], [0, 600.0, 239.5], [0, 0, 1]])
GREY_IMAGE = np.full((480, 640, 3), 128, np.uint8)


def housing(z_m: float = 0.5, x_m: float = 0.0) -> OverlayItem:
    T = np.eye(4)
    T[:3, :3] = rotation((1, 0.3, 0.2), 140)
    T[:3, 3] = x_m, 0, z_m
    return OverlayItem(label="housing", mesh=SHAPES["housing"]().mesh, T_cam_obj=T, score=0.93)


def test_an_overlay_of_nothing_is_a_copy_of_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    drawn = draw_overlay(image, K, [])
    assert np.array_equal(drawn, image)
    assert drawn is not image


def test_the_outline_lies_on_the_silhouettes_border() -> None:
    item = housing()
    assert item.mesh is not None
    assert item.T_cam_obj is not None
    drawn = draw_overlay(GREY_IMAGE, K, [item], axes=False, labels=False)
    model = render([item.mesh], [item.T_cam_obj], K, 640, 480).instance == 0
    outside = cv2.distanceTransform((~model).astype(np.uint8), cv2.DIST_L2, 5)
    inside = cv2.distanceTransform(model.astype(np.uint8), cv2.DIST_L2, 5)
    color = (np.abs(drawn.astype(int) - item_color(0)) < 40).all(axis=-1)
    border = model & (inside <= 1.5)
    assert color[border].mean() > 0.95
    assert (np.maximum(outside, inside)[color] <= 3).all()
    assert np.array_equal(drawn[outside > 5], GREY_IMAGE[outside > 5])
    tinted = model & (inside > 5)
    assert (drawn[tinted] != 128).any(axis=-1).all()
    assert (np.abs(drawn[tinted].astype(int) - 128) < 40).all()


def test_axes_start_at_the_objects_origin_in_their_colours() -> None:
    item = housing()
    assert item.T_cam_obj is not None
    bare = draw_overlay(GREY_IMAGE, K, [item], axes=False, labels=False)
    drawn = draw_overlay(GREY_IMAGE, K, [item], labels=False)
    changed = (bare != drawn).any(axis=-1)
    for axis, color in ((0, (255, 64, 64)), (1, (64, 224, 64)), (2, (72, 128, 255))):
        point = K @ (item.T_cam_obj[:3, 3] + 0.03 * item.T_cam_obj[:3, axis])
        u, v = np.rint(point[:2] / point[2]).astype(int)
        assert changed[v, u]
        near = drawn[v - 1 : v + 2, u - 1 : u + 2].reshape(-1, 3).astype(int)
        assert np.abs(near - color).sum(axis=1).min() < 60


def test_a_rejected_detection_is_a_grey_box_with_its_code() -> None:
    item = OverlayItem(label="mug", rejected=True, code="no_depth", bbox=(200, 150, 120, 90))
    drawn = draw_overlay(GREY_IMAGE, K, [item], labels=False)
    changed = np.argwhere((drawn != GREY_IMAGE).any(axis=-1))
    assert np.abs(changed.min(axis=0) - (150, 200)).max() <= 4
    assert np.abs(changed.max(axis=0) - (240, 320)).max() <= 4
    assert np.array_equal(drawn[170:220, 220:300], GREY_IMAGE[170:220, 220:300])
    labelled = draw_overlay(GREY_IMAGE, K, [item])
    assert (labelled != drawn).any()


def test_a_pose_without_its_mesh_is_a_dashed_box_in_its_colour() -> None:
    item = OverlayItem(label="gone", T_cam_obj=np.eye(4), score=0.9, bbox=(200, 150, 120, 90))
    drawn = draw_overlay(GREY_IMAGE, K, [item])
    assert np.array_equal(drawn[170:220, 220:300], GREY_IMAGE[170:220, 220:300])
    assert (drawn == item_color(0)).all(axis=-1).sum() > 100
    assert np.array_equal(drawn[440:], GREY_IMAGE[440:])


@pytest.mark.parametrize(
    "item",
    [
        housing(z_m=-0.5),
        housing(z_m=0.5, x_m=5.0),
        OverlayItem(label="no pose"),
        OverlayItem(label="", rejected=True, code="mask_empty"),
        OverlayItem(label="far off", rejected=True, code="no_fit", bbox=(9000, 9000, 5, 5)),
        OverlayItem(label="broken", mesh=SHAPES["mug"]().mesh, T_cam_obj=np.full((4, 4), np.nan)),
    ],
    ids=["behind", "outside", "no-pose", "no-box", "box-outside", "nan"],
)
def test_what_cannot_be_seen_is_named_in_the_corner(item: OverlayItem) -> None:
    drawn = draw_overlay(GREY_IMAGE, K, [item])
    changed = np.argwhere((drawn != GREY_IMAGE).any(axis=-1))
    assert len(changed)
    assert changed[:, 0].min() > 440
    assert changed[:, 1].min() < 10


def test_a_model_around_the_camera_is_drawn_without_trouble() -> None:
    drawn = draw_overlay(GREY_IMAGE, K, [housing(z_m=0.02)])
    assert drawn.shape == GREY_IMAGE.shape


def test_labels_survive_any_text() -> None:
    item = housing()
    odd = OverlayItem(label="Gehäuse\n\x00 部品 " + "x" * 500, mesh=item.mesh, T_cam_obj=item.T_cam_obj, score=1.0)
    assert draw_overlay(GREY_IMAGE, K, [odd]).shape == GREY_IMAGE.shape


@pytest.mark.parametrize("height, width", [(1, 1), (40, 30), (720, 1280)])
def test_any_image_size_is_drawn_on(height: int, width: int) -> None:
    image = np.zeros((height, width, 3), np.uint8)
    camera = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
    rejected = OverlayItem(label="mug", rejected=True, code="no_fit", bbox=(0, 0, width, height))
    drawn = draw_overlay(image, camera, [housing(), rejected])
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert not image.any()


def test_colours_of_neighbours_in_the_list_differ() -> None:
    colors = [item_color(index) for index in range(60)]
    assert len(set(colors)) == 60
    for a, b in itertools.pairwise(colors):
        assert np.abs(np.subtract(a, b)).sum() > 60
