"""A server that a real Prometheus scrapes every second, and clients that count every answer."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from benchmarks.service.prometheus import Prometheus, running_prometheus
from pem import rle
from serve.gateway import keys
from serve.gateway.routes import find
from tests.running import RunningServer, register
from tests.serve.tiny import FULL, HEIGHT, NAMES, POSE, SEG, WIDTH, masks_of, one, tiny_question, tiny_scene


@dataclass
class Watched:
    """The server, its Prometheus, and its clients' counts."""

    server: RunningServer
    prometheus: Prometheus
    key: str  # API key without a rate limit of its own
    slow_key: str  # API key with one request in ten seconds
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)  # (route, status)
    rows: Counter[str] = field(default_factory=Counter)  # `ok`, or the reason of a rejection
    sure: Counter[str] = field(default_factory=Counter)  # object -> its confident poses

    def send(self, method: str, path: str, *, key: str | None = None, **content: Any) -> httpx.Response:
        """Send any request; its answer is counted."""
        headers = {"X-API-Key": self.key if key is None else key, **content.pop("headers", {})}
        answer = httpx.request(method, self.server.url + path, headers=headers, timeout=120, **content)
        self.answers[find(path).label, answer.status_code] += 1
        return answer

    def ask(self, tree: Any, route: str = POSE, **how: Any) -> httpx.Response:
        """Send a pose request as MessagePack; its rows are counted."""
        headers = {"Content-Type": "application/msgpack"}
        answer = self.send("POST", route, content=msgspec.msgpack.encode(tree), headers=headers, **how)
        for row in answer.json().get("poses") or []:
            self.rows[row["error"]["code"] if row["status"] == "rejected" else "ok"] += 1
            self.sure[row["object_id"]] += row["status"] == "ok"
        return answer


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Start a server with API keys, an object allowed as a label, and batches in its pose stage; and its Prometheus."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: the package prometheus)")
    folder = tmp_path_factory.mktemp("watched")
    key = keys.add(folder / "data" / "keys.json", "load")
    slow_key = keys.add(folder / "data" / "keys.json", "slow", rate=0.1)
    settings = {"metrics_objects": NAMES[0], "pose_batch_requests": 4, "pose_threads": 1}
    with RunningServer(folder / "data", settings) as server:
        for instance in tiny_scene().instances:
            register(server.url, instance.shape, X_API_Key=key)
        with running_prometheus(server.url, folder / "prometheus") as prometheus:
            prometheus.wait_for_scrape()
            yield Watched(server, prometheus, key, slow_key)


def every_kind_of_request(watched: Watched) -> None:
    """Send each kind of request: poses, detections without one, mistakes, refusals, other routes."""
    nothing = np.zeros((HEIGHT, WIDTH), dtype=bool)
    speck = nothing.copy()
    speck[5, 5] = True
    for index in (0, 1, 0):
        assert watched.ask(one(index)).status_code == 200
    assert watched.ask(tiny_question().body()).status_code == 200
    assert (
        watched.ask(
            one(detections=masks_of(*(dict(rle.encode_rle(mask)) for mask in (nothing, speck))), init_poses=...)
        ).status_code
        == 200
    )
    assert watched.ask(tiny_question().body(indices=[])).status_code == 200
    assert watched.ask(one(init_poses=[])).status_code == 422
    assert watched.ask(one(), FULL).status_code in (422, 503)
    assert (
        watched.send("POST", SEG, content=b"\xc1", headers={"Content-Type": "application/msgpack"}).status_code == 400
    )
    assert watched.send("POST", POSE, content=b"{", headers={"Content-Type": "text/html"}).status_code == 415
    assert watched.send("POST", POSE, key="").status_code == 401
    assert watched.send("POST", POSE, key="pem_wrong").status_code == 403
    assert 429 in {watched.send("POST", POSE, key=watched.slow_key, content=b"x").status_code for _ in range(5)}
    for path in ("/livez", "/api/v1/status", "/api/v1/objects", "/v2/models/pem"):
        assert watched.send("GET", path).status_code == 200
    assert watched.send("GET", "/api/v1/objects/nothing").status_code == 404
    assert watched.send("DELETE", POSE).status_code == 405
    assert watched.send("GET", "/favicon.ico").status_code == 404
