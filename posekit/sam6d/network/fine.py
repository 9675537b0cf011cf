"""Fine point matching of SAM-6D (Lin et al., CVPR 2024, sec. 3.4): all points, one pose, and its score.

Parameters are named as in the released checkpoint; conventions as in coarse.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

import pointnet2_ext
from posekit.sam6d.network.attention import FocusedAttention, RelativeAttention, SparseToDenseBlock
from posekit.sam6d.network.coarse import Pose, Tokens, assign, cosine_logits, weighted_procrustes, with_background
from posekit.sam6d.network.config import Config
from posekit.sam6d.network.structure import pairwise_squared_distance


class _Norm(nn.Module):
    """Holds the batch norm under the checkpoint's name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)


class SharedLayer(nn.Module):
    """The same linear layer for every neighbour of every point, with batch norm and ReLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.normlayer = _Norm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, S) -> (B, C', N, S)."""
        return functional.relu(self.normlayer.bn(self.conv(x)))


class SharedMlp(nn.Module):
    """Three shared layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer0 = SharedLayer(6, 32)
        self.layer1 = SharedLayer(32, 64)
        self.layer2 = SharedLayer(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 6, N, S) -> (B, 128, N, S)."""
        out: Tensor = self.layer2(self.layer1(self.layer0(x)))
        return out


class _Conv(nn.Module):
    """Holds the last layer under the checkpoint's name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 1)


class PositionEncoding(nn.Module):
    """Encoding of each point's surroundings, at two radii (PointNet++: Qi et al., 2017)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.mlp1 = SharedMlp()
        self.mlp2 = SharedMlp()
        self.mlp3 = _Conv(config.channels)

    def forward(self, points: Tensor) -> Tensor:
        """(B, N, 3), in object radii and in the object's frame -> (B, N, C)."""
        seen = []
        sizes = zip(self.config.position_radii, self.config.position_samples, strict=True)
        for mlp, (radius, samples) in zip((self.mlp1, self.mlp2), sizes, strict=True):
            seen.append(mlp(neighbourhoods(points, radius, samples)).amax(dim=-1))  # (B, C / 2, N)
        out: Tensor = self.mlp3.conv(torch.cat(seen, dim=1)).transpose(1, 2)
        return out


def neighbourhoods(points: Tensor, radius: float, samples: int) -> Tensor:
    """Return neighbours relative to each point, and their places: (B, N, 3) -> (B, 6, N, samples)."""
    b, n, _ = points.shape
    index = pointnet2_ext.ball_query(points, points, radius, samples).flatten(1)
    there = points.gather(1, index[..., None].expand(-1, -1, 3)).view(b, n, samples, 3)
    return torch.cat((there - points[:, :, None], there), dim=-1).permute(0, 3, 1, 2)


class FineMatching(nn.Module):
    """Map features of all points, and an initial pose, to logits of their matches."""

    def __init__(
        self,
        config: Config,
        relative: type[RelativeAttention],
        focused: type[FocusedAttention],
        position_encoding: type[PositionEncoding],
    ) -> None:
        super().__init__()
        c = config.channels
        self.temperature = config.temperature
        self.in_proj = nn.Linear(c, c)
        self.out_proj = nn.Linear(c, c)
        self.bg_token = nn.Parameter(torch.zeros(1, 1, c))
        self.PE = position_encoding(config)
        self.transformers = nn.ModuleList(SparseToDenseBlock(config, relative, focused) for _ in range(config.blocks))

    @property
    def steps(self) -> list[SparseToDenseBlock]:
        """Return the blocks with their type."""
        return cast(list[SparseToDenseBlock], list(self.transformers))

    def tokens(self, features: Tensor, encoding: Tensor) -> Tensor:
        """(B, N, C) twice -> (B, 1 + N, C)."""
        return with_background(self.in_proj(features) + encoding, self.bg_token)

    def look_at_itself(self, tokens: Tensor, sparse: Tensor, structure: Tensor) -> Tensor:
        """Apply the first block's self-attention to its few points: tokens (B, 1 + N, C) -> (B, 1 + n, C)."""
        return self.steps[0].sparse_layer.look_at_itself(subset(tokens, sparse), structure)

    def blocks(
        self,
        tokens: Tokens,
        first: Tokens,
        scene_sparse: Tensor,
        model_sparse: Tensor,
        scene_structure: Tensor,
        model_structure: Tensor,
    ) -> Iterator[Tokens]:
        """Yield the tokens after each block.

        tokens: all points, (B, 1 + N, C); first: the sparse points from `look_at_itself`, (B, 1 + n, C);
        scene_sparse, model_sparse: (B, n) indices of the sparse points; structures: (B, 1 + n, 1 + n, C).
        """
        scene, model = tokens
        for index, block in enumerate(self.steps):
            if index == 0:
                few_scene, few_model = first
            else:
                few_scene = block.sparse_layer.look_at_itself(subset(scene, scene_sparse), scene_structure)
                few_model = block.sparse_layer.look_at_itself(subset(model, model_sparse), model_structure)
            few_scene, few_model = block.sparse_layer.look_at_each_other(few_scene, few_model)
            scene, model = block.spread(scene, few_scene), block.spread(model, few_model)
            yield Tokens(scene, model)

    def logits(self, tokens: Tokens) -> Tensor:
        """(B, 1 + N, 1 + M)."""
        return cosine_logits(self.out_proj(tokens.scene), self.out_proj(tokens.model), self.temperature)


