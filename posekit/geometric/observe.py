"""From a crop to what the search works on: clean points with normals, and maps to look the surroundings up in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt
from torch import Tensor

from posekit.engine import Bool, Float32, Float64, Instance, Rejection
from posekit.geometry import backproject, project

POINTS = 512  # observed points that everything works on
LEAST_POINTS = 32  # more valid depth pixels than this are needed
FARTHEST_M = 100.0  # a reading beyond is no depth


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One detection on the device. Points are drawn evenly over the mask's pixels, in random order: every prefix of
    them is a fair sample."""

    points: Tensor  # (N, 3), camera frame, metres
    normals: Tensor  # (N, 3), unit, towards the camera
    colours: Tensor  # (N, 3) in 0..1
    centre: Tensor  # (3,), mean of the cleaned points
    depth_m: Tensor  # (h, w), 0 = no reading
    nearest_depth_m: Tensor  # (h, w), the smallest reading among a pixel and its neighbours
    mask: Tensor  # (h, w) bool, as given
    nearest_in_mask: Tensor  # (h, w, 2) pixel (u, v) of the closest mask pixel
    K: Tensor  # (3, 3)
    noise_m: float  # spread of readings about the surface, estimated from them


def observe(instance: Instance, diameter_m: float, device: torch.device) -> Observation | Rejection:
    """Clean the points under the mask, or say why that cannot be done."""
    mask = np.asarray(instance.mask, dtype=np.bool_)
    depth = np.array(instance.depth_m, dtype=np.float32)
    K = np.asarray(instance.K, dtype=np.float64)
    if mask.ndim != 2 or depth.shape != mask.shape or np.shape(instance.rgb) != (*mask.shape, 3) or K.shape != (3, 3):
        return Rejection(code="engine_error", detail="the crop's colours, depth, mask and camera do not fit each other")
    if not mask.any():
        return Rejection(code="mask_empty", detail="the mask has no pixel")
    if not (np.isfinite(K).all() and K[0, 0] > 0 and K[1, 1] > 0):
        return Rejection(
            code="engine_error", detail="the crop's camera matrix is not finite with positive focal lengths"
        )
    with np.errstate(invalid="ignore"):
        depth[~((depth > 0) & (depth < FARTHEST_M))] = 0
    usable = mask & (depth > 0)
    count = int(usable.sum())
    if count == 0:
        return Rejection(code="no_depth", detail=f"none of the mask's {int(mask.sum())} pixels has a depth reading")
    if count <= LEAST_POINTS:
        return Rejection(
            code="mask_too_small",
            detail=f"{count} valid depth pixels under the mask, more than {LEAST_POINTS} needed",
        )
    clean = _without_rims(usable, depth, K, diameter_m)
    clean = _near_the_middle(clean, depth, K, diameter_m)

    generator = torch.Generator().manual_seed(instance.seed % 2**63)
    row, column = (torch.from_numpy(index) for index in np.nonzero(clean))
    order = torch.randperm(len(row), generator=generator)
    if len(order) < POINTS:  # few pixels are repeated, so that every shape is fixed
        order = order.repeat(math.ceil(POINTS / len(order)))
    order = order[:POINTS]
    row, column = row[order].to(device), column[order].to(device)

    depth_map = torch.tensor(depth).to(device)
    K_map = torch.tensor(K, dtype=torch.float32).to(device)
    xyz = backproject(depth_map, K_map)
    points = xyz[row, column]
    normals, noise = _normals(xyz, torch.tensor(usable).to(device), row, column, points, K_map, diameter_m)
    far = torch.where(depth_map > 0, depth_map, torch.full_like(depth_map, 2 * FARTHEST_M))
    nearest_depth = -torch.nn.functional.max_pool2d(-far[None, None], 3, stride=1, padding=1)[0, 0]
    nearest = distance_transform_edt(~mask, return_distances=False, return_indices=True)
    return Observation(
        points=points,
        normals=normals,
        colours=torch.tensor(np.array(instance.rgb)).to(device)[row, column].float() / 255.0,
        centre=points.mean(dim=0),
        depth_m=depth_map,
        nearest_depth_m=nearest_depth,
        mask=torch.tensor(mask).to(device),
        nearest_in_mask=torch.tensor(np.stack((nearest[1], nearest[0]), axis=-1), dtype=torch.float32).to(device),
        K=K_map,
        noise_m=noise,
    )


def classify(observation: Observation, points_cam: Tensor, tolerance_m: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the camera saw where model points should be.

    points_cam: (..., 3). Returns four boolean (...): on the object (right depth, in the mask), beside it (right depth,
    outside the mask), through (the camera saw something behind the point, in the neighbouring pixels too: outlines are
    good to a pixel), hidden (something in front of it). A point without reading, or outside the crop, is none of them.
    """
    h, w = observation.depth_m.shape
    u, v = project(points_cam, observation.K)
    column, row = u.round(), v.round()
    inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
    flat = (row.clamp(0, h - 1) * w + column.clamp(0, w - 1)).long()
    seen = observation.depth_m.reshape(-1)[flat]
    in_mask = observation.mask.reshape(-1)[flat]
    known = inside & (seen > 0)
    behind = seen - points_cam[..., 2]
    level = known & (behind.abs() <= tolerance_m)
    through = known & (observation.nearest_depth_m.reshape(-1)[flat] - points_cam[..., 2] > tolerance_m)
    return level & in_mask, level & ~in_mask, through, known & (behind < -tolerance_m)


def _without_rims(usable: Bool, depth: Float32, K: Float64, diameter_m: float) -> Bool:
    """Drop the mask's rim and pixels that hang between two surfaces, as long as enough remain."""
    least = max(LEAST_POINTS, int(0.4 * usable.sum()))
    padded = np.pad(depth, 1)
    jump = np.zeros_like(depth)
    for dy, dx in ((0, 1), (1, 0), (1, 2), (2, 1)):
        neighbour = padded[dy : dy + depth.shape[0], dx : dx + depth.shape[1]]
        jump = np.maximum(jump, np.where(neighbour > 0, np.abs(neighbour - depth), 0))
    pixel = depth / K[0, 0]
    calm = usable & (jump < np.maximum(6 * pixel, 0.05 * diameter_m))
    for candidate in (binary_erosion(usable) & calm, calm):
        if candidate.sum() > least:
            return np.asarray(candidate)
    return usable


def _near_the_middle(usable: Bool, depth: Float32, K: Float64, diameter_m: float) -> Bool:
    """Drop what cannot belong to an object of this size around the robust middle."""
    row, column = np.nonzero(usable)
    z = depth[row, column].astype(np.float64)
    points = np.stack(((column - K[0, 2]) * z / K[0, 0], (row - K[1, 2]) * z / K[1, 1], z), axis=1)
    near = np.linalg.norm(points - np.median(points, axis=0), axis=1) < 0.75 * diameter_m + 0.01 * np.median(z)
    if near.sum() <= LEAST_POINTS:
        return usable
    kept = np.zeros_like(usable)
    kept[row[near], column[near]] = True
    return kept


def _normals(
    xyz: Tensor, usable: Tensor, row: Tensor, column: Tensor, points: Tensor, K: Tensor, diameter_m: float
) -> tuple[Tensor, float]:
    """Normals (N, 3) of planes z = a x + b y + c through 7 x 7 readings about each pixel, and the readings' spread.

    The window is about a tenth of the object wide; readings of other surfaces do not take part.
    """
    h, w = usable.shape
    pixel = float(points[:, 2].median() / K[0, 0])
    step = min(max(round(0.1 * diameter_m / 6 / pixel), 1), 8)
    offset = torch.arange(-3, 4, device=xyz.device) * step
    rows = (row[:, None, None] + offset[:, None]).expand(-1, 7, 7).reshape(len(row), 49)
    columns = (column[:, None, None] + offset[None, :]).expand(-1, 7, 7).reshape(len(row), 49)
    inside = (rows >= 0) & (rows < h) & (columns >= 0) & (columns < w)
    flat = rows.clamp(0, h - 1) * w + columns.clamp(0, w - 1)
    local = xyz.reshape(-1, 3)[flat] - points[:, None]  # (N, 49, 3)
    reach = max(0.05 * diameter_m, 4 * step * pixel)
    weight = (inside & usable.reshape(-1)[flat] & (local[..., 2].abs() < reach)).float()
    for _ in range(2):
        total = weight.sum(dim=1).clamp(min=1)
        mean = (weight[..., None] * local).sum(dim=1) / total[:, None]
        x, y, z = (local - mean[:, None]).unbind(-1)
        xx, xy, yy = ((weight * product).sum(dim=1) for product in (x * x, x * y, y * y))
        xz, yz = ((weight * product).sum(dim=1) for product in (x * z, y * z))
        ridge = 0.02 * (xx + yy) + 1e-12
        determinant = (xx + ridge) * (yy + ridge) - xy * xy
        a = ((yy + ridge) * xz - xy * yz) / determinant
        b = ((xx + ridge) * yz - xy * xz) / determinant
        off = z - a[:, None] * x - b[:, None] * y
        spread = ((weight * off * off).sum(dim=1) / total).sqrt()
        weight = weight * (off.abs() < 2.5 * spread[:, None] + 1e-6)
    normal = torch.stack((a, b, -torch.ones_like(a)), dim=-1)
    return normal / normal.norm(dim=-1, keepdim=True), float(spread.quantile(0.25))
