"""The contract's promises for valid requests: every route, every form of a request, through the real port."""

from __future__ import annotations

import base64
import gzip
import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cv2
import httpx
import msgspec
import numpy as np
import pytest
import trimesh

from pem import rle
from posekit.io import images, masks
from posekit.synthetic.scenes import pose_errors
from tests.running import Question, RunningServer
from tests.serve.special import Special
from tests.serve.tiny import (
    FULL,
    HEIGHT,
    NAMES,
    POSE,
    SEG,
    WIDTH,
    Asker,
    masks_of,
    one,
    ply,
    tiny_question,
    tiny_scene,
    truth,
)

ROW = {
    "object_id",
    "cad_id",
    "rotation",
    "translation",
    "confidence",
    "bbox",
    "status",
    "evidence",
    "ambiguous",
}
ANSWER = {
    "success",
    "poses",
    "inference_time",
    "timing",
    "cad_path_used",
    "output_dir_used",
    "error_message",
    "warnings",
    "engine",
    "degraded",
    "release",
}


@pytest.fixture(scope="module")
def tiny() -> Question:
    return tiny_question()


@pytest.fixture(scope="module")
def wedge(ask: Asker) -> dict[str, Any]:
    """Return the row that every form of the same request gets."""
    row = ask.poses(one())[0]
    assert row["status"] == "ok", row
    return row


@pytest.fixture(scope="module")
def cad_root(server: RunningServer) -> Path:
    """Return the default CAD root, with the wedge in it."""
    folder = server.data / "cad"
    (folder / "line 2").mkdir(parents=True, exist_ok=True)
    (folder / "line 2" / "wedge.ply").write_bytes(ply())
    return folder


