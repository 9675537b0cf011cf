"""The profile of the service: each cost is attributed to a part of this project that can be changed."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.service.profile import by_function, place
from pem.bench.sample import Run, Usage

ENGINE = "thread (0x7F);GeometricEngine.estimate (posekit/geometric/engine.py:95);"


def test_a_compiled_kernel_is_told_by_the_function_that_calls_it() -> None:
    stack = f"{ENGINE}front (posekit/geometric/kernels.py:42);OpOverloadPacket.__call__ (torch/_ops.py:1269)"
    assert place(stack) == ("front (geometric/kernels.py) > compiled", "kernels.py:42")


def test_a_layer_that_everything_calls_is_told_with_its_caller() -> None:
    stack = "MLP.forward (posekit/sam6d/network/vit.py:50);_call_impl (torch/nn/modules/module.py:1);"
    stack += "Linear.forward (posekit/sam6d/quick/cpu.py:58);OpOverloadPacket.__call__ (torch/_ops.py:1269)"
    assert place(stack) == ("MLP.forward (network/vit.py) > Linear.forward (quick/cpu.py)", "vit.py:50")


def test_a_function_of_this_project_is_told_by_itself() -> None:
    assert place(f"{ENGINE}_cost (posekit/geometric/compare.py:243)") == (
        "_cost (geometric/compare.py)",
        "compare.py:243",
    )


def test_what_a_library_does_is_told_with_who_called_it() -> None:
    stack = (
        f"{ENGINE}_solve (posekit/geometric/search.py:7);unique (torch/functional.py:1);_wrap (torch/functional.py:9)"
    )
    assert place(stack) == ("_solve (geometric/search.py) > _wrap (torch/functional.py)", "search.py:7")


def test_what_nothing_of_this_project_called_is_told_as_it_is() -> None:
    assert place("thread (0x7F);_worker (concurrent/futures/thread.py:83)") == (
        "_worker (futures/thread.py)",
        "thread.py:83",
    )
    assert place("[idle]") == ("[idle]", "")


def test_costs_are_shares_of_all_cpu_with_the_line_that_costs_most() -> None:
    cost = "posekit/geometric/compare.py"
    stacks = {
        "pose": Counter(
            {f"{ENGINE}_cost ({cost}:10)": 30, f"{ENGINE}_cost ({cost}:12)": 10, f"{ENGINE}_turn (a.py:1)": 60}
        ),
        "decode": Counter({"_decode (posekit/io/images.py:5)": 7}),
    }
    usage = [
        Usage(pid=pid, name=name, cpu_s=cpu_s, rss_mb=1.0, rss_peak_mb=1.0)
        for pid, (name, cpu_s) in enumerate([("pose", 4.0), ("pose", 4.0), ("decode", 1.0), ("mosec", 1.0)])
    ]
    run = Run(mode="closed", clients=1, rate_hz=None, begun=0.0, ended=10.0, samples=[], usage=usage)
    turn, cost_row, decode = by_function(stacks, run, 10).as_dicts()
    assert turn["function"].endswith("> _turn (a.py)")
    assert (turn["share of all CPU"], turn["share of its stage"]) == (pytest.approx(0.48), pytest.approx(0.6))
    assert (cost_row["function"], cost_row["line"]) == ("_cost (geometric/compare.py)", "compare.py:10 (75%)")
    assert cost_row["share of all CPU"] == pytest.approx(0.32)
    assert (decode["stage"], decode["share of all CPU"]) == ("decode", pytest.approx(0.1))
    assert len(by_function(stacks, run, 2).rows) == 2
