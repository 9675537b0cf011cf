"""Helpers for the tests of the stages: jobs for one object, and the pipeline as Mosec runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pem.rle import encode_rle
from posekit.io.images import encode_png
from posekit.store import ObjectStore, StoredObject
from posekit.synthetic.scenes import Scene
from posekit.synthetic.shapes import SHAPES
from workers import settings
from workers.messages import (
    Answer,
    Failure,
    Inspected,
    InspectTask,
    Job,
    MaskSpec,
    ObjectRef,
    Onboarded,
    OnboardTask,
    Part,
    PartAnswer,
)
from workers.settings import Stages
from workers.state import WorkerState, read_states

ROOT = Path(__file__).parents[2]
SHAPE = "bracket"


def ascii_ply(vertices_mm: np.ndarray, faces: np.ndarray) -> bytes:
    """Write a mesh as a client would send it."""
    lines = ["ply", "format ascii 1.0", f"element vertex {len(vertices_mm)}"]
    lines += [f"property float {axis}" for axis in "xyz"]
    lines += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
    lines += [f"{x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices_mm]
    lines += [f"3 {a} {b} {c}" for a, b, c in faces]
    return ("\n".join(lines) + "\n").encode()


@dataclass
class Asker:
    """Makes jobs for the scene's objects."""

    scene: Scene
    reference: ObjectRef

    def job(self, masks: list[np.ndarray] | None = None, **changes: Any) -> Job:
        masks = [instance.mask for instance in self.scene.instances] if masks is None else masks
        made = Job(
            request_id="r1",
            rgb=encode_png(self.scene.rgb),
            depth=encode_png(self.scene.depth_raw),
            K=tuple(float(x) for x in self.scene.K.ravel()),  # type: ignore[arg-type]
            depth_scale_mm=self.scene.depth_scale_mm,
            detections=[
                MaskSpec(raw=json.dumps(encode_rle(mask)).encode(), object=0, category=7, score=0.5) for mask in masks
            ],
            objects=[self.reference],
            deadline_unix=time.time() + 60,
        )
        return msgspec.structs.replace(made, **changes)

    def part(self, job: Job | None = None, *, start: int = 0, stop: int | None = None, finish: bool = True) -> Part:
        job = self.job() if job is None else job
        stop = len(job.detections) if stop is None else stop
        part_id = f"{job.request_id}/{start}"
        return Part(part_id=part_id, start=start, stop=stop, job=msgspec.msgpack.encode(job), finish=finish)


def register(
    store: ObjectStore,
    inspect: Callable[[InspectTask], Inspected | Failure],
    onboard: Callable[[OnboardTask], Onboarded | Failure],
    *,
    declared: dict[str, Any] | None = None,
) -> StoredObject:
    """Bring the scene's mesh into a store as the gateway does."""
    mesh = SHAPES[SHAPE]().mesh
    staged = store.stage()
    (staged / "source" / "model.ply").write_bytes(ascii_ply(mesh.vertices_m * 1000.0, mesh.faces))
    inspected = inspect(
        InspectTask(task_id="t1", folder=str(staged), cad_format="ply", model_unit="mm", max_faces=100_000)
    )
    assert isinstance(inspected, Inspected), inspected
    stored = StoredObject(
        object_id=inspected.object_id,
        name=SHAPE,
        cad_format="ply",
        model_unit=inspected.model_unit,
        files=["model.ply"],
        faces=inspected.health.faces,
        watertight=inspected.health.watertight,
        extents_mm=inspected.health.extents_mm,
        diameter_mm=inspected.health.diameter_mm,
        declared_symmetries=declared,
        created_unix=time.time(),
    )
    store.commit(staged, stored)
    onboarded = onboard(OnboardTask(task_id="t2", object_id=stored.object_id))
    assert isinstance(onboarded, Onboarded), onboarded
    return stored


class Pipeline:
    """`python -m serve.app` on a free loopback port."""

    def __init__(self, stages: Stages, folder: Path) -> None:
        self.stages = stages
        self.run_dir = Path(stages.run_dir)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.log = folder / "log.txt"
        options = {"path": folder / "mosec", "port": self.port, "address": "127.0.0.1", "timeout": 60_000}
        options |= {"capacity": 100, "max-request-size": 50_000_000, "log-level": "warning"}
        self.command = [sys.executable, "-m", "serve.app"]
        self.command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        self.environment = os.environ | settings.to_environment(stages)

    def start(self) -> None:
        """Start the pipeline; return when every stage has a worker."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.environment | {"PEM_PARENT_PID": str(os.getpid())},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait_until(self.is_open, "the port opens")

    def remove_sockets(self) -> None:
        """Remove the sockets of a killed front, as its supervisor does: they keep the next front from starting."""
        shutil.rmtree(self.log.parent / "mosec", ignore_errors=True)

    def is_open(self) -> bool:
        """Return True if the front takes connections, which it does once every stage has a worker."""
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 180.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain until {what}:\n{self.log.read_text()}"
            time.sleep(0.05)

    def post(self, route: str, body: bytes, timeout_s: float = 60.0) -> tuple[int, bytes]:
        """Return the answer's status and body; status 0 if the connection ended without an answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{route}", data=body, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except OSError:
            return 0, b""

    def ask(self, part: Part) -> PartAnswer | Failure:
        """Send one part through /pose."""
        status, body = self.post("/pose", msgspec.msgpack.encode(part))
        assert status == 200, (status, body)
        answer: PartAnswer | Failure = msgspec.msgpack.decode(body, type=Answer)
        return answer

    def workers(self, stage: str) -> list[WorkerState]:
        """Return the living workers of a stage."""
        return [state for state in read_states(self.run_dir) if state.stage == stage and state.alive]

    def processes(self) -> list[int]:
        """Return every living process of the pipeline: they share the session that it was started in."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[3]) == self.process.pid and fields[0] not in ("Z", "X"):
                    found.append(int(entry.name))
        return found

    def stop(self) -> None:
        """Stop everything, however the test ended."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
