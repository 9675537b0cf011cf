"""The network for a GPU: answers equal the plain network's, geometry stays float32, and it never waits for the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from posekit import geometry
from posekit.geometry import rotation_angle_deg
from posekit.sam6d.network import coarse
from posekit.sam6d.network.coarse import Pose
from posekit.sam6d.network.config import Config
from posekit.sam6d.network.fine import start_at
from posekit.sam6d.network.whole import Model, Network, Poses, Scene, together
from posekit.sam6d.quick import gpu
from posekit.sam6d.quick.cpu import FastNetwork
from posekit.sam6d.quick.gpu import GpuNetwork, Linear, Runner, matrix_units

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SMALL = Config(
    width=48,
    depth=4,
    image_heads=3,
    taken_blocks=(0, 1, 2, 3),
    coarse_points=24,
    fine_points=192,
    proposals=300,
    kept=30,
    model_points=128,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)
    torch.backends.cudnn.allow_tf32 = tf32


class Small:
    """A small network with made-up weights, and instances of two objects for it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        with torch.inference_mode():
            self.plain = Network(SMALL)
            points = torch.randn(2, SMALL.fine_points, 3) * 0.03
            surface = torch.randn(2, SMALL.model_points, 3) * 0.03
            seen = torch.randn(2, SMALL.fine_points, SMALL.channels)
            self._described = self.plain.describe(points, seen, surface)

    def scene(self, rows: int) -> Scene:
        draw = torch.Generator().manual_seed(1)
        return Scene(
            rgb=torch.randint(0, 256, (rows, 224, 224, 3), dtype=torch.uint8, generator=draw),
            points_m=torch.randn(rows, SMALL.fine_points, 3, generator=draw) * 0.03 + torch.tensor([0, 0, 0.6]),
            choose=torch.randint(0, 224**2, (rows, SMALL.fine_points), generator=draw),
            uniforms=torch.rand(rows, 3 * SMALL.proposals, generator=draw),
        )

    def models(self, network: Network, rows: int) -> list[Model]:
        one = [network.model(type(self._described)(*(value[k, None] for value in self._described))) for k in (0, 1)]
        return [one[row % 2] for row in range(rows)]


@pytest.fixture(scope="module")
def small() -> Small:
    return Small()


def on(scene: Scene, device: str) -> Scene:
    return Scene(*(field.to(device) for field in scene))


# ---------------------------------------------------------------------------------------------------------------- poses


def test_rotations_are_those_of_the_decomposition_mirrored_and_flat_matrices_included() -> None:
    torch.manual_seed(0)
    M = torch.randn(300, 3, 3)
    M[100:200] *= torch.tensor([1.0, 1.0, 0.0])
    assert (torch.linalg.det(M[:100]) < 0).any()
    apart = rotation_angle_deg(gpu.nearest_rotation(M).double(), geometry.nearest_rotation(M.double()))
    assert apart.max() < 1e-4


def test_a_matrix_that_leaves_the_rotation_open_gives_one_of_the_best() -> None:
    torch.manual_seed(0)
    M = torch.randn(50, 3, 1) @ torch.randn(50, 1, 3)
    R = gpu.nearest_rotation(M)
    torch.testing.assert_close(R @ R.mT, torch.eye(3).expand(50, 3, 3))
    torch.testing.assert_close((R * M).sum((1, 2)), (geometry.nearest_rotation(M) * M).sum((1, 2)))
    torch.testing.assert_close(gpu.nearest_rotation(torch.zeros(1, 3, 3)), torch.eye(3)[None])


def test_proposals_are_those_of_the_decomposition_where_three_points_fix_a_pose() -> None:
    torch.manual_seed(0)
    scene, model = torch.randn(2, 40, 3) + torch.tensor([0.0, 0.0, 13.0]), torch.randn(2, 50, 3)
    pairs = torch.randint(0, 40 * 50, (2, 3 * 200))
    mine, plain = gpu.propose(pairs, scene, model), coarse.propose(pairs, scene, model)
    fixed = mine.t[..., 0] < gpu.NOWHERE / 2
    assert fixed.float().mean() > 0.8
    assert rotation_angle_deg(mine.R[fixed].double(), plain.R[fixed].double()).max() < 0.01
    torch.testing.assert_close(mine.t[fixed], plain.t[fixed], atol=1e-3, rtol=0)
    torch.testing.assert_close(mine.residual, plain.residual, atol=1e-4, rtol=0)


def test_a_proposal_of_points_on_a_line_keeps_its_residual_and_lies_where_it_cannot_win() -> None:
    points = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 3, 0]]])
    pairs = torch.tensor([[0, 5, 10, 0, 0, 0, 0, 5, 15]])  # on a line, three times one point, a triangle
    found = gpu.propose(pairs, points, points)
    torch.testing.assert_close(found.residual, torch.zeros(1, 3), atol=1e-5, rtol=0)
    assert found.t[0].norm(dim=-1).tolist() == pytest.approx([3**0.5 * gpu.NOWHERE, 3**0.5 * gpu.NOWHERE, 0], abs=1)


