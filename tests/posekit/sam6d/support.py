"""Helpers for the tests of the network: numbers, clouds, and logits of a known pose."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from posekit.geometry import rotation_from_vector


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def rotations(*shape: int, seed: int = 0) -> Tensor:
    """Return random rotations, (..., 3, 3), drawn from all rotations."""
    return rotation_from_vector(3 * random(*shape, 3, seed=seed))


def sphere(*shape: int, seed: int = 0) -> Tensor:
    """Return points on a sphere, (..., 3), as an object's cloud in its radii."""
    return nn.functional.normalize(random(*shape, 3, seed=seed), dim=-1)


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every tensor of the module with numbers that keep activations near one; return it ready for inference."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point() or name.endswith("div_term"):
            continue
        numbers = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            numbers = 0.3 + 0.2 * numbers.abs()
        elif name.endswith("weight") and tensor.ndim == 1:  # weight of a norm
            numbers = 1 + 0.3 * numbers
        elif name.endswith("weight"):
            numbers = numbers * (2 / tensor[0].numel()) ** 0.5
        else:
            numbers = 0.3 * numbers
        tensor.copy_(numbers)
    return module.eval().requires_grad_(False)


class Posed(NamedTuple):
    """Two clouds whose points match under a pose, and logits that express it."""

    logits: Tensor  # (B, 1 + N, 1 + M)
    scene: Tensor  # (B, N, 3), R model + t
    model: Tensor  # (B, M, 3)
    surface: Tensor  # (B, S, 3)
    R: Tensor  # (B, 3, 3)
    t: Tensor  # (B, 3)


def posed(batch: int, scene: int, model: int, *, far: float = 13.0, seed: int = 0) -> Posed:
    """Make clouds and logits of a known pose. Every fifth scene point is not on the model: its logits say background.

    `scene` points are drawn from `model` ones, so that some repeat. `far`: distance from the camera, in object radii.
    """
    of_model = sphere(batch, model, seed=seed) * torch.tensor([1.0, 0.7, 0.5])
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = torch.randint(model, (batch, scene), generator=generator)
    R, t = rotations(batch, seed=seed + 2), torch.tensor([0.1, -0.2, 1.0]) * far
    there = of_model.gather(1, drawn[..., None].expand(-1, -1, 3))
    apart = torch.cdist(there, of_model)
    stray = torch.arange(scene) % 5 == 4
    logits = torch.full((batch, 1 + scene, 1 + model), -6.0)
    logits[:, 1:, 1:] += 14 * torch.exp(-(apart**2) / (2 * 0.05**2)) * ~stray[:, None]
    logits[:, 1:, 0] = torch.where(stray, 8.0, 0.0)
    logits[:, 0, 1:] = 0.0
    logits += 0.3 * random(*logits.shape, seed=seed + 3)
    placed = there @ R.mT + t + 0.005 * random(batch, scene, 3, seed=seed + 4)
    placed[:, stray] += 0.4
    return Posed(logits, placed, of_model, of_model, R, t.expand(batch, 3))
