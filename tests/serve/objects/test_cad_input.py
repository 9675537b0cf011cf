"""Unusual CAD files, and uploads whose senders leave."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.running import ANSWER_S, RunningServer, wait_until
from tests.serve.special import Special
from tests.serve.tiny import FACES, OBJECTS, Asker, ascii_ply, one, ply, refusal, tetrahedron, uploading

MIRROR = [1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, -1, 0, 0, 0, 0, 1]
INVERSION = [-1.0, 0, 0, 0, 0, -1, 0, 0, 0, 0, -1, 0, 0, 0, 0, 1]
SKEW = [1.0, 0, 0, 0, 0, 1, 0.1, 0, 0, 0, 1, 0, 0, 0, 0, 1]
NOT_AFFINE = [1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("matrix", [MIRROR, INVERSION, SKEW, NOT_AFFINE])
def test_a_symmetry_that_no_turn_can_make_is_422(ask: Asker, matrix: list[float]) -> None:
    half_turn = [-1.0, 0, 0, 0, 0, -1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    answer = ask.upload(ascii_ply(tetrahedron(57)), symmetries_discrete=[half_turn, matrix])
    refusal(answer, 422, "invalid", "symmetries_discrete[1]")


@pytest.mark.parametrize("blank", [b"\n", b" ", b"\t \n", b"\r\n", b"mtllib \n", b"mtllib\t"])
def test_an_obj_of_blank_lines_is_read_quickly(ask: Asker, server: RunningServer, blank: bytes) -> None:
    path = server.data / "cad" / "blank.obj"
    path.write_bytes(blank * (60_000 // len(blank)))
    patient = one(objects=..., cad_path="blank.obj", deadline_ms=50_000)  # what looks back from each line takes longer
    ask.refused(patient, 400, "bad_data", "cad_path")
    path.unlink()


def test_an_obj_may_begin_with_blank_lines(ask: Asker, server: RunningServer) -> None:
    corners = "".join(f"v {x} {y} {z}\n" for x, y, z in tetrahedron(58))
    faces = "".join(f"f {a + 1} {b + 1} {c + 1}\n" for a, b, c in FACES)
    path = server.data / "cad" / "blank.obj"
    path.write_text("\n" * 20_000 + corners + faces)
    (row,) = ask.poses(one(objects=..., cad_path="blank.obj", init_poses=...))
    ask.send("DELETE", f"{OBJECTS}/{row['cad_id']}")
    path.unlink()


def test_uploads_whose_clients_go_away_hold_nothing(special: Special) -> None:
    ask, server = special.ask, special.server
    before = ask.send("GET", OBJECTS).json()["objects"]

    def added() -> list[dict[str, Any]]:
        known = {entry["object_id"] for entry in before}
        return [e for e in ask.send("GET", OBJECTS).json()["objects"] if e["object_id"] not in known]

    for index in range(2):  # the limit of six requests would be passed if any of them counted on
        held = [
            uploading(server.port, ascii_ply(tetrahedron(30 + index))),
            uploading(server.port, b"no mesh"),
            uploading(server.port, ply(0), send=500),
            uploading(server.port, bytes(300_000), send=200_000),
        ]
        wait_until(lambda seen=index + 1: len(added()) == seen, ANSWER_S, "the whole one has arrived")
        for connection in held:
            connection.close()
        assert ask.send("GET", "/livez").status_code == 200  # by now the server has heard of that
    wait_until(lambda: ask.post(one()).status_code == 200, ANSWER_S, "requests are taken again")
    held = [uploading(server.port, ply(0), send=500) for _ in range(5)]
    time.sleep(0.1)
    assert ask.post(one()).status_code == 200, "all but these five places are free"
    for connection in held:
        connection.close()
    wait_until(lambda: [entry["status"] for entry in added()] == ["ready"] * 2, 120, "whole ones are onboarded")
    store = server.data / "objects"
    wait_until(lambda: not [*store.rglob("upload")], ANSWER_S, "what was half sent is removed")
    assert ask.send("GET", "/api/v1/status").json()["queue"] == {"requests": 0, "detections": 0}
    for entry in added():
        assert ask.send("DELETE", f"{OBJECTS}/{entry['object_id']}").status_code == 204
