"""Render-and-compare: draw each pose densely into the crop and judge every cell of the picture.

The cost of a pose is a negative log-likelihood, truncated cell by cell: depth against depth, outline against mask,
free space against what stands in it, and colour under a light that is fitted to each pose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from posekit.geometric.kernels import WRONG_BRIGHTNESS, WRONG_COLOUR, colour_cost, spread
from posekit.geometric.model import Shelf
from posekit.geometric.observe import Observations
from posekit.geometric.picture import Grid, draw
from posekit.geometric.poses import Poses
from posekit.geometric.score import tolerance_m

EVEN_SPREAD = 1.9  # spread of margins between two poses that explain a picture equally: readings err together
CLEAR = 10.0  # a larger margin leaves no doubt

# Costs in nats: the worst that a single cell can add. Costs of colour are in posekit/geometric/kernels.py.
WRONG_DEPTH = 4.0
UNEXPLAINED = 3.0  # under the mask, but the pose leaves it empty
UNEXPLAINED_UNREAD = 1.8  # as UNEXPLAINED, in a cell without a reading
SEEN_THROUGH = 4.0  # the pose stands where the camera saw something behind it
OUTSIDE = 1.5  # at the right depth, but outside the mask
UNREAD = 0.8  # outside the mask, without a reading
HIDDEN = 0.05  # behind something
AT_EDGE = 0.3  # factor on the cost of a cell whose neighbour would be right


@dataclass(frozen=True)
class Comparison:
    """The comparison of each pose with the picture, (B, H) where no other shape is given."""

    cost: Tensor  # nats
    map: Tensor  # (B, H, cells), cost of each cell
    inliers: Tensor  # 0..1: share of the cells under the mask with a reading whose depth the pose explains
    explained: Tensor  # 0..1: as `inliers`, among the cells inside the pose's outline
    inside: Tensor  # 0..1: share of the cells under the mask with a reading that lie inside the pose's outline
    beyond: Tensor  # 0..1: share of the pose's outline past which the mask goes on at the same depth
    overlap: Tensor  # 0..1: share of the pose's unhidden cells that were seen at the right depth
    through: Tensor  # 0..1: share of the pose's unhidden cells through which the camera saw something behind
    cells: Tensor  # number of the pose's unhidden cells
    hidden: Tensor  # 0..1: share of all cells of the pose that are behind something
    residual_m: Tensor  # median depth difference over the cells that pose and mask share
    colour: Tensor  # 0..1: mean cost of colour where the depth agrees, 1 = all wrong


@dataclass(frozen=True)
class _Drawn:
    """Poses drawn into the grid: (B, H, rows, columns)."""

    expected_m: Tensor  # depth, inf outside the pose
    sample: Tensor  # index of a dense sample of the shelf
    spread_m: Tensor  # tolerance of a reading there

    @property
    def there(self) -> Tensor:
        return torch.isfinite(self.expected_m)


def compare(shelf: Shelf, observations: Observations, poses: Poses) -> Comparison:
    """Compare poses (B, H) with the observations."""
    grid = Grid(shelf, observations)
    tolerance = tolerance_m(shelf, observations)
    drawn = _drawn(shelf, observations, grid, poses, tolerance / 2.5)
    there, there_near = drawn.there, _grown(drawn.there)
    seen_m, mask = grid.depth_m[:, None], grid.mask[:, None]
    mask_near, read = _grown(mask), seen_m > 0
    at_rim = ~mask & mask_near  # outlines are good to a cell: cells at the rim are no evidence against a pose
    behind = torch.where(there & read, (seen_m - drawn.expected_m) / drawn.spread_m, 0.0)
    agree = there & read & (behind.abs() < 3)
    through = there & read & (behind >= 3)
    hidden = there & read & (behind <= -3)

    # Outlines are good to a cell: one cell to the side, the pose may still show what was seen.
    nearest_m, farthest_m = _range(drawn.expected_m)
    off_m = torch.where(seen_m > farthest_m, seen_m - farthest_m, (nearest_m - seen_m).clamp(min=0))
    depth_cost = AT_EDGE * (behind.square() / 2).clamp(max=WRONG_DEPTH)
    depth_cost = depth_cost + (1 - AT_EDGE) * ((off_m / drawn.spread_m).square() / 2).clamp(max=WRONG_DEPTH)
    outside = there & ~mask
    cost = torch.where(mask & there & read, depth_cost, 0.0)
    cost = cost + _at_edge(mask & ~there, there_near) * torch.where(read, UNEXPLAINED, UNEXPLAINED_UNREAD)
    cost = cost + _at_edge(outside & through, mask_near) * SEEN_THROUGH
    cost = cost + _at_edge(outside & agree, mask_near) * OUTSIDE
    cost = cost + _at_edge(outside & ~read & grid.known[:, None], mask_near) * UNREAD
    cost = cost + (outside & hidden) * HIDDEN
    painted, colour = _colour(shelf, observations, grid, poses, drawn, agree & mask)
    cost = cost + painted

    readable, right = mask & read, agree & mask
    within = readable & there_near
    counted = there & read & ~hidden & ~(through & at_rim)
    shown = _count(counted)
    differences_m = torch.where(readable & there, (seen_m - drawn.expected_m).abs(), torch.nan)
    return Comparison(
        cost=cost.sum(dim=(2, 3)),
        map=cost.flatten(2),
        inliers=right.sum(dim=(2, 3)) / _count(readable),
        explained=right.sum(dim=(2, 3)) / _count(within),
        inside=within.sum(dim=(2, 3)) / _count(readable),
        beyond=_beyond(there_near, nearest_m, farthest_m, seen_m, readable, 2 * tolerance),
        overlap=(right.sum(dim=(2, 3)) + 0.5 * (agree & ~mask).sum(dim=(2, 3))) / shown,
        through=(through & counted).sum(dim=(2, 3)) / shown,
        hidden=hidden.sum(dim=(2, 3)) / _count(there),
        cells=shown,
        residual_m=torch.nan_to_num(differences_m.flatten(2).nanmedian(dim=-1).values, nan=1.0),
        colour=colour,
    )


def margins(comparison: Comparison, best: Tensor) -> Tensor:
    """Return how clearly the poses `best` (B,) beat each pose: (B, H), in standard deviations of the cost difference.

    Cells that differ at random cancel out, however many they are. A feature that only one pose explains does not.
    """
    rows = torch.arange(len(best), device=best.device)
    difference = comparison.map - comparison.map[rows, best][:, None]
    return difference.sum(dim=-1) / difference.square().sum(dim=-1).clamp(min=1e-6).sqrt()


def likelihood(comparison: Comparison) -> Tensor:
    """Return the probability 0..1 (B, H) that poses are right, from how well they explain the picture. Ignores rivals.

    A logistic model with rounded weights. It was fitted to right answers and to the best answers for masks of other
    objects, on synthetic scenes. Evidence beyond what a good pose reaches adds nothing.
    """
    logit = (
        37 * comparison.overlap.clamp(max=0.95)
        + 5.5 * comparison.explained.clamp(max=0.95)
        + 3 * comparison.inside
        - 14 * comparison.beyond
        - 13 * comparison.colour
        - 0.6 * (comparison.cost / comparison.cells).clamp(max=6)
        - 34
    )
    mostly_hidden = (comparison.hidden - 0.5).clamp(min=0)  # a hidden surface cannot contradict the pose
    return torch.sigmoid(logit) * (1 - 2 * mostly_hidden).clamp(min=0.5)


def decided(margin: float) -> float:
    """Return the probability 0.5..1 that the better of two answers is right, given the margin between them.

    Between answers that explain a picture equally, margins spread by EVEN_SPREAD. Where something decides, any larger
    margin is equally likely.
    """
    even = 1 / (1 + 0.25 * math.exp(min(margin, CLEAR) ** 2 / (2 * EVEN_SPREAD**2)))
    return 1 - 0.5 * even


def _drawn(shelf: Shelf, observations: Observations, grid: Grid, poses: Poses, noise_m: Tensor) -> _Drawn:
    expected_m, sample = draw(shelf, observations, grid, poses)
    spread_m = spread(shelf, poses, expected_m, sample, grid.rays, noise_m=noise_m, cell_m=grid.cell_m)
    return _Drawn(expected_m, sample, spread_m)


def _colour(
    shelf: Shelf, observations: Observations, grid: Grid, poses: Poses, drawn: _Drawn, use: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the cost of colour of each cell in `use`, and its mean over these cells as a share of the worst.

    cost: (B, H, rows, columns), as `use`; mean: (B, H).
    """
    if shelf.dense_colours is None:
        return torch.zeros_like(drawn.expected_m), torch.zeros_like(drawn.expected_m[..., 0, 0])
    use = use & shelf.coloured[:, None, None, None]
    cost = colour_cost(shelf, observations, poses, drawn.sample, grid.colours, grid.rays, use)
    return cost, cost.sum(dim=(2, 3)) / (WRONG_COLOUR + WRONG_BRIGHTNESS) / _count(use)


