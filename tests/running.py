"""A running server for the tests: its processes, its address, its scene."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec
import numpy as np

from pem import rle
from pem.host.ports import free_port
from posekit.io import images
from posekit.synthetic import scenes, shapes
from workers.state import WorkerState, read_states

ROOT = Path(__file__).parents[1]
START_LIMIT_S = 240.0
SMALL = {
    "pose_workers": 1,
    "decode_workers": 1,
}  # settings of a server that starts in less CPU: most tests need no more
ANSWER_S = 30.0  # time that a busy machine may take for an answer that costs nothing


@dataclass
class RunningServer:
    """`pem serve` as a child process. Its standard error goes to `<data>/stderr.log`."""

    data: Path
    settings: dict[str, Any] = field(default_factory=dict)  # PEM_ variables without the prefix
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop the server cleanly, and fail if it does not; kill it if the block failed."""
        if self.process is None or self.process.poll() is not None:
            return
        if kind is not None:
            self.kill()
        else:
            assert self.stop() == 0, self.log()[-4000:]

    def start(self, wait: bool = True) -> Self:
        """Start the server; with `wait`, return when it is ready."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PEM_")}
        environment["PEM_CHECKPOINTS_DIR"] = str(self.data / "checkpoints")  # not the project's folder
        environment |= {f"PEM_{name.upper()}": str(value) for name, value in self.settings.items()}
        self.data.mkdir(parents=True, exist_ok=True)
        with (self.data / "stderr.log").open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pem", "serve", "--port", str(self.port), "--data-dir", str(self.data)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.process.kill()  # or it would go on for the rest of the run
                raise
        return self

    def wait_ready(self, seconds: float = START_LIMIT_S) -> float:
        """Wait until /readyz answers 200; return the seconds waited."""
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log()[-4000:]}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200:
                    return time.monotonic() - begun
            time.sleep(0.05)
        raise AssertionError(f"not ready after {seconds} s:\n{self.log()[-4000:]}")

    def stop(self, seconds: float = 60.0) -> int:
        """Send SIGTERM, then wait; return the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def kill(self) -> None:
        """Send SIGKILL to the gateway alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(ANSWER_S)

    def log(self) -> str:
        """Return everything that the server wrote to standard error."""
        return (self.data / "stderr.log").read_text(errors="replace")

    def lines(self, words: str) -> list[str]:
        """Return the complete lines that contain `words`."""
        whole = self.log().rpartition("\n")[0]
        return [line for line in whole.splitlines() if words in line]

    def logged(self, words: str) -> list[str]:
        """Return the complete lines with `words`, once there is one: a line is written a moment after the answer."""
        wait_until(lambda: self.lines(words), ANSWER_S, f"{words} in the log")
        return self.lines(words)

    def status(self, **headers: str) -> dict[str, Any]:
        """GET /api/v1/status"""
        answer = httpx.get(f"{self.url}/api/v1/status", headers=_named(headers), timeout=ANSWER_S)
        assert answer.status_code == 200, answer.text
        tree: dict[str, Any] = answer.json()
        return tree

    def says(self, readiness: int) -> bool:
        """Return True if /readyz answers with this status."""
        return httpx.get(f"{self.url}/readyz", timeout=ANSWER_S).status_code == readiness

    def wait_for_queue(self, *, requests: int, **headers: str) -> None:
        """Wait until `requests` pose requests are waiting or being computed."""
        wait_until(lambda: self.status(**headers)["queue"]["requests"] == requests, ANSWER_S, f"{requests} requests")

    def wait_idle(self, seconds: float = 120.0) -> None:
        """Wait until no pose request is waiting, and none of their detections is being computed."""
        idle = {"requests": 0, "detections": 0}
        wait_until(lambda: self.status()["queue"] == idle, seconds, "the queue to be empty")

    @property
    def run_dir(self) -> Path:
        """Return the folder where its workers leave their state (new after each start)."""
        bases = [Path(self.settings.get("spool_dir", "/dev/shm")), Path(tempfile.gettempdir())]
        for base in bases:
            for path in base.glob(f"pem-server-{self.pid}-*"):
                return path
        raise AssertionError("no run directory")

    def workers(self, stage: str | None = None) -> list[WorkerState]:
        """Return the living, ready workers."""
        return [s for s in read_states(self.run_dir) if s.alive and s.ready and stage in (None, s.stage)]

    def paused(self, stage: str) -> contextlib.AbstractContextManager[None]:
        """Pause all workers of a stage during the block: its requests wait, however fast the machine is."""
        pids = [worker.pid for worker in self.workers(stage)]
        assert pids, f"no {stage} worker"
        return paused(pids)

    def nobody_replaced(self) -> contextlib.AbstractContextManager[None]:
        """Prevent dead workers from being replaced during the block, by pausing the process that would replace them."""
        return paused(self.children())

    def descendants(self) -> list[int]:
        """Return every process below the gateway, keepers included."""
        children = _children()
        found: list[int] = []
        queue = [self.pid]
        while queue:
            below = children.get(queue.pop(), [])
            found += below
            queue += below
        return found

    def children(self) -> list[int]:
        """Return the gateway's direct children: Mosec's main process."""
        return _children().get(self.pid, [])


def _children() -> dict[int, list[int]]:
    """Return every process's direct children."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found.setdefault(parent, []).append(int(entry.name))
    return found


