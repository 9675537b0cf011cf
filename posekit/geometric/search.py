"""From nothing to a few dozen good poses: every view and roll scored on few points, survivors refined and rescored."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from posekit.geometric.model import Prepared
from posekit.geometric.observe import Observation
from posekit.geometric.refine import Poses, refine
from posekit.geometric.verify import score, tolerance_m
from posekit.geometry import rotation_from_z_to, rotation_grid

ROLLS = 24
FIRST_KEPT = 384
SECOND_KEPT = 48
FINALISTS = 12


def search(model: Prepared, observation: Observation) -> Poses:
    """The best poses found, distinct and already refined, best first."""
    d = model.diameter_m
    tolerance = tolerance_m(model, observation)
    poses = hypotheses(model, observation)
    coarse = score(model, observation, poses, points=48, visible=0).total
    poses = poses.pick(coarse.topk(min(FIRST_KEPT, len(poses))).indices)
    poses = refine(
        model,
        observation,
        poses,
        points=64,
        visible=0,
        reach_m=[0.15 * d, 0.1 * d, 0.08 * d],
        tolerance_m=2 * tolerance,
    )
    rough = score(model, observation, poses, points=96, visible=64).total
    poses = poses.pick(distinct(poses, rough, SECOND_KEPT, 8.0, 0.05 * d))
    poses = refine(
        model, observation, poses, points=128, visible=96, reach_m=[0.08 * d, 0.06 * d, 0.05 * d, 0.04 * d],
        tolerance_m=2 * tolerance,
    )  # fmt: skip
    better = score(model, observation, poses, points=256, visible=128, colour=True).total
    poses = poses.pick(distinct(poses, better, FINALISTS, 5.0, 0.03 * d))
    return with_twins(model, poses)


def hypotheses(model: Prepared, observation: Observation) -> Poses:
    """Every stored view with every roll, its visible surface's middle where the observed one is."""
    ray = observation.centre / observation.centre.norm().clamp(min=1e-9)
    R = rotation_from_z_to(ray) @ rotation_grid(model.view_directions, ROLLS)  # (V, rolls, 3, 3)
    t = observation.centre - (R @ model.view_centres_m[:, None, :, None])[..., 0]
    return Poses(R.reshape(-1, 3, 3), t.reshape(-1, 3))


def with_twins(model: Prepared, poses: Poses, first: int = 2) -> Poses:
    """The poses, and of the first few also those that shape alone may confuse them with."""
    twins = model.twins[1:]
    if not len(twins):
        return poses
    best = poses.pick(torch.arange(min(first, len(poses)), device=poses.R.device))
    R = (best.R[:, None] @ twins[:, :3, :3]).reshape(-1, 3, 3)
    t = ((best.R[:, None] @ twins[:, :3, 3:])[..., 0] + best.t[:, None]).reshape(-1, 3)
    return poses.join(Poses(R, t))


def distinct(poses: Poses, total: Tensor, count: int, angle_deg: float, distance_m: float) -> Tensor:
    """Indices of the best `count` poses, none near a better one both in rotation and in place."""
    order = torch.argsort(total, descending=True, stable=True)
    R = poses.R[order].reshape(-1, 9).cpu().numpy()
    t = poses.t[order].cpu().numpy()
    trace_near = 1 + 2 * np.cos(np.radians(angle_deg))
    free = np.ones(len(R), dtype=np.bool_)
    kept: list[int] = []
    for index in range(len(R)):
        if not free[index]:
            continue
        kept.append(index)
        if len(kept) == count:
            break
        near = (R @ R[index] > trace_near) & (np.abs(t - t[index]).max(axis=1) < distance_m)
        free &= ~near
    return order[torch.tensor(kept, device=order.device)]
