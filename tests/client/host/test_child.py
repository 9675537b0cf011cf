"""A server as a child of another program: it ends when that program ends in an orderly way."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.running import ROOT, running, wait_until

SCRIPT = """
import time
from pem.bench.server import own_server

with own_server({"pose.workers": "1"}) as target:
    print(target.pid, flush=True)
    time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_program_that_is_told_to_end_stops_its_server(number: signal.Signals) -> None:
    program = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert program.stdout is not None
        server = int(program.stdout.readline())
        assert running(server)
        program.send_signal(number)
        assert program.wait(120) == 128 + number
    finally:
        program.kill()
        program.stdout.close()
    wait_until(lambda: not running(server), 60, "the server gone")