def same_pose(row: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(row[key] == wanted[key] for key in ("rotation", "translation", "confidence", "cad_id", "status"))


# ---------------------------------------------------------------------------------------------------------- the pose


def test_a_search_finds_the_pose_and_the_answer_has_every_promised_field(ask: Asker, tiny: Question) -> None:
    answer = ask.ok(tiny.body(indices=[1]))
    assert answer.keys() >= ANSWER
    (row,) = answer["poses"]
    assert row.keys() == ROW
    degrees, millimetres = tiny.errors(1, row)
    assert degrees < 2
    assert millimetres < 2
    assert row["status"] == "ok"
    assert row["object_id"] == "wedge"
    assert len(row["cad_id"]) == 64
    assert 0.5 < row["confidence"] <= 1
    assert row["bbox"] == list(masks.mask_box(tiny.scene.instances[1].mask) or ())
    assert row["evidence"].keys() == {
        "inlier_fraction",
        "residual_mm",
        "visible_overlap",
        "free_space_violation",
    }
    assert answer["timing"].keys() >= {"decode_ms", "queue_ms", "pose_ms", "batch_detections", "batch_requests"}
    assert answer["timing"]["batch_detections"] == 1
    assert 0 < answer["inference_time"] < 60
    assert (answer["engine"], answer["degraded"], answer["warnings"]) == ("geometric", False, [])
    assert (answer["cad_path_used"], answer["output_dir_used"]) == (None, None)


def as_form(tree: dict[str, Any], **files: bytes) -> dict[str, Any]:
    """Encode a tree as multipart: pictures and CAD as files, the rest as the part `request`."""
    rest = {key: value for key, value in tree.items() if key not in ("rgb_image", "depth_image", "cad")}
    parts = {
        "rgb": ("rgb.png", tree["rgb_image"]),
        "depth": ("depth.png", tree["depth_image"]),
        "request": (None, msgspec.json.encode(rest), "application/json"),
    }
    return {"files": parts | {name: (f"{name}.ply", data) for name, data in files.items()}}


def test_json_messagepack_multipart_and_gzip_get_the_same_bits(ask: Asker, tiny: Question) -> None:
    tree = tiny.body(indices=[1])  # a search, so that the seed made of the content matters
    binary = ask.poses(tree)
    text = msgspec.json.encode(tree)
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert ask.poses(tree, as_json=True) == binary
    assert ask.send("POST", POSE, **as_form(tree)).json()["poses"] == binary
    assert ask.send("POST", POSE, content=gzip.compress(text), headers=packed).json()["poses"] == binary


def test_content_types_may_carry_parameters_and_messagepacks_older_name(ask: Asker, wedge: dict[str, Any]) -> None:
    for media, content in (
        ("application/json; charset=utf-8", msgspec.json.encode(one())),
        ("Application/JSON", msgspec.json.encode(one())),
        ("application/x-msgpack", msgspec.msgpack.encode(one())),
    ):
        answer = ask.send("POST", POSE, content=content, headers={"Content-Type": media})
        assert same_pose(answer.json()["poses"][0], wedge), media


def test_a_chunked_body_is_read_too(ask: Asker, wedge: dict[str, Any]) -> None:
    text = msgspec.json.encode(one())
    pieces = (text[start : start + 1000] for start in range(0, len(text), 1000))
    answer = ask.send("POST", POSE, content=pieces, headers={"Content-Type": "application/json"})
    assert same_pose(answer.json()["poses"][0], wedge)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_plain_curl_works(server: RunningServer, tmp_path: Path, wedge: dict[str, Any]) -> None:
    tree = one()
    (tmp_path / "rgb.png").write_bytes(tree.pop("rgb_image"))
    (tmp_path / "depth.png").write_bytes(tree.pop("depth_image"))
    (tmp_path / "request.json").write_bytes(msgspec.json.encode(tree))
    command = ["curl", "-sS", "-F", "rgb=@rgb.png", "-F", "depth=@depth.png", "-F", "request=<request.json"]
    done = subprocess.run([*command, server.url + POSE], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    assert same_pose(json.loads(done.stdout)["poses"][0], wedge)


def test_the_answer_is_messagepack_where_the_client_accepts_it(ask: Asker, wedge: dict[str, Any]) -> None:
    response = ask.post(one(), headers={"Accept": "application/msgpack"})
    assert response.headers["Content-Type"] == "application/msgpack"
    answer = msgspec.msgpack.decode(response.content)
    assert answer.keys() >= ANSWER
    assert same_pose(answer["poses"][0], wedge)


def test_failures_are_messagepack_where_the_client_accepts_it(ask: Asker) -> None:
    response = ask.post({}, headers={"Accept": "application/msgpack"})
    answer = msgspec.msgpack.decode(response.content)
    assert response.status_code == 422
    assert (answer["success"], answer["poses"], answer["error"]["code"]) == (False, [], "invalid")


def test_the_same_request_alone_and_in_company_gets_the_same_bits(ask: Asker, tiny: Question) -> None:
    together = ask.poses(tiny.body())
    assert [row["object_id"] for row in together] == list(NAMES)
    assert together[1] == ask.poses(tiny.body(indices=[1]))[0]
    assert all(max(tiny.errors(index, row)) < 2 for index, row in enumerate(together))


def test_a_seed_of_ones_own_is_taken_and_repeats(ask: Asker, tiny: Question) -> None:
    tree = tiny.body(indices=[1], seed=7)
    assert ask.poses(tree) == ask.poses(tree, as_json=True)


# ------------------------------------------------------------------------------------------------------------- masks


def as_png(mask: Any) -> bytes:
    return images.encode_png(mask)


def test_every_form_of_a_mask_gives_the_same_pose(ask: Asker, tiny: Question, wedge: dict[str, Any]) -> None:
    mask = tiny.scene.instances[1].mask
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flat)))).tolist()
    counts = np.diff([0, *edges, flat.size]).tolist()
    string = rle.encode_rle(mask)
    forms: dict[str, Any] = {
        "compressed RLE": string,
        "RLE with a list of counts": {"size": [HEIGHT, WIDTH], "counts": counts},
        "nested list": mask.astype(int).tolist(),
        "base64 PNG": base64.b64encode(as_png(mask)).decode(),
        "PNG as a data URL": "data:image/png;base64," + base64.b64encode(as_png(mask)).decode(),
    }
    for name, form in forms.items():
        for as_json in (True, False):
            row = ask.poses(one(detections=masks_of(form)), as_json=as_json)[0]
            assert same_pose(row, wedge), (name, as_json)
            assert row["bbox"] == wedge["bbox"], name
    for form in (as_png(mask), {"size": [HEIGHT, WIDTH], "counts": string["counts"].encode()}):  # bytes: MessagePack
        assert same_pose(ask.poses(one(detections=masks_of(form)))[0], wedge)


def test_polygons_outline_the_same_mask_as_the_pixels(ask: Asker) -> None:
    box = np.zeros((HEIGHT, WIDTH), dtype=bool)
    box[50:70, 100:125] = True
    left, right = [100, 50, 112, 50, 112, 70, 100, 70], [112, 50, 125, 50, 125, 70, 112, 70]
    row = ask.poses(one(detections=masks_of(rle.encode_rle(box))))[0]
    assert row["bbox"] == [100, 50, 25, 20]
    assert ask.poses(one(detections=masks_of([left, right])))[0] == row
    assert ask.poses(one(detections=masks_of([left, right])), as_json=True)[0] == row


