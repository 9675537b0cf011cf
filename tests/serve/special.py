"""A second server that many tests share: an ISM server behind it, tight limits, short timeouts."""

from __future__ import annotations

from dataclasses import dataclass

from tests.running import RunningServer
from tests.serve.ism_server import IsmServer
from tests.serve.tiny import Asker

BODY_IDLE_S = 3.0  # of the special server: short to wait for, long compared with a pause of a busy machine


@dataclass
class Special:
    """A server with an ISM server behind it, tight limits and short timeouts."""

    server: RunningServer
    ask: Asker
    ism: IsmServer
