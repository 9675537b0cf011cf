"""Image features at points: the encoder's pyramid, upscaled to pixels.

Parameters are named as in the released checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from posekit.sam6d.network.config import Config
from posekit.sam6d.network.vit import VisionTransformer

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize(rgb: Tensor) -> Tensor:
    """Normalise for the encoder: (B, H, W, 3) uint8, in the caller's channel order, -> (B, 3, H, W) float32."""
    mean, std = (torch.tensor(values, device=rgb.device) for values in (MEAN, STD))
    return ((rgb.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


class ImageNetwork(nn.Module):
    """Encoder and upscaling: a cell of `channels` features for every 4 x 4 pixels."""

    def __init__(self, config: Config, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.config = config
        self.vit = VisionTransformer(config, linear)
        pyramid = len(config.taken_blocks) * config.width
        self.output_upscaling = linear(pyramid, config.upscaling**2 * config.channels)

    def pyramid(self, images: Tensor) -> Tensor:
        """Encode: (B, 3, 224, 224) -> the taken blocks side by side, without class token: (B, 196, 4 * 768)."""
        return torch.cat([taken[:, 1:] for taken in self.vit(images)], dim=-1)

    def cells(self, pyramid: Tensor) -> Tensor:
        """(B, 196, 3072) -> (B, C, 56, 56)."""
        n, s = self.config.patches, self.config.upscaling
        cells: Tensor = self.output_upscaling(pyramid).view(-1, n, n, s, s, self.config.channels)
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.channels, n * s, n * s)

    def pixels(self, cells: Tensor) -> Tensor:
        """Upscale bilinearly: (B, C, 56, 56) -> (B, C, 224, 224)."""
        side = self.config.image_px
        return functional.interpolate(cells, (side, side), mode="bilinear", align_corners=False)


class FeatureExtraction(nn.Module):
    """Features at the pixels that points came from."""

    linear: type[nn.Linear] = nn.Linear  # class of the encoder's linear layers

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.rgb_net = ImageNetwork(config, self.linear)

    def forward(self, images: Tensor, choose: Tensor) -> Tensor:
        """images: (B, 3, 224, 224); choose: (B, N) flat pixel of each point -> (B, N, C)."""
        net = self.rgb_net
        pixels = net.pixels(net.cells(net.pyramid(images))).flatten(2)  # (B, C, 224 * 224)
        return pixels.gather(2, choose[:, None].expand(-1, pixels.shape[1], -1)).transpose(1, 2).contiguous()