def test_boxes_are_echoed_as_xywh_whatever_they_came_as(ask: Asker, wedge: dict[str, Any]) -> None:
    mask = tiny_question().masks[1]
    given = one(detections=masks_of(mask, boxes=[[90, 40, 50, 30.5]]))
    assert ask.poses(given)[0]["bbox"] == [90, 40, 50, 30.5]
    corners = one(detections=masks_of(mask, boxes=[[90, 40, 140, 70.5]]), box_format="xyxy")
    row = ask.poses(corners)[0]
    assert row["bbox"] == [90, 40, 50, 30.5]
    assert same_pose(row, wedge)


@pytest.mark.parametrize("category", [5, "wedge", None, 2**40])
def test_a_category_is_echoed_whatever_it_is(ask: Asker, category: int | str | None) -> None:
    tree = one(
        detections={"masks": [tiny_question().masks[1]], "object_ids": [category]}, objects=..., object_id="wedge"
    )
    assert ask.poses(tree, as_json=True)[0]["object_id"] == category


def test_only_masks_are_required(ask: Asker, wedge: dict[str, Any]) -> None:
    row = ask.poses(one(detections={"masks": [tiny_question().masks[1]]}, objects=..., object_id="wedge"))[0]
    assert same_pose(row, wedge)
    assert (row["object_id"], row["bbox"]) == (None, wedge["bbox"])


def test_sam6d_s_list_is_understood_with_all_its_keys(ask: Asker, wedge: dict[str, Any]) -> None:
    item = {
        "scene_id": 0,
        "image_id": 0,
        "category_id": 1,
        "bbox": [95, 44, 45, 34],
        "score": 0.71,
        "time": 0.0,
        "segmentation": {"counts": tiny_question().masks[1]["counts"], "size": [HEIGHT, WIDTH]},
    }
    for as_json in (True, False):
        row = ask.poses(one(detections=[item], objects=..., object_id="wedge"), as_json=as_json)[0]
        assert same_pose(row, wedge)
        assert (row["object_id"], row["bbox"]) == (1, [95, 44, 45, 34])


@pytest.mark.parametrize("nothing", [[], {"masks": []}, {"masks": [], "boxes": [], "scores": [], "object_ids": []}])
def test_no_detections_are_a_valid_question_with_an_empty_answer(ask: Asker, nothing: Any) -> None:
    answer = ask.ok(one(detections=nothing, init_poses=...))
    assert answer["poses"] == []
    assert answer.keys() >= ANSWER


def test_every_detection_keeps_its_row_in_the_order_sent(ask: Asker, tiny: Question) -> None:
    nothing = np.zeros((HEIGHT, WIDTH), dtype=bool)
    few, blind = nothing.copy(), nothing.copy()
    few[60:64, 110:118] = True  # 32 pixels, and more are needed
    blind[10:30, 10:30] = True
    depth_raw = tiny.scene.depth_raw.copy()
    depth_raw[:40, :40] = 0
    good = tiny.masks[1]
    sent = [rle.encode_rle(nothing), good, rle.encode_rle(few), good, rle.encode_rle(blind), good]
    tree = one(
        depth_image=images.encode_png(depth_raw),
        detections={"masks": sent, "object_ids": ["wedge", "wedge", "wedge", "unknown", "wedge", "wedge"]},
        init_poses=[truth(1)] * 6,
    )
    answer = ask.ok(tree)
    rows = answer["poses"]
    codes = [row["status"] if row["status"] == "ok" else row["error"]["code"] for row in rows]
    assert codes == ["mask_empty", "ok", "mask_too_small", "no_cad", "no_depth", "ok"]
    for row in rows:
        if row["status"] == "rejected":
            assert (row["rotation"], row["translation"], row["confidence"]) == (None, None, 0.0)
            assert len(row["error"]["detail"]) > 10
    assert rows[3]["cad_id"] is None
    assert "32" in rows[2]["error"]["detail"]
    assert rows[1] == rows[5]


# --------------------------------------------------------------------------------------------------------------- CAD


