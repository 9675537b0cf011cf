"""The network's compiled loops: sizes around a block, batches, threads, bad input, and fallbacks without them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from posekit.geometry import rotation_angle_deg
from posekit.sam6d import kernels
from posekit.sam6d.network.coarse import Pose, propose, surface_distance
from posekit.sam6d.network.fine import SoftMatches, soft_matches
from tests.posekit.sam6d.support import random, rotations, sphere, uniform

Arguments = tuple[Any, ...]
compiled = pytest.mark.skipif(kernels.kernel_for("cpu") == "reference", reason="no compiled kernels here")


# --------------------------------------------------------------------------------------- hypotheses, in closed form


def drawn(batch: int, triples: int, scene: int, model: int, seed: int = 0) -> Tensor:
    """Return pairs as `propose` takes them, (batch, 3 triples)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(scene * model, (batch, 3 * triples), generator=generator)


def spreads(pairs: Tensor, scene: Tensor, model: Tensor) -> Tensor:
    """Return how far triples are from a line, (B, H): second over first singular value of what turns them."""
    of_scene, of_model = (
        points.double().gather(1, index[..., None].expand(-1, -1, 3)).unflatten(1, (-1, 3))
        for points, index in ((scene, pairs // model.shape[1]), (model, pairs % model.shape[1]))
    )
    centred = [points - points.mean(dim=2, keepdim=True) for points in (of_scene, of_model)]
    values = torch.linalg.svdvals(centred[0].mT @ centred[1])
    ratio: Tensor = values[..., 1] / values[..., 0].clamp(min=1e-12)
    return ratio


@compiled
@pytest.mark.parametrize("away", [0.0, 13.0])
def test_proposals_are_those_of_the_decomposition(away: float) -> None:
    scene, model = sphere(2, 40) + torch.tensor([0.1, 0.2, 1]) * away, sphere(2, 33, seed=1)
    pairs = drawn(2, 700, 40, 33)
    R, t, residual = kernels.propose(pairs, scene, model)
    there = propose(pairs, scene.double(), model.double())
    apart = spreads(pairs, scene, model) > 0.03
    assert apart.float().mean() > 0.8
    assert rotation_angle_deg(R.double(), there.R)[apart].max() < 1e-3
    assert (t - there.t)[apart].abs().max() < 3e-5 * (1 + away)
    assert (residual - there.residual)[apart].abs().max() < 1e-5 * (1 + away)
    assert (torch.linalg.det(R) - 1).abs().max() < 1e-5


@compiled
def test_a_known_motion_of_three_points_is_found_wherever_the_third_lies() -> None:
    model = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0.5, 0.01, 0]]]).repeat(60, 1, 1)
    model[30:] = model[30:].roll(1, dims=1)
    model = model @ rotations(60, seed=3).mT
    R, t = rotations(60, seed=1), random(60, 3, seed=2)
    pairs = torch.arange(3).expand(60, 3) * 4
    found_R, found_t, residual = kernels.propose(pairs, model @ R.mT + t[:, None], model)
    assert rotation_angle_deg(found_R[:, 0], R).max() < 0.02
    assert (found_t[:, 0] - t).abs().max() < 1e-4
    assert residual.max() < 1e-5


@compiled
@pytest.mark.parametrize("places", [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 2)])
def test_three_points_on_a_line_go_nowhere_and_keep_their_residual(places: tuple[int, int, int]) -> None:
    line = torch.tensor([[[0.1, 0.2, 0.3]]]) + torch.tensor([0.0, 0.25, 1.0])[None, :, None] * sphere(8, 1)
    other = sphere(8, 3, seed=1) + torch.tensor([0.0, 0, 13])
    chosen = torch.tensor([places])
    for scene, model in ((other, line), (line, other)):
        pairs = (torch.arange(3) * 3 + chosen if scene is other else chosen * 3 + torch.arange(3)).expand(8, 3)
        R, t, residual = kernels.propose(pairs, scene, model)
        assert t.abs().min() > 1e5
        assert (R @ R.mT - torch.eye(3)).abs().max() < 1e-5
        there = propose(pairs, scene.double(), model.double()).residual
        assert (residual - there).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------ distance to a surface


