"""A server of one's own for the length of a benchmark, and objects for whichever server it is."""

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
    """`pem serve` on a free port of this machine for as long as the block runs; stopped cleanly afterwards.

    `settings` are its own, named as in its files or its environment ("pose.threads", "POSE_THREADS"); those of this
    process's environment are for the user's server and left out. `data`: its data directory, which stays; without one
    it is temporary. ServerTrouble where it does not start or stop as it should, ValueError for an unknown setting,
    NoServerHere where pem-server is not installed.
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
    """The environment variable of a setting ("pose.threads" -> "PEM_POSE_THREADS"); ValueError where there is none."""
    spelled = "PEM_" + re.sub(r"[.-]", "_", name.upper()).removeprefix("PEM_")
    if spelled not in here.find().variables():
        raise ValueError(f"there is no setting {name!r}; see serve/settings.py and workers/settings.py for all of them")
    return spelled


def register(target: Target, load: Load, tell: Callable[[str], None] = lambda words: None) -> None:
    """Have the server know every object of a load; `tell` hears what is going on. PemError where it does not."""
    with Client(target.url, target.api_key or "", timeout_s=120.0) as client:
        for number, (name, ply) in enumerate(load.objects.items(), start=1):
            tell(f"onboarding the {name}, {number} of {len(load.objects)}")
            client.objects.add(ply, cad_format="ply", name=name, wait_timeout_s=_ONBOARDING_LIMIT_S)


@contextmanager
def registered(target: Target, load: Load, tell: Callable[[str], None] = lambda words: None) -> Iterator[None]:
    """`register`, for somebody else's server: what it did not know before is removed again when the block ends."""
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
