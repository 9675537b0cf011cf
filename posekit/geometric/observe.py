"""Turn crops into the search's inputs: clean points with normals, and pixel maps for looking up the surroundings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt, label, minimum_filter
from torch import Tensor

from posekit.engine import Bool, Float32, Float64, Instance, Int32, Rejection, UInt8
from posekit.geometry import backproject, project

POINTS = 512  # observed points in every computation
LEAST_POINTS = 32  # an instance needs more valid depth pixels than this
SEED_POINTS = 256  # points of each part of a mask, on which its hypotheses are judged
SEEDS = 4  # parts of a mask at most: the whole mask and its largest pieces
LEAST_DRAWN = 24  # a part with fewer of the observed points is left out
PART = 0.1  # share of the points: a smaller piece is not a part of its own
MASK_SIDE = 240  # pixels; crops of larger masks are thinned
GREY = 2.0  # of 255: a picture with a smaller mean difference between its channels has no colours
FARTHEST_M = 100.0  # a larger reading is no depth


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """One detection on the CPU.

    Points are drawn evenly over the mask's pixels, in random order: every prefix of them is a fair sample.
    """

    depth_m: Float32  # (h, w), 0 = no reading
    nearest_depth_m: Float32  # (h, w), the smallest reading among a pixel and its neighbours
    mask: Bool  # (h, w), as given
    usable: Bool  # (h, w), under the mask and with a reading
    to_border: Float32  # (h, w, 2) pixels (u, v) to the mask's nearest outermost pixel; 0 on that pixel
    K: Float64  # (3, 3)
    row: Int32  # (N,), row of each point's pixel
    column: Int32  # (N,), column of each point's pixel
    rgb: UInt8  # (h, w, 3)
    members: Bool  # (C, N): points of each part; the first part is everything, unless it has too few points
    seed_points: Int32  # (C, SEED_POINTS) indices of points of each part, repeated where it has fewer


@dataclass(frozen=True, kw_only=True)
class Observations:
    """B detections on the device; their pixel maps are concatenated."""

    points: Tensor  # (B, N, 3), camera frame, metres
    normals: Tensor  # (B, N, 3), unit, towards the camera
    colours: Tensor  # (B, N, 3) in 0..1
    members: Tensor  # (B, C, N) 0 or 1
    seed_points: Tensor  # (B, C, SEED_POINTS) indices of points
    seed_centres: Tensor  # (B, C, 3), mean of each part
    noise_m: Tensor  # (B,) spread of the readings about the surface, estimated from the readings
    K: Tensor  # (B, 3, 3)
    width: Tensor  # (B,), width of the crop, pixels
    height: Tensor  # (B,), height of the crop, pixels
    depth_m: Tensor  # (all pixels,)
    nearest_depth_m: Tensor  # (all pixels,)
    mask: Tensor  # (all pixels,) bool
    rgb: Tensor  # (all pixels, 3) uint8
    to_border: Tensor  # (all pixels, 2)
    first_pixel: Tensor  # (B,)
    grey: Tensor  # (B,) bool: the picture has no colours

    def of_part(self, index: int, count: int) -> tuple[Tensor, Tensor]:
        """Return at most `count` points of a part of each mask, and their normals: (B, n, 3) each."""
        chosen = self.seed_points[:, index, :count, None].expand(-1, -1, 3)
        return self.points.gather(1, chosen), self.normals.gather(1, chosen)

    def as_pictured(self, colours: Tensor) -> Tensor:
        """Return the colours of an object (B, H, ..., 3) as the camera would show them: grey in a grey picture."""
        grey = self.grey.reshape(-1, *(1,) * (colours.dim() - 1))
        return torch.where(grey, colours.mean(dim=-1, keepdim=True), colours)

    def pixel(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the index into the maps of the pixel at (u, v), (B, ...) each, and whether it is inside the crop.

        Outside, the index is that of the nearest pixel inside.
        """
        shape = (-1,) + (1,) * (u.dim() - 1)
        width, height = self.width.reshape(shape), self.height.reshape(shape)
        column, row = u.round(), v.round()
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        column = torch.minimum(column.clamp(min=0), width - 1)
        row = torch.minimum(row.clamp(min=0), height - 1)
        return (row * width + column).long() + self.first_pixel.reshape(shape), inside

    def classify(self, points_cam: Tensor, tolerance_m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Classify what the camera saw where model points should be.

        points_cam: (B, H, M, 3), tolerance_m: (B,). Returns four boolean (B, H, M):
        - on the object: right depth, inside the mask;
        - beside it: right depth, outside the mask;
        - through: something behind the point was seen, in the neighbouring pixels too (outlines are good to a pixel);
        - hidden: something is in front of the point.
        A point without reading, or outside the crop, is none of them.
        """
        flat, inside = self.pixel(*project(points_cam, self.K))
        tolerance = tolerance_m[:, None, None]
        seen = self.depth_m[flat]
        in_mask = self.mask[flat]
        known = inside & (seen > 0)
        behind = seen - points_cam[..., 2]
        level = known & (behind.abs() <= tolerance)
        through = known & (self.nearest_depth_m[flat] - points_cam[..., 2] > tolerance)
        return level & in_mask, level & ~in_mask, through, known & (behind < -tolerance)


def clean(instance: Instance, diameter_m: float) -> Cleaned | Rejection:
    """Choose the points under the mask, or return the reason why that is impossible."""
    mask = np.asarray(instance.mask, dtype=np.bool_)
    depth = np.array(instance.depth_m, dtype=np.float32)
    rgb = np.asarray(instance.rgb)
    K = np.asarray(instance.K, dtype=np.float64)
    if mask.ndim != 2 or depth.shape != mask.shape or rgb.shape != (*mask.shape, 3) or K.shape != (3, 3):
        return Rejection(code="engine_error", detail="the crop's colours, depth, mask and camera do not fit each other")
    if not mask.any():
        return Rejection(code="mask_empty", detail="the mask has no pixel")
    if not (np.isfinite(K).all() and K[0, 0] > 1e-6 and K[1, 1] > 1e-6):
        return Rejection(
            code="engine_error", detail="the crop's camera matrix is not finite with positive focal lengths"
        )
    with np.errstate(invalid="ignore"):
        depth[~((depth > 0) & (depth < FARTHEST_M))] = 0
    count = int((mask & (depth > 0)).sum())
    if count == 0:
        return Rejection(code="no_depth", detail=f"none of the mask's {int(mask.sum())} pixels has a depth reading")
    if count <= LEAST_POINTS:
        return Rejection(
            code="mask_too_small",
            detail=f"{count} valid depth pixels under the mask, more than {LEAST_POINTS} needed",
        )
    side = max(int(np.ptp(np.flatnonzero(mask.any(axis=axis)))) + 1 for axis in (0, 1))
    if (step := math.ceil(side / MASK_SIDE)) > 1:
        thinned = mask[::step, ::step] & (depth[::step, ::step] > 0)
        if thinned.sum() > LEAST_POINTS:
            mask, depth, rgb = mask[::step, ::step], depth[::step, ::step], rgb[::step, ::step]
            K = np.diag((1 / step, 1 / step, 1.0)) @ K
    usable = mask & (depth > 0)
    calm = _without_rims(usable, depth, K, diameter_m)
    row, column = np.nonzero(calm)
    z = depth[row, column].astype(np.float64)
    points = np.stack(((column - K[0, 2]) * z / K[0, 0], (row - K[1, 2]) * z / K[1, 1], z), axis=1)
    parts = _parts(points, label(calm)[0][row, column], diameter_m)

    chosen = np.flatnonzero(parts.any(axis=0))
    order = np.random.default_rng(instance.seed % 2**63).permutation(chosen)
    order = np.resize(order, POINTS)  # too few pixels are repeated, so that every shape is fixed
    members = parts[:, order]
    members = members[members.sum(axis=1) >= LEAST_DRAWN]  # never empty: at most SEEDS parts share the points
    row, column = row[order].astype(np.int32), column[order].astype(np.int32)
    far = np.where(depth > 0, depth, np.float32(2 * FARTHEST_M))
    return Cleaned(
        depth_m=depth,
        nearest_depth_m=minimum_filter(far, size=3),
        mask=mask,
        usable=usable,
        to_border=_to_border(mask),
        K=K,
        row=row,
        column=column,
        rgb=rgb.astype(np.uint8, copy=False),
        members=members,
        seed_points=np.stack([np.resize(np.flatnonzero(part), SEED_POINTS) for part in members]).astype(np.int32),
    )


def together(cleaned: Sequence[Cleaned], diameter_m: Tensor) -> Observations:
    """Stack B detections with equally many parts on the device of `diameter_m` (B,); estimate normals."""
    device = diameter_m.device

    def stacked(arrays: Sequence[npt.NDArray[Any]]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(device)

    def end_to_end(arrays: Sequence[npt.NDArray[Any]], *shape: int) -> Tensor:
        return torch.from_numpy(np.concatenate([array.reshape(-1, *shape) for array in arrays])).to(device)

    sizes = np.array([one.depth_m.shape for one in cleaned], dtype=np.int64)
    first = np.concatenate(([0], np.cumsum(sizes.prod(axis=1))[:-1]))
    height, width = torch.from_numpy(sizes).to(device).unbind(-1)
    K = stacked([one.K for one in cleaned]).float()
    depth_m = end_to_end([one.depth_m for one in cleaned])
    first_pixel = torch.from_numpy(first).to(device)
    row, column = stacked([one.row for one in cleaned]).long(), stacked([one.column for one in cleaned]).long()
    usable = end_to_end([one.usable for one in cleaned])
    points, normals, noise_m = _normals(depth_m, usable, first_pixel, height, width, K, row, column, diameter_m)
    rgb = end_to_end([one.rgb for one in cleaned], 3)
    members = stacked([one.members for one in cleaned]).float()
    return Observations(
        points=points,
        normals=normals,
        colours=rgb[row * width[:, None] + column + first_pixel[:, None]].float() / 255.0,
        members=members,
        seed_points=stacked([one.seed_points for one in cleaned]).long(),
        seed_centres=(members @ points) / members.sum(dim=-1, keepdim=True),
        noise_m=noise_m,
        K=K,
        width=width,
        height=height,
        depth_m=depth_m,
        nearest_depth_m=end_to_end([one.nearest_depth_m for one in cleaned]),
        mask=end_to_end([one.mask for one in cleaned]),
        rgb=rgb,
        to_border=end_to_end([one.to_border for one in cleaned], 2),
        first_pixel=first_pixel,
        grey=torch.tensor([float(np.ptp(one.rgb, axis=-1).mean()) < GREY for one in cleaned], device=device),
    )


def _to_border(mask: Bool) -> Float32:
    """Return the offset (u, v) from each pixel to the mask's nearest outermost pixel: (h, w, 2), 0 on those pixels."""
    rim = mask & ~binary_erosion(mask, border_value=1)
    if not rim.any():  # the mask fills the crop
        return np.zeros((*mask.shape, 2), dtype=np.float32)
    row, column = distance_transform_edt(~rim, return_distances=False, return_indices=True)
    here = np.indices(mask.shape)
    return np.stack((column - here[1], row - here[0]), axis=-1).astype(np.float32)


def _without_rims(usable: Bool, depth: Float32, K: Float64, diameter_m: float) -> Bool:
    """Drop the mask's rim, and pixels that hang between two surfaces, as long as enough pixels remain."""
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


def _parts(points: Float64, component: Int32, diameter_m: float) -> Bool:
    """Split points (N, 3) into the parts that may be the object, for masks that hold more: (C, N), everything first.

    Parts are what depth steps divide, and the ends of a piece that is longer than the object.
    """
    everything = np.ones(len(points), dtype=np.bool_)
    parts = [_near_the_middle(points, everything, diameter_m)]
    sizes = np.bincount(component)
    for index in np.argsort(-sizes, kind="stable"):
        part = component == index
        if PART * len(points) < sizes[index] < (1 - PART) * len(points) and sizes[index] > LEAST_POINTS:
            parts.append(_near_the_middle(points, part, diameter_m))
    middle = points.mean(axis=0)
    axis = np.linalg.eigh((points - middle).T @ (points - middle))[1][:, 2]
    along = (points - middle) @ axis
    low, high = np.quantile(along, (0.03, 0.97))
    if high - low > 1.1 * diameter_m:
        for part in (along < low + 0.8 * diameter_m, along > high - 0.8 * diameter_m):
            if part.sum() > max(PART * len(points), LEAST_POINTS):
                parts.append(_near_the_middle(points, part, diameter_m))
    return np.stack(parts[:SEEDS])


def _near_the_middle(points: Float64, part: Bool, diameter_m: float) -> Bool:
    """Drop points that are too far from the robust middle of a part to belong to an object of this diameter."""
    middle = np.median(points[part], axis=0)
    near = part & (np.linalg.norm(points - middle, axis=1) < 0.75 * diameter_m + 0.01 * middle[2])
    return near if near.sum() > LEAST_POINTS else part


def _normals(
    depth_m: Tensor,
    usable: Tensor,
    first_pixel: Tensor,
    height: Tensor,
    width: Tensor,
    K: Tensor,
    row: Tensor,
    column: Tensor,
    diameter_m: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit planes to 7 x 7 readings; return points (B, N, 3), normals (B, N, 3) and the spread of the readings (B,).

    The window is about a tenth of the object wide. Readings of other surfaces do not take part.
    """
    B, N = row.shape
    points = backproject(column, row, depth_m[row * width[:, None] + column + first_pixel[:, None]], K)
    pixel = points[..., 2].median(dim=1).values / K[:, 0, 0]
    step = (0.1 * diameter_m / 6 / pixel).round().clamp(1, 8)
    offset = torch.arange(-3, 4, device=row.device) * step.long()[:, None]  # (B, 7)
    rows = (row[:, :, None, None] + offset[:, None, :, None]).expand(-1, -1, 7, 7).reshape(B, N, 49)
    columns = (column[:, :, None, None] + offset[:, None, None, :]).expand(-1, -1, 7, 7).reshape(B, N, 49)
    tall, wide = height[:, None, None], width[:, None, None]
    inside = (rows >= 0) & (rows < tall) & (columns >= 0) & (columns < wide)
    rows, columns = torch.minimum(rows.clamp(min=0), tall - 1), torch.minimum(columns.clamp(min=0), wide - 1)
    flat = rows * wide + columns + first_pixel[:, None, None]
    x_off, y_off, z_off = (backproject(columns, rows, depth_m[flat], K) - points[:, :, None]).unbind(-1)
    reach = torch.maximum(0.05 * diameter_m, 4 * step * pixel)
    weight = (inside & usable[flat] & (z_off.abs() < reach[:, None, None])).float()
    for _ in range(2):
        total = weight.sum(dim=-1).clamp(min=1)
        mx, my, mz = ((weight * value).sum(dim=-1) / total for value in (x_off, y_off, z_off))
        dx, dy, dz = x_off - mx[..., None], y_off - my[..., None], z_off - mz[..., None]
        wx, wy = weight * dx, weight * dy
        xx, xy, yy = (wx * dx).sum(dim=-1), (wx * dy).sum(dim=-1), (wy * dy).sum(dim=-1)
        xz, yz = (wx * dz).sum(dim=-1), (wy * dz).sum(dim=-1)
        ridge = 0.004 * (xx + yy) + 1e-12
        determinant = (xx + ridge) * (yy + ridge) - xy * xy
        a = ((yy + ridge) * xz - xy * yz) / determinant
        b = ((xx + ridge) * yz - xy * xz) / determinant
        off = dz - a[..., None] * dx - b[..., None] * dy
        spread = ((weight * off * off).sum(dim=-1) / total).sqrt()
        weight = weight * (off.abs() < 2.5 * spread[..., None] + 1e-6)
    normal = torch.stack((a, b, -torch.ones_like(a)), dim=-1)
    return points, normal / normal.norm(dim=-1, keepdim=True), spread.quantile(0.25, dim=1)
