"""The network of network/whole.py with its costly parts rewritten: the same weights, the same answers, less work.

    part                       plain                                       here
    features of points         every pixel's, then those wanted            those wanted
    structure of pairs         four layers for each pair of points         tables of the layers' results
    attention to structure     a layer for each pair, then a product       the layer folded into the query
    linear attention           eight passes over a layer's numbers         one pass
    surroundings of a point    every slot, repeated neighbours, too        each neighbour once; first layer by point
    voting                     6000 decompositions; 59 million distances   closed form; running minimum of distances
                               written and read again
    last matches               five passes over two softmaxes              three passes, nothing stored

Where the kernels of kernels.py are compiled, most of these are C++ loops. Elsewhere they are plain torch, which gains
less, or the plain part itself. benchmarks/network/run.py measures them stage by stage.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import pointnet2_ext
from posekit.sam6d import kernels
from posekit.sam6d.network.attention import FocusedAttention, RelativeAttention, joined
from posekit.sam6d.network.coarse import (
    Pose,
    Proposals,
    assign,
    choose_best,
    draw_pairs,
    keep_best,
    propose,
    surface_distance,
)
from posekit.sam6d.network.features import FeatureExtraction
from posekit.sam6d.network.fine import (
    PositionEncoding,
    ScoredPose,
    SharedLayer,
    SharedMlp,
    SoftMatches,
    explained,
    solve,
)
from posekit.sam6d.network.structure import GeometricStructureEmbedding
from posekit.sam6d.network.whole import Network, Parts

TABLE_STEPS = 128  # rows per unit of a table; interpolating between rows is off by less than 1e-5
TABLE_UNITS = 16  # angles end at 12, distances within a cloud at 12 or little more
BACKGROUND_UNITS = 1024  # the background is some 866 units away
DISTANCES_AT_A_TIME = 2_000_000  # distances held at once in the voting, without a kernel


def compiled(tensor: Tensor) -> bool:
    """Return True if the kernels answer for this tensor."""
    return tensor.dtype == torch.float32 and kernels.kernel_for(tensor.device) == "compiled"


class Linear(nn.Linear):
    """Multiplies on a CPU by oneDNN, which is a tenth faster for a few hundred rows than what torch chooses."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        if not compiled(x):
            return super().forward(x)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product


