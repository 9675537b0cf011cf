"""A running Prometheus reads a server under load: every family, types and numbers, no growth; the rules."""

from __future__ import annotations

import asyncio
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import httpx
import msgspec
import pytest
import yaml

from posekit.engine import REJECT_CODES
from serve.gateway import keys
from serve.gateway.routes import ROUTES, find
from serve.telemetry.metrics import Metrics
from serve.telemetry.processes import STAGES
from tests.deploy.conftest import Watched, every_kind_of_request
from tests.deploy.documented import PAGE, families, family_of
from tests.running import ROOT, wait_until
from tests.serve.tiny import FULL, NAMES, OBJECTS, POSE, SEG, ascii_ply, one, tetrahedron, tiny_question

RULES = ROOT / "deploy" / "prometheus"
OURS = '{__name__=~"(pose|mosec_service)_.+", job="pem-server"}'
ON_A_GPU = {"pose_device_memory_bytes"}
EMPTY = {"sha256"}  # where no weights are in use; to Prometheus an empty label is none


def promtool(*arguments: str, cwd: Path = RULES, given: bytes = b"") -> str:
    """Return promtool's standard output and error; it must succeed."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian: the package prometheus)")
    done = subprocess.run([tool, *arguments], cwd=cwd, input=given, capture_output=True, timeout=60, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


# ------------------------------------------------------------------------------------------------------------ the rules


def alerts() -> list[dict[str, object]]:
    (group,) = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    rules: list[dict[str, object]] = group["rules"]
    return rules


def test_configuration_and_rules_please_promtool() -> None:
    promtool("check", "config", "prometheus.yml")
    said = promtool("check", "rules", "recording.yml", "alerts.yml")
    assert f"{len(alerts())} rules found" in said


def test_every_alert_fires_when_it_should_and_is_silent_otherwise() -> None:
    promtool("test", "rules", "alerts.yml", cwd=RULES / "tests")


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    cases = (RULES / "tests" / "alerts.yml").read_text()
    assert {str(rule["alert"]) for rule in alerts()} == set(re.findall(r'\{alertname="(\w+)"', cases))


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_is_wrong_and_where_the_page_says_what_to_do(rule: dict[str, dict[str, str]]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    said = rule["annotations"]
    assert said.keys() == {"summary", "description", "runbook"}
    page, _, anchor = said["runbook"].partition("#")
    text = (ROOT / page).read_text()
    headings = {line.strip("# ").lower().replace(" ", "-"): line for line in text.splitlines() if line.startswith("#")}
    assert anchor in headings
    section = text[text.index(headings[anchor]) + 5 :]
    assert f"`{rule['alert']}`" in section[: section.find("\n#")]


def test_the_target_for_the_time_is_a_bucket_so_that_no_percentile_is_guessed_past_it() -> None:
    groups = yaml.safe_load((RULES / "recording.yml").read_text())["groups"]
    [target] = [
        rule for group in groups for rule in group["rules"] if rule["record"].startswith("pem:request_duration")
    ]
    [seconds] = re.findall(r"vector\((.+?)\)", target["expr"])
    bounds = re.findall(rb'pose_request_duration_seconds_bucket\{.*?le="(.+?)"', Metrics().expose())
    assert float(seconds) in {float(bound) for bound in bounds}


def test_rules_and_page_ask_only_for_families_that_are_documented() -> None:
    recorded = [
        rule for group in yaml.safe_load((RULES / "recording.yml").read_text())["groups"] for rule in group["rules"]
    ]
    names = {rule["record"] for rule in recorded}
    expressions = [rule["expr"] for rule in recorded + alerts()]
    expressions += re.findall(r"```promql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    documented = {series for family in families().values() for series in family.series}
    for expression in expressions:
        bare = re.sub(r'"[^"]*"|#.*', "", str(expression))
        used = set(re.findall(r"(?<![\w:])(?:instance|instance_code|instance_object|pem):[\w:]+", bare))
        assert used <= names, expression
        assert set(re.findall(r"(?<![\w:])(?:pose|mosec_service)_\w+", bare)) <= documented, expression


# ------------------------------------------------------------------------------------------- Prometheus and the server


@pytest.mark.slow
def test_every_documented_family_is_read_with_its_type_and_its_labels(watched: Watched) -> None:
    every_kind_of_request(watched)
    watched.prometheus.wait_for_scrape()
    metadata = watched.prometheus.get("metadata")
    seen = {name: entry[0] for name, entry in metadata.items() if name.startswith(("pose_", "mosec_"))}
    documented = families()
    assert seen.keys() == documented.keys()
    labels: dict[str, set[str]] = {}
    for series in watched.prometheus.get("series", **{"match[]": OURS}):
        bare = series.keys() - {"__name__", "job", "instance"}
        labels.setdefault(family_of(series["__name__"]), set()).update(bare)
    assert documented.keys() - labels.keys() == ON_A_GPU
    for name, family in documented.items():
        assert seen[name]["type"] == family.type, name
        assert len(seen[name]["help"]) > 10, name
        if name not in ON_A_GPU:
            assert labels[name] == family.labels - EMPTY | ({"le"} if family.type == "histogram" else set()), name


@pytest.mark.slow
def test_the_page_of_a_server_in_use_pleases_promtool(watched: Watched) -> None:
    every_kind_of_request(watched)
    page = httpx.get(f"{watched.server.url}/metrics")
    assert promtool("check", "metrics", given=page.content) == ""


@pytest.mark.slow
def test_prometheus_counts_what_the_clients_saw(watched: Watched) -> None:
    prometheus = watched.prometheus

    def requests() -> dict[tuple[str, int], float]:
        return {
            (labels["route"], int(labels["code"])): value
            for labels, value in prometheus.ask("pose_requests_total")
            if labels["route"] not in ("/metrics", "/readyz")
        }

    def total(query: str) -> float:
        return prometheus.one(f"sum({query})")

    prometheus.wait_for_scrape()
    before, sums = requests(), {name: total(name) for name in ("pose_score_count", "pose_pass_detections_sum")}
    rejected = {labels["reason"]: value for labels, value in prometheus.ask("pose_rejected_total")}
    took = total("pose_request_duration_seconds_count")
    cached = total("pose_object_cache_hits_total + pose_object_cache_misses_total")
    named = prometheus.one(f'pose_score_count{{object="{NAMES[0]}"}}')
    watched.answers.clear(), watched.rows.clear(), watched.sure.clear()

    every_kind_of_request(watched)
    prometheus.wait_for_scrape()

    grown = {key: value - before.get(key, 0) for key, value in requests().items()}
    assert {key: value for key, value in grown.items() if value} == watched.answers
    solved = sum(n for (route, code), n in watched.answers.items() if find(route).timed and code == 200)
    assert total("pose_request_duration_seconds_count") - took == solved
    assert watched.rows["ok"] == total("pose_score_count") - sums["pose_score_count"] == 5
    assert prometheus.one(f'pose_score_count{{object="{NAMES[0]}"}}') - named == watched.sure[NAMES[0]] == 3
    reasons = {labels["reason"]: value for labels, value in prometheus.ask("pose_rejected_total")}
    for reason in REJECT_CODES:
        assert reasons[reason] - rejected[reason] == watched.rows[reason]
    assert watched.rows["mask_empty"] == watched.rows["mask_too_small"] == 1
    assert total("pose_pass_detections_sum") - sums["pose_pass_detections_sum"] == 5
    assert total("pose_object_cache_hits_total + pose_object_cache_misses_total") > cached
    assert prometheus.one("pose_ready") == 1
    assert total("pose_device_busy_seconds_total") > 0


@pytest.mark.slow
def test_processor_time_and_memory_are_those_of_the_processes(watched: Watched) -> None:
    watched.prometheus.wait_for_scrape()
    cpu_s = {labels["stage"]: value for labels, value in watched.prometheus.ask("pose_process_cpu_seconds_total")}
    resident = {labels["stage"]: value for labels, value in watched.prometheus.ask("pose_process_resident_bytes")}
    assert cpu_s.keys() == resident.keys() == set(STAGES)
    there = {"gateway", "mosec", "keeper", *(worker.stage for worker in watched.server.workers())}
    assert {stage for stage, size in resident.items() if size > 0} == there
    assert all(cpu_s[stage] > 0.05 for stage in there - {"inspect"}), cpu_s
    assert resident["gateway"] == pytest.approx(resident_bytes(watched.server.pid), rel=0.3)
    assert sum(resident.values()) == pytest.approx(
        sum(resident_bytes(pid) for pid in (watched.server.pid, *watched.server.descendants())), rel=0.3
    )


def resident_bytes(pid: int) -> int:
    (line,) = re.findall(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(line) * 1024


@pytest.mark.slow
def test_our_rules_are_evaluated_and_the_target_is_healthy(watched: Watched) -> None:
    watched.prometheus.wait_for_scrape()
    (target,) = watched.prometheus.get("targets", state="active")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    groups = watched.prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules if rule["type"] == "alerting"} == {rule["alert"] for rule in alerts()}
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] == "err"] == []
    assert watched.prometheus.ask("pem:request_duration_target:seconds") != []


# ------------------------------------------------------------------------------------------------------ no growth

KILLED = ("decode", "respond") * 8 + ("inspect", "pose", "decode", "pose")
CHEAP, POSES = 9_500, 500


@pytest.mark.slow
def test_ten_thousand_requests_and_twenty_dead_workers_add_no_series(watched: Watched) -> None:
    prometheus = watched.prometheus
    every_kind_of_request(watched)
    register_randomly(watched)
    asyncio.run(hammer(watched, cheap=400, poses=20, seed=1))
    for stage in dict.fromkeys(KILLED):
        kill_one(watched, stage)
    asyncio.run(hammer(watched, cheap=200, poses=10, seed=2))
    begun = time.time()
    prometheus.wait_for_scrape()
    before = series(watched, begun)
    restarts = prometheus.one("pose_worker_restarts_total")
    cpu_s = {labels["stage"]: value for labels, value in prometheus.ask("pose_process_cpu_seconds_total")}

    killer = threading.Thread(target=lambda: [kill_one(watched, stage) for stage in KILLED], daemon=True)
    killer.start()
    register_randomly(watched)
    sent = asyncio.run(hammer(watched, cheap=CHEAP, poses=POSES, seed=3))
    killer.join(900)
    assert not killer.is_alive()
    prometheus.wait_for_scrape()

    assert len(before) > 400
    assert sent == CHEAP + POSES
    assert prometheus.one("pose_worker_restarts_total") - restarts == len(KILLED)
    assert series(watched, begun) == before
    assert "connection" not in prometheus.get("labels", **{"match[]": OURS})
    assert promtool("check", "metrics", given=httpx.get(f"{watched.server.url}/metrics").content) == ""
    for labels, value in prometheus.ask("pose_process_cpu_seconds_total"):
        assert value >= cpu_s[labels["stage"]], labels
    assert prometheus.ask(f"resets(pose_process_cpu_seconds_total[{int(time.time() - begun) + 1}s]) > 0") == []
    assert prometheus.one(f'avg_over_time(up{{job="pem-server"}}[{int(time.time() - begun) + 1}s])') > 0.9


def series(watched: Watched, since: float) -> set[tuple[tuple[str, str], ...]]:
    """Return every series that existed between a moment and now."""
    found = watched.prometheus.get("series", **{"match[]": OURS}, start=since, end=time.time())
    return {tuple(sorted(labels.items())) for labels in found}


def kill_one(watched: Watched, stage: str) -> None:
    """SIGKILL a worker of a stage; return when there are as many workers as before."""
    before = {worker.pid for worker in watched.server.workers(stage)}
    victim = min(before)
    os.kill(victim, signal.SIGKILL)

    def replaced() -> bool:
        now = {worker.pid for worker in watched.server.workers(stage)}
        return victim not in now and len(now) == len(before)

    wait_until(replaced, 180, f"another {stage} worker")


def register_randomly(watched: Watched) -> None:
    """Register an object under a random name, and ask for a pose of it."""
    name = f"part-{secrets.token_hex(4)}"
    files = {
        "file": ("a.ply", ascii_ply(tetrahedron(50 + random.random()))),
        "request": (None, msgspec.json.encode({"name": name})),
    }
    added = watched.send("POST", f"{OBJECTS}?wait=60", files=files)
    assert added.status_code == 201, added.text
    tree = tiny_question().body(indices=[1], objects={name: {"object_id": name}})
    tree["detections"]["object_ids"] = [name]
    assert watched.ask(tree).status_code == 200
    watched.send("DELETE", f"{OBJECTS}/{added.json()['object_id']}")


async def hammer(watched: Watched, *, cheap: int, poses: int, seed: int) -> int:
    """Send requests with made-up paths, ids, names, engines, keys and bodies, and poses among them; return how many."""
    chance = random.Random(seed)
    empty = msgspec.msgpack.encode(tiny_question().body(indices=[]))
    small = msgspec.msgpack.encode(one())
    sent = 0

    async with aiohttp.ClientSession(watched.server.url) as session:

        async def send(method: str, path: str, body: bytes | None = None, **headers: str) -> None:
            nonlocal sent
            given = {
                "X-API-Key": watched.key,
                "Content-Type": "application/msgpack",
                "X-Request-Id": secrets.token_hex(8),
            }
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            async with session.request(method, path, data=body, headers=given | named) as answer:
                await answer.read()
            sent += 1

        def packed(**fields: object) -> bytes:
            return msgspec.msgpack.encode(fields)

        def unknown(**fields: object) -> bytes:
            return msgspec.msgpack.encode(one(**fields))

        kinds: list[Callable[[str], Awaitable[None]]] = [
            lambda word: send("GET", f"/{word}"),
            lambda word: send("GET", f"/api/v1/{word}/{word}?{word}={word}"),
            lambda word: send("GET", f"{OBJECTS}/{word}"),
            lambda word: send("DELETE", f"{OBJECTS}/{word}"),
            lambda word: send("POST", POSE, b"", X_API_Key=keys.PREFIX + word),
            lambda word: send("POST", FULL, b"", X_API_Key=""),
            lambda word: send("POST", POSE, word.encode()),
            lambda word: send("POST", SEG, packed(**{word: word})),
            lambda word: send("POST", FULL, packed(rgb_image=word)),
            lambda word: send("POST", POSE, unknown(engine=word)),
            lambda word: send("POST", POSE, unknown(objects={word: {"object_id": word}})),
            lambda word: send("POST", POSE, b"{}", X_API_Key=watched.slow_key),
            lambda word: send("POST", POSE, b"{}", Content_Type=f"text/{word}"),
            lambda word: send("PATCH", POSE, word.encode()),
            lambda word: send(word[:6].upper().translate(str.maketrans("0123456789", "ABCDEFGHIJ")), "/livez"),
            lambda word: send(
                "GET",
                chance.choice(
                    [route.path for route in ROUTES if route.path.startswith("/v2") or route.path == "/livez"]
                ),
            ),
            lambda word: send("GET", "/api/v1/status", traceparent=word),
        ]
        work = [kinds[index % len(kinds)] for index in range(cheap)]
        work += [lambda _: send("POST", POSE, empty)] * (poses - poses // 10)
        work += [lambda _: send("POST", POSE, small)] * (poses // 10)
        chance.shuffle(work)

        async def client() -> None:
            while work:
                await work.pop()(secrets.token_hex(6))

        await asyncio.gather(*(client() for _ in range(8)))
    return sent
