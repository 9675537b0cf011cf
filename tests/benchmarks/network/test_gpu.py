"""The GPU benchmark: counts add up, verdicts are right, and the whole script runs without a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy.run import CLOSING, OPENING
from benchmarks.network import generated_weights
from benchmarks.network import gpu as network_gpu
from benchmarks.network.gpu import Company, Rate, StageTime, Work, arithmetic, closing, parity_table, total
from benchmarks.network.parity import Check
from benchmarks.network.run import GOLDEN, METHODS
from posekit.sam6d.network.config import Config
from posekit.sam6d.network.whole import Model, Poses, Scene


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.backends.cudnn.allow_tf32 = tf32


def test_the_arithmetic_adds_up_to_what_is_known_of_the_original() -> None:
    work = arithmetic(Config())
    assert total(work).original == pytest.approx(85, abs=0.5)
    assert total(work).kept == pytest.approx(58, abs=1)
    assert work["image features"].original == pytest.approx(17.6 + 2.5, abs=0.1)
    assert work["geometry embedding, scene"].original == pytest.approx(10.2, abs=0.05)
    assert work["coarse matching"].original == pytest.approx(16.8, abs=0.1)
    assert work["fine matching"].original == pytest.approx(22.2 + 1.3, abs=0.2)
    assert work["position encoding, scene"].original == pytest.approx(2.2, abs=0.05)


def test_ours_does_less_and_a_table_saves_the_pairs_layers() -> None:
    tabled, layered = total(arithmetic(Config())), total(arithmetic(Config(), tabled=False))
    assert tabled.ours < 0.6 * tabled.kept
    assert layered.ours - tabled.ours == pytest.approx(10.1, abs=0.1)


def test_every_stage_that_does_arithmetic_is_timed() -> None:
    counted = {stage for stage, work in arithmetic(Config()).items() if work.ours}
    assert counted == set(METHODS.values()) - {"furthest-point sampling"}


def test_the_last_paragraph_names_the_slowest_stages_and_the_limits() -> None:
    stages = [StageTime(name, ms / 1000, share) for name, ms, share in (("a", 6, 0.4), ("b", 1, 0.0), ("c", 3, 0.01))]
    one = Rate("bf16, passes of 8", 32, seconds=0.05, memory_gb=None)
    text = closing(stages, 8, one, peak=800e12, work=Work(original=85, kept=50, ours=40))
    assert "640 poses a second are 8.0% of the 8e+03 that 50 GMAC" in text
    assert "6.4% of the 1e+04 that our 40 GMAC" in text
    assert "takes 10 ms in its stages and 12.5 ms in all" in text
    named = [line.strip() for line in text.splitlines()[2:]]
    assert named[0] == "a: 60% of the time at 40.0% of the peak (products)"
    assert named[1].startswith("c: 30% of the time at 1.0% of the peak (memory")


def test_only_what_is_judged_is_marked_as_failed() -> None:
    checks = {
        "exact": [(Check("vit_out0", 1e-6, 5e-5), True)],
        "float32": [(Check("vit_out0", 1e-3, 5e-5), True)],
        "bf16": [(Check("vit_out0", 2e-2, 5e-5), False), (Check("coarseA R", 0.5, 0.1, unit="deg"), True)],
    }
    rows = parity_table(checks).as_dicts()
    assert [list(row.values())[2:] for row in rows] == [["1e-06", "0.001 FAIL", "0.02"], ["", "", "0.5 FAIL"]]


def test_company_that_moves_a_pose_is_found_out() -> None:
    def run(scene: Scene, models: list[Model]) -> Poses:
        moved = 1e-4 * len(models) * torch.ones(len(models), 3)
        return Poses(torch.eye(3).expand(len(models), 3, 3), moved, moved[:, 0])

    found = network_gpu.company("setting", run, Scene(*[torch.zeros(3, 1)] * 4), [None] * 3)
    assert found.mm == pytest.approx(0.2 * 3**0.5, rel=1e-3)
    assert not found.within
    assert Company("setting", 0.009, 0.009).within


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks.network.gpu", *arguments])
    return network_gpu.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--device cpu --batches 1 --quick"):
        run(monkeypatch)


def test_a_page_without_a_place_for_figures_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(network_gpu, "PAGE", tmp_path / "page.md")
    network_gpu.PAGE.write_text("nothing")
    with pytest.raises(SystemExit, match="has no place for figures"):
        run(monkeypatch, "--device", "cpu", "--docs")


def test_an_unknown_precision_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--precisions", "bf16,fp8")
    assert "choose from float32, tf32, bf16" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_script_runs_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (generated_weights.available() and GOLDEN.is_file()):
        pytest.skip("the folder shared/sam6d, from which the network's weights are made up, is not here")
    figures, page = tmp_path / "figures.json", tmp_path / "page.md"
    page.write_text(f"before\n{OPENING}\nold\n{CLOSING}\nafter\n")
    monkeypatch.setattr(network_gpu, "PAGE", page)
    quick = ("--device", "cpu", "--batches", "1", "--quick", "--profile")
    assert run(monkeypatch, *quick, "--json", str(figures), "--docs") == 0
    found = json.loads(figures.read_text())
    settings = [row["setting"] for row in found["rates"]]
    assert settings == ["exact, eager", "bf16, eager", "bf16, passes of 2", "bf16, buckets"]
    assert {row["stage"] for row in found["stages"]} == set(METHODS.values())
    assert [row["verdict"] for row in found["company"]] == ["pass", "pass"]
    assert {row["largest error"] for row in found["parity"]} == {"coarseA R deg", "coarseA t radii", "coarseA t mm"}
    assert all(row["p50 ms"] > 0 for row in found["latency"])
    assert "GMAC each allow" in capsys.readouterr().out
    assert "GMAC each allow" in page.read_text()
    assert "old" not in page.read_text().splitlines()
