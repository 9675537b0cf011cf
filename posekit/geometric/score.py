"""How well poses explain what the camera saw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posekit.geometric.model import Prepared
from posekit.geometric.observe import Observation, classify
from posekit.geometric.refine import Poses, rendered_surface, visible_surface

DEPTH_ERROR = 0.0015  # of the distance: what a good depth camera is off by, beyond its noise


@dataclass(frozen=True)
class Scores:
    """One number per pose each: (H,)."""

    total: Tensor  # what poses are ranked by
    explained: Tensor  # 0..1, of the observed points: near the model and facing alike
    inliers: Tensor  # 0..1, of the observed points: near the model
    residual_m: Tensor  # median distance of all observed points
    overlap: Tensor  # 0..1, of the model's surface that should be visible: seen under the mask
    through: Tensor  # 0..1, of the same: the camera saw through it
    colour: Tensor  # 0..1, mean difference of colours; 0 where the model has none


def tolerance_m(model: Prepared, observation: Observation) -> float:
    """Distance within which a reading counts as on the surface, from the object's size and the readings' noise."""
    distance = float(observation.centre.norm())
    return max(0.015 * model.diameter_m, 2.5 * observation.noise_m, DEPTH_ERROR * distance)


def score(
    model: Prepared,
    observation: Observation,
    poses: Poses,
    *,
    points: int,
    visible: int,
    colour: bool = False,
    exact: bool = False,
) -> Scores:
    """Judge poses by `points` observed points and, unless 0, `visible` model points looked up in the crop."""
    tolerance = tolerance_m(model, observation)
    x = poses.to_object(observation.points[:points])
    H, N, _ = x.shape
    surface, normal, sample = model.field.lookup(x.reshape(-1, 3))
    away = x.reshape(-1, 3) - surface
    off_plane = (away * normal).sum(dim=-1)
    along = (away.square().sum(dim=-1) - off_plane**2).clamp(min=0).sqrt()
    beyond = (along - 1.5 * model.field.spacing_m - 0.5 * model.field.cell_m).clamp(min=0)
    distance = (off_plane**2 + beyond**2).sqrt().reshape(H, N)
    facing = ((observation.normals[:points] @ poses.R) * normal.reshape(H, N, 3)).sum(dim=-1).abs()
    near = (1 - (distance / (2.5 * tolerance)) ** 2).clamp(min=0)
    explained = (near * (facing * 1.25).clamp(max=1)).mean(dim=-1)
    inliers = (distance < 1.5 * tolerance).float().mean(dim=-1)
    residual = distance.median(dim=-1).values
    overlap = through_share = torch.zeros_like(explained)
    total = explained
    if visible:
        if exact:
            surface_cam, share = rendered_surface(model, observation, poses, visible)
        else:
            surface_cam = poses.to_camera(visible_surface(model, poses, visible))
            share = torch.ones_like(surface_cam[..., 0])
        share = share / share.sum(dim=-1, keepdim=True).clamp(min=1e-6)
        on, beside, through, hidden = (
            (kind * share).sum(dim=-1) for kind in classify(observation, surface_cam, 2 * tolerance)
        )
        seen = on + 0.5 * beside
        expected = (on + beside + through).clamp(min=0.02)
        overlap = seen / expected
        through_share = through / expected
        total = explained * (0.35 + 0.65 * overlap) - 0.1 * hidden
    difference = torch.zeros_like(explained)
    if colour and model.colours is not None:
        difference = _colour_difference(model.colours[sample].reshape(H, N, 3), observation.colours[:points], near)
        total = total - 0.6 * difference
    return Scores(total, explained, inliers, residual, overlap, through_share, difference)


def _colour_difference(expected: Tensor, seen: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean difference of colours up to one brightness: (H, N, 3), (N, 3), (H, N) -> (H,)."""
    total = weight.sum(dim=-1).clamp(min=1e-6)
    bright_expected = (weight * expected.mean(dim=-1)).sum(dim=-1) / total
    bright_seen = (weight * seen.mean(dim=-1)).sum(dim=-1) / total
    gain = (bright_seen / bright_expected.clamp(min=1e-3)).clamp(0.3, 3.0)
    difference = (seen - gain[:, None, None] * expected).abs().mean(dim=-1).clamp(max=0.5)
    return (weight * difference).sum(dim=-1) / total


def confidence(scores: Scores) -> Tensor:
    """0..1 from the evidence of each pose alone: (H,).

    A logistic model with round weights, from right and wrong answers on synthetic scenes (wrong CADs and wrong masks
    among them). Beyond what a good pose reaches, more evidence adds nothing.
    """
    logit = (
        24 * (scores.overlap.clamp(max=0.95) - 0.8)
        + 8 * (scores.inliers.clamp(max=0.97) - 0.8)
        + 8 * (scores.explained.clamp(max=0.9) - 0.75)
        - 20 * (scores.colour - 0.15).clamp(min=0)
        - 1.5
    )
    return torch.sigmoid(logit)
