"""Many clients at once: everybody gets their own right answer, passes are shared, and turns are taken."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve import keys
from tests.running import Question, RunningServer, post, register, wait_until


def ask_patiently(
    server: RunningServer, tree: dict[str, Any], seconds: float = 240.0, **headers: str
) -> httpx.Response:
    """POST, honouring Retry-After, for a bounded time."""
    end = time.monotonic() + seconds
    while True:
        answer = post(server.url, tree, timeout=120, **headers)
        if answer.status_code not in (429, 503) or time.monotonic() > end:
            return answer
        time.sleep(float(answer.headers["retry-after"]))


def metric(server: RunningServer, name: str) -> float:
    """The sum of a metric's samples of exactly this name, whatever their labels."""
    page = httpx.get(f"{server.url}/metrics").text
    return sum(float(v) for v in re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", page, re.MULTILINE))


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory, question: Question) -> Iterator[RunningServer]:
    """A server with one pose worker that gathers requests into passes, as on a GPU."""
    settings = {"pose_workers": 1, "pose_threads": 2, "pose_batch_requests": 16, "pose_pass_detections": 8}
    with RunningServer(tmp_path_factory.mktemp("sharing") / "data", settings) as one:
        question.register(one.url)
        yield one


def test_ten_clients_with_mixed_requests_each_get_their_own_right_answers(
    server: RunningServer, sharing: RunningServer, question: Question
) -> None:
    count = len(question.masks)
    wanted = [[0], [1], [0, 1, 2], [3], list(range(count)), [2, 2], [4, 5], [(3 * i) % count for i in range(40)], [5]]
    alone = {index: post(server.url, question.body(indices=[index])).json()["poses"][0] for index in range(count)}
    garbage = question.body(indices=[0], rgb_image=question.rgb[: len(question.rgb) // 2])

    def client(indices: list[int]) -> httpx.Response:
        return ask_patiently(sharing, question.body(indices=indices, deadline_ms=120_000))

    with ThreadPoolExecutor(10) as pool:
        futures = [pool.submit(client, indices) for indices in wanted]
        bad = [pool.submit(ask_patiently, sharing, garbage) for _ in range(3)]
        answers = [future.result() for future in futures]
        refusals = [future.result() for future in bad]

    for indices, answer in zip(wanted, answers, strict=True):
        assert answer.status_code == 200, answer.text[:500]
        rows = answer.json()["poses"]
        assert len(rows) == len(indices)
        for index, row in zip(indices, rows, strict=True):
            assert row == alone[index], "the same instance gets the same bits alone, in company, on any server"
    for answer in refusals:
        assert answer.status_code == 400
        assert answer.json()["error"]["field"] == "rgb_image"
    degrees, millimetres = question.errors(0, alone[0])
    assert degrees < 2
    assert millimetres < 2


def test_passes_are_shared_by_several_requests(sharing: RunningServer, question: Question) -> None:
    before = metric(sharing, "pose_pass_requests_sum") - metric(sharing, "pose_pass_requests_count")
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: ask_patiently(sharing, question.body(indices=[i % 3])), range(12)))
    assert all(answer.status_code == 200 for answer in answers)
    shared = metric(sharing, "pose_pass_requests_sum") - metric(sharing, "pose_pass_requests_count")
    assert shared > before, "no pass held more than one request"
    assert max(answer.json()["timing"]["batch_requests"] for answer in answers) > 1


def test_one_mask_behind_six_large_requests_waits_only_for_the_passes_already_inside(
    server: RunningServer, question: Question
) -> None:
    large = question.body(indices=[i % len(question.masks) for i in range(40)], deadline_ms=300_000)
    small = question.body(indices=[0], deadline_ms=300_000)
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask_patiently(server, large)), daemon=True) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    while httpx.get(f"{server.url}/api/v1/status").json()["queue"]["detections"] < 200 and time.monotonic() < end:
        time.sleep(0.02)
    passes_before = metric(server, "pose_pass_detections_count")
    answer = post(server.url, small, timeout=120)
    passes_after = metric(server, "pose_pass_detections_count")
    assert answer.status_code == 200, answer.text[:300]
    # Two passes' worth for each worker are inside Mosec when it comes; with its own, at most one more for each worker
    # may end before we look. The six requests are 60 passes.
    workers = len(server.workers("pose"))
    assert passes_after - passes_before <= 4 * workers
    for thread in threads:
        thread.join(240)
    assert [a.status_code for a in answers] == [200] * 6
    assert all(len(a.json()["poses"]) == 40 for a in answers)


def test_clients_take_turns(start_server: Callable[..., RunningServer], question: Question, tmp_path: Path) -> None:
    keys_file = tmp_path / "keys.json"
    greedy, modest = (keys.add(keys_file, name) for name in ("greedy", "modest"))
    server = start_server(keys_file=keys_file)
    shape = question.scene.instances[0].shape
    register(server.url, shape, X_API_Key=modest)
    done: dict[str, float] = {}

    def ask(name: str, key: str, count: int) -> None:
        answer = ask_patiently(server, question.body(indices=[0] * count, deadline_ms=300_000), X_API_Key=key)
        assert answer.status_code == 200, answer.text[:300]
        done[name] = time.monotonic()

    threads = [threading.Thread(target=ask, args=(f"greedy {i}", greedy, 24), daemon=True) for i in range(5)]
    for thread in threads:
        thread.start()
    wait_until(
        lambda: (
            httpx.get(f"{server.url}/api/v1/status", headers={"X-API-Key": modest}).json()["queue"]["requests"] == 5
        ),
        30,
        "the greedy client's requests to be in",
    )
    ask("modest", modest, 40)  # more than any single one of the greedy client's
    for thread in threads:
        thread.join(120)
    before = sum(done[f"greedy {i}"] < done["modest"] for i in range(5))
    assert len(done) == 6
    assert before <= 3, "five requests of one client were served before another client's turn came"


def test_a_client_that_goes_away_is_not_computed(server: RunningServer, question: Question) -> None:
    many = question.body(indices=[0] * 120, deadline_ms=300_000)
    try:
        post(server.url, many, timeout=1.0)
    except httpx.TimeoutException:
        pass
    else:
        raise AssertionError("120 detections in a second: the test needs a larger request")
    end = time.monotonic() + 30
    while (left := httpx.get(f"{server.url}/api/v1/status").json()["queue"])["requests"] and time.monotonic() < end:
        time.sleep(0.05)
    assert left["requests"] == 0
