"""The client: what it sends, how it reads answers, when it tries again.

Retries and failures are tested against a small HTTP server that answers from a list; everything else against the real
one (fixture `server`).
"""

from __future__ import annotations

import asyncio
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pem import client, imagefiles
from pem.errors import kind_of
from posekit.synthetic.scenes import Scene, demo_scene, pose_errors
from posekit.synthetic.shapes import SHAPES, mesh_to_ply
from serve.errors import CODES
from tests.running import RunningServer

K = np.array([[600.0, 0, 31.5], [0, 600.0, 23.5], [0, 0, 1]])
RGB = np.full((48, 64, 3), 100, np.uint8)
DEPTH = np.full((48, 64), 800, np.uint16)
MASK = np.zeros((48, 64), bool)
MASK[10:30, 20:50] = True


# ------------------------------------------------------------------------------------------- a server that plays a list


class Script:
    """The answers of the small server, in order (the last one again and again), and the requests that it got."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], Any] | None] = []  # None: close without an answer
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.delay_s = 0.0


@pytest.fixture
def script() -> Iterator[tuple[str, Script]]:
    played = Script()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            played.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            index = min(len(played.seen), len(played.answers)) - 1
            time.sleep(played.delay_s)
            if (answer := played.answers[index]) is None:
                self.close_connection = True
                return
            status, headers, value = answer
            data = value if isinstance(value, bytes) else msgspec.json.encode(value)
            self.send_response(status)
            for name, text in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", played
    server.shutdown()
    server.server_close()
    thread.join(10)


def failure(status: int, code: str, **headers: str) -> tuple[int, dict[str, str], Any]:
    error = {"code": code, "detail": "words", "request_id": "abc", "field": "rgb_image"}
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return status, named, {"success": False, "poses": [], "error_message": "words", "error": error}


NOTHING = (200, {}, {"success": True, "poses": []})


def test_a_refusal_for_want_of_capacity_is_tried_again_when_told(script: tuple[str, Script]) -> None:
    url, played = script
    played.answers = [failure(429, "over_capacity", Retry_After="1"), NOTHING]
    start = time.monotonic()
    with client.Client(url) as pem:
        assert pem.estimate(RGB, DEPTH, K, [], object_id="x").poses == []
    assert 1.0 <= time.monotonic() - start < 8.0
    assert len(played.seen) == 2
    assert played.seen[0][3] == played.seen[1][3]


def test_retries_end(script: tuple[str, Script]) -> None:
    url, played = script
    played.answers = [failure(503, "onboarding", Retry_After="0")]
    with client.Client(url, retries=2) as pem, pytest.raises(client.Overloaded) as caught:
        pem.estimate(RGB, DEPTH, K, [], object_id="x")
    assert len(played.seen) == 3
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (503, "onboarding", 0.0)


def test_a_wait_beyond_the_budget_is_not_begun(script: tuple[str, Script]) -> None:
    url, played = script
    played.answers = [failure(429, "over_capacity", Retry_After="20")]
    start = time.monotonic()
    with client.Client(url, retry_budget_s=5) as pem, pytest.raises(client.Overloaded):
        pem.estimate(RGB, DEPTH, K, [], object_id="x")
    with client.Client(url) as pem, pytest.raises(client.Overloaded):
        pem.estimate(RGB, DEPTH, K, [], object_id="x", deadline_ms=2000)
    assert time.monotonic() - start < 15.0
    assert len(played.seen) == 2


def test_a_503_that_waiting_does_not_mend_is_not_tried_again(script: tuple[str, Script]) -> None:
    url, played = script
    played.answers = [failure(503, "no_ism")]
    with client.Client(url) as pem, pytest.raises(client.ServerFailed, match="words"):
        pem.full_pipeline(RGB, DEPTH, K, template_dir="t", object_id="x")
    assert len(played.seen) == 1


@pytest.mark.parametrize("status", [403, 413, 500, 502])
def test_what_waiting_does_not_mend_is_not_tried_again_whatever_a_proxy_adds(
    script: tuple[str, Script], status: int
) -> None:
    url, played = script
    played.answers = [failure(status, "unknown", Retry_After="0")]
    with client.Client(url) as pem, pytest.raises(client.PemError):
        pem.estimate(RGB, DEPTH, K, [], object_id="x")
    assert len(played.seen) == 1


def test_a_broken_connection_is_tried_again(script: tuple[str, Script]) -> None:
    url, played = script
    played.answers = [None, None, NOTHING]
    with client.Client(url) as pem:
        pem.estimate(RGB, DEPTH, K, [], object_id="x")
    assert len(played.seen) == 3


def test_a_server_that_comes_up_late_is_reached() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    def answer_once() -> None:
        time.sleep(0.3)
        with socket.create_server(("127.0.0.1", port)) as late:
            connection, _ = late.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    thread = threading.Thread(target=answer_once)
    thread.start()
    with client.Client(f"http://127.0.0.1:{port}") as pem:
        pem.wait_ready(60)
    thread.join(10)


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, client.BadInput),
        (401, client.KeyRefused),
        (403, client.KeyRefused),
        (404, client.NotFound),
        (413, client.BadInput),
        (422, client.BadInput),
        (500, client.ServerFailed),
        (502, client.ServerFailed),
        (504, client.DeadlinePassed),
    ],
)
def test_a_failure_is_raised_once_with_all_it_says(
    script: tuple[str, Script], status: int, kind: type[client.RequestRefused]
) -> None:
    url, played = script
    played.answers = [failure(status, "some_code")]
    with client.Client(url) as pem, pytest.raises(kind, match="words") as caught:
        pem.estimate(RGB, DEPTH, K, [], object_id="x")
    error = caught.value
    assert (error.status, error.code, error.detail) == (status, "some_code", "words")
    assert (error.field, error.request_id) == ("rgb_image", "abc")
    assert len(played.seen) == 1


#: Every code of the server, and the error that it becomes.
KINDS: dict[type[client.RequestRefused], set[str]] = {
    client.BadInput: {
        *("bad_body", "bad_data", "method_not_allowed", "body_timeout", "too_large", "unsupported_media_type"),
        *("invalid", "units", "deadline_too_short", "onboarding_failed"),
    },
    client.KeyRefused: {"key_missing", "key_wrong"},
    client.NotFound: {"not_found", "unknown_object", "no_cad_file"},
    client.NotReady: {"not_ready"},
    client.Overloaded: {"over_capacity", "rate_limited", "draining", "onboarding"},
    client.DeadlinePassed: {"deadline"},
    client.ServerFailed: {"internal", "ism_failed", "worker_lost", "storage_full", "no_ism"},
}


def test_every_code_of_the_server_becomes_the_error_that_is_meant() -> None:
    found: dict[type[client.RequestRefused], set[str]] = {}
    for code, (status, _) in CODES.items():
        found.setdefault(kind_of(status, code), set()).add(code)
    assert found == KINDS


def test_a_503_whose_code_is_new_is_what_its_status_says() -> None:
    assert kind_of(503, "tea_time") is client.Overloaded
    assert (kind_of(507, "unknown"), kind_of(418, "unknown")) == (client.ServerFailed, client.BadInput)


def test_a_server_that_is_loading_is_asked_again_and_then_not_ready(script: tuple[str, Script]) -> None:
    url, played = script
    played.answers = [failure(503, "not_ready", Retry_After="0")]
    with client.Client(url, retries=1) as pem, pytest.raises(client.NotReady):
        pem.estimate(RGB, DEPTH, K, [], object_id="x")
    assert len(played.seen) == 2


def test_waiting_for_a_server_outlasts_what_says_not_yet(script: tuple[str, Script]) -> None:
    url, played = script
    proxy = (502, {"Content-Type": "text/html"}, b"<html>Bad Gateway</html>")
    played.answers = [proxy, failure(503, "not_ready"), failure(503, "draining"), NOTHING]
    told: list[str] = []
    with client.Client(url) as pem:
        pem.wait_ready(60, on_wait=told.append)
        assert pem.ready()
        played.answers = [failure(500, "internal")]
        with pytest.raises(client.ServerFailed):
            pem.ready()
    assert len(told) == 3
    assert told[1:] == ["words", "words"]


def test_what_is_no_pem_server_is_named(script: tuple[str, Script]) -> None:
    url, played = script
    played.answers = [(200, {"Content-Type": "text/html"}, b"<html>hello</html>")]
    with client.Client(url) as pem, pytest.raises(client.PemError, match="does not answer as a PEM server does"):
        pem.status()
    played.answers = [(404, {"Content-Type": "text/html"}, b"<html>no</html>")]
    with client.Client(url) as pem, pytest.raises(client.NotFound, match="answered 404"):
        pem.status()


def test_an_answer_that_takes_too_long_is_given_up(script: tuple[str, Script]) -> None:
    url, played = script
    played.answers, played.delay_s = [NOTHING], 5.0
    with client.Client(url, timeout_s=1.5) as pem, pytest.raises(client.TimedOut):
        pem.estimate(RGB, DEPTH, K, [], object_id="x")
    assert len(played.seen) == 1


def test_no_server_is_a_failed_connection_that_names_the_address() -> None:
    with client.Client("http://127.0.0.1:9", retries=0) as pem:
        assert not pem.ready()
        with pytest.raises(client.ConnectionFailed, match=r"http://127\.0\.0\.1:9"):
            pem.status()
        with pytest.raises(client.TimedOut, match="not ready within"):
            pem.wait_ready(0.1)


@pytest.mark.parametrize("url", ["127.0.0.1:8003", "ftp://x", "http://", "http://x:y"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(client.PemError, match="address"):
        client.Client(url)


def test_the_key_and_the_deadline_go_along(script: tuple[str, Script]) -> None:
    url, played = script
    played.answers = [NOTHING]
    with client.Client(url, "pem_secret", deadline_s=7) as pem:
        pem.estimate(RGB, DEPTH, K, [], object_id="x")
        pem.estimate(RGB, DEPTH, K, [], object_id="x", deadline_ms=3000)
    (_, _, first, body), (_, _, second, _) = played.seen
    assert first["authorization"] == "Bearer pem_secret"
    assert 4000 < int(first["x-request-deadline-ms"]) <= 7000
    assert 0 < int(second["x-request-deadline-ms"]) <= 3000
    assert "deadline_ms" not in msgspec.msgpack.decode(body)


def test_the_async_client_tries_again_too(script: tuple[str, Script]) -> None:
    url, played = script
    played.answers = [failure(503, "not_ready", Retry_After="0"), None, NOTHING]

    async def ask() -> client.PoseResult:
        async with client.AsyncClient(url) as pem:
            return await pem.estimate(RGB, DEPTH, K, [], object_id="x")

    assert asyncio.run(ask()).poses == []
    assert len(played.seen) == 3


# ------------------------------------------------------------------------------------------------------ objects, poses


def test_an_answered_pose_can_be_an_initial_pose(script: tuple[str, Script]) -> None:
    url, played = script
    row = {"object_id": "can", "cad_id": "9f", "status": "ok", "confidence": 0.976, "bbox": [1, 2, 3, 4]}
    where = {"rotation": np.eye(3).tolist(), "translation": [1.25, -2.0, 544.06]}
    played.answers = [(200, {}, {"success": True, "engine": "geometric", "poses": [{**row, **where}]})]
    with client.Client(url) as pem:
        result = pem.estimate(RGB, DEPTH, K, [MASK], object_id="x")
        pem.estimate(RGB, DEPTH, K, [MASK, MASK], object_id="x", init_poses=[result.poses[0], where])
    assert msgspec.msgpack.decode(played.seen[1][3])["init_poses"] == [where, where]
    shown = "Pose(ok, object='x', t_mm=(1.2, -2.0, 544.1), confidence=0.98)"
    assert repr(result.poses[0]) == shown
    assert repr(result) == f"PoseResult(1 pose, engine=geometric)\n  0: {shown}"


def test_the_key_comes_from_the_environment_where_none_is_given(
    script: tuple[str, Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, played = script
    played.answers = [(200, {}, {})]
    monkeypatch.setenv("PEM_API_KEY", "pem_env")
    for key in (None, "pem_given", ""):
        with client.Client(url, key) as pem:
            pem.openapi()
    keys = [headers.get("authorization") for _, _, headers, _ in played.seen]
    assert keys == ["Bearer pem_env", "Bearer pem_given", None]


def test_a_rejected_row_has_no_pose_to_mistake_for_one(script: tuple[str, Script]) -> None:
    url, played = script
    row = {
        "object_id": 5,
        "cad_id": "9f",
        "rotation": None,
        "translation": None,
        "confidence": 0.0,
        "bbox": [1, 2, 3, 4],
    }
    error = {"code": "mask_too_small", "detail": "12 valid depth pixels"}
    played.answers = [(200, {}, {"success": True, "poses": [{**row, "status": "rejected", "error": error}]})]
    with client.Client(url) as pem:
        (pose,) = pem.estimate(RGB, DEPTH, K, [MASK], object_id="x").poses
    assert not pose.ok
    assert pose.error is not None
    assert pose.error.code == "mask_too_small"
    assert repr(pose) == "Pose(rejected, object='x', error=mask_too_small)"
    for name in ("R", "t_mm", "T_cam_obj_mm"):
        with pytest.raises(client.NoPose, match="mask_too_small: 12 valid"):
            getattr(pose, name)


def test_an_upload_tells_how_far_it_is_and_waits_for_the_object(script: tuple[str, Script], tmp_path: Path) -> None:
    url, played = script
    health = {"faces": 1, "watertight": True, "extents_mm": [1, 1, 1], "diameter_mm": 1}
    state = {
        "object_id": "9f",
        "name": "mug",
        "progress": 0.5,
        "model_unit": "mm",
        "health": health,
        "symmetries": None,
    }
    played.answers = [
        (201, {}, {**state, "status": "onboarding"}),
        (200, {}, {**state, "status": "ready", "progress": 1.0}),
    ]
    path = tmp_path / "mug.ply"
    path.write_bytes(b"x" * 300_000)
    told: list[tuple[str, float]] = []
    with client.Client(url) as pem:
        options = client.ObjectOptions(name="mug", replace=True, model_unit="m")
        added = pem.objects.add(path, options, on_progress=lambda *step: told.append(step))
    assert added.status == "ready"
    uploaded = [fraction for phase, fraction in told if phase == "upload"]
    assert uploaded == sorted(uploaded)
    assert uploaded[-1] == 1.0
    assert [fraction for phase, fraction in told if phase == "onboarding"] == [0.5, 1.0]
    method, route, headers, body = played.seen[0]
    assert (method, route) == ("POST", "/api/v1/objects")
    assert headers["content-type"].startswith("multipart/form-data")
    assert b'{"name":"mug","replace":true,"model_unit":"m"}' in body
    assert b'filename="mug.ply"' in body
    assert played.seen[1][1] == "/api/v1/objects/9f"


def test_a_failed_onboarding_is_an_error(script: tuple[str, Script]) -> None:
    url, played = script
    health = {"faces": 1, "watertight": True, "extents_mm": [1, 1, 1], "diameter_mm": 1}
    state = {"object_id": "9f", "name": None, "progress": 0.5, "model_unit": "mm", "health": health, "symmetries": None}
    played.answers = [(201, {}, {**state, "status": "failed", "error": "no room"})]
    with client.Client(url) as pem, pytest.raises(client.OnboardingFailed, match="no room"):
        pem.objects.add(b"ply", cad_format="ply")


# ---------------------------------------------------------------------------------------------- the real server


@pytest.fixture(scope="module")
def scene() -> Scene:
    return demo_scene()


def right(pose: client.Pose, scene: Scene) -> bool:
    T_cam_obj = pose.T_cam_obj_mm
    T_cam_obj[:3, 3] /= 1000
    truth = scene.instances[0]
    degrees, millimetres = pose_errors(T_cam_obj, truth.T_cam_obj, truth.shape.symmetries)
    return degrees < 2 and millimetres < 2


@pytest.mark.parametrize("use_json", [False, True], ids=["msgpack", "json"])
def test_a_real_server_finds_the_object(server: RunningServer, scene: Scene, use_json: bool) -> None:
    with client.Client(server.url, use_json=use_json, timeout_s=120) as pem:
        result = pem.estimate(
            scene.rgb, scene.depth_raw, scene.K, [scene.instances[0].mask], object_id="housing", visualize=True
        )
    (pose,) = result.poses
    assert right(pose, scene)
    assert len(pose.cad_id or "") == 64
    assert pose.evidence is not None
    assert result.timing is not None
    assert result.overlay().shape == scene.rgb.shape


def test_float_metres_and_16_bit_millimetres_give_the_same_pose(server: RunningServer, scene: Scene) -> None:
    depth_m = (scene.depth_raw * (scene.depth_scale_mm / 1000)).astype(np.float32)
    masks = [scene.instances[0].mask]
    with client.Client(server.url, timeout_s=120) as pem:
        a = pem.estimate(scene.rgb, scene.depth_raw, scene.K, masks, object_id="housing", seed=1).poses[0]
        b = pem.estimate(scene.rgb, depth_m, scene.K, masks, object_id="housing", depth_scale=1000.0, seed=1).poses[0]
    assert right(b, scene)
    np.testing.assert_allclose(a.T_cam_obj_mm, b.T_cam_obj_mm, atol=0.5)


def test_a_known_pose_is_only_refined(server: RunningServer, scene: Scene) -> None:
    truth = scene.instances[0]
    T_cam_obj_mm = truth.T_cam_obj.copy()
    T_cam_obj_mm[:3, 3] *= 1000
    T_cam_obj_mm[0, 3] += 3.0
    with client.Client(server.url, timeout_s=120) as pem:
        result = pem.estimate(
            scene.rgb, scene.depth_raw, scene.K, [truth.mask], object_id="housing", init_poses=[T_cam_obj_mm]
        )
    assert right(result.poses[0], scene)


def test_a_real_server_refuses_in_words(server: RunningServer, scene: Scene) -> None:
    with client.Client(server.url) as pem:
        with pytest.raises(client.NotFound, match="no-such"):
            pem.estimate(scene.rgb, scene.depth_raw, scene.K, [scene.instances[0].mask], object_id="no-such")
        small = [imagefiles.write_png(MASK)]  # a file: only the server looks into it
        with pytest.raises(client.BadInput) as caught:
            pem.estimate(scene.rgb, scene.depth_raw, scene.K, small, object_id="housing")
        assert caught.value.status == 422
        assert caught.value.field == "detections.masks[0]"


def test_objects_come_and_go(server: RunningServer) -> None:
    mesh = mesh_to_ply(SHAPES["wedge"]().mesh, unit="m")
    with client.Client(server.url, timeout_s=120) as pem:
        before = pem.objects.add(mesh, cad_format="ply", name="client-wedge")  # in millimetres: another object
        added = pem.objects.add(mesh, cad_format="ply", name="client-wedge", model_unit="m", replace=True)
        assert (added.status, added.model_unit) == ("ready", "m")
        assert (added.names, pem.objects.get(before.object_id).names) == (["client-wedge"], [])
        pem.objects.remove(before.object_id)
        assert pem.objects.get("client-wedge") == added
        assert added.object_id in [item.object_id for item in pem.objects.list()]
        pem.objects.remove("client-wedge")
        with pytest.raises(client.NotFound):
            pem.objects.get("client-wedge")


def test_a_server_says_how_it_is(server: RunningServer) -> None:
    with client.Client(server.url) as pem:
        assert pem.ready()
        assert pem.status().model_loaded
        assert pem.version().version == pem.status().version
        assert pem.openapi()["openapi"].startswith("3.1")


def test_the_async_client_speaks_to_a_real_server(server: RunningServer, scene: Scene) -> None:
    async def ask() -> list[client.PoseResult]:
        async with client.AsyncClient(server.url, timeout_s=120) as pem:
            await pem.wait_ready(10)
            assert (await pem.objects.get("housing")).status == "ready"
            one = pem.estimate(scene.rgb, scene.depth_raw, scene.K, [scene.instances[0].mask], object_id="housing")
            two = pem.estimate(scene.rgb, scene.depth_raw, scene.K, [scene.instances[0].mask], object_id="housing")
            return await asyncio.gather(one, two)

    a, b = asyncio.run(ask())
    assert right(a.poses[0], scene)
    np.testing.assert_array_equal(a.poses[0].T_cam_obj_mm, b.poses[0].T_cam_obj_mm)
