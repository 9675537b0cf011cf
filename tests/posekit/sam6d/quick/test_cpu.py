"""The rewritten parts against the plain ones: the same numbers, also on awkward inputs, with and without kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import pointnet2_ext
from posekit.geometry import rotation_angle_deg
from posekit.sam6d import kernels
from posekit.sam6d.network.attention import FocusedAttention, Layer, RelativeAttention
from posekit.sam6d.network.coarse import Pose
from posekit.sam6d.network.config import Config
from posekit.sam6d.network.features import FeatureExtraction
from posekit.sam6d.network.fine import PositionEncoding, start_at
from posekit.sam6d.network.structure import GeometricStructureEmbedding
from posekit.sam6d.network.whole import Model, Network, Scene, take
from posekit.sam6d.quick import cpu
from posekit.sam6d.quick.cpu import (
    TABLE_UNITS,
    FastNetwork,
    FoldedAttention,
    NeighbourlyEncoding,
    OnePassAttention,
    PointFeatures,
    TabledStructure,
)
from tests.posekit.sam6d.support import filled, posed, random, rotations, sphere, uniform

SMALL = Config(  # as deep as any, and narrow where no kernel looks
    width=48,
    depth=4,
    image_heads=4,
    taken_blocks=(0, 1, 2, 3),
    coarse_points=40,
    fine_points=300,
    proposals=400,
    kept=60,
)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@functools.cache
def both() -> tuple[Network, FastNetwork]:
    """Return a small network with the same numbers twice."""
    plain = Network(SMALL)
    filled(plain)
    return plain, FastNetwork.of(plain)


# ------------------------------------------------------------------------------------------------- features of points


def pixels(batch: int, count: int) -> Tensor:
    """Return flat pixel indices, including the picture's corners, edges and repeated ones."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(224 * 224, (batch, count), generator=generator)
    chosen[:, :8] = torch.tensor([0, 223, 223 * 224, 224 * 224 - 1, 1, 224, 222 * 224 + 223, 112])
    chosen[:, 8] = chosen[:, 9]
    return chosen


