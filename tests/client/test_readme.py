"""The examples of the client's README, run against a server."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pem
from pem import cli, imagefiles
from posekit.synthetic.scenes import demo_scene
from posekit.synthetic.shapes import mesh_to_ply
from tests.running import RunningServer

TEXT = (Path(__file__).parents[2] / "client/README.md").read_text()
ADDRESS = "http://robot-cell:8003"


def blocks(language: str) -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))


@pytest.fixture
def folder(server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Enter a folder with the files that the README names; the server forgets its object afterwards."""
    monkeypatch.chdir(tmp_path)
    scene = demo_scene()
    pictures = {"rgb.png": scene.rgb, "depth.png": scene.depth_raw, "mask.png": scene.instances[0].mask}
    for name, picture in pictures.items():
        Path(name).write_bytes(imagefiles.write_png(picture))
    begin, _, rest = mesh_to_ply(scene.instances[0].shape.mesh).partition(b"\n")
    Path("bracket.ply").write_bytes(begin + b"\ncomment another object than the scene's\n" + rest)
    Path("camera.json").write_text(json.dumps({"cam_K": scene.K.ravel().tolist(), "depth_scale": 1.0}))
    yield tmp_path
    with pem.Client(server.url) as client:
        client.objects.remove("bracket")


def test_its_commands_run(
    server: RunningServer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PEM_URL", server.url)
    lines = [line for line in blocks("sh").replace(ADDRESS, server.url).splitlines() if line.startswith("pem ")]
    assert len(lines) == 3
    for line in lines:
        with pytest.raises(SystemExit) as left:
            cli.main(shlex.split(line)[1:])
        assert left.value.code == 0, capsys.readouterr().err
    assert (folder / "overlay.png").exists()
    assert " ok " in capsys.readouterr().out


@pytest.mark.usefixtures("folder")
def test_its_python_runs(server: RunningServer) -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks("python").replace(ADDRESS, server.url), "README.md", "exec"), names)
    (pose,) = names["result"].poses
    assert pose.object == "bracket"
    assert names["result"].overlay().shape == names["rgb"].shape
    assert isinstance(names["K"], np.ndarray)