def test_distances_to_the_surface_are_the_plain_ones() -> None:
    torch.manual_seed(0)
    scene, surface = torch.randn(2, 30, 3), torch.randn(2, 70, 3)
    poses = Pose(geometry.nearest_rotation(torch.randn(2, 5, 3, 3)), torch.randn(2, 5, 3))
    mine, plain = gpu.surface_distance(scene, poses, surface), coarse.surface_distance(scene, poses, surface)
    torch.testing.assert_close(mine.square(), plain.square(), atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------------------- network


def stages(network: Network, scene: Scene, models: list[Model]) -> dict[str, Tensor]:
    """Return each stage's output for the same input, ignoring the scene's coarse pose."""
    model = together(models)
    cloud = network.look(scene, model.description.radius_m)
    start = Pose(torch.eye(3).expand(len(models), 3, 3), cloud.points.mean(dim=1))
    fine = network.match_finely(cloud, model, start)
    return {
        "features": cloud.features,
        "structure": network.geo_embedding.values(cloud.structure),
        "position encoding": network.position_encoding(start_at(cloud.points, start)),
        "coarse logits": network.match_coarsely(cloud, model),
        "fine logits": fine,
        "pose": network.fine_pose(fine, cloud.points, model.description.points, model.description.surface).R,
    }


@pytest.mark.parametrize("precision, tolerance", [("float32", 2e-5), ("tf32", 2e-5), ("bf16", 0.05)])
def test_every_stage_gives_what_the_plain_network_gives(small: Small, precision: str, tolerance: float) -> None:
    """On a CPU TF32 is float32."""
    network = GpuNetwork.of(small.plain, precision)
    plain = stages(small.plain, small.scene(2), small.models(small.plain, 2))
    for stage, mine in stages(network, small.scene(2), small.models(network, 2)).items():
        scale = plain[stage].abs().max().item()
        assert (mine - plain[stage]).abs().max() <= tolerance * scale, stage


def test_the_voting_takes_the_plain_networks_pose(small: Small) -> None:
    torch.manual_seed(0)
    points = torch.randn(2, SMALL.coarse_points, 3)
    R = geometry.nearest_rotation(torch.randn(2, 3, 3))
    scene = points @ R.mT + torch.tensor([0.0, 0.0, 13.0])
    logits = torch.zeros(2, SMALL.coarse_points + 1, SMALL.coarse_points + 1)
    logits.diagonal(dim1=1, dim2=2).fill_(6)
    uniforms = torch.rand(2, 3 * SMALL.proposals)
    found = [
        network.coarse_pose(logits, scene, points, points, uniforms)
        for network in (small.plain, GpuNetwork.of(small.plain))
    ]
    assert rotation_angle_deg(found[1].R.double(), R.double()).max() < 1
    assert rotation_angle_deg(found[1].R.double(), found[0].R.double()).max() < 0.01
    torch.testing.assert_close(found[1].t, found[0].t, atol=1e-4, rtol=0)


def test_a_distance_beyond_the_table_counts_as_the_tables_last(small: Small) -> None:
    structure = GpuNetwork.of(small.plain, "bf16").geo_embedding
    assert isinstance(structure, gpu.Structure)
    line = torch.arange(6.0)[None, :, None] * torch.tensor([3.0, 0.1, 0.2])  # some 15 units of the table apart
    values = structure(line)
    torch.testing.assert_close(values[0, 1, 5], values[0, 2, 5])
    assert not torch.equal(values[0, 1, 2], values[0, 1, 5])


def test_an_unknown_precision_is_refused(small: Small) -> None:
    with pytest.raises(ValueError, match="precision must be one of float32, tf32, bf16, not 'fp8'"):
        GpuNetwork.of(small.plain, "fp8")


def test_the_network_it_is_made_of_keeps_its_weights(small: Small) -> None:
    before = {name: value.clone() for name, value in small.plain.state_dict().items()}
    narrow = GpuNetwork.of(small.plain, "bf16").state_dict()
    assert list(narrow) == list(before)
    for name, value in small.plain.state_dict().items():
        assert torch.equal(value, before[name])


# ------------------------------------------------------------------------------------------------- what torch is asked


class Asked(TorchDispatchMode):
    """Records each operator: its name, the types of its tensors, and whether products may take TF32."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Tensor], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        self.calls.append((func.overloadpacket.__name__, tensors, torch.backends.cuda.matmul.allow_tf32))
        return func(*args, **(kwargs or {}))


def asked(network: Network, small: Small) -> Asked:
    """Record the operators of a pass of two, outside of inference mode, which hides the parts of compound operators."""
    scene, model = small.scene(2), together(small.models(network, 2))
    with torch.inference_mode(False), torch.no_grad(), Asked() as mode:
        network(scene, model)
    return mode


FROM_THE_HOST = {"_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal", "is_nonzero", "_linalg_svd"}


@pytest.mark.parametrize("precision", gpu.PRECISIONS)
def test_no_pass_waits_for_the_host_so_that_a_graph_can_hold_it(small: Small, precision: str) -> None:
    names = {name for name, _, _ in asked(GpuNetwork.of(small.plain, precision), small).calls}
    assert not names & FROM_THE_HOST
    assert {name for name, _, _ in asked(FastNetwork.of(small.plain), small).calls} & FROM_THE_HOST


def test_in_bf16_layers_multiply_and_all_that_needs_digits_is_float32(small: Small) -> None:
    calls = asked(GpuNetwork.of(small.plain, "bf16"), small).calls
    narrow = {name for name, tensors, _ in calls if any(tensor.dtype == torch.bfloat16 for tensor in tensors)}
    wide = {name for name, _, _ in calls} - narrow
    assert {"addmm", "bmm", "embedding"} <= narrow
    exact = {"native_layer_norm", "_softmax", "linalg_cross", "linalg_vector_norm", "pow", "sin", "atan2", "cumsum"}
    assert exact <= wide


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_products_of_points_never_take_tf32(small: Small, precision: str) -> None:
    products = [
        (tensors, tf32)
        for name, tensors, tf32 in asked(GpuNetwork.of(small.plain, precision), small).calls
        if name in ("mm", "bmm", "addmm", "matmul", "linear")
    ]
    of_points = [tf32 for tensors, tf32 in products if min(tensors[-2].shape[-1], tensors[-1].shape[-1]) <= 4]
    assert len(of_points) > 5
    assert not any(of_points)
    assert any(tf32 for _, tf32 in products)


def test_tf32_is_put_back_after_a_layer_and_after_an_error() -> None:
    with pytest.raises(RuntimeError), matrix_units(tf32=True):
        Linear(3, 3)(torch.zeros(1, 4))
    assert not torch.backends.cuda.matmul.allow_tf32


# --------------------------------------------------------------------------------------------------------------- passes


def difference(a: Poses, b: Poses) -> tuple[float, float]:
    """Return degrees and millimetres between poses."""
    turned = rotation_angle_deg(a.R_cam_obj.double(), b.R_cam_obj.double()).max()
    return turned.item(), 1000 * (a.t_cam_obj_m - b.t_cam_obj_m).abs().max().item()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_an_instance_has_the_same_pose_alone_and_in_company(small: Small, precision: str, device: str) -> None:
    network = GpuNetwork.of(small.plain, precision).to(device)
    run = Runner(network, sizes=[4])
    models = [
        Model(type(m.description)(*(v.to(device) for v in m.description)), m.structure.to(device))
        for m in small.models(GpuNetwork.of(small.plain, precision), 7)
    ]
    scene = on(small.scene(7), device)
    company = run(scene, models)
    assert company.score.shape == (7,)
    alone = [run(Scene(*(field[row, None] for field in scene)), [models[row]]) for row in range(7)]
    degrees, mm = difference(company, Poses(*(torch.cat(column) for column in zip(*alone, strict=True))))
    assert degrees < 0.01
    assert mm < 0.01


def test_a_pass_is_filled_up_and_a_large_one_divided(small: Small, device: str) -> None:
    sizes = []

    def note(scene: Scene, model: Model) -> Poses:
        sizes.append(len(scene.rgb))
        assert len(model.structure) == len(scene.rgb)
        middle = scene.points_m.mean(dim=1) + model.description.radius_m[:, None]
        return Poses(torch.eye(3, device=device).expand(len(middle), 3, 3), middle, middle[:, 0])

    run = Runner(note, sizes=[8, 2, 4])
    scene, models = on(small.scene(13), device), small.models(GpuNetwork.of(small.plain).to(device), 13)
    for rows, expected in ((1, [2]), (2, [2]), (3, [4]), (5, [8]), (13, [8, 8])):
        sizes.clear()
        found = run(Scene(*(field[:rows] for field in scene)), models[:rows])
        assert device == "cuda" or sizes == expected
        radius = torch.stack([model.description.radius_m[0] for model in models[:rows]])
        torch.testing.assert_close(found.t_cam_obj_m, scene.points_m[:rows].mean(dim=1) + radius[:, None])


def test_what_one_pass_answered_is_not_lost_to_the_next(small: Small, device: str) -> None:
    """A graph writes all its answers to the same place."""
    R, t_m, score = torch.empty(2, 3, 3, device=device), torch.empty(2, 3, device=device), torch.empty(2, device=device)

    def overwrite(scene: Scene, _: Model) -> Poses:
        return Poses(R.copy_(scene.points_m[:, :3]), t_m.copy_(scene.points_m[:, 0]), score.copy_(scene.uniforms[:, 0]))

    scene, models = on(small.scene(5), device), small.models(GpuNetwork.of(small.plain).to(device), 5)
    run = Runner(overwrite, [2])
    first = run(scene, models)
    run(Scene(*(field.flip(0) for field in scene)), models)
    assert torch.equal(first.score, scene.uniforms[:, 0])