def test_every_way_to_name_the_cad_gives_the_same_pose(ask: Asker, cad_root: Path, wedge: dict[str, Any]) -> None:
    plain = {"masks": [tiny_question().masks[1]], "object_ids": [5]}
    ways: list[dict[str, Any]] = [
        {"cad_path": "line 2/wedge.ply"},
        {"cad_path": str(cad_root / "line 2" / "wedge.ply")},
        {"object_id": "wedge"},
        {"object_id": wedge["cad_id"]},
        {"cad": ply(), "cad_format": "ply"},
        {"objects": {"5": {"object_id": "wedge"}}},
        {"objects": {"5": {"cad_path": "line 2/wedge.ply"}, "6": {"object_id": "stepped"}}},
    ]
    for way in ways:
        for as_json in (True, False):
            answer = ask.ok(one(detections=plain, **{"objects": ..., **way}), as_json=as_json)
            assert same_pose(answer["poses"][0], wedge), way
            named = "cad_path" in str(way)
            assert answer["cad_path_used"] == ("line 2/wedge.ply" if named else None)
    numbers = ask.ok(one(detections=plain, objects={5: {"object_id": "wedge"}}))  # MessagePack's keys may be integers
    assert same_pose(numbers["poses"][0], wedge)


def test_the_cad_may_be_a_file_of_the_form(ask: Asker, wedge: dict[str, Any]) -> None:
    tree = one(objects=..., cad_format="ply")
    response = ask.send("POST", POSE, **as_form(tree, cad=ply()))
    assert same_pose(response.json()["poses"][0], wedge), response.text


def test_a_category_without_an_entry_is_the_row_no_cad(ask: Asker, tiny: Question) -> None:
    rows = ask.poses(tiny.body(objects={"wedge": {"object_id": "wedge"}}, init_poses=[truth(0), truth(1)]))
    assert [row["status"] for row in rows] == ["rejected", "ok"]
    assert rows[0]["error"]["code"] == "no_cad"
    assert rows[0]["object_id"] == "stepped"


def test_a_cad_in_metres_is_told_by_its_unit_or_guessed(ask: Asker, tiny: Question) -> None:
    for unit in ("m", "auto"):
        tree = one(objects=..., cad=ply(unit="m"), cad_format="ply", model_unit=unit)
        row = ask.poses(tree)[0]
        assert max(tiny.errors(1, row)) < 2, unit
    mesh = tiny_scene().instances[1].shape.mesh
    glb = trimesh.Scene(trimesh.Trimesh(mesh.vertices_m, mesh.faces, process=False)).export(file_type="glb")
    row = ask.poses(one(objects=..., cad=glb, cad_format="glb"))[0]  # whose specification says metres
    assert max(tiny.errors(1, row)) < 2


# ----------------------------------------------------------------------------------------------- pictures and camera


def test_the_camera_matrix_is_flat_or_three_rows(ask: Asker, wedge: dict[str, Any]) -> None:
    camera = {"cam_K": tiny_scene().K.tolist(), "depth_scale": 0.1}
    assert same_pose(ask.poses(one(cam_params=camera))[0], wedge)
    assert same_pose(ask.poses(one(cam_params=camera), as_json=True)[0], wedge)
    whole = {"cam_K": [170, 0, 79.5, 0, 170, 59.5, 0, 0, 1], "depth_scale": 0.1}  # integers are numbers too
    assert same_pose(ask.poses(one(cam_params=whole))[0], wedge)


def tiff(depth: Any) -> bytes:
    done, encoded = cv2.imencode(".tiff", depth.astype(np.float32), [cv2.IMWRITE_TIFF_COMPRESSION, 1])
    assert done
    return encoded.tobytes()


def test_depth_may_be_a_float_tiff_in_metres_or_millimetres(ask: Asker, tiny: Question) -> None:
    depth_m = tiny.scene.depth_m.copy()
    depth_m[:5] = np.nan  # no reading
    K = tiny.cam_params["cam_K"]
    for image, camera in (
        (tiff(depth_m), {"depth_scale": 1000}),
        (tiff(depth_m), {"depth_scale": 1.0, "depth_unit": "m"}),
        (tiff(depth_m * 1000), {"depth_scale": 1.0}),
    ):
        row = ask.poses(one(depth_image=image, cam_params={"cam_K": K, **camera}))[0]
        assert max(tiny.errors(1, row)) < 1


def test_the_depth_scale_of_a_png_is_one_unless_told(ask: Asker, tiny: Question) -> None:
    K = tiny.cam_params["cam_K"]
    image = images.encode_png(np.rint(tiny.scene.depth_m * 1000).astype(np.uint16))
    rows = [
        ask.poses(one(depth_image=image, cam_params={"cam_K": K}))[0],
        ask.poses(one(depth_image=image, cam_params={"cam_K": K, "depth_scale": 1, "depth_unit": "mm"}))[0],
        ask.poses(one(depth_image=image, cam_params={"cam_K": K, "depth_scale": 0.001, "depth_unit": "m"}))[0],
    ]
    assert max(tiny.errors(1, rows[0])) < 2
    assert same_pose(rows[0], rows[1])
    assert same_pose(rows[0], rows[2])


