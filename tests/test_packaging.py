"""Installation, setup and deployment: each file at the project's root is tried as far as a test can."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from pem import cli
from serve import settings
from tests.running import wait_until

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLIENT = tomllib.loads((ROOT / "client/pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LAYERS = ["pointnet2_ext", "posekit", "workers", "serve"]  # each may import itself and those before it
PEM = "pem"  # the client's package, which imports none of them
PEM_USERS = ["workers", "serve"]  # which may import it
CLIENT_VERSION = metadata.version("pem-client")
FOLDERS = {PEM: ROOT / "client" / PEM} | {name: ROOT / name for name in LAYERS}
HEAVY = ["torch", "open3d", "mosec", "cv2", "trimesh", "scipy"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


# ---- dependencies


def test_every_constraint_is_one_exact_public_version():
    assert [line for line in pins().items() if not re.fullmatch(r"\d[\w.]*", line[1])] == []


def test_every_dependency_is_pinned_to_a_version_it_allows():
    pinned = {canonical(name): version for name, version in pins().items()}
    optional = [text for extra in ("server", "otel", "dev") for text in EXTRAS[extra]]
    wanted = [Requirement(text) for text in [*CLIENT["dependencies"], *PROJECT["dependencies"], *optional]]
    ours = {"pem-client", "pem-server"}
    for requirement in (one for one in wanted if canonical(one.name) not in ours):
        assert pinned[canonical(requirement.name)] in requirement.specifier, requirement


def test_what_is_installed_here_is_what_is_pinned():
    # Here alone: once something imports setuptools, copies that it brings for itself are on the path, too.
    places = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    installed = {canonical(dist.name): dist.version.split("+")[0] for dist in metadata.distributions(path=places)}
    differing = {name: installed[canonical(name)] for name in pins() if canonical(name) in installed}
    assert differing == {name: version for name, version in pins().items() if name in differing}


def test_both_distributions_carry_one_version_and_the_server_pins_its_client():
    import pem
    import serve

    assert pem.__version__ == serve.__version__
    assert metadata.version("pem-server") == metadata.version("pem-client") == serve.__version__
    assert f"pem-client=={serve.__version__}" in PROJECT["dependencies"]


def test_the_client_is_light():
    assert {Requirement(text).name for text in CLIENT["dependencies"]} == {"httpx", "msgspec", "numpy", "rich", "typer"}
    assert CLIENT["requires-python"] == ">=3.10"


def test_style_and_types_of_the_client_are_held_to_its_oldest_python():
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert ruff["per-file-target-version"] == {"client/**": "py310"}
    assert re.search(r"^\t@\$\(BIN\)/mypy --python-version 3\.10 --package pem$", (ROOT / "Makefile").read_text(), re.M)


# ---- layers


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", FOLDERS)
def test_every_library_that_is_imported_is_declared(package):
    texts = CLIENT["dependencies"] if package == PEM else [*PROJECT["dependencies"], *EXTRAS["server"], *EXTRAS["otel"]]
    declared = {canonical(Requirement(text).name) for text in texts}
    brought_by = metadata.packages_distributions()
    for path in sorted(FOLDERS[package].rglob("*.py")):
        for name in set(imports_of(path)) - set(sys.stdlib_module_names) - {*LAYERS, PEM}:
            distributions = {canonical(dist) for dist in brought_by.get(name, [name])}
            assert distributions & declared, f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml leaves out"


@pytest.mark.parametrize("project, packages", [(PROJECT, LAYERS), (CLIENT, [PEM])], ids=["server", "client"])
def test_every_library_that_is_declared_is_imported(project, packages):
    by_name = {"httptools"}  # uvicorn takes it where it finds it
    brought_by = metadata.packages_distributions()
    files = [path for package in packages for path in FOLDERS[package].rglob("*.py")]
    imported = {dist for path in files for name in imports_of(path) for dist in brought_by.get(name, [name])}
    declared = {canonical(Requirement(text).name) for text in project["dependencies"]}
    assert declared - {canonical(dist) for dist in imported} - by_name == set()


@pytest.mark.parametrize("package", FOLDERS)
def test_importing_a_package_is_cheap_and_it_is_typed(package):
    assert (FOLDERS[package] / "py.typed").exists()
    code = f"import sys, {package}; print([name for name in {HEAVY!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.stdout.strip() == "[]", answer.stderr


# ---- the two wheels, built without torch, and the client's installed alone


def closure(names: list[str]) -> set[str]:
    """Return the distributions that installing `names` would bring."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonical(waiting.pop())
        if name not in found and name != "pem-client":  # ours comes as the wheel that was built
            found.add(name)
            needs = [Requirement(text) for text in metadata.requires(name) or []]
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def make_site(folder: Path, names: list[str]) -> Path:
    """Make a folder of links to what installing `names` would bring: a fresh environment without a network."""
    folder.mkdir()
    make_links(folder, closure(names))
    return folder


