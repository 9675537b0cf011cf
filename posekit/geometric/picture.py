"""Predict what the camera would see of poses: roughly by stored views, or drawn into the crop cell by cell."""

from __future__ import annotations

import torch
from torch import Tensor

from posekit.geometric.kernels import front
from posekit.geometric.model import Shelf
from posekit.geometric.observe import Observations
from posekit.geometric.poses import Poses, picked

GRID = 128  # cells on the longer side of a crop, at most
SAMPLES_A_CELL = 2.0  # at least, so that few cells stay empty


def visible_surface(shelf: Shelf, poses: Poses, count: int) -> Tensor:
    """Return `count` surface points that the camera should see of each pose, by the nearest stored view.

    (B, H, count, 3), object frame.
    """
    towards_camera = -(poses.t[:, :, None] @ poses.R)[:, :, 0]
    view = (towards_camera @ shelf.view_directions.mT).argmax(dim=-1)
    samples = picked(shelf.view_samples[..., :count], view) + shelf.first_sample[:, None, None]
    return shelf.surface.index_select(0, samples.reshape(-1))[:, :3].reshape(*samples.shape, 3)


class Grid:
    """The crop, sampled at the middles of square cells: (B, rows, columns)."""

    def __init__(self, shelf: Shelf, observations: Observations) -> None:
        focal = observations.K[:, 0, 0]
        distance = observations.seed_centres[:, 0, 2]
        longest = torch.maximum(observations.width, observations.height)
        spacing_px = shelf.dense_spacing_m * SAMPLES_A_CELL**0.5 * focal / distance
        self.cell_px = torch.maximum(spacing_px, longest / GRID).clamp(min=1.0)  # (B,)
        self.cell_m = self.cell_px * distance / focal
        height = torch.ceil(observations.height / self.cell_px)  # (B,) cells of each crop; the rest is padding
        width = torch.ceil(observations.width / self.cell_px)
        self.rows, self.columns = int(height.max()), int(width.max())
        cell = self.cell_px[:, None, None]
        row, column = torch.arange(self.rows, device=focal.device), torch.arange(self.columns, device=focal.device)
        u = (column[None, None] + 0.5) * cell - 0.5
        v = (row[None, :, None] + 0.5) * cell - 0.5
        self.inside = (row[:, None] < height[:, None, None]) & (column < width[:, None, None])
        u, v = u.expand(-1, self.rows, -1), v.expand(-1, -1, self.columns)
        pixel, self.known = observations.pixel(u, v)
        self.depth_m = observations.depth_m[pixel] * self.known
        self.mask = observations.mask[pixel] & self.known
        self.colours = observations.rgb[pixel].float() / 255.0
        K = observations.K[:, :, :, None, None]
        rays = torch.stack(((u - K[:, 0, 2]) / K[:, 0, 0], (v - K[:, 1, 2]) / K[:, 1, 1], torch.ones_like(u)), dim=-1)
        self.rays = rays / rays.norm(dim=-1, keepdim=True)


def draw(shelf: Shelf, observations: Observations, grid: Grid, poses: Poses) -> tuple[Tensor, Tensor]:
    """Draw poses: depth (B, H, rows, columns), inf where nothing is, and the index of the sample in each cell.

    In an empty cell the index means nothing.
    """
    depth_m, sample = front(
        shelf, poses, observations.K, cell_px=grid.cell_px, cell_m=grid.cell_m, rows=grid.rows, columns=grid.columns
    )
    return torch.where(grid.inside[:, None], depth_m, torch.inf), sample