@pytest.mark.parametrize("kind", ["jpeg", "grey", "rgba"])
def test_colour_may_be_a_jpeg_grey_or_with_alpha(ask: Asker, tiny: Question, kind: str) -> None:
    rgb = tiny.scene.rgb
    picture = {
        "jpeg": cv2.imencode(".jpg", rgb[..., ::-1])[1].tobytes(),
        "grey": images.encode_png(rgb[..., 0]),
        "rgba": images.encode_png(np.dstack([rgb, np.full(rgb.shape[:2], 200, np.uint8)])),
    }[kind]
    assert max(tiny.errors(1, ask.poses(one(rgb_image=picture))[0])) < 2


def test_a_principal_point_outside_of_the_image_is_a_warning(ask: Asker) -> None:
    camera = {"cam_K": [170, 0, 300, 0, 170, 59.5, 0, 0, 1], "depth_scale": 0.1}
    answer = ask.ok(one(cam_params=camera, init_poses=...))
    assert any("principal point" in warning for warning in answer["warnings"])


# ----------------------------------------------------------------------------------------------------------- options


def test_engine_and_refinement_can_be_chosen(ask: Asker, tiny: Question) -> None:
    for engine in ("auto", "geometric"):
        for refine in ("auto", "icp", "none"):
            answer = ask.ok(one(engine=engine, refine=refine))
            assert answer["engine"] == "geometric"
            assert max(tiny.errors(1, answer["poses"][0])) < 3
    assert ask.poses(one(refine="auto")) == ask.poses(one(refine="icp"))


def test_init_poses_are_refined_and_null_is_searched_for(ask: Asker, tiny: Question) -> None:
    nearly = truth(1)
    nearly["translation"] = [x + 4 for x in nearly["translation"]]
    mask = tiny.masks[1]
    tree = tiny.body(indices=[1], detections=masks_of(mask, mask), init_poses=[nearly, None])
    started, searched = ask.poses(tree)
    assert max(tiny.errors(1, started)) < 1.5
    assert searched == ask.poses(tiny.body(indices=[1]))[0]


def test_runners_up_come_when_asked_for(ask: Asker, tiny: Question) -> None:
    rows = ask.poses(tiny.body(indices=[1], hypotheses=3))
    assert 0 < len(rows[0]["hypotheses"]) <= 3
    for other in rows[0]["hypotheses"]:
        assert other.keys() == {"rotation", "translation", "confidence"}
        assert np.allclose(np.array(other["rotation"]) @ np.array(other["rotation"]).T, np.eye(3), atol=1e-6)
        assert other["confidence"] <= rows[0]["confidence"]
    assert "hypotheses" not in ask.poses(one())[0]


def test_a_pose_below_min_score_becomes_the_row_low_confidence(ask: Asker, wedge: dict[str, Any]) -> None:
    row = ask.poses(one(min_score=1.0))[0]
    assert (row["status"], row["error"]["code"]) == ("rejected", "low_confidence")
    assert (row["rotation"], row["translation"]) == (None, None)
    assert row["confidence"] == wedge["confidence"]
    assert ask.poses(one(min_score=0.1))[0]["status"] == "ok"


def test_units_may_be_judged_strictly(ask: Asker, wedge: dict[str, Any]) -> None:
    assert same_pose(ask.poses(one(units="strict"))[0], wedge)


def test_a_deadline_that_can_be_met_changes_nothing(ask: Asker, wedge: dict[str, Any]) -> None:
    row = ask.poses(one(deadline_ms=60_000), headers={"X-Request-Deadline-Ms": "50000"})[0]
    assert same_pose(row, wedge)


def decoded_png(data: bytes) -> Any:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


def test_the_overlay_comes_as_base64_or_as_bytes(ask: Asker, tiny: Question) -> None:
    tree = tiny.body(init_poses=[truth(0), truth(1)], visualize=True)
    picture = base64.b64decode(ask.ok(tree)["visualization"], validate=True)
    image = decoded_png(picture)
    assert image.shape[:2] == (HEIGHT, WIDTH)
    assert (image != tiny.scene.rgb).any(axis=2).mean() > 0.02
    binary = msgspec.msgpack.decode(ask.post(tree, headers={"Accept": "application/msgpack"}).content)
    assert binary["visualization"] == picture
    assert "visualization" not in ask.ok(one())


