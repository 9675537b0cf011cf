"""The accuracy benchmark: it asks questions as the service does, scores the right rows, and adds up correctly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.accuracy import page as accuracy_page
from benchmarks.accuracy import reliability, studies, tables
from benchmarks.accuracy import run as accuracy
from benchmarks.accuracy.cases import Bench, Row, cut, run_masks
from benchmarks.accuracy.set import load
from posekit.engine import Instance, Rejection, Symmetries
from posekit.geometric.engine import GeometricEngine
from posekit.synthetic.scenes import pose_errors
from posekit.synthetic.shapes import SHAPES, Shape, rotation

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    accuracy_set = load(seed=0, scenes=2, objects=3, cache=tmp_path_factory.mktemp("set"))
    return Bench.prepare(accuracy_set, GeometricEngine("cpu"), list(accuracy_set.shapes), lambda name: None)


@pytest.fixture(scope="module")
def rows(bench: Bench) -> list[Row]:
    return run_masks(bench, "exact", None, lambda text: None)


def row(confidence: float = 0.9, **facts: object) -> Row:
    plain: dict[str, object] = {
        "scene": 0,
        "index": 0,
        "quality": "exact",
        "object": "mug",
        "asked": "mug",
        "visibility": 1.0,
        "seconds": 0.1,
        "status": "ok",
        "confidence": confidence,
    }
    return Row(**(plain | facts))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ questions and answers


def test_a_crop_shows_its_mask_where_the_picture_had_it(bench: Bench) -> None:
    cases = bench.cases("noisy", 0)
    scene = bench.accuracy_set.scenes[0]
    for case, ask in zip(cases, bench.cut(cases), strict=True):
        assert isinstance(ask, Instance)
        left, top = np.rint(scene.K[:2, 2] - ask.K[:2, 2]).astype(int)
        h, w = ask.mask.shape
        mask = bench.accuracy_set.masks["noisy"][0][case.index]
        assert np.array_equal(ask.mask, mask[top : top + h, left : left + w])
        assert ask.mask.sum() == mask.sum()
        assert np.allclose(ask.depth_m, scene.depth_m[top : top + h, left : left + w])


def test_a_mask_that_cannot_be_used_is_a_rejection(bench: Bench) -> None:
    empty = np.zeros(bench.accuracy_set.scenes[0].depth_raw.shape, dtype=np.bool_)
    (ask,), _ = cut(bench.frames[0], [empty], [next(iter(bench.references.values()))])
    assert isinstance(ask, Rejection)
    assert ask.code == "mask_empty"
    scored = bench.row(bench.cases("exact", 0)[0], ask, 0.1)
    assert (scored.status, scored.ar, scored.right, scored.confidence) == ("mask_empty", 0.0, False, 0.0)


def test_the_truth_scores_one_and_a_pose_far_from_it_little(bench: Bench) -> None:
    case = bench.cases("exact", 0)[0]
    truth = bench.accuracy_set.scenes[0].instances[case.index].T_cam_obj
    exact = bench.posed(case, truth, 0.1)
    assert exact.right
    assert (exact.ar, exact.mssd_mm, exact.angle_deg) == (1.0, 0.0, 0.0)
    away = truth.copy()
    away[0, 3] += 0.2 * bench.targets[case.object].diameter_m
    moved = bench.posed(case, away, 0.1)
    assert not moved.right
    assert moved.ar < 0.75
    assert moved.mssd_mm == pytest.approx(200 * bench.targets[case.object].diameter_m)


def test_an_answer_for_another_object_is_never_right(bench: Bench) -> None:
    case = bench.cases("exact", 0)[0]
    other = next(name for name in bench.models if name != case.object)
    truth = bench.accuracy_set.scenes[0].instances[case.index].T_cam_obj
    assert not bench.posed(replace(case, asked=other), truth, 0.1).right


def test_every_mask_has_a_row_in_order_and_most_are_right(bench: Bench, rows: list[Row]) -> None:
    instances = [
        (number, index) for number, s in enumerate(bench.accuracy_set.scenes) for index in range(len(s.instances))
    ]
    assert [(found.scene, found.index) for found in rows] == instances
    assert sum(found.right for found in rows) >= 0.75 * len(rows)
    assert all(found.evidence for found in rows if found.status == "ok")


def test_the_size_of_a_pass_changes_no_answer(bench: Bench, rows: list[Row]) -> None:
    table = studies.run_batches(bench, "exact", GeometricEngine("cpu"), lambda text: None, sizes=(64,))
    peer, ours = table.as_dicts()
    assert (peer["vs. cpu"], ours["instances"]) == (1.0, len(rows))
    assert (ours["most deg"], ours["most mm"], ours["other status"]) == (0.0, 0.0, 0)
    again = run_masks(bench, "exact", 2, lambda text: None)
    assert [found.T_cam_obj for found in again] == [found.T_cam_obj for found in rows]


# -------------------------------------------------------------------------------------------------------- other studies


def test_a_shape_is_not_its_own_stranger_nor_that_of_a_twin_in_other_colours_and_another_frame() -> None:
    carton, gear = SHAPES["carton"](), SHAPES["gear"]()
    turned = (carton.mesh.vertices_m @ rotation((1, 2, 3), 70).T).astype(np.float32)
    colours = None if carton.mesh.vertex_colors is None else 255 - carton.mesh.vertex_colors
    mesh = replace(carton.mesh, vertices_m=turned, vertex_colors=colours)
    twin = Shape(name="twin", mesh=mesh, symmetries=Symmetries())
    others = studies.other_shapes([carton, gear, twin])
    assert others == {"carton": ["gear"], "twin": ["gear"], "gear": ["carton", "twin"]}


def test_wrong_objects_are_asked_for_every_mask(bench: Bench) -> None:
    found = studies.run_wrong(bench, ["exact"], 0, lambda text: None)
    assert found
    assert all(one.asked != one.object and not one.right for one in found)
    (line,) = studies.wrong_table(found).as_dicts()
    assert line["rejected"] == sum(one.status != "ok" for one in found)


def test_a_disturbed_pose_is_5_mm_and_5_degrees_away() -> None:
    T = np.eye(4)
    T[:3, :3] = rotation((1, 0, 2), 130)
    T[:3, 3] = 0.1, -0.2, 0.8
    middle_m = np.array([0.3, 0.0, 0.1])
    moved = studies.disturbed(T, middle_m, np.random.default_rng(0))
    shift = np.append(middle_m, 1) @ (moved - T).T
    assert np.linalg.norm(shift[:3]) == pytest.approx(0.005)
    assert pose_errors(moved, T, Symmetries())[0] == pytest.approx(5.0)


def test_tracking_brings_disturbed_poses_nearer(bench: Bench) -> None:
    before, after = studies.run_tracking(bench, "exact", 0, lambda text: None)
    table = studies.tracking_table(before, after).as_dicts()
    assert table[1]["MSSD mm"] < 0.7 * table[0]["MSSD mm"]


def test_without_real_frames_there_are_none(tmp_path: Path) -> None:
    assert studies.real_frames(tmp_path / "nowhere") == []


def test_memory_is_that_of_a_process_with_the_models(bench: Bench) -> None:
    instances = [ask for ask in bench.cut(bench.cases("exact", 0)) if isinstance(ask, Instance)]
    found = studies.memory(bench.models, instances, "cpu", 1)
    assert found["objects"] == len(bench.models)
    assert 100 < found["loaded_mb"] <= found["pass_mb"] < 4000


# ---------------------------------------------------------------------------------------------------------------- sums


def test_the_table_of_qualities_adds_up() -> None:
    found = [
        row(0.95, ar=1.0, right=True, mssd_mm=2.0, angle_deg=1.0, seconds=0.1),
        row(0.85, ar=0.2, mssd_mm=50.0, angle_deg=90.0, seconds=0.2),
        row(0.30, ar=0.6, right=True, mssd_mm=4.0, angle_deg=3.0, seconds=0.3, ambiguous=True),
        row(0.0, status="no_fit", quality="noisy", seconds=0.4),
    ]
    exact, noisy, both = tables.by_quality(found).as_dicts()
    assert exact["AR"] == pytest.approx(0.6)
    assert exact["right"] == pytest.approx(2 / 3)
    assert (exact["mm"], exact["deg"]) == (3.0, 2.0)
    assert exact["sure"] == pytest.approx(2 / 3)
    assert exact["right if sure"] == 0.5
    assert (exact["ambiguous"], exact["rejected"], noisy["rejected"]) == (1, 0, 1)
    assert (both["instances"], both["AR"]) == (4, pytest.approx(0.45))
    assert both["s median"] == pytest.approx(0.25)


def test_a_confidence_of_one_lies_in_the_last_bin_and_a_rejection_in_none() -> None:
    found = tables.bins([row(1.0, right=True), row(0.91), row(0.0, status="no_fit")])
    assert [one.answers for one in found] == [0] * 9 + [2]
    assert (found[-1].right, found[-1].confidence) == (0.5, pytest.approx(0.955))


def test_the_line_of_a_failure_says_where_what_and_how_far() -> None:
    wrong = row(scene=7, index=2, mssd_mm=41.2, shift_mm=3.0, angle_deg=178.0, evidence={"residual_mm": 0.4})
    line = tables.failure_line(wrong)
    for word in ("7 #2", "mug", "exact", "41.2 mm", "178.0 deg", "confidence 0.90", "residual_mm 0.4"):
        assert word in line
    assert tables.failure_line(row(status="no_fit", detail="why")).endswith("no_fit: why")


@pytest.mark.parametrize(
    "right, count, low, high", [(0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (50, 100, 0.404, 0.596)]
)
def test_the_interval_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    assert reliability.interval(right, count) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))


def test_the_diagrams_bars_are_as_high_as_their_share() -> None:
    found = [row(0.65, right=number < 3) for number in range(6)] + [row(0.95, right=True)] * 5
    picture = reliability.draw(found)
    assert picture.shape == (reliability.HEIGHT, reliability.WIDTH, 3)

    def height(bar: int, color: tuple[int, int, int]) -> float:
        x = round(reliability.LEFT + (bar + 0.25) / 10 * (reliability.RIGHT - reliability.LEFT))
        column = picture[reliability.TOP : reliability.BOTTOM, x].astype(int)
        return float((np.abs(column - color).max(axis=1) < 40).mean())

    assert height(6, reliability.BAR) == pytest.approx(0.5, abs=0.02)
    assert height(9, reliability.SURE_BAR) == pytest.approx(1.0, abs=0.02)
    assert height(2, reliability.BAR) == 0.0


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_worst_come_first_each_instance_once() -> None:
    found = [
        row(index=0, ar=0.5),
        row(index=1, ar=0.0, confidence=0.2),
        row(index=2, ar=0.0, confidence=0.9),
        row(index=2, ar=0.1, quality="noisy"),
        row(index=3, ar=1.0, right=True),
    ]
    assert [one.index for one in accuracy_page.worst(found)] == [2, 1, 0]


def test_the_page_shows_failures_and_loads_nothing(bench: Bench, rows: list[Row], tmp_path: Path) -> None:
    case = bench.cases("exact", 1)[0]
    T = bench.accuracy_set.scenes[1].instances[0].T_cam_obj @ np.diag([-1.0, -1.0, 1.0, 1.0])
    T[0, 3] += 0.05
    wrong = bench.posed(case, T, 0.1)
    rejected = bench.row(bench.cases("exact", 0)[1], Rejection(code="no_fit", detail="1 < 2"), 0.1)
    page = accuracy_page.write_page(tmp_path / "page", bench, [wrong, rejected], "two & more").read_text()
    assert page.count("<h2>") == 2
    assert page.count("data:image/jpeg;base64,") == 6
    assert "two &amp; more" in page
    assert "1 &lt; 2" in page
    assert case.object in page
    assert 'src="http' not in page
    assert (tmp_path / "page" / "reliability.png").stat().st_size > 1000


# ----------------------------------------------------------------------------------------------------- the command line


def test_a_quality_that_does_not_exist_is_told_with_those_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.parser().parse_args(["--masks", "exact,nosy"])
    assert "'nosy': choose from exact, noisy, under" in capsys.readouterr().err


def test_figures_are_put_between_the_marks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{accuracy.OPENING}\nold\n{accuracy.CLOSING}\nafter\n")
    for _ in range(2):
        accuracy.paste(page, "python -m benchmarks.accuracy --docs", "AR 1\n")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("AR 1") == 1
    assert "old" not in text
    assert "\n.venv/bin/python -m benchmarks.accuracy --docs\n" in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="no place for figures"):
        accuracy.paste(page, "", "")


def test_the_page_of_the_docs_has_a_place_for_figures() -> None:
    text = accuracy.DOCS.read_text()
    assert text.index(accuracy.OPENING) < text.index(accuracy.CLOSING)


def test_the_command_measures_library_and_service_alike(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.accuracy.run", "--scenes", "1", "--objects", "3", "--masks", "exact"]
    command += ["--threads", "1", "--http", "--json", str(tmp_path / "figures.json"), "--verbose"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    library, service = figures["by_quality"][0], figures["service"][0]
    assert library["instances"] == len(figures["rows"]) == 3
    assert {name: library[name] for name in ("AR", "right", "sure")} == {
        name: service[name] for name in ("AR", "right", "sure")
    }
    difference = figures["service_difference"]
    assert (difference["deg"], difference["mm"]) == (0.0, pytest.approx(0.0, abs=1e-9))  # mm on the wire, m inside
    assert [line["5 instances"] for line in figures["service_stages"]][-1] == "client"
    assert figures["memory"]["objects"] == 3
    assert "masks  instances" in done.stdout
