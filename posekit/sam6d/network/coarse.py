"""Coarse point matching of SAM-6D (Lin et al., CVPR 2024, sec. 3.3): few points, many pose hypotheses, one survivor.

Parameters are named as in the released checkpoint. Index 0 of a cloud, and of a row or column of logits, is the
background. Poses are `p_scene = R p_model + t`, in object radii.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from posekit.geometry import nearest_rotation
from posekit.sam6d.network.attention import GeometricBlock, RelativeAttention
from posekit.sam6d.network.config import Config
from posekit.sam6d.network.structure import pairwise_squared_distance


class Tokens(NamedTuple):
    """A scene's and a model's tokens, background first."""

    scene: Tensor  # (B, 1 + N, C)
    model: Tensor  # (B, 1 + M, C)


class Pose(NamedTuple):
    """Poses of a batch, in object radii."""

    R: Tensor  # (B, 3, 3)
    t: Tensor  # (B, 3)


class CoarseMatching(nn.Module):
    """Map the features of both clouds' sparse points to logits of their matches."""

    def __init__(self, config: Config, relative: type[RelativeAttention]) -> None:
        super().__init__()
        c = config.channels
        self.temperature = config.temperature
        self.in_proj = nn.Linear(c, c)
        self.out_proj = nn.Linear(c, c)
        self.bg_token = nn.Parameter(torch.zeros(1, 1, c))
        self.transformers = nn.ModuleList(GeometricBlock(config, relative) for _ in range(config.blocks))

    @property
    def steps(self) -> list[GeometricBlock]:
        """Return the blocks with their type."""
        return cast(list[GeometricBlock], list(self.transformers))

    def tokens(self, features: Tensor) -> Tensor:
        """(B, N, C) -> (B, 1 + N, C)."""
        return with_background(self.in_proj(features), self.bg_token)

    def look_at_itself(self, tokens: Tensor, structure: Tensor) -> Tensor:
        """Apply the first block's self-attention to one cloud. Needs no other cloud: a model's result can be stored."""
        return self.steps[0].look_at_itself(tokens, structure)

    def blocks(self, tokens: Tokens, scene_structure: Tensor, model_structure: Tensor) -> Iterator[Tokens]:
        """Yield the tokens after each block. `tokens` come from `look_at_itself`."""
        scene, model = tokens
        for index, block in enumerate(self.steps):
            if index > 0:
                scene = block.look_at_itself(scene, scene_structure)
                model = block.look_at_itself(model, model_structure)
            scene, model = block.look_at_each_other(scene, model)
            yield Tokens(scene, model)

    def logits(self, tokens: Tokens) -> Tensor:
        """(B, 1 + N, 1 + M)."""
        return cosine_logits(self.out_proj(tokens.scene), self.out_proj(tokens.model), self.temperature)


def with_background(tokens: Tensor, background: Tensor) -> Tensor:
    """Put the background's token in front: (B, N, C), (1, 1, C) -> (B, 1 + N, C)."""
    return torch.cat((background.expand(len(tokens), -1, -1), tokens), dim=1)


def cosine_logits(scene: Tensor, model: Tensor, temperature: float) -> Tensor:
    """Return cosines divided by the temperature: (B, N, C), (B, M, C) -> (B, N, M)."""
    return functional.normalize(scene, dim=-1) / temperature @ functional.normalize(model, dim=-1).mT


# ----------------------------------------------------------------------------------------------------------- hypotheses


class Assignment(NamedTuple):
    """Match probabilities of points, background left out."""

    score: Tensor  # (B, N, M); zero where either point more likely belongs to the background
    scene_matched: Tensor  # (B, N), 1.0 where the scene's point more likely belongs to the model
    model_matched: Tensor  # (B, M), 1.0 where the model's point more likely belongs to the scene


def assign(logits: Tensor) -> Assignment:
    """Multiply both softmaxes and mark the background: logits (B, 1 + N, 1 + M)."""
    product = logits.softmax(dim=2) * logits.softmax(dim=1)
    scene_matched = (product[:, 1:].argmax(dim=2) > 0).float()
    model_matched = (product[:, :, 1:].argmax(dim=1) > 0).float()
    score = product[:, 1:, 1:] * scene_matched[:, :, None] * model_matched[:, None]
    return Assignment(score, scene_matched, model_matched)


