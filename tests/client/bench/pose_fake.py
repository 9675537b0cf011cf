"""A server without an engine that answers pose requests as a test says, over real sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import msgspec
import numpy as np

from pem.bench.sample import Question, Target, Truth
from posekit.engine import Float64, Symmetries

Reply = tuple[int, dict[str, str], Any]  # status, headers, tree of the body
TIMING = {
    "decode_ms": 1.0,
    "queue_ms": 2.0,
    "pose_ms": 3.0,
    "respond_ms": 0.5,
    "total_ms": 10.0,
    "batch_detections": 4,
    "batch_requests": 2,
}


class PoseFake:
    """`reply(number, body)` makes each pose answer; `number` counts from 0. `page`: the text of /metrics."""

    def __init__(self, reply: Callable[[int, bytes], Reply], page: Callable[[], str] | None = None) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []  # path and headers of each pose request
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are sent in two pieces; the second must not wait

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path.startswith("/api/v1/objects"):
                    return self._answer(200, {}, _object())
                with fake._lock:
                    number = len(fake.asked)
                    fake.asked.append((self.path, dict(self.headers)))
                self._answer(*reply(number, body))

            def do_GET(self) -> None:
                if self.path == "/metrics" and page is not None:
                    return self._send(200, {}, page().encode(), "text/plain")
                if self.path == "/api/v1/objects":
                    return self._answer(200, {}, {"objects": []})
                self._answer(404, {}, {"error": {"code": "not_found", "detail": "no such route"}})

            def _answer(self, status: int, headers: dict[str, str], tree: Any) -> None:
                packed = self.headers.get("Accept") == "application/msgpack"
                encode = msgspec.msgpack.encode if packed else msgspec.json.encode
                self._send(status, headers, encode(tree), "application/msgpack" if packed else "application/json")

            def _send(self, status: int, headers: dict[str, str], body: bytes, content_type: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def target(self) -> Target:
        return Target(url=f"http://127.0.0.1:{self._server.server_address[1]}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()


def row(T_cam_obj: Float64 | None) -> dict[str, Any]:
    """Make an answer's row with this pose (metres); None: rejected."""
    if T_cam_obj is None:
        return {"status": "rejected", "rotation": None, "translation": None, "error": {"code": "no_fit", "detail": "-"}}
    return {
        "status": "ok",
        "rotation": T_cam_obj[:3, :3].tolist(),
        "translation": (T_cam_obj[:3, 3] * 1000).tolist(),
    }


def answer(*poses: Float64 | None, **changes: Any) -> dict[str, Any]:
    """Make a pose answer with these poses."""
    return {"success": True, "poses": [row(pose) for pose in poses], "timing": TIMING, **changes}


def pose(x_mm: float = 0.0, turn_deg: float = 0.0) -> Float64:
    """Return a pose half a metre before the camera, shifted by `x_mm` and turned by `turn_deg` about z."""
    T_cam_obj = np.eye(4)
    angle = np.radians(turn_deg)
    T_cam_obj[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    T_cam_obj[:3, 3] = x_mm / 1000, 0.0, 0.5
    return T_cam_obj


def question(*truths: Float64 | None, symmetries: Symmetries | None = None, body: bytes = b"{}") -> Question:
    """Make a question whose right answers are these poses."""
    return Question(
        name=f"{len(truths)} masks",
        body=body,
        content_type="application/json",
        truths=tuple(
            Truth(object_name="part", T_cam_obj=truth, symmetries=symmetries or Symmetries()) for truth in truths
        ),
        headers={"Accept": "application/json"},
    )


def _object() -> dict[str, Any]:
    health = {"faces": 4, "watertight": True, "extents_mm": [1.0, 1.0, 1.0], "diameter_mm": 1.7, "warnings": []}
    known = {"object_id": "0" * 64, "name": None, "status": "ready", "progress": 1.0, "model_unit": "mm"}
    return {**known, "health": health, "symmetries": None}
