"""The hot loops of quick/cpu.py: compiled for the CPU where that was built, else plain torch.

Loading `_kernels_cpu.so` in this folder registers its ops with torch. A kernel agrees with the plain stage in network/
(coarse.py, fine.py, structure.py, attention.py) up to float32 rounding, `embed` up to that of its 16 bits. A kernel
processes one row after the other, so that neither threads nor batch-mates change a bit. All tensors are float32
unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from posekit.compiled import Kernel, load_kernels

OPS = ("embed", "focus", "look_around", "propose", "relative_attention", "soft_matches", "surface_distance")
NOWHERE = 1e6  # each coordinate of the t that `propose` returns for a triple without a unique rotation


def embed(distance: Tensor, angle: Tensor, distances: Tensor, angles: Tensor, steps: float, step: float) -> Tensor:
    """Embed pairs of points from tables: add the row of a distance and the largest of the rows of its angles.

    distance: (B, N, N) and angle: (B, N, N, k), in units of which a table has `steps` rows each; distances, angles:
    the tables, (rows, C), interpolated between two rows and extrapolated linearly beyond the last one.
    Returns (B, N, N, C) int16, in units of `step`.
    """
    return cast(Tensor, torch.ops.sam6d.embed(distance, angle, distances, angles, steps, step))


def relative_attention(q: Tensor, k: Tensor, v: Tensor, folded: Tensor, structure: Tensor) -> Tensor:
    """Compute softmax attention over `q.k + folded.structure`, by head.

    q, k, v: (B, N, C); folded: (B, N, heads, C), the query of each head, projected for a raw structure; structure:
    (B, N, N, C) int16 -> (B, N, C). Four heads, 256 channels.
    """
    return cast(Tensor, torch.ops.sam6d.relative_attention(q, k, v, folded, structure))


def focus(x: Tensor, scale: Tensor) -> Tensor:
    """Compute `FocusedAttention.focus`. x: (B, N, C); scale: (C,), after the softplus."""
    return cast(Tensor, torch.ops.sam6d.focus(x, scale))


def look_around(there: Tensor, here: Tensor, index: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """Apply the second and third layer of a shared MLP to all neighbours; return the largest value of each channel.

    there, here: (B, N, 32), whose difference goes into the first ReLU; index: (B, N, S) int64 from a ball query, spare
    slots repeating the first; layers: weights and biases (32, 64), (64,), (64, 128), (128,) -> (B, N, 128).
    """
    return cast(Tensor, torch.ops.sam6d.look_around(there, here, index, list(layers)))


def propose(pairs: Tensor, scene: Tensor, model: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `coarse.propose`: R (B, H, 3, 3), t (B, H, 3), residual (B, H).

    Three points on a line, repeated ones above all, leave a rotation undetermined. Their t is `NOWHERE`, so that none
    of them wins; their residual stays.
    """
    return cast(tuple[Tensor, Tensor, Tensor], torch.ops.sam6d.propose(pairs, scene, model))


def surface_distance(scene: Tensor, R: Tensor, t: Tensor, surface: Tensor, wanted: Tensor) -> Tensor:
    """Compute `coarse.surface_distance` where `wanted` (B, N) is above zero, elsewhere 0: (B, H, N)."""
    return cast(Tensor, torch.ops.sam6d.surface_distance(scene, R, t, surface, wanted))


def soft_matches(logits: Tensor, model: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `fine.soft_matches`: points (B, N, 3), weight (B, N), matched (B, N).

    Logits must lie within 40 of each other.
    """
    return cast(tuple[Tensor, Tensor, Tensor], torch.ops.sam6d.soft_matches(logits, model))


def kernel_for(device: str | torch.device) -> Kernel:
    """Return which kernels answer for tensors on `device` ("cpu", "cuda:1", ...): compiled ones or plain torch."""
    return "compiled" if _compiled and torch.device(device).type == "cpu" else "reference"


def kernels(device: str | torch.device) -> dict[str, Kernel]:
    """Return `kernel_for` for each loop by name, for status pages and metrics."""
    return {op: kernel_for(device) for op in OPS}


_compiled = load_kernels("posekit.sam6d", Path(__file__).parent / "_kernels_cpu.so")
