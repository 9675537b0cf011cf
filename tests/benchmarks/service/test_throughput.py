"""The serving peers do this server's work, and the benchmark that takes turns between them adds up correctly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from benchmarks.peers import start
from benchmarks.peers.environment import PeerFailed, versions
from benchmarks.peers.serving import MSGPACK, ROUTE, Decoder, Poses, Setup, answer, from_environment, to_environment
from benchmarks.service.throughput import OURS, Contender, Contest, Tally, contest
from pem.bench.observe import tree
from pem.bench.sample import Question as LoadQuestion
from pem.bench.sample import Run, Sample, Target, Truth, Usage
from posekit.errors import BadData
from serve.errors import ApiError
from tests.running import Question, RunningServer, running
from workers.settings import Decode, Pose, Stages

FITTED = Stages(decode=Decode(workers=3), pose=Pose(workers=2, threads=2))


# ------------------------------------------------------------------------------------------------------ the shared work


@pytest.fixture(scope="module")
def setup(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """Return the setup of a peer that runs beside the shared server."""
    return Setup(data=str(server.data), port=0, ready_dir=str(tmp_path_factory.mktemp("ready")))


@pytest.fixture(scope="module")
def body(question: Question) -> bytes:
    """Return the demo scene with two of its detections."""
    return msgspec.msgpack.encode(question.body(indices=[0, 1]))


@pytest.fixture(scope="module")
def ours(server: RunningServer, body: bytes) -> list[dict[str, Any]]:
    """Return the server's rows for `body`."""
    found = rows_from(server.url, body)
    assert [row["status"] for row in found] == ["ok", "ok"]
    return found


def rows_from(url: str, body: bytes) -> list[dict[str, Any]]:
    """Return the rows of an answer, in the format of its question."""
    headers = {"Content-Type": MSGPACK, "Accept": MSGPACK}
    response = httpx.post(url + ROUTE, content=body, headers=headers, timeout=60)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == MSGPACK
    tree_ = msgspec.msgpack.decode(response.content)
    assert tree_["success"] is True
    rows: list[dict[str, Any]] = tree_["poses"]
    return rows


def test_the_shared_work_gives_the_rows_of_the_server(setup: Setup, body: bytes, ours: list[dict[str, Any]]) -> None:
    cut, poses = Decoder(setup).decode(body), Poses(setup)
    for rows in (poses.one_by_one(cut), *poses.together([cut, cut])):
        decoded = msgspec.msgpack.decode(answer(rows, setup.engine))
        assert decoded["success"] is True
        assert decoded["poses"] == ours
    assert len(list(Path(setup.ready_dir).iterdir())) == 1  # this process said that it can answer


def test_the_shared_work_refuses_what_the_server_refuses(setup: Setup, question: Question) -> None:
    decoder = Decoder(setup)
    with pytest.raises(ApiError, match="not MessagePack"):
        decoder.decode(b"\xc1")
    with pytest.raises(KeyError, match="nobody"):
        decoder.decode(msgspec.msgpack.encode(question.body(objects=..., object_id="nobody")))
    with pytest.raises(BadData):
        decoder.decode(msgspec.msgpack.encode(question.body(rgb_image=b"no picture")))


def test_a_mask_that_cannot_be_used_is_a_row_as_with_the_server(
    server: RunningServer, setup: Setup, question: Question
) -> None:
    empty = {"size": question.masks[0]["size"], "counts": [int(np.prod(question.masks[0]["size"]))]}
    detections = {"masks": [empty], "object_ids": [question.names[0]]}
    asked = msgspec.msgpack.encode(question.body(indices=[0], detections=detections))
    [row] = rows_from(server.url, asked)
    assert row["error"]["code"] == "mask_empty"
    [cropped] = Decoder(setup).decode(asked).crops
    assert cropped.rejected == ("mask_empty", row["error"]["detail"])


# -------------------------------------------------------------------------------------------------- starting the peers


