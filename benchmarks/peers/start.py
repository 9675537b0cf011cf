"""The benchmark's side of the serving peers: their list and settings, and how to start and stop one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec

from benchmarks.peers.environment import PYTHON, ROOT, PeerFailed, versions
from benchmarks.peers.serving import READY, Setup, to_environment
from benchmarks.running import runs
from pem.bench.observe import tree
from pem.bench.sample import Target
from pem.host.child import ended_by_signals
from pem.host.ports import free_port
from workers.settings import Stages, on_gpu

_START_LIMIT_S: Final = 180.0
_STOP_LIMIT_S: Final = 20.0
_FASTAPI_CALLERS: Final = 40  # threads in which FastAPI runs plain functions by default


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to serve."""

    module: str  # name in this package
    packages: tuple[str, ...]  # packages whose versions are reported with the figures
    choose: Callable[[Stages], dict[str, Any]]  # its fields of a Setup, from the settings of our own workers
    words: str  # description of how it serves, with the fields of its Setup


PEERS: Final = {
    "fastapi-loop": Peer(
        module="fastapi_loop",
        packages=("fastapi", "uvicorn"),
        choose=lambda ours: {"threads": _threads(ours), "callers": 1},
        words="one process, its engine with {threads} threads; an endpoint that loops over the detections of one "
        "request at a time, as code that guards its one model with a lock does",
    ),
    "fastapi-threads": Peer(
        module="fastapi_loop",
        packages=("fastapi", "uvicorn"),
        choose=lambda ours: {"threads": _threads(ours), "callers": _FASTAPI_CALLERS},
        words="the same without a guard: the one engine is called from as many as {callers} threads at a time, which "
        "is what FastAPI does with a plain function",
    ),
    "fastapi-processes": Peer(
        module="fastapi_loop",
        packages=("fastapi", "uvicorn"),
        choose=lambda ours: {"engines": _copies(ours), "callers": 1},
        words="the guarded loop in {engines} processes, each with an engine of its own with {threads} thread(s)",
    ),
    "fastapi-batcher": Peer(
        module="fastapi_batcher",
        packages=("fastapi", "uvicorn"),
        choose=lambda ours: {"threads": _threads(ours), "decoders": ours.decode.workers},
        words="{decoders} processes decode; one engine with {threads} threads gets batches of {batch} detections or of "
        "{wait_ms} ms",
    ),
    "litserve": Peer(
        module="litserve_peer",
        packages=("litserve", "fastapi", "uvicorn"),
        choose=lambda ours: _engines(ours) | {"batch": 4 if on_gpu(ours) else 2},
        words="{engines} worker(s), the engine with {threads} thread(s); batches of {batch} requests or of {wait_ms} "
        "ms, decoded in the worker; one process for HTTP",
    ),
    "bentoml": Peer(
        module="bentoml_peer",
        packages=("bentoml", "uvicorn"),
        choose=lambda ours: _engines(ours) | {"decoders": ours.decode.workers, "batch": 8 if on_gpu(ours) else 4},
        words="{decoders} processes answer HTTP and decode; a service of {engines} process(es), the engine with "
        "{threads} thread(s), gets adaptive batches of at most {batch} detections; the connection between the two is "
        "not renewed (after 100 calls by default, which fails those that are open)",
    ),
}


def _threads(ours: Stages) -> int:
    """Return the number of detections that our pose workers compute at a time, all together."""
    return ours.pose.workers * ours.pose.threads


def _copies(ours: Stages) -> int:
    """Return the number of processes that each have an engine: one for each of those detections, on a GPU two."""
    return 2 if on_gpu(ours) else max(2, _threads(ours))


