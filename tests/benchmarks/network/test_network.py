"""The network benchmark: settings are timed stage by stage, and the figures add up."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from benchmarks.network import generated_weights
from benchmarks.network import run as network
from benchmarks.network.parity import Golden
from benchmarks.network.run import (
    GOLDEN,
    METHODS,
    REST,
    Measured,
    Pass,
    Seen,
    Setting,
    Stages,
    Timed,
    apart,
    measure,
    table_of,
    verdict,
)
from posekit.sam6d.network.whole import Network, Poses
from posekit.sam6d.quick.cpu import FastNetwork


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Prepared:
    """The file of reference numbers, and the inputs that the networks need to run on it."""

    def __init__(self) -> None:
        self.golden = Golden(GOLDEN)
        self.network = Network()
        self.network.load_state_dict(generated_weights.state_dict())
        with torch.inference_mode():
            self.seen: Seen = network.golden_instances(self.network)
        self.both = Pass(torch.arange(2), self.golden.tensor("e2e_u"))


@pytest.fixture(scope="module")
def prepared(one_thread: None) -> Prepared:
    if not (GOLDEN.is_file() and generated_weights.available()):
        pytest.skip(f"{GOLDEN} is not there")
    return Prepared()


@pytest.mark.slow
def test_both_settings_find_the_originals_poses_and_all_their_stages_are_timed(prepared: Prepared) -> None:
    golden, found = prepared.golden, {}
    for name, made in (("fast", FastNetwork.of(prepared.network)), ("exact", prepared.network)):
        with torch.inference_mode():
            found[name] = Setting(made, prepared.seen, threads=2).run(prepared.both, stages := Stages())
        assert set(stages.cpu_s) == {*METHODS.values(), REST}
    R, t_m, score = found["exact"]
    assert golden.error("e2e_pred_R", R) < 1e-4
    assert golden.error("e2e_pred_t", t_m) < 1e-5
    assert golden.error("e2e_score", score) < 2 / 2048
    degrees, mm = apart(found["fast"], found["exact"])
    assert degrees < 0.1
    assert mm < 0.1


@pytest.mark.slow
def test_without_the_reference_numbers_synthetic_instances_have_the_same_sizes(prepared: Prepared) -> None:
    made = network.synthetic_instances(prepared.network)
    assert [(one.shape, one.dtype) for one in made] == [(one.shape, one.dtype) for one in prepared.seen]
    assert made.points.isfinite().all()


def test_a_stage_inside_another_has_its_seconds_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    stages = Stages()
    with stages("outer"), stages("inner"):
        pass
    with stages("inner"):
        pass
    assert stages.wall_s == {"outer": 1.0 + 4.0, "inner": 2.0 + 1.0}


def test_what_ran_beside_another_is_moved_out_of_the_stage_it_ran_in(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 11.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    inner, stages = Stages(), Stages()
    inner.wall_s, inner.cpu_s = {"a": 4.0, "b": 6.0}, {"a": 4.0, "b": 6.0}
    with stages(REST):
        stages.move(inner, 1 / 2)
    assert stages.wall_s == {REST: 11.0 - 5.0, "a": 2.0, "b": 3.0}
    assert stages.cpu_s["b"] == 6.0


def test_instances_of_a_batch_take_turns_and_have_their_own_draws() -> None:
    one = Pass.of(4, different=2)
    assert one.which.tolist() == [0, 1, 0, 1]
    assert len(one.uniforms.unique(dim=0)) == 4


def timed(batch: int, *runs: dict[str, float]) -> Timed:
    made = Timed(batch)
    for run in runs:
        stages = Stages()
        stages.cpu_s, stages.wall_s = run, {name: seconds / 2 for name, seconds in run.items()}
        made.runs.append(stages)
    return made


def test_the_table_has_medians_an_instance_and_ratios_of_cpu_seconds() -> None:
    exact = timed(2, {"a": 8.0, "b": 4.0}, {"a": 6.0, "b": 4.0}, {"a": 9.0, "b": 4.0})
    fast = timed(2, {"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 4.0, "b": 1.0})
    rows = table_of({"exact": exact, "fast": fast}).rows
    assert rows == [
        ("a", 4.0, 2.0, 1.0, 0.5, 4.0),
        ("b", 2.0, 1.0, 0.5, 0.25, 4.0),
        ("all", 6.0, 3.0, 1.5, 0.75, 4.0),
        ("all, at best", 5.0, 2.5, 1.0, 0.5, 5.0),
    ]
    came_to = verdict({"exact": exact, "fast": fast}, threads=2)
    assert came_to["ratio_cpu"] == came_to["ratio_wall"] == 4.0
    assert (came_to["exact_cpu_s"], came_to["fast_cpu_s"]) == (12.0, 3.0)


def test_settings_take_turns_and_their_poses_are_compared() -> None:
    order = []

    def setting(name: str, x_m: float) -> network.Run:
        def run(one: Pass, stages: Stages) -> Poses:
            order.append(name)
            with stages("all of it"):
                return Poses(torch.eye(3)[None], torch.tensor([[x_m, 0.0, 0.0]]), torch.ones(1))

        return run

    found: Measured = measure({"exact": setting("exact", 0.5), "fast": setting("fast", 0.501)}, Pass.of(1, 2), 2)
    assert order == ["exact", "fast", "exact", "fast"]
    assert found.difference == pytest.approx((0.0, 1.0), abs=1e-3)
    assert len(found.timed["fast"].runs) == 2
