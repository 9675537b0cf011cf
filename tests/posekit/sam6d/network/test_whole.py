"""The plain network: the released checkpoint's names, and the parts that later stages build on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from posekit.geometry import rotation_angle_deg
from posekit.sam6d.network.attention import RelativeAttention
from posekit.sam6d.network.coarse import (
    CoarseMatching,
    Pose,
    assign,
    choose_best,
    draw_pairs,
    keep_best,
    propose,
    surface_distance,
    weighted_procrustes,
)
from posekit.sam6d.network.config import Config
from posekit.sam6d.network.features import ImageNetwork, normalize
from posekit.sam6d.network.fine import explained, neighbourhoods, soft_matches, start_at, subset
from posekit.sam6d.network.structure import GeometricStructureEmbedding, SinusoidalEmbedding
from posekit.sam6d.network.whole import Description, Model, Network, furthest, in_radii, together
from tests.posekit.sam6d.support import Posed, filled, posed, random, rotations, sphere, uniform

STATE_DICT = Path(__file__).parents[4] / "../shared/sam6d/state_dict.json"


# --------------------------------------------------------------------------------------------------- names and numbers


def test_the_state_dict_is_the_released_checkpoints() -> None:
    if not STATE_DICT.is_file():
        pytest.skip("the folder shared/sam6d, which lists the released checkpoint's tensors, is not here")
    with torch.device("meta"):
        own = Network().state_dict()
    assert {name: list(tensor.shape) for name, tensor in own.items()} == json.loads(STATE_DICT.read_text())
    whole = {name for name, tensor in own.items() if tensor.dtype != torch.float32}
    assert whole == {name for name in own if name.endswith("num_batches_tracked")}
    assert {own[name].dtype for name in whole} == {torch.int64}
    assert (len(own), sum(tensor.numel() for tensor in own.values())) == (462, 107_940_590)


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, posekit.sam6d, posekit.sam6d.network.config; "
        "from posekit.sam6d.checkpoint import manifest, version; "
        "assert posekit.sam6d.VERSION; assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr


def test_pictures_are_normalised_in_the_order_their_channels_have() -> None:
    made = normalize(torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8))
    assert made.shape == (1, 3, 1, 1)
    wanted = [(0 - 0.485) / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert made.flatten().tolist() == pytest.approx(wanted, rel=1e-6)


def test_a_patch_is_cut_into_cells_row_by_row() -> None:
    config = Config(width=8, depth=1, image_heads=1, taken_blocks=(0,), channels=2)
    net = ImageNetwork(config, torch.nn.Linear)
    net.output_upscaling = torch.nn.Identity()  # type: ignore[assignment]
    patch, cell, channel = torch.meshgrid(torch.arange(196), torch.arange(16), torch.arange(2), indexing="ij")
    cells = net.cells(((patch * 100 + cell) * 10 + channel).float().view(1, 196, 32))
    assert cells.shape == (1, 2, 56, 56)
    row, column = 4 * 3 + 2, 4 * 5 + 1  # cell (2, 1) of patch (3, 5)
    assert cells[0, :, row, column].tolist() == [((3 * 14 + 5) * 100 + 2 * 4 + 1) * 10 + c for c in (0, 1)]


def test_numbers_are_embedded_as_sines_and_cosines_in_turns() -> None:
    made = SinusoidalEmbedding(8)(torch.tensor([0.0, 2.0]))
    assert made[0].tolist() == [0, 1] * 4
    assert made[1, :4].tolist() == pytest.approx([0.9093, -0.4161, 0.1987, 0.9801], abs=1e-4)


# -------------------------------------------------------------------------------------------------- structure of pairs


def structured(points: Tensor) -> tuple[Tensor, Tensor]:
    return GeometricStructureEmbedding(Config(channels=16)).indices(points)


def test_threads_change_no_bit_of_distances_and_angles() -> None:
    points = torch.cat((torch.full((1, 1, 3), 100.0), sphere(1, 196)), dim=1)
    alone = GeometricStructureEmbedding(Config(channels=16)).indices(points)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        together = GeometricStructureEmbedding(Config(channels=16)).indices(points)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_pair_is_told_by_its_distance_and_the_angles_to_the_nearest_neighbours() -> None:
    square = torch.tensor([[[100.0] * 3, [0, 0, 0], [0.1, 0, 0], [0, 0.2, 0], [0, 0, 0.3], [2.0, 2, 0]]])
    distance, angle = structured(square)
    assert distance[0, 1].tolist() == pytest.approx([866.0254, 0, 0.5, 1, 1.5, 14.1421], abs=1e-3)
    assert sorted(angle[0, 1, 5].tolist()) == pytest.approx([3, 3, 6], abs=1e-4)  # 45, 45 and 90 degrees by 15
    assert angle[0, 1, 2].sort().values.tolist() == pytest.approx([0, 6, 6], abs=1e-4)


def test_the_structure_of_a_cloud_is_the_same_wherever_it_is() -> None:
    cloud = sphere(1, 60)
    background = torch.full((1, 1, 3), 100.0)
    R = rotations(seed=5)
    here = structured(torch.cat((background, cloud), dim=1))
    there = structured(torch.cat((background, cloud @ R.mT + torch.tensor([1.0, -2, 13])), dim=1))
    assert (here[0] - there[0])[:, 1:, 1:].abs().max() < 2e-5
    assert (here[1] - there[1])[:, 1:, 1:].abs().max() < 2e-4


def test_repeated_points_have_a_structure_of_numbers() -> None:
    cloud = sphere(1, 5).repeat(1, 8, 1)
    for made in structured(torch.cat((torch.full((1, 1, 3), 100.0), cloud), dim=1)):
        assert made.isfinite().all()
        assert (made >= 0).all()


# ---------------------------------------------------------------------------------------------------------- the layers


def test_the_object_looks_at_the_scene_as_it_is_by_then() -> None:
    matching = CoarseMatching(Config(channels=32, heads=2, blocks=1), RelativeAttention)
    filled(matching)
    block = matching.steps[0]
    scene, model = random(1, 6, 32, seed=1), random(1, 7, 32, seed=2)
    scene_after, model_after = block.look_at_each_other(scene, model)
    assert torch.equal(scene_after, block.layers[1](scene, model))
    assert torch.equal(model_after, block.layers[1](model, scene_after))
    assert not torch.equal(model_after, block.layers[1](model, scene))


def test_a_point_is_stood_in_for_by_the_token_before_its_own() -> None:
    tokens = torch.arange(6.0)[None, :, None]  # the background's is 0, the points' are 1 to 5
    assert subset(tokens, torch.tensor([[0, 3, 4]])).flatten().tolist() == [0, 0, 3, 4]


def test_neighbours_are_told_as_seen_from_the_point_and_where_they_are() -> None:
    points = torch.tensor([[[0.0, 0, 0], [0.05, 0, 0], [5.0, 5, 5]]])
    seen = neighbourhoods(points, 0.1, 3)
    assert seen.shape == (1, 6, 3, 3)
    assert seen[0, 0, 1].tolist() == pytest.approx([-0.05, 0, -0.05])  # a slot left over repeats the first
    assert seen[0, 3, 1].tolist() == pytest.approx([0, 0.05, 0])
    assert seen[0, :3, 2].abs().max() == 0
    assert seen[0, 3:, 2].unique().tolist() == [5]


# ----------------------------------------------------------------------------------------------------------- the draws


def test_matches_are_drawn_as_often_as_their_score_to_the_power_of_one_and_a_half() -> None:
    score = torch.tensor([[[0.0, 1.0, 0.25], [0.5, 0.0, 2.0]]])
    picked = draw_pairs(score, uniform(1, 200_000))
    share = torch.bincount(picked[0], minlength=6) / picked.numel()
    wanted = score.flatten() ** 1.5 / (score**1.5).sum()
    assert (share - wanted).abs().max() < 0.005
    assert share[wanted == 0].sum() == 0


def test_draws_are_of_their_own_row_and_stay_inside_where_nothing_matches() -> None:
    score = torch.zeros(3, 4, 5)
    score[0, 1, 2], score[1, 3, 4] = 0.5, 1e-3
    picked = draw_pairs(score, uniform(3, 50, seed=1))
    assert picked[0].unique().tolist() == [1 * 5 + 2]
    assert picked[1].unique().tolist() == [3 * 5 + 4]
    assert picked[2].unique().tolist() == [4 * 5 - 1]


def test_points_that_rather_belong_to_the_background_have_no_score() -> None:
    known = posed(2, 40, 50)
    assignment = assign(known.logits)
    stray = torch.arange(40) % 5 == 4
    assert torch.equal(assignment.scene_matched, (~stray).float().expand(2, -1))
    assert assignment.score[:, stray].abs().max() == 0
    assert (assignment.score[:, ~stray].amax(dim=2) > 0.1).all()
    unseen = assignment.model_matched == 0
    assert 0 < unseen.sum() < unseen.numel()
    assert assignment.score.mT[unseen].abs().max() == 0


# ----------------------------------------------------------------------------------------------------------- Procrustes


@pytest.mark.parametrize("count", [3, 4, 50])
def test_a_known_motion_is_found_again(count: int) -> None:
    source, R, t = random(20, count, 3), rotations(20, seed=1), random(20, 3, seed=2)
    weight = 0.1 + uniform(20, count, seed=3)
    found_R, found_t = weighted_procrustes(source, source @ R.mT + t[:, None], weight)
    assert rotation_angle_deg(found_R, R).max() < 0.01
    assert (found_t - t).abs().max() < 1e-4


def test_points_of_no_weight_have_no_say() -> None:
    source, R, t = random(5, 20, 3), rotations(5, seed=1), random(5, 3, seed=2)
    target = source @ R.mT + t[:, None]
    target[:, 10:] = random(5, 10, 3, seed=4) * 10
    weight = (torch.arange(20) < 10).float().expand(5, -1)
    found_R, found_t = weighted_procrustes(source, target, weight)
    assert rotation_angle_deg(found_R, R).max() < 0.01
    assert (found_t - t).abs().max() < 1e-4


def test_a_mirrored_cloud_is_turned_and_not_mirrored() -> None:
    source = random(50, 12, 3)
    R, _ = weighted_procrustes(source, source * torch.tensor([1.0, 1, -1]), torch.ones(50, 12))
    assert (torch.linalg.det(R) - 1).abs().max() < 1e-5


def test_without_any_weight_the_motion_is_still_a_rotation() -> None:
    R, t = weighted_procrustes(random(2, 5, 3), random(2, 5, 3, seed=1), torch.zeros(2, 5))
    assert (R @ R.mT - torch.eye(3)).abs().max() < 1e-5
    assert t.abs().max() < 1e-6


def test_the_weights_sum_to_a_little_less_than_one_as_in_training() -> None:
    source = random(1, 4, 3) + torch.tensor([0.0, 0, 10])
    _, t = weighted_procrustes(source, source + torch.tensor([0.0, 0, 100.0]), torch.full((1, 4), 0.25))
    assert float(100 - t[0, 2]) == pytest.approx(100 * 1e-5, rel=0.1)


# -------------------------------------------------------------------------------------------------------------- voting


def test_hypotheses_explain_their_own_pairs_and_the_best_are_kept() -> None:
    known = posed(2, 30, 40)
    right = torch.cdist((known.scene - known.t[:, None]) @ known.R, known.model).argmin(dim=2)
    pairs = torch.stack([torch.arange(24) * 40 + right[b, :24] for b in range(2)])
    pairs[:, 9:] = torch.randint(30 * 40, (2, 15), generator=torch.Generator().manual_seed(0))
    made = propose(pairs, known.scene, known.model)
    assert made.residual[:, :1].max() < 0.05
    kept = keep_best(made, 3)
    least = made.residual.topk(3, dim=1, largest=False).indices
    assert torch.equal(kept.t, torch.stack([made.t[b, least[b]] for b in range(2)]))
    assert torch.equal(kept.R, torch.stack([made.R[b, least[b]] for b in range(2)]))
    assert keep_best(made, 100).t.shape == (2, 8, 3)


def test_the_distance_to_a_surface_is_that_to_its_nearest_point() -> None:
    surface = sphere(1, 500) * torch.tensor([1.0, 0.5, 0.5])
    R, t = rotations(1, 4, seed=1), random(1, 4, 3, seed=2) * 5
    scene = random(1, 9, 3, seed=3) + t[:, :1]
    distance = surface_distance(scene, Pose(R, t), surface)
    placed = surface[:, None] @ R.mT + t[:, :, None]
    nearest = torch.cdist(scene[:, None].double(), placed.double()).amin(dim=-1)
    assert distance.shape == (1, 4, 9)
    assert (distance - nearest).abs().max() < 1e-3


def test_the_pose_that_matched_points_lie_closest_under_wins() -> None:
    poses = Pose(rotations(2, 3), random(2, 3, 3))
    distance = torch.tensor([[[0.1, 9.0], [0.2, 0.0], [0.3, 0.0]]]).expand(2, -1, -1)
    matched = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    best = choose_best(poses, distance, matched)
    assert torch.equal(best.t, torch.stack([poses.t[0, 0], poses.t[1, 1]]))
    assert torch.equal(best.R, torch.stack([poses.R[0, 0], poses.R[1, 1]]))


# ----------------------------------------------------------------------------------------------------------- last pose


def test_soft_matches_lie_where_the_model_is_under_the_known_pose() -> None:
    known: Posed = posed(2, 60, 80)
    matches = soft_matches(known.logits, known.model)
    there = start_at(known.scene, Pose(known.R, known.t))
    off = (matches.points - there).norm(dim=-1)[matches.matched > 0]
    assert off.median() < 0.05
    assert matches.weight[matches.matched == 0].abs().max() == 0


def test_the_score_is_the_share_of_points_that_the_pose_explains() -> None:
    distance = torch.tensor([[0.1, 0.1, 0.2, 0.1], [0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1]])
    matched = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    scored = explained(Pose(rotations(3), random(3, 3)), distance, matched, 0.15)
    assert scored.score.tolist() == pytest.approx([2 / 3 * 3 / 4, 1, 0], abs=1e-6)


# ------------------------------------------------------------------------------------------------ furthest, with ties


def tournament(points: Tensor, count: int) -> list[int]:
    """Imitate the original's kernel, thread by thread: T threads with every T-th point, then halves against halves."""
    threads = 1
    while threads * 2 <= min(len(points), 512):
        threads *= 2
    nearest, picked = torch.full((len(points),), 1e10), [0]
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, (points - points[picked[-1]]).square().sum(-1))
        best = []
        for thread in range(threads):
            mine = nearest[thread::threads]
            best.append((float(mine.max()), thread + threads * int(mine.argmax())))
        while len(best) > 1:
            half = len(best) // 2
            best = [b if b[0] > a[0] else a for a, b in zip(best[:half], best[half:], strict=True)]
        picked.append(best[0][1])
    return picked


