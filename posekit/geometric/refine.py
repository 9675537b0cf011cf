"""Move many poses at once onto the observation: point-to-plane steps on the field, held back by the outline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posekit.geometric.kernels import depth_pull, moved, normal_equations, outline_pull
from posekit.geometric.model import Shelf
from posekit.geometric.observe import Observations
from posekit.geometric.picture import Grid, draw, visible_surface
from posekit.geometric.poses import Poses
from posekit.geometric.score import tolerance_m

POLISHED = 1024  # cells used to polish a pose


def refine(
    shelf: Shelf,
    observations: Observations,
    poses: Poses,
    *,
    points: int,
    visible: int,
    reach_m: Sequence[Tensor],
    through_m: Tensor,
    trust: Tensor | None = None,
) -> Poses:
    """Take one robust Gauss-Newton step per entry of `reach_m`: (B,), the distance at which a point stops pulling.

    `points` observed points are drawn to the model's surface, each weighted by `trust` (B, H, at least `points`). Of
    the `visible` model points, those that the camera saw through are drawn to the mask; 0 leaves them out. `through_m`:
    (B,), how far behind a model point the camera must have seen to have seen through it.
    """
    seen = observations.points[:, :points]
    normals_seen = observations.normals[:, :points]
    trust = None if trust is None else trust[..., :points]
    for reach in reach_m:
        hessian, gradient = normal_equations(shelf, poses, seen, normals_seen, reach_m=reach, trust=trust)
        if visible:
            model_points = visible_surface(shelf, poses, visible)
            pull_hessian, pull_gradient = outline_pull(
                shelf, observations, poses, model_points, reach_m=reach, through_m=through_m
            )
            hessian = hessian + pull_hessian * (points / visible)
            gradient = gradient + pull_gradient * (points / visible)
        poses = moved(
            poses, hessian, gradient, radius_m=shelf.diameter_m / 2, most_turn=0.4, most_shift=1.0, in_camera=False
        )
    return poses


def polish(shelf: Shelf, observations: Observations, poses: Poses, steps: int = 6) -> Poses:
    """Move poses (B, H) by Gauss-Newton steps until the depth that they show meets the depth that was read.

    The visible part of each pose is drawn once, and followed from step to step.
    """
    grid = Grid(shelf, observations)
    expected_m, sample = draw(shelf, observations, grid, poses)
    drawn = torch.isfinite(expected_m).flatten(2)
    chosen = (drawn + _scattered(grid).flatten()).topk(min(POLISHED, drawn.shape[-1])).indices
    visible = drawn.gather(2, chosen)
    sample = sample.flatten(2).gather(2, chosen)
    surface = shelf.dense.index_select(0, sample.reshape(-1)).reshape(*sample.shape, 6)
    tolerance = tolerance_m(shelf, observations)
    for index in range(steps):
        reach = tolerance * (3.0 if index < steps // 2 else 1.5)
        hessian, gradient = depth_pull(shelf, observations, poses, surface, visible, reach_m=reach)
        poses = moved(
            poses, hessian, gradient, radius_m=shelf.diameter_m / 2, most_turn=0.1, most_shift=0.1, in_camera=True
        )
    return poses


def _scattered(grid: Grid) -> Tensor:
    """Return a number in 0..1 for each cell (rows, columns); the largest of any set are spread evenly over the set."""
    row, column = (torch.arange(count, dtype=torch.float64) for count in (grid.rows, grid.columns))
    number = (row[:, None] * 0.7548776662466927 + column * 0.5698402909980532) % 1.0
    return number.to(grid.cell_px)
