"""Fixtures of the tests through the port: clients of the shared server, and of a second one with other settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.running import RunningServer, register
from tests.serve.ism_server import IsmServer
from tests.serve.tiny import Asker, tiny_scene

BODY_IDLE_S = 3.0  # of the special server: short to wait for, long beside what a busy machine makes of a pause


@pytest.fixture(scope="session")
def ask(server: RunningServer) -> Iterator[Asker]:
    """A client of the shared server."""
    with Asker(server.url) as client:
        yield client


@dataclass
class Special:
    """A server with an ISM server behind it, tight limits and short patience."""

    server: RunningServer
    ask: Asker
    ism: IsmServer


@pytest.fixture(scope="session")
def special(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Special]:
    """One such server for all tests that want another one than the shared; the tiny scene's objects are registered."""
    settings = {
        "limits_body_idle_s": BODY_IDLE_S,
        "limits_in_flight_requests": 6,
        "limits_in_flight_mb": 60,
        "pose_pass_detections": 2,
        "cors_origins": "https://lab.example",
        "metrics_open": "false",
    }
    with IsmServer() as ism:
        one = RunningServer(tmp_path_factory.mktemp("special") / "data", {**settings, "ism_url": ism.url}).start()
        try:
            for instance in tiny_scene().instances:
                register(one.url, instance.shape)
            with Asker(one.url) as client:
                yield Special(one, client, ism)
            assert one.stop() == 0
        finally:
            if one.process is not None and one.process.poll() is None:
                one.kill()
