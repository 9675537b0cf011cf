"""Every number of the network, as published with SAM-6D (Lin et al., CVPR 2024)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Config:
    """The released network. Released weights fit no other values; tests shrink some that no weight depends on."""

    # Image features: the blocks `taken_blocks` of a ViT-B form a pyramid, upscaled to pixels.
    image_px: int = 224
    patch_px: int = 16
    width: int = 768
    depth: int = 12
    image_heads: int = 12
    mlp_ratio: int = 4
    taken_blocks: tuple[int, ...] = (2, 5, 8, 11)
    upscaling: int = 4  # cells a patch is cut into, each way

    # Point matching. Lengths are in object radii.
    channels: int = 256
    heads: int = 4
    blocks: int = 3  # of the coarse and of the fine matcher
    coarse_points: int = 196
    fine_points: int = 2048
    temperature: float = 0.1
    background: float = 100.0  # each coordinate of the point that stands for the background

    # Geometric structure embedding: the geometry of a pair of points, independent of the view.
    sigma_d: float = 0.2
    sigma_a_deg: float = 15.0
    neighbours: int = 3

    # Coarse matching: hypotheses from drawn triples of matches.
    proposals: int = 6000
    kept: int = 300

    # Fine matching.
    position_radii: tuple[float, float] = (0.1, 0.2)
    position_samples: tuple[int, int] = (32, 64)
    focusing: int = 3  # power of the focused linear attention
    score_distance: float = 0.15

    # The network's input.
    views: int = 42
    view_points: int = 5000  # drawn from each view, before furthest-point sampling leaves `fine_points`
    model_points: int = 1024  # points on the CAD's surface

    @property
    def patches(self) -> int:
        """Return the number of patches along one side of the image."""
        return self.image_px // self.patch_px
