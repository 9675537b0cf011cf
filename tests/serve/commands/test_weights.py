"""`pem weights` as a user types it. tests/posekit/sam6d/checkpoint/test_weights.py tests the refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pem import cli
from posekit.sam6d.checkpoint import weights

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter an empty folder, without settings in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("PEM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a checkpoint with only the small tensors of the real network."""
    expected = {name: wanted for name, wanted in weights._expected().items() if wanted.numel() <= 768}
    monkeypatch.setattr(weights, "_expected", lambda: expected)
    return save(
        tmp_path / "some.pth", {name: torch.ones_like(wanted, device="cpu") for name, wanted in expected.items()}
    )


def save(path: Path, model: dict[str, Tensor]) -> Path:
    torch.save({"model": model}, path)
    return path


def pem(*arguments: object) -> int:
    """Run `pem weights` in this process; return its exit code."""
    with pytest.raises(SystemExit) as left:
        cli.main(["weights", *map(str, arguments)])
    return int(left.value.code or 0)


def test_weights_are_imported_listed_and_verified(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pem("import", file, "--licence", "see [the paper]") == 0
    out = capsys.readouterr().out
    assert "checkpoints/sam-6d-pem-base.safetensors is written" in out
    assert "JiehongLin/SAM-6D" in out
    assert pem("list") == 0
    assert "see [the paper]" in capsys.readouterr().out
    assert pem("verify") == 0
    assert "good" in capsys.readouterr().out
    assert pem("import", file) == 0
    assert "is there already" in capsys.readouterr().out


def test_replacing_other_weights_reminds_of_the_server_that_runs(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = torch.load(file)["model"]
    changed = save(tmp_path / "other.pth", {name: tensor * 2 for name, tensor in other.items()})
    for arguments, reminded in (((file,), False), ((file, "--force"), False), ((changed, "--force"), True)):
        assert pem("import", *arguments) == 0
        assert ("has to be started again" in capsys.readouterr().err) is reminded


def test_a_machine_gets_json_and_nothing_else(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pem("import", file, "--checkpoints-dir", "elsewhere", "--json", "-") == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["already"], done["entry"]["engine"]) == (False, "sam6d")
    assert pem("verify", "--checkpoints-dir", "elsewhere", "--json", "-") == 0
    [row] = json.loads(capsys.readouterr().out)["weights"]
    assert (row["problem"], row["sha256"]) == (None, done["entry"]["sha256"])


def test_the_settings_say_where_the_weights_are(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PEM_CHECKPOINTS_DIR", str(tmp_path / "mine"))
    assert pem("import", file) == 0
    assert (tmp_path / "mine/sam-6d-pem-base.safetensors").is_file()
    assert pem("verify", tmp_path / "mine/sam-6d-pem-base.safetensors") == 0


def test_a_refused_file_is_said_in_words_and_exits_with_1(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pem("import", save(tmp_path / "other.pth", {"x": torch.ones(2)})) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "error: other.pth does not fit the network" in told.err
    assert "Traceback" not in told.err
    assert pem("import", tmp_path) == 1
    assert pem("import", tmp_path / "missing.pth") == 2


def test_a_broken_file_of_weights_fails_the_verification(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pem("import", file) == 0
    os.truncate("checkpoints/sam-6d-pem-base.safetensors", 1000)
    capsys.readouterr()
    assert pem("verify") == 1
    told = capsys.readouterr()
    assert "wrong" in told.out
    assert "cut short" in told.err
    assert pem("list") == 0


def test_without_weights_the_way_to_get_some_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert pem("list") == 0
    assert "pem weights import FILE" in capsys.readouterr().err
    assert pem("verify") == 1
    assert "pem weights import FILE" in capsys.readouterr().err
