"""From encoded pictures to crops."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from pem.rle import encode_rle
from posekit import crops
from posekit.engine import Instance
from posekit.io.images import encode_png
from posekit.sam6d.crops import NetworkInput, instance_input
from tests.workers.support import Asker
from workers.messages import Crop, Cut, Failure, MaskSpec, Part
from workers.stages.decode import DecodeStage
from workers.work import Work


def cut(decode: DecodeStage, part: Part) -> Cut:
    result = decode.forward(part)
    assert isinstance(result, Cut), result
    return result


def failure(decode: DecodeStage, part: Part) -> Failure:
    result = decode.forward(part)
    assert isinstance(result, Failure)
    return result


def only_crop(decode: DecodeStage, part: Part) -> Crop:
    [crop] = cut(decode, part).crops
    return crop


def pixels(crop: Crop) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    assert crop.rgb is not None
    assert crop.depth_m is not None
    assert crop.mask is not None
    return crop.rgb.unpack(), crop.depth_m.unpack(), crop.mask.unpack()


def test_a_crop_is_its_mask_with_a_margin_and_its_own_camera(decode: DecodeStage, asker: Asker) -> None:
    instance = asker.scene.instances[0]
    crop = only_crop(decode, asker.part(asker.job([instance.mask])))
    rgb, depth_m, mask = pixels(crop)
    left, top = asker.scene.K[0, 2] - crop.K[2], asker.scene.K[1, 2] - crop.K[5]
    window = (slice(round(top), round(top) + mask.shape[0]), slice(round(left), round(left) + mask.shape[1]))
    np.testing.assert_array_equal(rgb, asker.scene.rgb[window])
    np.testing.assert_allclose(depth_m, asker.scene.depth_m[window], rtol=1e-6)
    np.testing.assert_array_equal(mask, instance.mask[window])
    assert mask.sum() == instance.mask.sum()
    x, y, w, h = crop.bbox
    assert (x - left, y - top) == (mask.shape[1] - w - (x - left), mask.shape[0] - h - (y - top))  # even margins
    assert x - left >= 8
    assert crop.origin_px == (round(left), round(top))
    assert crop.image_size_px == (640, 480)


def test_a_part_holds_its_own_detections_in_order(decode: DecodeStage, asker: Asker) -> None:
    job = asker.job()
    assert len(job.detections) == 3
    assert [crop.index for crop in cut(decode, asker.part(job, start=0, stop=2, finish=False)).crops] == [0, 1]
    assert [crop.index for crop in cut(decode, asker.part(job, start=2, stop=3, finish=False)).crops] == [2]


def test_no_detections_give_no_crops_and_the_pictures_are_checked_all_the_same(
    decode: DecodeStage, asker: Asker
) -> None:
    assert cut(decode, asker.part(asker.job([]))).crops == []
    assert failure(decode, asker.part(asker.job([], rgb=b"nonsense"))).code == "bad_data"


def test_the_job_travels_on_only_where_something_is_drawn(decode: DecodeStage, asker: Asker) -> None:
    plain = cut(decode, asker.part(asker.job([])))
    assert (plain.part.finish, plain.part.job) == (False, b"")
    drawn = cut(decode, asker.part(asker.job([], visualize=True)))
    assert drawn.part.finish
    assert drawn.part.job


def test_a_job_comes_from_a_file_too(decode: DecodeStage, asker: Asker, tmp_path: Path) -> None:
    path = tmp_path / "job"
    path.write_bytes(msgspec.msgpack.encode(asker.job()))
    part = Part(part_id="r1/0", start=0, stop=3, path=str(path))
    assert len(cut(decode, part).crops) == 3
    path.unlink()
    assert failure(decode, part).code == "internal"


def test_the_seed_depends_on_the_decoded_content_alone(decode: DecodeStage, asker: Asker) -> None:
    masks = [instance.mask for instance in asker.scene.instances]
    alone = only_crop(decode, asker.part(asker.job([masks[1]])))
    otherwise_encoded = asker.job(
        request_id="another",
        rgb=encode_png(asker.scene.rgb, compression=9),
        detections=[MaskSpec(png=encode_png(masks[1]), object=0)],
    )
    assert only_crop(decode, asker.part(otherwise_encoded)).seed == alone.seed
    in_company = cut(decode, asker.part(asker.job(masks))).crops
    assert in_company[1].seed == alone.seed
    assert len({crop.seed for crop in in_company}) == 3
    assert only_crop(decode, asker.part(asker.job([masks[1]], seed=5))).seed == 5


def test_depth_in_metres_gives_the_same_crop(decode: DecodeStage, asker: Asker) -> None:
    mask = asker.scene.instances[0].mask
    done, tiff = cv2.imencode(".tiff", asker.scene.depth_m)
    assert done
    in_metres = only_crop(decode, asker.part(asker.job([mask], depth=tiff.tobytes(), depth_scale_mm=1000.0)))
    np.testing.assert_allclose(
        pixels(in_metres)[1], pixels(only_crop(decode, asker.part(asker.job([mask]))))[1], rtol=1e-5
    )


def test_bare_float_depth_is_read_by_its_size(decode: DecodeStage, asker: Asker) -> None:
    height, width = asker.scene.depth_raw.shape
    raw = (asker.scene.depth_m * 1000).astype("<f4").tobytes()
    job = asker.job([asker.scene.instances[0].mask], depth=raw, depth_height=height, depth_width=width)
    assert pixels(only_crop(decode, asker.part(job)))[1].max() > 0.1
    assert failure(decode, asker.part(msgspec.structs.replace(job, depth=raw[:-4]))).code == "invalid"


def test_a_float_tiff_without_a_scale_is_refused(decode: DecodeStage, asker: Asker) -> None:
    _, tiff = cv2.imencode(".tiff", asker.scene.depth_m)
    refused = failure(decode, asker.part(asker.job(depth=tiff.tobytes(), depth_scale_mm=None)))
    assert (refused.code, refused.field) == ("invalid", "cam_params.depth_scale")
    assert "must be given" in refused.detail
    assert len(cut(decode, asker.part(asker.job(depth_scale_mm=None))).crops) == 3  # a 16-bit PNG: 1.0


@pytest.mark.parametrize(
    "changes, kind, field",
    [
        ({"rgb": b"\x89PNG\r\n\x1a\nrubbish"}, "bad_data", "rgb_image"),
        ({"depth": b""}, "bad_data", "depth_image"),
        ({"depth": encode_png(np.zeros((480, 640), np.uint8))}, "invalid", "depth_image"),
        ({"depth": encode_png(np.zeros((100, 100), np.uint16))}, "invalid", "depth_image"),
        ({"max_megapixels": 0.1}, "too_large", "depth_image"),
        ({"max_mask_megapixels": 0.5}, "too_large", "detections.masks"),
        ({"detections": [MaskSpec(raw=b'{"size": [4, 4], "counts": "04L4"}')]}, "invalid", "detections.masks[0]"),
        ({"detections": [MaskSpec(raw=b"{")]}, "bad_data", "detections.masks[0]"),
        ({"deadline_unix": 1.0}, "deadline", None),
    ],
)  # fmt: skip
def test_what_spoils_a_request_is_a_failure_with_its_field(
    decode: DecodeStage, asker: Asker, changes: dict[str, Any], kind: str, field: str | None
) -> None:
    found = failure(decode, asker.part(asker.job(**changes)))
    assert (found.code, found.field) == (kind, field)
    assert found.part_id == "r1/0"


def test_garbage_instead_of_a_job_is_our_own_fault_in_words(
    decode: DecodeStage, capfd: pytest.CaptureFixture[str]
) -> None:
    assert failure(decode, Part(part_id="x", start=0, stop=1, job=b"garbage")).code == "internal"
    line = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert (line["event"], line["part_id"], line["level"]) == ("internal_error", "x", "error")
    assert "Traceback" in line["traceback"]


def test_detections_that_cannot_be_used_say_why(decode: DecodeStage, asker: Asker) -> None:
    scene = asker.scene
    mask = scene.instances[0].mask
    nothing = np.zeros_like(mask)
    few = nothing.copy()
    few[tuple(part[:20] for part in np.nonzero(mask & (scene.depth_raw > 0)))] = True
    blind = nothing.copy()
    blind[np.nonzero(scene.depth_raw == 0)] = True
    assert blind.any()
    job = asker.job([mask, nothing, few, blind])
    unknown = MaskSpec(raw=json.dumps(encode_rle(mask)).encode(), bbox=(1.0, 2.0, 3.0, 4.0), category="mug")
    job = msgspec.structs.replace(job, detections=[*job.detections, unknown])
    crops = cut(decode, asker.part(job)).crops
    assert [crop.rejected and crop.rejected[0] for crop in crops] == [
        None, "mask_empty", "mask_too_small", "no_depth", "no_cad",
    ]  # fmt: skip
    assert crops[2].rejected == ("mask_too_small", "20 valid depth pixels under the mask, more than 32 needed")
    assert crops[1].bbox == (0, 0, 0, 0)
    assert (crops[4].bbox, crops[4].category, crops[4].object_id) == ((1, 2, 3, 4), "mug", None)


def test_depth_in_the_wrong_unit_is_refused_with_advice(decode: DecodeStage, asker: Asker) -> None:
    refused = failure(decode, asker.part(asker.job(depth_scale_mm=0.001)))
    assert (refused.code, refused.field) == ("units", "cam_params.depth_scale")
    assert "1000" in refused.detail


def test_one_odd_row_among_good_ones_is_its_own_matter_in_every_part(decode: DecodeStage, asker: Asker) -> None:
    masks = [instance.mask for instance in asker.scene.instances]
    job = asker.job(masks)
    tiny = msgspec.structs.replace(asker.reference, diameter_mm=asker.reference.diameter_mm / 1000)
    odd = msgspec.structs.replace(job.detections[2], object=1)
    job = msgspec.structs.replace(job, objects=[asker.reference, tiny], detections=[*job.detections[:2], odd])
    whole = cut(decode, asker.part(job)).crops
    assert [crop.rejected and crop.rejected[0] for crop in whole] == [None, None, "units"]
    [last] = cut(decode, asker.part(job, start=2, stop=3)).crops
    assert last.rejected == whole[2].rejected
    assert [c.rejected for c in cut(decode, asker.part(job, start=0, stop=2)).crops] == [None, None]


def test_a_principal_point_outside_of_the_image_is_a_warning_of_the_first_part(
    decode: DecodeStage, asker: Asker
) -> None:
    K = list(asker.job().K)
    K[2] = 2000.0
    job = asker.job(K=tuple(K))
    [warning] = [text for text in cut(decode, asker.part(job)).warnings if "principal point" in text]
    assert "2000" in warning
    assert cut(decode, asker.part(job, start=1, stop=2)).warnings == []


def test_a_huge_crop_is_thinned_out_and_its_camera_follows(
    decode: DecodeStage, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = asker.scene.instances[0].mask
    fine = only_crop(decode, asker.part(asker.job([mask])))
    monkeypatch.setattr(crops, "CROP_PIXELS", 2000)
    coarse = only_crop(decode, asker.part(asker.job([mask])))
    step = round(fine.K[0] / coarse.K[0])
    assert step > 1
    for thin, whole in zip(pixels(coarse), pixels(fine), strict=True):
        np.testing.assert_array_equal(thin, whole[::step, ::step])
    assert coarse.K[2] == pytest.approx(fine.K[2] / step)


def test_a_thinned_crop_lies_in_the_image_thinned_out_the_same_way(
    decode: DecodeStage, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crops, "CROP_PIXELS", 2000)
    crop = only_crop(decode, asker.part(asker.job([asker.scene.instances[0].mask])))
    rgb, K = pixels(crop)[0], np.reshape(crop.K, (3, 3))
    assert crop.image_size_px is not None
    (left, top), (width, height) = crop.origin_px, crop.image_size_px
    step = round(asker.scene.K[0, 0] / K[0, 0])
    # The middle of the camera in the thinned image tells which of its columns and rows were kept.
    columns, rows = (round(asker.scene.K[i, 2] - step * (K[i, 2] + crop.origin_px[i])) for i in (0, 1))
    assert step > 1
    assert {columns, rows} <= set(range(step))
    thinned = asker.scene.rgb[rows::step, columns::step]
    assert thinned.shape == (height, width, 3)
    np.testing.assert_array_equal(rgb, thinned[top : top + rgb.shape[0], left : left + rgb.shape[1]])


@pytest.mark.parametrize("window", [np.s_[:, :60], np.s_[440:, :], np.s_[200:210, 100:600], np.s_[:, 330:360]])
def test_the_network_sees_a_crop_as_it_would_see_the_whole_image(
    decode: DecodeStage, asker: Asker, window: tuple[slice, slice]
) -> None:
    scene = asker.scene
    mask = np.zeros((480, 640), dtype=np.bool_)
    mask[window] = True
    large = msgspec.structs.replace(asker.reference, diameter_mm=500.0, middle_mm=None)  # as large as such a mask
    made = cut(decode, asker.part(asker.job([mask], objects=[large])))
    travelled = msgspec.msgpack.decode(decode.serialize_ipc(made), type=Cut | Failure)
    [item] = Work(travelled).items("geometric")
    whole = Instance(object_id="", rgb=scene.rgb, depth_m=scene.depth_m, mask=mask, K=scene.K, seed=0)
    expected, of_crop = (instance_input(one, 0.2, np.random.default_rng(0)) for one in (whole, item.instance()))
    assert isinstance(expected, NetworkInput)
    assert isinstance(of_crop, NetworkInput)
    np.testing.assert_array_equal(of_crop.rgb, expected.rgb)
    np.testing.assert_array_equal(of_crop.choose, expected.choose)
    np.testing.assert_allclose(of_crop.points_m, expected.points_m, atol=1e-6)


def test_a_pose_to_start_from_arrives_in_metres(decode: DecodeStage, asker: Asker) -> None:
    job = asker.job([asker.scene.instances[0].mask])
    start = np.eye(4)
    start[:3, 3] = (10, 20, 800)
    spec = msgspec.structs.replace(job.detections[0], init_T_cam_obj_mm=start.ravel().tolist())
    crop = only_crop(decode, asker.part(msgspec.structs.replace(job, detections=[spec])))
    assert crop.init_T_cam_obj is not None
    np.testing.assert_allclose(np.reshape(crop.init_T_cam_obj, (4, 4))[:3, 3], (0.01, 0.02, 0.8))


def test_a_cut_survives_the_way_to_the_next_stage(decode: DecodeStage, asker: Asker) -> None:
    made = cut(decode, asker.part())
    back = msgspec.msgpack.decode(decode.serialize_ipc(made), type=Cut | Failure)
    assert isinstance(back, Cut)
    for before, after in zip(made.crops, back.crops, strict=True):
        for a, b in zip(pixels(before), pixels(after), strict=True):
            np.testing.assert_array_equal(a, b)
    assert time.time() - back.sent_unix < 60
