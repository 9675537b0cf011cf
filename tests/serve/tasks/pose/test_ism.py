"""The client side of the ISM call, against a running server that really segments."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import cache
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from posekit.io.masks import decode_mask
from posekit.synthetic.scenes import Scene, make_scene
from serve.errors import ApiError
from serve.settings import Ism
from serve.tasks.pose.ism import Found, IsmClient
from tests.serve.ism_server import IsmServer


@cache
def scene() -> Scene:
    return make_scene(seed=8, count=3, width=320, height=240, noise=False)


@cache
def pictures() -> tuple[bytes, bytes]:
    rgb = cv2.imencode(".png", scene().rgb[:, :, ::-1])[1].tobytes()
    return rgb, cv2.imencode(".png", scene().depth_raw)[1].tobytes()


def with_client(ism: Ism, use: Callable[[IsmClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        client = IsmClient(ism)
        try:
            return await use(client)
        finally:
            await client.close()

    return asyncio.run(run())


def find(url: str | None, *, deadline_in_s: float = 30.0, **limits: float) -> Found:
    rgb, depth = pictures()
    cam_params = {"cam_K": scene().K.ravel().tolist(), "depth_scale": scene().depth_scale_mm}
    found: Found = with_client(
        Ism(url=url, **limits),
        lambda client: client.find(
            rgb, depth, cam_params, "templates/part", "part.ply", deadline_unix=time.time() + deadline_in_s
        ),
    )
    return found


def failure(url: str | None, **options: float) -> ApiError:
    with pytest.raises(ApiError) as caught:
        find(url, **options)
    return caught.value


@pytest.fixture
def ism(request: pytest.FixtureRequest) -> Iterator[IsmServer]:
    with IsmServer(request.param) as server:
        yield server


mode = pytest.mark.parametrize


@mode("ism", ["good"], indirect=True)
def test_every_detection_comes_back_with_its_box_as_xywh(ism: IsmServer) -> None:
    found = find(ism.url)
    assert len(found.masks) == len(found.boxes) == len(found.scores) == len(found.object_ids) > 0
    for mask, box in zip(found.masks, found.boxes, strict=True):
        columns = np.flatnonzero(decode_mask(bytes(mask), 240, 320, None, 1e6).any(axis=0))
        assert (box[0], box[2]) == (columns[0], columns[-1] + 1 - columns[0])
    assert found.scores[0] == 0.9
    assert found.object_ids == [1] * len(found.masks)
    assert found.inference_time is not None
    assert 0 < found.inference_time <= found.seconds


@mode("ism", ["good"], indirect=True)
def test_the_masks_are_of_the_things_in_the_scene(ism: IsmServer) -> None:
    found = [decode_mask(bytes(mask), 240, 320, None, 1e6) for mask in find(ism.url).masks]
    best = [max((mask & one.mask).sum() / (mask | one.mask).sum() for mask in found) for one in scene().instances]
    assert max(best) > 0.7


@mode("ism", ["good"], indirect=True)
def test_pictures_camera_and_paths_are_passed_on_untouched(ism: IsmServer) -> None:
    find(ism.url)
    asked = ism.asked[0]
    images = msgspec.convert({k: asked[k] for k in ("rgb_image", "depth_image")}, dict[str, bytes])
    assert (images["rgb_image"], images["depth_image"]) == pictures()
    assert asked["cam_params"] == {"cam_K": scene().K.ravel().tolist(), "depth_scale": scene().depth_scale_mm}
    assert asked["template_dir"] == "templates/part"
    assert asked["cad_path"] == "part.ply"
    assert "output_dir" not in asked


@mode("ism", ["nested"], indirect=True)
def test_nested_lists_are_passed_on_as_they_are(ism: IsmServer) -> None:
    for mask in find(ism.url).masks:
        assert bytes(mask).startswith(b"[[")
        assert decode_mask(bytes(mask), 240, 320, None, 1e6).any()


@mode("ism", ["masks_only"], indirect=True)
def test_only_masks_are_required(ism: IsmServer) -> None:
    found = find(ism.url)
    count = len(found.masks)
    assert (found.boxes, found.scores, found.object_ids) == ([[]] * count, [1.0] * count, [None] * count)


@mode("ism", ["500_once", "drop_once"], indirect=True)
def test_a_failure_that_may_pass_is_tried_once_more(ism: IsmServer) -> None:
    assert find(ism.url).masks
    assert ism.attempts == 2


@mode(
    "ism, attempts, words",
    [
        ("500", 2, "answered with status 500, twice in a row"),
        ("422", 1, "answered with status 422"),
        ("error_in_200", 1, "reported a failure: no templates in …"),
        ("unsuccessful", 1, "reported a failure: model not loaded"),
        ("garbage", 1, "cannot be used: it is not JSON"),
        ("wrong_types", 1, "cannot be used: Expected `float`, got `str`, at detections.scores"),
        ("unequal", 1, "masks and"),
    ],
    indirect=["ism"],
)
def test_a_failure_is_never_an_empty_scene(ism: IsmServer, attempts: int, words: str) -> None:
    error = failure(ism.url)
    assert (error.code, error.status) == ("ism_failed", 502)
    assert words in error.detail
    assert "127.0.0.1" not in error.detail
    assert "/" not in error.detail
    assert ism.attempts == attempts


@mode("ism", ["hang"], indirect=True)
def test_a_server_that_hangs_is_given_up_at_the_timeout(ism: IsmServer) -> None:
    pictures()  # which take their time
    started = time.monotonic()
    error = failure(ism.url, timeout_s=1.5)
    assert time.monotonic() - started < 30, "before the answer would have come"
    assert (error.code, ism.attempts) == ("ism_failed", 1)
    assert "within 1.5 s" in error.detail


@mode("ism", ["hang"], indirect=True)
def test_a_deadline_that_comes_first_is_504(ism: IsmServer) -> None:
    pictures()
    error = failure(ism.url, deadline_in_s=1.0)
    assert (error.code, error.status) == ("deadline", 504)


def test_a_deadline_that_has_passed_asks_nobody() -> None:
    with IsmServer() as server:
        assert failure(server.url, deadline_in_s=-1).code == "deadline"
    assert server.attempts == 0


def test_a_server_that_is_not_there_is_502_without_its_address() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        error = failure(f"http://user:secret@127.0.0.1:{port}")
    assert error.code == "ism_failed"
    assert "could not be reached" in error.detail
    assert str(port) not in error.detail
    assert "secret" not in error.detail


def test_an_address_that_is_none_is_502() -> None:
    assert failure("localhost").code == "ism_failed"
    assert failure("http://[::bad").code == "ism_failed"


def test_without_a_server_configured_it_is_503() -> None:
    error = failure(None)
    assert (error.code, error.status) == ("no_ism", 503)


def test_health_follows_the_server() -> None:
    with IsmServer() as server:
        assert with_client(Ism(url=server.url), lambda client: client.healthy())
        assert not with_client(Ism(url=server.url + "/elsewhere"), lambda client: client.healthy())
    assert not with_client(Ism(url=server.url), lambda client: client.healthy())
    assert not with_client(Ism(), lambda client: client.healthy())


def test_a_scene_without_detections_is_an_answer() -> None:
    answer = b'{"success": true, "detections": {"masks": [], "error": null}, "error_message": ""}'
    assert from_text(answer).masks == []


def test_a_box_that_is_none_is_left_to_the_mask() -> None:
    answer = b'{"detections": {"masks": [1, 2, 3], "boxes": [[4, 5, 10, 9], [0, 0, -1, -1], null]}}'
    assert from_text(answer).boxes == [[4, 5, 6, 4], [], []]


@mode("answer", [b"{}", b'{"detections": {}}', b'{"success": true, "detections": null}', b"[]", b"", b"\xff"])
def test_an_answer_without_masks_is_refused(answer: bytes) -> None:
    with pytest.raises(ApiError, match="cannot be used"):
        from_text(answer)


def from_text(answer: bytes) -> Found:
    """Return what the client makes of a 200 with this body."""

    class Fixed(IsmServer):
        def answer(self, question: dict[str, Any]) -> tuple[int, bytes]:
            return 200, answer

    with Fixed() as server:
        return find(server.url)
