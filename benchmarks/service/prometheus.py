"""Run a real Prometheus beside a server, with the configuration and rules of deploy/prometheus.

Only the target and the intervals are changed. It listens on the loopback interface, keeps its data in a folder of its
own, and is stopped when the block ends.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

from pem.host.ports import free_port

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "prometheus" / "prometheus.yml"
START_LIMIT_S = 30.0


class Prometheus:
    """Queries to a Prometheus at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(timeout=30)

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *failure: object) -> None:
        self._http.close()

    def is_up(self) -> bool:
        """Return True if it accepts queries."""
        with contextlib.suppress(httpx.HTTPError):
            return self._http.get(f"{self.url}/-/ready").status_code == 200
        return False

    def get(self, path: str, **parameters: Any) -> Any:
        """Return the `data` of an answer of its HTTP API; raise ValueError with its message if it refuses."""
        answer = self._http.post if path.startswith("query") else self._http.get
        kind = "data" if path.startswith("query") else "params"
        tree = answer(f"{self.url}/api/v1/{path}", **{kind: parameters}).json()
        if tree["status"] != "success":
            raise ValueError(f"{tree.get('errorType')}: {tree.get('error')} in {parameters}")
        return tree["data"]

    def ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of every series that `query` gives now; a scalar has no labels."""
        data = self.get("query", query=query)
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(one["metric"], float(one["value"][1])) for one in data["result"]]

    def ask_range(
        self, query: str, *, start: float, end: float, step_s: float
    ) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Return labels and (unix time, value) pairs of every series that `query` gives between two unix times."""
        data = self.get("query_range", query=query, start=start, end=end, step=step_s)
        return [
            (one["metric"], [(float(when), float(value)) for when, value in one["values"]]) for one in data["result"]
        ]

    def one(self, query: str) -> float:
        """Return the value of a query that gives exactly one series."""
        ((_, value),) = self.ask(query)
        return value

    def wait_for_scrape(self, seconds: float = 20.0) -> None:
        """Wait until everything that is on the page now has been scraped."""
        begun = time.time()
        while time.time() < begun + seconds:
            scraped = self.ask('timestamp(up{job="pem-server"}) and up{job="pem-server"} == 1')
            if scraped and all(when > begun for _, when in scraped):
                return
            time.sleep(0.1)
        raise TimeoutError(f"no scrape within {seconds} s: {self.get('targets', state='active')['activeTargets']}")


@contextlib.contextmanager
def running_prometheus(target_url: str, folder: Path, *, interval_s: int = 1) -> Iterator[Prometheus]:
    """Run Prometheus, reading the server at `target_url` every `interval_s`, with its files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(_configuration(target_url, interval_s))
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--storage.tsdb.retention.time=2h",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (folder / "log").open("wb") as log, Prometheus(f"http://127.0.0.1:{port}") as prometheus:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            end = time.monotonic() + START_LIMIT_S
            while not prometheus.is_up():
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"Prometheus did not start: {(folder / 'log').read_text()[-2000:]}")
                time.sleep(0.05)
            yield prometheus
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)


def _configuration(target_url: str, interval_s: int) -> str:
    tree = yaml.safe_load(CONFIGURATION.read_text())
    every = f"{interval_s}s"
    tree["global"] = {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
    tree["rule_files"] = [str(CONFIGURATION.parent / name) for name in tree["rule_files"]]
    (scrape,) = tree["scrape_configs"]
    (static,) = scrape["static_configs"]
    static["targets"] = [urlsplit(target_url).netloc]
    text: str = yaml.safe_dump(tree)
    return text
