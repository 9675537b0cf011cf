"""Arrays, files and meshes on their way to the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pem import client, imagefiles
from pem.encode import asked_for, pose_request
from posekit.io.masks import decode_mask

K = np.array([[600.0, 0, 31.5], [0, 600.0, 23.5], [0, 0, 1]])
RGB = np.full((48, 64, 3), 100, np.uint8)
DEPTH = np.full((48, 64), 800, np.uint16)
MASK = np.zeros((48, 64), bool)
MASK[10:30, 20:50] = True


def test_arrays_become_what_the_server_reads() -> None:
    options = {
        "objects": {5: "can", "mug": {"cad_path": "mug.ply"}},
        "object_ids": [np.int64(5), "mug"],
        "scores": np.array([0.5, 1.0]),
        "boxes": np.array([[1, 2, 3, 4], [5, 6, 7, 8]]),
        "init_poses": [np.eye(4), None],
        "seed": 3,
        "engine": None,
    }
    body = pose_request(RGB, DEPTH, K, [MASK, b"png"], options)
    np.testing.assert_array_equal(imagefiles.read_png(body["rgb_image"]), RGB)
    np.testing.assert_array_equal(imagefiles.read_png(body["depth_image"]), DEPTH)
    assert body["cam_params"] == {"cam_K": K.ravel().tolist()}
    columns = body["detections"]
    np.testing.assert_array_equal(decode_mask(columns["masks"][0], 48, 64, None, 1e6), MASK)
    assert columns["masks"][1] == b"png"
    assert columns["object_ids"] == [5, "mug"]
    assert (columns["scores"], columns["boxes"]) == ([0.5, 1.0], [[1, 2, 3, 4], [5, 6, 7, 8]])
    assert body["objects"] == {5: {"object_id": "can"}, "mug": {"cad_path": "mug.ply"}}
    assert body["init_poses"] == [{"rotation": np.eye(3).tolist(), "translation": [0, 0, 0]}, None]
    assert body["seed"] == 3
    assert "engine" not in body


def test_encoded_pictures_and_the_other_mask_forms_pass_untouched() -> None:
    rle = {"size": [48, 64], "counts": "x"}
    polygons = [[0.0, 0.0, 5.0, 0.0, 5.0, 5.0]]
    body = pose_request(b"jpeg", b"png", K, [rle, polygons], {"object_id": "x"})
    assert (body["rgb_image"], body["depth_image"]) == (b"jpeg", b"png")
    assert body["detections"]["masks"] == [rle, polygons]


def test_masks_may_come_from_a_generator() -> None:
    body = pose_request(RGB, DEPTH, K, (mask for mask in [MASK, MASK]), {"object_id": "x"})  # type: ignore[arg-type]
    assert len(body["detections"]["masks"]) == 2


def test_a_cad_file_brings_its_format(tmp_path: Path) -> None:
    path = tmp_path / "Mug.PLY"
    path.write_bytes(b"ply")
    body = pose_request(RGB, DEPTH, K, [], {"cad": path})
    assert (body["cad"], body["cad_format"]) == (b"ply", "ply")


def test_pictures_and_masks_may_be_paths(tmp_path: Path) -> None:
    for name in ("rgb", "depth", "mask"):
        (tmp_path / name).write_bytes(name.encode())
    body = pose_request(tmp_path / "rgb", str(tmp_path / "depth"), K, [tmp_path / "mask"], {})
    assert (body["rgb_image"], body["depth_image"], body["detections"]["masks"]) == (b"rgb", b"depth", [b"mask"])


def test_a_loaded_camera_file_is_a_camera() -> None:
    camera = {"cam_K": K.ravel().tolist(), "depth_scale": 0.1}
    assert pose_request(RGB, DEPTH, camera, [], {})["cam_params"] == camera
    told = pose_request(RGB, DEPTH, camera, [], {"depth_scale": 2.0})["cam_params"]
    assert told == {**camera, "depth_scale": 2.0}


def test_float_metres_need_no_scale() -> None:
    metres = DEPTH.astype(np.float32) / 1000
    camera = pose_request(RGB, metres, K, [], {"depth_unit": "m"})["cam_params"]
    assert (camera["depth_unit"], camera["depth_scale"]) == ("m", 1.0)
    assert "depth_scale" not in pose_request(RGB, DEPTH, K, [], {"depth_unit": "m"})["cam_params"]


@pytest.mark.parametrize("wrong", [{"fx": 600.0}, {}], ids=str)
def test_a_dict_that_is_no_camera_is_named(wrong: dict[str, float]) -> None:
    with pytest.raises(TypeError, match="without cam_K"):
        pose_request(RGB, DEPTH, wrong, [], {})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"depth": DEPTH.astype(np.float32)}, "depth_scale"),
        ({"depth": DEPTH.astype(np.uint8)}, "8-bit depth"),
        ({"depth": DEPTH.astype(np.int64) * 100}, "16-bit"),
        ({"depth": RGB}, r"\(H, W\)"),
        ({"rgb": RGB.astype(np.float32)}, "uint8"),
        ({"rgb": RGB[..., :2]}, "uint8"),
        ({"K": np.eye(4)}, r"\(3, 3\)"),
        ({"masks": [RGB]}, "mask"),
        ({"masks": [MASK, MASK[:24]]}, r"masks\[1\], an array, is 24 rows of 64 pixels, the image is 48 rows of 64$"),
        ({"masks": [MASK.T]}, "an array, is 64 rows of 48 pixels, the image is 48 rows of 64; transpose it"),
        ({"masks": [MASK[:24]], "rgb": imagefiles.write_png(RGB)}, "an array, is 24 rows of 64"),
        ({"masks": [MASK[:24]], "rgb": b"jpeg"}, "an array, is 24 rows of 64"),
        ({"masks": None}, "masks"),
        ({"cad": b"ply"}, "cad_format"),
        ({"detections": [{}]}, "not both"),
        ({"init_poses": [np.eye(3)]}, r"\(4, 4\)"),
        ({"init_poses": [{"rotation": np.eye(3)}]}, "rotation and translation"),
        ({"init_poses": [{"rotation": np.eye(4), "translation": [0, 0, 0]}]}, r"\(3, 3\)"),
    ],
)
def test_what_cannot_be_right_is_not_sent(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"rgb": RGB, "depth": DEPTH, "K": K, "masks": [MASK], **change}
    with client.Client("http://127.0.0.1:9", retries=0) as pem, pytest.raises(ValueError, match=words):
        pem.estimate(**arguments)


@pytest.mark.parametrize(
    "options, names",
    [
        ({"object_id": "mug"}, {None: "mug", 5: "mug"}),
        ({"cad_path": "parts/mug.ply"}, {None: "parts/mug.ply", "a": "parts/mug.ply"}),
        ({"cad": Path("parts") / "mug.ply"}, {None: "parts/mug.ply"}),
        ({"cad": "mug.ply"}, {None: "mug.ply"}),
        ({"cad": b"ply", "cad_format": "ply"}, {None: None, 5: None}),
        (
            {"objects": {5: "can", "6": {"cad_path": "mug.ply"}, "c": {"object_id": "cup"}}},
            {5: "can", "5": "can", 6: "mug.ply", "c": "cup", "d": None, None: None},
        ),
        ({"objects": None, "object_id": "mug"}, {None: "mug"}),
    ],
    ids=str,
)
def test_a_detections_object_is_what_the_request_names(
    options: dict[str, Any], names: dict[int | str | None, str | None]
) -> None:
    named = asked_for(options)
    assert {category: named(category) for category in names} == names


def test_a_mesh_may_be_the_cad_of_a_request() -> None:
    body = pose_request(RGB, DEPTH, K, [], {"cad": (np.eye(3), [[0, 1, 2]])})
    assert body["cad_format"] == "ply"
    assert body["cad"].startswith(b"ply\nformat binary_little_endian 1.0\n")