def draw_pairs(score: Tensor, uniforms: Tensor) -> Tensor:
    """Draw matches, each with a probability proportional to its score to the power 1.5.

    score: (B, N, M); uniforms: (B, D) in [0, 1) -> (B, D) flat indices into N x M. The sum runs in float64, so that
    every device draws the same.
    """
    cumulated = score.flatten(1).pow(1.5).cumsum(dim=1, dtype=torch.float64).float()
    cumulated = cumulated / (cumulated[:, -1:] + 1e-8)
    return torch.searchsorted(cumulated, uniforms).clamp(max=cumulated.shape[1] - 1)


def weighted_procrustes(source: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rigid motion of `source` onto `target`: (..., N, 3) twice, (..., N) -> R (..., 3, 3), t (..., 3).

    The released network was trained with 1e-5 added to the sum of weights, which draws both middles a little towards
    the origin. Its poses contain that, so it stays. `posekit.geometry.align_points` is the motion without it.
    """
    weight = (weight / (weight.sum(dim=-1, keepdim=True) + 1e-5))[..., None]
    source_middle = (source * weight).sum(dim=-2)
    target_middle = (target * weight).sum(dim=-2)
    spread = (weight * (target - target_middle[..., None, :])).mT @ (source - source_middle[..., None, :])
    R = nearest_rotation(spread)
    return R, target_middle - (R @ source_middle[..., None])[..., 0]


class Proposals(NamedTuple):
    """Hypotheses from drawn triples, and the remaining distance of each triple's own pairs."""

    R: Tensor  # (B, H, 3, 3)
    t: Tensor  # (B, H, 3)
    residual: Tensor  # (B, H), mean distance


def propose(pairs: Tensor, scene: Tensor, model: Tensor) -> Proposals:
    """Propose a pose for each triple.

    pairs: (B, 3 H) flat indices into N x M; scene: (B, N, 3); model: (B, M, 3).
    """
    b, m = len(pairs), model.shape[1]
    p_scene = _take(scene, pairs.div(m, rounding_mode="floor")).view(b, -1, 3, 3)
    p_model = _take(model, pairs % m).view(b, -1, 3, 3)
    R, t = weighted_procrustes(p_model, p_scene, torch.ones_like(p_scene[..., 0]))
    residual = ((p_scene - t[:, :, None]) @ R - p_model).norm(dim=-1).mean(dim=-1)
    return Proposals(R, t, residual)


def keep_best(proposals: Proposals, kept: int) -> Pose:
    """Return the `kept` proposals that fit their own pairs best: R (B, kept, 3, 3), t (B, kept, 3)."""
    index = proposals.residual.topk(min(kept, proposals.residual.shape[1]), dim=1, largest=False).indices
    R = proposals.R.gather(1, index[..., None, None].expand(-1, -1, 3, 3))
    return Pose(R, proposals.t.gather(1, index[..., None].expand(-1, -1, 3)))


def surface_distance(scene: Tensor, poses: Pose, surface: Tensor) -> Tensor:
    """Return the distance of every scene point to the model's surface under every pose.

    scene: (B, N, 3); poses: R (B, H, 3, 3), t (B, H, 3); surface: (B, S, 3) -> (B, H, N).
    """
    b, h = poses.t.shape[:2]
    placed = (scene[:, None] - poses.t[:, :, None]) @ poses.R  # (B, H, N, 3), in the model's frame
    squared = pairwise_squared_distance(placed.flatten(1, 2), surface)  # (B, H * N, S)
    return squared.sqrt().amin(dim=-1).view(b, h, -1)


def choose_best(poses: Pose, distance: Tensor, matched: Tensor) -> Pose:
    """Return the pose under which the matched scene points lie closest to the surface.

    distance: (B, H, N); matched: (B, N) -> R (B, 3, 3), t (B, 3).
    """
    score = matched.sum(dim=1)[:, None] / ((distance * matched[:, None]).sum(dim=-1) + 1e-8)
    best = score.argmax(dim=1)
    rows = torch.arange(len(best), device=best.device)
    return Pose(poses.R[rows, best], poses.t[rows, best])


def coarse_pose(logits: Tensor, scene: Tensor, model: Tensor, surface: Tensor, uniforms: Tensor, kept: int) -> Pose:
    """Vote for a pose.

    logits (B, 1 + N, 1 + M), scene (B, N, 3), model (B, M, 3), surface (B, S, 3), uniforms (B, 3 H).
    """
    assignment = assign(logits)
    pairs = draw_pairs(assignment.score, uniforms)
    poses = keep_best(propose(pairs, scene, model), kept)
    return choose_best(poses, surface_distance(scene, poses, surface), assignment.scene_matched)


def _take(points: Tensor, index: Tensor) -> Tensor:
    """(B, N, 3), (B, D) -> (B, D, 3)."""
    return points.gather(1, index[..., None].expand(-1, -1, 3))