class PointFeatures(FeatureExtraction):
    """Features interpolated bilinearly from the four cells around each point, for these points alone."""

    linear = Linear

    def forward(self, images: Tensor, choose: Tensor) -> Tensor:
        """Return features: images (B, 3, 224, 224), choose (B, N) -> (B, N, C) float32, whatever the encoder's type."""
        net = self.rgb_net
        config = net.config
        n, s, c = config.patches, config.upscaling, config.channels
        upscaled = net.output_upscaling(net.pyramid(images.to(net.output_upscaling.weight.dtype)))  # (B, 196, 16 * C)
        side = n * s
        cells = upscaled.view(-1, n, n, s, s, c).transpose(2, 3).reshape(-1, c)  # (B * 56 * 56, C)
        row = ((choose // config.image_px + 0.5) * (side / config.image_px) - 0.5).clamp(min=0)
        column = ((choose % config.image_px + 0.5) * (side / config.image_px) - 0.5).clamp(min=0)
        top, left = row.long(), column.long()
        below, right = (top + 1).clamp(max=side - 1), (left + 1).clamp(max=side - 1)
        first = torch.arange(len(choose), device=choose.device)[:, None] * side**2

        def cell(at_row: Tensor, at_column: Tensor) -> Tensor:
            index = first + at_row * side + at_column
            chosen: Tensor = cells.index_select(0, index.flatten()).view(*index.shape, c)
            return chosen.float()

        to_right, down = (column - left)[..., None], (row - top)[..., None]
        above = torch.lerp(cell(top, left), cell(top, right), to_right)
        return torch.lerp(above, torch.lerp(cell(below, left), cell(below, right), to_right), down)


class TabledStructure(GeometricStructureEmbedding):
    """Reads the layers' result for a distance or an angle from a table: it depends on a single number.

    Where kernels are compiled, the structure is stored in 16 bits, in units of `step`. It is read six times, and at
    that size half of it fits into a cache. The error is 0.0001 in channels whose values go up to 4.
    """

    distances: Tensor  # (rows, C)
    angles: Tensor
    step: Tensor  # (), value of the unit

    def fold(self) -> None:
        """Fill the tables; call it after loading the weights."""
        device = self.proj_d.weight.device
        numbers = torch.arange(TABLE_STEPS * TABLE_UNITS + 1, device=device) / TABLE_STEPS
        distances, angles = self.proj_d(self.embedding(numbers)), self.proj_a(self.embedding(numbers))
        far = self.proj_d(self.embedding(torch.arange(BACKGROUND_UNITS, device=device) / 1.0))
        most = torch.maximum(distances.abs().amax(), far.abs().amax()) + angles.abs().amax()
        self.register_buffer("distances", distances, persistent=False)
        self.register_buffer("angles", angles, persistent=False)
        self.register_buffer("step", most * (1.1 / 32767), persistent=False)

    def forward(self, points: Tensor) -> Tensor:
        """Embed (B, N, 3) -> (B, N, N, C), in the form that `values` reads."""
        distance, angle = self.indices(points)
        small = compiled(distance)
        if bool((distance[:, 1:, 1:] >= TABLE_UNITS).any()):  # not the cloud of an object
            return self._kept(super().forward(points), small)
        if small:
            structure = kernels.embed(distance, angle, self.distances, self.angles, TABLE_STEPS, float(self.step))
        else:
            structure = _embed(distance, angle, self.distances, self.angles, TABLE_STEPS)
        # The background is hundreds of units away from all points.
        for edge in ((slice(None), slice(1)), (slice(None), slice(None), slice(1))):
            turned = self.proj_a(self.embedding(angle[edge])).amax(dim=3)
            structure[edge] = self._kept(self.proj_d(self.embedding(distance[edge])) + turned, small)
        return structure

    def values(self, structure: Tensor) -> Tensor:
        """Return the result of `forward` as float32."""
        return structure * self.step if structure.dtype == torch.int16 else structure

    def _kept(self, structure: Tensor, small: bool) -> Tensor:
        return (structure / self.step).round().clamp(-32767, 32767).to(torch.int16) if small else structure


def _embed(distance: Tensor, angle: Tensor, distances: Tensor, angles: Tensor, steps: float) -> Tensor:
    """`kernels.embed` in plain torch."""

    def read(number: Tensor, table: Tensor) -> Tensor:
        place = number * steps
        row = place.long().clamp(max=len(table) - 2)
        return torch.lerp(table[row], table[row + 1], (place - row)[..., None])

    turned = read(angle[..., 0], angles)
    for neighbour in range(1, angle.shape[-1]):
        turned = torch.maximum(turned, read(angle[..., neighbour], angles))
    return turned.add_(read(distance, distances))


class FoldedAttention(RelativeAttention):
    """Uses `q.(W p + b) = (W^T q).p + const`: the softmax ignores the constant."""

    step: Tensor  # (), unit of a structure in 16 bits

    def fold(self, step: Tensor) -> None:
        """Take over the unit of `TabledStructure`."""
        self.register_buffer("step", step, persistent=False)

    def forward(self, x: Tensor, structure: Tensor) -> Tensor:
        """x: (B, N, C); structure: (B, N, N, C) -> (B, N, C)."""
        query, key, value = self.proj_q(x), self.proj_k(x), self.proj_v(x)
        b, n, c = query.shape
        of_heads = self.proj_p.weight.view(self.heads, c // self.heads, c)
        folded = torch.einsum("bnhd,hdc->bnhc", query.view(b, n, self.heads, -1), of_heads)
        if compiled(query):
            return kernels.relative_attention(query, key, value, folded * self.step, structure)
        q, k, v = self.split(query), self.split(key), self.split(value)
        seen = (folded @ structure.mT).transpose(1, 2)  # (B, heads, N, N)
        return joined(functional.scaled_dot_product_attention(q, k, v, attn_mask=seen * (c // self.heads) ** -0.5))


class OnePassAttention(FocusedAttention):
    """Focuses in one pass."""

    positive_scale: Tensor

    def fold(self) -> None:
        """Compute the softplus of the scale; call it after loading the weights."""
        self.register_buffer("positive_scale", functional.softplus(self.scale).flatten(), persistent=False)

    def focus(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return kernels.focus(x, self.positive_scale) if compiled(x) else super().focus(x)


class _FoldedMlp(nn.Module):
    """A shared MLP with its batch norms folded into its layers."""

    there: Tensor  # (32, 3), weight of a neighbour's place
    there_bias: Tensor
    here: Tensor  # (32, 3), weight of the point's place, subtracted
    second: Tensor  # (32, 64)
    second_bias: Tensor
    third: Tensor  # (64, 128)
    third_bias: Tensor

    def __init__(self, mlp: SharedMlp) -> None:
        super().__init__()
        (first, first_bias), *others = (_without_norm(layer) for layer in (mlp.layer0, mlp.layer1, mlp.layer2))
        seen, placed = first[:, :3], first[:, 3:]  # input weights of a neighbour: relative to the point, and its place
        tensors = {"there": seen + placed, "there_bias": first_bias, "here": seen}
        for name, (weight, bias) in zip(("second", "third"), others, strict=True):
            tensors |= {name: weight.T.contiguous(), f"{name}_bias": bias}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, points: Tensor, index: Tensor) -> Tensor:
        """points: (B, N, 3); index: (B, N, S) of a ball query -> (B, N, 128)."""
        there = functional.linear(points, self.there, self.there_bias)
        layers = (self.second, self.second_bias, self.third, self.third_bias)
        return kernels.look_around(there, functional.linear(points, self.here), index, layers)


def _without_norm(layer: SharedLayer) -> tuple[Tensor, Tensor]:
    """Return a layer's weight (out, in) and bias (out,) with its batch norm folded in."""
    norm = layer.normlayer.bn
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    return layer.conv.weight[:, :, 0, 0] * factor[:, None], norm.bias - norm.running_mean * factor


class NeighbourlyEncoding(PositionEncoding):
    """Handles each neighbour once, and the first layer once for each point: that layer is linear in both places."""

    def fold(self) -> None:
        """Fold the batch norms into the layers before them; call it after loading the weights."""
        self.folded = nn.ModuleList(_FoldedMlp(mlp) for mlp in (self.mlp1, self.mlp2))

    def forward(self, points: Tensor) -> Tensor:
        """(B, N, 3) -> (B, N, C)."""
        if not compiled(points):
            return super().forward(points)
        seen = []
        sizes = zip(self.config.position_radii, self.config.position_samples, strict=True)
        for mlp, (radius, samples) in zip(self.folded, sizes, strict=True):
            seen.append(mlp(points, pointnet2_ext.ball_query(points, points, radius, samples)))
        return functional.linear(torch.cat(seen, dim=-1), self.mlp3.conv.weight[..., 0], self.mlp3.conv.bias)


class FastNetwork(Network):
    """The network built of these parts, with a shorter way from logits to poses."""

    parts = Parts(PointFeatures, TabledStructure, FoldedAttention, OnePassAttention, NeighbourlyEncoding)

    @classmethod
    def of(cls, network: Network, precision: str = "float32") -> FastNetwork:
        """Copy the weights into these parts. `precision` of the image encoder alone: "float32" or "bf16"."""
        with torch.device("meta"):
            fast = cls(network.config)
        fast.load_state_dict(network.state_dict(), assign=True)
        fast.eval().requires_grad_(False)
        with torch.inference_mode():
            tables = fast.geo_embedding
            assert isinstance(tables, TabledStructure)
            tables.fold()
            for part in list(fast.modules()):
                if isinstance(part, OnePassAttention | NeighbourlyEncoding):
                    part.fold()
                elif isinstance(part, FoldedAttention):
                    part.fold(tables.step)
        if precision == "bf16":
            fast.feature_extraction.to(torch.bfloat16)
        return fast

    def coarse_pose(self, logits: Tensor, scene: Tensor, model: Tensor, surface: Tensor, uniforms: Tensor) -> Pose:
        """Vote for a pose; shapes as in `Network.coarse_pose`."""
        assignment = assign(logits)
        pairs = draw_pairs(assignment.score, uniforms)
        matched = assignment.scene_matched
        if compiled(scene):
            poses = keep_best(Proposals(*kernels.propose(pairs, scene, model)), self.config.kept)
            distance = kernels.surface_distance(scene, poses.R, poses.t, surface, matched)
            best = choose_best(poses, distance, matched)
            lost = best.t[:, 0] >= kernels.NOWHERE
            if not bool(lost.any()):
                return best
            # A dozen matches or fewer: all kept triples lie on lines. Their rotation is chance, their place is not.
            rows = (values[lost] for values in (logits, scene, model, surface, uniforms))
            best.R[lost], best.t[lost] = super().coarse_pose(*rows)
            return best
        poses = keep_best(propose(pairs, scene, model), self.config.kept)
        at_a_time = max(1, DISTANCES_AT_A_TIME // (scene.shape[0] * scene.shape[1] * surface.shape[1]))
        some = zip(poses.R.split(at_a_time, dim=1), poses.t.split(at_a_time, dim=1), strict=True)
        distance = torch.cat([surface_distance(scene, Pose(R, t), surface) for R, t in some], dim=1)
        return choose_best(poses, distance, matched)

    def fine_pose(self, logits: Tensor, scene: Tensor, model: Tensor, surface: Tensor) -> ScoredPose:
        """Compute the final pose; shapes as in `Network.fine_pose`."""
        if not compiled(logits):
            return super().fine_pose(logits, scene, model, surface)
        matches = SoftMatches(*kernels.soft_matches(logits, model))
        pose = solve(matches, scene)
        distance = kernels.surface_distance(scene, pose.R[:, None], pose.t[:, None], surface, matches.matched)[:, 0]
        return explained(pose, distance, matches.matched, self.config.score_distance)