def test_a_setup_reaches_the_peer_as_it_was(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in to_environment(setup).items():
        monkeypatch.setenv(name, value)
    assert from_environment() == setup


def test_each_peer_gets_as_many_threads_and_decoders_as_the_server() -> None:
    for name in start.PEERS:
        chosen = start.make_setup({"data": "", "port": 0, "ready_dir": "", **start.Entry.of(name).settings(FITTED)})
        assert chosen.engines * chosen.threads == 4, name
        assert chosen.decoders in (1, 3), name


def test_settings_of_a_peer_can_be_tried_and_are_told() -> None:
    entry = start.Entry.of("litserve:engines=7:batch=2")
    setup = start.make_setup({"data": "", "port": 0, "ready_dir": "", **entry.settings(FITTED)})
    assert (setup.engines, setup.batch) == (7, 2)
    assert "7 worker(s)" in entry.describe(setup)
    assert "batches of 2 requests" in entry.describe(setup)


@pytest.mark.parametrize("text, words", [("flask", "no peer 'flask'"), ("litserve:cores=2", "no setting cores")])
def test_a_peer_or_a_setting_that_there_is_not_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        start.Entry.of(text)


def test_a_setting_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="engines"):
        start.make_setup({"data": "", "port": 0, "ready_dir": "", "engines": "many"})


def test_without_its_packages_a_peer_says_how_to_get_them(tmp_path: Path) -> None:
    nowhere = tmp_path / "bin" / "python"
    with (
        pytest.raises(PeerFailed, match=r"needs fastapi, litserve, uvicorn: `make peers-serving`"),
        start.running(start.Entry.of("litserve"), {"data": str(tmp_path)}, tmp_path, nowhere),
    ):
        pytest.fail("it cannot run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastapi-loop", "fastapi-batcher", "litserve", "bentoml"])
def test_a_peer_answers_as_the_server_does_and_leaves_nothing_behind(
    name: str, setup: Setup, body: bytes, ours: list[dict[str, Any]], tmp_path: Path
) -> None:
    if versions(start.PEERS[name].packages).keys() != set(start.PEERS[name].packages):
        pytest.skip("the serving peers have no environment: make peers-serving")
    with start.running(start.Entry.of(name), {"data": setup.data}, tmp_path) as target:
        assert target.pid is not None
        assert rows_from(target.url, body) == ours
        processes = tree(target.pid)
        assert target.pid in processes
    assert not [pid for pid in processes if running(pid)]


@pytest.mark.slow
def test_a_peer_that_cannot_start_says_why(setup: Setup, tmp_path: Path) -> None:
    if not versions(["fastapi"]):
        pytest.skip("the serving peers have no environment: make peers-serving")
    given = {"data": setup.data, "engine": "sam6d", "weights": str(tmp_path / "none.safetensors")}
    with (
        pytest.raises(PeerFailed, match=r"none\.safetensors cannot be read"),
        start.running(start.Entry.of("fastapi-batcher"), given, tmp_path),
    ):
        pytest.fail("it cannot run")


# ---------------------------------------------------------------------------------------------------------- the figures


def made_up(latencies_s: list[float], *, seconds: float = 10.0, **of_each: Any) -> Run:
    """Make a run of one client with three right poses in each answer, and two processes that used CPU."""
    facts: dict[str, Any] = {"status": 200, "detections": 3, "poses": 3, **of_each}
    samples = [
        Sample(question="q", client=0, due=1.0, sent=1.0, done=1.0 + latency_s, **facts) for latency_s in latencies_s
    ]
    usage = [Usage(pid=pid, name="p", cpu_s=3.0, rss_mb=90.0, rss_peak_mb=100.0) for pid in (1, 2)]
    return Run(mode="closed", clients=1, rate_hz=None, begun=0.0, ended=seconds, samples=samples, usage=usage)


