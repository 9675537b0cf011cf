"""The network behind the port, with made-up weights: it computes as with the released ones, and finds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posekit.io.images import encode_png
from posekit.sam6d.checkpoint import manifest
from posekit.sam6d.checkpoint.manifest import WeightsEntry
from posekit.sam6d.templates import render_views
from tests.running import ROOT, RunningServer, wait_until
from tests.serve.tiny import NAMES, OBJECTS, Asker, ascii_ply, masks_of, one, ply, refusal, tetrahedron, tiny_question
from tests.serve.tiny import tiny_scene as scene

pytestmark = pytest.mark.slow

PATIENT = {"deadline_ms": 300_000}


@dataclass
class Networked:
    """A server whose default engine is the network."""

    server: RunningServer
    ask: Asker
    weights: Path

    def get(self, path: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.ask.send("GET", path).json()
        return answer


@pytest.fixture(scope="module")
def networked(tmp_path_factory: pytest.TempPathFactory, generated_weights: Path) -> Iterator[Networked]:
    """Start a server for this module; few views, since onboarding is slow. Its two objects are still onboarding."""
    own = tmp_path_factory.mktemp("weights") / generated_weights.name
    own.hardlink_to(generated_weights)  # so that what is recorded of it is nobody else's
    settings = {"engine": "sam6d", "sam6d_weights": str(own), "sam6d_views": 4}
    with RunningServer(tmp_path_factory.mktemp("networked") / "data", settings) as server, Asker(server.url) as client:
        for index, name in enumerate(NAMES):
            assert client.upload(ply(index), name=name, wait=None).status_code == 201
        yield Networked(server, client, own)
    own.unlink()


def test_a_request_waits_only_for_the_engine_that_it_asks_for(networked: Networked) -> None:
    ask = networked.ask
    [onboarder] = networked.server.workers("onboard_sam6d")
    os.kill(onboarder.pid, signal.SIGSTOP)
    try:
        mesh = ascii_ply(tetrahedron(90))
        answer = ask.upload(mesh, wait=None, name="late").json()
        assert answer["status"] == "onboarding"
        body = one(objects=..., object_id="late", init_poses=...)
        assert ask.ok({**body, "engine": "geometric"})["engine"] == "geometric"
        refused = refusal(ask.post({**body, "deadline_ms": 1500}), 503, "onboarding")
        assert "still being onboarded" in refused["detail"]
        late = networked.get(f"{OBJECTS}/late")
        assert late["status"] == "onboarding"
        assert 0 < late["progress"] < 0.5
        assert late["engines"]["geometric"]["status"] == "ready"
        assert late["engines"]["sam6d"]["status"] == "queued"
    finally:
        os.kill(onboarder.pid, signal.SIGCONT)
    assert ask.ok({**body, **PATIENT})["engine"] == "sam6d"
    assert networked.get(f"{OBJECTS}/late")["status"] == "ready"


def test_the_network_answers_unless_the_geometric_engine_is_asked_for(networked: Networked) -> None:
    question = tiny_question().body(**PATIENT)
    answer = networked.ask.ok(question)
    assert (answer["engine"], answer["degraded"]) == ("sam6d", False)
    assert [row["object_id"] for row in answer["poses"]] == list(NAMES)
    assert {row["status"] for row in answer["poses"]} <= {"ok", "rejected"}
    assert all(0 < row["confidence"] <= 1 for row in answer["poses"] if row["status"] == "ok")
    assert answer["release"].startswith("sam6d-1.")
    geometric = networked.ask.ok({**question, "engine": "geometric"})
    assert (geometric["engine"], geometric["degraded"], geometric["release"]) == ("geometric", False, "geometric-2")
    assert max(tiny_question().errors(1, geometric["poses"][1])) < 2


def test_a_refined_pose_keeps_the_networks_confidence(networked: Networked) -> None:
    body = one(0, init_poses=..., seed=1, **PATIENT)
    [plain] = networked.ask.poses(body)
    [refined] = networked.ask.poses({**body, "refine": "icp"})
    assert plain["status"] == refined["status"] == "ok"
    assert refined["confidence"] == plain["confidence"]
    assert refined["translation"] != plain["translation"]
    assert refined["evidence"] != plain["evidence"]


def test_a_pose_that_could_not_be_refined_says_so(networked: Networked) -> None:
    upright = ascii_ply(tetrahedron(80))
    object_id = networked.ask.upload(upright, name="unrefined", wait=60).json()["object_id"]
    for file in (networked.server.data / "objects" / object_id).glob("geometric*"):
        file.unlink()  # before any worker has read it
    body = one(0, objects=..., object_id="unrefined", init_poses=..., seed=1, **PATIENT)
    plain = networked.ask.ok(body)
    refined = networked.ask.ok({**body, "refine": "icp"})
    assert plain["warnings"] == []
    assert refined["poses"] == plain["poses"]
    [warning] = refined["warnings"]
    assert warning.startswith("poses[0] is as the network found it, not refined: the object's model is missing")


def test_a_pose_to_start_from_is_refined_without_the_network(networked: Networked) -> None:
    answer = networked.ask.ok(one(**PATIENT))
    assert answer["engine"] == "sam6d"
    assert max(tiny_question().errors(1, answer["poses"][0])) < 2


def test_an_object_that_only_the_geometric_engine_can_onboard_is_answered_by_it(networked: Networked) -> None:
    far = ascii_ply(tetrahedron() + np.array([20_000, 0, 0]))  # from around its origin nothing of it is seen
    answer = networked.ask.upload(far, name="far").json()
    assert answer["status"] == "ready"
    assert "too far from its origin" in answer["engines"]["sam6d"]["error"]
    assert answer["engines"]["geometric"]["status"] == "ready"
    body = one(objects=..., object_id="far", init_poses=..., **PATIENT)
    for engine, degraded in (("auto", True), ("geometric", False)):
        answer = networked.ask.ok({**body, "engine": engine})
        assert (answer["engine"], answer["degraded"]) == ("geometric", degraded)
    warning = networked.ask.ok(body)["warnings"][-1]
    assert "could not be onboarded" in warning


def test_an_empty_mask_is_a_row_of_the_network_too(networked: Networked) -> None:
    height, width = scene().rgb.shape[:2]
    empty = np.zeros((height, width), dtype=int).tolist()
    answer = networked.ask.ok(one(detections=masks_of(empty), init_poses=..., **PATIENT))
    assert (answer["engine"], answer["poses"][0]["error"]["code"]) == ("sam6d", "mask_empty")


def test_release_checkpoint_and_sha256_are_told(networked: Networked) -> None:
    version = networked.get("/api/v1/version")
    assert version["checkpoint"] == networked.weights.stem
    assert version["release"] == f"sam6d-1.{version['sha256'][:8]}.v4"
    assert list(version["engines"]) == ["sam6d", "geometric"]
    status = networked.get("/api/v1/status")
    assert (status["engine"], status["release"], status["degraded"]) == ("sam6d", version["release"], False)
    labels = f'engine="sam6d",release="{version["release"]}",sha256="{version["sha256"]}"'
    page = networked.ask.send("GET", "/metrics").text
    assert f"pose_model_info{{{labels}" in page
    assert "\npose_degraded 0.0" in page
    model = networked.get("/v2/models/pem")
    assert model["parameters"]["engine"] == "sam6d"
    assert "ask them" in model["parameters"]["weights_licence"]


def test_templates_from_elsewhere_replace_our_own_in_the_running_server(networked: Networked, tmp_path: Path) -> None:
    mesh = scene().instances[1].shape.mesh
    for index, view in enumerate(render_views(mesh, lambda _: None, 4)):
        (tmp_path / f"rgb_{index}.png").write_bytes(encode_png(255 - view.rgb))
        (tmp_path / f"mask_{index}.png").write_bytes(encode_png(view.mask.astype(np.uint8) * 255))
        np.save(tmp_path / f"xyz_{index}.npy", np.where(view.mask[..., None], view.xyz_m * 1000, -1).astype(np.float16))
    body = one(init_poses=..., seed=1, **PATIENT)
    [before] = networked.ask.poses(body)
    wait_until(lambda: networked.get(f"{OBJECTS}/wedge")["status"] == "ready", 300, "it is onboarded")
    said = templates(networked, "wedge", tmp_path)
    assert said.returncode == 0, said.stderr
    assert "wedge has these templates now: ready, onboarded in" in said.stderr
    [after] = networked.ask.poses(body)
    assert after != before
    assert networked.get(f"{OBJECTS}/wedge")["engines"]["sam6d"]["threads"] == len(os.sched_getaffinity(0))


def test_templates_that_cannot_be_used_are_refused_in_words(networked: Networked, tmp_path: Path) -> None:
    said = templates(networked, "wedge", tmp_path)
    assert said.returncode == 1
    assert "rgb_0.png is missing" in said.stderr
    assert "no object is registered as nothing" in templates(networked, "nothing", tmp_path).stderr


def test_a_worker_that_starts_anew_after_the_weights_were_replaced_does_without_them(networked: Networked) -> None:
    release = networked.get("/api/v1/version")["release"]
    record(networked.weights, sha256="ab" * 32)  # as good as other weights
    body = one(init_poses=..., seed=1, **PATIENT)
    assert networked.ask.ok(body)["release"] == release  # those who loaded the old ones keep them
    for worker in networked.server.workers("pose"):
        os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: networked.get("/api/v1/status")["degraded"], 300, "the new workers refused them")
    answer = networked.ask.ok(body)
    assert (answer["engine"], answer["degraded"]) == ("geometric", True)
    assert [row["status"] for row in answer["poses"]] == ["ok"]
    assert "the network's weights cannot be used" in answer["warnings"][-1]


def record(path: Path, sha256: str) -> None:
    """Write an entry with this sha256 beside a file of weights."""
    nbytes = path.stat().st_size
    manifest.record(
        path,
        WeightsEntry(
            name=path.name, engine="sam6d", source="", source_sha256="", sha256=sha256, bytes=nbytes, licence=""
        ),
    )


def templates(networked: Networked, which: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {f"PEM_{name.upper()}": str(value) for name, value in networked.server.settings.items()}
    command = [sys.executable, "-m", "pem", "objects", "templates", which, str(folder)]
    command += ["--data-dir", str(networked.server.data)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )
