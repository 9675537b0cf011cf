"""Rigid geometry on torch tensors: stateless, batched over leading dimensions, on the device of the input.

Frames: `T_a_b` maps points of b into a. Cameras follow OpenCV (x right, y down, z forward); pixel centres are whole
numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def backproject(u: Tensor, v: Tensor, depth_m: Tensor, K: Tensor) -> Tensor:
    """Return the points in the camera frame that pixels (u, v) saw at a depth.

    u, v, depth_m: (..., N) pixels and metres; K: (3, 3), or (B, 3, 3) for a leading dimension B. Returns (..., N, 3). A
    pixel without reading (0) gives the origin.
    """
    k = _entries(K, u.dim())
    y = (v - k[1, 2]) / k[1, 1]
    x = (u - k[0, 2] - k[0, 1] * y) / k[0, 0]
    return torch.stack((x * depth_m, y * depth_m, depth_m), dim=-1)


def project(points_cam: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pixel coordinates (u, v) of camera-frame points.

    points_cam: (..., 3), metres; K: (3, 3), or (B, 3, 3) for a leading dimension B. Returns two (...) tensors. Points
    at or behind the camera land far outside any image.
    """
    x, y, z = points_cam.unbind(-1)
    k = _entries(K, z.dim())
    z = torch.where(z > 1e-6, z, torch.full_like(z, 1e-6))
    return (k[0, 0] * x + k[0, 1] * y) / z + k[0, 2], k[1, 1] * y / z + k[1, 2]


def _entries(K: Tensor, dimensions: int) -> Tensor:
    """Return K's entries as (3, 3, ...), each of which broadcasts against a tensor with `dimensions` dimensions."""
    if K.dim() == 2:
        return K
    return K.permute(1, 2, 0).reshape(3, 3, len(K), *(1,) * (dimensions - 1))


def rotation_from_vector(omega: Tensor) -> Tensor:
    """Return the rotation about `omega` by its length in radians (Rodrigues); zero gives identity.

    (..., 3) -> (..., 3, 3).
    """
    angle = omega.norm(dim=-1)
    small = angle < 1e-6
    safe = torch.where(small, torch.ones_like(angle), angle)
    a = torch.where(small, 1 - angle**2 / 6, torch.sin(safe) / safe)[..., None, None]
    b = torch.where(small, 0.5 - angle**2 / 24, (1 - torch.cos(safe)) / safe**2)[..., None, None]
    skew = cross_matrix(omega)
    return torch.eye(3, dtype=omega.dtype, device=omega.device) + a * skew + b * (skew @ skew)


def cross_matrix(v: Tensor) -> Tensor:
    """Return the matrix with `cross_matrix(v) @ w == cross(v, w)`. (..., 3) -> (..., 3, 3)."""
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), dim=-1).reshape(*v.shape[:-1], 3, 3)


def rotation_angle_deg(R_a: Tensor, R_b: Tensor) -> Tensor:
    """Return the angle between two rotations in degrees. (..., 3, 3) twice -> (...)."""
    # The chord |R_a - R_b| = 2 sqrt(2) sin(angle / 2) stays exact for small angles, where the trace has no digits left.
    chord = (R_a - R_b).flatten(-2).norm(dim=-1)
    return torch.rad2deg(2 * torch.asin((chord / math.sqrt(8.0)).clamp(max=1.0)))


def nearest_rotation(M: Tensor) -> Tensor:
    """Return the rotation closest to M in the Frobenius norm, never a mirror. (..., 3, 3) -> (..., 3, 3)."""
    U, _, Vh = torch.linalg.svd(M)
    sign = torch.ones_like(M[..., 0])
    sign[..., 2] = torch.where(torch.linalg.det(U @ Vh) < 0, -1.0, 1.0)
    nearest: Tensor = (U * sign[..., None, :]) @ Vh
    return nearest


def align_points(source: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rigid motion that minimises `sum_n weight_n |R source_n + t - target_n|^2` (Kabsch 1976).

    source, target: (..., N, 3); weight: (..., N), non-negative, not all zero. Returns R (..., 3, 3) and t (..., 3).
    """
    share = (weight / weight.sum(dim=-1, keepdim=True))[..., None]
    centre_source = (share * source).sum(dim=-2)
    centre_target = (share * target).sum(dim=-2)
    spread = (target - centre_target[..., None, :]).mT @ (share * (source - centre_source[..., None, :]))
    R = nearest_rotation(spread)
    return R, centre_target - (R @ centre_source[..., None])[..., 0]


def view_directions(count: int) -> Tensor:
    """Spread `count` directions evenly over the sphere (golden spiral), float64 on the CPU: (count, 3), unit."""
    k = torch.arange(count, dtype=torch.float64) + 0.5
    z = 1 - 2 * k / count
    around = k * (math.pi * (3 - math.sqrt(5.0)))
    ring = torch.sqrt(1 - z * z)
    return torch.stack((ring * torch.cos(around), ring * torch.sin(around), z), dim=-1)


def rotation_looking_from(direction: Tensor) -> Tensor:
    """Return R_cam_obj of a camera that looks at the object from `direction` (unit, object frame), with any roll.

    (..., 3) -> (..., 3, 3). The camera's z axis is `-direction`.
    """
    z = -direction
    away = torch.zeros_like(z)
    away.scatter_(-1, z.abs().argmin(dim=-1, keepdim=True), 1.0)
    x = torch.nn.functional.normalize(torch.linalg.cross(away, z), dim=-1)
    return torch.stack((x, torch.linalg.cross(z, x), z), dim=-2)


def rotation_about_z(angle: Tensor) -> Tensor:
    """Return turns about z by `angle` radians: (...) -> (..., 3, 3)."""
    axis = torch.zeros(*angle.shape, 3, dtype=angle.dtype, device=angle.device)
    axis[..., 2] = angle
    return rotation_from_vector(axis)


def rotation_from_z_to(direction: Tensor) -> Tensor:
    """Return the shortest turn that takes the z axis to `direction` (unit): (..., 3) -> (..., 3, 3)."""
    x, y, z = direction.unbind(-1)
    axis = torch.stack((-y, x, torch.zeros_like(x)), dim=-1)
    sine = axis.norm(dim=-1, keepdim=True)
    unit = torch.where(sine > 1e-9, axis / sine.clamp(min=1e-9), torch.tensor([1.0, 0.0, 0.0]).to(axis))
    return rotation_from_vector(unit * torch.atan2(sine, z[..., None]))


def rotation_grid(directions: Tensor, turns: int) -> Tensor:
    """Return every view direction with `turns` rolls: (V, 3) -> R_cam_obj (V, turns, 3, 3)."""
    angle = torch.arange(turns, dtype=directions.dtype, device=directions.device) * (2 * math.pi / turns)
    return rotation_about_z(angle)[None] @ rotation_looking_from(directions)[:, None]