def test_rounds_are_added_up_and_set_against_this_server() -> None:
    found = Contest()
    found.tallies[OURS, 8] = Tally()
    found.tallies["peer", 8] = Tally()
    found.tallies[OURS, 8].add(made_up([0.1] * 20))
    found.tallies[OURS, 8].add(made_up([0.3] * 10))
    found.tallies["peer", 8].add(made_up([0.5] * 10))
    mine, theirs = found.figures()
    assert (mine["server"], mine["detections/s"], mine["lowest"], mine["highest"]) == (OURS, 4.5, 3.0, 6.0)
    assert (mine["vs."], theirs["vs."]) == (1.0, 1.5)
    assert (mine["p50 ms"], mine["p99 ms"]) == (pytest.approx(100.0), pytest.approx(300.0))
    assert theirs["CPU s each"] == pytest.approx(0.2)  # 6 s for 30 detections
    assert theirs["memory MB"] == 200
    assert (mine["rounds"], mine["seconds"], mine["requests"]) == (2, 20.0, 30)
    assert (theirs["rounds"], theirs["seconds"], theirs["requests"]) == (1, 10.0, 10)
    assert found.faults == []
    assert [row["vs."] for row in found.table().as_dicts()] == ["1", "1.5"]


@pytest.mark.parametrize(
    "facts, column", [({"wrong": 1}, "wrong"), ({"changed": 2}, "changed"), ({"status": 500}, "errors")]
)
def test_whatever_is_not_right_is_a_fault(facts: dict[str, Any], column: str) -> None:
    found = Contest()
    found.tallies["peer", 1] = Tally()
    found.tallies["peer", 1].add(made_up([0.1], **facts))
    [row] = found.table().as_dicts()
    assert row[column] > 0
    [words] = found.faults
    assert words.startswith("peer, 1 clients: ")


@pytest.mark.parametrize("facts", [{"status": 500}, {"status": 429}, {"wrong": 1}, {"changed": 1}])
def test_a_row_in_which_something_went_wrong_is_marked_and_so_is_its_ratio(facts: dict[str, Any]) -> None:
    found = Contest()
    for title, made in ((OURS, {}), ("good", {}), ("bad", facts)):
        tally = found.tallies[title, 8] = Tally()
        tally.add(made_up([0.1] * 10))
        tally.add(made_up([0.1], **made))
    rows = found.table().as_dicts()
    assert [row["server"] for row in rows] == [OURS, "good", "bad *"]
    assert [row["vs."].endswith(" *") for row in rows] == [False, False, True]
    assert [(row["marked"], row["vs. marked"]) for row in found.figures()] == [
        (False, False),
        (False, False),
        (True, True),
    ]


def test_where_this_server_fails_every_ratio_to_it_is_marked() -> None:
    found = Contest()
    for title, clients, status in ((OURS, 1, 500), ("peer", 1, 200), (OURS, 8, 200), ("peer", 8, 200)):
        tally = found.tallies[title, clients] = Tally()
        tally.add(made_up([0.1], status=status))
    rows = found.table().as_dicts()
    assert [row["server"] for row in rows] == [f"{OURS} *", "peer", OURS, "peer"]
    assert [row["vs."].endswith(" *") for row in rows] == [True, True, False, False]


@pytest.mark.slow
def test_contenders_take_turns_and_one_that_fails_keeps_no_other_from_it(
    server: RunningServer, question: Question, body: bytes
) -> None:
    truths = tuple(
        Truth(object_name=one.shape.name, T_cam_obj=one.T_cam_obj, symmetries=one.shape.symmetries)
        for one in question.scene.instances[:2]
    )
    asked = LoadQuestion(name="2 masks", body=body, content_type=MSGPACK, truths=truths, headers={"Accept": MSGPACK})

    @contextlib.contextmanager
    def the_server() -> Iterator[Target]:
        yield Target(url=server.url, pid=server.pid)

    @contextlib.contextmanager
    def nothing() -> Iterator[Target]:
        raise PeerFailed("it has no legs")
        yield Target(url="")

    three = [
        Contender(title=OURS, start=the_server, words=""),
        Contender(title="broken", start=nothing, words=""),
        Contender(title="same", start=the_server, words=""),
    ]
    told: list[str] = []
    found = contest(three, [asked], clients=[2], rounds=2, seconds=5.0, warmup_s=0.2, tell=told.append)
    assert [words.partition(": ")[2] for words in told] == [OURS, "broken", "same", "same", OURS]
    assert found.faults == ["broken did not run: it has no legs"]
    assert [row["server"] for row in found.table().as_dicts()] == [OURS, "same"]
    for row in found.table().as_dicts():
        assert row["poses/s"] == row["detections/s"] > 0
        assert row["CPU s each"] > 0
    assert len(found.tallies["same", 2].results) == 2
