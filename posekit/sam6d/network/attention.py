"""The transformer layers of point matching. Parameters are named as in the released checkpoint.

Clouds have a background token in front (index 0). Norms come after the shortcut.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from posekit.sam6d.network.config import Config


class Output(nn.Module):
    """The feed-forward half of a layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, 2 * channels)
        self.squeeze = nn.Linear(2 * channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        out: Tensor = self.norm(x + self.squeeze(functional.relu(self.expand(x))))
        return out


class MultiHeadAttention(nn.Module):
    """Softmax attention from one cloud to another."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.proj_q = nn.Linear(channels, channels)
        self.proj_k = nn.Linear(channels, channels)
        self.proj_v = nn.Linear(channels, channels)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)."""
        b, n, c = x.shape
        return x.view(b, n, self.heads, c // self.heads).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x: (B, N, C); memory: (B, M, C) -> (B, N, C)."""
        q, k, v = self.split(self.proj_q(x)), self.split(self.proj_k(memory)), self.split(self.proj_v(memory))
        share = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return joined(share @ v)


class RelativeAttention(MultiHeadAttention):
    """Softmax self-attention that also uses the structure of each pair."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads)
        self.proj_p = nn.Linear(channels, channels)

    def forward(self, x: Tensor, structure: Tensor) -> Tensor:
        """x: (B, N, C); structure: (B, N, N, C) -> (B, N, C)."""
        q, k, v = self.split(self.proj_q(x)), self.split(self.proj_k(x)), self.split(self.proj_v(x))
        p = self.proj_p(structure).unflatten(-1, (self.heads, -1))  # (B, N, N, heads, C / heads)
        scores = q @ k.mT + torch.einsum("bhnc,bnmhc->bhnm", q, p)
        share = (scores / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return joined(share @ v)


class FocusedAttention(nn.Module):
    """Linear attention with sharpened directions (FLatten: Han et al., ICCV 2023)."""

    def __init__(self, channels: int, heads: int, focusing: int) -> None:
        super().__init__()
        self.heads, self.focusing = heads, focusing
        self.proj_q = nn.Linear(channels, channels)
        self.proj_k = nn.Linear(channels, channels)
        self.proj_v = nn.Linear(channels, channels)
        self.scale = nn.Parameter(torch.zeros(1, 1, channels))

    def focus(self, x: Tensor) -> Tensor:
        """Raise all channels to a power and keep the vector's length. (B, N, C) -> (B, N, C)."""
        x = (functional.relu(x) + 1e-6) / functional.softplus(self.scale)
        sharp = x**self.focusing
        focused: Tensor = sharp / sharp.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)
        return focused

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x: (B, N, C); memory: (B, M, C) -> (B, N, C)."""
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N or M, C / heads)
            for y in (self.focus(self.proj_q(x)), self.focus(self.proj_k(memory)), self.proj_v(memory))
        )
        weight = 1 / ((q * k.sum(dim=2, keepdim=True)).sum(dim=-1, keepdim=True) + 1e-6)  # (B, heads, N, 1)
        return joined(q @ (k.mT @ v) * weight)


def joined(x: Tensor) -> Tensor:
    """(B, heads, N, C / heads) -> (B, N, C)."""
    return x.transpose(1, 2).flatten(2)


class AttentionBlock(nn.Module):
    """An attention with its last projection, the shortcut and the norm."""

    def __init__(self, attention: nn.Module, channels: int) -> None:
        super().__init__()
        self.attention = attention
        self.linear = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """x: (B, N, C); other: what the attention reads, structure or memory -> (B, N, C)."""
        out: Tensor = self.norm(x + self.linear(self.attention(x, other)))
        return out


class Layer(nn.Module):
    """A transformer layer around any of the attentions above."""

    def __init__(self, attention: nn.Module, channels: int) -> None:
        super().__init__()
        self.attention = AttentionBlock(attention, channels)
        self.output = Output(channels)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """x: (B, N, C); other: structure or memory, as the attention needs -> (B, N, C)."""
        out: Tensor = self.output(self.attention(x, other))
        return out


class GeometricBlock(nn.Module):
    """Self-attention of each cloud, then scene to object, then object to the already updated scene."""

    def __init__(self, config: Config, relative: type[RelativeAttention]) -> None:
        super().__init__()
        c, heads = config.channels, config.heads
        self.layers = nn.ModuleList((Layer(relative(c, heads), c), Layer(MultiHeadAttention(c, heads), c)))

    def look_at_itself(self, x: Tensor, structure: Tensor) -> Tensor:
        """Apply self-attention: (B, N, C), (B, N, N, C) -> (B, N, C)."""
        out: Tensor = self.layers[0](x, structure)
        return out

    def look_at_each_other(self, scene: Tensor, model: Tensor) -> tuple[Tensor, Tensor]:
        """Apply attention between the clouds: (B, N, C), (B, M, C) -> the same shapes."""
        scene = self.layers[1](scene, model)
        model = self.layers[1](model, scene)
        return scene, model


class SparseToDenseBlock(nn.Module):
    """A few points go through a geometric block; all points of their cloud then attend to them."""

    def __init__(self, config: Config, relative: type[RelativeAttention], focused: type[FocusedAttention]) -> None:
        super().__init__()
        self.sparse_layer = GeometricBlock(config, relative)
        attention = focused(config.channels, config.heads, config.focusing)
        self.dense_layer = Layer(attention, config.channels)

    def spread(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """dense: (B, 1 + N, C); sparse: (B, 1 + n, C) -> (B, 1 + N, C). The background token is the sparse one's."""
        return torch.cat((sparse[:, :1], self.dense_layer(dense[:, 1:], sparse[:, 1:])), dim=1)
