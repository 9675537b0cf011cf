"""Look into a running server: its address, its processes, and its workers' states."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pem.bench.server import own_server
from workers.state import WorkerState, read_states


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server on this machine."""

    url: str
    pid: int  # pid of the gateway

    @property
    def port(self) -> int:
        """Return the port that it listens on."""
        port = urlsplit(self.url).port
        assert port is not None
        return port

    @property
    def run_dir(self) -> Path:
        """Return the folder where its workers leave their state (new after each start)."""
        for base in (Path("/dev/shm"), Path(tempfile.gettempdir())):
            for path in base.glob(f"pem-server-{self.pid}-*"):
                return path
        raise FileNotFoundError(f"the server {self.pid} has no run directory")

    def workers(self, stage: str | None = None) -> list[WorkerState]:
        """Return the living, ready workers of a stage, or of all."""
        return [one for one in read_states(self.run_dir) if one.alive and one.ready and stage in (None, one.stage)]


@contextmanager
def own(data: Path, settings: Mapping[str, Any] = {}) -> Iterator[Running]:
    """Start a server while the block runs; its log is `<data>/server.log`. See `own_server`.

    Weights are looked for in its data directory, not in the project's folder, unless `settings` say otherwise.
    """
    given = {"checkpoints_dir": data / "checkpoints", **settings}
    with own_server({name: str(value) for name, value in given.items()}, data) as target:
        assert target.pid is not None
        yield Running(url=target.url, pid=target.pid)


def runs(pid: int) -> bool:
    """Return True if a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
