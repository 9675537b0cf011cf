"""Fill a virtual environment with the packages that constraints.txt pins, and compile the kernels. `make` calls this.

    python3.11 scripts/setup.py .venv                                   what the server needs
    python3.11 scripts/setup.py .venv --dev                             and what its tests and checks need
    python3.11 scripts/setup.py .venv-peers --requirement FILE          what a file lists, without the server

Shows which package of how many is being installed, and compiles the kernels while packages download. pip's own output
goes to VENV/setup.log. Skips the server's steps whose inputs have not changed. Uses only the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 11)
BUILD_TOOLS = ["setuptools", "wheel", "ninja", "torch"]
KERNELS = """
import pointnet2_ext
from posekit.geometric import kernels as geometric
from posekit.sam6d import kernels as sam6d
print(*sorted({package.kernel_for("cpu") for package in (pointnet2_ext, geometric, sam6d)}))
"""
ON_TERMINAL = sys.stdout.isatty()
CLEAR = "\r\x1b[K" if ON_TERMINAL else ""
_BETWEEN_LINES_S = 10.0  # if standard output is not a terminal


class Failed(Exception):
    """A step cannot be done; the text says what to do."""


def say(text: str) -> None:
    """Print a permanent line."""
    print(f"{CLEAR}setup: {text}", flush=True)


class Progress:
    """A progress line that changes in place; without a terminal, a new line at most every ten seconds."""

    def __init__(self) -> None:
        self._shown = ""
        self._next = time.monotonic() + _BETWEEN_LINES_S / 2

    def show(self, text: str) -> None:
        """Show the progress, unless the text is already shown."""
        if text == self._shown or (not ON_TERMINAL and time.monotonic() < self._next):
            return
        self._shown, self._next = text, time.monotonic() + _BETWEEN_LINES_S
        line = f"setup:   {text}"
        print(f"{CLEAR}{line[: os.get_terminal_size().columns - 1]}" if ON_TERMINAL else line, end="", flush=True)
        if not ON_TERMINAL:
            print(flush=True)


class Pip:
    """A run of `pip install` in an environment, watched through its output and site-packages."""

    def __init__(self, venv: Path, arguments: list[str], log: Path) -> None:
        self._site = next((venv / "lib").glob("python3*")) / "site-packages"
        self._venv, self._arguments, self._log = venv, arguments, log
        self._found = 0
        self._coming = ""
        self._installing: list[str] = []
        self.returncode: int | None = None
        self._pip: subprocess.Popen[str] | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End pip if it still runs: nothing goes on installing after a failure."""
        self._stopped = True
        if self._pip is not None:
            self._pip.terminate()
        self.wait()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for pip to end, at most `seconds`; return True if it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def check(self) -> None:
        """Wait for pip to end; if it failed, show the end of its log and raise Failed."""
        self.wait()
        if self.returncode != 0:
            print(f"{CLEAR}{tail(self._log)}", file=sys.stderr)
            raise Failed(f"pip install {' '.join(self._arguments)} failed (the whole log: {self._log})")

    def state(self) -> str:
        """Return which package of how many is being installed, in words."""
        if not self._installing:
            return f"{self._found} packages found{self._coming}" if self._found else "looking for packages"
        there = {plain(path.name.split("-")[0]) for path in self._site.glob("*.dist-info")}
        missing = [name for name in self._installing if plain(name) not in there]
        done = len(self._installing) - len(missing)
        return f"installing package {min(done + 1, len(self._installing))} of {len(self._installing)}" + (
            f": {missing[0]}" if missing else ""
        )

    def _run(self) -> None:
        command = [str(self._venv / "bin/python"), "-m", "pip", "--disable-pip-version-check", "install"]
        command += ["--no-compile", "--constraint", "constraints.txt", *self._arguments]
        environment = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore", "PYTHONUNBUFFERED": "1"}
        for _ in range(2):  # a second attempt, since a download may fail
            with (
                self._log.open("a") as log,
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                ) as pip,
            ):
                self._pip = pip
                assert pip.stdout is not None
                for line in pip.stdout:
                    log.write(line)
                    log.flush()
                    self._read(line)
            if pip.returncode == 0 or self._stopped:
                break
            self._found, self._coming, self._installing = 0, " (once more, since that failed)", []
        self.returncode = pip.returncode

    def _read(self, line: str) -> None:
        if match := re.match(r"\s*(Collecting|Processing|Requirement already satisfied:) (\S+)", line):
            self._found += 1
        elif match := re.match(r"\s*Downloading (\S+?)-[\d].* \((.*)\)", line):
            self._coming = f", downloading {match[1]} ({match[2]})"
        elif match := re.match(r"\s*Installing collected packages: (.*)", line):
            self._installing = match[1].split(", ")


def plain(name: str) -> str:
    """Return a package's name in the normal form that all its spellings share."""
    return re.sub(r"[-_.]+", "-", name).lower()