def make_links(folder: Path, distributions: set[str]) -> None:
    """Make links to the files of distributions that are installed here."""
    for name in distributions:
        for file in metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))


def python_with(site: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "100"}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def build_wheel(tree: Path, work: Path, *command: str) -> tuple[Path, str]:
    """Build a tree's wheel without torch; return it and the build's output."""
    site = make_site(work / "site", ["setuptools", "wheel"])
    answer = python_with(site, *command, "-q", "bdist_wheel", "-d", str(work), folder=tree)
    assert answer.returncode == 0, answer.stderr
    (wheel,) = work.glob("*.whl")
    return wheel, answer.stderr


@pytest.fixture(scope="module")
def plain_build(tmp_path_factory) -> tuple[Path, str]:
    """Build the server's wheel; return it and the build's output."""
    work = tmp_path_factory.mktemp("plain_build")
    tree = work / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    for name in (*LAYERS, "client", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
    return build_wheel(tree, work, "setup.py")


@pytest.fixture(scope="module")
def client_wheel(tmp_path_factory) -> Path:
    """Build the client's wheel."""
    work = tmp_path_factory.mktemp("client_build")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT / "client", work / "tree", ignore=ignored)
    return build_wheel(work / "tree", work, "-c", "import setuptools; setuptools.setup()")[0]


@pytest.fixture(scope="module")
def client_install(client_wheel, tmp_path_factory) -> Path:
    """Make a site folder with the client's wheel and its dependencies only."""
    names = [Requirement(text).name for text in CLIENT["dependencies"]]
    site = make_site(tmp_path_factory.mktemp("client_install") / "site", names)
    with zipfile.ZipFile(client_wheel) as wheel:
        wheel.extractall(site)
    return site


def packed_files(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def entry_points(wheel: Path) -> str:
    files = zipfile.ZipFile(wheel)
    (name,) = (name for name in files.namelist() if name.endswith(".dist-info/entry_points.txt"))
    return files.read(name).decode()


@pytest.mark.slow
def test_a_build_without_torch_goes_on_and_says_so(plain_build):
    wheel, said = plain_build
    assert "pointnet2_ext, posekit.geometric, posekit.sam6d: compiled kernels are NOT built" in said
    assert "--no-build-isolation" in said
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_holds_what_the_tree_holds(plain_build):
    sources = {str(path.relative_to(ROOT)) for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}
    static = {str(path.relative_to(ROOT)) for path in (ROOT / "serve/gateway/static").rglob("*") if path.is_file()}
    assert static
    assert packed_files(plain_build[0]) == sources | static | {f"{layer}/py.typed" for layer in LAYERS}
    assert "[pem.server]\nserver = serve.commands.register" in entry_points(plain_build[0])
    assert "console_scripts" not in entry_points(plain_build[0]), "`pem` is the client's"


def test_the_clients_wheel_has_one_top_level_name_the_command_and_the_licence(client_wheel):
    assert client_wheel.name == f"pem_client-{CLIENT_VERSION}-py3-none-any.whl"
    sources = {str(path.relative_to(ROOT / "client")) for path in (ROOT / "client/pem").rglob("*.py")}
    assert packed_files(client_wheel) == sources | {"pem/py.typed"}
    assert "[console_scripts]\npem = pem.cli:main" in entry_points(client_wheel)
    assert any(name.endswith("/LICENSE") for name in zipfile.ZipFile(client_wheel).namelist())


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["REQUIRE_KERNELS", "FORCE_CUDA"])
def test_required_kernels_that_cannot_be_built_are_an_error(tmp_path, variable):
    shutil.copy(ROOT / "setup.py", tmp_path)
    site = make_site(tmp_path / "site", ["setuptools"])
    code = f"import os, runpy; os.environ['{variable}'] = '1'; runpy.run_path('setup.py')"
    answer = python_with(site, "-c", code, folder=tmp_path)
    assert answer.returncode != 0
    assert "compiled kernels are required and cannot be built: torch cannot be imported" in answer.stderr


