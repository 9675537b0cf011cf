"""Many clients at once: each gets its own right answer, passes are shared, and clients take turns."""

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

from serve.gateway import keys
from tests.running import Question, RunningServer, post, register
from tests.serve.tiny import masks_of, one, tiny_question, tiny_scene, truth


def ask_patiently(
    server: RunningServer, tree: dict[str, Any], seconds: float = 240.0, **headers: str
) -> httpx.Response:
    """POST, honouring Retry-After, for a bounded time."""
    end = time.monotonic() + seconds
    while True:
        answer = post(server.url, tree, timeout=330, **headers)
        if answer.status_code not in (429, 503) or time.monotonic() > end:
            return answer
        time.sleep(float(answer.headers["retry-after"]))


def metric(server: RunningServer, name: str) -> float:
    """Return the sum of a metric's samples of exactly this name, whatever their labels."""
    page = httpx.get(f"{server.url}/metrics").text
    return sum(float(v) for v in re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", page, re.MULTILINE))


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory, question: Question) -> Iterator[RunningServer]:
    """Start a server with one pose worker that gathers requests into passes, as on a GPU."""
    settings = {"pose_workers": 1, "pose_threads": 2, "pose_batch_requests": 16, "pose_pass_detections": 8}
    with RunningServer(tmp_path_factory.mktemp("sharing") / "data", settings) as another:
        question.register(another.url)
        yield another


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
    together = 0
    for _ in range(10):  # what is decoded in time for a pass is chance
        with ThreadPoolExecutor(6) as pool:
            with sharing.paused("pose"):
                asked = [pool.submit(post, sharing.url, question.body(indices=[index % 3])) for index in range(6)]
                sharing.wait_for_queue(requests=6)
            answers = [future.result() for future in asked]
        assert all(answer.status_code == 200 for answer in answers)
        together = max(answer.json()["timing"]["batch_requests"] for answer in answers)
        if together > 1:
            break
    assert together > 1, "no pass held more than one request"
    shared = metric(sharing, "pose_pass_requests_sum") - metric(sharing, "pose_pass_requests_count")
    assert shared > before


def test_one_mask_behind_six_large_requests_waits_only_for_the_passes_already_inside(
    server: RunningServer, question: Question
) -> None:
    large = question.body(indices=[i % len(question.masks) for i in range(20)], deadline_ms=300_000)
    small = question.body(indices=[0], deadline_ms=300_000)
    server.wait_idle()
    workers = len(server.workers("pose"))
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask_patiently(server, large)), daemon=True) for _ in range(6)
    ]
    quick: list[httpx.Response] = []
    last = threading.Thread(target=lambda: quick.append(post(server.url, small, timeout=310)), daemon=True)
    with server.paused("pose"):
        for thread in threads:
            thread.start()
        server.wait_for_queue(requests=6)
        last.start()
        server.wait_for_queue(requests=7)
        passes_before = metric(server, "pose_pass_detections_count")
    last.join(310)
    with server.paused("pose"):
        passes_after = metric(server, "pose_pass_detections_count")
    assert quick[0].status_code == 200, quick[0].text[:300]
    # Two passes' worth for each worker are inside Mosec when it comes; with its own, at most one more for each worker
    # may end before we look. The six requests are 30 passes.
    assert passes_after - passes_before <= 4 * workers
    for thread in threads:
        thread.join(340)
    assert [a.status_code for a in answers] == [200] * 6
    assert all(len(a.json()["poses"]) == 20 for a in answers)


@pytest.mark.slow
def test_clients_take_turns(start_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    keys_file = tmp_path / "keys.json"
    greedy, modest = (keys.add(keys_file, name) for name in ("greedy", "modest"))
    server = start_server(keys_file=keys_file)
    register(server.url, tiny_scene().instances[1].shape, X_API_Key=modest)
    done: dict[str, float] = {}

    def ask(name: str, key: str, count: int) -> None:
        masks = masks_of(*[tiny_question().masks[1]] * count)
        tree = one(detections=masks, init_poses=[truth(1)] * count, deadline_ms=300_000)
        answer = ask_patiently(server, tree, X_API_Key=key)
        assert answer.status_code == 200, answer.text[:300]
        done[name] = time.monotonic()

    threads = [threading.Thread(target=ask, args=(f"greedy {i}", greedy, 24), daemon=True) for i in range(5)]
    late = threading.Thread(target=ask, args=("modest", modest, 40), daemon=True)  # more than any one of the greedy's
    with server.paused("pose"):  # until all of them stand in line
        for thread in threads:
            thread.start()
        server.wait_for_queue(requests=5, X_API_Key=modest)
        late.start()
        server.wait_for_queue(requests=6, X_API_Key=modest)
    for thread in (*threads, late):
        thread.join(240)
    assert len(done) == 6
    before = sum(done[f"greedy {i}"] < done["modest"] for i in range(5))
    assert before <= 3, "five requests of one client were served before another client's turn came"


def test_a_client_that_goes_away_is_not_computed(server: RunningServer, question: Question) -> None:
    server.wait_idle()
    many = question.body(indices=[0] * 120, deadline_ms=300_000)
    workers = len(server.workers("pose"))
    before = metric(server, "pose_pass_detections_sum")
    with server.paused("pose"), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, server.url, many, timeout=5.0)
        server.wait_for_queue(requests=1)
        with pytest.raises(httpx.ReadTimeout):
            asked.result()
        server.wait_for_queue(requests=0)
    server.wait_idle()
    worked = metric(server, "pose_pass_detections_sum") - before
    assert worked <= 8 * workers, "two passes' worth for each worker were inside, and of 120 no more is worked on"
