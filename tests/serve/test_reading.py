"""Bodies that are not what they claim, and senders that do not listen: what the server reads, and its answers."""

from __future__ import annotations

import asyncio
import datetime
import gzip
import http.client
import itertools
import json
import re
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from serve.errors import ApiError
from serve.gateway import keys
from serve.reading import decode_form, read_all
from tests.running import RunningServer
from tests.serve.special import Special
from tests.serve.tiny import FULL, NAMES, OBJECTS, POSE, SEG, Asker, one, ply, refusal, tiny_question

JSON = {"Content-Type": "application/json"}
GZIP = {**JSON, "Content-Encoding": "gzip"}
MB = 2**20


def most_memory_mb(pid: int) -> float:
    """Return the most memory that a process ever held."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


# ------------------------------------------------------------------------------------------------------------- gzip


@pytest.mark.parametrize("route", [POSE, SEG, FULL])
def test_anything_after_the_end_of_a_gzip_stream_is_400(ask: Asker, route: str) -> None:
    body = gzip.compress(msgspec.json.encode(one()))
    for tail in (b"\0", b"tail", gzip.compress(b"{}"), bytes(300_000)):
        refusal(ask.send("POST", route, content=body + tail, headers=GZIP), 400, "bad_body")
        refusal(ask.send("POST", route, content=iter([body, tail]), headers=GZIP), 400, "bad_body")


def test_a_gzip_stream_may_come_byte_by_byte(ask: Asker) -> None:
    body = gzip.compress(msgspec.json.encode(one()))
    pieces = [body[:-30], *(body[at : at + 1] for at in range(len(body) - 30, len(body)))]
    assert ask.send("POST", POSE, content=iter(pieces), headers=GZIP).status_code == 200


def test_what_follows_a_gzip_stream_piece_by_piece_is_neither_read_nor_kept(ask: Asker, server: RunningServer) -> None:
    ask.post(one())
    before = most_memory_mb(server.pid)
    pieces = itertools.chain([gzip.compress(b"{}")], itertools.repeat(bytes(MB), 60))
    refusal(ask.send("POST", POSE, content=pieces, headers=GZIP), 400, "bad_body")
    assert most_memory_mb(server.pid) - before < 15
    assert ask.poses(one())[0]["status"] == "ok"


def test_a_stream_that_unpacks_to_nothing_counts_as_what_was_sent() -> None:
    """Empty blocks of gzip: bytes that come for ever and never become a body."""
    packer = zlib.compressobj(wbits=31)
    pieces = [packer.compress(b"{}") + packer.flush(zlib.Z_FULL_FLUSH)]
    pieces += [b"\0\0\0\xff\xff" * 400] * 100  # a stored block of no bytes is these five

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    with pytest.raises(ApiError, match="larger after gunzip") as caught:
        asyncio.run(read_all(receive, {"content-encoding": "gzip"}, limit=100_000, idle_s=5.0))  # type: ignore[arg-type]
    assert caught.value.code == "too_large"


def test_a_field_comes_as_a_file_or_in_the_request_and_not_as_both() -> None:
    parts = {"request": b'{"cad_format": "ply", "rgb_image": ""}', "rgb": b"png"}
    with pytest.raises(ApiError, match="rgb_image is there twice: as a file and in `request`") as caught:
        decode_form(parts, {"rgb": "rgb_image"}, dict[str, Any])
    assert caught.value.field == "rgb_image"
    parts["request"] = b'{"cad_format": "ply"}'
    assert decode_form(parts, {"rgb": "rgb_image"}, dict[str, Any]) == {"cad_format": "ply", "rgb_image": "cG5n"}


def test_a_cut_off_gzip_stream_is_400(ask: Asker) -> None:
    body = gzip.compress(msgspec.json.encode(one()))
    for end in (5, len(body) // 2, len(body) - 1):
        refusal(ask.send("POST", POSE, content=body[:end], headers=GZIP), 400, "bad_body")


# -------------------------------------------------------------------------------------------------------- multipart


def test_an_unknown_part_is_refused_on_every_route_however_large(ask: Asker, server: RunningServer) -> None:
    before = most_memory_mb(server.pid)
    for route in (POSE, FULL, SEG, OBJECTS):
        files = {"surprise": ("a.bin", bytes(15 * MB)), "file": ("a.ply", ply()), "request": (None, b"{}")}
        refusal(ask.send("POST", route, files=files), 422, "invalid", "surprise")
    assert most_memory_mb(server.pid) - before < 15
    store = server.data / "objects"
    assert not [path for path in store.rglob("*") if path.name == "upload"], "nothing of it stays"


def test_a_large_value_beside_an_upload_is_413(ask: Asker) -> None:
    files = {"request": (None, b" " * (2 * MB)), "file": ("a.ply", ply())}
    refusal(ask.send("POST", OBJECTS, files=files), 413, "too_large", "request")


# ------------------------------------------------------------------------------------------------- refused early


@pytest.fixture
def locked(special: Special) -> Iterator[str]:
    """Give the special server one key during the test."""
    path = special.server.data / "keys.json"
    yield keys.add(path, "camera")
    path.unlink()


def send_all_then_look(port: int, path: str, body: bytes, **headers: str) -> tuple[int, str]:
    """Send a whole body before looking for an answer, as plain clients do; return status and code."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())["error"]["code"]
    finally:
        connection.close()


