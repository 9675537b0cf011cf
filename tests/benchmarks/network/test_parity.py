"""The parity benchmark: reading a file of reference numbers, passing on right numbers, finding wrong ones."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from benchmarks.network import generated_weights, parity
from benchmarks.network.parity import Check, Golden, Posed, against_exact
from posekit.sam6d.checkpoint import weights
from posekit.sam6d.network.whole import Network
from posekit.synthetic.shapes import rotation

GOLDEN = Path(__file__).parents[3] / "../shared/sam6d/golden.npz"
STAGES = (  # of each setting
    *("vit_out0", "vit_out1", "vit_out2", "vit_out3", "cls", "fmap", "dense_fm", "dense_fo"),
    *("dense_po_raw", "radius", "dense_pm", "dense_po", "sparse_pm", "sparse_po"),
    *(f"geo_{side}{part}" for side in "mo" for part in ("", " diagonal", " background")),
    *(f"coarse_f{side}_{block}" for side in "12" for block in "012"),
    *(f"fine_f{side}_{block}" for side in "12" for block in "012"),
    *("coarse_atten", "pe1", "pe2", "fine_atten", "fine_pred_R", "fine_pred_t", "fine_score"),
    *(f"coarseA {part}" for part in "Rt"),
    *(f"{case} {part}" for case in ("fineLA", "fineS") for part in ("R", "t", "score")),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def golden() -> Golden:
    if not GOLDEN.is_file():
        pytest.skip("the folder shared/sam6d, which holds the reference numbers, is not here")
    return Golden(GOLDEN)


@pytest.fixture(scope="module")
def half(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the second instance (occluded, with repeated points) and half of the pose cases only: half the time."""
    names = [name for name in golden._arrays.files if not name.startswith(("coarseB", "fineLB"))]
    path = tmp_path_factory.mktemp("parity") / "half.npz"
    arrays: dict[str, Any] = {name: golden[name][slice(1, None) if golden[name].ndim else ()] for name in names}
    np.savez(path, **arrays)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    """Run the command in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["parity", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        parity.main()
    return caught.value.code


# ------------------------------------------------------------------------------------------------------------- the run


class Ran(NamedTuple):
    code: object
    printed: str
    settings: dict[str, dict[str, dict[str, object]]]  # setting -> stage -> figures


@pytest.fixture(scope="module")
def ran(half: Path, generated_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Run both settings with the weights that the file was made with."""
    figures = tmp_path_factory.mktemp("figures") / "parity.json"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        code = run(patch, half, "--weights", generated_weights, "--json", figures)
    written = json.loads(figures.read_text())["settings"]
    settings = {name: {check["stage"]: check for check in checks} for name, checks in written.items()}
    return Ran(code, printed.getvalue(), settings)


@pytest.mark.slow
def test_both_settings_pass_on_the_reference_numbers(ran: Ran) -> None:
    assert ran.code == 0
    assert "all stages pass" in ran.printed
    assert list(ran.settings) == ["exact", "fast"]
    for checks in ran.settings.values():
        assert set(STAGES) <= set(checks)
        assert {stage for stage, check in checks.items() if check["hint"]} == {
            stage for stage in checks if stage.startswith("e2e")
        }
        assert {check["verdict"] for check in checks.values()} <= {"pass", "hint"}


@pytest.mark.slow
def test_the_comparison_compares_something(ran: Ran) -> None:
    same = {"dense_po_raw", "radius", "dense_pm", "dense_po", "sparse_pm", "sparse_po"}
    for stage, check in ran.settings["fast"].items():
        if stage not in same and "score" not in stage:
            assert float(str(check["error"])) > 0, stage


