"""ViT-B/16 (Dosovitskiy et al., 2021) as an image encoder that returns its intermediate blocks.

Parameters are named as in the released checkpoint.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from posekit.sam6d.network.config import Config

_Norm = partial(nn.LayerNorm, eps=1e-6)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.proj = linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        b, n, c = x.shape
        q, k, v = (
            self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        )  # (B, heads, N, C / heads)
        seen = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(seen.transpose(1, 2).reshape(b, n, c))
        return out


class Mlp(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.fc1 = linear(width, hidden)
        self.fc2 = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each after a norm and with a shortcut."""

    def __init__(self, config: Config, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.norm1 = _Norm(config.width)
        self.attn = Attention(config.width, config.image_heads, linear)
        self.norm2 = _Norm(config.width)
        self.mlp = Mlp(config.width, config.mlp_ratio * config.width, linear)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbedding(nn.Module):
    """Cut the image into patches and turn each into a token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, kernel_size=config.patch_px, stride=config.patch_px)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H/16 * W/16, C), row by row."""
        tokens: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return tokens


class VisionTransformer(nn.Module):
    """The encoder. `head` is part of the released weights but is not used."""

    def __init__(self, config: Config, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.taken_blocks = config.taken_blocks
        tokens = config.patches**2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, config.width))
        self.patch_embed = PatchEmbedding(config)
        self.blocks = nn.ModuleList(Block(config, linear) for _ in range(config.depth))
        self.norm = _Norm(config.width)
        self.head = nn.Linear(config.width, 1000)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, 224, 224) -> the outputs of `taken_blocks`, each normed: (B, 1 + patches, C), class token first."""
        x = torch.cat((self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)), dim=1) + self.pos_embed
        taken = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.taken_blocks:
                taken.append(self.norm(x))
        return taken
