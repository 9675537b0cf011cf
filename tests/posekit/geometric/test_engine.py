"""The whole engine: poses of objects in pictures, and its answers where the pose is uncertain."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from posekit.engine import REJECT_CODES, Estimate, Float64, Instance, ObjectModel, Outcome, Rejection, Symmetries
from posekit.geometric.engine import GeometricEngine
from posekit.geometric.observe import MASK_SIDE
from posekit.geometric.symmetry import pose_difference
from posekit.geometry import rotation_looking_from
from posekit.io.images import decode_color, decode_depth, decode_png
from posekit.io.meshes import load_mesh, to_mesh
from posekit.synthetic.scenes import MaskQuality, Scene, degrade_mask, demo_scene, make_scene
from posekit.synthetic.shapes import SHAPES, assembled, box, circle, extrude, rotation
from tests.posekit.geometric.support import (
    NO_SYMMETRY,
    SURE,
    at,
    cuboid,
    cut,
    demo,
    engine,
    estimate,
    mesh_of,
    model,
    nudged,
    off_by,
    onboarded,
    photograph,
    solved,
)

REAL = Path(__file__).parents[3] / "../shared/real"
HOUSING, MUG, BOTTLE, STEPPED, GEAR, WEDGE, BOLT = range(7)  # of the demo scene


# ------------------------------------------------------------------------------------------------------ right answers


def test_the_demo_object_is_found_within_2_mm_and_2_degrees() -> None:
    answer = solved(demo())
    angle_deg, distance_mm = off_by(answer, demo_scene().instances[0])
    assert angle_deg < 2
    assert distance_mm < 2
    assert answer.confidence > SURE
    assert not answer.ambiguous


def test_right_answers_carry_evidence_within_its_ranges() -> None:
    for index, truth in enumerate(demo_scene().instances):
        answer = solved(demo(index))
        angle_deg, distance_mm = off_by(answer, truth)
        assert angle_deg < 3, truth.shape.name
        assert distance_mm < 2, truth.shape.name
        assert SURE < answer.confidence <= 1
        assert 0.9 < answer.evidence.inlier_fraction <= 1
        assert 0 < answer.evidence.residual_mm < 3
        assert 0.9 < answer.evidence.visible_overlap <= 1
        assert 0 <= answer.evidence.free_space_violation < 0.1


@pytest.mark.slow
def test_objects_of_cluttered_noisy_scenes_are_found() -> None:
    for seed in (7, 8):
        scene = make_scene(seed)
        for index, truth in enumerate(scene.instances):
            angle_deg, distance_mm = off_by(solved(cut(scene, index)), truth)
            assert angle_deg < 3, truth.shape.name
            assert distance_mm < 4, truth.shape.name


def test_the_rotation_of_an_answer_is_a_rotation() -> None:
    T = solved(demo()).T_cam_obj
    assert T.dtype == np.float64
    assert np.allclose(T[:3, :3] @ T[:3, :3].T, np.eye(3), atol=1e-9)
    assert np.linalg.det(T[:3, :3]) == pytest.approx(1)
    assert T[3].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("quality", ["noisy", "under", "merged"])
@pytest.mark.parametrize("index", [HOUSING, STEPPED])
def test_a_spoilt_mask_changes_the_pose_little(quality: MaskQuality, index: int) -> None:
    scene = demo_scene()
    truth = scene.instances[index]
    others = [other.mask for other in scene.instances if other is not truth]
    mask = degrade_mask(truth.mask, quality, np.random.default_rng(3), others)
    assert (mask & truth.mask).sum() / (mask | truth.mask).sum() < 0.85
    angle_deg, distance_mm = off_by(solved(cut(scene, index, mask)), truth)
    assert angle_deg < 1
    assert distance_mm < 1


def test_of_two_objects_under_one_mask_one_is_found_without_certainty() -> None:
    places = (at(-0.09, 0, 0.6, rotation((1, 0.3, 0.2), 200)), at(0.09, 0.02, 0.6, rotation((1, 0.5, 0), 230)))
    scene = photograph([SHAPES["wedge"]()] * 2, places)
    answer = solved(cut(scene, 0, scene.instances[0].mask | scene.instances[1].mask))
    angle_deg, distance_mm = min(off_by(answer, truth) for truth in scene.instances)
    assert angle_deg < 1
    assert distance_mm < 1
    assert answer.confidence < SURE


@pytest.mark.parametrize("width, focal_px, z_m", [(1280, 1200.0, 0.35), (640, 600.0, 0.17)], ids=["fine", "near"])
def test_a_mask_of_many_pixels_is_solved_as_well(width: int, focal_px: float, z_m: float) -> None:
    T = at(0, 0, z_m, rotation((1, 0.3, 0.2), 200))
    scene = photograph([SHAPES["wedge"]()], [T], focal_px=focal_px, width=width, height=width * 3 // 4)
    assert scene.instances[0].mask.any(axis=0).sum() > MASK_SIDE
    angle_deg, distance_mm = off_by(solved(cut(scene, 0)), scene.instances[0])
    assert angle_deg < 0.3
    assert distance_mm < 0.6


@pytest.mark.parametrize("towards", [(0.3, 0.2, 1.0), (0.3, -0.4, -1.0)], ids=["front", "back"])
def test_a_thin_plate_lies_on_the_side_of_its_wall_that_was_seen(
    plate: tuple[Scene, dict[str, ObjectModel]], towards: tuple[float, float, float]
) -> None:
    """3 mm of sheet: which of its two sides is seen decides by 3 mm where it is."""
    scene, models = plate
    T = at(0.02, 0.01, 0.6, seen_from(towards, 20))
    scene = photograph([scene.instances[0].shape], [T])
    angle_deg, distance_mm = off_by(solved(cut(scene, 0), models), scene.instances[0])
    assert angle_deg < 0.6
    assert distance_mm < 0.7


def test_a_thin_plate_is_found_in_noisy_depth(plate: tuple[Scene, dict[str, ObjectModel]]) -> None:
    scene, models = plate
    angle_deg, distance_mm = off_by(solved(cut(scene, 0), models), scene.instances[0])
    assert angle_deg < 1
    assert distance_mm < 1.5


def test_the_seven_millimetres_of_an_angle_are_told_from_its_other_side() -> None:
    for towards in ((0.3, 0.2, 1.0), (-0.8, -0.3, 0.5), (0.9, 0.1, 0.3)):
        scene = photograph([SHAPES["bracket"]()], [at(0.02, 0.01, 0.6, seen_from(towards, 20))])
        angle_deg, distance_mm = off_by(solved(cut(scene, 0)), scene.instances[0])
        assert angle_deg < 0.5
        assert distance_mm < 0.7


# ------------------------------------------------------------------------------------------------- alone, in company


def company() -> tuple[list[Instance], dict[str, ObjectModel]]:
    """Return nine instances of seven objects with crops of different sizes, as a pass on a GPU may hold."""
    plain = dataclasses.replace(SHAPES["wedge"]().mesh, vertex_colors=None)
    truth = demo_scene().instances
    instances = [
        dataclasses.replace(demo(WEDGE), object_id="plain"),
        dataclasses.replace(demo(HOUSING), hypotheses=2),
        dataclasses.replace(demo(STEPPED), init_T_cam_obj=nudged(truth[STEPPED].T_cam_obj, 5, 0.005)),
        demo(GEAR),
        dataclasses.replace(demo(MUG), refine="none"),
        dataclasses.replace(demo(HOUSING), mask=np.zeros_like(demo(HOUSING).mask)),
        demo(BOLT),
        cut(demo_scene(), WEDGE, truth[WEDGE].mask | truth[HOUSING].mask),  # more parts than the others
        dataclasses.replace(demo(GEAR), seed=7),
    ]
    names = {"housing", "mug", "stepped", "gear", "wedge", "bolt"}
    return instances, {"plain": onboarded(plain, "plain"), **{name: model(name) for name in names}}


def test_a_shared_pass_gives_each_instance_the_answer_that_it_gets_alone() -> None:
    instances, models = company()
    together = engine()._estimate(instances, models)
    assert [isinstance(outcome, Rejection) for outcome in together].count(False) >= 7
    for instance, outcome in zip(instances, together, strict=True):
        alone = engine()._estimate([instance], models)[0]
        if isinstance(alone, Rejection):
            assert isinstance(outcome, Rejection)
            assert outcome.code == alone.code
            continue
        assert isinstance(outcome, Estimate)
        assert_alike(outcome.T_cam_obj, alone.T_cam_obj, models[instance.object_id].symmetries)
        assert outcome.confidence == pytest.approx(alone.confidence, abs=1e-3)
        assert outcome.ambiguous == alone.ambiguous
        assert len(outcome.hypotheses) == len(alone.hypotheses)


def assert_alike(T_a: Float64, T_b: Float64, symmetries: Symmetries) -> None:
    angle_deg, distance_m = pose_difference(T_a, T_b, symmetries)
    assert angle_deg < 0.01
    assert distance_m < 1e-5


def test_two_threads_give_the_same_bits_as_one() -> None:
    instances, models = company()
    one, two = (GeometricEngine("cpu", threads=count).estimate(instances, models) for count in (1, 2))
    assert [bits(outcome) for outcome in one] == [bits(outcome) for outcome in two]


def test_an_answer_has_the_same_bits_alone_and_in_company() -> None:
    crops = [dataclasses.replace(demo(index), hypotheses=2) for index in (HOUSING, STEPPED, GEAR)]
    together = estimate(*crops, *reversed(crops))
    for position, crop in enumerate(crops):
        alone = bits(estimate(crop)[0])
        assert alone == bits(together[position]) == bits(together[-1 - position])


def bits(outcome: Outcome) -> object:
    """Return everything in an outcome, comparable bit by bit."""
    if isinstance(outcome, Rejection):
        return outcome
    runners_up = [(other.T_cam_obj.tobytes(), other.confidence) for other in outcome.hypotheses]
    return outcome.T_cam_obj.tobytes(), outcome.confidence, outcome.evidence, outcome.ambiguous, runners_up


def test_an_answer_does_not_depend_on_where_its_arrays_lie_in_memory_or_on_global_randomness() -> None:
    crop = demo()
    raw = b"x" + crop.depth_m.tobytes()
    unaligned = np.frombuffer(raw, dtype="u1", offset=1).view("<f4").reshape(crop.depth_m.shape)
    before = solved(crop)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    after = solved(dataclasses.replace(crop, depth_m=unaligned))
    assert before.T_cam_obj.tobytes() == after.T_cam_obj.tobytes()
    assert torch.equal(state, torch.random.get_rng_state())


# ------------------------------------------------------------------------------------------- with and without a start


@pytest.mark.parametrize("index", [HOUSING, MUG, STEPPED, GEAR, WEDGE])
def test_a_pose_near_the_truth_is_refined_to_what_a_search_finds(index: int) -> None:
    start = nudged(demo_scene().instances[index].T_cam_obj, 5, 0.005)
    refined = solved(dataclasses.replace(demo(index), init_T_cam_obj=start))
    searched = solved(demo(index))
    symmetries = model(demo(index).object_id).symmetries
    angle_deg, distance_m = pose_difference(refined.T_cam_obj, searched.T_cam_obj, symmetries)
    assert angle_deg < 0.5
    assert distance_m < 0.0005
    assert refined.confidence > SURE


def test_a_pose_far_from_the_truth_is_not_searched_for() -> None:
    start = nudged(demo_scene().instances[0].T_cam_obj, 120, 0.005)
    outcome = estimate(dataclasses.replace(demo(), init_T_cam_obj=start))[0]
    assert isinstance(outcome, Rejection) or outcome.confidence < SURE


def test_a_start_that_is_no_pose_is_searched_instead() -> None:
    for broken in (np.full((4, 4), np.nan), np.zeros((4, 4))):
        answer = solved(dataclasses.replace(demo(), init_T_cam_obj=broken))
        assert answer.T_cam_obj.tobytes() == solved(demo()).T_cam_obj.tobytes()


def test_a_start_whose_rotation_is_rounded_or_scaled_is_taken() -> None:
    truth = demo_scene().instances[0]
    start = np.round(truth.T_cam_obj, 2)
    start[:3, :3] *= 1.5
    angle_deg, distance_mm = off_by(solved(dataclasses.replace(demo(), init_T_cam_obj=start)), truth)
    assert angle_deg < 1
    assert distance_mm < 1


def test_without_refinement_there_is_still_an_answer_near_the_truth() -> None:
    angle_deg, distance_mm = off_by(solved(dataclasses.replace(demo(), refine="none")), demo_scene().instances[HOUSING])
    assert angle_deg < 8
    assert distance_mm < 10


# ------------------------------------------------------------------------------------------------- other answers


def test_runners_up_are_other_poses_and_less_sure() -> None:
    answer = solved(dataclasses.replace(demo(), hypotheses=3))
    assert 1 <= len(answer.hypotheses) <= 3
    sure = [answer.confidence, *(other.confidence for other in answer.hypotheses)]
    assert sure == sorted(sure, reverse=True)
    poses = [answer.T_cam_obj, *(other.T_cam_obj for other in answer.hypotheses)]
    for index, T in enumerate(poses):
        for other in poses[:index]:
            angle_deg, distance_m = pose_difference(T, other, NO_SYMMETRY)
            assert angle_deg > 10 or distance_m > 0.01
    assert solved(demo()).hypotheses == ()


@pytest.mark.parametrize("name", ["wedge", "bracket"])
def test_a_small_object_is_believed_in(name: str) -> None:
    """25 mm at 0.6 m: every other cell of it lies at the outline."""
    shape = SHAPES[name]()
    scale = np.float32(0.025 / model(name).diameter_m)
    mesh = dataclasses.replace(shape.mesh, vertices_m=shape.mesh.vertices_m * scale)
    small = dataclasses.replace(shape, name="small", mesh=mesh)
    scene = photograph([small], [at(0.01, 0.02, 0.6, rotation((1, 0.3, 0.2), 200))])
    answer = solved(cut(scene, 0), {"small": onboarded(mesh, "small")})
    assert answer.confidence > SURE or answer.ambiguous
    assert answer.evidence.free_space_violation < 0.1


def test_a_start_beyond_all_cameras_is_none() -> None:
    far = at(0, 0, 1e39)
    answer = solved(dataclasses.replace(demo(), init_T_cam_obj=far))
    assert answer.T_cam_obj.tobytes() == solved(demo()).T_cam_obj.tobytes()


HALF_TURN = at(0, 0, 0, rotation((1, 0, 0), 180))


Views = Callable[[tuple[float, float, float]], Scene]


@pytest.fixture(scope="module")
def marked() -> tuple[Views, dict[str, ObjectModel]]:
    """Return a box whose half turn about x shows only by a knob on its +x side: views of it, and its model."""
    grey = (170, 170, 175)
    shape = assembled("marked", [box((60, 80, 110), grey), box((16, 20, 20), grey, (36, 0, 30))])

    def view(towards: tuple[float, float, float]) -> Scene:
        return photograph([shape], [at(0.02, 0.01, 0.6, seen_from(towards, 20))])

    return view, {"marked": onboarded(shape.mesh, "marked")}


def test_an_object_whose_deciding_mark_is_hidden_is_ambiguous(
    marked: tuple[Views, dict[str, ObjectModel]],
) -> None:
    view, models = marked
    scene = view((-1, 0.1, 0))
    answer = solved(cut(scene, 0, hypotheses=3), models)
    assert answer.ambiguous
    assert answer.confidence < SURE
    other = answer.hypotheses[0]
    assert other.confidence <= answer.confidence
    angle_deg, distance_m = pose_difference(other.T_cam_obj, answer.T_cam_obj @ HALF_TURN, NO_SYMMETRY)
    assert angle_deg < 2
    assert distance_m < 0.005
    either = Symmetries(discrete=(HALF_TURN,))
    assert pose_difference(answer.T_cam_obj, scene.instances[0].T_cam_obj, either)[0] < 2


def test_an_object_whose_deciding_mark_is_seen_is_not(
    marked: tuple[Views, dict[str, ObjectModel]],
) -> None:
    view, models = marked
    scene = view((0.3, 1, 0.2))
    answer = solved(cut(scene, 0, hypotheses=3), models)
    assert not answer.ambiguous
    assert answer.confidence > SURE
    assert off_by(answer, scene.instances[0])[0] < 1


def test_colours_that_a_camera_does_not_see_decide_nothing() -> None:
    """A box whose flips only its colours tell apart, with and without colour in the picture."""
    solid = cuboid((0.06, 0.08, 0.11), cuts=4)
    mesh = mesh_of(solid, np.where(solid.vertices[:, 2:] > 0, (180, 60, 60), (60, 60, 180)).astype(np.uint8))
    shape = dataclasses.replace(SHAPES["carton"](), name="box", mesh=mesh, symmetries=NO_SYMMETRY)
    models = {"box": onboarded(mesh, "box")}
    scene = photograph([shape], [at(0, 0, 0.7, rotation((1, 0.4, 0.2), 130))])
    crop = cut(scene, 0, hypotheses=1)
    clear = solved(crop, models)
    assert not clear.ambiguous
    assert pose_difference(clear.T_cam_obj, scene.instances[0].T_cam_obj, models["box"].symmetries)[0] < 2
    grey = solved(dataclasses.replace(crop, rgb=np.full_like(crop.rgb, 128)), models)
    assert grey.ambiguous
    assert grey.confidence <= 0.7
    assert len(grey.hypotheses) == 1


def seen_from(towards: tuple[float, float, float], roll_deg: float) -> Float64:
    """Return R_cam_obj of a camera that looks at the object from a direction in the object's frame."""
    direction = torch.tensor(towards, dtype=torch.float64)
    R = rotation_looking_from(direction / direction.norm()).numpy()
    return np.asarray(rotation((0, 0, 1), roll_deg) @ R)