def test_output_dir_gets_three_files_that_others_can_read(
    ask: Asker, server: RunningServer, tiny: Question, wedge: dict[str, Any]
) -> None:
    empty = rle.encode_rle(np.zeros((HEIGHT, WIDTH), dtype=bool))
    detections = masks_of(tiny.masks[1], empty, scores=[0.5, 0.9], boxes=[[95, 44, 45, 34], [0, 0, 1, 1]])
    answer = ask.ok(one(detections=detections, init_poses=[truth(1), None], output_dir="line 2/frame-7"))
    assert answer["output_dir_used"] == "line 2/frame-7"
    folder = server.data / "outputs" / "line 2" / "frame-7"
    assert sorted(path.name for path in folder.iterdir()) == ["detection_pem.json", "poses.npz", "vis_pem.png"]
    (found,) = json.loads((folder / "detection_pem.json").read_bytes())
    assert found.keys() >= {"scene_id", "image_id", "category_id", "bbox", "score", "segmentation", "R", "t"}
    assert found["score"] == pytest.approx(0.5 * wedge["confidence"])  # SAM-6D's score: detector times pose
    assert (found["R"], found["t"]) == (wedge["rotation"], wedge["translation"])
    assert (rle.decode_rle(found["segmentation"]) == tiny.scene.instances[1].mask).all()
    with np.load(io.BytesIO((folder / "poses.npz").read_bytes()), allow_pickle=False) as table:
        assert table["status"].tolist() == ["ok", "rejected"]
        assert np.allclose(table["t_mm"][0], wedge["translation"])
        assert np.isnan(table["R"][1]).all()
        assert table["error_code"].tolist() == ["", "mask_empty"]
    assert decoded_png((folder / "vis_pem.png").read_bytes()).shape == (HEIGHT, WIDTH, 3)


def test_a_request_larger_than_a_pass_comes_back_whole(special: Special, tiny: Question) -> None:
    count = 7  # the server's passes hold two
    places = [index % 2 for index in range(count)]
    tree = tiny.body(
        indices=places, init_poses=[truth(index) for index in places], visualize=True, output_dir="in-parts"
    )
    answer = special.ask.ok(tree)
    assert [row["object_id"] for row in answer["poses"]] == [NAMES[index] for index in places]
    assert all(max(tiny.errors(index, row)) < 2 for index, row in zip(places, answer["poses"], strict=True))
    timing = answer["timing"]
    assert timing["batch_detections"] <= 2
    stages = sum(timing[f"{stage}_ms"] for stage in ("decode", "queue", "pose", "respond"))
    assert 0 < stages <= timing["total_ms"] + 0.01, "parts that were worked on side by side count once"
    assert decoded_png(base64.b64decode(answer["visualization"])).shape == (HEIGHT, WIDTH, 3)
    written = json.loads((special.server.data / "outputs" / "in-parts" / "detection_pem.json").read_bytes())
    assert len(written) == count
    alone = special.ask.poses(one(0))[0]
    assert all(same_pose(row, alone) for row in answer["poses"][::2])


# ------------------------------------------------------------------------------------------------------- the headers


@pytest.mark.parametrize("given, kept", [("job-7_a.B", True), ("x" * 128, True), ("x" * 129, False), ("a b", False)])
def test_the_request_id_is_the_clients_own_where_it_is_a_plain_one(ask: Asker, given: str, kept: bool) -> None:
    for path in ("/livez", "/nowhere"):
        answered = ask.send("GET", path, headers={"X-Request-Id": given}).headers["X-Request-Id"]
        assert (answered == given) is kept
        assert len(answered) >= 8


def test_every_answer_says_where_its_time_went(ask: Asker) -> None:
    timing = ask.post(one()).headers["Server-Timing"]
    assert all(f"{stage};dur=" in timing for stage in ("total", "decode", "queue", "pose"))


def test_pages_of_an_allowed_origin_may_ask(special: Special) -> None:
    origin = {"Origin": "https://lab.example"}
    preflight = httpx.options(
        special.server.url + POSE,
        headers=origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "Content-Type"},
    )
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://lab.example"
    answer = special.ask.send("GET", "/livez", headers=origin)
    assert answer.headers["Access-Control-Allow-Origin"] == "https://lab.example"
    foreign = special.ask.send("GET", "/livez", headers={"Origin": "https://elsewhere.example"})
    assert "Access-Control-Allow-Origin" not in foreign.headers