def test_a_sender_that_does_not_listen_sees_its_early_refusal_and_no_reset(special: Special) -> None:
    port, body = special.server.port, bytes(6 * MB)
    seen = [
        send_all_then_look(port, "/api/v1/nowhere", body),
        send_all_then_look(port, "/api/v1/status", body),
        send_all_then_look(port, POSE, body, **{"Content-Type": "text/plain"}),
        send_all_then_look(port, POSE, body, **{"Content-Encoding": "br"}),
        send_all_then_look(port, OBJECTS, body),
        send_all_then_look(port, POSE, bytes(21 * MB)),
    ]
    assert seen == [
        (404, "not_found"),
        (405, "method_not_allowed"),
        (415, "unsupported_media_type"),
        (415, "unsupported_media_type"),
        (415, "unsupported_media_type"),
        (413, "too_large"),
    ]


def test_a_sender_without_a_key_sees_that_too(special: Special, locked: str) -> None:
    port, body = special.server.port, bytes(6 * MB)
    assert send_all_then_look(port, POSE, body) == (401, "key_missing")
    assert send_all_then_look(port, POSE, body, **{"X-API-Key": "pem_wrong"}) == (403, "key_wrong")
    assert send_all_then_look(port, POSE, body, **{"X-API-Key": locked}) == (400, "bad_body")


def test_a_connection_is_used_again_after_an_early_refusal(special: Special) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", special.server.port, timeout=20)
    sockets = []
    for _ in range(3):
        connection.request("POST", "/api/v1/nowhere", bytes(MB), JSON)
        sockets.append(connection.sock)
        answer = connection.getresponse()
        assert answer.status == 404
        answer.read()
    assert len(set(map(id, sockets))) == 1
    connection.close()


def test_who_waits_for_a_go_ahead_is_refused_without_sending(special: Special) -> None:
    with socket.create_connection(("127.0.0.1", special.server.port), timeout=30) as connection:
        head = "POST /api/v1/nowhere HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 6000000\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")


# ----------------------------------------------------------------------------------- text that is none, odd types


def spoiled(tree: dict[str, Any], as_json: bool) -> bytes:
    """Return the request with each text `@@` replaced by two bytes that are not UTF-8."""
    good, bad = (b'"@@"', b'"\xff\xfe"') if as_json else (b"\xa2@@", b"\xa2\xff\xfe")
    data = (msgspec.json if as_json else msgspec.msgpack).encode(tree)
    assert good in data
    return data.replace(good, bad)


