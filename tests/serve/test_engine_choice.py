"""The engines that a start offers, and the answers when the chosen network is not available."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from posekit.sam6d.checkpoint import manifest
from posekit.sam6d.settings import Sam6d
from serve import settings
from serve.engine_choice import CannotStart, Engines, choose
from serve.errors import ApiError
from tests.running import ROOT, RunningServer, register
from tests.serve.tiny import Asker, one, tiny_scene


def offer(folder: Path, **given: str) -> Any:
    environment = {
        "PEM_CHECKPOINTS_DIR": str(folder),
        **{f"PEM_{name.upper()}": value for name, value in given.items()},
    }
    return choose(settings.load(environment=environment))


def wrong_network(folder: Path) -> None:
    """Write a sound file of tensors of something else."""
    save_file({"head.weight": np.zeros((2, 3), np.float32)}, folder / manifest.FILE_NAME)


def test_the_weights_of_the_settings_are_those_that_an_import_leaves() -> None:
    assert Sam6d().weights == manifest.FILE_NAME


def test_weights_decide_what_auto_means_and_either_engine_may_be_asked_for(tmp_path: Path) -> None:
    assert offer(tmp_path).engines == ("geometric",)
    assert offer(tmp_path).wanted == "geometric"
    assert offer(tmp_path).lost == {}
    wrong_network(tmp_path)
    there = offer(tmp_path)
    assert there.engines == ("sam6d", "geometric")
    assert there.wanted == "sam6d"
    assert len(there.sha256["sam6d"]) == 64
    assert offer(tmp_path, engine="sam6d") == there
    assert offer(tmp_path, engine="geometric").engines == ("geometric",)


@pytest.mark.parametrize("engine", ["sam6d", "auto"])
@pytest.mark.parametrize(
    "content", [b"", b"\x08\0\0\0\0\0\0\0{}      tail", b"\xff" * 99], ids=["empty", "odd", "noise"]
)
def test_weights_that_cannot_be_read_are_lost_whoever_asked_for_them(
    tmp_path: Path, engine: str, content: bytes
) -> None:
    (tmp_path / manifest.FILE_NAME).write_bytes(content)
    found = offer(tmp_path, engine=engine)
    assert found.engines == ("geometric",)
    assert found.wanted == "sam6d"
    assert "cut short, damaged" in found.lost["sam6d"]
    with pytest.raises(CannotStart, match=r"cut short, damaged.*pem weights import"):
        offer(tmp_path, engine=engine, sam6d_fallback="false")


def test_missing_weights_are_lost_only_where_they_were_asked_for(tmp_path: Path) -> None:
    assert offer(tmp_path, engine="sam6d").lost == {"sam6d": "the network's weights are missing"}
    with pytest.raises(CannotStart, match=r"missing.*pem weights import"):
        offer(tmp_path, engine="sam6d", sam6d_fallback="false")
    assert offer(tmp_path, sam6d_fallback="false").engines == ("geometric",)


class Lost:
    """As much of the backend as the choice of an engine asks for: its stages, and engines that its workers lost."""

    def __init__(self, folder: Path, given: settings.Settings, engines: tuple[str, ...]) -> None:
        self.stages = given.stages(run_dir=folder, devices=("cpu",), engines=engines)
        self.gone: dict[str, str] = {}

    def lost(self) -> dict[str, str]:
        return self.gone


def test_an_engine_that_the_workers_lose_is_answered_for_and_the_client_is_told(tmp_path: Path) -> None:
    wrong_network(tmp_path)
    given = settings.load(environment={"PEM_CHECKPOINTS_DIR": str(tmp_path)})
    found = choose(given)
    backend = Lost(tmp_path, given, found.engines)
    engines = Engines(given, found, backend)  # type: ignore[arg-type]
    sound = engines.pick("auto")
    assert (sound.engine, sound.warning, engines.degraded) == ("sam6d", None, None)
    backend.gone = {"sam6d": "the file is another network's"}
    for asked in ("auto", "sam6d"):
        pick = engines.pick(asked)
        assert (pick.wanted, pick.engine) == ("sam6d", "geometric")
        assert "the file is another network's" in (pick.warning or "")
    assert engines.pick("geometric").warning is None
    assert engines.degraded == "the file is another network's"
    with pytest.raises(ApiError, match="the engine 'toy' is not configured here"):
        engines.pick("toy")


def test_a_cad_that_an_engine_cannot_onboard_goes_to_its_stand_in_where_one_is_allowed(tmp_path: Path) -> None:
    wrong_network(tmp_path)
    for fallback, engine in (("true", "geometric"), ("false", None)):
        environment = {"PEM_CHECKPOINTS_DIR": str(tmp_path), "PEM_SAM6D_FALLBACK": fallback}
        given = settings.load(environment=environment)
        found = choose(given)
        engines = Engines(given, found, Lost(tmp_path, given, found.engines))  # type: ignore[arg-type]
        other = engines.instead(engines.pick("sam6d"), "no view shows it")
        assert (other.engine if other else None) == engine
        assert other is None or "no view shows it" in (other.warning or "")


def refused_start(data: Path, **given: str) -> str:
    """Return the message of a `pem serve` that does not start."""
    environment = {f"PEM_{name.upper()}": value for name, value in given.items()}
    command = [sys.executable, "-m", "pem", "serve", "--port", "0", "--data-dir", str(data)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1, ended.stderr
    return ended.stderr.rpartition("error: ")[2]


def test_without_a_fallback_missing_weights_refuse_the_start_in_words(tmp_path: Path) -> None:
    said = refused_start(tmp_path, engine="sam6d", sam6d_fallback="false", checkpoints_dir=str(tmp_path))
    assert f"the network's weights are missing ({tmp_path / manifest.FILE_NAME})" in said
    assert "pem weights import" in said


@pytest.mark.slow
def test_without_a_fallback_weights_of_another_network_end_the_start_in_words(tmp_path: Path) -> None:
    wrong_network(tmp_path)  # which only the workers find
    said = refused_start(tmp_path / "data", engine="sam6d", sam6d_fallback="false", checkpoints_dir=str(tmp_path))
    assert "does not fit the network" in said
    assert "1 left over: head.weight" in said
    assert "pem weights import" in said


def check_stand_in(server: RunningServer, reason: str) -> None:
    """Check that the geometric engine answers in the network's place, and that all reports say so."""
    register(server.url, tiny_scene().instances[1].shape)
    with Asker(server.url) as ask:
        for engine, degraded in (("auto", True), ("sam6d", True), ("geometric", False)):
            answer = ask.ok(one(engine=engine))
            assert (answer["engine"], answer["degraded"], answer["release"]) == ("geometric", degraded, "geometric-2")
            assert any(reason in warning for warning in answer["warnings"]) is degraded
            assert answer["poses"][0]["status"] == "ok"
        assert ask.send("GET", "/readyz").status_code == 200
        status = ask.send("GET", "/api/v1/status").json()
        assert (status["engine"], status["degraded"], status["engines"]) == (
            "geometric",
            True,
            {"geometric": "geometric-2"},
        )
        assert reason in status["degraded_reason"]
        version = ask.send("GET", "/api/v1/version").json()
        assert (version["release"], version["checkpoint"], version["degraded"]) == ("geometric-2", None, True)
        page = ask.send("GET", "/metrics").text
    assert "\npose_degraded 1.0" in page
    assert 'pose_model_info{engine="geometric",release="geometric-2",sha256="",track="production"} 1.0' in page
    assert '"event":"degraded"' in server.log()
    assert "pem weights import" in server.log()


@pytest.mark.slow
def test_missing_weights_leave_the_geometric_engine_which_says_so(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "data", {"engine": "sam6d"}) as server:
        check_stand_in(server, "the network's weights are missing")


@pytest.mark.slow
def test_weights_that_only_the_workers_find_wrong_leave_it_too(tmp_path: Path) -> None:
    wrong_network(tmp_path)
    with RunningServer(tmp_path / "data", {"checkpoints_dir": str(tmp_path)}) as server:
        check_stand_in(server, "the network's weights cannot be used")
        assert "1 left over: head.weight" in server.log()