def test_features_at_points_are_those_of_the_whole_picture(kernel: str) -> None:
    plain, fast = both()
    rgb = torch.randint(256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    choose = pixels(2, 60)
    there = plain.features(rgb, choose)
    made = fast.features(rgb, choose)
    assert type(fast.feature_extraction) is PointFeatures
    assert type(plain.feature_extraction) is FeatureExtraction
    assert made.shape == (2, 60, 256)
    assert (made - there).abs().max() < 2e-5 * there.abs().max()
    assert there.std() > 0.1


def test_an_encoder_in_bf16_gives_nearly_the_same_in_float32_and_leaves_the_plain_one_alone() -> None:
    plain, _ = both()
    half = FastNetwork.of(plain, "bf16")
    rgb = torch.randint(256, (1, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    made, there = half.features(rgb, pixels(1, 60)), plain.features(rgb, pixels(1, 60))
    assert made.dtype == torch.float32
    assert 0 < (made - there).abs().mean() < 0.03 * there.abs().mean()
    assert {tensor.dtype for tensor in plain.feature_extraction.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in half.fine_point_matching.parameters()} == {torch.float32}


# -------------------------------------------------------------------------------------------------- structure of pairs


def structures() -> tuple[GeometricStructureEmbedding, TabledStructure]:
    plain, fast = both()
    assert isinstance(fast.geo_embedding, TabledStructure)
    return plain.geo_embedding, fast.geo_embedding


def clouds() -> dict[str, Tensor]:
    """Return clouds (B, N, 3) by their awkward property."""
    return {
        "usual": sphere(2, 39) + torch.tensor([1.0, -2, 13]),
        "repeated points": sphere(1, 8).repeat(1, 5, 1)[:, :39],
        "one point alone": torch.zeros(1, 39, 3),
        "on a line": torch.linspace(-1, 1, 39)[None, :, None] * torch.tensor([1.0, 2, 2]) / 3,
        "far away": sphere(1, 39) + torch.tensor([30.0, -40, 300]),
        "as large as the table": sphere(1, 39) * (0.2 * TABLE_UNITS / 2) * 0.999,
        "larger than the table": sphere(1, 39) * 2.1,
        "with a stray point": torch.cat((sphere(1, 38), torch.full((1, 1, 3), 5.0)), dim=1),
    }


@pytest.mark.parametrize("name", clouds())
def test_the_structure_from_tables_is_that_of_the_layers(kernel: str, name: str) -> None:
    points = clouds()[name]
    points = torch.cat((torch.full((len(points), 1, 3), 100.0), points), dim=1)
    plain, tabled = structures()
    there, made = plain(points), tabled.values(tabled(points))
    rounding = float(tabled.step) if kernel == "compiled" else 0.0
    assert made.dtype == torch.float32
    assert made.shape == there.shape
    assert (made - there).abs().max() < 0.6 * rounding + 3e-4
    assert rounding < 1e-3 < 0.1 < there.std()


def test_a_cloud_larger_than_the_tables_goes_through_the_layers_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_compiled", False)
    plain, tabled = structures()
    points = torch.cat((torch.full((1, 1, 3), 100.0), clouds()["larger than the table"]), dim=1)
    assert torch.equal(plain(points), tabled(points))
    smaller = points / torch.tensor([[1.0], *[[2.0]] * 39])
    assert not torch.equal(plain(smaller), tabled(smaller))


# ----------------------------------------------------------------------------------------------------------- attention


def attentions(plain: Network | FastNetwork) -> tuple[RelativeAttention, FocusedAttention]:
    block = plain.fine_point_matching.steps[1]
    own_layer = block.sparse_layer.layers[0]
    assert isinstance(own_layer, Layer)
    relative, focused = own_layer.attention.attention, block.dense_layer.attention.attention
    assert isinstance(relative, RelativeAttention)
    assert isinstance(focused, FocusedAttention)
    return relative, focused


@pytest.mark.parametrize("count", [1, 2, 17, 40])
@pytest.mark.parametrize("size", [0.3, 2.0])
def test_attention_with_its_layer_in_the_query_is_the_plain_one(kernel: str, count: int, size: float) -> None:
    plain, fast = (attentions(one)[0] for one in both())
    assert isinstance(fast, FoldedAttention)
    _, tabled = structures()
    points = torch.cat((torch.full((2, 1, 3), 100.0), sphere(2, 39)), dim=1)
    structure = tabled(points)[:, :count, :count]
    x = size * random(2, count, 256)
    there = plain(x, tabled.values(structure))
    assert (fast(x, structure) - there).abs().max() < 2e-5 * there.abs().max()


def test_focusing_in_one_pass_is_the_plain_one(kernel: str) -> None:
    plain, fast = (attentions(one)[1] for one in both())
    assert isinstance(fast, OnePassAttention)
    x, memory = 3 * random(2, 33, 256), 3 * random(2, 20, 256, seed=1)
    x[0, 0] = -1
    there = plain.focus(x)
    assert ((fast.focus(x) - there).norm(dim=-1) / there.norm(dim=-1)).max() < 1e-5
    there = plain(x, memory)
    assert (fast(x, memory) - there).abs().max() < 1e-4 * there.abs().max()


# -------------------------------------------------------------------------------------------- surroundings of a point


def neighbourhoods() -> dict[str, Tensor]:
    """Return clouds by the number of neighbours within the radii 0.1 and 0.2."""
    return {
        "as of an object": sphere(2, 300),
        "none but the point": 20 * sphere(1, 35),
        "repeated": sphere(1, 20).repeat(1, 15, 1),
        "more than fit": 0.02 * sphere(1, 90),
        "some of each": torch.cat((0.03 * sphere(1, 70), 10 * sphere(1, 31), torch.full((1, 9, 3), 2.0)), dim=1),
        "one point": sphere(1, 1),
    }


@pytest.mark.parametrize("name", neighbourhoods())
def test_each_neighbour_once_gives_what_all_slots_give(kernel: str, name: str) -> None:
    plain, fast = (one.fine_point_matching.PE for one in both())
    assert isinstance(fast, NeighbourlyEncoding)
    assert type(plain) is PositionEncoding
    points = neighbourhoods()[name]
    there = plain(points)
    assert (fast(points) - there).abs().max() < 2e-5 * there.abs().max()


def test_the_clouds_above_fill_their_balls_as_their_names_say() -> None:
    def filled_slots(name: str) -> set[int]:
        points = neighbourhoods()[name]
        index = pointnet2_ext.ball_query(points, points, 0.1, 32)
        return {int(row.unique().numel()) for row in index.flatten(0, 1)}

    assert filled_slots("none but the point") == {1}
    assert filled_slots("more than fit") == {32}
    assert filled_slots("repeated") == {15}
    assert filled_slots("some of each") == {1, 9, 32}


# ------------------------------------------------------------------------------------------------- from logits to poses


def same_pose(made: Pose, there: Pose) -> None:
    assert rotation_angle_deg(made.R, there.R).max() < 0.005
    assert (made.t - there.t).abs().max() < 1e-4


@pytest.mark.parametrize("far", [0.0, 13.0])
@pytest.mark.parametrize("scene, model, surface", [(60, 80, 80), (33, 17, 17), (196, 196, 50)])
def test_the_voting_comes_to_the_same_pose(kernel: str, far: float, scene: int, model: int, surface: int) -> None:
    plain, fast = both()
    known = posed(2, scene, model, far=far)
    arguments = (known.logits, known.scene, known.model, known.surface[:, :surface], uniform(2, 3 * 1000))
    there = plain.coarse_pose(*arguments)
    same_pose(fast.coarse_pose(*arguments), there)
    assert rotation_angle_deg(there.R, known.R).max() < 10


def test_the_voting_without_kernels_takes_some_hypotheses_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_compiled", False)
    monkeypatch.setattr(cpu, "DISTANCES_AT_A_TIME", 7 * 2 * 60 * 80)
    plain, fast = both()
    known = posed(2, 60, 80)
    arguments = (known.logits, known.scene, known.model, known.surface, uniform(2, 3 * 400))
    same_pose(fast.coarse_pose(*arguments), plain.coarse_pose(*arguments))


@pytest.mark.parametrize("matches", [1, 2, 5])
def test_a_few_matches_give_a_pose_that_leaves_them_on_the_object(kernel: str, matches: int) -> None:
    known = posed(1, 60, 80)
    logits = known.logits.clone()
    logits[:, 1 + matches :, 0] = 20  # all others are of the background
    arguments = (logits, known.scene, known.model, known.surface, uniform(1, 3 * 1000))
    for one in both():
        there = start_at(known.scene, one.coarse_pose(*arguments))
        assert there[:, :matches].norm(dim=-1).max() < 2


@pytest.mark.parametrize("far", [0.0, 13.0])
@pytest.mark.parametrize("scene, model", [(60, 80), (301, 17), (300, 320)])
def test_the_last_pose_and_its_score_are_the_same(kernel: str, far: float, scene: int, model: int) -> None:
    plain, fast = both()
    known = posed(2, scene, model, far=far)
    there = plain.fine_pose(known.logits, known.scene, known.model, known.surface)
    made = fast.fine_pose(known.logits, known.scene, known.model, known.surface)
    same_pose(Pose(made.R, made.t), Pose(there.R, there.t))
    assert (made.score - there.score).abs().max() <= 1.001 / scene
    assert there.score.min() > 0.5
    assert there.score.max() < 0.9  # a fifth of the scene is of something else


@pytest.mark.parametrize("pose", ["coarse_pose", "fine_pose"])
def test_where_everything_is_background_the_pose_is_still_of_numbers(kernel: str, pose: str) -> None:
    known = posed(1, 60, 80)
    logits = known.logits.clone()
    logits[:, :, 0], logits[:, 0] = 20, 20
    draws = (uniform(1, 3 * 100),) if pose == "coarse_pose" else ()
    for one in both():
        made = getattr(one, pose)(logits, known.scene, known.model, known.surface, *draws)
        assert all(tensor.isfinite().all() for tensor in made)
        if pose == "fine_pose":
            assert made.score.tolist() == [0]


# ------------------------------------------------------------------------------------------------------- the whole way


@functools.cache
def asked() -> tuple[Scene, Tensor, Tensor, Tensor]:
    """Return two scenes, and points, features and surfaces of their objects."""
    points_m = 0.1 * sphere(2, 300, seed=1) * torch.tensor([1.0, 0.7, 0.5])
    R = rotations(2, seed=2)
    scene = Scene(
        rgb=torch.randint(256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)),
        points_m=points_m[:, torch.arange(300) % 200] @ R.mT + torch.tensor([0.1, 0, 0.9]),
        choose=pixels(2, 300),
        uniforms=uniform(2, 3 * SMALL.proposals),
    )
    return scene, points_m, random(2, 300, 256, seed=4), 0.1 * sphere(2, 100, seed=5)


def walked(network: Network) -> dict[str, Tensor]:
    """Run every stage on the output of the one before; the voting gets logits of a known pose."""
    scene, points_m, features, surface_m = asked()
    model: Model = network.model(network.describe(points_m, features, surface_m))
    cloud = network.look(scene, model.description.radius_m)
    coarse = network.match_coarsely(cloud, model)
    start = Pose(rotations(2, seed=2), torch.tensor([1.0, 0, 9]).expand(2, 3))
    fine = network.match_finely(cloud, model, start)
    pose = network.fine_pose(fine, cloud.points, model.description.points, model.description.surface)
    kept = {f"description {name}": tensor for name, tensor in model.description._asdict().items()}
    return {**kept, "features": cloud.features, "coarse logits": coarse, "fine logits": fine, "R": pose.R, "t": pose.t}


@functools.cache
def walked_plainly() -> dict[str, Tensor]:
    return walked(both()[0])


def test_every_stage_comes_to_what_the_plain_network_comes_to(kernel: str) -> None:
    made, there = walked(both()[1]), walked_plainly()
    assert made.keys() == there.keys()
    for name, tensor in there.items():
        assert made[name].shape == tensor.shape, name
        assert (made[name].double() - tensor).abs().max() < 1e-3, name
    assert there["fine logits"].std() > 0.1


def test_the_whole_network_answers_for_each_instance_as_for_it_alone(kernel: str) -> None:
    _, fast = both()
    scene, points_m, features, surface_m = asked()
    model = fast.model(fast.describe(points_m, features, surface_m))
    together = fast(scene, model)
    assert (together.R_cam_obj @ together.R_cam_obj.mT - torch.eye(3)).abs().max() < 1e-5
    row: Callable[[Tensor], Tensor] = lambda tensor: tensor[1:]  # noqa: E731
    alone = fast(
        Scene(*map(row, scene)), Model(type(model.description)(*map(row, model.description)), row(model.structure))
    )
    assert rotation_angle_deg(alone.R_cam_obj, together.R_cam_obj[1:]).max() < 0.01
    assert (alone.t_cam_obj_m - together.t_cam_obj_m[1:]).abs().max() < 1e-5


def test_the_fast_network_has_the_same_weights_and_no_others() -> None:
    plain, fast = both()
    own = fast.state_dict()
    assert own.keys() == plain.state_dict().keys()
    assert all(own[name].data_ptr() == tensor.data_ptr() for name, tensor in plain.state_dict().items())


def test_features_of_views_are_those_of_each_view_alone(kernel: str) -> None:
    _, fast = both()
    rgb = torch.randint(256, (3, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    choose, heard = pixels(3, 20), list[float]()
    picked = torch.tensor([45, 0, 59, 41, 3])  # of the third and the first view
    made = fast.features_of_views(rgb, choose, picked, heard.append)
    there = take(fast.features(rgb, choose).flatten(0, 1)[None], picked[None])[0]
    assert (made - there).abs().max() < 1e-5 * there.abs().max()
    assert heard == pytest.approx([1 / 3, 2 / 3, 1])