@pytest.mark.parametrize("count", [1, 2, 6, 100, 511, 700, 1030])
def test_of_points_equally_far_the_originals_choice_is_taken(count: int) -> None:
    points = torch.randint(4, (2, count, 3), generator=torch.Generator().manual_seed(count)).float()
    picked = furthest(points, min(count, 40))
    for row, cloud in zip(picked, points, strict=True):
        assert row.tolist() == tournament(cloud, min(count, 40))


def test_a_tie_goes_to_the_thread_whose_number_is_smaller_read_backwards() -> None:
    points = torch.zeros(1, 1024, 3)
    for index, place in {1: (1, 0, 0), 256: (-1, 0, 0), 768: (0, 1, 0), 512: (0, -1, 0)}.items():
        points[0, index] = torch.tensor(place)
    assert furthest(points, 2).tolist() == [[0, 512]]  # thread 0's second point; then 256 and 768 of thread 256
    points[0, 512] = 0
    assert furthest(points, 2).tolist() == [[0, 256]]


# ------------------------------------------------------------------------------------------------------------- batches


def test_models_are_put_together_row_by_row_and_a_single_one_is_not_copied() -> None:
    def model(seed: int) -> Model:
        shapes = ((1,), (1, 5, 3), (1, 4, 3), (1, 3), (1, 4, 8), (1, 6, 8), (1, 4, 8))
        kept = Description(*(random(*shape, seed=seed + index) for index, shape in enumerate(shapes)))
        return Model(kept._replace(sparse=torch.tensor([[4, 0, seed]])), random(1, 4, 4, 8, seed=seed))

    one, other = model(1), model(2)
    assert together([one]) is one
    both = together([one, other])
    assert torch.equal(both.sparse_points[1:], other.sparse_points)
    assert torch.equal(both.structure[:1], one.structure)
    assert torch.equal(both.sparse_points[0, 2], one.description.points[0, 1])
    assert both.nbytes == one.nbytes + other.nbytes


def test_lengths_are_in_radii_as_the_original_divides_them() -> None:
    points_m = torch.tensor([[[0.2, 0, 0]], [[0.2, 0, 0]]])
    assert in_radii(points_m, torch.tensor([0.1, 1e-6]))[:, 0, 0].tolist() == pytest.approx([0.2 / 0.100001, 1e5])
