"""The network as an engine: models can be stored, and each answer depends only on its question."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from posekit.engine import Estimate, Instance, Mesh, ObjectModel, Outcome, Rejection, Symmetries
from posekit.errors import BrokenCheckpoint, InvalidInput
from posekit.geometry import rotation_angle_deg
from posekit.render import render
from posekit.sam6d import engine as engine_module
from posekit.sam6d.checkpoint.version import version_of
from posekit.sam6d.crops import instance_input
from posekit.sam6d.engine import Sam6dEngine
from posekit.sam6d.network.config import Config
from posekit.sam6d.network.whole import Description, Poses
from posekit.sam6d.templates import View
from posekit.store import ObjectStore
from posekit.synthetic.shapes import SHAPES, rotation

pytestmark = pytest.mark.slow

NAMES = ("housing", "mug", "gear")
K = np.array([[600.0, 0, 111.5], [0, 600.0, 111.5], [0, 0, 1]])
VIEWS = 2
OF_AXIS = Symmetries(continuous=((np.array([0.0, 0, 1]), np.zeros(3)),))


def object_id(name: str) -> str:
    return f"{NAMES.index(name) + 1:064x}"


@functools.cache
def mesh(name: str) -> Mesh:
    return SHAPES[name]().mesh


@functools.cache
def instance(index: int) -> Instance:
    """Return one of many detections, of the three objects in turns: an object before a wall."""
    name = NAMES[index % 3]
    T_cam_obj = np.eye(4)
    T_cam_obj[:3, :3] = rotation((1, 2, 0.5), 47 * index + 20)
    T_cam_obj[:3, 3] = 0.01 * index - 0.03, -0.02, 0.5 + 0.03 * index
    seen = render([mesh(name)], [T_cam_obj], K, 224, 224)
    mask = seen.instance >= 0
    depth_m = np.where(mask, seen.depth_m, np.float32(1.2)).astype(np.float32)
    return Instance(object_id=object_id(name), rgb=seen.rgb, depth_m=depth_m, mask=mask, K=K, seed=index + 1)


def eight() -> list[Instance]:
    return [instance(index) for index in range(8)]


class World(NamedTuple):
    """An engine of two threads, three objects, and its outcomes for eight instances in one pass."""

    engine: Sam6dEngine
    single: Sam6dEngine  # the same on one thread: cores that others use as well make the second one a burden
    models: dict[str, ObjectModel]
    progress: list[float]  # heard while the first object was onboarded
    answers: list[Outcome]

    def ask(self, *instances: Instance) -> list[Outcome]:
        return self.engine.estimate(instances, self.models)

    def ask_alone(self, one: Instance) -> Outcome:
        [outcome] = self.single.estimate([one], self.models)
        return outcome


@pytest.fixture(scope="module")
def world(generated_weights: Path) -> World:
    engine, single = (Sam6dEngine(weights_file=generated_weights, threads=n, views=VIEWS) for n in (2, 1))
    heard: list[float] = []
    models = {}
    for name in NAMES:
        symmetries = OF_AXIS if name == "gear" else None
        hear = heard.append if name == NAMES[0] else lambda share: None
        models[object_id(name)] = single.onboard(object_id(name), mesh(name), symmetries, hear)
    return World(engine, single, models, heard, engine.estimate(eight(), models))


def apart(one: Outcome, other: Outcome) -> tuple[float, float]:
    """Return degrees and millimetres between poses."""
    assert isinstance(one, Estimate), one
    assert isinstance(other, Estimate), other
    R_one, R_other = (torch.from_numpy(each.T_cam_obj[:3, :3]) for each in (one, other))
    distance_m = float(np.linalg.norm(one.T_cam_obj[:3, 3] - other.T_cam_obj[:3, 3]))
    return float(rotation_angle_deg(R_one, R_other)), 1000 * distance_m


def assert_same(some: Sequence[Outcome], others: Sequence[Outcome], within: float = 0.01) -> None:
    """Assert equal outcomes; `within`: the limit in degrees and in millimetres."""
    for one, other in zip(some, others, strict=True):
        assert max(apart(one, other)) < within
        assert isinstance(one, Estimate)
        assert isinstance(other, Estimate)
        assert one.confidence == pytest.approx(other.confidence, abs=2 / 2048)
        assert dataclasses.astuple(one.evidence) == pytest.approx(dataclasses.astuple(other.evidence), abs=0.02)


# ---------------------------------------------------------------------------------------------------------- onboarding


def test_a_model_holds_exactly_the_description_of_its_object(world: World) -> None:
    shapes = {
        "radius_m": (),
        "points": (2048, 3),
        "surface": (1024, 3),
        "sparse": (196,),
        "coarse": (197, 256),
        "fine": (2049, 256),
        "fine_first": (197, 256),
    }
    assert tuple(shapes) == Description._fields
    for model in world.models.values():
        assert {name: array.shape for name, array in model.arrays.items()} == shapes
        assert {name for name, array in model.arrays.items() if array.dtype != np.float32} == {"sparse"}
        assert all(np.isfinite(array).all() for array in model.arrays.values())


def test_a_model_says_whose_it_is_and_keeps_the_symmetries_it_was_given(world: World) -> None:
    for name in NAMES:
        model = world.models[object_id(name)]
        assert (model.object_id, model.engine) == (object_id(name), "sam6d")
        assert model.engine_version == world.engine.version
        assert model.symmetries == (OF_AXIS if name == "gear" else Symmetries())
        corners_m = mesh(name).vertices_m
        assert model.diameter_m == pytest.approx(_diameter_m(corners_m.astype(np.float64)), rel=0.01)
        radius_m = np.linalg.norm(corners_m, axis=1).max()
        assert 0.85 * radius_m < model.arrays["radius_m"] <= 1.001 * radius_m


def _diameter_m(points: np.ndarray) -> float:
    far = points[:: max(1, len(points) // 1500)]
    return float(np.linalg.norm(far[:, None] - far, axis=-1).max())


def test_the_kept_points_and_the_surface_lie_on_the_object(world: World) -> None:
    for name in NAMES:
        arrays = world.models[object_id(name)].arrays
        for kept in ("points", "surface"):
            points_m = arrays[kept] * arrays["radius_m"]
            assert (points_m > mesh(name).vertices_m.min(axis=0) - 1e-4).all()
            assert (points_m < mesh(name).vertices_m.max(axis=0) + 1e-4).all()
        assert len(np.unique(arrays["points"], axis=0)) > 2000
        assert arrays["sparse"][:2].tolist() == [0, 1]


def test_progress_goes_from_the_beginning_to_the_end_and_never_back(world: World) -> None:
    heard = world.progress
    assert len(heard) > 2 * VIEWS
    assert 0 < heard[0] < 0.1
    assert heard == sorted(heard)
    assert heard[-1] == 1


def test_a_view_that_shows_nothing_is_refused_in_words(world: World) -> None:
    empty = View(np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.bool_), np.zeros((9, 9, 3), np.float32))
    with pytest.raises(InvalidInput, match="no pixel"):
        world.engine.onboard_views(object_id("mug"), mesh("mug"), [empty], None, lambda share: None)


def test_a_practice_model_is_as_large_as_any_and_needs_no_rendering(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(engine_module, "render_views")
    practice = world.single.practice_model(object_id("mug"), mesh("mug"))
    usual = world.models[object_id("mug")]
    assert {name: array.shape for name, array in practice.arrays.items()} == {
        name: array.shape for name, array in usual.arrays.items()
    }
    [outcome] = world.single.estimate([instance(1)], {object_id("mug"): practice})
    assert isinstance(outcome, Estimate | Rejection)


def test_a_model_survives_the_store(world: World, tmp_path: Path) -> None:
    store, model = ObjectStore(tmp_path), world.models[object_id("mug")]
    store.folder(model.object_id).mkdir()
    store.save_model(model)
    loaded = store.load_model(model.object_id, "sam6d", world.engine.version)
    assert loaded.arrays.keys() == model.arrays.keys()
    for name, array in model.arrays.items():
        assert (loaded.arrays[name].dtype, loaded.arrays[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(loaded.arrays[name], array)
    [outcome] = world.single.estimate([instance(1)], {model.object_id: loaded})
    assert_same([outcome], world.answers[1:2])


def test_a_model_is_prepared_once_and_its_bytes_are_counted(world: World) -> None:
    model = dataclasses.replace(world.models[object_id("mug")], data={})
    nbytes = world.engine.prepare(model)
    [kept] = model.data.values()
    assert world.engine.prepare(model) == nbytes
    assert [*model.data.values()] == [kept]
    structure = 197 * 197 * Config().channels
    assert nbytes - model.nbytes in (2 * structure, 4 * structure)


def test_the_version_is_that_of_the_weights_and_views(world: World, generated_weights: Path) -> None:
    assert world.engine.version == version_of(generated_weights, VIEWS)
    assert world.engine.version.endswith(f".v{VIEWS}")
    assert (world.engine.name, world.engine.device) == ("sam6d", "cpu")


def test_weights_that_are_not_there_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match=r"some\.safetensors cannot be read"):
        Sam6dEngine(weights_file=tmp_path / "some.safetensors")


# --------------------------------------------------------------------------------------------------------- batch-mates


def test_eight_instances_of_three_objects_have_poses(world: World) -> None:
    assert len(world.answers) == 8
    for answer in world.answers:
        assert isinstance(answer, Estimate), answer
        R = answer.T_cam_obj[:3, :3]
        np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-5)
        assert np.linalg.det(R) > 0
        assert answer.T_cam_obj[3].tolist() == [0, 0, 0, 1]
        assert 0 < answer.confidence <= 1


def test_instances_in_one_pass_have_the_poses_they_have_alone(world: World) -> None:
    assert_same([world.ask_alone(one) for one in eight()], world.answers)


def test_instances_in_one_batch_of_the_network_have_the_poses_they_have_alone(world: World) -> None:
    """The way of a GPU: all of a pass go through the network together."""
    assert_same(world.engine._estimate(eight(), world.models), world.answers)


def test_the_order_of_a_pass_and_an_odd_number_of_instances_change_nothing(world: World) -> None:
    picked = [6, 0, 4]  # two on a thread each, then one on both
    assert_same(world.ask(*(instance(index) for index in picked)), [world.answers[index] for index in picked])
    assert torch.get_num_threads() == 1


def test_what_has_no_pose_is_a_row_with_a_reason_and_harms_no_other(world: World) -> None:
    one = instance(1)
    few = np.zeros_like(one.mask)
    few[100:104, 100:105] = True
    asked = [
        instance(0),
        dataclasses.replace(one, mask=few),
        dataclasses.replace(one, object_id="f" * 64),
        dataclasses.replace(one, mask=np.zeros_like(one.mask)),
        dataclasses.replace(one, depth_m=np.zeros_like(one.depth_m)),
        instance(2),
    ]
    for answers in (world.ask(*asked), world.engine._estimate(asked, world.models)):
        reasons = [answer for answer in answers if isinstance(answer, Rejection)]
        assert [reason.code for reason in reasons] == ["mask_too_small", "no_cad", "mask_empty", "no_depth"]
        assert reasons[0].detail == "20 valid depth pixels under the mask, more than 32 needed"
        assert "f" * 64 in reasons[1].detail
        assert_same([answers[0], answers[5]], [world.answers[0], world.answers[2]])


def test_a_pass_without_a_pose_and_one_without_instances_are_answered(world: World) -> None:
    nothing = dataclasses.replace(instance(0), mask=np.zeros_like(instance(0).mask))
    assert [getattr(answer, "code", None) for answer in world.ask(nothing, nothing)] == ["mask_empty"] * 2
    assert world.ask() == []
    assert world.engine._estimate([], world.models) == []


def test_the_same_seed_gives_the_same_answer_and_another_one_other_draws(world: World) -> None:
    first, again = world.ask(instance(3), instance(3))
    other = world.ask_alone(dataclasses.replace(instance(3), seed=99))
    assert isinstance(first, Estimate)
    assert isinstance(again, Estimate)
    np.testing.assert_array_equal(first.T_cam_obj, again.T_cam_obj)
    assert (first.confidence, first.evidence) == (again.confidence, again.evidence)
    assert max(apart(first, other)) > 0.01


def test_each_instance_has_the_draws_of_its_own_seed(world: World) -> None:
    prepared = world.engine._prepared(world.models[object_id("housing")])
    seen = instance_input(instance(0), prepared.reach_m, np.random.default_rng(0))
    assert not isinstance(seen, Rejection)
    asked = [dataclasses.replace(instance(0), seed=seed) for seed in (1, 2, 1)]
    tasks = [engine_module._Task(place, one, prepared, seen) for place, one in enumerate(asked)]
    first, other, again = world.engine._scene(tasks).uniforms
    assert torch.equal(first, again)
    assert (first == other).float().mean() < 0.01
    assert first.shape == (3 * Config().proposals,)
    assert torch.equal(world.engine._scene(tasks[1:2]).uniforms[0], other)


def test_the_exact_setting_comes_to_the_same_poses(world: World, generated_weights: Path) -> None:
    exact = Sam6dEngine(weights_file=generated_weights, threads=1, views=VIEWS, exact=True)
    assert exact.version == world.engine.version
    models = {name: dataclasses.replace(model, data={}) for name, model in world.models.items()}
    assert_same(exact.estimate([instance(1)], models), world.answers[1:2], within=0.1)


@pytest.mark.parametrize("score, x_m", [(0.0, 0.1), (math.nan, 0.1), (0.5, math.nan), (0.5, math.inf)])
def test_a_pose_that_explains_nothing_or_is_none_is_no_fit(world: World, score: float, x_m: float) -> None:
    prepared = world.engine._prepared(world.models[object_id("housing")])
    seen = instance_input(instance(0), prepared.reach_m, np.random.default_rng(0))
    assert not isinstance(seen, Rejection)
    poses = Poses(torch.eye(3)[None], torch.tensor([[x_m, 0, 0.5]]), torch.tensor([score]))
    outcome = engine_module._outcome(engine_module._Task(0, instance(0), prepared, seen), poses, 0)
    assert isinstance(outcome, Rejection)
    assert outcome.code == "no_fit"
