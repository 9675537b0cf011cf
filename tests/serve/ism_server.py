"""A small instance-segmentation server that speaks the ISM side of the contract and really segments.

It uses the depth picture alone: what stands on the largest plane is an instance, best seen first. For the tests of
the full pipeline, in a thread (`with IsmServer() as server: ... server.url`) or by itself
(`python tests/serve/ism_server.py --port 8010`). `mode` makes it fail the way real ones do.
"""

from __future__ import annotations

import argparse
import base64
import json
import threading
import time
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self

import cv2
import numpy as np

from pem.rle import encode_rle
from posekit.io.masks import mask_box
from posekit.synthetic.scenes import segment_by_depth

MODES: Final = (
    "good",  # its detections: RLE masks, xyxy boxes, scores, object ids
    "nested",  # like "good", with nested 0/1 lists for masks
    "masks_only",  # no boxes, scores or ids
    "error_in_200",  # status 200, detections.error
    "unsuccessful",  # status 200, success false
    "500_once",  # the first request fails, the next ones are good
    "500",
    "422",
    "drop_once",  # closes the connection without an answer, once
    "hang",  # answers after HANG_S
    "garbage",  # status 200, no JSON
    "wrong_types",  # status 200, JSON of another shape
    "unequal",  # columns of different lengths
)
HANG_S: Final = 60.0


class IsmServer:
    """The server in a thread, on a free port of loopback unless told otherwise; `asked` holds the requests it got."""

    def __init__(self, mode: str = "good", port: int = 0) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode}")
        self.mode = mode
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Message] = []  # headers of the requests in `asked`
        self.attempts = 0
        self.stopping = threading.Event()
        self._http = _Http(("127.0.0.1", port), _Handler)
        self._http.ism = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        """Return its address."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def start(self) -> Self:
        """Start to answer."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop, a hanging answer included."""
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def answer(self, question: dict[str, Any]) -> tuple[int, bytes]:
        """Return status and body for one request, by mode; status 0 closes the connection."""
        self.asked.append(question)
        self.attempts += 1
        first = self.attempts == 1
        match self.mode:
            case "500" | "500_once" if first or self.mode == "500":
                return 500, b'{"detail": "CUDA out of memory at /opt/ism/model.py"}'
            case "422":
                return 422, b'{"detail": "template_dir does not exist"}'
            case "drop_once" if first:
                return 0, b""
            case "hang":
                self.stopping.wait(HANG_S)
            case "garbage":
                return 200, b"<html>502 Bad Gateway</html>"
            case "wrong_types":
                return 200, b'{"success": true, "detections": {"masks": [], "scores": ["high"]}}'
            case "error_in_200":
                detections = {
                    "masks": [],
                    "boxes": [],
                    "scores": [],
                    "object_ids": [],
                    "error": "no templates in /srv/t",
                }
                return 200, json.dumps({"success": True, "detections": detections, "inference_time": 0.0}).encode()
            case "unsuccessful":
                return 200, b'{"success": false, "detections": null, "error_message": "model not loaded"}'
        try:
            return 200, json.dumps(self._segment(question)).encode()
        except (KeyError, ValueError) as error:
            return 422, json.dumps({"success": False, "error_message": str(error)}).encode()

    def _segment(self, question: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        for name in ("rgb_image", "depth_image", "cam_params", "template_dir"):
            if name not in question:
                raise ValueError(f"{name} is missing")
        depth_raw = _picture(question["depth_image"])
        if depth_raw.dtype != np.uint16:
            raise ValueError("depth must be a 16-bit PNG")
        depth_m = (depth_raw * (question["cam_params"]["depth_scale"] / 1000)).astype(np.float32)
        K = np.array(question["cam_params"]["cam_K"], dtype=np.float64).reshape(3, 3)
        found = segment_by_depth(depth_m, K)
        boxes = [mask_box(mask) or (0, 0, -1, -1) for mask in found]
        as_lists = self.mode == "nested"
        detections: dict[str, Any] = {"masks": [m.astype(int).tolist() if as_lists else encode_rle(m) for m in found]}
        if self.mode != "masks_only":
            detections |= {
                "boxes": [[x, y, x + width, y + height] for x, y, width, height in boxes],
                "scores": [round(0.9 - 0.01 * index, 3) for index in range(len(found))],
                "object_ids": [1] * len(found),
            }
        if self.mode == "unequal":
            detections["scores"].append(0.5)
        return {
            "success": True,
            "detections": detections,
            "inference_time": time.perf_counter() - started,
            "error_message": None,
        }


def _picture(text: str) -> np.ndarray[Any, Any]:
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(text, validate=True), np.uint8), cv2.IMREAD_UNCHANGED)
    if picture is None:
        raise ValueError("a picture does not parse")
    return picture


class _Http(ThreadingHTTPServer):
    daemon_threads = False
    ism: IsmServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    server: _Http

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, b'{"status": "healthy"}')
        else:
            self._send(404, b"{}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/api/v1/inference":
            self._send(404, b"{}")
            return
        self.server.ism.headers.append(self.headers)
        status, answer = self.server.ism.answer(json.loads(body))
        if status == 0:
            self.close_connection = True
            return
        self._send(status, answer)

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8010)
    parser.add_argument("--mode", choices=MODES, default="good")
    options = parser.parse_args()
    server = IsmServer(options.mode, options.port).start()
    print(f"listening on {server.url}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.stop()


if __name__ == "__main__":
    main()
