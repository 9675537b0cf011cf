"""Geometric structure embedding of pairs of points (GeoTransformer: Qin et al., CVPR 2022, sec. 3.2).

A pair is described by its distance, and by the angles at one point between the other point and the first point's
nearest neighbours. Neither depends on the view. Parameters are named as in the released checkpoint.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from posekit.sam6d.network.config import Config


class SinusoidalEmbedding(nn.Module):
    """Embed a number as sines and cosines of rising wavelength, alternating."""

    div_term: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        exponents = torch.arange(0, channels, 2).float() * (-math.log(10000.0) / channels)
        self.register_buffer("div_term", torch.exp(exponents))

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (..., C): sin, cos, sin, cos, ..."""
        angle = x[..., None] * self.div_term
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


class GeometricStructureEmbedding(nn.Module):
    """Embed every ordered pair of a cloud's points as `channels` numbers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = SinusoidalEmbedding(config.channels)
        self.proj_d = nn.Linear(config.channels, config.channels)
        self.proj_a = nn.Linear(config.channels, config.channels)

    def forward(self, points: Tensor) -> Tensor:
        """(B, N, 3), in object radii -> (B, N, N, C)."""
        distance, angle = self.indices(points)
        turned = self.proj_a(self.embedding(angle)).amax(dim=3)  # (B, N, N, C), the largest over the neighbours
        embedded: Tensor = self.proj_d(self.embedding(distance)) + turned
        return embedded

    def values(self, structure: Tensor) -> Tensor:
        """Return the result of `forward` as float32; here it is float32 already."""
        return structure

    def indices(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return distances (B, N, N) in units of sigma_d and angles (B, N, N, k) in units of sigma_a.

        Neither changes when the cloud moves. So the cloud is centred first, and lengths are computed from differences
        of points: the original's differences of squares lose so many digits far from the origin that nearest neighbours
        change. The first point, which stands for the background, does not count for the centre.
        """
        points = points - points[:, 1:].mean(dim=1, keepdim=True)
        to_other = points[:, None] - points[:, :, None]  # (B, N, N, 3)
        distance = to_other.norm(dim=-1)
        nearest = distance.topk(self.config.neighbours + 1, dim=2, largest=False).indices[..., 1:]  # (B, N, k)
        b, n, k = nearest.shape
        neighbour = points.gather(1, nearest.reshape(b, n * k, 1).expand(-1, -1, 3)).view(b, n, 1, k, 3)
        to_neighbour = (neighbour - points[:, :, None, None]).expand(-1, -1, n, -1, -1)  # (B, N, N, k, 3)
        to_each = to_other[:, :, :, None].expand(-1, -1, -1, k, -1)
        sine = torch.linalg.cross(to_neighbour, to_each).norm(dim=-1)
        cosine = (to_neighbour * to_each).sum(dim=-1)
        # In float64: in float32 the last bit depends on how threads split the work, and with it single draws.
        angle = torch.atan2(sine.double(), cosine.double()).float()
        return distance / self.config.sigma_d, angle * (180.0 / (self.config.sigma_a_deg * math.pi))


def pairwise_squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return (B, N, 3), (B, M, 3) -> (B, N, M), as |a|^2 - 2 a.b + |b|^2, never below zero."""
    squared = a.square().sum(-1)[:, :, None] - 2 * (a @ b.mT) + b.square().sum(-1)[:, None]
    return squared.clamp(min=0)
