"""Render-and-compare: each pose drawn densely into the crop, and what every cell of the picture says about it.

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

EVEN_SPREAD = 1.9  # of margins between two poses that explain a picture equally: readings err together
CLEAR = 10.0  # a margin beyond which nothing is left to doubt

# What a cell costs, in nats: the worst that a single cell can say. Colours: posekit/geometric/kernels.py.
WRONG_DEPTH = 4.0
UNEXPLAINED = 3.0  # under the mask, but the pose leaves it empty
UNEXPLAINED_UNREAD = 1.8  # the same, without a reading
SEEN_THROUGH = 4.0  # the pose stands where the camera saw something behind
OUTSIDE = 1.5  # at the right depth, but outside the mask
UNREAD = 0.8  # outside the mask, without a reading
HIDDEN = 0.05  # behind something
AT_EDGE = 0.3  # of the cost, where one cell to the side would mend it


@dataclass(frozen=True)
class Comparison:
    """One number per pose each: (B, H)."""

    cost: Tensor  # nats
    map: Tensor  # (B, H, cells): the cost of each cell
    inliers: Tensor  # 0..1, of the cells under the mask with a reading: the pose explains their depth
    explained: Tensor  # the same, of those within the outline of the pose
    inside: Tensor  # 0..1, of the cells under the mask with a reading: within the outline of the pose
    beyond: Tensor  # 0..1, of the outline of the pose: the mask goes on past it at the same depth
    overlap: Tensor  # 0..1, of the pose's cells that nothing hides: seen at the right depth
    through: Tensor  # 0..1, of the same: the camera saw something behind them
    cells: Tensor  # how many those are
    hidden: Tensor  # 0..1, of all of the pose's cells: behind something
    residual_m: Tensor  # median depth difference, over cells that the pose and the mask share
    colour: Tensor  # 0..1: mean cost of colour where depth agrees, 1 = all wrong


@dataclass(frozen=True)
class _Drawn:
    """Poses in the grid: (B, H, rows, columns)."""

    expected_m: Tensor  # depth, inf where the pose is not
    sample: Tensor  # of the shelf's dense ones
    spread_m: Tensor  # how far a reading may be off

    @property
    def there(self) -> Tensor:
        return torch.isfinite(self.expected_m)


def compare(shelf: Shelf, observations: Observations, poses: Poses) -> Comparison:
    """Judge poses (B, H)."""
    grid = Grid(shelf, observations)
    tolerance = tolerance_m(shelf, observations)
    drawn = _drawn(shelf, observations, grid, poses, tolerance / 2.5)
    there, there_near = drawn.there, _grown(drawn.there)
    seen_m, mask = grid.depth_m[:, None], grid.mask[:, None]
    mask_near, read = _grown(mask), seen_m > 0
    at_rim = ~mask & mask_near  # outlines are good to a cell: what one there shows is no evidence against a pose
    behind = torch.where(there & read, (seen_m - drawn.expected_m) / drawn.spread_m, 0.0)
    agree = there & read & (behind.abs() < 3)
    through = there & read & (behind >= 3)
    hidden = there & read & (behind <= -3)

    # One cell to the side the pose may well show what was seen: outlines are good to a cell.
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
    """How clearly the poses `best` (B,) beat each pose: (B, H), in standard deviations of the sum of differences.

    Cells that differ at random cancel out, whatever their number; a feature that only one pose explains does not.
    """
    rows = torch.arange(len(best), device=best.device)
    difference = comparison.map - comparison.map[rows, best][:, None]
    return difference.sum(dim=-1) / difference.square().sum(dim=-1).clamp(min=1e-6).sqrt()


def likelihood(comparison: Comparison) -> Tensor:
    """How likely poses are to be right, 0..1 (B, H), from how well they explain the picture, rivals left aside.

    A logistic model with rounded weights, fitted to right answers and to the best that could be made of masks of other
    objects, on synthetic scenes. Beyond what a good pose reaches, more evidence adds nothing.
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
    mostly_hidden = (comparison.hidden - 0.5).clamp(min=0)  # what could contradict the pose is not seen
    return torch.sigmoid(logit) * (1 - 2 * mostly_hidden).clamp(min=0.5)


def decided(margin: float) -> float:
    """How likely the better of two answers is the right one, 0.5..1, by the margin between them.

    Between answers that explain a picture equally, margins spread by EVEN_SPREAD; where something decides, any larger
    one is as likely as another.
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
    """Cost of the colours of each cell in `use` (B, H, rows, columns), and its mean, of the worst (B, H)."""
    if shelf.dense_colours is None:
        return torch.zeros_like(drawn.expected_m), torch.zeros_like(drawn.expected_m[..., 0, 0])
    use = use & shelf.coloured[:, None, None, None]
    cost = colour_cost(shelf, observations, poses, drawn.sample, grid.colours, grid.rays, use)
    return cost, cost.sum(dim=(2, 3)) / (WRONG_COLOUR + WRONG_BRIGHTNESS) / _count(use)


def _count(cells: Tensor) -> Tensor:
    """How many cells are set, 1 where none is: (B, H), fit to divide by."""
    return cells.sum(dim=(2, 3)).clamp(min=1)


def _at_edge(cells: Tensor, mended: Tensor) -> Tensor:
    """Weight of wrong cells: little where the neighbouring cell would be right."""
    return cells * torch.where(mended, AT_EDGE, 1.0)


def _beyond(
    drawn_near: Tensor, nearest_m: Tensor, farthest_m: Tensor, seen_m: Tensor, readable: Tensor, tolerance_m: Tensor
) -> Tensor:
    """Share (B, H) of the cells around poses on which the mask goes on at the depth that the pose ends with."""
    ring = _grown(drawn_near) & ~drawn_near
    tolerance = tolerance_m[:, None, None, None]
    nearest = -_largest_around(-nearest_m) - tolerance
    farthest = _largest_around(farthest_m) + tolerance
    goes_on = ring & readable & (seen_m > nearest) & (seen_m < farthest)
    return goes_on.sum(dim=(2, 3)) / ring.sum(dim=(2, 3)).clamp(min=1)


def _range(depth_m: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest depth among each cell and its eight neighbours, empty ones (inf) left out."""
    smallest = -_largest_around(-depth_m)
    known = torch.where(torch.isfinite(depth_m), depth_m, -torch.inf)
    return smallest, _largest_around(known)


def _grown(cells: Tensor) -> Tensor:
    """Boolean maps (B, H, rows, columns) grown by one cell."""
    return _largest_around(cells.to(torch.uint8)) > 0


def _largest_around(values: Tensor) -> Tensor:
    """The largest of each value and its eight neighbours in the last two dimensions; beyond the edge nothing is."""
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
