"""Answers as Python and a notebook show them."""

from __future__ import annotations

import re
from base64 import b64decode
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from pem import imagefiles
from pem.poses import PoseResult, pose_result, rotation_vector_deg

TURNED = {"rotation": [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], "translation": [1.25, -2.0, 544.06]}
ROW = {"object_id": None, "cad_id": "9f", "status": "ok", "confidence": 0.976, "bbox": [1, 2, 3, 4], **TURNED}
NONE = {"rotation": None, "translation": None, "status": "rejected", "confidence": 0.0}
WHY = {"code": "mask_too_small", "detail": "12 pixels are < 64 & too few"}


def result(*rows: dict[str, Any], name: str | None = None, **more: Any) -> PoseResult:
    answer = {"success": True, "engine": "geometric", "poses": rows, **more}
    headers = {"content-type": "application/msgpack"}
    return pose_result(httpx.Response(200, content=msgspec.msgpack.encode(answer), headers=headers), lambda _: name)


def cells(html: str) -> list[list[str]]:
    return [re.findall("<t[dh]>(.*?)</t[dh]>", row) for row in re.findall("<tr>(.*?)</tr>", html)]


def test_a_result_is_a_table_with_a_row_for_each_detection() -> None:
    shown = result(ROW, {**ROW, "ambiguous": True}, {**ROW, **NONE, "error": WHY}, name="mug")
    assert cells(shown._repr_html_()) == [
        ["#", "object", "t (mm)", "rotation vector (deg)", "confidence", "status"],
        ["0", "mug", "1.2 -2.0 544.1", "0.0 0.0 90.0", "0.98", "ok"],
        ["1", "mug", "1.2 -2.0 544.1", "0.0 0.0 90.0", "0.98", "ok (ambiguous)"],
        ["2", "mug", "-", "-", "0.00", "mask_too_small: 12 pixels are &lt; 64 &amp; too few"],
    ]


def test_a_pose_is_a_table_of_its_own() -> None:
    (pose,) = result({**ROW, "object_id": 5}).poses
    assert cells(pose._repr_html_())[1][:2] == ["0", "5"]
    (unnamed,) = result(ROW).poses
    assert cells(unnamed._repr_html_())[1][1] == "-"


def test_an_empty_result_is_an_empty_table() -> None:
    assert len(cells(result()._repr_html_())) == 1


def test_nothing_of_the_answer_becomes_markup() -> None:
    evil = "<img src=x onerror=alert(1)>"
    error = {"code": "no_cad", "detail": evil}
    html = result({**ROW, "object_id": evil}, {**ROW, **NONE, "error": error}, name=evil)._repr_html_()
    assert "<img" not in html


def test_the_overlay_that_was_asked_for_is_in_the_page() -> None:
    png = imagefiles.write_png(np.zeros((4, 6, 3), np.uint8))
    html = result(ROW, visualization=png)._repr_html_()
    found = re.search(r'<img alt="overlay" src="data:image/png;base64,([A-Za-z0-9+/=]+)">', html)
    assert found is not None
    assert b64decode(found[1]) == png
    assert "<img" not in result(ROW)._repr_html_()


def test_the_object_is_what_was_asked_for_and_the_category_stays_beside_it() -> None:
    (pose,) = result({**ROW, "object_id": 5}, name="mug").poses
    assert (pose.object, pose.object_id, pose.cad_id) == ("mug", 5, "9f")
    assert repr(pose).startswith("Pose(ok, object='mug', ")
    (unnamed,) = result({**ROW, "object_id": 5}).poses
    assert unnamed.object is None
    assert repr(unnamed).startswith("Pose(ok, object=5, ")


@pytest.mark.parametrize("vector", [[0, 0, 0], [10, -20, 30], [180, 0, 0], [0, 120, 127], [1e-4, 0, 0]], ids=str)
def test_a_rotation_vector_is_read_off_any_rotation(vector: list[float]) -> None:
    R = Rotation.from_rotvec(vector, degrees=True).as_matrix()
    found = rotation_vector_deg(R)
    np.testing.assert_allclose(Rotation.from_rotvec(found, degrees=True).as_matrix(), R, atol=1e-7)
    assert np.linalg.norm(found) <= 180.0 + 1e-6