def _engines(ours: Stages) -> dict[str, Any]:
    """Return as many engines as our own pose workers have: on a CPU each with a core to itself, on a GPU one."""
    return {"threads": _threads(ours)} if on_gpu(ours) else {"engines": _threads(ours)}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A peer taking part, with optional settings of its own: `fastapi-loop`, `litserve:engines=1:threads=2`."""

    title: str
    peer: Peer
    changes: dict[str, str]

    @classmethod
    def of(cls, text: str) -> Entry:
        """Parse an entry of the command line; ValueError for unknown peers and settings."""
        name, *pairs = text.split(":")
        if name not in PEERS:
            raise ValueError(f"there is no peer {name!r}; there are: {', '.join(PEERS)}")
        changes = dict(pair.partition("=")[::2] for pair in pairs)
        known = set(Setup.__struct_fields__)
        if unknown := changes.keys() - known:
            raise ValueError(
                f"a peer has no setting {', '.join(sorted(unknown))}; there are: {', '.join(sorted(known))}"
            )
        return cls(title=text, peer=PEERS[name], changes=changes)

    def settings(self, ours: Stages) -> dict[str, Any]:
        """Return its fields of a Setup, given the settings `ours` of the server's own workers."""
        return {**self.peer.choose(ours), **self.changes}

    def describe(self, setup: Setup, python: Path = PYTHON) -> str:
        """Describe versions and settings."""
        packages = ", ".join(f"{name} {version}" for name, version in versions(self.peer.packages, python).items())
        return f"{packages}: {self.peer.words.format(**msgspec.to_builtins(setup))}"


@contextmanager
def running(entry: Entry, given: Mapping[str, Any], folder: Path, python: Path = PYTHON) -> Iterator[Target]:
    """Run a peer in a process of its own while the block runs, ready in all of its processes; then end them all.

    `given`: the Setup, except for where it is started. `folder`: for its log. Raises PeerFailed.
    """
    missing = set(entry.peer.packages) - versions(entry.peer.packages, python).keys()
    if missing:
        raise PeerFailed(
            f"{entry.title} needs {', '.join(sorted(missing))}: `make peers-serving` sets the peers' environment up"
        )
    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="peer-") as ready_dir:
        setup = make_setup({**given, "port": free_port(), "ready_dir": ready_dir})
        log = folder / f"{entry.peer.module}.log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                [str(python), "-m", f"benchmarks.peers.{entry.peer.module}"],
                cwd=ROOT,
                env=_environment(setup),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            target = Target(url=f"http://127.0.0.1:{setup.port}", pid=child.pid)
            _wait_ready(entry, child, target, setup, log)
            yield target
        finally:
            _stop(child)


def make_setup(fields: Mapping[str, Any]) -> Setup:
    """Build a Setup from its fields, numbers also as text; ValueError if one does not fit."""
    return msgspec.convert(dict(fields), Setup, strict=False)


def _environment(setup: Setup) -> dict[str, str]:
    """Return the environment of our own pose workers, without telemetry.

    It has one thread for OpenMP and BLAS, sleeping threads, and large pages.
    """
    from workers.lifecycle import slot_environment  # imports Mosec, which reads the command line of whoever imports it

    threads = slot_environment(slot=0, keeper=False, device=setup.device, threads=1)
    mine = {name: value for name, value in (os.environ | threads).items() if not name.startswith("PEM_")}
    ours = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "client")))}  # the peers' environment has neither
    return mine | ours | to_environment(setup)


def _wait_ready(entry: Entry, child: subprocess.Popen[bytes], target: Target, setup: Setup, log: Path) -> None:
    end = time.monotonic() + _START_LIMIT_S
    while True:
        if child.poll() is not None:
            raise PeerFailed(f"{entry.title} ended with {child.returncode}: {_tail(log)}")
        with contextlib.suppress(httpx.HTTPError):
            loaded = sum(path.is_file() for path in Path(setup.ready_dir).iterdir())
            if loaded >= setup.engines and httpx.get(target.url + READY, timeout=2.0).status_code == 200:
                return
        if time.monotonic() > end:
            raise PeerFailed(f"{entry.title} was not ready after {_START_LIMIT_S:g} s: {_tail(log)}")
        time.sleep(0.1)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to the first process, then end whatever it leaves: not every peer ends its children."""
    processes = tree(child.pid)
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_STOP_LIMIT_S)
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    child.wait()
    end = time.monotonic() + _STOP_LIMIT_S
    while any(runs(pid) for pid in processes) and time.monotonic() < end:
        time.sleep(0.02)


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-2000:]