@pytest.mark.slow
def test_kernels_that_do_not_compile_are_named_and_leave_the_others_alone(tmp_path):
    shutil.copy(ROOT / "setup.py", tmp_path)
    for package, text in (("pointnet2_ext", "int one() { return 1; }"), ("posekit/geometric", "not C++")):
        (tmp_path / package / "csrc").mkdir(parents=True)
        (tmp_path / package / "csrc/some.cpp").write_text(text)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert "posekit.geometric._kernels_cpu: compiled kernels are NOT built" in answer.stderr
    assert [path.parent.name for path in tmp_path.glob("*/_kernels_cpu.so")] == ["pointnet2_ext"]
    strict = subprocess.run(command, cwd=tmp_path, env={**os.environ, "REQUIRE_KERNELS": "1"}, capture_output=True)
    assert strict.returncode != 0


def libraries(cuda: str | None, home: Path, *, gpu: bool, forced: bool) -> subprocess.CompletedProcess[str]:
    """Run setup.py with torch for this CUDA and a toolkit in `home`, to print the libraries that it would build."""
    code = (
        "import runpy, setuptools, torch\n"
        "from torch.utils import cpp_extension\n"
        f"torch.version.cuda, cpp_extension.CUDA_HOME = {cuda!r}, {str(home)!r}\n"
        f"torch.cuda.is_available = lambda: {gpu}\n"
        "setuptools.setup = lambda **given: print(*(extension.name for extension in given['ext_modules']))\n"
        "runpy.run_path('setup.py')"
    )
    environment = {**os.environ, "FORCE_CUDA": str(int(forced))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("gpu, forced", [(True, False), (False, True), (False, False)])
def test_cuda_is_compiled_where_there_is_a_gpu_or_it_is_forced(tmp_path, gpu, forced):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch()
    names = libraries("13.0", tmp_path, gpu=gpu, forced=forced).stdout.split()
    assert "pointnet2_ext._kernels_cpu" in names
    assert ("pointnet2_ext._kernels_cuda" in names) == (gpu or forced)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cuda, missing",
    [
        ("13.0", r"there is no nvcc in .*: install the CUDA toolkit 13.0 or name its folder in CUDA_HOME"),
        (None, r"torch \S+ is a build without CUDA: install one that has it"),
    ],
)
def test_forced_cuda_that_cannot_be_says_what_is_missing(tmp_path, cuda, missing):
    answer = libraries(cuda, tmp_path, gpu=False, forced=True)
    assert answer.returncode != 0
    assert re.search(f"FORCE_CUDA=1, but {missing}", answer.stderr)


def test_the_client_alone_brings_no_heavy_library(client_install):
    for name in (*HEAVY, *LAYERS):
        assert not (client_install / name).exists()


@pytest.mark.parametrize("module", ["pem", "pem.client", "pem.cli", "pem.contract", "pem.bench.cli"])
def test_the_client_alone_imports(client_install, module, tmp_path):
    answer = python_with(client_install, "-W", "error", "-c", f"import {module}", folder=tmp_path)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["status", "--help"], ["estimate", "--help"], ["bench", "--help"]])