@compiled
@pytest.mark.parametrize("poses, points, surface", [(1, 1, 1), (3, 3, 15), (7, 5, 16), (9, 33, 17), (20, 196, 100)])
def test_distances_are_those_to_the_nearest_point_where_they_are_wanted(poses: int, points: int, surface: int) -> None:
    scene, of_model = 0.3 * random(2, points, 3) + 13, sphere(2, surface, seed=1)
    R, t = rotations(2, poses, seed=2), 13 + 0.2 * random(2, poses, 3, seed=3)
    wanted = (uniform(2, points, seed=4) < 0.7).float()
    distance = kernels.surface_distance(scene, R, t, of_model, wanted)
    there = surface_distance(scene.double(), Pose(R.double(), t.double()), of_model.double())
    assert distance.shape == (2, poses, points)
    assert (distance - there * wanted[:, None]).abs().max() < 2e-5


@compiled
def test_where_no_point_is_wanted_all_distances_are_zero() -> None:
    made = kernels.surface_distance(random(1, 6, 3), rotations(1, 9), random(1, 9, 3), sphere(1, 20), torch.zeros(1, 6))
    assert made.abs().max() == 0


@compiled
def test_a_pose_nowhere_is_far_from_everything() -> None:
    t = torch.full((1, 2, 3), 1e6)
    made = kernels.surface_distance(sphere(1, 5), rotations(1, 2), t, sphere(1, 20), torch.ones(1, 5))
    assert made.isfinite().all()
    assert made.min() > 1e6


# ------------------------------------------------------------------------------------------------------- soft matches


def logits_of(batch: int, scene: int, model: int, seed: int = 0) -> Tensor:
    """Return cosines over the temperature, up to 10 in size; some rows and columns favour the background."""
    made = (3 * random(batch, 1 + scene, 1 + model, seed=seed)).clamp(-10, 10)
    made[:, ::3, 0] += 6
    made[:, 0, ::4] += 6
    return made


def assert_same_matches(logits: Tensor, model: Tensor) -> SoftMatches:
    made = SoftMatches(*kernels.soft_matches(logits, model))
    there = soft_matches(logits.double(), model.double())
    assert torch.equal(made.matched, there.matched.float())
    assert (made.points - there.points).abs().max() < 1e-5
    assert (made.weight - there.weight).abs().max() < 1e-5
    return made


@compiled
@pytest.mark.parametrize("scene, model", [(1, 1), (1, 15), (15, 1), (15, 16), (16, 15), (17, 31), (300, 320)])
def test_soft_matches_are_those_of_two_whole_softmaxes(scene: int, model: int) -> None:
    made = assert_same_matches(logits_of(3, scene, model), sphere(3, model, seed=1))
    if scene > 1 and model > 1:
        assert 0 < made.matched.sum() < made.matched.numel()


@compiled
def test_a_point_of_the_background_has_no_match_and_no_weight() -> None:
    logits = logits_of(1, 20, 30)
    logits[:, 5, 0] = 30
    made = assert_same_matches(logits, sphere(1, 30))
    assert made.matched[0, 4] == made.weight[0, 4] == made.points[0, 4].abs().max() == 0


@compiled
@pytest.mark.parametrize("offset", [-1000.0, 80.0, 1000.0])
def test_an_offset_of_all_logits_changes_nothing(offset: float) -> None:
    assert_same_matches(logits_of(2, 40, 50) + offset, sphere(2, 50))


@compiled
def test_rows_and_columns_far_below_the_others_keep_their_matches() -> None:
    logits = random(1, 1 + 30, 1 + 40).clamp(-2, 2)
    logits[:, 7] -= 36
    logits[:, :, 9] -= 36
    assert_same_matches(logits, sphere(1, 40))


@compiled
def test_where_everything_is_background_there_is_no_match() -> None:
    logits = torch.zeros(1, 21, 18)
    logits[:, :, 0], logits[:, 0] = 9, 9
    made = assert_same_matches(logits, sphere(1, 17))
    assert made.matched.sum() == 0


# --------------------------------------------------------------------------------- attention, focusing, tables, ball


