"""A server of one's own for the length of a benchmark, and objects for whichever server it is."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks.load.mix import Load
from benchmarks.load.sample import Target
from serve.client import Client
from serve.settings import environment_names

_START_LIMIT_S: Final = 180.0
_STOP_LIMIT_S: Final = 60.0
_ONBOARDING_LIMIT_S: Final = 600.0


class ServerTrouble(Exception):
    """The server did not start, or did not stop as it should; the message has the end of its log."""


@contextmanager
def own_server(settings: Mapping[str, str] = {}, data: Path | None = None) -> Iterator[Target]:
    """`pem serve` on a free port of this machine for as long as the block runs; stopped cleanly afterwards.

    `settings` are its own, named as in its files or its environment ("pose.threads", "POSE_THREADS"); those of this
    process's environment are for the user's server and left out. `data`: its data directory, which stays; without one
    it is temporary. ServerTrouble where it does not start or stop as it should, ValueError for an unknown setting.
    """
    variables = {variable(name): str(value) for name, value in settings.items()}
    if data is not None:
        data.mkdir(parents=True, exist_ok=True)
        with _running(variables, data) as target:
            yield target
        return
    with tempfile.TemporaryDirectory(prefix="pem-bench-") as folder, _running(variables, Path(folder)) as target:
        yield target


def variable(name: str) -> str:
    """The environment variable of a setting ("pose.threads" -> "PEM_POSE_THREADS"); ValueError where there is none."""
    spelled = "PEM_" + re.sub(r"[.-]", "_", name.upper()).removeprefix("PEM_")
    if spelled not in environment_names():
        raise ValueError(f"there is no setting {name!r}; see serve/settings.py and workers/settings.py for all of them")
    return spelled


def register(target: Target, load: Load, tell: Callable[[str], None] = lambda words: None) -> None:
    """Have the server know every object of a load; `tell` hears what is going on. PemError where it does not."""
    with Client(target.url, target.api_key or "", timeout_s=120.0) as client:
        for number, (name, ply) in enumerate(load.objects.items(), start=1):
            tell(f"onboarding the {name}, {number} of {len(load.objects)}")
            client.objects.add(ply, cad_format="ply", name=name, wait_timeout_s=_ONBOARDING_LIMIT_S)


@contextmanager
def _running(variables: dict[str, str], data: Path) -> Iterator[Target]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PEM_")} | variables
    command = [sys.executable, "-m", "serve.cli", "serve", "--host", "127.0.0.1", "--port", str(port)]
    output = data / "server.log"
    with output.open("wb") as log:
        child = subprocess.Popen(
            [*command, "--data-dir", str(data)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            process_group=0,  # Ctrl-C is for us, and we stop it
        )
    target = Target(url=f"http://127.0.0.1:{port}", pid=child.pid)
    code = 0
    try:
        _wait_ready(child, target.url, output)
        yield target
    finally:
        code = _stop(child)
    if code != 0:
        raise ServerTrouble(f"the server did not stop cleanly (exit code {code}); the end of its log:\n{_tail(output)}")


def _wait_ready(child: subprocess.Popen[bytes], url: str, output: Path) -> None:
    end = time.monotonic() + _START_LIMIT_S
    with Client(url, "", timeout_s=5.0, retries=0) as client:
        while not client.ready():
            if child.poll() is not None:
                raise ServerTrouble(f"the server ended with code {child.returncode}; its log:\n{_tail(output)}")
            if time.monotonic() > end:
                raise ServerTrouble(f"the server was not ready after {_START_LIMIT_S:g} s; its log:\n{_tail(output)}")
            time.sleep(0.1)


def _stop(child: subprocess.Popen[bytes]) -> int:
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
    try:
        return child.wait(_STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return -signal.SIGKILL


def _tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
