"""Two servers behind nginx, as in docs/SCALING.md: one copies the other's objects, and is stopped under load."""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pem.host.ports import free_port
from serve.settings import Settings
from tests.running import ROOT, Question, RunningServer, post, wait_until
from tests.serve.tiny import tiny_question

CONFIGURATION = (ROOT / "deploy/nginx.conf").read_text()
COPY_PATCH = ROOT / "deploy/kubernetes/components/library/server.yaml"
CLIENTS = 4
LONGEST_S = 120.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx (Debian's nginx-light)"),
]


@dataclass
class Proxy:
    """nginx with the configuration of the deployment, on ports of this test."""

    folder: Path
    upstreams: tuple[int, int]
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Proxy:
        """Start it; returns when it answers."""
        configuration = CONFIGURATION
        for old, new in {8003: self.upstreams[0], 8004: self.upstreams[1], 8080: self.port}.items():
            address = f"127.0.0.1:{old}"
            assert configuration.count(address) == 1, address
            configuration = configuration.replace(address, f"127.0.0.1:{new}")
        (self.folder / "pem.conf").write_text(configuration)
        temporary = "".join(
            f"{what}_temp_path {self.folder / what};\n" for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (self.folder / "nginx.conf").write_text(
            f"daemon off; worker_processes 1; pid {self.folder}/pid; error_log {self.folder}/error.log;\n"
            "events {}\n"
            f"http {{\n{temporary}log_format tries '$status: $upstream_status';\n"
            f"access_log {self.folder}/access.log tries;\ninclude {self.folder}/pem.conf;\n}}\n"
        )
        self.process = subprocess.Popen(
            ["nginx", "-e", str(self.folder / "start.log"), "-c", str(self.folder / "nginx.conf")],
            stdin=subprocess.DEVNULL,
        )
        wait_until(self.answers, 60, "nginx answers")
        return self

    def answers(self) -> bool:
        """Return True if nginx answers."""
        try:
            return httpx.get(f"{self.url}/livez", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def tries(self) -> Counter[str]:
        """Count the outcomes of requests: what the client got, and what each server that was asked answered."""
        return Counter((self.folder / "access.log").read_text().splitlines())

    def stop(self) -> None:
        """Stop it."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


@dataclass
class Pair:
    """Two servers that know the same objects, and nginx before them."""

    staying: RunningServer
    leaving: RunningServer
    proxy: Proxy


@pytest.fixture(scope="module")
def pair(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Start a server with a copy of the shared server's objects, made by the manifest's own command; and nginx."""
    folder = tmp_path_factory.mktemp("scaling")
    data = folder / "data"
    data.mkdir()
    listing = f"{server.url}/api/v1/objects"
    wait_until(lambda: '"onboarding"' not in httpx.get(listing).text, LONGEST_S, "the library is at rest")
    subprocess.run(copy_command(server.data, data), check=True, timeout=120)
    with RunningServer(data) as second:
        proxy = Proxy(folder, (server.port, second.port)).start()
        try:
            yield Pair(server, second, proxy)
        finally:
            proxy.stop()


def copy_command(library: Path, data: Path) -> list[str]:
    """Return the init container's command, with the two volumes moved to this test's folders."""
    container = yaml.safe_load(COPY_PATCH.read_text())["spec"]["template"]["spec"]["initContainers"][0]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    places = {mounts["library"]: str(library), mounts["data"]: str(data)}
    command = container["command"]
    for mounted, here in places.items():
        assert any(word.startswith(mounted) for word in command)
        command = [here + word.removeprefix(mounted) if word.startswith(mounted) else word for word in command]
    return command


@dataclass
class Crowd:
    """Clients that ask one small question again and again, never twice for one answer, and judge each answer."""

    url: str
    question: Question
    stop: threading.Event = field(default_factory=threading.Event)
    right: int = 0
    problems: list[str] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> Crowd:
        """Begin to ask."""
        self.threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()
        return self

    def _ask(self) -> None:
        end = time.monotonic() + 4 * LONGEST_S
        tree = self.question.body()
        while not self.stop.is_set() and time.monotonic() < end:
            try:
                answer = post(self.url, tree, timeout=LONGEST_S)
            except httpx.TransportError as error:
                self.problems.append(repr(error))
                continue
            if problem := self._wrong(answer):
                self.problems.append(problem)
            else:
                self.right += 1

    def _wrong(self, answer: httpx.Response) -> str | None:
        if answer.status_code != 200:
            return f"{answer.status_code}: {answer.text[:200]}"
        rows: list[dict[str, Any]] = answer.json()["poses"]
        errors = [self.question.errors(index, row) for index, row in enumerate(rows)]
        off = [error for error in errors if error[0] > 5 or error[1] > 5]
        return f"poses off by (degrees, mm): {off}" if off else None

    def finish(self) -> None:
        """Stop asking; return when the last client has its answer."""
        self.stop.set()
        for thread in self.threads:
            thread.join(LONGEST_S)
            assert not thread.is_alive()


def answered(server: RunningServer) -> float:
    """Return the number of pose requests that a server has answered with 200."""
    line = 'pose_requests_total{code="200",route="/api/v1/pose_estimation"} '
    page = httpx.get(f"{server.url}/metrics", timeout=30).text
    return float(page.partition(line)[2].split()[0])


def test_a_replica_that_copies_the_library_knows_its_objects_and_onboards_nothing(pair):
    listed = [httpx.get(f"{one.url}/api/v1/objects").json()["objects"] for one in (pair.staying, pair.leaving)]
    assert listed[0] == listed[1]
    assert {"stepped", "wedge"} <= {one["name"] for one in listed[1] if one["status"] == "ready"}
    assert "onboarding_at_start" not in pair.leaving.log()


def test_objects_and_metrics_do_not_pass_through_the_proxy(pair):
    assert httpx.get(f"{pair.proxy.url}/api/v1/objects").status_code == 200
    for call in (httpx.post, httpx.delete):
        assert call(f"{pair.proxy.url}/api/v1/objects/stepped").status_code == 403
    assert httpx.post(f"{pair.proxy.url}/api/v1/objects").status_code == 403
    assert httpx.get(f"{pair.proxy.url}/metrics").status_code == 404


def test_the_proxy_takes_what_the_server_takes_and_waits_for_longer_than_its_deadline():
    settings = Settings()
    assert f"client_max_body_size {settings.limits.body_mb}m;" in CONFIGURATION
    waits_s = int(CONFIGURATION.partition("proxy_read_timeout ")[2].partition("s;")[0])
    assert waits_s > settings.queue.deadline_ms / 1000 + 5


def test_no_request_is_lost_when_one_of_two_servers_is_stopped_under_load(pair, question):
    before = [answered(pair.staying), answered(pair.leaving)]
    crowd = Crowd(pair.proxy.url, tiny_question()).start()
    last: list[httpx.Response] = []
    try:
        for one, count in zip((pair.staying, pair.leaving), before, strict=True):
            wait_until(lambda one=one, count=count: answered(one) >= count + 4, LONGEST_S, "each has answered four")

        # A long request inside, so that the server drains for a while and refuses what nginx goes on sending to it.
        many = question.body(indices=[0] * 6 * CLIENTS)  # more than all of the crowd can have inside
        long = threading.Thread(target=lambda: last.append(post(pair.leaving.url, many)), daemon=True)
        with pair.leaving.paused("pose"):
            long.start()
            wait_until(lambda: pair.leaving.status()["queue"]["detections"] >= 6 * CLIENTS, LONGEST_S, "it is inside")
            pair.leaving.process.send_signal(signal.SIGTERM)
            wait_until(lambda: pair.leaving.says(503), LONGEST_S, "it drains")
        assert pair.leaving.stop() == 0
        long.join(LONGEST_S)

        right = crowd.right
        wait_until(lambda: crowd.right >= right + 8, LONGEST_S, "the other server has answered eight more")
        wait_until(lambda: pair.proxy.tries()["200: 502, 200"] > 0, LONGEST_S, "nginx meets the server that is gone")
    finally:
        crowd.finish()
    assert crowd.problems == []
    assert last[0].status_code == 200, "what was inside when the stop came was finished"
    tries = pair.proxy.tries()
    assert tries["200: 503, 200"] > 0, f"nginx never met the server while it drained: {tries}"
    assert tries["200: 502, 200"] > 0, f"nginx never met the server that was gone: {tries}"