@compiled
@pytest.mark.parametrize("count", [1, 3, 4, 18, 70])
@pytest.mark.parametrize("sharp", [0.1, 3.0])
def test_attention_to_structure_is_a_softmax_over_both_products(count: int, sharp: float) -> None:
    q, k, v = (random(2, count, 256, seed=seed) for seed in (1, 2, 3))
    folded = sharp * random(2, count, 4, 256, seed=4)
    structure = torch.randint(-999, 1000, (2, count, count, 256), generator=torch.Generator().manual_seed(5))
    made = kernels.relative_attention(q, k, v, folded / 999, structure.to(torch.int16))
    q, k, v = (x.double().unflatten(-1, (4, 64)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT + torch.einsum("bnhc,bnmc->bhnm", folded.double() / 999, structure.double())
    there = ((scores / 8).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    assert (made - there).abs().max() < 2e-5


@compiled
@pytest.mark.parametrize("rows, channels", [(1, 16), (7, 256)])
def test_focusing_takes_the_third_power_and_keeps_the_length(rows: int, channels: int) -> None:
    x, scale = 5 * random(2, rows, channels), 0.4 + uniform(channels, seed=1)
    x[0, 0] = -1  # nothing of it passes the ReLU
    made = kernels.focus(x, scale)
    y = (x.double().relu() + 1e-6) / scale
    there = y**3 * (y.norm(dim=-1, keepdim=True) / (y**3).norm(dim=-1, keepdim=True))
    assert ((made - there).norm(dim=-1) / y.norm(dim=-1)).max() < 1e-5


@compiled
@pytest.mark.parametrize("neighbours", [1, 3, 8])
def test_a_table_is_read_between_its_rows_and_goes_on_beyond_the_last(neighbours: int) -> None:
    distances, angles = random(5, 32, seed=1), random(9, 32, seed=2)
    distance, angle = 7 * uniform(2, 6, 6, seed=3), 6 * uniform(2, 6, 6, neighbours, seed=4)
    made = kernels.embed(distance, angle, distances, angles, 1.5, 1e-3)

    def read(number: Tensor, table: Tensor) -> Tensor:
        row = (number * 1.5).long().clamp(max=len(table) - 2)
        return torch.lerp(table[row], table[row + 1], (number * 1.5 - row)[..., None])

    there = read(distance, distances) + read(angle, angles).amax(dim=3)
    assert made.dtype == torch.int16
    assert (made * 1e-3 - there).abs().max() < 0.6e-3


def layers_of(seed: int = 0) -> list[Tensor]:
    shapes = ((32, 64), (64,), (64, 128), (128,))
    return [0.2 * random(*shape, seed=seed + index) for index, shape in enumerate(shapes)]


@compiled
@pytest.mark.parametrize("slots", [1, 3, 4, 5, 64])
def test_the_surroundings_are_the_most_of_each_neighbour_whatever_is_left_over(slots: int) -> None:
    there, here, layers = random(2, 40, 32), random(2, 40, 32, seed=1), layers_of()
    index = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(80)])
    index = index.repeat(1, 2)[:, :slots].view(2, 40, slots)
    count = torch.arange(80).view(2, 40, 1) % slots + 1
    index = torch.where(torch.arange(slots) < count, index, index[..., :1])
    made = kernels.look_around(there, here, index, layers)
    of_each = there.gather(1, index.flatten(1)[..., None].expand(-1, -1, 32)).view(2, 40, slots, 32)
    second = ((of_each - here[:, :, None]).relu() @ layers[0] + layers[1]).relu()
    wanted = (second @ layers[2] + layers[3]).relu().amax(dim=2)
    assert (made - wanted).abs().max() < 1e-5


# --------------------------------------------------------------------------------------------- threads and batch-mates


def many(batch: int) -> dict[str, tuple[Callable[..., Any], Arguments]]:
    """Return every op with enough work for several threads; a batch's arguments come first, then `shared` ones."""
    n, points = 60, sphere(batch, 196)
    structure = torch.randint(-999, 999, (batch, n, n, 256), generator=torch.Generator().manual_seed(1))
    angle = 6 * uniform(batch, n, n, 3, seed=2)
    index = torch.randint(196, (batch, 196, 32), generator=torch.Generator().manual_seed(3))
    of_pairs = [random(batch, n, 256, seed=seed) for seed in (4, 5, 6)]
    tables = (random(99, 64, seed=7), random(99, 64, seed=8), 10.0, 1e-3)
    poses = (rotations(batch, 50), random(batch, 50, 3))
    return {
        "embed": (lambda a, b: kernels.embed(a, b, *tables), (angle[..., 0].contiguous(), angle)),
        "focus": (partial(_second, kernels.focus, uniform(256) + 0.5), (random(batch, 1000, 256),)),
        "look_around": (
            lambda a, b, c: kernels.look_around(a, b, c, layers_of()),
            (random(batch, 196, 32), random(batch, 196, 32, seed=1), index),
        ),
        "propose": (kernels.propose, (drawn(batch, 3000, 196, 196), points + 13, points)),
        "relative_attention": (
            kernels.relative_attention,
            (*of_pairs, 1e-3 * random(batch, n, 4, 256), structure.to(torch.int16)),
        ),
        "soft_matches": (kernels.soft_matches, (logits_of(batch, 300, 196), points)),
        "surface_distance": (kernels.surface_distance, (points, *poses, sphere(batch, 100), torch.ones(batch, 196))),
    }


def _second(op: Callable[[Tensor, Tensor], Tensor], second: Tensor, first: Tensor) -> Tensor:
    return op(first, second)


def tensors(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


@compiled
@pytest.mark.parametrize("op", kernels.OPS)
def test_threads_and_batch_mates_change_no_bit(op: str) -> None:
    run, arguments = many(batch=3)[op]
    together = tensors(run(*arguments))
    torch.set_num_threads(2)
    for mine, other in zip(together, tensors(run(*arguments)), strict=True):
        assert torch.equal(mine, other)
    torch.set_num_threads(1)
    alone = tensors(run(*(argument[1:2] for argument in arguments)))
    for mine, other in zip(together, alone, strict=True):
        assert torch.equal(mine[1:2], other)
        assert mine.float().abs().max() > 0


@compiled
@pytest.mark.parametrize("op", kernels.OPS)
def test_arguments_need_not_lie_row_by_row(op: str) -> None:
    run, arguments = many(batch=2)[op]
    strided = [torch.stack((argument, argument), dim=-1)[..., 0] for argument in arguments]
    assert not any(argument.is_contiguous() for argument in strided)
    for mine, other in zip(tensors(run(*arguments)), tensors(run(*strided)), strict=True):
        assert torch.equal(mine, other)


@compiled
@pytest.mark.parametrize("op", kernels.OPS)
def test_of_no_rows_there_is_no_answer(op: str) -> None:
    run, arguments = many(batch=1)[op]
    for made in tensors(run(*(argument[:0] for argument in arguments))):
        assert len(made) == 0


@compiled
@pytest.mark.parametrize("op", kernels.OPS)
def test_the_ops_change_no_argument_and_return_none(op: str) -> None:
    run, arguments = many(batch=1)[op]
    before = [argument.clone() for argument in arguments]
    made = tensors(run(*arguments))
    assert all(torch.equal(argument, copy) for argument, copy in zip(arguments, before, strict=True))
    assert not {tensor.data_ptr() for tensor in made} & {argument.data_ptr() for argument in arguments}


# ------------------------------------------------------------------------------------------------------------ bad input


def changed(op: str, place: int, change: Callable[[Tensor], Tensor]) -> None:
    run, arguments = many(batch=2)[op]
    run(*arguments[:place], change(arguments[place]), *arguments[place + 1 :])


@compiled
@pytest.mark.parametrize(
    "op, place, change, words",
    [
        ("embed", 0, lambda x: x[:, 1:], r"distance must be \(B, N, N\)|distance must be \[2, 59, 59\]"),
        ("embed", 1, lambda x: x[:, :, 1:], r"angle must be \[2, 60, 60, 3\], got \[2, 60, 59, 3\]"),
        ("embed", 1, lambda x: x.repeat(1, 1, 1, 3), "angle must have 1 to 8 neighbours, got 9"),
        ("embed", 1, lambda x: x.double(), "angle must be Float, got Double"),
        ("focus", 0, lambda x: x[..., :255], r"x must be \(B, N, 16 n\)"),
        ("focus", 0, lambda x: x[..., :240], r"scale must be \[240\], got \[256\]"),
        ("focus", 0, lambda x: x.half(), "x must be Float, got Half"),
        ("look_around", 0, lambda x: x[..., :31], r"there must be \[2, 196, 32\], got \[2, 196, 31\]"),
        ("look_around", 1, lambda x: x[:, 1:], r"here must be \[2, 196, 32\], got \[2, 195, 32\]"),
        ("look_around", 2, lambda x: x.int(), "index must be Long, got Int"),
        ("look_around", 2, lambda x: x + 1, "index must lie within the points"),
        ("look_around", 2, lambda x: x - 1, "index must lie within the points"),
        ("look_around", 2, lambda x: x[..., :0], "index must have at least one slot"),
        ("propose", 0, lambda x: x[:, 1:], r"pairs must be \(B, 3 H\)"),
        ("propose", 0, lambda x: x - 1000, "pairs must lie within N x M"),
        ("propose", 0, lambda x: x + 1000, "pairs must lie within N x M"),
        ("propose", 0, lambda x: x.float(), "pairs must be Long, got Float"),
        ("propose", 1, lambda x: x[..., :2], r"scene must be \[2, 196, 3\], got \[2, 196, 2\]"),
        ("propose", 2, lambda x: x.double(), "model must be Float, got Double"),
        ("relative_attention", 0, lambda x: x[..., :128], r"q must be \(B, N, 256\)"),
        ("relative_attention", 2, lambda x: x[:, 1:], r"v must be \[2, 60, 256\], got \[2, 59, 256\]"),
        ("relative_attention", 3, lambda x: x[:, :, :2], r"folded must be \[2, 60, 4, 256\]"),
        ("relative_attention", 4, lambda x: x[:, :, 1:], r"structure must be \[2, 60, 60, 256\]"),
        ("relative_attention", 4, lambda x: x.float(), "structure must be Short, got Float"),
        ("soft_matches", 0, lambda x: x[:, :1], r"logits must be \(B, 1 \+ N, 1 \+ M\)"),
        ("soft_matches", 0, lambda x: x.double(), "logits must be Float, got Double"),
        ("soft_matches", 1, lambda x: x[:, 1:], r"model must be \[2, 196, 3\], got \[2, 195, 3\]"),
        ("surface_distance", 1, lambda x: x[:, 1:], r"R must be \[2, 50, 3, 3\], got \[2, 49, 3, 3\]"),
        ("surface_distance", 3, lambda x: x[:, :0], "surface must hold at least 1 point"),
        ("surface_distance", 4, lambda x: x > 0, "wanted must be Float, got Bool"),
        ("surface_distance", 0, lambda x: x[0], "must be 3-d"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_words(
    op: str, place: int, change: Callable[[Tensor], Tensor], words: str
) -> None:
    with pytest.raises(RuntimeError, match=words):
        changed(op, place, change)


@compiled
def test_layers_that_do_not_fit_are_refused_in_words() -> None:
    run = partial(kernels.look_around, random(1, 5, 32), random(1, 5, 32), torch.zeros(1, 5, 2, dtype=torch.long))
    second, bias, third, last = layers_of()
    with pytest.raises(RuntimeError, match="layers must be contiguous"):
        run([second.T.contiguous().T, bias, third, last])
    with pytest.raises(RuntimeError, match=r"layers\[2\] must be \[64, 128\]"):
        run([second, bias, third.T.contiguous(), last])
    with pytest.raises(RuntimeError, match="layers four"):
        run([second, bias, third])


# ------------------------------------------------------------------------------------------------------ without them


def test_kernel_for_says_compiled_exactly_where_the_library_lies() -> None:
    built = (Path(kernels.__file__).parent / "_kernels_cpu.so").exists()
    assert kernels.kernel_for(torch.device("cpu")) == ("compiled" if built else "reference")
    assert kernels.kernel_for("cuda:1") == "reference"
    assert kernels.kernels("cpu") == dict.fromkeys(kernels.OPS, kernels.kernel_for("cpu"))


@compiled
def test_every_op_of_the_library_is_listed() -> None:
    assert all(hasattr(torch.ops.sam6d, op) for op in kernels.OPS)
    assert set(many(batch=1)) == set(kernels.OPS)


@pytest.mark.slow
def test_a_copy_of_the_package_without_its_library_says_so_and_works(tmp_path: Path) -> None:
    package = Path(kernels.__file__).parents[1]
    shutil.copytree(package, tmp_path / "posekit", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        "import posekit\nfrom posekit.sam6d import kernels\n"
        f"assert posekit.__file__.startswith({str(tmp_path)!r})\n"
        "print(kernels.kernel_for('cpu'), kernels.kernel_for('cuda'))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == ["reference", "reference"]
    assert "posekit.sam6d has no compiled kernels" in answer.stderr
