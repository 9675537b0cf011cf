"""Mistakes of clients, through the real port: every row of the contract's failure table and more.

Each refusal is checked for its status, code and field, and by `Asker` for what no answer may ever tell.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import itertools
import json
import math
import os
import socket
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from pem import rle
from posekit.io import images
from serve.gateway import keys
from tests.running import ANSWER_S, Question, RunningServer, wait_until
from tests.serve.special import BODY_IDLE_S, Special
from tests.serve.tiny import (
    FULL,
    HEIGHT,
    OBJECTS,
    POSE,
    SEG,
    WIDTH,
    Asker,
    ascii_ply,
    masks_of,
    one,
    ply,
    refusal,
    tetrahedron,
    tiny_question,
    tiny_scene,
    truth,
)

JSON = {"Content-Type": "application/json"}
MSGPACK = {"Content-Type": "application/msgpack"}
K = [170.0, 0, 79.5, 0, 170.0, 59.5, 0, 0, 1]


@pytest.fixture(autouse=True, scope="module")
def the_server_is_unharmed(ask: Asker) -> Iterator[None]:
    """Check that after all tests here the same workers still answer."""
    before = ask.send("GET", "/api/v1/status").json()["tracks"]["production"]
    yield
    assert ask.poses(one())[0]["status"] == "ok"
    after = ask.send("GET", "/api/v1/status").json()["tracks"]["production"]
    assert after["restarts"] == before["restarts"]


def camera(**changes: Any) -> dict[str, Any]:
    return {"cam_params": {"cam_K": K, "depth_scale": 0.1} | changes}


def png(width: int, height: int, pixels: bytes, *, bits: int = 8, kind: int = 2) -> bytes:
    """Write a PNG by hand, whose header may say anything."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels, 1)) + chunk(b"IEND", b"")
    )


# --------------------------------------------------------------------------------------------------------- 400: bodies

