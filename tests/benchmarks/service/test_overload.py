"""The overload benchmark: its definition of failure, and a short run against a running server."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest

from benchmarks.service import checks, memory
from benchmarks.service.overload import Lone, Measured, judged, measure
from pem.bench.mix import Load
from pem.bench.sample import Question as Asked
from pem.bench.sample import Run, Sample, Target, Truth
from pem.wire import MSGPACK
from tests.running import Question, RunningServer

DEADLINE_MS = 5000


def sample(due: float, **changes: Any) -> Sample:
    """Make a request that was answered in 4 s, unless `changes` say otherwise."""
    fields = {"question": "", "client": 0, "due": due, "sent": due, "done": due + 4.0, "status": 200, "poses": 3}
    return Sample(**(fields | changes))


def refused(due: float, **changes: Any) -> Sample:
    """Make a request that was refused after 10 ms."""
    return sample(due, **({"status": 429, "done": due + 0.01, "retry_after_s": 3.0, "poses": 0} | changes))


def readings(**late: float) -> list[memory.Reading]:
    """Make readings of two processes that go from 100 MB each to the `late` megabytes."""
    ends = {"gateway": 100.0, "pose": 100.0} | late
    return [
        memory.Reading(
            when=float(second),
            resident_mb={(name, pid): 100.0 + (ends[name] - 100.0) * second / 60 for pid, name in enumerate(ends)},
        )
        for second in range(61)
    ]


def good() -> Measured:
    """Make a run in which a server of 10 requests/s, offered 30 for a minute, meets all demands."""
    quick = [sample(at / 10, done=at / 10 + 0.01) for at in range(200)]
    capacity = Run(mode="closed", clients=16, rate_hz=None, begun=0.0, ended=20.0, samples=quick)
    samples = [sample(at / 30) if at % 3 == 0 else refused(at / 30) for at in range(1800)]
    overload = Run(
        mode="open",
        clients=50,
        rate_hz=30.0,
        begun=0.0,
        ended=60.0,
        samples=samples,
        carried=[sample(-4.0 + at / 10) for at in range(40)],
        load_generator_cpu_s=6.0,
    )
    return Measured(
        usual=[Lone(sent=0.0, done=0.1, status=200)] * 3,
        capacity=[capacity, capacity],
        overload=overload,
        lone=[
            Lone(sent=30.0, done=30.5, status=200),
            Lone(sent=60.1, done=60.6, status=200),
            Lone(sent=64.5, done=64.6, status=200),
        ],
        readings=readings(),
    )


def failures(measured: Measured) -> list[str]:
    return [check.what for check in judged(measured, times=3.0, deadline_ms=DEADLINE_MS) if not check.holds]


def figures(measured: Measured) -> dict[str, float]:
    return {check.what: check.found for check in judged(measured, times=3.0, deadline_ms=DEADLINE_MS)}


def with_samples(measured: Measured, *changed: Sample) -> Measured:
    """Replace the first requests of the overload."""
    samples = [*changed, *measured.overload.samples[len(changed) :]]
    return dataclasses.replace(measured, overload=dataclasses.replace(measured.overload, samples=samples))


def test_a_server_that_does_all_that_is_wanted_passes() -> None:
    assert failures(good()) == []
    found = figures(good())
    assert found["capacity before, requests/s"] == pytest.approx(10.0, rel=0.01)
    assert found["capacity after, requests/s"] == pytest.approx(10.0, rel=0.01)
    assert found["answered, requests/s"] == pytest.approx(10.0 + 1 / 60, rel=0.01)  # and the lone client's
    assert found["p99 of the answered, ms"] == pytest.approx(4000.0)
    assert found["p99 to a refusal, ms"] == pytest.approx(10.0)
    assert found["usual again after the load's last request, s"] == pytest.approx(4.6)
    assert found["CPU of this load generator, cores"] == pytest.approx(0.1)


def test_each_fault_is_found_and_no_other_is_named() -> None:
    one = good()
    assert failures(with_samples(one, sample(0.0, status=504))) == ["neither answered nor refused"]
    assert failures(with_samples(one, sample(0.0, wrong=1))) == ["poses that are wrong under load alone"]
    assert failures(with_samples(one, refused(0.0, retry_after_s=None))) == ["refused without Retry-After"]
    assert failures(with_samples(one, refused(0.0, done=0.06))) == []  # one of 1200
    slow = [refused(0.0, done=0.06)] * 30
    assert failures(with_samples(one, *slow)) == ["p99 to a refusal, ms"]
    late = [sample(0.0, done=5.5)] * 30
    assert failures(with_samples(one, *late)) == ["p99 of the answered, ms"]


def test_a_server_that_answers_less_than_it_can_fails() -> None:
    one = good()
    slow = [
        each if not each.ok or number % 4 else refused(each.due) for number, each in enumerate(one.overload.samples)
    ]
    assert "answered, requests/s" in failures(with_samples(one, *slow))


def test_a_load_that_is_none_proves_nothing() -> None:
    one = good()
    idle = dataclasses.replace(one.overload, samples=[each for each in one.overload.samples if each.ok])
    found = failures(dataclasses.replace(one, overload=idle))
    assert found == ["offered, times the capacity", "refused with 429"]


def test_memory_that_grows_by_more_than_a_tenth_fails_and_names_the_process() -> None:
    grown = failures(dataclasses.replace(good(), readings=readings(pose=125.0)))
    assert grown == ["memory of pose (102 MB), growth in %"]
    assert failures(dataclasses.replace(good(), readings=readings(pose=105.0))) == []
    other = failures(dataclasses.replace(good(), readings=readings(tracker=140.0)))
    assert other == ["memory of any other process, growth in %"]


def test_a_server_that_does_not_recover_fails() -> None:
    one = good()
    slow = dataclasses.replace(one, lone=[Lone(sent=60.1, done=63.0, status=200), *one.lone[2:]])
    assert failures(slow) == ["first lone request after the load, s"]
    lost = dataclasses.replace(one, lone=[Lone(sent=60.1, done=60.2, status=0), *one.lone[2:]])
    assert failures(lost) == ["first lone request after the load, s"]
    never = dataclasses.replace(one, lone=one.lone[:2])
    assert failures(never) == [
        "usual again after the load's last answer, s",
        "usual again after the load's last request, s",
    ]


def test_with_a_short_deadline_the_server_must_be_itself_two_seconds_after_the_last_request() -> None:
    what = "usual again after the load's last request, s"

    def judged_at(usual_at: float, deadline_ms: int) -> bool:
        lone = [Lone(sent=60.1, done=60.6, status=200), Lone(sent=usual_at - 0.1, done=usual_at, status=200)]
        seen = dataclasses.replace(good(), lone=lone)
        [check] = [one for one in judged(seen, times=3.0, deadline_ms=deadline_ms) if one.what == what]
        assert check.found == pytest.approx(usual_at - 60.0)
        return check.holds

    assert judged_at(61.9, deadline_ms=2000)
    assert not judged_at(62.1, deadline_ms=2000)
    assert not judged_at(62.1, deadline_ms=1000)  # never less than two seconds, and no more
    assert judged_at(61.9, deadline_ms=1000)
    assert judged_at(64.9, deadline_ms=5000)
    assert not judged_at(65.1, deadline_ms=5000)


@pytest.mark.slow
def test_a_running_server_is_measured_in_all_respects(server: RunningServer, question: Question) -> None:
    truth = question.scene.instances[0]
    asked = Asked(
        name="the demo scene",
        body=msgspec.msgpack.encode(question.body(indices=[0], deadline_ms=1500)),
        content_type=MSGPACK,
        truths=(Truth(object_name="housing", T_cam_obj=truth.T_cam_obj, symmetries=truth.shape.symmetries),),
        headers={"Accept": MSGPACK},
    )
    heard: list[str] = []
    seen = measure(
        Target(url=server.url, pid=server.pid),
        Load(questions=[asked], objects={}),
        times=8.0,  # the capacity found in a second is a guess
        seconds=4.0,
        capacity_seconds=1.0,
        clients=4,
        deadline_ms=1500,
        tell=heard.append,
    )
    found = {check.what: check for check in judged(seen, times=8.0, deadline_ms=1500)}
    for certain in ("refused with 429", "refused without Retry-After", "poses that are wrong under load alone"):
        assert found[certain].holds, checks.table(list(found.values())).as_dicts()
    assert found["answered, requests/s"].found > 0
    assert found["a lone request under load, median ms"].found > 0
    assert found["usual again after the load's last answer, s"].found < 30
    assert {"gateway", "pose", "decode", "respond"} <= {name for name, _ in seen.readings[-1].resident_mb}
    assert len(heard) == 3
