"""Search without a start: score every view and roll on few points, then refine and rescore the best few dozen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from posekit.geometric.kernels import distinct, explain
from posekit.geometric.model import Shelf
from posekit.geometric.observe import Observations
from posekit.geometric.poses import Poses, picked
from posekit.geometric.refine import refine
from posekit.geometric.score import score, tolerance_m
from posekit.geometry import rotation_from_z_to, rotation_grid

ROLLS = 24
FIRST_KEPT = 384
PART_KEPT = 192  # poses kept of each part of the mask, where that is more than FIRST_KEPT in all
SECOND_KEPT = 64
FINALISTS = 12
COARSE_POINTS = 48


def search(shelf: Shelf, observations: Observations) -> tuple[Poses, Tensor]:
    """Return the best distinct poses of each instance, refined, best first, and each pose's part of the mask (B, H).

    A mask may hold more than the object, so each pose is judged by the part of the mask it was found for.
    """
    d = shelf.diameter_m
    through_m = 2 * tolerance_m(shelf, observations)
    poses, part = _first(shelf, observations)
    poses = refine(
        shelf, observations, poses, points=64, visible=0, reach_m=[0.15 * d, 0.1 * d, 0.08 * d], through_m=through_m,
        trust=picked(observations.members, part),
    )  # fmt: skip
    rough = score(shelf, observations, poses, part, points=96, visible=64)
    kept = distinct(poses, rough, SECOND_KEPT, 8.0, 0.05 * d)
    poses, part = poses.pick(kept), picked(part, kept)
    poses = refine(
        shelf, observations, poses, points=128, visible=96, reach_m=[0.08 * d, 0.06 * d, 0.05 * d, 0.04 * d],
        through_m=through_m, trust=picked(observations.members, part),
    )  # fmt: skip
    better = score(shelf, observations, poses, part, points=256, visible=128, colour=True)
    kept = distinct(poses, better, FINALISTS, 5.0, 0.03 * d)
    return with_twins(shelf, poses.pick(kept), picked(part, kept))


def _first(shelf: Shelf, observations: Observations) -> tuple[Poses, Tensor]:
    """Try every stored view with every roll, placing the middle of the visible surface at the middle of a part.

    Returns the best FIRST_KEPT poses or more, equally many for each part, and each pose's part (B, H).
    """
    B, C, _ = observations.seed_points.shape
    centre = observations.seed_centres
    rolled = rotation_grid(shelf.view_directions, ROLLS)  # (V, rolls, 3, 3)
    tolerance = tolerance_m(shelf, observations)
    share = max(math.ceil(FIRST_KEPT / C), PART_KEPT)
    kept = []
    for index in range(C):
        ray = centre[:, index] / centre[:, index].norm(dim=-1, keepdim=True).clamp(min=1e-9)
        R = rotation_from_z_to(ray)[:, None, None] @ rolled  # (B, V, rolls, 3, 3)
        t = centre[:, index, None, None] - (R @ shelf.view_centres_m[:, :, None, :, None])[..., 0]
        poses = Poses(R.reshape(B, -1, 3, 3), t.reshape(B, -1, 3))
        coarse = explain(shelf, poses, *observations.of_part(index, COARSE_POINTS), tolerance_m=tolerance)
        kept.append(poses.pick(coarse.topk(min(share, poses.count)).indices))
    part = torch.arange(C, device=centre.device).repeat_interleave(kept[0].count).expand(B, -1)
    return Poses(torch.cat([poses.R for poses in kept], dim=1), torch.cat([poses.t for poses in kept], dim=1)), part


def with_twins(shelf: Shelf, poses: Poses, part: Tensor, first: int = 2) -> tuple[Poses, Tensor]:
    """Add to the poses those that shape alone may confuse with the first few; return all with their parts (B, H)."""
    twins = shelf.twins[:, None, 1:]  # (B, 1, T, 4, 4)
    if not twins.shape[2]:
        return poses, part
    R, t = poses.R[:, :first, None], poses.t[:, :first, None]
    turned = Poses((R @ twins[..., :3, :3]).flatten(1, 2), ((R @ twins[..., :3, 3:])[..., 0] + t).flatten(1, 2))
    return poses.join(turned), torch.cat((part, part[:, :first].repeat_interleave(twins.shape[2], dim=1)), dim=1)