def tail(log: Path) -> str:
    """Return the last 40 lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


class Environment:
    """The environment at `path`, with a record of its finished steps: a digest of the inputs of each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "setup.log"
        self._made = path / ".made.json"
        self._progress = Progress()
        try:
            self._digests: dict[str, str] = json.loads(self._made.read_text())
        except (OSError, ValueError):
            self._digests = {}

    def create(self) -> None:
        """Make the environment, unless one exists whose Python runs."""
        python = self.path / "bin/python"
        if python.exists() and subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0:
            return
        self._digests = {}
        say(f"making {self.path} with Python {sys.version.split()[0]}")
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", self.path], check=False)
        if made.returncode != 0:
            name = Path(sys.executable).name
            raise Failed(f"{name} cannot make virtual environments; on Debian and Ubuntu: apt-get install {name}-venv")

    def is_made(self, step: str, *inputs: str) -> bool:
        """Return True if the step was done with these inputs."""
        return self._digests.get(step) == digest(*inputs)

    def has(self, step: str) -> bool:
        """Return True if the step was ever done, with any inputs."""
        return step in self._digests

    def remember(self, step: str, *inputs: str) -> None:
        """Record that the step is done with these inputs."""
        self._digests[step] = digest(*inputs)
        self._made.write_text(json.dumps(self._digests))

    def install(self, what: str, packages: list[str], beside: Pip | None = None) -> None:
        """Install packages and show the progress; also wait for `beside`, a build that runs at the same time."""
        say(what)
        pip = Pip(self.path, packages, self.log)
        try:
            while not (pip.wait(0.3) and (beside is None or beside.wait(0.3))):
                compiling = "" if beside is None or beside.returncode is not None else "the kernels compile"
                coming = "" if pip.returncode is not None else pip.state()
                self._progress.show("; ".join(text for text in (coming, compiling) if text))
                if pip.returncode is not None:
                    pip.check()
            pip.check()
        except BaseException:
            for one in (pip, beside):
                if one is not None:
                    one.stop()
            raise


def digest(*inputs: str) -> str:
    """Return a digest of the inputs; each is the name of a file, or a text."""
    sums = hashlib.sha256()
    for name in inputs:
        path = ROOT / name
        sums.update(path.read_bytes() if path.is_file() else name.encode())
    return sums.hexdigest()


def requirements(*, dev: bool) -> list[str]:
    """Return the dependencies of the server and its client, from their pyproject.toml files."""
    import tomllib

    server = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((ROOT / "client/pyproject.toml").read_text())["project"]
    wanted = [*server["dependencies"], *client["dependencies"]]
    if dev:
        wanted += server["optional-dependencies"]["dev"]
    return [name for name in wanted if not name.startswith("pem-client")]


def set_up_server(environment: Environment, *, dev: bool) -> None:
    """Install the project in place with all its dependencies; compile the kernels while packages download."""
    inputs = ["constraints.txt", "pyproject.toml", "client/pyproject.toml", *requirements(dev=dev)]
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("p*/**/csrc/*"))
    ours = [str(ROOT), "pyproject.toml", "client/pyproject.toml", "setup.py", "constraints.txt", *sources]
    packages = "dev" if dev else "packages"
    build = None
    if not environment.is_made("torch", "constraints.txt"):
        environment.install(
            f"[1/3] torch, against which the kernels are compiled (to look on: tail -f {environment.log})", BUILD_TOOLS
        )
        environment.remember("torch", "constraints.txt")
    if not environment.is_made("ours", *ours):
        log = environment.path / "kernels.log"
        log.unlink(missing_ok=True)
        editable = ["--verbose", "--no-build-isolation", "--no-deps", "--editable", "./client", "--editable", "."]
        build = Pip(environment.path, editable, log)
    if build or not environment.is_made(packages, *inputs):
        what = "everything else"
        if dev and environment.has("packages"):
            what = "what the tests and checks need besides"
        environment.install(
            f"[2/3] {what}{', while the kernels compile' if build else ''}", requirements(dev=dev), build
        )
        environment.remember(packages, *inputs)
        if dev:
            environment.remember("packages", *inputs[:3], *requirements(dev=False))
    if build is not None:
        build.check()
        say("[3/3] does it run?")
        say_kernels(environment)
        environment.remember("ours", *ours)


def say_kernels(environment: Environment) -> None:
    """Import the installed packages; say so if the compiled kernels do not run. The first import takes seconds."""
    done = subprocess.run(
        [environment.path / "bin/python", "-c", KERNELS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    log = environment.path / "kernels.log"
    if done.returncode != 0:
        raise Failed(f"posekit or pointnet2_ext does not import:\n{done.stderr}")
    if done.stdout.split() == ["compiled"]:
        return
    say("the slower torch reference runs, because:")
    lines = [line for line in log.read_text(errors="replace").splitlines() if "NOT built" in line]
    print("\n".join(lines) or f"see {log} (a C++ compiler is needed: apt-get install g++)")


def set_up_peers(environment: Environment, files: list[str]) -> None:
    """Install the packages that requirements files list."""
    environment.install(f"what {', '.join(files)} lists", [part for name in files for part in ("--requirement", name)])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], epilog="make setup, make demo and make test call it as needed"
    )
    parser.add_argument("venv", type=Path, help="the virtual environment's folder, made where it is missing")
    parser.add_argument("--dev", action="store_true", help="also what the tests and checks need")
    parser.add_argument("--requirement", action="append", metavar="FILE", help="install this list, not the server")
    options = parser.parse_args()
    begun = time.monotonic()
    try:
        if sys.version_info < OLDEST:
            raise Failed(
                f"{sys.executable} is older than 3.11; name a newer interpreter with: make PYTHON=python3.12 ..."
            )
        environment = Environment(options.venv)
        environment.create()
        if options.requirement:
            set_up_peers(environment, options.requirement)
        else:
            set_up_server(environment, dev=options.dev)
    except Failed as failure:
        print(f"{CLEAR}setup: {failure}", file=sys.stderr)
        return 1
    if time.monotonic() - begun > 5:
        say(f"done in {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
