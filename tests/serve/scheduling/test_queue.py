"""The queue before the pose stage, alone: the order of turns, admission, and parts that get lost.

Behind it stands a pose stage that does nothing but wait for the test to say how each part ends, so the order of
everything is the queue's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pem.contract import Row
from serve.backend.mosec import Interrupted, Refused
from serve.backend.run_dir import RunDir
from serve.errors import ApiError
from serve.scheduling import queue
from serve.scheduling.queue import Queue
from serve.settings import Queue as QueueSettings
from serve.tasks.pose.parts import UNIT, PoseWork, Solution, solve
from workers.jobs import BESIDE, INLINE_BYTES
from workers.messages import Failure, FinishPart, Job, MaskSpec, Part, PartAnswer, PassRecord
from workers.settings import Pose, Stages

PASS = 4
LONG_MS = 600_000  # nobody gathers for so long before a test is over
K = (600.0, 0.0, 320.0, 0.0, 600.0, 240.0, 0.0, 0.0, 1.0)


def alone(scenario: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Make an asynchronous test run in a separate event loop."""

    @functools.wraps(scenario)
    def run(**fixtures: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(120):
                await scenario(**fixtures)

        asyncio.run(bounded())

    return run


class Clock:
    """The queue's `time`, which a test may advance."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def time(self) -> float:
        return time.time() + self.ahead_s


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace time: no pauses, and the test moves the clock."""
    one = Clock()
    monkeypatch.setattr("serve.scheduling.queue.time", one)
    monkeypatch.setattr("serve.tasks.pose.parts.time", one)
    monkeypatch.setattr("serve.scheduling.queue._PAUSE_BEFORE_RETRY_S", 0.0)
    return one


class Stage:
    """A pose stage that gives the answers that a test chooses, when it chooses."""

    def __init__(self, devices: int = 1, max_seconds: float = 120.0, gather_ms: int = 0) -> None:
        self.stages = Stages(devices=("cpu",) * devices, pose=Pose(max_seconds=max_seconds, batch_wait_ms=gather_ms))
        self.ready_workers = devices
        self.is_ready = True
        self.down_s = 0.0
        self.info: dict[str, Any] = {}
        self.sent: list[str] = []  # part ids, in the order they came
        self.inside: dict[str, tuple[Part, asyncio.Future[bytes]]] = {}
        self.most_inside = 0
        self.finished: list[FinishPart] = []

    def worker_counts(self) -> dict[str, int]:
        """Return the workers of all stages, without those that died."""
        return {"decode": 1, "pose": self.ready_workers, "respond": 1}

    def pose_info(self) -> dict[str, Any]:
        """Return the pose worker's report about itself."""
        return self.info

    async def call(self, route: str, call_id: str, payload: bytes) -> bytes:
        """Take in one part, whose job must be there."""
        part = msgspec.msgpack.decode(payload, type=Part)
        assert (route, call_id) == ("/pose", part.part_id)
        job = msgspec.msgpack.decode(Path(part.path).read_bytes() if part.path else part.job, type=Job)
        assert part.part_id.startswith(f"{job.request_id}/")
        assert part.stop <= len(job.detections)
        self.sent.append(part.part_id)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.inside[call_id] = (part, future)
        self.most_inside = max(self.most_inside, sum(max(1, p.stop - p.start) for p, _ in self.inside.values()))
        try:
            return await future
        finally:
            del self.inside[call_id]

    async def call_with_retries(self, route: str, call_id: str, payload: bytes, *, retries: int) -> bytes:
        """Answer with the overlay of a split request."""
        assert route == "/finish"
        message = msgspec.msgpack.decode(payload, type=FinishPart)
        self.finished.append(message)
        drawn = PartAnswer(
            part_id=call_id, visualization=b"png", output_written=True, respond_unix=time.time(), respond_ms=1000.0
        )
        await asyncio.sleep(0.002)
        return msgspec.msgpack.encode(drawn)

    async def answer(self, part_id: str, seconds: float = 0.0, **changes: Any) -> None:
        """Answer a part, its rows numbered by detection."""
        part, future = self.inside[part_id]
        rows = [_row(index) for index in range(part.start, part.stop)]
        engine = msgspec.msgpack.decode(Path(part.path).read_bytes() if part.path else part.job, type=Job).engine
        passes = [PassRecord(engine=engine, detections=len(rows), requests=1, seconds=seconds)] if seconds else []
        answer = PartAnswer(part_id=part_id, **{"rows": rows, "engine": "geometric", "passes": passes, **changes})
        future.set_result(msgspec.msgpack.encode(answer))
        await settled()

    async def fail(self, part_id: str, error: Exception | Failure) -> None:
        """End a part with an error."""
        future = self.inside[part_id][1]
        if isinstance(error, Failure):
            future.set_result(msgspec.msgpack.encode(error))
        else:
            future.set_exception(error)
        await settled()

    async def work_off(self) -> None:
        """Answer the oldest part until nothing is left."""
        while self.inside:
            await self.answer(next(iter(self.inside)))


def _row(index: int) -> Row:
    return Row(
        object_id=index, cad_id=None, rotation=None, translation=None, confidence=0.0, bbox=(0, 0, 1, 1), status="ok"
    )


async def settled() -> None:
    """Let everything run that can run."""
    for _ in range(12):
        await asyncio.sleep(0)


class Bench:
    """A queue, the stage behind it, and requests."""

    def __init__(self, folder: Path, stage: Stage, **settings: Any) -> None:
        self.stage = stage
        self.run_dir = RunDir(folder)
        self.parts: list[PartAnswer] = []
        self.dispatched: list[str] = []
        self.queue = Queue(
            stage,  # type: ignore[arg-type]
            self.run_dir,
            QueueSettings(**{"passes_in_flight": 1, **settings}),
            pass_cost=PASS,
            on_part=lambda answer, waited_s: self.parts.append(answer),
            on_dispatch=self.dispatched.append,
        )
        self.tasks: list[asyncio.Task[Solution]] = []

    async def ask(
        self, client: str, name: str, count: int = PASS, *, deadline_s: float = 1000.0, large: bool = False, **job: Any
    ) -> asyncio.Task[Solution]:
        """Make a request of `count` detections; its parts are `name/0`, `name/1`, ..."""
        request = Job(
            request_id=name,
            rgb=bytes(INLINE_BYTES if large else 8),
            depth=b"depth",
            K=K,
            depth_scale_mm=1.0,
            detections=[MaskSpec(raw=b"{}") for _ in range(count)],
            objects=[],
            deadline_unix=time.time() + deadline_s,
            **job,
        )
        task = asyncio.create_task(solve(self.queue, PoseWork(request), client, queue.time.monotonic() + deadline_s))
        self.tasks.append(task)
        await settled()
        return task

    def spooled(self) -> list[str]:
        """Return the requests that lie in shared memory."""
        return sorted(path.name for path in self.run_dir.jobs.iterdir())


@contextlib.asynccontextmanager
async def bench(folder: Path, stage: Stage | None = None, **settings: Any) -> AsyncIterator[Bench]:
    """Make a queue; at the test's end its counts must be zero and its files gone."""
    one = Bench(folder, stage or Stage(), **settings)
    yield one
    await one.stage.work_off()
    assert all(task.done() for task in one.tasks), "a request hangs"
    for task in one.tasks:
        if not task.cancelled():
            task.exception()
    assert (one.queue.requests, one.queue.cost, one.queue.waiting) == (0, 0, 0)
    assert one.spooled() == []
    one.run_dir.remove()


def order(stage: Stage) -> str:
    """Return the clients or requests by their first letters, in the order in which their parts were sent."""
    return "".join(part_id[0] for part_id in stage.sent)


async def code(task: asyncio.Task[Solution]) -> str:
    """Return the code of a request's refusal."""
    with pytest.raises(ApiError) as raised:
        await task
    return raised.value.code


# ------------------------------------------------------------------------------------------------- when it is sent


@alone
async def test_whoever_comes_to_an_idle_stage_does_not_wait_for_company(tmp_path: Path) -> None:
    async with bench(tmp_path, Stage(gather_ms=LONG_MS)) as one:
        await one.ask("anna", "a", 1)
        assert (one.stage.sent, one.dispatched) == (["a/0"], ["idle"])


@alone
async def test_while_the_stage_is_busy_parts_are_gathered_until_they_fill_a_pass(tmp_path: Path) -> None:
    async with bench(tmp_path, Stage(gather_ms=LONG_MS), passes_in_flight=3) as one:
        await one.ask("anna", "a", 1)
        await one.ask("bela", "b", PASS - 1)
        assert order(one.stage) == "a"
        await one.ask("cleo", "c", 1)
        assert sorted(order(one.stage)) == ["a", "b", "c"]
        assert one.dispatched == ["idle", "full"]


@alone
async def test_gathering_ends_with_its_window_though_the_pass_is_not_full(tmp_path: Path, clock: Clock) -> None:
    async with bench(tmp_path, Stage(gather_ms=1000), passes_in_flight=3) as one:
        await one.ask("anna", "a", 1)
        await one.ask("bela", "b", 1)
        assert order(one.stage) == "a"
        while order(one.stage) == "a":
            await asyncio.sleep(0.01)
        assert order(one.stage) == "ab"
        assert one.dispatched == ["idle", "window"]


@alone
async def test_gathering_ends_when_the_stage_has_nothing_left_to_do(tmp_path: Path) -> None:
    async with bench(tmp_path, Stage(gather_ms=LONG_MS), passes_in_flight=3) as one:
        await one.ask("anna", "a", 1)
        await one.ask("bela", "b", 1)
        await one.stage.answer("a/0")
        assert order(one.stage) == "ab"
        assert one.dispatched == ["idle", "idle"]


@alone
async def test_idle_workers_of_a_cpu_share_a_request(tmp_path: Path) -> None:
    async with bench(tmp_path, Stage(devices=2)) as one:
        task = await one.ask("anna", "a", 3)
        assert [(p.start, p.stop) for p, _ in one.stage.inside.values()] == [(0, 2), (2, 3)]
        await one.stage.work_off()
        assert [row.object_id for row in (await task).rows] == [0, 1, 2]


@alone
async def test_a_request_stays_in_one_piece_where_only_one_worker_is_idle(tmp_path: Path) -> None:
    async with bench(tmp_path, Stage(devices=2)) as one:
        await one.ask("anna", "a", 1)
        await one.ask("bela", "b", 3)
        assert one.stage.sent == ["a/0", "b/0"]


@alone
async def test_gpus_do_not_share_a_request_that_fits_into_a_pass(tmp_path: Path) -> None:
    stage = Stage(devices=2)
    stage.stages = msgspec.structs.replace(stage.stages, devices=("cuda:0", "cuda:1"))
    async with bench(tmp_path, stage) as one:
        await one.ask("anna", "a", 3)
        assert one.stage.sent == ["a/0"]


# ------------------------------------------------------------------------------------------------------- whose turn


@alone
async def test_clients_take_turns_however_much_each_has_sent(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        for index in range(4):
            await one.ask("anna", f"a{index}")
        await one.ask("bert", "b0")
        await one.ask("bert", "b1")
        await one.ask("carl", "c0", 2 * PASS)
        await one.stage.work_off()
    assert order(one.stage)[:6] in ("abcabc", "abcbca", "abcacb"), order(one.stage)
    assert sorted(order(one.stage)) == list("aaaabbcc")


@alone
async def test_turns_are_counted_in_detections_and_not_in_requests(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        await one.ask("filler", "x0")
        for index in range(4):
            await one.ask("anna", f"a{index}", 4)
        for index in range(8):
            await one.ask("bert", f"b{index}", 2)
        await one.stage.work_off()
    counts = [("a", 4), ("b", 2)]
    half = order(one.stage)[1:7]
    served = {letter: half.count(letter) * size for letter, size in counts}
    assert abs(served["a"] - served["b"]) <= 4, order(one.stage)


@alone
async def test_a_client_that_was_idle_does_not_win_all_turns_when_it_comes_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        await one.ask("bert", "b0")
        await one.stage.work_off()
        for index in range(10):
            await one.ask("anna", f"a{index}")
        for _ in range(6):
            await one.stage.answer(next(iter(one.stage.inside)))
        before = len(one.stage.sent)
        for index in range(1, 5):
            await one.ask("bert", f"b{index}")
        await one.stage.work_off()
    after = order(one.stage)[before:]
    assert after[:2] in ("ba", "ab")
    assert "bbb" not in after[:6], after
    assert "b" in after[:2], "it does not wait for all of the other's either"


@alone
async def test_a_new_client_starts_where_the_others_are(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        for index in range(12):
            await one.ask("anna", f"a{index}")
        for _ in range(6):
            await one.stage.answer(next(iter(one.stage.inside)))
        before = len(one.stage.sent)
        for index in range(5):
            await one.ask("new", f"n{index}")
        await one.stage.work_off()
    after = order(one.stage)[before:]
    assert "n" in after[:2], "at once,"
    assert "nnn" not in after[:8], f"but not for as long as the other was served: {after}"


@alone
async def test_within_a_client_the_least_left_goes_first(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        await one.ask("anna", "filler")
        await one.ask("anna", "big", 3 * PASS)
        await one.ask("anna", "middle", 2 * PASS)
        await one.ask("anna", "small", 1)
        await one.stage.work_off()
    assert one.stage.sent == ["filler/0", "small/0", "middle/0", "middle/1", "big/0", "big/1", "big/2"]


@alone
async def test_a_request_past_half_its_deadline_gets_every_second_turn(tmp_path: Path, clock: Clock) -> None:
    async with bench(tmp_path) as one:
        await one.ask("anna", "filler")
        await one.ask("anna", "big", 3 * PASS, deadline_s=100)
        for index in range(4):
            await one.ask("anna", f"small{index}", PASS - 1)
        clock.ahead_s += 51
        await one.stage.work_off()
    late = ["big/0", "small0/0", "big/1", "small1/0", "big/2", "small2/0", "small3/0"]
    assert one.stage.sent == ["filler/0", *late]


@alone
async def test_a_starving_request_takes_turns_of_its_own_client_only(tmp_path: Path, clock: Clock) -> None:
    async with bench(tmp_path) as one:
        await one.ask("anna", "filler")
        await one.ask("anna", "a-late", 3 * PASS, deadline_s=100)
        for index in range(3):
            await one.ask("bert", f"b{index}")
        clock.ahead_s += 51
        await one.stage.work_off()
    assert order(one.stage).removeprefix("f") in ("bababa", "ababab")


# ---------------------------------------------------------------------------------------------- parts and the window


@alone
async def test_a_split_request_comes_back_whole_and_in_order(tmp_path: Path, clock: Clock) -> None:
    async with bench(tmp_path, passes_in_flight=4) as one:
        begun_unix = time.time()
        task = await one.ask("anna", "a", 2 * PASS + 3, large=True)
        assert len(one.spooled()) == 1
        assert [(p.start, p.stop, p.finish) for p, _ in one.stage.inside.values()] == [
            (0, 4, False),
            (4, 8, False),
            (8, 11, False),
        ]
        clock.ahead_s += 1.0  # so that there is time in which all of this can have been
        await one.stage.answer(
            "a/2", warnings=["w"], pose_ms=200.0, pose_unix=begun_unix + 0.3, respond_ms=20.0, batch_detections=3
        )
        await one.stage.answer(
            "a/0", warnings=["v", "w"], pose_ms=200.0, pose_unix=begun_unix + 0.2, decode_ms=50.0, batch_detections=8
        )
        await one.stage.answer("a/1", pose_ms=100.0, pose_unix=begun_unix + 0.7)
        solution = await task
        assert len(one.parts) == 3
    assert [row.object_id for row in solution.rows] == list(range(11))
    assert solution.warnings == ["v", "w"]
    assert solution.batch_detections == 8
    assert solution.receipt.pose_ms == pytest.approx(400)  # two of the parts ran side by side for 100 ms
    assert solution.visualization is None
    assert one.stage.finished == []


@alone
async def test_an_overlay_over_several_parts_is_made_once_from_all_rows(tmp_path: Path) -> None:
    async with bench(tmp_path, passes_in_flight=2) as one:
        task = await one.ask("anna", "a", PASS + 1, visualize=True, large=True)
        await one.stage.work_off()
        solution = await task
    (message,) = one.stage.finished
    assert [row.object_id for row in message.rows] == list(range(PASS + 1))
    assert (solution.visualization, solution.output_written) == (b"png", True)
    assert solution.receipt.respond_ms > 0, "drawing it is on the receipt"


@alone
async def test_a_request_without_detections_passes_through_too(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        task = await one.ask("anna", "a", 0)
        assert one.stage.sent == ["a/0"]
        await one.stage.work_off()
        assert (await task).rows == []


@pytest.mark.parametrize(("passes", "devices"), [(1, 1), (2, 1), (2, 3)])
@alone
async def test_the_window_is_filled_and_never_passed(tmp_path: Path, passes: int, devices: int) -> None:
    async with bench(tmp_path, Stage(devices), passes_in_flight=passes) as one:
        for index in range(40):
            await one.ask(f"client{index % 5}", f"r{index}", 1 + index % 7)
        await one.stage.work_off()
    window = passes * devices * PASS
    assert window - PASS < one.stage.most_inside <= window


@alone
async def test_nothing_is_sent_to_a_stage_that_is_away_and_everything_when_it_is_back(tmp_path: Path) -> None:
    async with bench(tmp_path, passes_in_flight=4) as one:
        one.stage.is_ready = False
        tasks = [await one.ask(f"client{index}", f"r{index}", 2) for index in range(6)]
        assert one.stage.sent == []
        assert one.queue.waiting == 12
        one.stage.is_ready = True
        one.queue.wake()
        await settled()
        await one.stage.work_off()
        assert [len((await task).rows) for task in tasks] == [2] * 6


@alone
async def test_a_stage_that_stays_away_is_given_up(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        one.stage.is_ready, one.stage.down_s = False, 61.0
        task = await one.ask("anna", "a")
        order_keeper = asyncio.create_task(one.queue.keep_order())
        assert await code(task) == "not_ready"
        order_keeper.cancel()
        await asyncio.gather(order_keeper, return_exceptions=True)


# --------------------------------------------------------------------------------------------------------- admission


def refused(one: Bench, client: str, count: int, deadline_s: float) -> ApiError:
    """Return why a request would not be admitted."""
    with pytest.raises(ApiError) as raised:
        one.queue.admit(client, count, deadline_s, "geometric", UNIT)
    return raised.value


@alone
async def test_little_work_is_let_in_beside_a_flood_with_long_deadlines(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        one.stage.info = {"detections_per_second": {"geometric": 10.0}}
        for index in range(6):
            await one.ask("flood", f"f{index}", 40)
        assert one.queue.cost == 240
        one.queue.admit("other", 1, 2.0, "geometric", UNIT)  # 4 inside and one turn of the flood: half a second
        one.queue.admit("flood", 1, 2.0, "geometric", UNIT)  # goes before its own client's larger ones
        assert refused(one, "flood", 40, 20.0).code == "over_capacity", "there are 236 like it before it"
        one.queue.admit("flood", 10, 300.0, "geometric", UNIT)
        task = await one.ask("other", "o", 1)
        await one.stage.answer("f0/0")
        assert "o/0" in one.stage.inside, "as promised"
        await one.stage.work_off()
        assert len((await task).rows) == 1


@alone
async def test_what_was_promised_at_the_door_is_kept_among_many_clients(tmp_path: Path) -> None:
    async with bench(tmp_path, ceiling_detections=100_000) as one:
        one.stage.info = {"detections_per_second": {"geometric": 10.0}}
        for index in range(5):
            await one.ask(f"client{index}", f"r{index}", 40)
        ahead = sum(one.queue._ahead("new", 8).values())
        task = await one.ask("new", "n", 8)
        before = len(one.stage.sent) - len(one.stage.inside)
        while not task.done():
            await one.stage.answer(next(iter(one.stage.inside)))
        worked = sum(PASS for name in one.stage.sent[before : one.stage.sent.index("n/1")])
        assert worked - PASS <= ahead + len(one.queue._waiting) * PASS
        assert ahead <= 5 * 12 + PASS


@alone
async def test_whoever_had_the_last_turn_reckons_with_the_turn_that_others_are_owed(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        await one.ask("anna", "a", 44)
        await one.ask("bert", "b", 36)
        await one.stage.answer("a/0")
        assert "b/0" in one.stage.inside
        assert sum(one.queue._ahead("bert", 1).values()) == PASS + 1 + PASS, "anna's next turn comes first"
        assert sum(one.queue._ahead("anna", 1).values()) == PASS + 1


@alone
async def test_the_ceiling_stops_who_floods_and_lets_others_in_up_to_their_share(tmp_path: Path) -> None:
    async with bench(tmp_path, ceiling_detections=40) as one:
        await one.ask("flood", "f", 44)
        assert one.queue.waiting == 40
        error = refused(one, "flood", 1, 900.0)
        assert error.code == "over_capacity"
        assert error.retry_after_s == pytest.approx(1 / one.queue.per_second("geometric"))
        one.queue.admit("other", 20, 900.0, "geometric", UNIT)
        assert refused(one, "other", 21, 900.0).code == "over_capacity"
        await one.ask("other", "o", 20)
        assert refused(one, "other", 1, 900.0).code == "over_capacity"
        assert refused(one, "third", 14, 900.0).code == "over_capacity"
        one.queue.admit("third", 13, 900.0, "geometric", UNIT)
        one.queue.fail_all(ApiError("draining", "over"))
        one.queue.admit("flood", 1000, 900.0, "geometric", UNIT)  # whoever finds the queue empty is let in


@alone
async def test_429_says_when_to_come_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        one.stage.info = {"detections_per_second": {"geometric": 10.0}}
        assert one.queue.per_second("geometric") == pytest.approx(10.0)
        await one.ask("anna", "a", 100)
        error = refused(one, "anna", 100, 15.0)
        assert error.code == "over_capacity"
        assert error.retry_after_s == pytest.approx(10 + 10 - 12)  # 100 ahead, 100 of its own, a fifth of 15 s to spare
        one.queue.admit("anna", 100, 25.5, "geometric", UNIT)


@alone
async def test_a_request_is_reckoned_as_its_detections_fall_to_the_workers(tmp_path: Path) -> None:
    async with bench(tmp_path, Stage(devices=4)) as one:
        one.stage.info = {"detections_per_second": {"geometric": 10.0}}  # of each worker
        assert [one.queue._alone_s(count, "geometric") for count in (0, 1, 4, 5)] == pytest.approx([0, 0.1, 0.1, 0.2])
    gpus = Stage(devices=2)
    gpus.stages = msgspec.structs.replace(gpus.stages, devices=("cuda:0", "cuda:1"))
    async with bench(tmp_path, gpus) as one:
        one.stage.info = {"detections_per_second": {"geometric": 10.0}}
        found = [one.queue._alone_s(count, "geometric") for count in (1, PASS, 2 * PASS)]
        assert found == pytest.approx([0.1, 0.1 * PASS, 0.1 * PASS])


@alone
async def test_a_part_that_was_alone_in_its_worker_is_sent_again_beside_the_others(tmp_path: Path) -> None:
    stage = Stage(devices=2)
    stage.stages = msgspec.structs.replace(
        stage.stages, pose=msgspec.structs.replace(stage.stages.pose, batch_requests=1)
    )
    async with bench(tmp_path, stage) as one:
        for name in "ab":
            await one.ask(name, name, 1)
        await one.stage.fail("a/0", Interrupted(held=True))
        await settled()
        assert one.stage.sent == ["a/0", "b/0", "a/0"]  # b is not waited for
        for _ in range(2):
            await one.stage.fail("a/0", Interrupted(held=True))
        assert await code(one.tasks[0]) == "worker_lost"


@alone
async def test_a_dead_worker_is_not_reckoned_with_until_it_is_back(tmp_path: Path) -> None:
    stage = Stage(devices=2)
    async with bench(tmp_path, stage, passes_in_flight=1) as one:
        stage.info = {"detections_per_second": {"geometric": 10.0}}
        assert one.queue.per_second("geometric") == 20.0
        stage.ready_workers = 1
        assert one.queue.per_second("geometric") == 10.0
        await one.ask("anna", "a", 4 * PASS)
        assert one.stage.sent == ["a/0"]  # the one that is left takes no more at a time
        error = refused(one, "ben", 4 * PASS, 1.0)
        stage.ready_workers = 0  # none: something will come back
        assert refused(one, "ben", 4 * PASS, 1.0).retry_after_s == error.retry_after_s
        stage.ready_workers = 2
        one.queue.wake()
        await settled()
        assert one.stage.sent == ["a/0", "a/1"]


@alone
async def test_each_engine_is_reckoned_at_its_own_speed(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        one.stage.info = {"detections_per_second": {"geometric": 10.0, "sam6d": 1.0}}
        await one.ask("anna", "a", 12, engine="sam6d")
        error = refused(one, "ben", 4, 8.0)  # 4 of hers inside and one turn: 8 s
        assert error.retry_after_s == pytest.approx(8 + 0.4 - 6.4)
        one.queue.admit("ben", 4, 10.6, "geometric", UNIT)
        with pytest.raises(ApiError, match=r"about 8\.0 s"):
            one.queue.admit("ben", 4, 8.5, "sam6d", UNIT)
        await one.stage.answer("a/0", seconds=16.0)
        assert one.queue.per_second("sam6d") < 0.5
        assert one.queue.per_second("geometric") == pytest.approx(10.0)


@alone
async def test_one_part_that_another_engine_answered_is_enough_to_say_so(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        task = await one.ask("anna", "a", 2 * PASS, engine="sam6d")
        await one.stage.answer("a/0", engine="sam6d")
        await one.stage.answer("a/1", engine="geometric")
        assert (await task).engine == "geometric"
        task = await one.ask("anna", "b", engine="sam6d")
        await one.stage.answer("b/0", engine="sam6d")
        assert (await task).engine == "sam6d"


@alone
async def test_a_deadline_is_called_too_short_only_by_what_was_measured_lately(tmp_path: Path, clock: Clock) -> None:
    async with bench(tmp_path) as one:
        one.stage.info = {"detections_per_second": {"geometric": 10.0}}  # the worker's own estimate is not enough
        one.queue.admit("anna", 1000, 1.0, "geometric", UNIT)
        for index in range(3):
            one.queue.admit("anna", 1000, 1.0, "geometric", UNIT)
            await one.ask("anna", f"a{index}")
            await one.stage.answer(f"a{index}/0", seconds=1.0)
        error = refused(one, "anna", 1000, 1.0)
        assert (error.code, error.field, error.retry_after_s) == ("deadline_too_short", "deadline_ms", None)
        one.queue.admit("anna", 8, 1.1, "geometric", UNIT)  # 2 s as measured: not surely impossible
        clock.ahead_s += 61
        one.queue.admit("anna", 1000, 1.0, "geometric", UNIT)  # or it would never be measured again
        assert refused(one, "anna", 1, 0.005).code == "deadline_too_short", "whatever is measured"


@alone
async def test_recent_passes_count_more_in_the_measured_rate(tmp_path: Path) -> None:
    async with bench(tmp_path, Stage(2)) as one:
        for index, seconds in enumerate([4.0] * 5 + [0.5] * 40):
            await one.ask("anna", f"a{index}")
            await one.stage.answer(f"a{index}/0", seconds=seconds)
        assert one.queue.per_second("geometric") == pytest.approx(2 * PASS / 0.5, rel=0.1), "both devices together"


# -------------------------------------------------------------------------------------------------- workers that died


@alone
async def test_a_part_whose_worker_died_with_it_is_sent_again_alone_and_others_wait(tmp_path: Path) -> None:
    async with bench(tmp_path, passes_in_flight=2) as one:
        a = await one.ask("anna", "a", large=True)
        b = await one.ask("bert", "b")
        c = await one.ask("carl", "c", 1)
        assert one.stage.sent == ["a/0", "b/0"]
        await one.stage.fail("a/0", Interrupted(held=True))
        assert list(one.stage.inside) == ["b/0"], "it waits for those inside, and nobody else goes in"
        await one.stage.answer("b/0")
        assert list(one.stage.inside) == ["a/0"], "alone"
        d = await one.ask("dora", "d", 1)
        assert list(one.stage.inside) == ["a/0"], "still"
        await one.stage.answer("a/0")
        assert set(one.stage.inside) == {"c/0", "d/0"}
        await one.stage.work_off()
        assert [len((await task).rows) for task in (a, b, c, d)] == [4, 4, 1, 1]


@alone
async def test_a_part_that_takes_its_worker_down_each_time_is_given_up(tmp_path: Path) -> None:
    async with bench(tmp_path, retries=2) as one:
        poison = await one.ask("anna", "poison", large=True)
        good = await one.ask("anna", "good")
        for _ in range(3):
            assert list(one.stage.inside) == ["poison/0"]
            await one.stage.fail("poison/0", Interrupted(held=True))
        assert await code(poison) == "worker_lost"
        await one.stage.work_off()
        assert len((await good).rows) == PASS
    assert one.stage.sent == ["poison/0"] * 3 + ["good/0"]


@alone
async def test_a_part_that_was_only_on_its_way_goes_back_in_line_and_that_does_not_count(tmp_path: Path) -> None:
    async with bench(tmp_path, passes_in_flight=2, retries=1) as one:
        a = await one.ask("anna", "a")
        b = await one.ask("bert", "b")
        for _ in range(6):
            await one.stage.fail("a/0", Interrupted(held=False))
            assert set(one.stage.inside) == {"a/0", "b/0"}, "beside others"
        await one.stage.work_off()
        assert [len((await task).rows) for task in (a, b)] == [PASS, PASS]


@alone
async def test_one_lost_part_of_several_is_put_back_in_its_place(tmp_path: Path) -> None:
    async with bench(tmp_path, passes_in_flight=3) as one:
        a = await one.ask("anna", "a", 3 * PASS, large=True)
        await one.stage.answer("a/2")
        await one.stage.fail("a/0", Interrupted(held=True))
        await one.stage.fail("a/1", Interrupted(held=True))
        assert list(one.stage.inside) == ["a/0"], "each of them alone"
        await one.stage.answer("a/0")
        assert list(one.stage.inside) == ["a/1"]
        await one.stage.answer("a/1")
        assert [row.object_id for row in (await a).rows] == list(range(3 * PASS))


@alone
async def test_a_call_that_is_never_answered_does_not_hold_the_window_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.scheduling.queue._SLACK_S", 0.5)
    async with bench(tmp_path, Stage(max_seconds=1.0)) as one:
        lost = await one.ask("anna", "lost", deadline_s=0.5, large=True)
        task = await one.ask("bert", "next")
        assert await code(lost) == "deadline"
        assert list(one.stage.inside) == ["lost/0"]
        while "next/0" not in one.stage.inside:
            await asyncio.sleep(0.01)
        await one.stage.work_off()
        assert len((await task).rows) == PASS


# ----------------------------------------------------------------------------------------- requests that end otherwise


@alone
async def test_expired_requests_are_failed_and_never_sent(tmp_path: Path, clock: Clock) -> None:
    async with bench(tmp_path) as one:
        await one.ask("anna", "first")
        expired = await one.ask("anna", "expired", deadline_s=50, large=True)
        patient = await one.ask("anna", "patient", 2 * PASS)
        clock.ahead_s += 51
        await one.stage.answer("first/0")
        assert await code(expired) == "deadline"
        assert one.spooled() == []
        await one.stage.work_off()
        assert len((await patient).rows) == 2 * PASS
    assert "expired/0" not in one.stage.sent


@alone
async def test_a_deadline_that_passes_while_parts_are_inside_ends_the_request(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        task = await one.ask("anna", "a", 3 * PASS, deadline_s=1.0, large=True)
        assert await code(task) == "deadline"
        assert len(one.spooled()) == 1, "a worker may still be reading it"
        assert one.queue.requests == 0
        assert one.queue.cost == PASS
        await one.stage.work_off()
        assert one.spooled() == []
    assert one.stage.sent == ["a/0"]


@alone
async def test_a_cancelled_requests_unsent_parts_are_dropped(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        gone = await one.ask("anna", "gone", 5 * PASS, large=True)
        waiting = await one.ask("anna", "waiting", 6 * PASS, large=True)
        stays = await one.ask("bert", "stays")
        for task in (gone, waiting):
            task.cancel()
        await settled()
        assert one.queue.waiting == PASS
        await one.stage.work_off()
        assert len((await stays).rows) == PASS
    assert one.stage.sent == ["gone/0", "stays/0"]


@alone
async def test_a_client_that_goes_while_its_part_waits_to_be_sent_again_holds_nobody_up(tmp_path: Path) -> None:
    async with bench(tmp_path, passes_in_flight=2) as one:
        gone = await one.ask("anna", "gone", large=True)
        b = await one.ask("bert", "b")
        c = await one.ask("carl", "c", 1)
        await one.stage.fail("gone/0", Interrupted(held=True))
        gone.cancel()
        await settled()
        assert set(one.stage.inside) == {"b/0", "c/0"}
        await one.stage.work_off()
        assert [len((await task).rows) for task in (b, c)] == [PASS, 1]
    assert one.stage.sent == ["gone/0", "b/0", "c/0"]


@alone
async def test_a_failure_of_one_part_fails_the_request_and_nobody_else(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        bad = await one.ask("anna", "bad", 3 * PASS, large=True)
        good = await one.ask("bert", "good")
        await one.stage.fail("bad/0", Failure(part_id="bad/0", code="bad_data", detail="no picture", field="rgb_image"))
        with pytest.raises(ApiError, match="no picture") as raised:
            await bad
        assert (raised.value.code, raised.value.field) == ("bad_data", "rgb_image")
        await one.stage.work_off()
        assert len((await good).rows) == PASS
    assert one.stage.sent == ["bad/0", "good/0"]


@pytest.mark.parametrize("error", [Refused("/pose answered 500"), msgspec.DecodeError("cut"), RuntimeError("a bug")])
@alone
async def test_what_should_not_happen_is_an_internal_error_and_the_next_is_answered(
    tmp_path: Path, error: Exception
) -> None:
    async with bench(tmp_path) as one:
        bad = await one.ask("anna", "bad", large=True)
        good = await one.ask("anna", "good")
        await one.stage.fail("bad/0", error)
        assert await code(bad) == "internal"
        await one.stage.work_off()
        assert len((await good).rows) == PASS


@alone
async def test_at_the_end_everything_is_answered_at_once(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        tasks = [await one.ask(f"client{index}", f"r{index}", 2 * PASS, large=True) for index in range(3)]
        one.queue.fail_all(ApiError("draining", "the server is shutting down"))
        assert [await code(task) for task in tasks] == ["draining"] * 3
        assert one.queue.waiting == 0


# --------------------------------------------------------------------------------------------------------- many at once


@alone
async def test_ever_new_clients_do_not_keep_one_that_waits_from_its_turns(tmp_path: Path) -> None:
    async with bench(tmp_path) as one:
        patient = await one.ask("patient", "p", 2000)
        for index in range(1500):
            if len(one.queue._waiting) < 3:  # so that the next one waits before the last is served
                await one.ask(f"client{index}", f"c{index}", 1)
            await one.stage.answer(next(iter(one.stage.inside)))
        assert len(one.queue._served) <= 1026, "who has gone is forgotten"
        shared = order(one.stage)
        await one.stage.work_off()
        assert len((await patient).rows) == 2000
    worked = PASS * shared.count("p"), shared.count("c")
    assert 0.3 < worked[0] / sum(worked) < 0.5, "one of two or three clients"


@alone
async def test_more_than_a_thousand_clients_at_once_are_all_served(tmp_path: Path) -> None:
    async with bench(tmp_path, Stage(), passes_in_flight=400) as one:
        one.stage.is_ready = False
        tasks = [asyncio.create_task(_small(one, f"client{index}")) for index in range(1100)]
        await settled()
        assert one.queue.requests == 1100
        one.stage.is_ready = True
        one.queue.wake()
        await settled()
        assert len(one.stage.inside) == 1100
        await one.stage.work_off()
        assert sum([len(await task) for task in tasks]) == 1100


async def _small(one: Bench, client: str) -> list[Row]:
    task = await one.ask(client, client, 1)
    return (await task).rows


@pytest.mark.parametrize("seed", range(4))
@alone
async def test_whatever_happens_in_whatever_order_nothing_is_lost_and_nothing_stays(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    async with bench(tmp_path, Stage(2), passes_in_flight=2, retries=2) as one:
        asked: list[tuple[asyncio.Task[Solution], int]] = []
        for index in range(150):
            count = chance.randrange(0, 14)
            task = await one.ask(f"client{chance.randrange(5)}", f"r{index}", count, large=chance.random() < 0.1)
            asked.append((task, count))
            for _ in range(chance.randrange(3)):
                await _something(one, chance)
        while one.stage.inside:
            await _something(one, chance)
        for task, count in asked:
            assert task.done(), "a request hangs"
            if task.cancelled():
                continue
            if isinstance(error := task.exception(), ApiError):
                assert error.code in ("worker_lost", "units")
            else:
                assert [row.object_id for row in task.result().rows] == list(range(count))
        assert one.stage.most_inside <= 2 * 2 * PASS
        good = sum(not task.cancelled() and task.exception() is None for task, _ in asked)
        assert good > 60


async def _something(one: Bench, chance: random.Random) -> None:
    """End one part in some way, or let one client leave."""
    if chance.random() < 0.05:
        chance.choice(one.tasks).cancel()
        await settled()
    if not one.stage.inside:
        return
    part_id = chance.choice(list(one.stage.inside))
    what = chance.random()
    if what < 0.08:
        await one.stage.fail(part_id, Interrupted(held=True))
    elif what < 0.16:
        await one.stage.fail(part_id, Interrupted(held=False))
    elif what < 0.2:
        await one.stage.fail(part_id, Failure(part_id=part_id, code="units", detail="odd"))
    else:
        await one.stage.answer(part_id, seconds=0.1)


@alone
async def test_what_a_dead_worker_left_beside_a_request_goes_with_it(tmp_path: Path) -> None:
    async with bench(tmp_path, passes_in_flight=2) as one:
        await one.ask("anna", "a", large=True)
        await one.ask("bela", "b", large=True)
        for name in one.spooled():
            (one.run_dir.jobs / f"{name}{BESIDE}1").write_bytes(b"crops")
        await one.stage.answer("a/0")
        assert [name[0] for name in one.spooled()] == ["b", "b"]
        await one.stage.answer("b/0")
