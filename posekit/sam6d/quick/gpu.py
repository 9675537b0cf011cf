"""The network rewritten for a GPU: plain torch, products on the matrix units, no synchronisation with the host.

Weights and answers are those of network/whole.py. The differences, beside the parts taken from cpu.py:

    structure of pairs        in bf16: one row of a table for a distance or an angle, no layers
    attention                 torch's fused attention
    surroundings of a point   the first layer by point, the norms inside the layers
    voting                    triples aligned in closed form; one product for the distances of many hypotheses
    rotation of a pose        by repeated squaring: a decomposition would wait for the host

`precision` sets how layers multiply: "float32", "tf32" (float32 numbers, 10 bits of them in products) or "bf16". Points
and all that is computed from them stay float32 in each, and so do norms, softmaxes, logits and the tokens between
layers. Weights are converted to bf16 once; autocast would convert them in each pass.

`Runner` repeats passes as CUDA graphs. Everything also runs on a CPU, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

import pointnet2_ext
from posekit.sam6d.network.attention import FocusedAttention, MultiHeadAttention, joined
from posekit.sam6d.network.coarse import (
    CoarseMatching,
    Pose,
    Proposals,
    Tokens,
    assign,
    choose_best,
    cosine_logits,
    draw_pairs,
    keep_best,
)
from posekit.sam6d.network.features import MEAN, STD
from posekit.sam6d.network.fine import FineMatching, ScoredPose, SoftMatches, explained, soft_matches
from posekit.sam6d.network.structure import GeometricStructureEmbedding
from posekit.sam6d.network.whole import Description, Model, Network, Parts, Poses, Scene, take
from posekit.sam6d.quick.cpu import (
    FastNetwork,
    FoldedAttention,
    NeighbourlyEncoding,
    OnePassAttention,
    PointFeatures,
    TabledStructure,
)

Answer = TypeVar("Answer")

PRECISIONS = ("float32", "tf32", "bf16")
PASS = 8  # a pass is padded to this many instances
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
TABLE_STEPS = 512  # rows per unit of a table: the error is a quarter of bf16's rounding
TABLE_UNITS = 32  # distances over 6.4 radii count as 6.4
DISTANCES_AT_A_TIME = 1 << 26  # distances held at once in the voting: 256 MB
SQUARINGS = 32
NOWHERE = 1e6  # radii; each coordinate of the t of a triple without a unique rotation


def keep_float32() -> None:
    """Make torch multiply float32 numbers in full, except inside `matrix_units`.

    Applies to GPUs in this process. By default torch uses TF32 for convolutions.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def matrix_units(tf32: bool) -> Iterator[None]:
    """Allow TF32 products inside the block. The setting is the process's, and is restored."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# --------------------------------------------------------------------------------------------------------------- layers


class Linear(nn.Linear):
    """Multiplies in the type of its weights, whatever the input; float32 in TF32."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C'), in the type of the weights."""
        if self.weight.dtype != torch.float32:
            return functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        with matrix_units(tf32=True):
            return functional.linear(x, self.weight, self.bias)


class Patches(nn.Conv2d):
    """Computes the image's patches in the type of the weights, whatever the input."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / 16, W / 16)."""
        return super().forward(x.to(self.weight.dtype))


class FusedAttention(MultiHeadAttention):
    """Softmax attention in one kernel, with a float32 softmax."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x: (B, N, C); memory: (B, M, C) -> (B, N, C)."""
        q, k, v = self.split(self.proj_q(x)), self.split(self.proj_k(memory)), self.split(self.proj_v(memory))
        return joined(functional.scaled_dot_product_attention(q, k, v))


class PairAttention(FoldedAttention):
    """The folded attention to pairs, in torch on every device."""

    def forward(self, x: Tensor, structure: Tensor) -> Tensor:
        """x: (B, N, C); structure: (B, N, N, C), in the type of the projections -> (B, N, C)."""
        q, k, v = self.split(self.proj_q(x)), self.split(self.proj_k(x)), self.split(self.proj_v(x))
        d = q.shape[-1]
        folded = torch.einsum("bhnd,hdc->bnhc", q, self.proj_p.weight.view(self.heads, d, -1))
        seen = (folded @ structure.mT).transpose(1, 2)  # (B, heads, N, N)
        return joined(functional.scaled_dot_product_attention(q, k, v, attn_mask=seen * d**-0.5))