BROKEN_BODIES: dict[str, tuple[dict[str, str], bytes]] = {
    "empty": (JSON, b""),
    "empty MessagePack": (MSGPACK, b""),
    "no JSON": (JSON, b"hello"),
    "JSON cut short": (JSON, msgspec.json.encode(one())[:-30]),
    "JSON with something behind it": (JSON, msgspec.json.encode(one()) + b"x"),
    "invalid UTF-8": (JSON, b'{"object_id": "\xff\xfe"}'),
    "very deep JSON": (JSON, b'{"detections": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "no MessagePack": (MSGPACK, b"\xc1\xc1\xc1"),
    "MessagePack cut short": (MSGPACK, msgspec.msgpack.encode(one())[:-3]),
    "no multipart": ({"Content-Type": "multipart/form-data; boundary=x"}, b"hello"),
    "multipart cut short": (
        {"Content-Type": "multipart/form-data; boundary=x"},
        b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n{"a"',
    ),
    "a part twice": (
        {"Content-Type": "multipart/form-data; boundary=x"},
        b'--x\r\nContent-Disposition: form-data; name="rgb"\r\n\r\n1\r\n' * 2 + b"--x--\r\n",
    ),
    "a part without a name": (
        {"Content-Type": "multipart/form-data; boundary=x"},
        b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n",
    ),
    "no gzip": (JSON | {"Content-Encoding": "gzip"}, b"hello"),
    "gzip cut short": (JSON | {"Content-Encoding": "gzip"}, gzip.compress(msgspec.json.encode(one()))[:-20]),
}


@pytest.mark.parametrize("name", BROKEN_BODIES)
def test_a_body_that_does_not_parse_is_400(ask: Asker, name: str) -> None:
    headers, body = BROKEN_BODIES[name]
    refusal(ask.send("POST", POSE, content=body, headers=headers), 400, "bad_body")


def test_very_deep_messagepack_is_refused_and_not_a_crash(ask: Asker) -> None:
    deep = b"\x91" * 50_000 + b"\x90"
    body = msgspec.msgpack.encode(one(detections=msgspec.Raw(deep), init_poses=...))
    assert ask.send("POST", POSE, content=body, headers=MSGPACK).status_code in (400, 422)
    body = msgspec.msgpack.encode(one(detections={"masks": [msgspec.Raw(deep)]}, init_poses=...))
    assert ask.send("POST", POSE, content=body, headers=MSGPACK).status_code in (400, 422)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_nan_in_json_is_400_and_the_words_say_so(ask: Asker, word: str) -> None:
    text = json.dumps({"object_id": "wedge", "min_score": 0.5}).replace("0.5", word)
    error = refusal(ask.send("POST", POSE, content=text, headers=JSON), 400, "bad_body")
    assert "are not JSON" in error["detail"]
    tree = msgspec.json.encode(one(output_dir="NaN/Infinity"))[:-1]  # cut short, and without either as a number
    error = refusal(ask.send("POST", POSE, content=tree, headers=JSON), 400, "bad_body")
    assert "are not JSON" not in error["detail"]


@pytest.mark.parametrize("field", ["rgb_image", "depth_image", "cad"])
def test_broken_base64_is_400_with_its_field(ask: Asker, field: str) -> None:
    tree = one(objects=..., cad=ply(), cad_format="ply")
    text = msgspec.json.decode(msgspec.json.encode(tree))
    text[field] = "%%% no base64 %%%"
    refusal(ask.send("POST", POSE, content=json.dumps(text), headers=JSON), 400, "bad_body", field)


# --------------------------------------------------------------------------------------- 400: pictures, masks, meshes


def flipped(data: bytes, at: int, bit: int = 3) -> bytes:
    broken = bytearray(data)
    broken[at] ^= 1 << bit
    return bytes(broken)


@pytest.mark.parametrize("field", ["rgb_image", "depth_image"])
def test_a_broken_picture_is_400_with_its_field(ask: Asker, field: str) -> None:
    good = one()[field]
    broken = {
        "empty": b"",
        "text": b"this is no picture",
        "cut short": good[: len(good) // 2],
        "without its end": good[:-12],
        "a bit of its pixels flipped": flipped(good, len(good) // 2),
        "a bit of a checksum flipped": flipped(good, len(good) - 14),
        "a bit of its size flipped": flipped(good, 19),
        "only a signature": good[:8],
    }
    for name, data in broken.items():
        error = ask.refused(one(**{field: data}), 400, "bad_data", field)
        assert error["detail"], name


def test_any_flipped_bit_of_a_png_is_found_or_harmless(ask: Asker) -> None:
    good = one()["depth_image"]
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(good), 12):
        response = ask.post(one(depth_image=flipped(good, int(at), int(at) % 8)))
        assert response.status_code in (400, 413, 422), int(at)


def test_a_broken_jpeg_or_tiff_is_400(ask: Asker) -> None:
    scene = tiny_scene()
    jpeg = cv2.imencode(".jpg", scene.rgb)[1].tobytes()
    ask.refused(one(rgb_image=jpeg[: len(jpeg) // 2]), 400, "bad_data", "rgb_image")
    tiff = cv2.imencode(".tiff", scene.depth_m)[1].tobytes()
    ask.refused(one(depth_image=tiff[:200]), 400, "bad_data", "depth_image")


BROKEN_MASKS: dict[str, Any] = {
    "no base64": "%%%",
    "base64 of no PNG": base64.b64encode(b"hello there").decode(),
    "a PNG cut short": base64.b64encode(images.encode_png(tiny_scene().instances[1].mask)[:-30]).decode(),
}


@pytest.mark.parametrize("name", BROKEN_MASKS)
def test_a_broken_mask_is_400_with_its_place(ask: Asker, name: str) -> None:
    tree = one(detections=masks_of(tiny_question().masks[1], BROKEN_MASKS[name]), init_poses=...)
    ask.refused(tree, 400, "bad_data", "detections.masks[1]")
    items = [{"segmentation": mask} for mask in tree["detections"]["masks"]]
    ask.refused(one(detections=items, init_poses=...), 400, "bad_data", "detections[1].segmentation")
    tree = one(detections=..., init_poses=..., seg_data=[{"segmentation": items[1]["segmentation"]}])
    ask.refused(tree, 400, "bad_data", "seg_data[0].segmentation", route=SEG)


BROKEN_MESHES: dict[str, tuple[str, bytes]] = {
    "no bytes": ("ply", b""),
    "no mesh": ("ply", b"hello"),
    "cut short": ("ply", ply()[:5000]),
    "an index out of range": ("ply", ascii_ply(tetrahedron(), [(0, 1, 9)])),
    "the wrong format": ("stl", ply()),
    "a broken zip": ("zip", b"PK\x03\x04 nothing"),
    "a GLB of another kind": ("glb", b"glTF" + struct.pack("<II", 2, 12)),
    "an OBJ of nonsense": ("obj", b"f 1 2 3\n"),
}


@pytest.mark.parametrize("name", BROKEN_MESHES)
def test_a_broken_mesh_is_400_inline_and_uploaded(ask: Asker, name: str) -> None:
    cad_format, data = BROKEN_MESHES[name]
    ask.refused(one(objects=..., cad=data, cad_format=cad_format), 400, "bad_data", "cad")
    refusal(ask.upload(data, f"part.{cad_format}"), 400, "bad_data", "file")


WRONG_MESHES: dict[str, bytes] = {
    "without faces": ascii_ply(tetrahedron(), []),
    "with NaN": ascii_ply([[0, 0, 0], [60, 0, 0], [0, 60, 0], ["nan", 0, 60]]),
    "with infinity": ascii_ply([[0, 0, 0], [60, 0, 0], [0, 60, 0], ["inf", 0, 60]]),
    "without area": ascii_ply([[0, 0, 0], [60, 0, 0], [30, 0, 0], [10, 0, 0]]),
}


@pytest.mark.parametrize("name", WRONG_MESHES)
def test_a_mesh_that_is_none_is_422_inline_and_uploaded(ask: Asker, server: RunningServer, name: str) -> None:
    data = WRONG_MESHES[name]
    ask.refused(one(objects=..., cad=data, cad_format="ply"), 422, "invalid", "cad")
    refusal(ask.upload(data), 422, "invalid", "file")
    path = server.data / "cad" / "wrong.ply"
    path.write_bytes(data)
    tree = one(objects={"wedge": {"cad_path": "wrong.ply"}})
    ask.refused(tree, 422, "invalid", "objects.wedge.cad_path")


# ------------------------------------------------------------------------------------------------- 401, 403, 429: keys


@pytest.fixture
def locked(special: Special) -> Iterator[dict[str, str]]:
    """Give the special server two keys during the test: one unlimited, one of two requests a second."""
    path = special.server.data / "keys.json"
    yield {"robot": keys.add(path, "robot"), "slow": keys.add(path, "slow", rate=2.0)}
    path.unlink()


def test_keys_are_asked_for_where_there_are_any(special: Special, locked: dict[str, str]) -> None:
    ask = special.ask
    for path in ("/api/v1/status", "/api/v1/objects", "/openapi.json", "/metrics", "/v2/models/pem"):
        answer = ask.send("GET", path)
        refusal(answer, 401, "key_missing")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        refusal(ask.send("GET", path, headers={"X-API-Key": "pem_guess"}), 403, "key_wrong")
        assert ask.send("GET", path, headers={"X-API-Key": locked["robot"]}).status_code == 200
    for path in ("/livez", "/readyz"):
        assert ask.send("GET", path).status_code == 200
    ask.refused(one(), 401, "key_missing")
    ask.refused(one(), 403, "key_wrong", headers={"Authorization": "Bearer guess"})
    ask.refused(one(), 401, "key_missing", headers={"Authorization": "Basic dXNlcjpwdw=="})
    assert ask.poses(one(), headers={"Authorization": f"Bearer {locked['robot']}"})[0]["status"] == "ok"
    log = special.server.log()
    assert "pem_guess" not in log
    assert locked["robot"] not in log


def test_a_keys_rate_is_its_own(special: Special, locked: dict[str, str]) -> None:
    slow = {"X-API-Key": locked["slow"]}
    answers = [special.ask.post(one(object_id="nobody", objects=...), headers=slow) for _ in range(4)]
    codes = [answer.json()["error"]["code"] for answer in answers]
    assert codes[:2] == ["unknown_object"] * 2
    assert "rate_limited" in codes
    refused = answers[codes.index("rate_limited")]
    refusal(refused, 429, "rate_limited")
    assert special.ask.send("GET", "/api/v1/status", headers=slow).status_code == 200
    other = {"X-API-Key": locked["robot"]}
    refusal(special.ask.post(one(object_id="nobody", objects=...), headers=other), 404, "unknown_object")


def test_a_broken_key_file_closes_the_door(special: Special, locked: dict[str, str]) -> None:
    (special.server.data / "keys.json").write_text("{ broken")
    refusal(special.ask.send("GET", "/api/v1/status", headers={"X-API-Key": locked["robot"]}), 503, "not_ready")
    assert special.ask.send("GET", "/livez").status_code == 200


# ------------------------------------------------------------------------------------------------------- 404, 405, 415


@pytest.mark.parametrize("path", ["/api/v1/nothing", "/api", "/inference", "/v2/models/other", "/livez/"])
def test_an_unknown_route_is_404(ask: Asker, path: str) -> None:
    refusal(ask.send("GET", path), 404, "not_found")


def test_an_unknown_object_is_404_with_its_field(ask: Asker) -> None:
    ask.refused(one(objects=..., object_id="nobody"), 404, "unknown_object", "object_id")
    tree = one(objects={"wedge": {"object_id": "f" * 64}})
    ask.refused(tree, 404, "unknown_object", "objects.wedge.object_id")
    for method in ("GET", "DELETE"):
        for name in ("nobody", "f" * 64, "..%2f..%2fetc", "x" * 5000, ""):
            refusal(ask.send(method, f"{OBJECTS}/{name}"), 404, "unknown_object")


def test_a_cad_file_that_is_not_there_is_404(ask: Asker) -> None:
    ask.refused(one(objects=..., cad_path="nothing/here.ply"), 404, "no_cad_file", "cad_path")


@pytest.mark.parametrize(
    "method, path, allowed",
    [
        ("GET", POSE, "POST"),
        ("PUT", OBJECTS, "GET, POST"),
        ("POST", "/livez", "GET"),
        ("PATCH", f"{OBJECTS}/wedge", "GET, DELETE"),
        ("DELETE", "/api/v1/status", "GET"),
    ],
)
def test_a_wrong_method_is_405_and_says_which_are_right(ask: Asker, method: str, path: str, allowed: str) -> None:
    answer = ask.send(method, path)
    refusal(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == allowed


def test_an_unsupported_media_type_or_encoding_is_415(ask: Asker) -> None:
    body = msgspec.json.encode(one())
    for headers in (
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "nonsense"},
        {"Content-Type": "multipart/form-data"},
        {"Content-Type": "multipart/mixed; boundary=x"},
        {},
        JSON | {"Content-Encoding": "br"},
        JSON | {"Content-Encoding": "gzip, gzip"},
    ):
        refusal(ask.send("POST", POSE, content=body, headers=headers), 415, "unsupported_media_type")
    refusal(ask.send("POST", OBJECTS, content=body, headers=JSON), 415, "unsupported_media_type")


# ------------------------------------------------------------------------------------------------------------ 408, 429


def half_sent(server: RunningServer, length: int, body: bytes, more: str = "") -> socket.socket:
    """Open a connection, announce `length` bytes and send `body`; `more`: other lines of the head."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    head = (
        f"POST {POSE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{more}Content-Length: {length}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def answered(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Return status and body of the answer, once the server has closed the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_a_body_that_stops_coming_is_408_and_the_connection_ends(special: Special) -> None:
    begun = time.monotonic()
    with half_sent(special.server, 5000, b'{"rgb_image": "') as connection:
        status, answer = answered(connection)
    assert (status, answer["error"]["code"]) == (408, "body_timeout")
    assert BODY_IDLE_S - 0.1 < time.monotonic() - begun < 9, "the server's own limit, not the usual 10 s"


def test_a_body_that_trickles_is_read_to_its_end(special: Special) -> None:
    body = msgspec.json.encode(one())
    cuts = [0, 10, len(body) // 2, len(body) - 1, len(body)]
    with half_sent(special.server, len(body), b"") as connection:
        for start, stop in itertools.pairwise(cuts):
            connection.sendall(body[start:stop])
            time.sleep(BODY_IDLE_S / 3.5)  # together longer than the limit, each pause shorter
        head = connection.recv(65536)
    assert head.startswith(b"HTTP/1.1 200")


def test_a_client_that_hangs_up_in_the_middle_harms_nobody(special: Special) -> None:
    before = len(special.server.lines("client_gone"))
    for length in (0, 20, 3000):
        half_sent(special.server, 5000, b'{"rgb_image": "' + b"A" * length).close()
    gone = "the log says that the clients went away"
    wait_until(lambda: len(special.server.lines("client_gone")) >= before + 3, ANSWER_S, gone)
    assert special.ask.poses(one())[0]["status"] == "ok"


def is_full_with(count: int, length: int, special: Special, more: str = "") -> bool:
    """Return True if another request is refused beside `count` half-sent ones, before any of its body is sent."""
    with contextlib.ExitStack() as held:
        for _ in range(count):
            held.enter_context(half_sent(special.server, length, b"" if more else b"{", more))
        another = held.enter_context(half_sent(special.server, length, b""))
        assert special.ask.send("GET", "/readyz").status_code == 200
        status, answer = answered(another)
    code = answer["error"]["code"]
    assert (status, code) in [(429, "over_capacity"), (408, "body_timeout")]  # this one where it came before the others
    return status == 429


def test_too_many_requests_in_flight_are_429_before_their_body_is_read(special: Special) -> None:
    wait_until(lambda: is_full_with(6, 5000, special), 60, "the seventh is refused")
    wait_until(lambda: special.ask.post(one()).status_code == 200, ANSWER_S, "requests are taken again")


def test_too_many_bytes_in_flight_are_429_before_their_body_is_read(special: Special) -> None:
    wait_until(lambda: is_full_with(3, 18 * 2**20, special), 60, "the fourth is refused")
    wait_until(lambda: special.ask.post(one()).status_code == 200, ANSWER_S, "requests are taken again")


def test_a_compressed_body_counts_as_much_as_it_may_become(special: Special) -> None:
    zipped = "Content-Encoding: gzip\r\n"
    wait_until(lambda: is_full_with(3, 9000, special, zipped), 60, "the fourth is refused")
    wait_until(lambda: special.ask.post(one()).status_code == 200, ANSWER_S, "requests are taken again")


# ----------------------------------------------------------------------------------------------------- 413: too large


def test_a_body_over_the_limit_is_413(ask: Asker, special: Special) -> None:
    big = 21 * 2**20
    refusal(ask.send("POST", POSE, content=b" " * big, headers=JSON), 413, "too_large")
    refusal(ask.send("POST", POSE, content=(b" " * 2**20 for _ in range(22)), headers=JSON), 413, "too_large")
    with half_sent(special.server, 1 << 40, b"{") as connection:  # refused by what it announces
        assert answered(connection)[0] == 413


def test_a_gzip_bomb_is_413(ask: Asker) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join([packer.compress(b" " * 2**20) for _ in range(64)]) + packer.flush()
    assert len(bomb) < 100_000
    refusal(ask.send("POST", POSE, content=bomb, headers=JSON | {"Content-Encoding": "gzip"}), 413, "too_large")


@pytest.mark.parametrize("field, bits, kind", [("rgb_image", 8, 2), ("depth_image", 16, 0)])
def test_a_png_bomb_is_413_before_it_is_decoded(ask: Asker, field: str, bits: int, kind: int) -> None:
    begun = time.monotonic()
    ask.refused(one(**{field: png(30_000, 30_000, b"\0" * 2**20, bits=bits, kind=kind)}), 413, "too_large", field)
    ask.refused(one(**{field: png(2_000_000, 2, b"\0" * 9, bits=bits, kind=kind)}), 413, "too_large", field)
    assert time.monotonic() - begun < 20


def test_masks_that_decode_to_too_much_together_are_413(ask: Asker) -> None:
    side = 1700
    rgb = images.encode_png(np.zeros((side, side), np.uint8))
    depth = images.encode_png(np.full((side, side), 4000, np.uint16))
    mask = rle.encode_rle(np.zeros((side, side), dtype=bool))
    tree = one(rgb_image=rgb, depth_image=depth, detections=masks_of(*[mask] * 190), init_poses=...)
    error = ask.refused(tree, 413, "too_large")
    assert "500" in error["detail"]


def test_a_mask_png_of_another_size_is_never_decoded(ask: Asker) -> None:
    bomb = png(40_000, 40_000, b"\0" * 100, kind=0)
    response = ask.post(one(detections=masks_of(bomb)))
    assert response.status_code in (413, 422)
    assert response.json()["error"]["field"] == "detections.masks[0]"


def test_a_mesh_that_claims_too_many_faces_is_413(ask: Asker) -> None:
    claim = ply().replace(b"element face", b"element face 300000000\ncomment", 1)
    ask.refused(one(objects=..., cad=claim, cad_format="ply"), 413, "too_large", "cad")
    refusal(ask.upload(claim), 413, "too_large", "file")
    stl = b"\0" * 80 + struct.pack("<I", 50_000_000) + b"\0" * 500
    refusal(ask.upload(stl, "part.stl"), 413, "too_large", "file")


def test_a_zip_bomb_is_413_and_one_that_climbs_is_400(ask: Asker) -> None:
    def zipped(name: str, content: bytes) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr(name, content)
        return file.getvalue()

    bomb = zipped("part.ply", b"\0" * (600 * 2**20))
    refusal(ask.upload(bomb, "part.zip"), 413, "too_large", "file")
    refusal(ask.upload(zipped("../../part.ply", ply()), "part.zip"), 400, "bad_data", "file")


def test_an_inline_cad_over_its_own_limit_is_413(ask: Asker) -> None:
    padded = ply().replace(b"comment", b"comment " + b"x" * (10 * 2**20 + 1), 1)
    error = ask.refused(one(objects=..., cad=padded, cad_format="ply"), 413, "too_large", "cad")
    assert OBJECTS in error["detail"]


# ------------------------------------------------------------------------------------------- 422: well-formed but wrong


WRONG_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "a typo": ({"hypothesis": 3}, "hypothesis"),
    "a typo inside the camera": (camera(depth_scal=1.0), "cam_params.depth_scal"),
    "a typo inside the columns": ({"detections": {"masks": [], "box": []}, "init_poses": ...}, "detections.box"),
    "a typo inside an object": ({"objects": {"wedge": {"cad": "x"}}}, "objects[...].cad"),
    "no picture": ({"rgb_image": ...}, "rgb_image"),
    "no camera": ({"cam_params": ...}, "cam_params"),
    "no detections": ({"detections": ..., "init_poses": ...}, "detections"),
    "no camera matrix": ({"cam_params": {"depth_scale": 1.0}}, "cam_params.cam_K"),
    "no masks": ({"detections": {"scores": []}, "init_poses": ...}, "detections.masks"),
    "text for a number": (camera(depth_scale="one"), "cam_params.depth_scale"),
    "a depth scale of zero": (camera(depth_scale=0.0), "cam_params.depth_scale"),
    "a negative depth scale": (camera(depth_scale=-1.0), "cam_params.depth_scale"),
    "another depth unit": (camera(depth_unit="cm"), "cam_params.depth_unit"),
    "eight numbers": (camera(cam_K=K[:8]), "cam_params.cam_K"),
    "two rows": (camera(cam_K=[K[:3], K[3:6]]), "cam_params.cam_K"),
    "a matrix of text": (camera(cam_K=["170"] * 9), "cam_params.cam_K"),
    "no focal length": (camera(cam_K=[0, 0, 79.5, 0, 170, 59.5, 0, 0, 1]), "cam_params.cam_K"),
    "a singular matrix": (camera(cam_K=[1.0] * 9), "cam_params.cam_K"),
    "a matrix by columns": (camera(cam_K=[170, 0, 0, 0, 170, 0, 79.5, 59.5, 1]), "cam_params.cam_K"),
    "an unknown engine": ({"engine": "magic"}, "engine"),
    "an engine that is not configured": ({"engine": "sam6d"}, "engine"),
    "an unknown refinement": ({"refine": "more"}, "refine"),
    "too many runners-up": ({"hypotheses": 1000}, "hypotheses"),
    "a negative number of runners-up": ({"hypotheses": -1}, "hypotheses"),
    "a score above one": ({"min_score": 1.5}, "min_score"),
    "another judge of units": ({"units": "maybe"}, "units"),
    "a negative seed": ({"seed": -1}, "seed"),
    "a deadline of nothing": ({"deadline_ms": 0}, "deadline_ms"),
    "a deadline beyond the longest": ({"deadline_ms": 10**9}, "deadline_ms"),
    "a box format of one's own": ({"box_format": "cxcywh"}, "box_format"),
    "another model unit": ({"model_unit": "inch"}, "model_unit"),
    "an empty path": ({"objects": ..., "cad_path": ""}, "cad_path"),
    "no CAD": ({"objects": ...}, "object_id"),
    "two CADs": ({"object_id": "wedge"}, "objects"),
    "a CAD without its format": ({"objects": ..., "cad": ply()}, "cad_format"),
    "a format without its CAD": ({"cad_format": "ply"}, "cad_format"),
    "another CAD format": ({"objects": ..., "cad": ply(), "cad_format": "step"}, "cad_format"),
    "a CAD of no kind in the map": ({"objects": {"wedge": {}}}, "objects.wedge"),
    "a unit for a registered object": ({"objects": ..., "object_id": "wedge", "model_unit": "mm"}, "model_unit"),
    "a unit for registered objects": ({"model_unit": "m"}, "model_unit"),
    "a path that is no CAD file": ({"objects": ..., "cad_path": "notes.txt"}, "cad_path"),
    "too few scores": ({"detections": masks_of(tiny_question().masks[1], scores=[])}, "detections.scores"),
    "too many boxes": (
        {"detections": masks_of(tiny_question().masks[1], boxes=[[0, 0, 1, 1]] * 2)},
        "detections.boxes",
    ),
    "a box of three numbers": (
        {"detections": masks_of(tiny_question().masks[1], boxes=[[0, 0, 1]])},
        "detections.boxes[0]",
    ),
    "a score of text": ({"detections": masks_of(tiny_question().masks[1], scores=["high"])}, "detections.scores[0]"),
    "detections that are text": ({"detections": "all", "init_poses": ...}, "detections"),
    "too few starting poses": ({"init_poses": []}, "init_poses"),
    "a starting pose that is no rotation": (
        {"init_poses": [{"rotation": [[2, 0, 0], [0, 1, 0], [0, 0, 1]], "translation": [0, 0, 400]}]},
        "init_poses[0].rotation",
    ),
    "a starting pose that is a mirror": (
        {"init_poses": [{"rotation": [[-1, 0, 0], [0, 1, 0], [0, 0, 1]], "translation": [0, 0, 400]}]},
        "init_poses[0].rotation",
    ),
    "a starting pose in two dimensions": (
        {"init_poses": [{"rotation": [[1, 0], [0, 1], [0, 0]], "translation": [0, 0, 400]}]},
        "init_poses[0].rotation[0]",
    ),
    "more detections than a request may have": (
        {"detections": masks_of(*[tiny_question().masks[1]] * 201), "init_poses": ...},
        "detections",
    ),
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_a_wrong_field_is_422_with_its_path(ask: Asker, name: str) -> None:
    changes, field = WRONG_FIELDS[name]
    tree = one(**changes)
    for as_json in (True, False):
        ask.refused(tree, 422, "invalid", field, as_json=as_json)


def test_integers_beyond_64_bits_are_422(ask: Asker) -> None:
    text = msgspec.json.encode(one(**camera(cam_K=[123456, *K[1:]])))
    huge = text.replace(b"123456", b"9" * 400)
    refusal(ask.send("POST", POSE, content=huge, headers=JSON), 422, "invalid", "cam_params.cam_K")
    detections = {"masks": [tiny_question().masks[1]], "object_ids": [123456]}
    text = msgspec.json.encode(one(detections=detections, objects=..., object_id="wedge"))
    for digits in (b"9" * 30, b"-" + b"9" * 30):
        huge = text.replace(b"123456", digits)
        refusal(ask.send("POST", POSE, content=huge, headers=JSON), 422, "invalid", "detections.masks[0]")


def test_extreme_numbers_are_a_row_or_a_refusal_and_never_a_crash(ask: Asker) -> None:
    mask = tiny_question().masks[1]
    turned = {"rotation": np.eye(3).tolist(), "translation": [0, 0, 1e300]}
    for changes in (
        camera(cam_K=[1e200, 0, 79.5, 0, 1e200, 59.5, 0, 0, 1]),
        camera(cam_K=[1e-4, 0, 79.5, 0, 1e-4, 59.5, 0, 0, 1]),
        camera(cam_K=[170, 1e300, 1e300, 0, 170, 59.5, 0, 0, 1]),
        camera(depth_scale=1e300),
        camera(depth_scale=1e-300),
        {"init_poses": [turned]},
        {"detections": masks_of(mask, scores=[1e308])},
        {"seed": 2**63 - 1},
    ):
        response = ask.post(one(**changes))
        assert response.status_code in (200, 422), (changes, response.text)
    wide = masks_of(mask, boxes=[[-1.7e308, 0, 1.7e308, 1]])
    ask.refused(one(detections=wide, box_format="xyxy"), 422, "invalid", "detections.masks[0]")
    pixel = one(
        rgb_image=images.encode_png(np.zeros((1, 1, 3), np.uint8)),
        depth_image=images.encode_png(np.ones((1, 1), np.uint16)),
        detections=masks_of([[1]]),
    )
    assert ask.poses(pixel)[0]["error"]["code"] == "mask_too_small"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_422_in_messagepack(ask: Asker, number: float) -> None:
    mask = tiny_question().masks[1]
    ask.refused(one(**camera(cam_K=[number, *K[1:]])), 422, "invalid", "cam_params.cam_K")
    ask.refused(one(**camera(depth_scale=number)), 422, "invalid", "cam_params.depth_scale")
    ask.refused(one(detections=masks_of(mask, boxes=[[0, 0, number, 1]])), 422, "invalid")
    ask.refused(one(detections=masks_of(mask, scores=[number])), 422, "invalid")
    ask.refused(one(min_score=number), 422, "invalid", "min_score")
    pose = truth(1)
    pose["translation"][2] = number
    ask.refused(one(init_poses=[pose]), 422, "invalid", "init_poses[0]")


WRONG_MASKS: dict[str, Any] = {
    "a number": 7,
    "null": None,
    "a nested list of 0 and 255": [[255] * WIDTH] * HEIGHT,
    "an RLE of another size": rle.encode_rle(np.zeros((HEIGHT // 2, WIDTH), dtype=bool)),
    "an RLE with its size turned": rle.encode_rle(np.zeros((WIDTH, HEIGHT), dtype=bool)),
    "an RLE of no size": {"size": [0, 0], "counts": ""},
    "an RLE of negative size": {"size": [-HEIGHT, WIDTH], "counts": [1]},
    "an RLE whose counts are too many": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH, 5]},
    "an RLE whose counts are too few": {"size": [HEIGHT, WIDTH], "counts": [10, 10]},
    "an RLE with a negative count": {"size": [HEIGHT, WIDTH], "counts": [-5, HEIGHT * WIDTH + 5]},
    "an RLE whose counts overflow 64 bits": {"size": [HEIGHT, WIDTH], "counts": [2**63 - 1, 2**63 - 1, 2]},
    "an RLE whose counts are not whole": {"size": [HEIGHT, WIDTH], "counts": [1.5, 2]},
    "a string whose counts overflow": {"size": [HEIGHT, WIDTH], "counts": "oooooooo0" * 4},
    "a string of other characters": {"size": [HEIGHT, WIDTH], "counts": "\u00e4\u00f6 ~~"},
    "a string that ends in the middle": {"size": [HEIGHT, WIDTH], "counts": "oo"},
    "an object that is no RLE": {"mask": [1, 2]},
    "a list of another size": [[0, 1], [1, 0]],
    "a list with uneven rows": [[0] * WIDTH] * (HEIGHT - 1) + [[0]],
    "an empty row": [[]],
    "a polygon of two points": [[1, 1, 5, 5]],
    "a polygon of an odd number": [[1, 1, 5, 5, 9, 1, 4]],
    "a polygon of text": [["a"] * 6],
    "a PNG of another size": base64.b64encode(images.encode_png(np.ones((4, 4), dtype=bool))).decode(),
    "a PNG of no size": base64.b64encode(png(0, 0, b"")).decode(),
}


@pytest.mark.parametrize("name", WRONG_MASKS)
def test_a_wrong_mask_is_422_with_its_place(ask: Asker, name: str) -> None:
    tree = one(detections=masks_of(tiny_question().masks[1], WRONG_MASKS[name]), init_poses=...)
    for as_json in (True, False):
        response = ask.post(tree, as_json=as_json)
        if name == "a PNG of no size":  # such a PNG is broken, too
            refusal(response, 400, "bad_data", "detections.masks[1]")
        else:
            refusal(response, 422, "invalid", "detections.masks[1]")


def test_depth_and_colour_of_different_sizes_are_422(ask: Asker) -> None:
    depth = images.encode_png(np.ascontiguousarray(tiny_scene().depth_raw[:, :-1]))
    error = ask.refused(one(depth_image=depth), 422, "invalid", "depth_image")
    assert "159 x 120" in error["detail"]


def test_depth_that_has_lost_its_data_is_422(ask: Asker) -> None:
    depth = (tiny_scene().depth_m * 200).astype(np.uint8)
    for picture in (
        images.encode_png(depth),
        images.encode_png(np.dstack([depth] * 3)),
        cv2.imencode(".jpg", depth)[1].tobytes(),
    ):
        ask.refused(one(depth_image=picture), 422, "invalid", "depth_image")
    error = ask.refused(one(depth_image=images.encode_png(depth)), 422, "invalid", "depth_image")
    assert "8 bits" in error["detail"]


def test_colour_that_is_no_colour_is_422(ask: Asker) -> None:
    ask.refused(one(rgb_image=tiny_question().depth), 422, "invalid", "rgb_image")


def test_a_float_depth_without_its_scale_is_422(ask: Asker) -> None:
    tiff = cv2.imencode(".tiff", tiny_scene().depth_m)[1].tobytes()
    tree = one(depth_image=tiff, cam_params={"cam_K": K})
    error = ask.refused(tree, 422, "invalid", "cam_params.depth_scale")
    assert "1000" in error["detail"]


def test_the_second_dialect_refuses_with_its_own_names(ask: Asker) -> None:
    tree = one(detections=..., init_poses=..., seg_data=[{"segmentation": tiny_question().masks[1], "score": 0.9}])
    ask.refused(tree | {"detections": []}, 422, "invalid", "detections", route=SEG)
    ask.refused(tree | {"seg_data": {"masks": []}}, 422, "invalid", "seg_data", route=SEG)
    ask.refused(tree | {"seg_data": [{"score": 1.0}]}, 422, "invalid", route=SEG)
    wrong = [
        {"segmentation": tiny_question().masks[1], "score": 0.1},
        {"segmentation": {"size": [1, 1], "counts": "1"}},
    ]
    ask.refused(tree | {"seg_data": wrong}, 422, "invalid", "seg_data[1].segmentation", route=SEG)
    bare = np.zeros(HEIGHT * WIDTH - 1, "<f4").tobytes()
    response = ask.post(tree | {"depth_image": bare}, route=SEG)
    assert response.status_code in (400, 422)
    assert response.json()["error"]["field"] == "depth_image"


def test_a_form_refuses_unknown_and_missing_parts(ask: Asker) -> None:
    tree = one()
    rgb, depth = tree.pop("rgb_image"), tree.pop("depth_image")
    request = (None, msgspec.json.encode(tree))
    parts = {"rgb": ("a.png", rgb), "depth": ("b.png", depth), "request": request}
    assert ask.send("POST", POSE, files=parts).status_code == 200
    refusal(ask.send("POST", POSE, files={**parts, "mask": ("c.png", b"1")}), 422, "invalid", "mask")
    refusal(ask.send("POST", POSE, files={"rgb": parts["rgb"], "request": request}), 422, "invalid", "depth_image")
    refusal(ask.send("POST", POSE, files={"rgb": parts["rgb"]}), 422, "invalid", "request")
    broken = {**parts, "request": (None, b"{")}
    refusal(ask.send("POST", POSE, files=broken), 400, "bad_body")


@pytest.mark.parametrize("value", ["0", "-5", "soon", "1.5", "", "١٢٣"])
def test_a_deadline_header_that_is_no_number_is_422(ask: Asker, value: str) -> None:
    answer = ask.send(
        "POST",
        POSE,
        content=msgspec.msgpack.encode(one()),
        headers=[(b"Content-Type", b"application/msgpack"), (b"X-Request-Deadline-Ms", value.encode())],  # type: ignore[arg-type]
    )
    refusal(answer, 422, "invalid", "X-Request-Deadline-Ms")


# ------------------------------------------------------------------------------------------------------- 422: the paths


OUTSIDE = ["../objects", "/etc/passwd", "a/../../../b.ply", "..", "/", "wedge.ply\0.ply", "~/x.ply", "//etc/x.ply"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_outside_of_its_root_is_422_whether_it_exists_or_not(ask: Asker, path: str) -> None:
    for field, tree in (
        ("cad_path", one(objects=..., cad_path=path)),
        ("objects.wedge.cad_path", one(objects={"wedge": {"cad_path": path}})),
        ("output_dir", one(output_dir=path)),
    ):
        if path.startswith("~") and field != "output_dir":  # not expanded: a folder of this name may exist
            ask.refused(tree, 404, "no_cad_file", field)
        elif not path.startswith("~"):
            ask.refused(tree, 422, "invalid", field)


def test_a_symlink_that_leads_out_is_422(ask: Asker, server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "secret.ply").write_bytes(ply())
    (tmp_path / "elsewhere").mkdir()
    for link, target in (
        (server.data / "cad" / "link.ply", tmp_path / "secret.ply"),
        (server.data / "cad" / "folder", tmp_path),
        (server.data / "outputs" / "away", tmp_path / "elsewhere"),
        (server.data / "cad" / "loop.ply", server.data / "cad" / "loop.ply"),
    ):
        link.symlink_to(target)
    try:
        ask.refused(one(objects=..., cad_path="link.ply"), 422, "invalid", "cad_path")
        ask.refused(one(objects=..., cad_path="folder/secret.ply"), 422, "invalid", "cad_path")
        ask.refused(one(objects=..., cad_path="loop.ply"), 422, "invalid", "cad_path")
        ask.refused(one(output_dir="away"), 422, "invalid", "output_dir")
        ask.refused(one(output_dir="away/deeper"), 422, "invalid", "output_dir")
        assert list((tmp_path / "elsewhere").iterdir()) == []
    finally:
        for link in ("cad/link.ply", "cad/folder", "outputs/away", "cad/loop.ply"):
            (server.data / link).unlink()


def test_an_absolute_output_dir_is_422_even_inside_of_its_root(ask: Asker, server: RunningServer) -> None:
    ask.refused(one(output_dir=str(server.data / "outputs" / "here")), 422, "invalid", "output_dir")


def test_paths_that_no_file_system_takes_are_refused(ask: Asker, server: RunningServer) -> None:
    ask.refused(one(objects=..., cad_path="x" * 300 + ".ply"), 404, "no_cad_file", "cad_path")
    ask.refused(one(objects=..., cad_path="x/" * 2500), 422, "invalid", "cad_path")
    ask.refused(one(objects=..., cad_path="."), 422, "invalid", "cad_path")
    ask.refused(one(output_dir="x" * 300), 422, "invalid", "output_dir")
    (server.data / "outputs" / "a-file").write_text("in the way")
    ask.refused(one(output_dir="a-file"), 422, "invalid", "output_dir")
    ask.refused(one(output_dir="a-file/below"), 422, "invalid", "output_dir")


def test_an_obj_never_pulls_in_files_from_outside(ask: Asker, server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "secret.mtl").write_text("newmtl secret\nKd 1 0 0\n")
    corners = "".join(f"v {x} {y} {z}\n" for x, y, z in tetrahedron())
    faces = "".join(f"f {a + 1} {b + 1} {c + 1}\n" for a, b, c in ((0, 2, 1), (0, 1, 3), (1, 2, 3), (0, 3, 2)))
    path = server.data / "cad" / "climbs.obj"
    path.write_text(f"mtllib {os.path.relpath(tmp_path / 'secret.mtl', path.parent)}\nusemtl secret\n{corners}{faces}")
    row = ask.poses(one(objects=..., cad_path="climbs.obj", init_poses=...))[0]
    stored = server.data / "objects" / row["cad_id"] / "source"
    assert [file.name for file in stored.iterdir()] == ["model.obj"]
    ask.send("DELETE", f"{OBJECTS}/{row['cad_id']}")


# ------------------------------------------------------------------------------------------------------- 422: the units


def test_a_unit_slip_is_422_and_the_words_say_how_to_mend_it(ask: Asker, tiny: Question) -> None:
    both = tiny.body()
    scale = tiny.scene.depth_scale_mm
    in_metres = both | {"cam_params": {"cam_K": K, "depth_scale": scale / 1000}}
    error = ask.refused(in_metres, 422, "units", "cam_params.depth_scale")
    assert 'depth_unit to "m"' in error["detail"]
    assert ask.ok(in_metres | {"cam_params": {"cam_K": K, "depth_scale": scale / 1000, "depth_unit": "m"}})
    error = ask.refused(both | {"cam_params": {"cam_K": K, "depth_scale": scale * 1000}}, 422, "units")
    assert "1000 times too large" in error["detail"]
    error = ask.refused(both | {"cam_params": {"cam_K": K, "depth_scale": scale * 10}}, 422, "units")
    assert "divide depth_scale by 10" in error["detail"]
    error = ask.refused(both | {"cam_params": {"cam_K": K, "depth_scale": scale / 10}}, 422, "units")
    assert "multiply depth_scale by 10" in error["detail"]


def test_lengths_that_are_merely_odd_are_a_warning_and_refused_only_where_asked(ask: Asker) -> None:
    telescope = {"cam_K": [26 * 170.0, 0, 79.5, 0, 26 * 170.0, 59.5, 0, 0, 1], "depth_scale": 2.6}  # 10 m away
    answer = ask.ok(one(cam_params=telescope, init_poses=...))
    assert any("unusual" in warning for warning in answer["warnings"])
    ask.refused(one(cam_params=telescope, units="strict"), 422, "units")


def test_a_model_in_another_unit_is_422_and_the_words_say_which(ask: Asker) -> None:
    mask = tiny_question().masks[1]
    tree = one(objects=..., cad=ply(unit="m"), cad_format="ply", detections=masks_of(mask), init_poses=...)
    error = ask.refused(tree, 422, "units")
    assert 'model_unit: "m"' in error["detail"]
    inches = ascii_ply(tetrahedron(100 / 25.4))
    error = ask.refused(tree | {"cad": inches}, 422, "units")
    assert "inches" in error["detail"]


def test_one_odd_mask_among_good_ones_is_its_own_rows_matter(ask: Asker, tiny: Question) -> None:
    depth_raw = tiny.scene.depth_raw.copy()
    odd = np.zeros((HEIGHT, WIDTH), dtype=bool)
    odd[100:112, 140:152] = True
    depth_raw[odd] = 15  # 1.5 mm from the camera
    tree = tiny.body(
        depth_image=images.encode_png(depth_raw),
        detections=masks_of(*[tiny.masks[1]] * 3, rle.encode_rle(odd)),
        objects={"wedge": {"object_id": "wedge"}},
        init_poses=[truth(1)] * 3 + [None],
    )
    rows = ask.poses(tree)
    assert [row["status"] for row in rows] == ["ok"] * 3 + ["rejected"]
    assert rows[3]["error"]["code"] in ("units", "no_fit")


# --------------------------------------------------------------------------------------------- 422, 429, 504: deadlines


def test_a_deadline_that_even_an_idle_server_could_not_meet_is_422(ask: Asker, tiny: Question) -> None:
    tree = tiny.body(detections=masks_of(*[tiny.masks[1]] * 200), objects={"wedge": {"object_id": "wedge"}})
    error = ask.refused(tree | {"deadline_ms": 50}, 422, "deadline_too_short", "deadline_ms")
    assert "200 detections" in error["detail"]
    ask.refused(tree, 422, "deadline_too_short", headers={"X-Request-Deadline-Ms": "50"})


def test_what_is_not_ready_by_its_deadline_is_504_and_who_would_wait_too_long_is_429(
    server: RunningServer, ask: Asker, question: Question
) -> None:
    server.wait_idle()
    with server.paused("pose"), ThreadPoolExecutor(1) as pool:
        count = 200  # more than any number of workers have inside
        seconds = count / server.status()["detections_per_second"]  # as the server believes
        searches = question.body(indices=[0] * count)
        slow = pool.submit(ask.post, searches | {"deadline_ms": math.ceil(600 * seconds) + 3000})
        server.wait_for_queue(requests=1)
        with Asker(ask.url) as other:
            many = one(detections=masks_of(*[tiny_question().masks[1]] * count), init_poses=[truth(1)] * count)
            error = other.refused(many | {"deadline_ms": math.ceil(1500 * seconds)}, 429, "over_capacity")
            assert "ahead" in error["detail"]
        assert not slow.done(), "refused at the door, not after waiting"
        refusal(slow.result(), 504, "deadline")
    server.wait_idle()


# ----------------------------------------------------------------------------------------------------- 502, 503: others


def test_without_an_ism_server_the_full_pipeline_is_503(ask: Asker) -> None:
    tree = one(detections=..., init_poses=..., template_dir="t")
    refusal(ask.post(tree, route=FULL), 503, "no_ism")


@pytest.mark.parametrize("mode", ["error_in_200", "unsuccessful", "500", "422", "garbage", "unequal"])
def test_a_failing_ism_server_is_502_and_never_an_empty_scene(special: Special, mode: str) -> None:
    special.ism.mode = mode
    try:
        tree = one(detections=..., init_poses=..., template_dir="t")
        error = special.ask.refused(tree, 502, "ism_failed", route=FULL)
    finally:
        special.ism.mode = "good"
    assert "/opt" not in error["detail"]
    assert "/srv" not in error["detail"]


def test_the_full_pipeline_takes_no_detections_and_needs_its_templates(special: Special) -> None:
    tree = one(init_poses=..., template_dir="t")
    special.ask.refused(tree, 422, "invalid", "detections", route=FULL)
    special.ask.refused(one(detections=..., init_poses=...), 422, "invalid", "template_dir", route=FULL)


def test_a_cad_that_takes_longer_than_the_deadline_is_503_and_the_work_goes_on(special: Special) -> None:
    fresh = one(objects=..., cad=ascii_ply(tetrahedron(61.0)), cad_format="ply", init_poses=...)
    with special.server.paused("onboard"):
        refusal(special.ask.post(fresh | {"deadline_ms": 2000}), 503, "onboarding")
    answer = special.ask.ok(fresh)
    assert answer["poses"][0]["cad_id"]
    again = special.ask.ok(fresh)
    assert "onboard_ms" not in again["timing"]


# --------------------------------------------------------------------------------------------------------- the company


def test_bad_requests_never_harm_those_that_share_their_batch(ask: Asker) -> None:
    good = ask.poses(one())
    mask = tiny_question().masks[1]
    bad = [
        one(rgb_image=b"\x89PNG\r\n\x1a\n broken"),
        one(detections=masks_of({"size": [HEIGHT, WIDTH], "counts": [2**62, 2**62]})),
        one(detections=masks_of(mask, mask[::-1] if isinstance(mask, str) else None), init_poses=...),
        one(objects=..., object_id="nobody"),
    ]
    barrier = threading.Barrier(8)

    def send(tree: dict[str, Any]) -> tuple[int, Any]:
        with Asker(ask.url) as client:
            barrier.wait()
            response = client.post(tree)
            return response.status_code, response.json()["poses"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, [tree for pair in zip(bad, [one()] * 4, strict=True) for tree in pair]))
    assert [status for status, _ in answers[::2]] == [400, 422, 422, 404]
    assert answers[1::2] == [(200, good)] * 4


@pytest.fixture(scope="module")
def tiny() -> Question:
    return tiny_question()
