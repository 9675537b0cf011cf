"""Run a server in a process of its own, on a free port of this machine: for the demo and the load generator."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from pem.client import Client
from pem.host.ports import free_port

_START_LIMIT_S: Final = 180.0
_STOP_LIMIT_S: Final = 60.0


class ServerTrouble(Exception):
    """The server did not start, or did not stop properly; the message has the end of its log."""


class Child:
    """`pem serve` as a child of this process; made by `start`."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.url = url
        self._process = process
        self._log = log

    @classmethod
    def start(cls, data: Path, options: Sequence[str] = (), variables: Mapping[str, str] = {}) -> Child:
        """Start it with an existing data directory, which gets its log as `server.log`; return at once.

        `variables` are added to this environment, whose own settings belong to the user's server and are left out.
        """
        port = free_port()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PEM_")}
        command = [sys.executable, "-m", "pem", "serve", "--host", "127.0.0.1", "--port", str(port)]
        with (data / "server.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "--data-dir", str(data), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment | dict(variables),
                start_new_session=True,  # Ctrl-C goes to this process, which stops the server
            )
        return cls(process, f"http://127.0.0.1:{port}", data / "server.log")

    @property
    def pid(self) -> int:
        """Return the pid of its first process."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until it takes pose requests; raise ServerTrouble if it ends before or takes minutes."""
        end = time.monotonic() + _START_LIMIT_S
        with Client(self.url, "", timeout_s=5.0, retries=0) as client:
            while not client.ready():
                if (code := self._process.poll()) is not None:
                    raise ServerTrouble(f"the server ended with code {code}; its log:\n{self._tail()}")
                if time.monotonic() > end:
                    raise ServerTrouble(
                        f"the server was not ready after {_START_LIMIT_S:g} s; its log:\n{self._tail()}"
                    )
                time.sleep(0.1)

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL if that is not enough; `check` tells if it ended well."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def check(self) -> None:
        """Raise ServerTrouble if it was stopped and did not end with 0."""
        if self._process.returncode != 0:
            raise ServerTrouble(
                f"the server did not stop cleanly (exit code {self._process.returncode}); the end of its log:\n"
                f"{self._tail()}"
            )

    def _tail(self, lines: int = 20) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the block as Ctrl-C does, with the exit code that shells expect.

    So a server that the block started, which leads a group of its own, is stopped on every way out. Does nothing
    outside the main thread, the only one that may install signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
