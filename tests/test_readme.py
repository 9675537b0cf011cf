"""The pages for people: every example in the README and in docs/api.md is run, and its output compared.

An example that no rule below covers fails its test, so that none can be added untested. The other pages are held to
what can be checked of them: links, commands, the unit check's words, events, metrics, codes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from pem.host.ports import free_port
from posekit.synthetic.scenes import demo_scene
from posekit.unit_check import Observation, judge
from serve.commands import demo
from serve.errors import CODES
from serve.telemetry.metrics import Metrics
from tests.running import RunningServer

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("docs/**/*.md")]
    if not any(part.startswith(".") or part in ("data", "demo", "build") for part in path.relative_to(ROOT).parts)
)
ADDRESS = "http://127.0.0.1:8003"
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Example:
    """A fenced block, and the block of its output."""

    page: str
    line: int
    language: str
    text: str
    shown: str | None  # the json or text block after it, where there is nothing to run in between

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[tuple[int, str, str]]:
    """(line, language, text) of each fenced block."""
    text = (ROOT / page).read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start()) + 1, match[1], match[2]) for match in found]


def examples(page: str) -> list[Example]:
    """Return the examples that can be run, with their output; diagrams are separate examples."""
    found: list[Example] = []
    for line, language, text in blocks(page):
        last = found[-1] if found else None
        if language in ("json", "text") and last and last.language in ("sh", "python") and _prints(last):
            found[-1] = Example(last.page, last.line, last.language, last.text, text)
        else:
            found.append(Example(page, line, language, text, None))
    return found


def _prints(example: Example) -> bool:
    return example.shown is None and ("curl" in example.text or example.language == "python")


def _is_slow(example: Example) -> bool:
    """Return True for an example that starts a server of its own, or makes up weights."""
    words = f" {example.text.replace('/', ' ')} "
    return example.language == "sh" and any(command in words for command in (" pem serve ", " pem bench ", " weights "))


EXAMPLES = [
    pytest.param(example, marks=pytest.mark.slow if _is_slow(example) else (), id=str(example))
    for page in ("README.md", "docs/api.md")
    for example in examples(page)
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder as it is after `make demo`."""
    place = tmp_path_factory.mktemp("checkout")
    (place / "demo").mkdir()
    demo._write_inputs(place / "demo", demo_scene())
    (place / "configs").symlink_to(ROOT / "configs")
    return place


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_does_what_the_page_says(
    example: Example,
    folder: Path,
    server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    words = example.text.split()
    if "weights import" in example.text:
        save_checkpoint(request.getfixturevalue("generated_weights"), folder / words[-1])
    if example.language == "sh" and words[0] == "make":
        check_targets(example)
    elif example.language == "sh" and words[0] == "docker":
        check_docker(example)
    elif example.language == "sh" and " pem serve " in f" {example.text.replace('/', ' ')} ":
        check_serve(example, folder)
    elif example.language == "sh" and " bench " in example.text:
        shorter = " --duration 1 --warmup 0 --scenes 1 --objects 2 --masks 1"  # what it measures is tested elsewhere
        run_shell(dataclasses.replace(example, text=example.text.strip() + shorter), folder, server.url)
    elif example.language == "sh":
        compare(run_shell(example, folder, server.url), example.shown)
    elif example.language == "python":
        monkeypatch.chdir(folder)
        exec(compile(example.text.replace(ADDRESS, server.url), str(example), "exec"), {"__name__": "example"})
        compare(capsys.readouterr().out, example.shown)
    elif example.language == "text" and "→" in example.text:
        assert [stage for stage in ("decode", "pose", "respond") if stage not in example.text] == []
    elif example.language == "text":
        assert [path for path in tree(example.text) if not (ROOT / path).exists()] == []
    else:
        pytest.fail(f"no rule runs this {example.language or 'unmarked'} block; write one here, or show its output")


def save_checkpoint(weights: Path, path: Path) -> None:
    """Save weights as the original saves them."""
    import torch
    from safetensors.torch import load_file

    torch.save({"meta": {"iter": 0}, "model": load_file(weights)}, path)


def check_targets(example: Example) -> None:
    """Check that each line is a target that make knows; running them is tested elsewhere, and too slow to repeat."""
    for line in example.text.splitlines():
        command = shlex.split(line, comments=True)
        done = subprocess.run(
            ["make", "--dry-run", *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert BIN.parent.name in done.stdout or ".venv" in done.stdout


def check_docker(example: Example) -> None:
    """Check that the commands fit the Dockerfile; if there is a docker, let it parse them, too."""
    text = (ROOT / "Dockerfile").read_text()
    build, run = [shlex.split(line) for line in example.text.splitlines()]
    assert build[:2] == ["docker", "build"]
    assert "ARG DEVICE" in text
    assert "FROM python" in text or "base-cpu" in text
    assert run[-1] == build[build.index("-t") + 1]
    assert f"EXPOSE {run[run.index('-p') + 1].rpartition(':')[2]}" in text
    assert f"VOLUME {run[run.index('-v') + 1].partition(':')[2]}" in text


def tree(text: str) -> list[str]:
    """Return the path at the beginning of each line of a drawn tree; an indented one is in the folder above it."""
    paths, top = [], ""
    for line in text.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            top = name
        paths.append(top + name if line.startswith(" ") else name)
    return paths


def check_serve(example: Example, folder: Path) -> None:
    """Check that the server starts, says that it is ready, and stops with 0."""
    words = shlex.split(example.text)
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    command = [str(BIN / "pem") if word.endswith("/pem") else word for word in words[len(variables) :]]
    given, port = command[command.index("--port") + 1], free_port()
    command[command.index(given)] = str(port)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PEM_")} | variables
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
    try:
        end = time.monotonic() + 120
        while not _ready(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def run_shell(example: Example, folder: Path, url: str) -> str:
    """Run a block, changing only the server's address and the program's place; return its standard output."""
    if "curl" in example.text and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    script = example.text.replace(ADDRESS, url).replace(".venv/bin/", f"{shlex.quote(str(BIN))}/")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PEM_")} | {"PEM_URL": url}
    done = subprocess.run(
        ["sh", "-eu", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if example.shown is None:
        assert '"success":false' not in done.stdout, done.stdout
    return done.stdout


# ------------------------------------------------------------------------------------------- what it is said to print


def compare(printed: str, shown: str | None) -> None:
    """Compare output with the page: JSON holds what is shown, numbers to the digits shown; other text is equal."""
    if shown is None:
        return
    try:
        expected = json.loads(shown, parse_float=Decimal)
    except json.JSONDecodeError:
        assert numbers_rounded(printed) == numbers_rounded(shown)
        return
    holds(json.loads(printed), expected, "answer")


#: What differs from run to run and from machine to machine: there, and of the same kind.
VARYING = re.compile(r"(_ms|seconds|time|created|request_id|total)$")


def holds(actual: Any, expected: Any, where: str) -> None:
    """Check that `actual` has everything that `expected` has."""
    if VARYING.search(where):
        assert isinstance(actual, float if isinstance(expected, Decimal) else type(expected)), where
    elif isinstance(expected, dict):
        for name, value in expected.items():
            assert name in actual, f"{where}.{name} is not there"
            holds(actual[name], value, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for index, value in enumerate(expected):
            holds(actual[index], value, f"{where}[{index}]")
    elif isinstance(expected, Decimal):
        last_digit = 10.0 ** int(expected.as_tuple().exponent)
        assert actual == pytest.approx(float(expected), rel=0.001, abs=1.5 * last_digit), where
    else:
        assert actual == expected, where


def numbers_rounded(text: str) -> str:
    """Return text with numbers rounded to integers: the last digit may differ on another machine."""
    return " ".join(re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.0f}", text).split())


# ------------------------------------------------------------------------------------------------------------ all pages


def test_the_pages_are_found() -> None:
    assert {"README.md", "CHANGELOG.md"} <= {path.name for path in PAGES}
    assert ROOT / "docs/decisions/README.md" in PAGES


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        yield from ((page, target) for target in re.findall(r"\]\(([^)\s]+)\)", text))


def anchors(page: Path) -> set[str]:
    """Return the names under which a page's headings can be linked."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere() -> None:
    broken = []
    for page, link in links():
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs/decisions"
    listed = re.findall(r"\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text())
    assert listed == sorted(path.name for path in folder.glob("0*.md"))


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z]+)|^make ([a-z]+)", page.read_text(), re.M)}
    assert {one or other for one, other in named} <= targets


def test_every_benchmark_that_is_named_exists_with_its_options() -> None:
    shared = (ROOT / "benchmarks/service/trials.py").read_text()
    for page in PAGES:
        for module, options in re.findall(r"python -m benchmarks\.([\w.]+)([^`\n|]*)", page.read_text()):
            path = ROOT / "benchmarks" / module.strip(".").replace(".", "/")
            source = path / "run.py" if path.is_dir() else path.with_suffix(".py")
            assert source.exists(), f"{page.name}: {module}"
            text = source.read_text()
            text += shared if "trials.add_" in text else ""
            wrong = [option for option in re.findall(r"--[\w-]+", options) if f'"{option}"' not in text]
            assert wrong == [], f"{page.name}: {module}"


def test_no_page_names_a_place_on_one_machine() -> None:
    told = {page.name: re.findall(r"/(?:home|root|work|Users)/\S*", page.read_text()) for page in PAGES}
    assert {name: found for name, found in told.items() if found} == {}


def test_the_picture_is_small_enough_for_a_page() -> None:
    assert (ROOT / "docs/images/overlay.png").stat().st_size < 300_000


# -------------------------------------------------------------------------------------------------------- single pages


def test_every_failure_code_is_explained_with_its_status() -> None:
    section = (ROOT / "docs/api.md").read_text().rpartition("## Failures")[2]
    told: dict[str, set[int]] = {}
    for statuses, codes in re.findall(r"^\| ([\d, ]+) \| ([^|]*) \|", section, re.MULTILINE):
        for code in re.findall(r"`(\w+)`", codes):
            told.setdefault(code, set()).update(int(status) for status in statuses.split(","))
    assert told.keys() == CODES.keys()
    assert [code for code, (status, _) in CODES.items() if status not in told[code]] == []


def seen(depth_mm: float, extent_px: float = 145, pixels: int = 9000) -> Observation:
    return Observation(median_depth_mm=depth_mm, mask_px=pixels, mask_extent_px=extent_px, valid_px=pixels)


def test_the_words_of_the_unit_check_are_quoted_truly() -> None:
    page = (ROOT / "docs/UNITS.md").read_text()
    quoted = {" ".join(re.sub(r"^> ?", "", q, flags=re.M).split()) for q in re.findall(r"(?:^>.*\n)+", page, re.M)}
    slips: list[tuple[float, float, bool]] = [
        (0.507, 154.8, True),
        (507_000, 154.8, True),
        (5070, 154.8, False),
        (507, 0.1548, True),
        (507, 154_800, True),
        (507, 6.094, True),
        (507, 15.48, True),
    ]
    said = {
        judge([seen(depth_mm)], [diameter_mm], 612, 612, depth_scale_given=given).request_error
        for depth_mm, diameter_mm, given in slips
    }
    odd = [(seen(12_000, 40), 1200.0), (seen(4500, 400, 40_000), 4000.0), (seen(507, 500, 90_000), 154.8)]
    for one, diameter_mm in odd:
        said.update(judge([one], [diameter_mm], 612, 612).warnings)
    assert {text for text in quoted if "auto" not in text} == said
    from posekit.io import meshes

    assert len([text for text in quoted if "auto" in text]) == 1
    source = "".join(path.read_text() for path in Path(meshes.__file__).parent.glob("*.py"))
    assert 'model_unit "auto" took the file to be in ' in source


def test_every_event_that_is_explained_can_happen() -> None:
    page = (ROOT / "docs/OPERATIONS.md").read_text()
    table = page.partition("Events that ask for attention")[2].partition("## ")[0]
    events = [name for row in re.findall(r"^\| (`[^|]*) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)]
    source = "".join(path.read_text() for package in ("serve", "workers") for path in (ROOT / package).rglob("*.py"))
    assert len(events) > 10
    assert [event for event in events if f'"{event}"' not in source] == []


def test_every_metric_is_explained() -> None:
    page = (ROOT / "docs/METRICS.md").read_text()
    families = set(re.findall(r"^# TYPE (pose_\w+)", Metrics().expose().decode(), re.M))
    named = set(re.findall(r"^\| `(pose_\w+)`", page, re.M))
    assert {name for name in families if name not in named} == set()
    assert {name for name in named if name not in families} == set()
