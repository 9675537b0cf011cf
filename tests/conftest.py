"""Fixtures that several test files need: a running server and the demo scene registered on it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.running import SMALL, Question, RunningServer, register
from tests.serve.ism_server import IsmServer
from tests.serve.special import BODY_IDLE_S, Special
from tests.serve.tiny import Asker, tiny_scene


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out slow and long tests unless `-m` chooses, or a test was named (`file.py::test_name`)."""
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    left_out = {item for item in items if item.get_closest_marker("slow") or item.get_closest_marker("long")}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def question() -> Question:
    """The demo scene as a request."""
    return Question()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, question: Question) -> Iterator[RunningServer]:
    """One server for all tests that leave it unchanged; the demo scene's objects are registered by name."""
    with RunningServer(tmp_path_factory.mktemp("server") / "data") as one:
        question.register(one.url)
        yield one


@pytest.fixture(scope="session")
def generated_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of generated weights for the network: it computes with them and finds nothing."""
    generated = importlib.import_module("benchmarks.network.generated_weights")  # imports torch
    if not generated.available():
        pytest.skip("the folder shared/sam6d, from which the network's weights are made up, is not here")
    path = tmp_path_factory.mktemp("weights") / "generated.safetensors"
    generated.write(path)
    yield path
    path.unlink()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Start servers of a test's own, with settings: `start_server(drain_s=5)`; they are stopped at the end."""
    started: list[RunningServer] = []

    def start(data: Path | None = None, wait: bool = True, **settings: Any) -> RunningServer:
        one = RunningServer(data or tmp_path / f"data{len(started)}", {**SMALL, **settings})
        started.append(one)
        return one.start(wait=wait)

    yield start
    for one in started:
        if one.process is not None and one.process.poll() is None:
            one.kill()


@pytest.fixture(scope="session")
def ask(server: RunningServer) -> Iterator[Asker]:
    """A client of the shared server."""
    with Asker(server.url) as client:
        yield client


@pytest.fixture(scope="session")
def special(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Special]:
    """One special server for all tests that the shared server does not suit; the tiny scene's objects are known."""
    settings: dict[str, Any] = {
        "limits_body_idle_s": BODY_IDLE_S,
        "limits_in_flight_requests": 6,
        "limits_in_flight_mb": 60,
        "pose_pass_detections": 2,
        "cors_origins": "https://lab.example",
        "metrics_open": "false",
    }
    with IsmServer() as ism:
        settings |= {**SMALL, "ism_url": ism.url}
        one = RunningServer(tmp_path_factory.mktemp("special") / "data", settings).start()
        try:
            for instance in tiny_scene().instances:
                register(one.url, instance.shape)
            with Asker(one.url) as client:
                yield Special(one, client, ism)
            assert one.stop() == 0
        finally:
            if one.process is not None and one.process.poll() is None:
                one.kill()
