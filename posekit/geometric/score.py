"""Score poses cheaply, on few points, to choose those worth a closer look."""

from __future__ import annotations

import torch
from torch import Tensor

from posekit.geometric.kernels import explain
from posekit.geometric.model import Shelf
from posekit.geometric.observe import Observations
from posekit.geometric.picture import visible_surface
from posekit.geometric.poses import Poses

DEPTH_ERROR = 0.0015  # share of the distance: error of a good depth camera, beyond its noise


def tolerance_m(shelf: Shelf, observations: Observations) -> Tensor:
    """Return the distance within which a reading is on the surface: (B,), from object size and noise of readings."""
    distance = observations.seed_centres[:, 0].norm(dim=-1)
    return torch.maximum(torch.maximum(0.015 * shelf.diameter_m, 2.5 * observations.noise_m), DEPTH_ERROR * distance)


def score(
    shelf: Shelf,
    observations: Observations,
    poses: Poses,
    part: Tensor,
    *,
    points: int,
    visible: int,
    colour: bool = False,
) -> Tensor:
    """Return the score (B, H) that ranks poses.

    It is the share of `points` points of the pose's part of the mask that are near the model and face the same way. Of
    `visible` model points (0 = none), those that the camera did not see where they should be lower it.
    part: (B, H), the part of the mask that each pose is to explain. `colour`: colours count too.
    """
    tolerance = tolerance_m(shelf, observations)
    total = torch.zeros_like(poses.t[..., 0])
    for index in range(observations.seed_points.shape[1]):
        seen, normals = observations.of_part(index, points)
        total = torch.where(part == index, explain(shelf, poses, seen, normals, tolerance_m=tolerance), total)
    if visible:
        surface_cam = poses.to_camera(visible_surface(shelf, poses, visible))
        on, beside, through, hidden = (
            kind.float().mean(dim=-1) for kind in observations.classify(surface_cam, 2 * tolerance)
        )
        overlap = (on + 0.5 * beside) / (on + beside + through).clamp(min=0.02)
        total = total * (0.35 + 0.65 * overlap) - 0.1 * hidden
    if colour and shelf.colours is not None:
        x = poses.to_object(observations.points[:, :points])
        surface, _, _, sample = shelf.lookup(x, observations.normals[:, None, :points] @ poses.R)
        near = (1 - (x - surface).square().sum(dim=-1) / (2.5 * tolerance)[:, None, None] ** 2).clamp(min=0)
        difference = _colour_difference(
            observations.as_pictured(shelf.colours[sample]), observations.colours[:, None, :points], near
        )
        total = total - 0.6 * difference * shelf.coloured[:, None]
    return total


def _colour_difference(expected: Tensor, seen: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean difference of colours up to one brightness.

    (B, H, N, 3), (B, 1, N, 3), (B, H, N) -> (B, H).
    """
    total = weight.sum(dim=-1).clamp(min=1e-6)
    bright_expected = (weight * expected.mean(dim=-1)).sum(dim=-1) / total
    bright_seen = (weight * seen.mean(dim=-1)).sum(dim=-1) / total
    gain = (bright_seen / bright_expected.clamp(min=1e-3)).clamp(0.3, 3.0)
    difference = (seen - gain[..., None, None] * expected).abs().mean(dim=-1).clamp(max=0.5)
    return (weight * difference).sum(dim=-1) / total