@pytest.fixture(scope="module")
def plate() -> tuple[Scene, dict[str, ObjectModel]]:
    """Return an angular plate 3 mm thick in a noisy scene, and its model."""
    outline = np.array([[0.0, 0], [100, 0], [100, 30], [35, 30], [35, 70], [0, 70]])
    shape = assembled("plate", [extrude(outline, 3, (160, 160, 165), [circle(8, (80, 15))])])
    return make_scene(1, shapes=[shape], count=1), {"plate": onboarded(shape.mesh, "plate")}


# ------------------------------------------------------------------------------------------------------- no answer


def few_pixels(count: int) -> Instance:
    crop = demo()
    rows, columns = np.nonzero(crop.mask & (crop.depth_m > 0))
    mask = np.zeros_like(crop.mask)
    mask[rows[:count], columns[:count]] = True
    return dataclasses.replace(crop, mask=mask)


@pytest.mark.parametrize(
    "change, code, words",
    [
        (lambda crop: dataclasses.replace(crop, mask=np.zeros_like(crop.mask)), "mask_empty", "no pixel"),
        (lambda crop: dataclasses.replace(crop, depth_m=np.zeros_like(crop.depth_m)), "no_depth", "none of the mask"),
        (lambda crop: dataclasses.replace(crop, depth_m=np.full_like(crop.depth_m, np.nan)), "no_depth", "none"),
        (lambda crop: few_pixels(12), "mask_too_small", "12 valid depth pixels under the mask, more than 32 needed"),
        (lambda crop: few_pixels(32), "mask_too_small", "32 valid depth pixels"),
        (lambda crop: dataclasses.replace(crop, K=np.full((3, 3), np.nan)), "engine_error", "camera"),
        (lambda crop: dataclasses.replace(crop, depth_m=crop.depth_m[1:]), "engine_error", "fit"),
        (lambda crop: dataclasses.replace(crop, mask=np.zeros((0, 0), bool)), "engine_error", "fit"),
    ],
)
def test_what_cannot_be_solved_is_rejected_by_code(
    change: Callable[[Instance], Instance], code: str, words: str
) -> None:
    outcome = estimate(change(demo()))[0]
    assert isinstance(outcome, Rejection)
    assert outcome.code == code
    assert outcome.code in REJECT_CODES
    assert re.search(words, outcome.detail)