# -------------------------------------------------------------------------------------------------------- GET routes


def test_status_says_what_runs(ask: Asker, server: RunningServer) -> None:
    server.wait_idle()  # whatever was asked before
    status = ask.send("GET", "/api/v1/status").json()
    assert status["server"] == "running"
    assert status["model_loaded"] is True
    assert status["device"] == "cpu"
    assert 0 < status["uptime"] < 86_400
    assert status["engine"] == "geometric"
    assert status["release"].startswith("geometric-")
    assert set(status["kernels"].values()) <= {"compiled", "reference"}
    assert status["tracks"]["production"]["state"] == "ready"
    assert status["objects"] >= 7
    assert status["queue"] == {"requests": 0, "detections": 0}


def test_version_names_engine_release_and_checkpoint(ask: Asker) -> None:
    version = ask.send("GET", "/api/v1/version").json()
    assert version.keys() >= {"version", "engine", "release", "checkpoint", "sha256"}
    assert (version["engine"], version["checkpoint"], version["sha256"]) == ("geometric", None, None)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2/models/pem/ready"])
def test_probes_say_yes_and_head_has_no_body(ask: Asker, path: str) -> None:
    assert ask.send("GET", path).status_code == 200
    head = ask.send("HEAD", path)
    assert (head.status_code, head.content) == (200, b"")


def test_the_open_inference_metadata_names_inputs_outputs_and_licences(ask: Asker) -> None:
    model = ask.send("GET", "/v2/models/pem").json()
    assert model["name"] == "pem"
    assert model["platform"]
    for tensor in [*model["inputs"], *model["outputs"]]:
        assert tensor.keys() >= {"name", "datatype", "shape"}
    assert "licen" in json.dumps(model).lower()


def test_the_metrics_page_holds_mosecs_families_and_ours(ask: Asker) -> None:
    ask.ok(one())
    page = ask.send("GET", "/metrics")
    assert page.headers["Content-Type"].startswith("text/plain")
    for family in ("pose_requests_total", "pose_detections_total", "pose_pass_requests_bucket", "pose_model_info"):
        assert f"\n{family}{{" in page.text, family
    assert "\nmosec_" in page.text
    assert "# EOF" not in page.text