def subset(tokens: Tensor, sparse: Tensor) -> Tensor:
    """Return the background and some points: (B, 1 + N, C), (B, n) indices of points -> (B, 1 + n, C).

    The indices count points but are applied to tokens, which begin with the background. So each point is replaced by
    the one before it. The original does the same, and its weights were trained with it.
    """
    points = tokens.gather(1, sparse[..., None].expand(-1, -1, tokens.shape[-1]))
    return torch.cat((tokens[:, :1], points), dim=1)


class ScoredPose(NamedTuple):
    """Poses of a batch, in object radii, and the network's score of them."""

    R: Tensor  # (B, 3, 3)
    t: Tensor  # (B, 3)
    score: Tensor  # (B,), 0 to 1


class SoftMatches(NamedTuple):
    """The estimated place of each scene point on the model."""

    points: Tensor  # (B, N, 3), in the model's frame
    weight: Tensor  # (B, N)
    matched: Tensor  # (B, N), 1.0 where the point more likely belongs to the model than to the background


def soft_matches(logits: Tensor, model: Tensor) -> SoftMatches:
    """Estimate soft matches. logits: (B, 1 + N, 1 + M); model: (B, M, 3)."""
    score, matched, _ = assign(logits)
    weight = score.sum(dim=2)
    return SoftMatches((score / (weight[..., None] + 1e-6)) @ model, weight, matched)


def solve(matches: SoftMatches, scene: Tensor) -> Pose:
    """Return the pose that fits all soft matches. scene: (B, N, 3)."""
    return Pose(*weighted_procrustes(matches.points, scene, matches.weight))


def explained(pose: Pose, distance: Tensor, matched: Tensor, score_distance: float) -> ScoredPose:
    """Score a pose by the share of the scene that it explains.

    The score is the share of points that are matched, times the share of those that lie within `score_distance` of the
    surface. distance, matched: (B, N).
    """
    near = (distance < score_distance).float()
    of_matched = (near * matched).sum(dim=1) / (matched.sum(dim=1) + 1e-8)
    return ScoredPose(pose.R, pose.t, of_matched * matched.mean(dim=1))


def fine_pose(logits: Tensor, scene: Tensor, model: Tensor, surface: Tensor, score_distance: float) -> ScoredPose:
    """Return pose and score. logits (B, 1 + N, 1 + M), scene (B, N, 3), model (B, M, 3), surface (B, S, 3)."""
    matches = soft_matches(logits, model)
    pose = solve(matches, scene)
    distance = pairwise_squared_distance(start_at(scene, pose), surface).amin(dim=-1).sqrt()
    return explained(pose, distance, matches.matched, score_distance)


def start_at(scene: Tensor, pose: Pose) -> Tensor:
    """Map scene points into the model's frame under a pose: (B, N, 3) -> (B, N, 3)."""
    return (scene - pose.t[:, None]) @ pose.R
