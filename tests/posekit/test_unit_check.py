"""The unit check: it names every slip and its cure, and refuses nothing ordinary."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posekit.io import images, masks, meshes
from posekit.unit_check import Observation, Verdict, judge, observe
from tests.fuzzing import examples

REAL = Path(__file__).parents[2] / "../shared/real"
F = 600.0


def seen(depth_mm: float, diameter_mm: float, share: float = 0.7) -> Observation:
    """Return an object of this diameter at this depth, whose mask spans `share` of the diameter."""
    extent_px = share * F * diameter_mm / depth_mm
    pixels = max(1, int(extent_px**2 / 2))
    return Observation(median_depth_mm=depth_mm, mask_px=pixels, mask_extent_px=extent_px, valid_px=pixels)


def slipped(depth_factor: float = 1.0, model_factor: float = 1.0, depth_mm=820.0, diameter_mm=200.0, **more) -> Verdict:
    """Return the verdict on a usual scene after depth and model were read with wrong units."""
    true = seen(depth_mm, diameter_mm)
    read = Observation(
        median_depth_mm=depth_mm * depth_factor,
        mask_px=true.mask_px,
        mask_extent_px=true.mask_extent_px,
        valid_px=true.valid_px,
    )
    return judge([read], [diameter_mm * model_factor], F, F, **more)


# ------------------------------------------------------------------------------------------------------ one slip, words


def test_depth_in_metres_is_told_with_its_cure():
    assert slipped(depth_factor=0.001).request_error == (
        "the depth reads 0.82 mm where the mask's size and the model's diameter say about 820 mm: depth_scale looks "
        '1000 times too small; set cam_params.depth_unit to "m" or multiply depth_scale by 1000'
    )


def test_depth_taken_for_metres_is_told_with_its_cure():
    assert slipped(depth_factor=1000).request_error == (
        "the depth reads 820000 mm where the mask's size and the model's diameter say about 820 mm: depth_scale looks "
        '1000 times too large; leave out cam_params.depth_unit if it is "m", or divide depth_scale by 1000'
    )


def test_a_forgotten_depth_scale_is_told_as_such():
    assert slipped(depth_factor=10, depth_scale_given=False).request_error == (
        "the depth reads 8200 mm where the mask's size and the model's diameter say about 820 mm: depth_scale (not "
        "given, so 1.0 was taken) looks 10 times too large; divide depth_scale by 10"
    )


def test_a_model_in_metres_is_told_with_its_cure():
    assert slipped(model_factor=0.001).request_error == (
        "the model's diameter is 0.2 mm where the mask spans 140 mm at a depth of 820 mm: the CAD looks 1000 times too "
        'small, as a file in metres does; send model_unit: "m" (an object registered before has to be registered again)'
    )


def test_a_model_taken_for_metres_is_told_with_its_cure():
    assert slipped(model_factor=1000).request_error == (
        "the model's diameter is 200000 mm where the mask spans 140 mm at a depth of 820 mm: the CAD looks 1000 times "
        'too large, as a file in millimetres taken for metres does; send model_unit: "mm" (an object registered before '
        "has to be registered again)"
    )


def test_a_model_in_inches_is_told_with_its_cure():
    error = slipped(model_factor=1 / 25.4).request_error
    assert "the CAD looks 25.4 times too small, as a file in inches does" in error
    assert "multiply its vertices by 25.4" in error


@pytest.mark.parametrize("factor", [0.001, 0.01, 1 / 25.4, 10, 25.4, 100, 1000])
def test_every_slip_of_depth_is_found(factor):
    error = slipped(depth_factor=factor).request_error
    assert error.startswith("the depth reads")
    assert "820 mm" in error
    assert f"by {max(factor, 1 / factor):g}" in error


@pytest.mark.parametrize("factor", [0.001, 0.01, 1 / 25.4, 25.4, 100, 1000])
def test_every_slip_of_the_model_is_found(factor):
    error = slipped(model_factor=factor).request_error
    assert error.startswith("the model's diameter is")
    assert f"{max(factor, 1 / factor):g} times too" in error


def test_both_are_named_where_numbers_cannot_decide():
    error = slipped(model_factor=0.001, depth_factor=1.0, depth_mm=3000, diameter_mm=1200).request_error
    assert "either" not in error  # a diameter of 1.2 mm decides
    observation = Observation(median_depth_mm=4000, mask_px=9000, mask_extent_px=150, valid_px=9000)
    error = judge([observation] * 3, [100.0] * 3, F, F).request_error  # 1 m wide at 4 m, model of 100 mm
    assert error.startswith("either the depth reads 4000 mm")
    assert "; or the model's diameter is 100 mm" in error


@pytest.mark.skipif(not REAL.exists(), reason="the real frames are not beside the project")
@pytest.mark.parametrize("frame", ["lmo_can", "ycbv_mustard"])
@pytest.mark.parametrize(
    "what, factor", [("none", 1), ("depth", 0.001), ("depth", 1000), ("model", 0.001), ("depth", 10)]
)
def test_real_frames_are_judged_right(frame, what, factor):
    camera = json.loads((REAL / frame / "camera.json").read_text())
    K = np.reshape(camera["cam_K"], (3, 3))
    depth_mm = images.decode_depth((REAL / frame / "depth.png").read_bytes(), 50) * camera["depth_scale"]
    mask = masks.decode_mask((REAL / frame / "mask_5.png").read_bytes(), *depth_mm.shape, None, 1e6)
    raw = meshes.load_mesh({"m.ply": (REAL / frame / "obj_000005.ply").read_bytes()}, "ply", 2_000_000)
    diameter_mm = meshes.diameter_m(raw.vertices) * (factor if what == "model" else 1)
    verdict = judge(
        [observe(depth_mm * (factor if what == "depth" else 1), mask)], [diameter_mm], K[0, 0], K[1, 1], strict=True
    )
    assert verdict.rows == [None]
    assert (verdict.request_error is None) == (what == "none")
    assert verdict.warnings == []
    if what != "none":
        assert ("depth_scale" in verdict.request_error) == (what == "depth")


# ---------------------------------------------------------------------------------------------------- no false alarms


@settings(max_examples=examples(500), deadline=None)
@given(depth_mm=st.floats(120, 4500), diameter_mm=st.floats(12, 1400), share=st.floats(0.1, 1.2))
def test_plausible_scenes_are_never_refused_nor_warned_about(depth_mm, diameter_mm, share):
    observation = seen(depth_mm, diameter_mm, share)
    for observations in ([observation], [observation] * 4):
        verdict = judge(observations, [diameter_mm] * len(observations), F, F, strict=True)
        assert verdict == Verdict(rows=[None] * len(observations))


@settings(max_examples=examples(300), deadline=None)
@given(depth_mm=st.floats(20, 30_000), diameter_mm=st.floats(1, 10_000), share=st.floats(0.1, 1.2))
def test_a_scene_whose_parts_fit_each_other_is_never_refused(depth_mm, diameter_mm, share):
    observation = seen(depth_mm, diameter_mm, share)
    assert judge([observation], [diameter_mm], F, F).request_error is None


@settings(max_examples=examples(300), deadline=None)
@given(depth_mm=st.floats(120, 4500), diameter_mm=st.floats(12, 1400), share=st.floats(0.1, 2.1))
def test_a_loose_or_largely_hidden_mask_is_not_blamed_on_units(depth_mm, diameter_mm, share):
    assert judge([seen(depth_mm, diameter_mm, share)], [diameter_mm], F, F).request_error is None


@pytest.mark.parametrize("factor", [10, 25.4, 100, 1000, 1 / 10, 1 / 25.4, 1 / 100, 1 / 1000])
@pytest.mark.parametrize("what", ["depth", "model"])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("diameter_mm", [60.0, 120.0, 250.0])
def test_every_slip_is_refused_for_compact_objects(factor, what, count, diameter_mm):
    one = seen(700, diameter_mm)
    depth_mm = one.median_depth_mm * (factor if what == "depth" else 1)
    scale = factor if what == "model" else 1
    slipped_one = Observation(
        median_depth_mm=depth_mm, mask_px=one.mask_px, mask_extent_px=one.mask_extent_px, valid_px=one.valid_px
    )
    verdict = judge(
        [slipped_one] * count,
        [diameter_mm * scale] * count,
        F,
        F,
        middles_mm=[0.7 * diameter_mm * scale] * count,
    )
    assert verdict.request_error is not None


def test_an_object_seen_end_on_is_not_blamed_on_units():
    rod = seen(700, 200, share=0.06)
    assert judge([rod], [200.0], F, F, middles_mm=[12.0]).request_error is None


def test_a_speck_is_not_blamed_on_units():
    speck = Observation(median_depth_mm=700, mask_px=60, mask_extent_px=8, valid_px=60)
    assert judge([speck], [200.0], F, F, middles_mm=[150.0]) == Verdict(rows=[None])


def test_rows_of_a_larger_request_are_judged_with_more_patience():
    sliver = seen(300, 200, share=0.08)
    assert judge([sliver], [200.0], F, F, middles_mm=[150.0]).request_error is not None
    assert judge([sliver], [200.0], F, F, middles_mm=[150.0], rows_only=True) == Verdict(rows=[None])
    metres = judge([seen(700, 200)], [0.2], F, F, rows_only=True)
    assert metres.rows[0] is not None
    assert metres.request_error is None


def test_a_mask_of_the_whole_image_is_never_blamed_on_units():
    whole = Observation(median_depth_mm=700, mask_px=640 * 480, mask_extent_px=615, valid_px=300_000)
    assert judge([whole], [15.0], F, F, image_size=(480, 640)).request_error is None


@pytest.mark.parametrize(
    "observation",
    [
        Observation(median_depth_mm=math.nan, mask_px=900, mask_extent_px=30, valid_px=0),
        Observation(median_depth_mm=0.0, mask_px=900, mask_extent_px=30, valid_px=900),
        Observation(median_depth_mm=0.8, mask_px=0, mask_extent_px=0, valid_px=0),
        Observation(median_depth_mm=0.8, mask_px=9, mask_extent_px=3, valid_px=9),
    ],
)
def test_what_says_nothing_about_units_is_not_judged(observation):
    assert judge([observation], [200.0], F, F, strict=True) == Verdict(rows=[None])


def test_detections_without_cad_are_not_judged():
    assert judge([seen(0.8, 200)], [None], F, F, strict=True) == Verdict(rows=[None])
    assert judge([], [], F, F) == Verdict(rows=[])


# ------------------------------------------------------------------------------------------------- odd, strict, by row


def test_what_is_merely_odd_is_a_warning_and_in_strict_an_error():
    odd = seen(820, 200, share=4.0)
    verdict = judge([odd], [200.0], F, F)
    assert verdict.request_error is None
    assert verdict.warnings == [
        "at a depth of 820 mm the masks span 800 mm, much larger than the model's diameter of 200 mm; check the masks, "
        "depth_scale, model_unit and cam_K"
    ]
    strict = judge([odd], [200.0], F, F, strict=True)
    assert strict.request_error.startswith("at a depth of 820 mm the masks span 800 mm")
    assert strict.warnings == []


def test_everything_in_metres_is_two_warnings_since_no_single_slip_helps():
    verdict = slipped(depth_factor=0.001, model_factor=0.001)
    assert verdict.request_error is None
    assert [warning.split(" is ")[0] for warning in verdict.warnings] == [
        "the depth under the masks",
        "the model's diameter",
    ]


def test_one_odd_mask_among_good_ones_is_its_own_rows_matter():
    good = seen(820, 200)
    background = Observation(median_depth_mm=90_000, mask_px=4000, mask_extent_px=100, valid_px=4000)
    verdict = judge([good, background, good], [200.0] * 3, F, F, strict=True)
    assert verdict.request_error is None
    assert verdict.warnings == []
    assert verdict.rows[0] is None
    assert verdict.rows[2] is None
    assert verdict.rows[1].startswith("the depth reads 90000 mm where")


def test_one_object_in_metres_among_others_is_its_rows_matter():
    verdict = judge([seen(820, 200)] * 4, [200.0, 0.2, 200.0, 200.0], F, F)
    assert verdict.request_error is None
    assert [row is None for row in verdict.rows] == [True, False, True, True]
    assert 'model_unit: "m"' in verdict.rows[1]


def test_of_two_detections_the_good_one_decides():
    verdict = judge([seen(820, 200), seen(820, 200)], [200.0, 0.2], F, F)
    assert verdict.request_error is None
    assert verdict.rows[1] is not None


def test_detections_that_cannot_be_judged_do_not_outvote_the_others():
    nothing = Observation(median_depth_mm=math.nan, mask_px=900, mask_extent_px=30, valid_px=0)
    bad = Observation(median_depth_mm=0.82, mask_px=4000, mask_extent_px=100, valid_px=4000)
    verdict = judge([nothing, nothing, bad], [200.0] * 3, F, F)
    assert "depth_unit" in verdict.request_error
    assert verdict.rows == [None] * 3


# ------------------------------------------------------------------------------------------------------------- observe


def test_an_observation_measures_the_mask_and_the_depth_under_it():
    depth_mm = np.zeros((100, 120), np.float32)
    depth_mm[20:60, 30:90] = 700
    depth_mm[20:30, 30:90] = 0
    mask = np.zeros((100, 120), bool)
    mask[20:60, 30:90] = True
    mask[99, 0] = mask[0, 119] = True  # strays
    observation = observe(depth_mm, mask)
    assert observation.median_depth_mm == 700
    assert observation.mask_px == 2402
    assert observation.valid_px == 1800
    assert 56 <= observation.mask_extent_px <= 60


def test_an_empty_mask_is_observed_as_nothing():
    observation = observe(np.ones((5, 5), np.float32), np.zeros((5, 5), bool))
    assert math.isnan(observation.median_depth_mm)
    assert (observation.mask_px, observation.mask_extent_px, observation.valid_px) == (0, 0.0, 0)
