"""What an installed pem-server gives to the load generator."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator

import numpy as np
import pytest

from pem.bench import here
from pem.bench.mix import Mix, prepare
from pem.bench.server import own_server
from workers.state import StateWriter


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide pem-server, as if it were not installed."""
    here._lent.cache_clear()
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    yield
    here._lent.cache_clear()


def test_pictures_are_the_same_for_the_same_seed_and_name_what_they_show() -> None:
    lent = here.find()
    names = lent.object_names()[:3]
    assert all(name.startswith("bench-") for name in names)
    one, again = (lent.picture(1, names, count=3, width=240, height=180) for _ in range(2))
    assert (one.rgb_png, one.depth_png) == (again.rgb_png, again.depth_png)
    assert {instance.name for instance in one.instances} <= set(names)
    assert one.instances[0].mask.shape == (180, 240)
    assert lent.ply(names[0]).startswith(b"ply\n")


def test_errors_are_told_modulo_the_symmetries() -> None:
    class HalfTurn:
        discrete = (np.diag([-1.0, -1.0, 1.0, 1.0]),)
        continuous = ()

    turned = np.diag([-1.0, -1.0, 1.0, 1.0])
    degrees, millimetres = here.find().pose_errors(turned, np.eye(4), HalfTurn())
    assert (degrees, millimetres) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-9))


def test_workers_are_called_by_their_stages(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    run_dir = tmp_path / "pem-server-12345678-x"
    (run_dir / "states").mkdir(parents=True)
    StateWriter(run_dir, "pose", 0)
    assert here.stage_names(12345678) == {os.getpid(): "pose"}
    assert here.stage_names(12345679) == {}


def test_settings_are_known_by_their_variables() -> None:
    assert {"PEM_PORT", "PEM_POSE_THREADS"} <= set(here.find().variables())


@pytest.mark.usefixtures("alone")
def test_without_pem_server_nothing_is_lent_and_stages_are_not_known() -> None:
    assert here.commands() is None
    assert here.stage_names(os.getpid()) == {}
    for ask in (here.find, lambda: prepare(Mix()), lambda: own_server().__enter__()):
        with pytest.raises(here.NoServerHere, match="pem-server is not installed"):
            ask()
