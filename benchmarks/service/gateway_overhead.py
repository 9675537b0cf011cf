"""Measure the gateway's overhead: the same requests through it and straight into the Mosec backend behind it.

Both ways end in the same processes. A request has pictures and no detections: it costs what carrying and decoding it
costs, and no pose hides the difference. The two ways take turns in short rounds, so that changes in the machine's
speed affect both alike. Figures are medians over all rounds, with 1 and 8 clients and bodies of about 10 KB and 1.5 MB.

    python -m benchmarks.service.gateway_overhead [--rounds 6] [--requests 40] [--json FILE]

Exits 1 if the gateway adds more than --limit-ms (5) at the median of a 1.5 MB body.
"""

from __future__ import annotations

import argparse
import http.client
import re
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.running import own
from pem.bench.report import Table, write_json
from posekit.io import images
from workers.messages import Job, Part

SIZES = {"10 KB": (52, 40), "1.5 MB": (640, 480)}
CLIENTS = (1, 8)


@dataclass(frozen=True)
class Way:
    """One way to ask: through the gateway, or straight into the backend."""

    port: int
    path: str
    body: bytes

    def ask(self, connection: http.client.HTTPConnection) -> float:
        """Return the milliseconds of one exchange."""
        begun = time.perf_counter()
        connection.request("POST", self.path, self.body, {"Content-Type": "application/msgpack"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise SystemExit(f"{self.path} answered {response.status}: {answer[:300]!r}")
        return (time.perf_counter() - begun) * 1e3


def ways(size: tuple[int, int], gateway_port: int, backend_port: int) -> dict[str, Way]:
    """Return the same question in the gateway's and in the backend's own form."""
    width, height = size
    rng = np.random.default_rng(0)
    rgb = images.encode_png(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    depth = images.encode_png(rng.integers(500, 1500, (height, width), dtype=np.uint16))
    K = (500.0, 0.0, width / 2, 0.0, 500.0, height / 2, 0.0, 0.0, 1.0)
    question = {
        "rgb_image": rgb,
        "depth_image": depth,
        "cam_params": {"cam_K": K},
        "detections": {"masks": []},
        "objects": {},
    }
    job = Job(
        request_id="bare",
        rgb=rgb,
        depth=depth,
        K=K,
        depth_scale_mm=1.0,
        detections=[],
        objects=[],
        deadline_unix=time.time() + 3600,
    )
    part = Part(part_id="bare/0", start=0, stop=0, job=msgspec.msgpack.encode(job), finish=True)
    return {
        "gateway": Way(gateway_port, "/api/v1/pose_estimation", msgspec.msgpack.encode(question)),
        "bare Mosec": Way(backend_port, "/pose", msgspec.msgpack.encode(part)),
    }


def run(way: Way, clients: int, requests: int) -> list[float]:
    """Return latencies (ms) of `requests` exchanges, shared by `clients` clients that each keep one connection."""
    latencies: list[float] = []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", way.port, timeout=60)
        mine = [way.ask(connection) for _ in range(max(requests // clients, 2))]
        connection.close()
        latencies.extend(mine[1:])  # the first exchange opens the connection

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="how often the two ways take turns (6)")
    parser.add_argument("--requests", type=int, default=40, help="requests of a round, all clients together (40)")
    parser.add_argument("--limit-ms", type=float, default=5.0, help="what a 1.5 MB body may cost more (5)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here (- for standard output)")
    options = parser.parse_args()

    table = Table(["body", "clients", "gateway ms", "bare Mosec ms", "added ms", "ratio"])
    worst = 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        own(data := Path(folder) / "data", {"log_level": "debug"}) as server,
    ):
        log = (data / "server.log").read_text()
        port = int(re.findall(r'"backend_started".*?"port":(\d+)', log)[-1])
        for name, size in SIZES.items():
            both = ways(size, server.port, port)
            for clients in CLIENTS:
                found: dict[str, list[float]] = {way: [] for way in both}
                for one in both.values():
                    run(one, clients, 8)
                for _ in range(options.rounds):
                    for way, one in both.items():
                        found[way] += run(one, clients, max(options.requests, 4 * clients))
                ours, bare = (statistics.median(found[way]) for way in both)
                table.add(name, clients, ours, bare, ours - bare, ours / bare)
                if name == "1.5 MB":
                    worst = max(worst, ours - bare)
    table.print()
    write_json(options.json, {"gateway_overhead": table.as_dicts()})
    print(f"worst at 1.5 MB: {worst:+.2f} ms at the median (limit {options.limit_ms:g} ms)")
    return 0 if worst <= options.limit_ms else 1


if __name__ == "__main__":
    sys.exit(main())