@pytest.mark.slow
def test_weights_of_another_salt_fail_with_the_stages_named(
    half: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(parity, "matching", lambda network, golden: iter(()))  # the long part: the first ones suffice
    figures = tmp_path / "parity.json"
    assert run(monkeypatch, half, "--salt", "other", "--setting", "exact", "--json", figures) == 1
    printed = capsys.readouterr().out
    failed = ("vit_out0", "vit_out1", "vit_out2", "vit_out3", "cls", "fmap", "dense_fm")
    assert f"FAILED: {', '.join(f'exact {stage}' for stage in failed)};" in printed
    assert "coarseA R" in printed
    assert json.loads(figures.read_text())["salt"] == "other"


# -------------------------------------------------------------------------------------------------------- single stages


@pytest.fixture(scope="module")
def network(generated_weights: Path) -> Network:
    with torch.device("meta"):
        made = Network()
    made.load_state_dict(weights.load_state_dict(generated_weights), assign=True)
    return made.eval().requires_grad_(False)


@pytest.mark.slow
def test_a_single_changed_number_is_found_in_the_stages_behind_it(network: Network, half: Path) -> None:
    bias = network.feature_extraction.rgb_net.output_upscaling.bias
    changed = bias.clone()
    changed[4] += 2e-3
    try:
        network.feature_extraction.rgb_net.output_upscaling.bias = torch.nn.Parameter(changed, requires_grad=False)
        checks = list(parity.features(network, Golden(half)))
    finally:
        network.feature_extraction.rgb_net.output_upscaling.bias = bias
    assert [check.stage for check in checks if check.verdict == "FAIL"] == ["fmap", "dense_fm"]
    assert all(check.error < 1e-5 for check in checks if check.verdict == "pass")


def test_a_pose_case_that_is_off_fails_in_degrees_and_radii(network: Network, golden: Golden) -> None:
    R, t, score = (golden.tensor(f"fineS_{name}") for name in ("R", "t", "score"))
    turn = torch.from_numpy(rotation((0, 1, 0), 0.01)).float()
    right = list(parity.against_file(Posed("fineS", R, t, score, golden.tensor("radius")), golden))
    wrong = list(parity.against_file(Posed("fineS", turn @ R, t + 1e-3, score - 0.01, golden.tensor("radius")), golden))
    assert [check.verdict for check in right] == ["pass"] * 3
    assert [check.verdict for check in wrong] == ["FAIL"] * 3
    assert wrong[0].error == pytest.approx(0.01, rel=0.02)
    assert wrong[1].error == pytest.approx(1e-3, rel=0.01)


def test_the_fast_setting_is_held_to_a_tenth_of_a_degree_and_of_a_millimetre() -> None:
    R, t, radius_m = torch.eye(3)[None], torch.zeros(1, 3), torch.tensor([0.1])
    exact = Posed("fineS", R, t, torch.ones(1), radius_m)
    turn = torch.from_numpy(rotation((0, 1, 0), 0.2)).float()
    fast = Posed("fineS", turn @ R, t + torch.tensor([0, 0, 0.002]), torch.ones(1) - 0.0005, radius_m)
    turned, shifted, scored = against_exact(fast, exact)
    assert (turned.verdict, turned.unit) == ("FAIL", "deg")
    assert turned.error == pytest.approx(0.2, rel=1e-3)
    assert (shifted.verdict, shifted.unit) == ("FAIL", "mm")
    assert shifted.error == pytest.approx(0.2, rel=1e-3)
    assert scored.verdict == "pass"


# ------------------------------------------------------------------------------------------------------------ the file


def test_a_difference_is_a_failure_but_where_it_is_a_hint() -> None:
    assert Check("s", 1.0, 1.0).verdict == "pass"
    assert Check("s", 1.1, 1.0).verdict == "FAIL"
    assert Check("s", 1.1, 1.0, hint=True).verdict == "hint"
    assert Check("s", 0.9, 1.0, hint=True).verdict == "pass"
    assert Check("s", float("nan"), 1.0).verdict == "FAIL"


def test_hints_are_printed_and_fail_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    checks = {"exact": [Check("a", 2, 1), Check("b", 2, 1, hint=True)], "fast": [Check("c", 0, 1), Check("d", 2, 1)]}
    assert parity._print(checks) == ["exact a", "fast d"]
    assert capsys.readouterr().out.count("hint") == 1


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("full", ()),
        ("(slice(None, None, None), slice(5, None, 24))", (slice(None), slice(5, None, 24))),
        ("(slice(-3, 7, -2),)", (slice(-3, 7, -2),)),
    ],
)
def test_the_slices_that_a_file_names_are_read(text: str, wanted: tuple[slice, ...]) -> None:
    assert parity._slices(text) == wanted


def test_pose_cases_are_found_by_their_names(golden: Golden) -> None:
    assert golden.cases("coarse") == ["coarseA", "coarseB"]
    assert golden.cases("fine") == ["fineLA", "fineLB", "fineS"]
    assert golden.cases("e2e") == []


def test_a_stage_is_compared_where_the_file_stores_it(golden: Golden) -> None:
    whole = torch.zeros(2, 2048, 256)
    whole[:, ::32, ::4] = golden.tensor("dense_fm")
    assert golden.error("dense_fm", whole) == 0
    whole[1, 64, 8] += 0.5
    assert golden.error("dense_fm", whole) == pytest.approx(0.5)
    assert golden.tensor("in_rgb_choose").dtype == torch.int64
    with pytest.raises(SystemExit, match=r"shape \(2, 63, 64\), the file holds \(2, 64, 64\)"):
        golden.error("dense_fm", whole[:, :2000])


def test_of_two_references_the_nearer_one_counts(golden: Golden) -> None:
    stored, exact = golden.tensor("coarse_atten"), golden.tensor("coarse_atten_f64")
    assert golden.error("coarse_atten", stored) == 0
    nearer = stored.clone()
    nearer[:, ::2, ::2] = exact
    assert golden.error("coarse_atten", nearer) == 0
    nearer += 0.25
    assert golden.error("coarse_atten", nearer) == pytest.approx(0.25, rel=1e-3)


def test_logits_that_cannot_be_rebuilt_end_the_run(golden: Golden, tmp_path: Path) -> None:
    names = [name for name in golden._arrays.files if name.startswith(("fineLA", "dense_p", "meta"))]
    arrays: dict[str, Any] = {name: golden[name][slice(1) if golden[name].ndim else ()] for name in names}
    arrays["fineLA_seeds"] = arrays["fineLA_seeds"] + 1
    np.savez(tmp_path / "other.npz", **arrays)
    other = Golden(tmp_path / "other.npz")
    with pytest.raises(SystemExit, match="fineLA: the logits cannot be rebuilt"):
        parity._rebuilt(other, "fineLA", other.tensor("dense_pm"), other.tensor("dense_po"))


def test_the_generated_weights_are_the_same_everywhere() -> None:
    if not generated_weights.available():
        pytest.skip("the folder shared/sam6d, from which the network's weights are made up, is not here")
    make = generated_weights.module("weights").make
    one = make("coarse_point_matching.bg_token", (1, 1, 256))
    np.testing.assert_array_equal(one, make("coarse_point_matching.bg_token", (1, 1, 256), ""))
    assert np.abs(one - make("coarse_point_matching.bg_token", (1, 1, 256), "x")).max() > 0.1
    assert one.dtype == np.float32
