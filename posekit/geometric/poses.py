"""Pose hypotheses: many poses of many instances, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Poses:
    """H poses for each of B instances, from the centred frame to the camera frame: `p_cam = R p + t`."""

    R: Tensor  # (B, H, 3, 3)
    t: Tensor  # (B, H, 3)

    @property
    def count(self) -> int:
        return self.R.shape[1]

    def pick(self, index: Tensor) -> Poses:
        """Return the poses at `index` (B, K)."""
        return Poses(picked(self.R, index), picked(self.t, index))

    def join(self, other: Poses) -> Poses:
        return Poses(torch.cat((self.R, other.R), dim=1), torch.cat((self.t, other.t), dim=1))

    def to_object(self, points_cam: Tensor) -> Tensor:
        """Map camera points (B, N, 3), or those of each pose (B, H, N, 3), into each object's frame: (B, H, N, 3)."""
        if points_cam.dim() == 3:
            points_cam = points_cam[:, None]
        return points_cam @ self.R - (self.t[:, :, None] @ self.R)

    def to_camera(self, points: Tensor) -> Tensor:
        """Map points of each object (B, H, M, 3) into the camera frame."""
        return points @ self.R.mT + self.t[:, :, None]


def picked(values: Tensor, index: Tensor) -> Tensor:
    """Return values (B, H, ...) at index (B, K): (B, K, ...)."""
    return values[torch.arange(len(index), device=index.device)[:, None], index]