def test_an_object_that_is_not_loaded_is_a_row_of_its_own() -> None:
    missing, found = engine().estimate(
        [dataclasses.replace(demo(), object_id="ghost"), demo()], {"housing": model("housing")}
    )
    assert isinstance(missing, Rejection)
    assert missing.code == "no_cad"
    assert "ghost" in missing.detail
    assert isinstance(found, Estimate)


@pytest.mark.parametrize("pixels", [33, 60, 200])
def test_a_handful_of_pixels_is_enough_to_try(pixels: int) -> None:
    assert isinstance(estimate(few_pixels(pixels))[0], Estimate | Rejection)


@pytest.mark.parametrize("seed", range(3))
def test_garbage_depth_is_never_accepted_with_confidence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    crop = demo()
    depth = rng.uniform(0.3, 1.5, crop.depth_m.shape).astype(np.float32)
    depth[rng.random(depth.shape) < 0.1] = np.inf
    depth[rng.random(depth.shape) < 0.1] = -1e30
    outcome = estimate(dataclasses.replace(crop, depth_m=depth, seed=seed))[0]
    assert isinstance(outcome, Rejection) or outcome.confidence < 0.3


def test_a_mask_on_the_bare_table_is_never_accepted_with_confidence() -> None:
    scene = demo_scene()
    anything = np.any([truth.mask for truth in scene.instances], axis=0)
    mask = np.zeros_like(anything)
    mask[330:460, 40:180] = True
    mask &= ~cv2.dilate(anything.astype(np.uint8), np.ones((25, 25), np.uint8)).astype(bool)
    outcome = estimate(cut(scene, 0, mask))[0]
    assert isinstance(outcome, Rejection) or outcome.confidence < 0.75 * SURE


