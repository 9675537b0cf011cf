"""A third engine needs only its package and its row: the rest, from settings to metrics, follows in a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import running
from tests.running import ANSWER_S, ROOT, RunningServer, post, register
from tests.serve.tiny import one, tiny_scene

pytestmark = pytest.mark.slow

PACKAGES = ("serve", "workers", "pointnet2_ext")

SPEC = '''
"""An engine that says where a mask is, and nothing of how the object is turned."""

from posekit.engine import EngineSpec
from posekit.settings import Table


class Toy(Table, frozen=True):
    confidence: float = 0.5


def load(own, device, threads):
    from posekit.toy.engine import ToyEngine

    return ToyEngine(own.confidence, device)


SPEC = EngineSpec(
    name="toy",
    words="the toy",
    load=load,
    version=lambda own: "7",
    kernels=lambda device: {"centroid": "reference"},
    settings=Toy,
    licence="MIT",
    refine="none",
    effort=0.5,
)
'''

ENGINE = """
import numpy as np

from posekit.engine import Estimate, Evidence, ObjectModel, Symmetries


class ToyEngine:
    name = "toy"
    version = "7"

    def __init__(self, confidence, device):
        self.confidence, self.device = confidence, device

    def onboard(self, object_id, mesh, symmetries, progress):
        diameter_m = float(np.linalg.norm(np.ptp(mesh.vertices_m, axis=0)))
        progress(1.0)
        return ObjectModel(
            object_id=object_id,
            engine=self.name,
            engine_version=self.version,
            diameter_m=diameter_m,
            symmetries=symmetries or Symmetries(),
            arrays={"diameter_m": np.array([diameter_m])},
        )

    def practice_model(self, object_id, mesh):
        return self.onboard(object_id, mesh, None, lambda share: None)

    def prepare(self, model):
        return 8

    def estimate(self, instances, models):
        return [self._one(instance, models[instance.object_id]) for instance in instances]

    def _one(self, instance, model):
        rows, columns = np.nonzero(instance.mask)
        ray = np.linalg.inv(instance.K) @ [columns.mean(), rows.mean(), 1.0]
        T_cam_obj = np.eye(4)
        T_cam_obj[:3, 3] = ray * (np.median(instance.depth_m[instance.mask]) + float(model.arrays["diameter_m"][0]) / 4)
        seen = Evidence(inlier_fraction=1.0, residual_mm=0.0, visible_overlap=1.0, free_space_violation=0.0)
        return Estimate(T_cam_obj=T_cam_obj, confidence=self.confidence, evidence=seen)
