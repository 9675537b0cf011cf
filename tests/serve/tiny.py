"""A scene of two objects in a small picture, so that a request is cheap, and a client that checks every answer.

The two objects' CAD is part of the demo scene, so it is registered on the shared server.
"""

from __future__ import annotations

import functools
import socket
from typing import Any

import httpx
import msgspec
import numpy as np

from posekit.engine import Float64
from posekit.render import Caster
from posekit.synthetic.scenes import Scene, SceneInstance
from posekit.synthetic.shapes import SHAPES, mesh_to_ply, rotation
from tests.running import Question

WIDTH, HEIGHT = 160, 120
NAMES = ("stepped", "wedge")  # the second is the cheaper one to search for
POSE, FULL, SEG, OBJECTS = (
    "/api/v1/pose_estimation",
    "/api/v1/full_pipeline",
    "/api/v1/pose-estimation",
    "/api/v1/objects",
)
#: Texts that no answer to a client may contain.
SECRETS = ("Traceback", "site-packages", "/dev/shm", "/tmp/", ".safetensors", "serve/", "workers/", "posekit")


@functools.cache
def tiny_scene() -> Scene:
    """Make two parts 0.4 m away, before a wall, without noise; depth in tenths of a millimetre."""
    turns = (
        rotation((1, 0, 0), -40) @ rotation((0, 1, 0), 30),
        rotation((1, 0, 0), 35) @ rotation((0, 1, 0), -40) @ rotation((0, 0, 1), 20),
    )
    places = ((-0.08, 0.01, 0.40), (0.08, 0.0, 0.42))
    poses = [np.eye(4), np.eye(4)]
    for T_cam_obj, R, t in zip(poses, turns, places, strict=True):
        T_cam_obj[:3, :3], T_cam_obj[:3, 3] = R, t
    shapes = [SHAPES[name]() for name in NAMES]
    K = np.array([[170.0, 0, WIDTH / 2 - 0.5], [0, 170.0, HEIGHT / 2 - 0.5], [0, 0, 1]])
    seen = Caster([shape.mesh for shape in shapes], poses).render(np.eye(4), K, WIDTH, HEIGHT)
    there = seen.depth_m > 0
    return Scene(
        rgb=np.where(there[..., None], seen.rgb, 90).astype(np.uint8),
        depth_raw=np.rint(np.where(there, seen.depth_m, 0.7) * 10_000).astype(np.uint16),
        depth_scale_mm=0.1,
        K=K,
        instances=[
            SceneInstance(shape=shape, T_cam_obj=T, mask=np.asarray(seen.instance == index), visibility=1.0)
            for index, (shape, T) in enumerate(zip(shapes, poses, strict=True))
        ],
    )


@functools.cache
def tiny_question() -> Question:
    """Return the scene as a request of a few kilobytes."""
    return Question(tiny_scene())


def truth(index: int) -> dict[str, Any]:
    """Return the true pose of an object in the scene as an entry of `init_poses`: from there no search is needed."""
    T_cam_obj = tiny_scene().instances[index].T_cam_obj
    return {"rotation": T_cam_obj[:3, :3].tolist(), "translation": (T_cam_obj[:3, 3] * 1000).tolist()}


def one(index: int = 1, **changes: Any) -> dict[str, Any]:
    """Return a request for one object of the scene, with its pose given as a start; `...` removes a field."""
    return tiny_question().body(indices=[index], **{"init_poses": [truth(index)], **changes})


def masks_of(*masks: Any, **columns: Any) -> dict[str, Any]:
    """Return detections of the wedge with these masks."""
    return {"masks": list(masks), "object_ids": [NAMES[1]] * len(masks), **columns}


def ply(index: int = 1, unit: Any = "mm") -> bytes:
    """Return the CAD file of an object in the scene."""
    return mesh_to_ply(tiny_scene().instances[index].shape.mesh, unit)


def tetrahedron(size_mm: float = 60.0) -> Float64:
    """Return the corners (4, 3) of a small lopsided mesh; its faces are FACES."""
    return np.array([[0.0, 0, 0], [1, 0, 0], [0, 0.8, 0], [0.1, 0.2, 0.6]]) * size_mm


FACES = ((0, 2, 1), (0, 1, 3), (1, 2, 3), (0, 3, 2))


def ascii_ply(vertices: Any, faces: Any = FACES) -> bytes:
    """Write a PLY with any numbers."""
    lines = ["ply", "format ascii 1.0", f"element vertex {len(vertices)}"]
    lines += [f"property float {axis}" for axis in "xyz"]
    lines += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
    lines += [" ".join(str(x) for x in vertex) for vertex in vertices]
    lines += [" ".join(str(x) for x in (len(face), *face)) for face in faces]
    return ("\n".join(lines) + "\n").encode()


def uploading(port: int, data: bytes, *, send: int | None = None) -> socket.socket:
    """Open a connection and send (the beginning of) an upload that would wait for its onboarding."""
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.ply"\r\n\r\n' + data + b"\r\n--x--\r\n"
    head = (
        f"POST {OBJECTS}?wait=60 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(head.encode() + body[:send])
    return connection


class Asker:
    """Sends requests to one server on one connection, and checks every answer for what holds for all."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=330)

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *failure: object) -> None:
        self.http.close()

    def send(self, method: str, path: str, *, headers: dict[str, str] | None = None, **content: Any) -> httpx.Response:
        """Send any request; check that the answer has an id and a timing, and leaks nothing of the server's inside."""
        answer = self.http.request(method, path, headers=headers, **content)
        assert answer.headers["X-Request-Id"]
        assert "total;dur=" in answer.headers["Server-Timing"]
        if "json" in answer.headers.get("Content-Type", "") and path != "/openapi.json":
            found = [secret for secret in SECRETS if secret.encode() in answer.content]
            assert not found, f"{found} in {answer.text[:500]}"
        return answer

    def post(
        self,
        tree: Any,
        route: str = POSE,
        *,
        as_json: bool = False,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """Send a request tree as MessagePack, or as JSON."""
        module = msgspec.json if as_json else msgspec.msgpack
        media = "application/json" if as_json else "application/msgpack"
        return self.send("POST", route, content=module.encode(tree), headers={"Content-Type": media, **(headers or {})})

    def poses(self, tree: Any, **how: Any) -> list[dict[str, Any]]:
        """Return the rows of a request that must succeed."""
        rows: list[dict[str, Any]] = self.ok(tree, **how)["poses"]
        return rows

    def ok(self, tree: Any, **how: Any) -> dict[str, Any]:
        """Return the answer of a request that must succeed."""
        response = self.post(tree, **how)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        assert answer["success"] is True, answer
        assert answer["error_message"] is None
        return answer

    def refused(self, tree: Any, status: int, code: str, field: str | None = None, **how: Any) -> dict[str, Any]:
        """Return the error of a request that must fail in this way."""
        return refusal(self.post(tree, **how), status, code, field)

    def upload(
        self, data: bytes, file_name: str = "part.ply", *, wait: float | None = 300, **request: Any
    ) -> httpx.Response:
        """POST /api/v1/objects"""
        files: dict[str, Any] = {"file": (file_name, data)}
        if request:
            files["request"] = (None, msgspec.json.encode(request))
        return self.send("POST", OBJECTS, params={} if wait is None else {"wait": str(wait)}, files=files)


def refusal(response: httpx.Response, status: int, code: str, field: str | None = None) -> dict[str, Any]:
    """Check a failure against the contract: the answer's schema, its words, its code, the field at fault."""
    assert (response.status_code, response.json().get("error", {}).get("code")) == (status, code), response.text
    answer = response.json()
    error: dict[str, Any] = answer["error"]
    assert answer["success"] is False
    assert answer["error_message"] == error["detail"]
    assert error["request_id"] == response.headers["X-Request-Id"]
    assert len(error["detail"]) > 8
    if field is not None:
        assert error.get("field") == field, error
    if status in (429, 503) and code != "no_ism":
        assert int(response.headers["Retry-After"]) >= 1
    else:
        assert "Retry-After" not in response.headers
    return error