def running(pid: int) -> bool:
    """Return True if a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


@contextlib.contextmanager
def paused(pids: Iterable[int]) -> Iterator[None]:
    """Stop processes during the block, as unresponsive as inside a long native call; some may end meanwhile."""
    stopped: list[int] = []
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                stopped.append(pid)
        yield
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def wait_until(condition: Any, seconds: float, what: str) -> None:
    """Poll until `condition()` holds; raise AssertionError with `what` if it does not in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")


class Question:
    """The demo scene as a request: pictures encoded once, any field replaceable."""

    def __init__(self, scene: scenes.Scene | None = None) -> None:
        self.scene = scene or scenes.demo_scene()
        self.rgb = images.encode_png(self.scene.rgb)
        self.depth = images.encode_png(self.scene.depth_raw)
        self.cam_params = {"cam_K": [float(x) for x in self.scene.K.ravel()], "depth_scale": self.scene.depth_scale_mm}
        self.masks = [dict(rle.encode_rle(instance.mask)) for instance in self.scene.instances]
        self.names = [instance.shape.name for instance in self.scene.instances]

    def body(self, *, indices: list[int] | None = None, **changes: Any) -> dict[str, Any]:
        """Return the request as a tree with raw pictures: detections of `indices` (all by default), objects by name."""
        chosen = list(range(len(self.masks))) if indices is None else indices
        tree: dict[str, Any] = {
            "rgb_image": self.rgb,
            "depth_image": self.depth,
            "cam_params": self.cam_params,
            "detections": {"masks": [self.masks[i] for i in chosen], "object_ids": [self.names[i] for i in chosen]},
            "objects": {name: {"object_id": name} for name in sorted({self.names[i] for i in chosen})},
        }
        tree.update(changes)
        return {key: value for key, value in tree.items() if value is not ...}

    def register(self, url: str) -> None:
        """Upload the CAD of every object in the scene under its shape's name, and wait until it is onboarded."""
        for shape in {i.shape.name: i.shape for i in self.scene.instances}.values():
            register(url, shape)

    def errors(self, index: int, row: dict[str, Any]) -> tuple[float, float]:
        """Return (rotation error in degrees, translation error in mm) of an answered row for detection `index`."""
        T_est = np.eye(4)
        T_est[:3, :3] = row["rotation"]
        T_est[:3, 3] = np.array(row["translation"]) / 1000
        truth = self.scene.instances[index]
        return scenes.pose_errors(T_est, truth.T_cam_obj, truth.shape.symmetries)


def register(url: str, shape: shapes.Shape, **headers: str) -> dict[str, Any]:
    """Upload one shape's CAD and wait until it is onboarded."""
    answer = httpx.post(
        f"{url}/api/v1/objects",
        params={"wait": "300"},
        files={
            "file": (f"{shape.name}.ply", shapes.mesh_to_ply(shape.mesh)),
            "request": (None, msgspec.json.encode({"name": shape.name})),
        },
        headers=_named(headers),
        timeout=330,
    )
    assert answer.status_code in (200, 201), answer.text
    tree: dict[str, Any] = answer.json()
    assert tree["status"] == "ready", tree
    return tree


def post(
    url: str,
    tree: dict[str, Any],
    *,
    route: str = "/api/v1/pose_estimation",
    as_json: bool = False,
    timeout: float = 120,
    **headers: str,
) -> httpx.Response:
    """POST a request tree as MessagePack (answer in JSON), or as JSON."""
    encode = msgspec.json.encode if as_json else msgspec.msgpack.encode
    content_type = "application/json" if as_json else "application/msgpack"
    return httpx.post(
        f"{url}{route}",
        content=encode(tree),
        headers={"Content-Type": content_type, **_named(headers)},
        timeout=timeout,
    )


def _named(headers: dict[str, str]) -> dict[str, str]:
    """Turn keywords into headers: X_API_Key=... becomes X-API-Key."""
    return {name.replace("_", "-"): value for name, value in headers.items()}