def test_the_command_line_of_the_client_alone_explains_itself(client_install, arguments, tmp_path):
    answer = python_with(client_install, "-m", "pem", *arguments, folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "Usage: pem" in answer.stdout


def test_the_client_alone_asks_a_server_and_says_what_running_one_needs(client_install, tmp_path):
    code = (
        "import numpy as np, pem\n"
        "server = pem.Client('http://127.0.0.1:9', retries=0)\n"
        "try:\n"
        "    server.estimate(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint16), np.eye(3), [np.eye(4) > 0],"
        " object_id='x')\n"
        "except pem.ConnectionFailed as error:\n"
        "    print(error)\n"
    )
    answer = python_with(client_install, "-c", code, folder=tmp_path)
    assert "no server answers at http://127.0.0.1:9" in answer.stdout, answer.stderr
    serve = python_with(client_install, "-m", "pem", "serve", "--port", "9", folder=tmp_path)
    assert serve.returncode == 1
    assert "this needs pem-server, which is not installed here" in serve.stderr


def test_both_wheels_together_are_one_command_line(client_install, plain_build, tmp_path):
    both = shutil.copytree(client_install, tmp_path / "both", symlinks=True)
    light = make_site(tmp_path / "light", ["safetensors"])  # of what the server needs, for its settings
    (both / "safetensors").symlink_to(light / "safetensors")
    with zipfile.ZipFile(plain_build[0]) as wheel:
        wheel.extractall(both)
    answer = python_with(both, "-m", "pem", "serve", "--help", folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "--data-dir" in answer.stdout, "without torch and mosec: these are imported when they are used"


# ---- make and its scripts


def sh(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script of ours; programs in `path` come before the system's."""
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"} if path else dict(os.environ)
    return subprocess.run(["sh", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_plain_make_explains_the_targets():
    answer = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    for target in ("demo", "serve", "test", "check", "bench", "clean", "help"):
        assert re.search(rf"^  make {target} +[A-Z]", answer.stdout, re.MULTILINE), target


def test_without_an_interpreter_make_says_what_to_do():
    answer = sh("scripts/system_packages.sh", "runtime", "python9.99")
    assert answer.returncode == 1
    assert "python9.99 is not installed; name another with: make PYTHON=" in answer.stderr


@pytest.fixture
def setup_script():
    """Import scripts/setup.py as a module."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "scripts/setup.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_setup_refuses_an_interpreter_that_is_too_old(setup_script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(setup_script, "OLDEST", (99, 0))
    monkeypatch.setattr(sys, "argv", ["setup.py", str(tmp_path / "venv")])
    assert setup_script.main() == 1
    assert "name a newer interpreter with: make PYTHON=" in capsys.readouterr().err
    assert not (tmp_path / "venv").exists()


def test_setup_says_which_package_of_how_many(setup_script, tmp_path):
    """A stand-in for pip prints what pip prints, and puts packages into site-packages as pip does."""
    site = tmp_path / "lib/python3.11/site-packages"
    site.mkdir(parents=True)
    go_on = tmp_path / "go-on"
    program(
        tmp_path,
        "python",
        "echo 'Collecting torch>=2.6'; echo '  Downloading torch-2.13.0-cp311-manylinux.whl (180.2 MB)'\n"
        f"while [ ! -e {go_on} ]; do sleep 0.02; done\n"
        "echo 'Installing collected packages: typing-extensions, torch'\n"
        f"mkdir {site}/typing_extensions-4.16.dist-info\n"
        f"while [ -e {go_on} ]; do sleep 0.02; done",
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "python").rename(tmp_path / "bin/python")
    pip = setup_script.Pip(tmp_path, ["torch"], tmp_path / "setup.log")
    wait_until(lambda: pip.state() == "1 packages found, downloading torch (180.2 MB)", 10, "the download")
    go_on.touch()
    wait_until(lambda: pip.state() == "installing package 2 of 2: torch", 10, "the installation")
    go_on.unlink()
    pip.check()
    assert "Collecting torch" in (tmp_path / "setup.log").read_text()


def test_setup_shows_the_end_of_the_log_where_pip_fails(setup_script, tmp_path, capsys):
    (tmp_path / "lib/python3.11/site-packages").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin", "python", "echo 'ERROR: no matching distribution'; exit 1")
    pip = setup_script.Pip(tmp_path, ["nonsense"], tmp_path / "setup.log")
    with pytest.raises(setup_script.Failed, match=r"pip install nonsense failed .*setup\.log"):
        pip.check()
    assert capsys.readouterr().err.count("no matching distribution") == 2, "tried twice"


def test_setup_installs_all_that_the_two_projects_name(setup_script):
    server = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(server["dependencies"]) - set(setup_script.requirements(dev=False)) == {"pem-client==0.1.0"}
    assert {"httpx>=0.28"} <= set(setup_script.requirements(dev=False))
    assert set(server["optional-dependencies"]["dev"]) <= set(setup_script.requirements(dev=True))


def test_the_libraries_of_the_system_are_here():
    answer = sh("scripts/system_packages.sh", "runtime", sys.executable)
    assert (answer.returncode, answer.stdout) == (0, ""), answer.stderr


def test_missing_libraries_without_root_give_the_command_to_run(tmp_path):
    nothing_loads = program(tmp_path, "python-without-libraries", "exit 1")
    program(tmp_path, "id", "echo 1000")
    program(tmp_path, "apt-get", "exit 1")
    answer = sh("scripts/system_packages.sh", "runtime", str(nothing_loads), path=tmp_path)
    assert answer.returncode == 1
    assert "missing libusb-1.0-0 libgl1 libgomp1 libglib2.0-0" in answer.stderr
    assert "sudo sh -c 'apt-get update && apt-get install -y --no-install-recommends libusb-1.0-0" in answer.stderr


def test_ci_lints_then_tests_and_stops_at_the_first_failure():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert "make lint" in lines
    assert lines.index("make lint") < next(index for index, line in enumerate(lines) if "make test " in f"{line} ")


def sum_tests(tmp_path: Path, *outputs: str) -> subprocess.CompletedProcess[str]:
    """Run CI's last step on the output of several runs."""
    paths = []
    for number, text in enumerate(outputs):
        paths.append(tmp_path / str(number))
        paths[-1].write_text(text)
    command = [sys.executable, ROOT / "scripts/sum_tests.py", *paths]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_ci_ends_with_one_line_that_sums_its_runs(tmp_path):
    fast = "tests .....\n========= 3000 passed, 7 skipped, 90 deselected in 300.50s (0:05:00) =========\n"
    slow = "90 passed, 1 skipped, 3000 deselected, 1 warning in 600.25s (0:10:00)\nmake: done\n"
    answer = sum_tests(tmp_path, fast, slow)
    assert answer.stdout == "==== 3090 passed, 8 skipped, 1 warning in 900.75s ====\n"
    assert answer.returncode == 0


@pytest.mark.parametrize(
    "output, counted",
    [
        ("\x1b[31m== 1 failed, 9 passed, 2 subtests passed in 5.00s ==\x1b[0m", "1 failed, 19 passed in 10.00s"),
        ("== 9 passed, 1 error in 5.00s ==", "19 passed, 1 error in 10.00s"),
        ("Killed", "10 passed, 1 error in 5.00s"),
    ],
    ids=["a failure", "an error", "broken off"],
)
def test_a_run_that_failed_or_broke_off_fails_the_sum(tmp_path, output, counted):
    answer = sum_tests(tmp_path, "== 10 passed in 5.00s ==", output)
    assert (answer.returncode, answer.stdout) == (1, f"==== {counted} ====\n")


# ---- settings files


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_settings_file_loads(path):
    assert isinstance(settings.load(path, environment={}), settings.Settings)


def test_the_default_settings_file_holds_the_defaults():
    assert settings.load(ROOT / "configs/default.toml", environment={}) == settings.Settings()


def printed_settings(*options: str, capsys) -> str:
    with pytest.raises(SystemExit) as left:
        cli.main(["serve", "--print-config", *options])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_the_default_settings_file_is_the_manual_of_the_settings(monkeypatch, capsys):
    for variable in settings.every():
        monkeypatch.delenv(variable, raising=False)
    command = "env -i .venv/bin/pem serve --print-config > configs/default.toml"
    assert (ROOT / "configs/default.toml").read_text() == printed_settings(capsys=capsys), f"write it anew: {command}"


def test_the_printed_settings_are_those_in_effect(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PEM_LOG_FORMAT", "json")
    monkeypatch.setenv("PEM_METRICS_OBJECTS", "housing, bolt")
    options = ["--ism-url", "http://robot:8002", "--data-dir", 'a "quoted" ü', "--log-format", "console"]
    file = tmp_path / "printed.toml"
    file.write_text(printed_settings(*options, capsys=capsys))
    read = settings.load(file, environment={})
    assert read.metrics.objects == ("housing", "bolt")
    assert (read.ism.url, read.data_dir, read.log.format) == ("http://robot:8002", 'a "quoted" ü', "console")


def test_every_setting_has_words_and_a_number_its_unit():
    everything = settings.every().values()
    assert [one.variable for one in everything if not one.words] == []
    no_unit = [one.path[-1] for one in everything if one.kind in (int, float) and one.note("unit") is None]
    assert no_unit == ["port"]


# ---- containers and weights


def test_the_image_runs_as_a_plain_user_with_an_init_and_asks_readyz():
    text = (ROOT / "Dockerfile").read_text()
    runtime = text[text.index("AS runtime") :]
    assert re.search(r"^USER 10001:10001$", runtime, re.MULTILINE)
    assert 'ENTRYPOINT ["tini", "--"]' in runtime
    assert 'CMD ["pem", "serve"]' in runtime
    assert re.search(r"^HEALTHCHECK .*\\\n.*/readyz", runtime, re.MULTILINE)
    assert "PEM_HOST=0.0.0.0" in runtime
    assert f"EXPOSE {settings.Settings().port}" in runtime
    assert f"ARG VERSION={metadata.version('pem-server')}" in runtime


def test_the_image_installs_the_libraries_that_make_installs():
    wanted = set(re.findall(r'missing="\$missing (lib\S+)"', (ROOT / "scripts/system_packages.sh").read_text()))
    assert len(wanted) == 4
    assert wanted <= set((ROOT / "Dockerfile").read_text().split())


def test_the_image_installs_the_client_and_the_server():
    assert re.search(r"pip install .*--no-build-isolation \./client \"\.\[otel\]\"", (ROOT / "Dockerfile").read_text())


def test_the_image_is_built_from_listed_files_only():
    listed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {*LAYERS, "client"} <= set(listed)
    assert [name for name in listed if not (ROOT / name).exists()] == []


def test_compose_gives_shared_memory_and_more_time_than_the_drain():
    server = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["server"]
    seconds = int(server["stop_grace_period"].removesuffix("s"))
    assert server["shm_size"] == "1gb"
    assert seconds > float(server["environment"]["PEM_DRAIN_S"]) == settings.Settings().drain_s
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])
    assert "/readyz" in server["healthcheck"]["test"][-1]


def test_every_variable_in_the_deployment_files_is_a_setting():
    files = ["Dockerfile", "compose.yaml", "deploy/compose.gpu.yaml", "deploy/pem-server.service", "deploy/README.md"]
    known = {*settings.every(), "PEM_PUBLISHED_PORT"}
    for name in files:
        used = set(re.findall(r"\bPEM_[A-Z_]*[A-Z]\b", (ROOT / name).read_text()))
        assert used - known == set(), name


def test_the_gpu_overlay_changes_the_same_service():
    overlay = yaml.safe_load((ROOT / "deploy/compose.gpu.yaml").read_text())["services"]
    assert overlay.keys() == {"server"}
    assert overlay["server"]["build"]["args"] == {"DEVICE": "gpu"}


def test_every_declared_weight_has_a_source_a_checksum_and_a_licence():
    manifest = json.loads((ROOT / "checkpoints/manifest.json").read_text())
    for weight in manifest["weights"]:
        assert weight.keys() == manifest["schema"].keys()
        assert re.fullmatch(r"[0-9a-f]{64}", weight["sha256"])