RLE = {"size": [120, 160], "counts": "@@"}
BROKEN_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "cam_K": (POSE, {"cam_params": {"cam_K": ["@@"] * 9}}),
    "cam_K row": (POSE, {"cam_params": {"cam_K": [[600, 0, "@@"], [0, 600, 1], [0, 0, 1]]}}),
    "object_ids": (POSE, {"detections": {"masks": tiny_question().masks[:1], "object_ids": ["@@"]}}),
    "masks": (POSE, {"detections": {"masks": ["@@"], "object_ids": NAMES[1:]}}),
    "counts": (POSE, {"detections": {"masks": [RLE], "object_ids": NAMES[1:]}}),
    "key": (POSE, {"detections": {"masks": [{**RLE, "counts": "04", "@@": 1}], "object_ids": NAMES[1:]}}),
    "list": (POSE, {"detections": [{"segmentation": RLE}]}),
    "category": (POSE, {"detections": [{"segmentation": tiny_question().masks[1], "category_id": "@@"}]}),
    "seg_data": (SEG, {"seg_data": [{"segmentation": RLE, "score": 0.9}]}),
    "seg_data extra": (SEG, {"seg_data": [{"segmentation": tiny_question().masks[1], "score": 0.9, "note": "@@"}]}),
    "seg_data left out": (SEG, {"seg_data": [{"segmentation": RLE, "score": 0.0}]}),
    "full cam_K": (FULL, {"cam_params": {"cam_K": ["@@"] * 9}}),
}


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "msgpack"])
@pytest.mark.parametrize("name", BROKEN_TEXT)
def test_text_that_is_no_utf8_is_400(ask: Asker, name: str, as_json: bool) -> None:
    route, changes = BROKEN_TEXT[name]
    if route == FULL:
        changes = {"detections": ..., "init_poses": ..., "template_dir": "t", **changes}
    if route == SEG:
        changes = {"detections": ..., "init_poses": ..., **changes}
    tree = one(objects=..., object_id=NAMES[1], **changes) if route != POSE else one(**changes)
    media = "application/json" if as_json else "application/msgpack"
    answer = ask.send("POST", route, content=spoiled(tree, as_json), headers={"Content-Type": media})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] in ("bad_body", "bad_data")


ODD = {
    "ext": msgspec.msgpack.Ext(5, b"x"),
    "timestamp": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    "number as key": {1: "a"},
    "bytes as key": {b"k": 1},
}


@pytest.mark.parametrize("name", ODD)
def test_types_that_json_does_not_have_are_refused_in_place_of_a_detection(ask: Asker, name: str) -> None:
    value = ODD[name]
    item = {"segmentation": tiny_question().masks[1], "score": 0.9}
    tree = one(detections=..., init_poses=..., objects=..., object_id=NAMES[1])
    for seg_data in ([{**item, "segmentation": value}], [{**item, "score": value}], [value], value):
        answer = ask.post(tree | {"seg_data": seg_data}, SEG)
        assert answer.status_code in (400, 422), answer.text
    for detections in ({"masks": [value]}, [{"segmentation": value}], value):
        answer = ask.post(one(init_poses=..., detections=detections))
        assert answer.status_code in (400, 422), answer.text


def test_types_that_json_does_not_have_are_echoed_in_words_or_refused(ask: Asker) -> None:
    item = {"segmentation": tiny_question().masks[1], "score": 0.9}
    tree = one(detections=..., init_poses=..., objects=..., object_id=NAMES[1])
    ext = {"seg_data": [{**item, "note": ODD["ext"]}]}
    ask.refused(tree | ext, 422, "invalid", "seg_data", route=SEG)
    echoed = ask.ok(tree | {"seg_data": [{**item, "note": [*ODD.values()][1:]}]}, route=SEG)["detections"]
    assert echoed == [{**item, "note": ["2024-01-01T00:00:00Z", {"1": "a"}, {"aw==": 1}]}]