@pytest.mark.parametrize(
    "seen, wanted",
    [(MUG, "bottle"), (BOTTLE, "mug"), (STEPPED, "wedge"), (WEDGE, "stepped"), (BOLT, "bottle"), (GEAR, "housing")],
)
def test_the_mask_of_another_object_does_not_fit(seen: int, wanted: str) -> None:
    outcome = estimate(cut(demo_scene(), seen, object_id=wanted))[0]
    if isinstance(outcome, Rejection):
        assert outcome.code == "no_fit"
        assert re.search(r"\d+% of the points under the mask and \d+% of the surface", outcome.detail)
    else:
        assert outcome.confidence < 0.75 * SURE


def test_every_other_object_of_the_scene_is_told_from_the_housing() -> None:
    outcomes = estimate(*(cut(demo_scene(), index, object_id="housing") for index in range(1, 7)))
    assert [getattr(outcome, "code", outcome) for outcome in outcomes].count("no_fit") >= 5
    assert all(isinstance(outcome, Rejection) or outcome.confidence < 0.75 * SURE for outcome in outcomes)


# ------------------------------------------------------------------------------------------------------ real frames


@pytest.mark.parametrize("folder", ["lmo_can", "ycbv_mustard"])
def test_real_frames_are_solved_within_10_mm_and_5_degrees(folder: str) -> None:
    path = REAL / folder
    if not path.is_dir():
        pytest.skip("the folder shared/real with the real frames is not here")
    camera = json.loads((path / "camera.json").read_text())
    truth = json.loads((path / "gt.json").read_text())[0]
    x_mm, y_mm, z_mm = truth["t_mm"]
    T = at(x_mm / 1000, y_mm / 1000, z_mm / 1000, np.reshape(truth["R"], (3, 3)))
    cad = {"object.ply": (path / "obj_000005.ply").read_bytes()}
    made = onboarded(to_mesh(load_mesh(cad, "ply", max_faces=1_000_000), "mm"), folder)
    raw = decode_depth((path / "depth.png").read_bytes(), 10)
    frame = Instance(
        object_id=folder,
        rgb=decode_color((path / "rgb.png").read_bytes(), 10),
        depth_m=(raw * (camera["depth_scale"] / 1000)).astype(np.float32),
        mask=decode_png((path / "mask_5.png").read_bytes()) > 0,
        K=np.reshape(camera["cam_K"], (3, 3)),
        seed=0,
    )
    answer = solved(frame, {folder: made})
    half_turn = np.diag([-1.0, -1, 1, 1])
    readings = Symmetries(discrete=(half_turn,) if folder == "ycbv_mustard" else ())
    angle_deg, distance_m = pose_difference(answer.T_cam_obj, T, readings)
    assert angle_deg < 5
    assert distance_m < 0.01
    if folder == "ycbv_mustard":
        assert answer.ambiguous or len(made.symmetries.discrete) == 1


def test_the_engine_is_imported_without_open3d() -> None:
    code = "import sys, posekit.geometric.engine; assert not {'open3d', 'cv2', 'trimesh'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], timeout=60)
