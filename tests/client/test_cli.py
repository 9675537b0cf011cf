"""The command line as a user types it: its output, where it goes, and the exit code."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from pem import __version__, cli, client, imagefiles
from pem.commands import common
from pem.commands.estimate import read_camera
from pem.contract import Health, ObjectAnswer
from pem.rle import encode_rle
from posekit.io import images
from posekit.synthetic.scenes import demo_scene
from posekit.synthetic.shapes import SHAPES, mesh_to_ply
from tests.running import RunningServer

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Pem = Callable[..., Done]


@pytest.fixture
def pem(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Pem:
    """Run `pem` with arguments in this process."""
    for name in [name for name in os.environ if name.startswith("PEM_")]:
        monkeypatch.delenv(name)

    def run(*arguments: object) -> Done:
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Done(int(left.value.code or 0), out, err)

    return run


def test_the_version_is_told(pem: Pem) -> None:
    assert pem("--version") == Done(0, f"pem {__version__}\n", "")


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["serve"],
        ["bench"],
        ["demo"],
        ["estimate"],
        ["objects"],
        ["objects", "add"],
        ["objects", "templates"],
        ["keys"],
        ["keys", "add"],
        ["weights"],
        ["weights", "import"],
        ["status"],
    ],
    ids=lambda command: " ".join(command) or "pem",
)
def test_help_teaches(pem: Pem, command: list[str]) -> None:
    done = pem(*command, "--help")
    assert done.code == 0
    assert "Usage: pem" in done.out


def test_every_settings_file_that_help_names_exists() -> None:
    def texts(command: Any) -> Iterator[str]:
        yield command.help or ""
        for option in command.params:
            yield getattr(option, "help", None) or ""
        for below in getattr(command, "commands", {}).values():
            yield from texts(below)

    named = re.findall(r"configs/[\w./-]*\w", "\n".join(texts(typer.main.get_command(cli.app))))
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_program_is_called_by_its_path_where_its_name_does_not_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "venv" / "bin" / "pem"
    script.parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    assert common.program() == "venv/bin/python -m pem"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert common.program() == "venv/bin/pem"
    monkeypatch.setenv("PATH", str(script.parent))
    assert common.program() == "pem"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("PATH", "/nowhere")
    assert common.program() == str(script)


@pytest.mark.parametrize("command", [["serve", "--help"], ["status", "--help"], ["bench", "--help"]], ids=str)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom pem import cli\n"
        f"try:\n    cli.main({command})\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'mosec', 'open3d', 'cv2', 'scipy', 'posekit.synthetic')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", [["status"], ["objects", "list"], ["objects", "show", "mug"], ["openapi"]], ids=str)
def test_no_server_is_said_in_words(pem: Pem, command: list[str]) -> None:
    done = pem(*command, "--url", NOWHERE)
    assert done.code == 1
    assert done.out == ""
    assert f"no server answers at {NOWHERE}" in done.err
    assert "pem serve" in done.err
    assert "Traceback" not in done.err


def test_the_environment_names_the_server(pem: Pem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEM_URL", "http://127.0.0.1:19")
    assert "http://127.0.0.1:19" in pem("status").err


def test_an_address_that_is_none_is_said_in_words(pem: Pem) -> None:
    done = pem("status", "--url", "robot:8003")
    assert (done.code, "is no address" in done.err) == (1, True)


def test_a_long_step_is_a_line_for_each_new_word_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with common.step("waiting") as tell:
        for words in ("loading", "loading", "warming up"):
            tell(words)
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "waiting\nwaiting (loading)\nwaiting (warming up)\n")


@pytest.mark.parametrize("arguments", [["nothing"], ["status", "--urll", "x"], ["objects", "add", "no.ply"]], ids=str)
def test_wrong_use_exits_with_2(pem: Pem, arguments: list[str]) -> None:
    assert pem(*arguments).code == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--port", "70000"], "port"),
        (["--config", "missing.toml"], "missing.toml"),
        (["--engine", "best"], "engine"),
        (["--log-format", "xml"], "$.log.format"),
    ],
)
def test_settings_that_cannot_be_are_named(pem: Pem, arguments: list[str], words: str) -> None:
    done = pem("serve", *arguments)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err


def test_a_taken_port_is_said_in_words(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "pem", "serve", "--port", str(taken.getsockname()[1]), "--device", "cpu"]
        command += ["--data-dir", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "cannot listen" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------ a robot's PC: no pem-server


@pytest.mark.parametrize(
    "command",
    [
        ["serve", "--port", "8003"],
        ["serve", "--help"],
        ["demo"],
        ["keys", "add", "robot"],
        ["weights", "list"],
        ["objects", "templates", "mug", "folder"],
        ["bench"],
        ["bench", "--set", "pose.threads=1"],
        ["bench", "--url", NOWHERE],
        ["bench", "--request", "request.msgpack"],
    ],
    ids=" ".join,
)
def test_without_pem_server_its_commands_say_what_to_install(command: list[str]) -> None:
    done = without_pem_server(*command)
    assert done.returncode == 1, done.stderr
    assert "needs pem-server, which is not installed here: run `pip install ./client .`" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_pem_server_help_names_all_commands() -> None:
    done = without_pem_server("--help")
    assert done.returncode == 0
    for name in ("serve", "demo", "keys", "weights", "estimate", "bench", "status", "objects", "openapi"):
        assert re.search(rf"^\W*{name} ", done.stdout, re.MULTILINE), name
    assert "(with pem-server)" in done.stdout


def test_without_pem_server_nobody_is_told_to_start_one() -> None:
    said = without_pem_server("status", "--url", NOWHERE).stderr
    assert "Name another with --url." in said
    assert "pem serve" not in said


def test_without_pem_server_scenes_that_cannot_be_drawn_point_to_a_ready_request() -> None:
    assert "--request request.msgpack" in without_pem_server("bench", "--url", NOWHERE).stderr


def without_pem_server(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `pem` as if no entry point of pem-server were installed."""
    code = (
        "import importlib.metadata, sys; importlib.metadata.entry_points = lambda **_: []\n"
        "from pem.cli import main; main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


# ----------------------------------------------------------------------------------------------------------------- keys


def test_keys_are_made_listed_and_revoked(pem: Pem, tmp_path: Path) -> None:
    where = ["--data-dir", tmp_path]
    made = pem("keys", "add", "robot", "--rate", 5, *where)
    assert made.code == 0
    assert made.out.startswith("pem_")
    assert "cannot be shown again" in made.err
    listed = pem("keys", "list", *where, "--json", "-").json()["keys"]
    assert [(key["name"], key["rate"]) for key in listed] == [("robot", 5.0)]
    assert "robot" in pem("keys", "list", *where).out
    again = pem("keys", "add", "robot", *where)
    assert (again.code, "already" in again.err) == (2, True)
    gone = pem("keys", "revoke", "robot", *where)
    assert gone.code == 0
    assert "open to all" in gone.err
    assert pem("keys", "revoke", "robot", *where).code == 2


def test_a_broken_file_of_keys_is_said_in_words(pem: Pem, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("{")
    done = pem("keys", "list", "--data-dir", tmp_path)
    assert (done.code, "broken" in done.err) == (2, True)


# ------------------------------------------------------------------------------------------------------------- estimate


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo scene as a user has it: files."""
    folder = tmp_path_factory.mktemp("scene")
    scene = demo_scene()
    main = scene.instances[0]
    (folder / "rgb.png").write_bytes(imagefiles.write_png(scene.rgb))
    (folder / "depth.png").write_bytes(imagefiles.write_png(scene.depth_raw))
    (folder / "mask.png").write_bytes(imagefiles.write_png(main.mask))
    (folder / "empty.png").write_bytes(imagefiles.write_png(np.zeros_like(main.mask)))
    (folder / "camera.json").write_text(json.dumps({"cam_K": scene.K.ravel().tolist(), "depth_scale": 1.0}))
    (folder / "housing.ply").write_bytes(mesh_to_ply(main.shape.mesh))
    item = {"scene_id": 0, "image_id": 0, "category_id": 5, "score": 0.9, "time": 0.1, "bbox": [0, 0, 5, 5]}
    (folder / "ism.json").write_text(json.dumps([{**item, "segmentation": encode_rle(main.mask)}]))
    return folder


def frame(files: Path) -> list[object]:
    return ["--rgb", files / "rgb.png", "--depth", files / "depth.png", "--camera", files / "camera.json"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--mask", "mask.png"], "--cad FILE or by --object"),
        (["--cad", "housing.ply"], "--mask FILE"),
        (["--cad", "housing.ply", "--object", "x", "--mask", "mask.png"], "one of them"),
        (["--cad", "housing.ply", "--detections", "rgb.png"], "no list of detections"),
        (["--object", "a", "--object", "b", "--mask", "mask.png"], "CATEGORY=NAME"),
        (["--object", "a", "--model-unit", "m", "--mask", "mask.png"], "--model-unit"),
        (["--object", "a", "--cad-format", "ply", "--mask", "mask.png"], "--cad-format"),
    ],
)
def test_estimate_says_what_is_missing(pem: Pem, files: Path, arguments: list[str], words: str) -> None:
    arguments = [str(files / item) if (files / item).is_file() else item for item in arguments]
    done = pem("estimate", *frame(files), *arguments, "--url", NOWHERE)
    assert done.code == 2
    assert words in done.err


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"fx": 600, "cx": 3}', "no fy and no cy"),
        ('{"K": []}', "no cam_K"),
        ('{"cam_K": [1, 2]}', "not 9 numbers"),
        ('{\n"cam_K": [1, 2,, 3]}', "line 2, column 1"),
        ("[1, 2]", "no {...}"),
        ('{"0": {"cam_K": []}, "1": {"cam_K": []}}', "2 cameras"),
    ],
)
def test_a_camera_file_that_is_none_says_why_and_shows_one(
    pem: Pem, files: Path, tmp_path: Path, text: str, words: str
) -> None:
    wrong = tmp_path / "camera.json"
    wrong.write_text(text)
    arguments = ["--rgb", files / "rgb.png", "--depth", files / "depth.png", "--camera", wrong]
    done = pem("estimate", *arguments, "--object", "x", "--mask", files / "mask.png")
    assert (done.code, '{"cam_K": [fx' in done.err) == (2, True)
    assert words in done.err


def test_the_forms_of_a_camera_file_mean_the_same(tmp_path: Path) -> None:
    flat = {"cam_K": [600, 0, 31, 0, 500, 23, 0, 0, 1], "depth_scale": 0.1}
    named = {"fx": 600, "fy": 500, "cx": 31, "cy": 23, "depth_scale": 0.1, "width": 64, "height": 48}
    path = tmp_path / "camera.json"
    for content in (flat, named, {"7": {**flat, "cam_R_w2c": [1]}}):
        path.write_text(json.dumps(content))
        K, scale, unit = read_camera(path)
        assert K.tolist() == [[600, 0, 31], [0, 500, 23], [0, 0, 1]]
        assert (scale, unit) == (0.1, None)


def test_no_folder_is_made_outside_the_current_one(pem: Pem, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "overlay.png"
    choice = ["--object", "x", "--mask", files / "mask.png", "--url", NOWHERE]
    for arguments in (["--out", out], ["--json", out]):
        done = pem("estimate", *frame(files), *choice, *arguments)
        assert (done.code, "make it first" in done.err) == (2, True)
    assert pem("demo", "--out", tmp_path / "new" / "demo").code == 2
    assert not out.parent.exists()


# ---------------------------------------------------------------------------------------------- against a real server


def test_files_in_table_and_overlay_out(
    server: RunningServer, pem: Pem, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overlay, answer = Path("seen", "overlay.png"), tmp_path / "answer.json"
    masks = ["--mask", files / "mask.png", "--mask", files / "empty.png"]
    output = ["--out", overlay, "--json", answer, "--url", server.url]
    done = pem("estimate", *frame(files), "--cad", files / "housing.ply", *masks, *output)
    assert done.code == 0, done.err
    assert "ok" in done.out
    assert "mask_empty" in done.out
    assert "inliers" in done.out
    assert images.decode_color(overlay.read_bytes(), 10).shape == demo_scene().rgb.shape
    rows = json.loads(answer.read_text())["poses"]
    assert [(row["object_id"], row["status"]) for row in rows] == [("housing", "ok"), ("housing", "rejected")]
    np.testing.assert_allclose(rows[0]["translation"], demo_scene().instances[0].T_cam_obj[:3, 3] * 1000, atol=2)


def test_detections_of_sam6d_are_taken_as_they_are(server: RunningServer, pem: Pem, files: Path) -> None:
    choice = ["--detections", files / "ism.json", "--object", "5=housing"]
    done = pem("estimate", *frame(files), *choice, "--json", "-", "--url", server.url)
    (row,) = done.json()["poses"]
    assert (row["status"], row["object_id"], row["bbox"]) == ("ok", 5, [0, 0, 5, 5])


def test_detections_whose_categories_are_names_need_no_mapping(
    server: RunningServer, pem: Pem, files: Path, tmp_path: Path
) -> None:
    items = [
        {"category_id": instance.shape.name, "segmentation": encode_rle(instance.mask)}
        for instance in demo_scene().instances[:2]
    ]
    (tmp_path / "two.json").write_text(json.dumps(items))
    choice = ["--detections", tmp_path / "two.json", "--object", "housing", "--object", "mug"]
    done = pem("estimate", *frame(files), *choice, "--json", "-", "--url", server.url)
    assert [(row["object_id"], row["status"]) for row in done.json()["poses"]] == [("housing", "ok"), ("mug", "ok")]


def test_one_object_for_the_masks_is_named_in_the_answer(server: RunningServer, pem: Pem, files: Path) -> None:
    arguments = ["estimate", *frame(files), "--mask", files / "mask.png", "--url", server.url]
    assert " housing " in pem(*arguments, "--object", "housing").out
    (row,) = pem(*arguments, "--object", "5=housing", "--json", "-").json()["poses"]
    assert (row["status"], row["object_id"]) == ("ok", "5")


def test_a_wrong_unit_is_told_in_the_servers_words_alone(server: RunningServer, pem: Pem, files: Path) -> None:
    choice = ["--object", "housing", "--mask", files / "mask.png", "--depth-scale", 0.001, "--url", server.url]
    done = pem("estimate", *frame(files), *choice)
    assert done.code == 1
    told = done.err[done.err.index("the server refused") :].splitlines()
    assert "multiply depth_scale by 1000 [422 units, at cam_params.depth_scale]" in told[0]
    assert [line.startswith("(request id ") for line in told[1:]] == [True], "no hint beside the server's"


def test_objects_from_file_to_removal(server: RunningServer, pem: Pem, tmp_path: Path) -> None:
    file = tmp_path / "tee.ply"
    file.write_bytes(mesh_to_ply(SHAPES["tee"]().mesh))
    at = ["--url", server.url]
    first = pem("objects", "add", file, "--name", "cli-tee", *at)
    assert "already known" not in first.err
    again = pem("objects", "add", file, "--name", "cli-tee", *at)
    assert "tee.ply was already known" in again.err
    added = pem("objects", "add", file, "--name", "cli-tee", "--json", "-", *at).json()
    assert added["status"] == "ready"
    other = tmp_path / "wedge.ply"
    other.write_bytes(mesh_to_ply(SHAPES["wedge"]().mesh))
    taken = pem("objects", "add", other, "--name", "cli-tee", *at)
    assert (taken.code, "`pem objects remove NAME` frees it" in taken.err) == (1, True)
    assert "`pem objects add --replace` moves it" in taken.err
    odd = tmp_path / "tee.bin"
    odd.write_bytes(file.read_bytes())
    pem("objects", "add", odd, "--cad-format", "ply", "--name", "cli-t", "--json", "-", *at).json()
    listed = pem("objects", "list", "--json", "-", *at).json()["objects"]
    assert added["object_id"] in [item["object_id"] for item in listed]
    assert re.search(rf"cli-tee, cli-t .* {added['object_id'][:12]} ", pem("objects", "list", *at).out)
    shown = pem("objects", "show", "cli-tee", *at).out
    assert added["object_id"] in shown
    assert re.search(r"engine geometric .* ready, onboarded in \d+\.\d s on 1 thread, \d\.\d MB on disk", shown)
    moved = pem("objects", "add", other, "--name", "cli-tee", "--replace", "--json", "-", *at).json()
    assert moved["object_id"] != added["object_id"]
    short = added["object_id"][:12].upper()
    assert pem("objects", "show", short, "--json", "-", *at).json()["names"] == ["cli-t"]
    pem("objects", "add", file, "--name", "cli-tea", *at)
    removed = pem("objects", "remove", "cli-t", *at)
    assert (removed.code, "removed the name cli-t; the object is still cli-tea" in removed.err) == (0, True)
    assert pem("objects", "remove", short, "--json", "-", *at).json() == {"removed": added["object_id"]}
    assert pem("objects", "show", "cli-tea", *at).code == 1
    assert "takes" not in pem("objects", "show", "cli-tee", *at).out
    assert pem("objects", "remove", "cli-tee", *at).code == 0
    gone = pem("objects", "show", "cli-tee", *at)
    assert gone.code == 1
    assert "404" in gone.err
    assert "\n`pem objects list` shows the names" in gone.err
    assert "request id" in gone.err


def test_the_beginning_of_an_id_stands_for_its_object_where_no_name_is_meant(
    pem: Pem, monkeypatch: pytest.MonkeyPatch
) -> None:
    health = Health(faces=4, watertight=True, extents_mm=(1, 1, 1), diameter_mm=2)

    def item(object_id: str, *names: str) -> ObjectAnswer:
        more: dict[str, Any] = {"model_unit": "mm", "health": health, "symmetries": None, "names": list(names)}
        name = names[-1] if names else None
        return ObjectAnswer(object_id=object_id.ljust(64, "0"), name=name, status="ready", progress=1.0, **more)

    objects = [item("beef01", "mug", "cup"), item("beef02"), item("cafe03", "beef")]
    removed: list[str] = []

    def get(_: client.Objects, which: str) -> ObjectAnswer:
        for one in objects:
            if which in (one.object_id, *one.names):
                return one
        raise client.NotFound(404, "unknown_object", f"no object is registered as {which!r}")

    monkeypatch.setattr(client.Objects, "get", get)
    monkeypatch.setattr(client.Objects, "list", lambda _: objects)
    monkeypatch.setattr(client.Objects, "remove", lambda _, which: removed.append(which))
    assert pem("objects", "remove", "beef").code == 0  # a name
    assert pem("objects", "remove", "beef02").code == 0
    assert removed == ["beef", objects[1].object_id]
    several = pem("objects", "remove", "beef0")
    assert several.code == 2
    assert "2 ids begin with beef0: beef01000000 (mug, cup), beef02000000 (-)" in several.err
    for unknown in ("bee", "caff", "mugs", ""):  # too short for the beginning of an id, of none, no beginning
        assert "no object is registered" in pem("objects", "remove", unknown).err
    assert len(removed) == 2


def test_status_is_a_table_or_json(server: RunningServer, pem: Pem) -> None:
    assert "geometric" in pem("status", "--wait", 5, "--url", server.url).out
    assert pem("status", "--url", server.url, "--json", "-").json()["server"] == "running"
    assert pem("openapi", "--url", server.url).json()["openapi"].startswith("3.1")


@pytest.mark.slow
def test_a_running_server_asks_for_the_key_that_was_just_made(
    start_server: Callable[..., RunningServer], pem: Pem
) -> None:
    server = start_server()
    at = ["status", "--url", server.url]
    assert pem(*at).code == 0
    key = pem("keys", "add", "robot", "--data-dir", server.data).out.strip()
    refused = pem(*at)
    assert (refused.code, "401 key_missing" in refused.err) == (1, True)
    assert "\ngive the key with --api-key or the variable PEM_API_KEY\n" in refused.err
    assert pem(*at, "--api-key", key).code == 0
    pem("keys", "add", "other", "--data-dir", server.data)
    pem("keys", "revoke", "robot", "--data-dir", server.data)
    assert "403 key_wrong" in pem(*at, "--api-key", key).err
    assert server.stop() == 0


@pytest.mark.slow
def test_the_demo_is_right(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pem", "demo", "--out", str(tmp_path / "demo"), "--json", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ok"]
    main = told["objects"][0]
    assert main["rotation_error_deg"] < 2
    assert main["translation_error_mm"] < 2
    left = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"overlay.png", "request.msgpack", "detections.json"} <= left
    names = {item["object"] for item in told["objects"]}
    assert {path.stem for path in (tmp_path / "demo").glob("*.ply")} == names
    assert {path.stem for path in (tmp_path / "demo/masks").glob("*.png")} == names
    assert not [name for name in left if name.startswith("data-")]
    steps = [line for line in done.stderr.splitlines() if "onboarding the" in line]
    assert len(steps) == len(told["objects"]), "without a terminal each step is a line"