"""


def tree_with_a_toy(tree: Path) -> None:
    """Make a tree of the project's packages, with one more package in posekit and its row before all others."""
    (tree / "posekit" / "toy").mkdir(parents=True)
    for name in (*PACKAGES, "client"):
        (tree / name).symlink_to(ROOT / name)
    for path in (ROOT / "posekit").iterdir():
        if path.name not in ("registry.py", "__pycache__"):
            (tree / "posekit" / path.name).symlink_to(path)
    for name, text in (("__init__", ""), ("spec", SPEC), ("engine", ENGINE)):
        (tree / "posekit" / "toy" / f"{name}.py").write_text(text)
    rows = (ROOT / "posekit/registry.py").read_text()
    before, line, after = rows.partition("ENGINES: Final[tuple[EngineSpec, ...]] = (")
    assert line
    (tree / "posekit/registry.py").write_text(
        before.replace("from posekit.sam6d", "from posekit.toy.spec import SPEC as TOY\nfrom posekit.sam6d", 1)
        + f"{line}TOY, {after}"
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Start a server of such a tree; its settings say of the engine one number and no more. It knows the wedge."""
    folder = tmp_path_factory.mktemp("toy")
    tree_with_a_toy(folder / "tree")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "ROOT", folder / "tree")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "tree"), str(folder / "tree/client")]))
        with RunningServer(folder / "data", {"toy_confidence": 0.75}) as started:
            register(started.url, tiny_scene().instances[1].shape)
            yield started


def get(server: RunningServer, path: str) -> httpx.Response:
    answer = httpx.get(f"{server.url}{path}", timeout=ANSWER_S)
    assert answer.status_code == 200, answer.text
    return answer


def pose(server: RunningServer, **given: Any) -> dict[str, Any]:
    answer = post(server.url, one(init_poses=..., **given))
    assert answer.status_code == 200, answer.text
    tree: dict[str, Any] = answer.json()
    return tree


def test_the_status_lists_it_and_what_it_runs_on(server: RunningServer) -> None:
    status = server.status()
    assert status["engine"] == "toy"  # what auto means here: its row comes first
    assert status["engines"] == {"toy": "toy-7", "geometric": "geometric-2"}
    assert status["kernels"]["centroid"] == "reference"
    assert not status["degraded"]


def test_objects_are_onboarded_for_it(server: RunningServer) -> None:
    [known] = get(server, "/api/v1/objects").json()["objects"]
    assert list(known["engines"]) == ["toy", "geometric"]  # the quickest first
    assert known["engines"]["toy"]["status"] == "ready"
    assert known["engines"]["toy"]["bytes"] > 0


def test_it_answers_poses_as_its_settings_say(server: RunningServer) -> None:
    for given in ({}, {"engine": "toy"}):
        answer = pose(server, **given)
        assert (answer["engine"], answer["release"]) == ("toy", "toy-7")
        [row] = answer["poses"]
        assert row["status"] == "ok"
        assert row["confidence"] == 0.75
        true_mm = tiny_scene().instances[1].T_cam_obj[:3, 3] * 1000
        assert row["translation"] == pytest.approx(true_mm, abs=60)


def test_the_openapi_document_lists_it(server: RunningServer) -> None:
    request = get(server, "/openapi.json").json()["components"]["schemas"]["PoseRequest"]
    assert request["properties"]["engine"]["enum"] == ["auto", "geometric", "sam6d", "toy"]


def test_the_other_engines_answer_beside_it(server: RunningServer) -> None:
    assert pose(server, engine="geometric")["release"] == "geometric-2"
    answer = post(server.url, one(engine="sam6d"))
    assert answer.status_code == 422
    assert "'sam6d' is not configured here; there is toy, geometric" in answer.text


def test_metrics_have_its_labels(server: RunningServer) -> None:
    page = get(server, "/metrics").text
    assert 'pose_detections_total{engine="toy",status="rejected"}' in page
    assert 'pose_model_info{engine="toy",release="toy-7",sha256="",track="production"} 1.0' in page
    assert 'pose_kernel_info{kernel="reference",op="centroid"} 1.0' in page
    assert 'pose_process_resident_bytes{stage="onboard_toy"}' in page


def test_the_model_is_described_under_its_own_terms(server: RunningServer) -> None:
    described = get(server, "/v2/models/pem").json()
    assert described["versions"] == ["toy-7"]
    assert described["parameters"]["engine"] == "toy"
    assert described["parameters"]["engine_licence"] == "MIT"
    assert described["parameters"]["weights_licence"] == "none: this engine has no weights"


def test_the_command_line_and_the_settings_offer_it(server: RunningServer, tmp_path: Path) -> None:
    tree = server.data.parent / "tree"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "client")]), "COLUMNS": "300"}
    command = [sys.executable, "-m", "pem", "serve", "--data-dir", str(tmp_path)]

    def said(*options: str) -> str:
        ended = subprocess.run(
            [*command, *options], cwd=tree, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        return ended.stdout + ended.stderr

    assert "toy, geometric, sam6d, auto." in said("--help")
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[toy]\nconfidance = 1.0\n")
    assert "Object contains unknown field `confidance` - at `$.toy`" in said("--config", str(wrong))
