"""The pipeline as it really runs: `python -m serve.app`, with its processes, its batches and its accidents."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from posekit.store import ObjectStore, StoredObject
from tests.workers.support import ROOT, Asker, Pipeline, register
from workers.messages import (
    Failure,
    FinishPart,
    InspectAnswer,
    InspectTask,
    ObjectRef,
    OnboardAnswer,
    OnboardTask,
    PartAnswer,
    PassRecord,
)

pytestmark = pytest.mark.slow


def answered(answer: PartAnswer | Failure) -> PartAnswer:
    assert isinstance(answer, PartAnswer), answer
    return answer


@pytest.fixture(scope="module")
def registered(pipeline: Pipeline) -> StoredObject:
    """Bring in the scene's object through /inspect and /onboard."""

    def send(route: str, kind: Any) -> Any:
        def call(task: InspectTask | OnboardTask) -> Any:
            status, body = pipeline.post(route, msgspec.msgpack.encode(task))
            assert status == 200, (status, body)
            return msgspec.msgpack.decode(body, type=kind)

        return call

    store = ObjectStore(Path(pipeline.stages.objects_dir))
    return register(store, send("/inspect", InspectAnswer), send("/onboard", OnboardAnswer))


@pytest.fixture(scope="module")
def ask(scene: Any, registered: StoredObject) -> Asker:
    return Asker(scene=scene, reference=ObjectRef(object_id=registered.object_id, diameter_mm=registered.diameter_mm))


def one(ask: Asker, which: int, request_id: str) -> Any:
    """Return a part about one detection."""
    return ask.part(ask.job([ask.scene.instances[which % 3].mask], request_id=request_id))


def test_a_part_comes_back_with_its_rows(pipeline: Pipeline, ask: Asker) -> None:
    answer = answered(pipeline.ask(ask.part(ask.job(visualize=True))))
    assert [row.status for row in answer.rows] == ["ok"] * 3
    assert answer.visualization is not None
    assert answer.decode_ms > 0
    assert answer.pose_ms > 0
    assert [(record.detections, record.requests) for record in answer.passes] == [(3, 1)]


def test_concurrent_requests_share_passes_and_garbage_harms_nobody(pipeline: Pipeline, ask: Asker) -> None:
    alone = [answered(pipeline.ask(one(ask, which, "alone"))).rows for which in range(3)]
    parts = [one(ask, which, f"r{which}") for which in range(6)]
    parts.insert(3, ask.part(ask.job(rgb=b"garbage", request_id="garbage")))
    most = 0
    for _ in range(10):  # what is decoded in time for a pass is chance
        with ThreadPoolExecutor(len(parts)) as pool:
            answers = list(pool.map(pipeline.ask, parts))
        garbage = answers.pop(3)
        assert isinstance(garbage, Failure)
        assert (garbage.code, garbage.part_id) == ("bad_data", "garbage/0")
        for which, answer in enumerate(answers):
            assert answered(answer).rows == alone[which % 3]  # the same bits as alone
        passes: list[PassRecord] = [record for answer in answers for record in answered(answer).passes]
        assert sum(record.detections for record in passes) == 6
        most = max(record.requests for record in passes)
        if most > 1:
            break
    assert most > 1, "no pass held more than one request"


def test_a_split_request_is_finished_through_its_own_route(pipeline: Pipeline, ask: Asker, tmp_path: Path) -> None:
    job = ask.job(output_dir=str(tmp_path / "out"))
    rows = [
        row
        for start in range(3)
        for row in answered(pipeline.ask(ask.part(job, start=start, stop=start + 1, finish=False))).rows
    ]
    message = FinishPart(part_id="r1/finish", job=msgspec.msgpack.encode(job), rows=rows)
    status, body = pipeline.post("/finish", msgspec.msgpack.encode(message))
    assert status == 200
    assert msgspec.msgpack.decode(body, type=PartAnswer | Failure).output_written
    assert (tmp_path / "out" / "vis_pem.png").is_file()


def test_every_stage_tells_its_state(pipeline: Pipeline, ask: Asker) -> None:
    answered(pipeline.ask(one(ask, 0, "before")))
    for stage in ("decode", "pose", "respond", "inspect", "onboard"):
        [state] = pipeline.workers(stage)
        assert state.ready, stage
        assert state.holding == [], stage
    [pose] = pipeline.workers("pose")
    assert pose.info["objects"] == [ask.reference.object_id]


def test_a_killed_pose_worker_said_what_it_held_and_is_replaced(pipeline: Pipeline, ask: Asker) -> None:
    [first] = pipeline.workers("pose")
    job = ask.job([ask.scene.instances[0].mask] * 40, request_id="long")
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(pipeline.post, "/pose", msgspec.msgpack.encode(ask.part(job)), 5.0)
        pipeline.wait_until(lambda: pipeline.workers("pose")[0].holding == ["long/0"], "the pose worker holds the part")
        os.kill(first.pid, signal.SIGKILL)
        pipeline.wait_until(
            lambda: any(w.ready and w.pid != first.pid for w in pipeline.workers("pose")), "another one is there"
        )
        lost.cancel()
    assert answered(pipeline.ask(one(ask, 0, "after"))).rows[0].status == "ok"
    assert pipeline.process.poll() is None


@pytest.mark.parametrize("stage", ["decode", "respond"])
def test_a_killed_worker_of_another_stage_is_replaced(pipeline: Pipeline, ask: Asker, stage: str) -> None:
    [first] = pipeline.workers(stage)
    os.kill(first.pid, signal.SIGKILL)
    pipeline.wait_until(
        lambda: any(w.ready and w.pid != first.pid for w in pipeline.workers(stage)), "another one is there"
    )
    assert answered(pipeline.ask(one(ask, 0, "after"))).rows[0].status == "ok"


def test_everything_ends_with_the_main_process(pipeline: Pipeline) -> None:
    before = pipeline.processes()
    assert len(before) >= 12  # five stages with their keepers, the front, the main process
    os.kill(pipeline.process.pid, signal.SIGKILL)
    pipeline.process.wait()
    pipeline.wait_until(lambda: pipeline.processes() == [], "all of its processes are gone", timeout_s=20.0)


PARENT = """
import os, subprocess, sys, time
os.environ["PEM_PARENT_PID"] = str(os.getpid())
process = subprocess.Popen(sys.argv[1:], start_new_session=True)
print(process.pid, flush=True)
time.sleep(60)
"""


def test_nothing_is_left_when_the_parent_dies_while_the_pipeline_starts(pipeline: Pipeline) -> None:
    pipeline.remove_sockets()
    log = pipeline.log.open("ab")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *pipeline.command],
        cwd=ROOT,
        env=pipeline.environment,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert parent.stdout is not None
    with log, parent.stdout as output:
        leader = int(output.readline())
        pipeline.process = Leader(leader)  # type: ignore[assignment]
        pipeline.wait_until(lambda: len(pipeline.processes()) >= 12, "its processes are there")
        parent.kill()
        parent.wait()
    pipeline.wait_until(lambda: pipeline.processes() == [], "all of its processes are gone", timeout_s=20.0)


class Leader:
    """A process that somebody else started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        return None if Path(f"/proc/{self.pid}").exists() else 0

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout: float = 0.0) -> None:
        """Whoever started it waits for it."""
