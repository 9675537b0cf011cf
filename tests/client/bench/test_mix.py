"""The questions of a mix, read as a server reads them."""

from __future__ import annotations

import base64
from email import message_from_bytes
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pem import rle
from pem.bench.mix import Load, Mix, prepare, read_request
from pem.bench.sample import Question
from posekit.io import images

SMALL = (240, 180)


@pytest.fixture(scope="module")
def load() -> Load:
    """Make every combination of two numbers of masks and three formats, twice, in small pictures of few objects."""
    return prepare(Mix(masks=(1, 9), sizes=(SMALL,), formats=("msgpack", "json", "multipart"), scenes=2, objects=3))


def tree(question: Question) -> dict[str, Any]:
    """Return the request as MessagePack would hold it."""
    if question.content_type == "application/msgpack":
        return dict(msgspec.msgpack.decode(question.body))
    if question.content_type == "application/json":
        found = dict(msgspec.json.decode(question.body))
        pictures = {name: base64.b64decode(found[name]) for name in ("rgb_image", "depth_image")}
        return {**found, **pictures}
    form = message_from_bytes(b"Content-Type: " + question.content_type.encode() + b"\r\n\r\n" + question.body)
    parts = {
        part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in form.walk()
    }
    return {**msgspec.json.decode(parts["request"]), "rgb_image": parts["rgb"], "depth_image": parts["depth"]}


def test_every_combination_is_asked_equally_often(load):
    assert [question.name for question in load.questions] == 2 * [
        f"{masks}, 240x180, {format_}"
        for masks in ("1 mask", "9 masks")
        for format_ in ("msgpack", "json", "multipart")
    ]


def test_all_formats_carry_the_same_request(load):
    for masks in range(2):
        one, *others = (tree(question) for question in load.questions[3 * masks : 3 * masks + 3])
        assert images.decode_color(one["rgb_image"], 1.0).shape == (*SMALL[::-1], 3)
        assert images.decode_depth(one["depth_image"], 1.0).shape == SMALL[::-1]
        assert others == [one, one]


def test_masks_come_with_their_objects_and_truths(load):
    for question in load.questions:
        detections = tree(question)["detections"]
        assert len(detections["masks"]) == len(question.truths) == int(question.name.split()[0])
        assert detections["object_ids"] == [truth.object_name for truth in question.truths]
        assert set(tree(question)["objects"]) == set(detections["object_ids"]) <= set(load.objects)
        K = np.reshape(tree(question)["cam_params"]["cam_K"], (3, 3))
        for mask, truth in zip(detections["masks"], question.truths, strict=True):
            rows, columns = np.nonzero(rle.decode_rle(mask))
            seen_at = K @ truth.T_cam_obj[:3, 3]
            assert abs(seen_at[0] / seen_at[2] - columns.mean()) < 30
            assert abs(seen_at[1] / seen_at[2] - rows.mean()) < 30


def test_more_masks_than_there_are_objects_are_the_same_again(load):
    masks = [mask["counts"] for mask in tree(load.questions[3])["detections"]["masks"]]
    different = list(dict.fromkeys(masks))
    assert len(different) < 9
    assert masks == (different * 9)[:9]


def test_objects_are_files_that_a_server_takes(load):
    assert 1 <= len(load.objects) <= 3
    assert all(ply.startswith(b"ply\n") for ply in load.objects.values())


def test_the_same_mix_is_the_same_load_and_another_seed_is_not(load):
    mix = Mix(masks=(1,), sizes=(SMALL,), scenes=1, objects=3)
    assert prepare(mix).questions[0].body == load.questions[0].body
    assert (
        prepare(Mix(masks=(1,), sizes=(SMALL,), scenes=1, objects=3, seed=1)).questions[0].body
        != load.questions[0].body
    )


def test_engine_and_deadline_are_asked_for_only_where_they_are_given():
    mix = Mix(masks=(1,), sizes=(SMALL,), scenes=1, engine="geometric", deadline_ms=900)
    asked = tree(prepare(mix).questions[0])
    assert (asked["engine"], asked["deadline_ms"]) == ("geometric", 900)


@pytest.mark.parametrize(
    "wrong, why",
    [
        ({"masks": ()}, "at least one number of masks"),
        ({"masks": (0,)}, "1 to 1000, not 0"),
        ({"sizes": ((640, 10),)}, "64 to 8192 pixels"),
        ({"formats": ("xml",)}, "no format xml; there are msgpack, json, multipart"),
        ({"scenes": 0}, "one scene"),
        ({"objects": 0}, "at least one object"),
    ],
)
def test_a_mix_that_cannot_be_asked_is_refused(wrong, why):
    with pytest.raises(ValueError, match=why):
        Mix(**wrong)


@pytest.mark.parametrize("ending, encode", [("json", msgspec.json.encode), ("msgpack", msgspec.msgpack.encode)])
@pytest.mark.parametrize("detections", [{"masks": [[[1]], [[0]]]}, [{"segmentation": [[1]]}, {"segmentation": [[0]]}]])
def test_a_ready_request_is_sent_as_it_is(tmp_path: Path, ending, encode, detections):
    path = tmp_path / f"mine.{ending}"
    path.write_bytes(encode({"detections": detections}))
    question = read_request(path)
    assert question.body == path.read_bytes()
    assert question.content_type == f"application/{ending}"
    assert question.name == f"mine.{ending}, 2 masks"
    assert [truth.T_cam_obj for truth in question.truths] == [None, None]


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("mine.txt", b"{}", r"a \.json or a \.msgpack file"),
        ("mine.json", b"{", "does not decode"),
        ("mine.msgpack", b"\xc1", "does not decode"),
        ("mine.json", b'{"rgb_image": ""}', "no detections"),
        ("mine.json", b"[]", "no detections"),
    ],
)
def test_a_file_that_is_no_request_is_refused(tmp_path: Path, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=why):
        read_request(tmp_path / name)