def _count(cells: Tensor) -> Tensor:
    """Count the cells that are set: (B, H). Returns at least 1, so that one can divide by it."""
    return cells.sum(dim=(2, 3)).clamp(min=1)


def _at_edge(cells: Tensor, mended: Tensor) -> Tensor:
    """Return the weights of wrong cells: low where the neighbouring cell would be right."""
    return cells * torch.where(mended, AT_EDGE, 1.0)


def _beyond(
    drawn_near: Tensor, nearest_m: Tensor, farthest_m: Tensor, seen_m: Tensor, readable: Tensor, tolerance_m: Tensor
) -> Tensor:
    """Return the share (B, H) of the cells around poses in which the mask goes on at the depth of the pose's edge."""
    ring = _grown(drawn_near) & ~drawn_near
    tolerance = tolerance_m[:, None, None, None]
    nearest = -_largest_around(-nearest_m) - tolerance
    farthest = _largest_around(farthest_m) + tolerance
    goes_on = ring & readable & (seen_m > nearest) & (seen_m < farthest)
    return goes_on.sum(dim=(2, 3)) / ring.sum(dim=(2, 3)).clamp(min=1)


def _range(depth_m: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest depth among each cell and its eight neighbours, without empty cells (inf)."""
    smallest = -_largest_around(-depth_m)
    known = torch.where(torch.isfinite(depth_m), depth_m, -torch.inf)
    return smallest, _largest_around(known)


def _grown(cells: Tensor) -> Tensor:
    """Grow boolean maps (B, H, rows, columns) by one cell."""
    return _largest_around(cells.to(torch.uint8)) > 0


def _largest_around(values: Tensor) -> Tensor:
    """Return the largest of each value and its eight neighbours in the last two dimensions, within the map."""
    for dim in (-1, -2):
        size = values.shape[dim]
        largest = values.clone()
        if size > 1:
            before, after = values.narrow(dim, 0, size - 1), values.narrow(dim, 1, size - 1)
            inner = largest.narrow(dim, 1, size - 1)
            torch.maximum(inner, before, out=inner)
            inner = largest.narrow(dim, 0, size - 1)
            torch.maximum(inner, after, out=inner)
        values = largest
    return values
