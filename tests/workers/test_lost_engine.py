"""A stage whose network cannot be started: it goes on without, or says that nothing can be done."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from posekit.errors import BrokenCheckpoint
from posekit.sam6d.settings import Sam6d
from posekit.store import StoredObject
from tests.workers.support import Asker
from workers import settings
from workers.lifecycle import Stage
from workers.messages import Cut, Failure, OnboardTask, Solved
from workers.settings import Stages
from workers.stages.decode import DecodeStage
from workers.stages.onboard import OnboardSam6dStage
from workers.stages.pose import PoseStage
from workers.state import read_states


@pytest.fixture
def without_weights(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    """Return settings of a server whose weights vanished between its start and the start of its workers."""
    return set_up(stages, tmp_path, monkeypatch, fallback=True)


def set_up(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, fallback: bool) -> Stages:
    sam6d = Sam6d(weights=str(tmp_path / "gone.safetensors"), fallback=fallback)
    changed = msgspec.structs.replace(
        stages, engines=("sam6d", "geometric"), sam6d=sam6d, run_dir=str(tmp_path / "run")
    )
    monkeypatch.setenv(settings.ENVIRONMENT, settings.to_environment(changed)[settings.ENVIRONMENT])
    return changed


def test_the_pose_stage_does_without_and_says_why(
    without_weights: Stages, stored: StoredObject, decode: DecodeStage, asker: Asker
) -> None:
    pose = PoseStage()
    info = pose.state.state.info
    assert pose.state.state.ready
    assert list(info["engines"]) == list(info["detections_per_second"]) == ["geometric"]
    assert info["lost"] == {"sam6d": "the network's weights cannot be used; the server's log says why"}
    cut = decode.forward(asker.part(asker.job(engine="sam6d", refine="none")))
    assert isinstance(cut, Cut)
    [answer] = pose.forward([cut])
    assert isinstance(answer, Solved)
    assert answer.engine == "geometric"  # by which the gateway knows
    assert [row.status for row in answer.rows] == ["ok"] * 3


def test_the_onboard_stage_of_the_network_does_without_and_blames_no_object(without_weights: Stages) -> None:
    onboard = OnboardSam6dStage()
    assert "cannot be used" in onboard.state.state.info["lost"]["sam6d"]
    answer = onboard.forward(OnboardTask(task_id="t", object_id="a" * 64))
    assert isinstance(answer, Failure)
    assert (answer.code, answer.part_id) == ("not_ready", "t")


@pytest.mark.parametrize("stage", [PoseStage, OnboardSam6dStage])
def test_a_stage_does_without_weights_that_are_not_those_of_the_start(
    stage: type[Stage],
    without_weights: Stages,
    stored: StoredObject,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path(without_weights.sam6d.weights).write_bytes(b"others")
    started = msgspec.structs.replace(without_weights, versions={"sam6d": "1.01234567"})
    monkeypatch.setenv(settings.ENVIRONMENT, settings.to_environment(started)[settings.ENVIRONMENT])
    info = stage().state.state.info
    assert info["lost"] == {"sam6d": "the network's weights cannot be used; the server's log says why"}
    assert "the weights were replaced since the server started; start it again" in capfd.readouterr().err


def test_without_a_fallback_the_state_asks_the_gateway_to_give_up(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = set_up(stages, tmp_path, monkeypatch, fallback=False)
    with pytest.raises(BrokenCheckpoint):
        PoseStage()
    [state] = read_states(Path(changed.run_dir))
    assert state.info["fatal"].startswith("the engine sam6d cannot be started: the weights gone.safetensors")
    assert "pem weights import" in state.info["fatal"]
    assert not state.ready