def test_the_api_describes_itself_without_asking_another_host(ask: Asker) -> None:
    document = ask.send("GET", "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    routes = {POSE, FULL, SEG, "/api/v1/objects", "/api/v1/status", "/livez", "/readyz", "/metrics", "/v2/models/pem"}
    assert document["paths"].keys() >= routes
    page = ask.send("GET", "/docs")
    assert page.headers["Content-Type"].startswith("text/html")
    for foreign in ('src="http', "src='http", 'href="http', "url(http", "//cdn", "@import"):
        assert foreign not in page.text
    assert ask.send("GET", "/").headers["Location"] == "/docs"


# ------------------------------------------------------------------------------------------------- the second dialect


def coco(index: int = 1, score: float = 0.9, **more: Any) -> dict[str, Any]:
    return {"category_id": index, "score": score, "segmentation": tiny_question().masks[index], **more}


def seg(*items: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a request in the second dialect, for the wedge."""
    tree = one(detections=..., init_poses=..., objects=..., seg_data=list(items), object_id="wedge")
    tree.update(changes)
    return {key: value for key, value in tree.items() if value is not ...}


def test_the_second_dialect_answers_in_parallel_arrays_of_what_was_solved(ask: Asker, tiny: Question) -> None:
    empty = {"size": [HEIGHT, WIDTH], "counts": rle.encode_rle(np.zeros((HEIGHT, WIDTH), dtype=bool))["counts"]}
    items = [coco(score=0.2), coco(score=0.75, image_id=3), {"segmentation": empty, "score": 0.9}, coco(score=0.1)]
    answer = ask.ok(seg(*items, template_dir="templates/wedge"), route=SEG, as_json=True)
    assert answer["num_detections"] == 1
    assert answer["detections"] == [items[1]]
    assert [entry["index"] for entry in answer["rejected"]] == [0, 2, 3]
    assert [entry["code"] for entry in answer["rejected"]] == ["low_confidence", "mask_empty", "low_confidence"]
    assert answer["template_dir_used"] is None
    assert any("template_dir" in warning for warning in answer["warnings"])
    T_est = np.eye(4)
    T_est[:3, :3] = answer["pred_rot"][0]
    T_est[:3, 3] = np.array(answer["pred_trans"][0]) / 1000
    instance = tiny.scene.instances[1]
    assert max(pose_errors(T_est, instance.T_cam_obj, instance.shape.symmetries)) < 3
    row = ask.poses(tiny.body(indices=[1], refine="none"))[0]
    assert answer["pred_trans"][0] == row["translation"]
    assert answer["pose_scores"] == [pytest.approx(0.75 * row["confidence"])]
    assert answer.keys() >= {"cad_path_used", "output_dir_used", "inference_time", "error_message"}


def test_the_second_dialects_threshold_is_honoured_and_nothing_is_left_is_fine(ask: Asker) -> None:
    answer = ask.ok(seg(coco(score=0.95), det_score_thresh=0.95), route=SEG)
    assert (answer["num_detections"], answer["pred_rot"], len(answer["rejected"])) == (0, [], 1)
    assert ask.ok(seg(), route=SEG)["rejected"] == []


def test_the_second_dialect_takes_depth_as_bare_floats(ask: Asker, tiny: Question) -> None:
    bare = (tiny.scene.depth_raw.astype("<f4") * 0.1).tobytes()
    camera = {"cam_K": tiny.cam_params["cam_K"], "depth_scale": 1.0}
    for as_json in (True, False):
        answer = ask.ok(seg(coco(), depth_image=bare, cam_params=camera), route=SEG, as_json=as_json)
        assert answer["num_detections"] == 1
        T_est = np.eye(4)
        T_est[:3, 3] = np.array(answer["pred_trans"][0]) / 1000
        assert np.linalg.norm(T_est[:3, 3] - tiny.scene.instances[1].T_cam_obj[:3, 3]) < 0.003


def test_the_second_dialects_clients_first_ask_for_health(ask: Asker) -> None:
    health = ask.send("GET", "/api/v1/health").json()
    assert health["status"] == "healthy"
    assert health["model"] == {"loaded": True, "device": "cpu"}
    assert health["timestamp"] > 1.7e9


def test_the_second_dialect_fails_in_its_own_shape(ask: Asker) -> None:
    response = ask.post(seg(object_id="nobody"), route=SEG)
    answer = response.json()
    assert response.status_code == 404
    assert (answer["success"], answer["pred_rot"], answer["error"]["code"]) == (False, [], "unknown_object")


# --------------------------------------------------------------------------------------------------- the whole pipeline


def test_the_full_pipeline_asks_for_detections_and_answers_both(special: Special, tiny: Question) -> None:
    special.ism.asked.clear()
    tree = one(detections=..., init_poses=..., objects=..., object_id="wedge", refine="none")
    answer = special.ask.ok(
        tree | {"template_dir": "/ism/templates", "ism_cad_path": "/ism/wedge.ply"}, route=FULL, as_json=True
    )
    (asked,) = special.ism.asked
    assert asked["template_dir"] == "/ism/templates"
    assert asked["cad_path"] == "/ism/wedge.ply"
    assert base64.b64decode(asked["depth_image"]) == tiny.depth  # 16 bits, untouched
    detections = answer["detections"]
    assert len(answer["poses"]) == len(detections["masks"]) == len(detections["boxes"]) == 2
    overlaps = [
        [float((rle.decode_rle(mask) & instance.mask).sum() / instance.mask.sum()) for mask in detections["masks"]]
        for instance in tiny.scene.instances
    ]
    assert min(max(row) for row in overlaps) > 0.8
    for box, mask in zip(detections["boxes"], detections["masks"], strict=True):
        assert box == list(masks.mask_box(rle.decode_rle(mask)) or ())  # xywh
    assert answer["timing"]["ism_ms"] > 0
    right = answer["poses"][int(np.argmax(overlaps[1]))]
    assert right["object_id"] == 1
    assert max(tiny.errors(1, right)) < 5


def test_the_full_pipeline_understands_nested_lists_and_missing_columns(special: Special) -> None:
    tree = one(detections=..., init_poses=..., objects=..., object_id="wedge", refine="none", template_dir="t")
    for mode in ("nested", "masks_only"):
        special.ism.mode = mode
        try:
            answer = special.ask.ok(tree, route=FULL)
        finally:
            special.ism.mode = "good"
        assert len(answer["poses"]) == len(answer["detections"]["masks"]) == 2
        assert all(isinstance(mask["counts"], str) for mask in answer["detections"]["masks"])
        assert answer["detections"]["scores"] == ([0.9, 0.89] if mode == "nested" else [1.0, 1.0])