class Focus(OnePassAttention):
    """Focuses in float32, like its scale: a third power needs digits that bf16 does not have."""

    def focus(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C), in the type of x."""
        return FocusedAttention.focus(self, x).to(x.dtype)


class _SharpLogits:
    """Computes logits in float32 from tokens of any type."""

    tf32 = False
    temperature: float
    out_proj: nn.Linear

    def logits(self, tokens: Tokens) -> Tensor:
        """Return (B, 1 + N, 1 + M) float32."""
        scene, model = self.out_proj(tokens.scene).float(), self.out_proj(tokens.model).float()
        with matrix_units(self.tf32):
            return cosine_logits(scene, model, self.temperature)


class SharpCoarseMatching(_SharpLogits, CoarseMatching):
    """Coarse matching with logits in float32."""


class SharpFineMatching(_SharpLogits, FineMatching):
    """Fine matching with logits in float32."""


class Structure(TabledStructure):
    """Embeds as network/whole.py does; in bf16 it takes the nearest row of a table, without interpolation."""

    near_distances: Tensor  # (rows, C) bf16
    near_angles: Tensor
    tabled = False

    def narrow(self) -> None:
        """Fill tables of bf16 rows and use them from now on; call it after loading the weights."""
        numbers = torch.arange(TABLE_STEPS * TABLE_UNITS + 1, device=self.proj_d.weight.device) / TABLE_STEPS
        embedded = self.embedding(numbers)
        self.register_buffer("near_distances", self.proj_d(embedded).bfloat16(), persistent=False)
        self.register_buffer("near_angles", self.proj_a(embedded).bfloat16(), persistent=False)
        self.tabled = True

    def forward(self, points: Tensor) -> Tensor:
        """(B, N, 3) -> (B, N, N, C), bf16 where `narrow` was called."""
        if not self.tabled:
            return GeometricStructureEmbedding.forward(self, points)
        distance, angle = self.indices(points)
        structure = _row(angle[..., 0], self.near_angles)
        for neighbour in range(1, angle.shape[-1]):
            structure = torch.maximum(structure, _row(angle[..., neighbour], self.near_angles), out=structure)
        structure += _row(distance, self.near_distances)
        # The background is hundreds of units away from all points.
        for edge in ((slice(None), slice(1)), (slice(None), slice(None), slice(1))):
            turned = self.proj_a(self.embedding(angle[edge])).amax(dim=3)
            structure[edge] = (self.proj_d(self.embedding(distance[edge])) + turned).bfloat16()
        return structure


def _row(numbers: Tensor, table: Tensor) -> Tensor:
    """Return the nearest row of each number, the last row for larger numbers: (...) -> (..., C)."""
    return functional.embedding((numbers * TABLE_STEPS + 0.5).long().clamp(max=len(table) - 1), table)


class Encoding(NeighbourlyEncoding):
    """The first layer by point and without norms, in torch on every device."""

    dtype = torch.float32  # type of the second and third layer
    tf32 = False

    def narrow(self) -> None:
        """Convert all layers but the first, whose inputs are coordinates."""
        self.dtype = torch.bfloat16
        self.mlp3.to(self.dtype)
        for mlp in self.folded:
            for name in ("second", "second_bias", "third", "third_bias"):
                mlp.register_buffer(name, getattr(mlp, name).to(self.dtype), persistent=False)

    def forward(self, points: Tensor) -> Tensor:
        """(B, N, 3) -> (B, N, C) float32."""
        sizes = zip(self.config.position_radii, self.config.position_samples, strict=True)
        seen = [
            self._look_around(mlp, points, pointnet2_ext.ball_query(points, points, radius, samples))
            for mlp, (radius, samples) in zip(self.folded, sizes, strict=True)
        ]
        with matrix_units(self.tf32):
            out = functional.linear(torch.cat(seen, dim=-1), self.mlp3.conv.weight[..., 0], self.mlp3.conv.bias)
        return out.float()

    def _look_around(self, mlp: Any, points: Tensor, index: Tensor) -> Tensor:
        """mlp: folded by cpu.py; points: (B, N, 3); index: (B, N, S) of a ball query -> (B, N, 128)."""
        b, n, s = index.shape
        there = functional.linear(points, mlp.there, mlp.there_bias).flatten(0, 1)
        here = functional.linear(points, mlp.here)
        row = index + n * torch.arange(b, device=index.device)[:, None, None]
        first = there.index_select(0, row.flatten()).view(b, n, s, -1).sub_(here[:, :, None])
        with matrix_units(self.tf32):
            second = functional.linear(first.to(self.dtype).relu_(), mlp.second.T, mlp.second_bias).relu_()
            third = second @ mlp.third
        seen: Tensor = (third.amax(dim=2) + mlp.third_bias).relu_()
        return seen


# ---------------------------------------------------------------------------------------------------------------- poses


def propose(pairs: Tensor, scene: Tensor, model: Tensor) -> Proposals:
    """Compute `coarse.propose` in closed form, with the same shapes.

    Three points on a line, repeated ones above all, leave a rotation undetermined. They fit well and so keep their
    place among the best, as in the original. There their rotation is chance and never won; here their t is out of
    reach.
    """
    b, m = len(pairs), model.shape[1]
    source = take(model, pairs % m).view(b, -1, 3, 3)
    target = take(scene, pairs.div(m, rounding_mode="floor")).view(b, -1, 3, 3)
    (of, of_line), (to, to_line) = _frame(source), _frame(target)
    flat_source = ((source - source.mean(dim=-2, keepdim=True)) @ of.mT)[..., :2]
    flat_target = ((target - target.mean(dim=-2, keepdim=True)) @ to.mT)[..., :2]
    (uu, uv), (vu, vv) = (row.unbind(-1) for row in (flat_target.mT @ flat_source).unbind(-2))
    angle = torch.atan2(vu - uv, uu + vv)[..., None]  # both planes are seen from where the points turn the same way
    u, v, n = to.unbind(-2)
    turned = torch.stack((u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin(), n), dim=-1)
    R = turned @ of
    weight = 1 / (3 + 1e-5)  # as in coarse.weighted_procrustes, from the original
    t = weight * (target.sum(dim=-2) - (R @ source.sum(dim=-2)[..., None])[..., 0])
    residual = ((target - t[:, :, None]) @ R - source).norm(dim=-1).mean(dim=-1)
    return Proposals(R, torch.where((of_line | to_line)[..., None], NOWHERE, t), residual)


def _frame(points: Tensor) -> tuple[Tensor, Tensor]:
    """Return axes and normal of the plane through three points as rows, (..., 3, 3), and if they are collinear, (...).

    The first axis lies along the longest side. Collinear points get any plane.
    """
    sides = points.roll(-1, dims=-2) - points
    squared = sides.square().sum(dim=-1)
    longest = squared.argmax(dim=-1, keepdim=True)

    def side(index: Tensor) -> Tensor:
        return sides.gather(-2, index[..., None].expand(*index.shape, 3))[..., 0, :]

    x, y, _ = torch.eye(3, device=points.device)
    reach = squared.gather(-1, longest).sqrt()
    u = torch.where(reach > 0, side(longest) / reach, x)
    n = torch.linalg.cross(u, side((longest + 1) % 3))
    line = ~(n.norm(dim=-1, keepdim=True) > 1e-6 * reach)
    n = torch.where(line, torch.linalg.cross(u, torch.where(u[..., :1].abs() < 0.6, x, y)), n)
    n = functional.normalize(n, dim=-1)
    return torch.stack((u, torch.linalg.cross(n, u), n), dim=-2), line[..., 0]


def surface_distance(scene: Tensor, poses: Pose, surface: Tensor) -> Tensor:
    """Compute `coarse.surface_distance`, (B, H, N), as one product.

    |p|^2 is added to the smallest |s|^2 - 2 p.s of each p.
    """
    b, h = poses.t.shape[:2]
    placed = ((scene[:, None] - poses.t[:, :, None]) @ poses.R).flatten(1, 2)  # (B, H * N, 3)
    of_surface = torch.cat((-2 * surface, surface.square().sum(dim=-1, keepdim=True)), dim=-1)
    smallest = (functional.pad(placed, (0, 1), value=1.0) @ of_surface.mT).amin(dim=-1)
    return (placed.square().sum(dim=-1) + smallest).clamp(min=0).sqrt().view(b, h, -1)


def nearest_rotation(M: Tensor) -> Tensor:
    """Compute `posekit.geometry.nearest_rotation` without a decomposition: (..., 3, 3) -> (..., 3, 3).

    The rotation, as a quaternion, is the first eigenvector of a 4 x 4 matrix (Horn, 1987). Multiplying that matrix with
    itself often enough leaves only this eigenvector. If several rotations are equally near, the result is one of them.
    """
    M = M.double()
    eye = torch.eye(3, dtype=M.dtype, device=M.device)
    trace = M.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    odd = M - M.mT
    axis = torch.stack((odd[..., 2, 1], odd[..., 0, 2], odd[..., 1, 0]), dim=-1)[..., None, :]
    even = M + M.mT - trace * eye
    power = torch.cat((torch.cat((trace, axis), dim=-1), torch.cat((axis.mT, even), dim=-1)), dim=-2)
    size = power.norm(dim=(-2, -1), keepdim=True) + 1e-30
    power = power / size + torch.eye(4, dtype=M.dtype, device=M.device)  # no eigenvalue below zero
    for _ in range(SQUARINGS // 4):
        power = torch.linalg.matrix_power(power / power.norm(dim=(-2, -1), keepdim=True), 16)
    largest = power.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)[..., None, None].expand(*M.shape[:-2], 4, 1)
    quaternion = functional.normalize(power.gather(-1, largest), dim=-2)  # (..., 4, 1)
    w, v = quaternion[..., :1, :], quaternion[..., 1:, :]
    crossed = torch.linalg.cross(v.mT.expand_as(M), eye.expand_as(M)).mT  # v x, as a matrix
    R: Tensor = (w.square() - v.square().sum(dim=-2, keepdim=True)) * eye + 2 * (v @ v.mT + w * crossed)
    return R.float()


def solve(matches: SoftMatches, scene: Tensor) -> Pose:
    """Compute `fine.solve` with `nearest_rotation` from above. scene: (B, N, 3)."""
    weight = (matches.weight / (matches.weight.sum(dim=-1, keepdim=True) + 1e-5))[..., None]
    source_middle = (matches.points * weight).sum(dim=-2)
    target_middle = (scene * weight).sum(dim=-2)
    spread = (weight * (scene - target_middle[:, None])).mT @ (matches.points - source_middle[:, None])
    R = nearest_rotation(spread)
    return Pose(R, target_middle - (R @ source_middle[..., None])[..., 0])


# -------------------------------------------------------------------------------------------------------------- network


class GpuNetwork(FastNetwork):
    """The network built of these parts."""

    parts = Parts(PointFeatures, Structure, PairAttention, Focus, Encoding)

    @classmethod
    def of(cls, network: Network, precision: str = "float32") -> GpuNetwork:
        """Copy the weights into these parts; `precision` is one of PRECISIONS."""
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        made = super().of(network)
        assert isinstance(made, GpuNetwork)
        with torch.inference_mode():
            for part in list(made.modules()):
                made._adapt(part, precision)
            if precision == "bf16":
                made._narrow()
        return made

    @staticmethod
    def _adapt(part: nn.Module, precision: str) -> None:
        """Give a part of network/whole.py, which keeps its weights, the methods of its twin here."""
        if type(part) is MultiHeadAttention:
            part.__class__ = FusedAttention
        elif type(part) is CoarseMatching:
            part.__class__ = SharpCoarseMatching
        elif type(part) is FineMatching:
            part.__class__ = SharpFineMatching
        elif isinstance(part, nn.Linear) and precision != "float32":
            part.__class__ = Linear
        if isinstance(part, _SharpLogits | Encoding):
            part.tf32 = precision != "float32"

    def _narrow(self) -> None:
        """Convert to bf16 what multiplies in bf16. The layers of the pair structure fill a table, in float32."""
        structure, encoding = self.geo_embedding, self.fine_point_matching.PE
        assert isinstance(structure, Structure)
        assert isinstance(encoding, Encoding)
        structure.narrow()
        encoding.narrow()
        patches = self.feature_extraction.rgb_net.vit.patch_embed.proj
        patches.__class__ = Patches
        patches.bfloat16()
        for part in (self.feature_extraction, self.coarse_point_matching, self.fine_point_matching):
            for layer in part.modules():
                if isinstance(layer, Linear):
                    layer.bfloat16()

    def features(self, rgb: Tensor, choose: Tensor) -> Tensor:
        """Return image features of points, shapes as in `Network.features`, whose constants come from the host."""
        channels = [(rgb[..., c].float() / 255 - MEAN[c]) / STD[c] for c in range(3)]
        out: Tensor = self.feature_extraction(torch.stack(channels, dim=1), choose)
        return out

    def coarse_pose(self, logits: Tensor, scene: Tensor, model: Tensor, surface: Tensor, uniforms: Tensor) -> Pose:
        """Vote for a pose; shapes as in `Network.coarse_pose`."""
        assignment = assign(logits)
        poses = keep_best(propose(draw_pairs(assignment.score, uniforms), scene, model), self.config.kept)
        at_a_time = max(1, DISTANCES_AT_A_TIME // (scene.shape[0] * scene.shape[1] * surface.shape[1]))
        some = zip(poses.R.split(at_a_time, dim=1), poses.t.split(at_a_time, dim=1), strict=True)
        distance = torch.cat([surface_distance(scene, Pose(R, t), surface) for R, t in some], dim=1)
        return choose_best(poses, distance, assignment.scene_matched)

    def fine_pose(self, logits: Tensor, scene: Tensor, model: Tensor, surface: Tensor) -> ScoredPose:
        """Compute the final pose; shapes as in `Network.fine_pose`."""
        matches = soft_matches(logits, model)
        pose = solve(matches, scene)
        distance = surface_distance(scene, Pose(pose.R[:, None], pose.t[:, None]), surface)[:, 0]
        return explained(pose, distance, matches.matched, self.config.score_distance)


# --------------------------------------------------------------------------------------------------------------- passes


class Runner:
    """Runs passes of fixed sizes. Each size is a CUDA graph, captured at its first use.

    A pass is padded with its last instance; more instances than the largest size take several passes. With a single
    size, an instance meets the same kernels alone and in a batch. With several (BUCKETS) a single instance is faster,
    but other kernels round differently, and the voting may draw differently for it. On a CPU nothing is captured.
    """

    def __init__(self, run: Callable[[Scene, Model], Poses], sizes: Sequence[int] = (PASS,)) -> None:
        """`run`: the network, or its compiled form; it must not need the host."""
        keep_float32()
        self._run = run
        self._sizes = sorted(sizes)
        self._inputs: list[Tensor] = []
        self._graphs: dict[int, tuple[Callable[[], None], Poses]] = {}
        self._pool: Any = None  # memory pool that all graphs share

    @torch.inference_mode()
    def __call__(self, scene: Scene, models: Sequence[Model]) -> Poses:
        """Estimate poses of instances; each comes with its object's model, a batch of one."""
        largest = self._sizes[-1]
        found = [
            self._pass(Scene(*(field[begin : begin + largest] for field in scene)), models[begin : begin + largest])
            for begin in range(0, len(models), largest)
        ]
        return Poses(*(torch.cat(column) for column in zip(*found, strict=True)))

    def _pass(self, scene: Scene, models: Sequence[Model]) -> Poses:
        rows = len(models)
        size = next(size for size in self._sizes if size >= rows)
        columns = [[field, *[field[-1:]] * (size - rows)] for field in scene]
        filled = [*models, *[models[-1]] * (size - rows)]
        columns += [list(fields) for fields in zip(*(_fields(model) for model in filled), strict=True)]
        if not self._inputs:
            of_all = (self._sizes[-1],)
            self._inputs = [column[0].new_empty(of_all + column[0].shape[1:]) for column in columns]
        for place, column in zip(self._inputs, columns, strict=True):
            torch.cat(column, out=place[:size])
        return Poses(*(values[:rows].clone() for values in self._poses(size)))

    def _poses(self, size: int) -> Poses:
        """Run the network on the inputs as they are."""
        scene, model = self._views(size)
        if not scene.rgb.is_cuda:
            return self._run(scene, model)
        if size not in self._graphs:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with torch.cuda.device(scene.rgb.device):
                self._graphs[size] = captured(lambda: self._run(scene, model), self._pool)
        replay, poses = self._graphs[size]
        replay()
        return poses

    def _views(self, size: int) -> tuple[Scene, Model]:
        fields = [place[:size] for place in self._inputs]
        seen = len(Scene._fields)
        return Scene(*fields[:seen]), Model(Description(*fields[seen:-1]), fields[-1])


def captured(call: Callable[[], Answer], pool: Any = None) -> tuple[Callable[[], None], Answer]:
    """Capture a call on the current GPU as a graph; return a function that repeats it, and the answer that it rewrites.

    The call runs twice before, for what libraries do once. `pool`: memory to share with other graphs; no graph may read
    what another one left there.
    """
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        answer = call()
    return graph.replay, answer


def _fields(model: Model) -> tuple[Tensor, ...]:
    return (*model.description, model.structure)
