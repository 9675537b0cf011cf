"""Start a server for a benchmark, and register objects with any server."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pem.bench import here
from pem.bench.mix import Load
from pem.bench.sample import Target
from pem.client import Client
from pem.host.child import Child, ended_by_signals

_ONBOARDING_LIMIT_S: Final = 600.0


@contextmanager
def own_server(settings: Mapping[str, str] = {}, data: Path | None = None) -> Iterator[Target]:
    """Run `pem serve` on a free port of this machine while the block runs; stop it cleanly afterwards.

    `settings` are named as in its files or its environment ("pose.threads", "POSE_THREADS"). Settings in this process's
    environment belong to the user's server and are left out. `data`: its data directory, which stays; by default it is
    temporary. Raises ServerTrouble if it does not start or stop properly, ValueError for an unknown setting,
    NoServerHere if pem-server is not installed.
    """
    here.find()
    variables = {variable(name): str(value) for name, value in settings.items()}
    if data is not None:
        data.mkdir(parents=True, exist_ok=True)
        with _running(variables, data) as target:
            yield target
        return
    with tempfile.TemporaryDirectory(prefix="pem-bench-") as folder, _running(variables, Path(folder)) as target:
        yield target


def variable(name: str) -> str:
    """Return a setting's environment variable ("pose.threads" -> "PEM_POSE_THREADS"); ValueError if unknown."""
    spelled = "PEM_" + re.sub(r"[.-]", "_", name.upper()).removeprefix("PEM_")
    if spelled not in here.find().variables():
        raise ValueError(f"there is no setting {name!r}; see serve/settings.py and workers/settings.py for all of them")
    return spelled


def register(target: Target, load: Load, tell: Callable[[str], None] = lambda words: None) -> None:
    """Register every object of a load; `tell` reports progress. Raises PemError if that fails."""
    with Client(target.url, target.api_key or "", timeout_s=120.0) as client:
        for number, (name, ply) in enumerate(load.objects.items(), start=1):
            tell(f"onboarding the {name}, {number} of {len(load.objects)}")
            client.objects.add(ply, cad_format="ply", name=name, wait_timeout_s=_ONBOARDING_LIMIT_S)


@contextmanager
def registered(target: Target, load: Load, tell: Callable[[str], None] = lambda words: None) -> Iterator[None]:
    """Register objects with somebody else's server; those it did not know before are removed when the block ends."""
    with Client(target.url, target.api_key or "", timeout_s=120.0) as client:
        before = {known.object_id for known in client.objects.list()} if load.objects else set()
        try:
            register(target, load, tell)
            yield
        finally:
            for known in client.objects.list() if load.objects else []:
                if known.name in load.objects and known.object_id not in before:
                    client.objects.remove(known.object_id)


@contextmanager
def _running(variables: dict[str, str], data: Path) -> Iterator[Target]:
    with ended_by_signals():
        child = Child.start(data, variables=variables)
        try:
            child.wait_ready()
            yield Target(url=child.url, pid=child.pid)
        finally:
            child.stop()
    child.check()
