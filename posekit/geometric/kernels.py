"""The hot loops of the engine: compiled for the CPU where that was built, else the plain torch beside them.

Loading `_kernels_cpu.so` in this folder registers its ops with torch. The references define what the ops compute. A
kernel agrees with its reference up to float32 rounding, except that a point on the edge of a cell may fall to either
side. A kernel processes one instance after the other on one thread, so an instance has the same bits alone and in a
batch. All tensors are float32 unless said otherwise.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from posekit.compiled import Kernel, load_kernels
from posekit.geometric.model import Shelf
from posekit.geometric.observe import Observations
from posekit.geometric.poses import Poses, picked
from posekit.geometry import project, rotation_from_vector

OPS = (
    "colour_cost", "depth_pull", "distinct", "explain", "front", "moved", "normal_equations", "outline_pull", "spread",
)  # fmt: skip
COLOUR_SPREAD = 0.08  # of full brightness: expected difference in the hue of a surface
BRIGHTNESS_SPREAD = 0.3  # of the logarithm: expected difference in brightness from light that the model does not cover
WRONG_COLOUR = 3.0  # nats: the most that a cell's hue can cost
WRONG_BRIGHTNESS = 0.8  # nats: the most that a cell's brightness can cost
_INDEX_BITS = 20  # low bits of a key in a depth buffer that hold the sample; the depth is above them
_FAR = 1 << 62
_STEP_M = 1e-5  # step of the depths in a key


def front(
    shelf: Shelf, poses: Poses, K: Tensor, *, cell_px: Tensor, cell_m: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Draw the dense samples of each object into a picture of `rows` x `columns` square cells; the frontmost win.

    poses: (B, H); K: (B, 3, 3); cell_px, cell_m: (B,), the side of a cell in pixels and on the object. Returns depths
    in metres (B, H, rows, columns), in steps of 0.01 mm, inf where nothing is; and the index of the shelf's sample seen
    in each cell, int64, the object's first sample where nothing is. Of equal depths the lower sample wins. A cell that
    at least three of its four neighbours lie in front of, by more than three cells, is a gap between samples: it shows
    what the third of them shows. Samples behind the camera are not drawn.
    """
    if kernel_for(K.device) == "reference":
        return front_reference(shelf, poses, K, cell_px=cell_px, cell_m=cell_m, rows=rows, columns=columns)
    drawn = torch.ops.posekit.front(
        shelf.dense, shelf.first_dense, shelf.dense_samples, poses.R, poses.t, K, cell_px, cell_m, rows, columns
    )
    return cast(tuple[Tensor, Tensor], drawn)


def explain(shelf: Shelf, poses: Poses, points: Tensor, normals: Tensor, *, tolerance_m: Tensor) -> Tensor:
    """Measure how far each pose accounts for observed points.

    poses: (B, H); points, normals: (B, N, 3), camera frame, N at least 1; tolerance_m: (B,), distance within which a
    reading is on the surface. Returns (B, H) in 0..1: the share of the points that are near the surface and face the
    same way; nearer points count more.
    """
    if kernel_for(points.device) == "reference":
        return explain_reference(shelf, poses, points, normals, tolerance_m=tolerance_m)
    share = torch.ops.posekit.explain(points, normals, poses.R, poses.t, tolerance_m, _slack_m(shelf), *_tables(shelf))
    return cast(Tensor, share)


def normal_equations(
    shelf: Shelf, poses: Poses, points: Tensor, normals: Tensor, *, reach_m: Tensor, trust: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the Gauss-Newton equations, not yet solved, that draw observed points to each pose's surface.

    poses: (B, H); points, normals: (B, N, 3), camera frame, N at least 1; reach_m: (B,), half the distance at which a
    point stops pulling; trust: (B, H, N), weight of each point, None for equal weights. Returns the Hessian (B, H, 6,
    6) and the gradient (B, H, 6, 1) with respect to the rotation (times half the diameter) and the shift of the points
    in the frame of the object. Where no point pulls, both are 0.
    """
    if kernel_for(points.device) == "reference":
        return normal_equations_reference(shelf, poses, points, normals, reach_m=reach_m, trust=trust)
    equations = torch.ops.posekit.normal_equations(
        points, normals, poses.R, poses.t, trust, reach_m, shelf.spacing_m, _rim_m2(shelf), shelf.diameter_m / 2,
        *_tables(shelf),
    )  # fmt: skip
    return cast(tuple[Tensor, Tensor], equations)


def outline_pull(
    shelf: Shelf, observations: Observations, poses: Poses, model_points: Tensor, *, reach_m: Tensor, through_m: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the Gauss-Newton equations that draw model points which the camera saw through sideways to the mask.

    poses: (B, H); model_points: (B, H, M, 3), object frame; reach_m: (B,), a quarter of the distance at which a point
    stops pulling; through_m: (B,), how far behind a point the camera must have seen to have seen through it. Returns
    the Hessian (B, H, 6, 6) and the gradient (B, H, 6, 1) as `normal_equations` does, 0 where nothing pulls.
    """
    if kernel_for(model_points.device) == "reference":
        return outline_pull_reference(shelf, observations, poses, model_points, reach_m=reach_m, through_m=through_m)
    seen = observations
    equations = torch.ops.posekit.outline_pull(
        model_points, poses.R, poses.t, seen.K, seen.depth_m, seen.nearest_depth_m, seen.mask, seen.to_border,
        seen.first_pixel, seen.width, seen.height, through_m, reach_m, shelf.diameter_m / 2,
    )  # fmt: skip
    return cast(tuple[Tensor, Tensor], equations)


def depth_pull(
    shelf: Shelf, observations: Observations, poses: Poses, surface: Tensor, visible: Tensor, *, reach_m: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the Gauss-Newton equations that draw visible model points along their rays to the depth read there.

    poses: (B, H); surface: (B, H, M, 6), points and normals in the object frame; visible: (B, H, M), bool; reach_m:
    (B,), the distance at which a point stops pulling. Returns the Hessian (B, H, 6, 6) and the gradient (B, H, 6, 1)
    with respect to the rotation about the object's origin (times half the diameter) and the shift, both in the camera
    frame; 0 where nothing pulls.
    """
    if kernel_for(surface.device) == "reference":
        return depth_pull_reference(shelf, observations, poses, surface, visible, reach_m=reach_m)
    seen = observations
    equations = torch.ops.posekit.depth_pull(
        surface, visible, poses.R, poses.t, seen.K, seen.depth_m, seen.mask, seen.first_pixel, seen.width, seen.height,
        reach_m, shelf.diameter_m / 2,
    )  # fmt: skip
    return cast(tuple[Tensor, Tensor], equations)


def moved(
    poses: Poses,
    hessian: Tensor,
    gradient: Tensor,
    *,
    radius_m: Tensor,
    most_turn: float,
    most_shift: float,
    in_camera: bool,
) -> Poses:
    """Move poses by one damped Gauss-Newton step. Poses whose step cannot be solved for stay where they are.

    poses: (B, H); hessian: (B, H, 6, 6); gradient: (B, H, 6, 1); radius_m: (B,), the radius that scales rotations. A
    step turns by at most `most_turn` radians about each axis and shifts by at most `most_shift` radii along it. With
    `in_camera`, the equations are in the camera frame and move the pose, like those of `depth_pull`. Without it they
    are in the frame of the object and move the observed points, so that the pose moves the other way.
    """
    if kernel_for(hessian.device) == "reference":
        return moved_reference(
            poses, hessian, gradient, radius_m=radius_m, most_turn=most_turn, most_shift=most_shift, in_camera=in_camera
        )
    R, t = torch.ops.posekit.moved(hessian, gradient, poses.R, poses.t, radius_m, most_turn, most_shift, in_camera)
    return Poses(R, t)


def distinct(poses: Poses, total: Tensor, count: int, angle_deg: float, distance_m: Tensor) -> Tensor:
    """Return indices (B, count) of the best poses by `total` (B, H), leaving out those close to a better one.

    Close means within `angle_deg` in rotation and within `distance_m` (B,) along each axis. Where fewer than `count`
    are left, the best is repeated.
    """
    if kernel_for(total.device) == "reference":
        return distinct_reference(poses, total, count, angle_deg, distance_m)
    order = torch.argsort(total, dim=-1, descending=True, stable=True)
    kept = torch.ops.posekit.distinct(poses.R, poses.t, order, count, _trace(angle_deg), distance_m)
    return cast(Tensor, kept)


def spread(
    shelf: Shelf, poses: Poses, depth_m: Tensor, sample: Tensor, rays: Tensor, *, noise_m: Tensor, cell_m: Tensor
) -> Tensor:
    """Return how far a reading may be off from the depth that poses show, in metres: (B, H, rows, columns).

    depth_m, sample: (B, H, rows, columns), as `front` draws them; rays: (B, rows, columns, 3), unit rays to the middles
    of the cells, camera frame; noise_m: (B,), error of the readings; cell_m: (B,), the side of a cell on the object.
    A slanted surface may be off by more. Where nothing is drawn, the result is `noise_m`.
    """
    if kernel_for(depth_m.device) == "reference":
        return spread_reference(shelf, poses, depth_m, sample, rays, noise_m=noise_m, cell_m=cell_m)
    spread_m = torch.ops.posekit.spread(shelf.dense, poses.R, depth_m, sample, rays, noise_m, cell_m)
    return cast(Tensor, spread_m)


def colour_cost(
    shelf: Shelf, observations: Observations, poses: Poses, sample: Tensor, seen: Tensor, rays: Tensor, use: Tensor
) -> Tensor:
    """Return the cost of the colours of drawn poses in nats: (B, H, rows, columns), 0 outside `use`.

    sample, use: (B, H, rows, columns), the dense sample that each cell shows, and whether its colour counts; seen: (B,
    rows, columns, 3), the picture in 0..1; rays: (B, rows, columns, 3), to the middles of the cells, camera frame. The
    objects must have colours. Light changes the brightness of a surface far more than its hue. So the part of a colour
    that is not proportional to the albedo counts strictly (COLOUR_SPREAD), and brightness is compared only roughly,
    because shadows fall: with the light `albedo (a + b . normal)` that explains the whole picture best.
    """
    if kernel_for(sample.device) == "reference":
        return colour_cost_reference(shelf, observations, poses, sample, seen, rays, use)
    cost = torch.ops.posekit.colour_cost(
        shelf.dense, shelf.dense_colours, observations.grey, poses.R, sample, seen, rays, use,
        COLOUR_SPREAD, BRIGHTNESS_SPREAD, WRONG_COLOUR, WRONG_BRIGHTNESS,
    )  # fmt: skip
    return cast(Tensor, cost)


def kernel_for(device: str | torch.device) -> Kernel:
    """Return which kernels answer for tensors on `device` ("cpu", "cuda:1", ...): compiled ones or the reference."""
    return "compiled" if _compiled and torch.device(device).type == "cpu" else "reference"


def kernels(device: str | torch.device) -> dict[str, Kernel]:
    """Return `kernel_for` for each loop by name, for status pages and metrics."""
    return {op: kernel_for(device) for op in OPS}


def front_reference(
    shelf: Shelf, poses: Poses, K: Tensor, *, cell_px: Tensor, cell_m: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """`front` in plain torch."""
    B, H, M, device = len(K), poses.count, shelf.dense_samples, K.device
    index = shelf.first_dense[:, None] + torch.arange(M, device=device)
    points = shelf.dense.index_select(0, index.reshape(-1))[:, :3].reshape(B, 1, M, 3).expand(-1, H, -1, -1)
    in_camera = poses.to_camera(points)
    u, v = project(in_camera, K)
    cell = cell_px[:, None, None]
    column, row = ((u + 0.5) / cell).floor(), ((v + 0.5) / cell).floor()
    z = in_camera[..., 2]
    inside = (z > 0) & (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    flat = torch.where(inside, row * columns + column, torch.full_like(row, rows * columns)).long()
    steps = (z * (1 / _STEP_M)).long()
    key = (steps << _INDEX_BITS) + torch.arange(M, device=device)
    keys = torch.full((B, H, rows * columns + 1), _FAR, device=device, dtype=torch.int64)
    keys = keys.scatter_reduce(2, flat, key, "amin")[..., :-1].reshape(B, H, rows, columns)
    # A cell without a front sample shows the back or nothing: three of its four neighbours know better.
    padded = torch.nn.functional.pad(keys.reshape(B * H, rows, columns), (1, 1, 1, 1), value=_FAR)
    sides = torch.stack((padded[:, 1:-1, :-2], padded[:, 1:-1, 2:], padded[:, :-2, 1:-1], padded[:, 2:, 1:-1]))
    third = sides.sort(dim=0).values[2].reshape(keys.shape)
    step = (cell_m[:, None, None, None] * (3 / _STEP_M)).long() << _INDEX_BITS
    keys = torch.where(keys > third + step, third, keys)
    drawn = keys < _FAR
    sample = torch.where(drawn, keys & ((1 << _INDEX_BITS) - 1), torch.zeros_like(keys))
    depth_m = torch.where(drawn, (keys >> _INDEX_BITS).float() * _STEP_M, torch.inf)
    return depth_m, sample + shelf.first_dense[:, None, None, None]


def explain_reference(shelf: Shelf, poses: Poses, points: Tensor, normals: Tensor, *, tolerance_m: Tensor) -> Tensor:
    """`explain` in plain torch."""
    x = poses.to_object(points)
    surface, normal, facing, _ = shelf.lookup(x, normals[:, None] @ poses.R)
    away = x - surface
    off_plane = (away * normal).sum(dim=-1)
    along = (away.square().sum(dim=-1) - off_plane**2).clamp(min=0).sqrt()
    distance = (off_plane**2 + (along - _slack_m(shelf)[:, None, None]).clamp(min=0) ** 2).sqrt()
    near = (1 - (distance / (2.5 * tolerance_m[:, None, None])) ** 2).clamp(min=0)
    return (near * (facing * 1.25).clamp(max=1)).mean(dim=-1)


def normal_equations_reference(
    shelf: Shelf, poses: Poses, points: Tensor, normals: Tensor, *, reach_m: Tensor, trust: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`normal_equations` in plain torch."""
    x = poses.to_object(points)  # (B, H, N, 3)
    surface, normal, facing, _ = shelf.lookup(x, normals[:, None] @ poses.R)
    away = x - surface
    off_plane = (away * normal).sum(dim=-1, keepdim=True)
    distance = away.norm(dim=-1, keepdim=True)
    # Past the rim of the surface, the plane there says nothing: pull straight back to the surface.
    beyond = distance**2 - off_plane**2 > _rim_m2(shelf)[:, None, None, None]
    normal = torch.where(beyond, away / distance.clamp(min=1e-9), normal)
    residual = torch.where(beyond, distance - shelf.spacing_m[:, None, None, None], off_plane)
    robust = (1 - (distance / (2 * reach_m[:, None, None, None])) ** 2).clamp(min=0) ** 2
    weight = robust * torch.where(beyond, 0.5, facing[..., None].clamp(min=0.1))
    if trust is not None:
        weight = weight * trust[..., None]
    radius = (shelf.diameter_m / 2)[:, None, None, None]
    jacobian = torch.cat((torch.linalg.cross(x, normal) / radius, normal), dim=-1)  # (B, H, N, 6)
    weighted = jacobian * weight
    return weighted.mT @ jacobian, weighted.mT @ residual


def outline_pull_reference(
    shelf: Shelf, observations: Observations, poses: Poses, model_points: Tensor, *, reach_m: Tensor, through_m: Tensor
) -> tuple[Tensor, Tensor]:
    """`outline_pull` in plain torch."""
    in_camera = poses.to_camera(model_points)
    _, _, through, _ = observations.classify(in_camera, through_m)
    u, v = project(in_camera, observations.K)
    flat, _ = observations.pixel(u, v)
    way = observations.to_border.index_select(0, flat.reshape(-1)).reshape(*flat.shape, 2)
    outside = ~observations.mask[flat]
    scale = in_camera[..., 2:] / observations.K[:, 0, 0, None, None, None]
    sideways = way * scale  # metres at the point's depth
    distance = sideways.norm(dim=-1, keepdim=True)
    direction = torch.cat((sideways / distance.clamp(min=1e-9), torch.zeros_like(distance)), dim=-1)
    normal = direction @ poses.R  # object frame
    robust = (1 - (distance / (4 * reach_m[:, None, None, None])) ** 2).clamp(min=0) ** 2
    weight = 0.5 * robust * (through & outside)[..., None]
    x = model_points + normal * distance
    radius = (shelf.diameter_m / 2)[:, None, None, None]
    jacobian = torch.cat((torch.linalg.cross(x, normal) / radius, normal), dim=-1)
    weighted = jacobian * weight
    return weighted.mT @ jacobian, weighted.mT @ distance


def depth_pull_reference(
    shelf: Shelf, observations: Observations, poses: Poses, surface: Tensor, visible: Tensor, *, reach_m: Tensor
) -> tuple[Tensor, Tensor]:
    """`depth_pull` in plain torch."""
    points = poses.to_camera(surface[..., :3])
    normal = surface[..., 3:] @ poses.R.mT
    pixel, inside = observations.pixel(*project(points, observations.K))
    ray = points / points[..., 2:].clamp(min=1e-6)
    read_m = observations.depth_m[pixel]
    off = ((read_m - points[..., 2])[..., None] * ray * normal).sum(dim=-1)
    weight = (visible & inside & (read_m > 0) & observations.mask[pixel]) * (normal * ray).sum(dim=-1).abs()
    weight = weight * (1 - (off / reach_m[:, None, None]).square()).clamp(min=0).square()
    arm = points - poses.t[:, :, None]
    radius = (shelf.diameter_m / 2)[:, None, None, None]
    jacobian = torch.cat((torch.linalg.cross(arm, normal) / radius, normal), dim=-1)
    weighted = jacobian * weight[..., None]
    return weighted.mT @ jacobian, weighted.mT @ off[..., None]


def moved_reference(
    poses: Poses,
    hessian: Tensor,
    gradient: Tensor,
    *,
    radius_m: Tensor,
    most_turn: float,
    most_shift: float,
    in_camera: bool,
) -> Poses:
    """`moved` in plain torch."""
    damping = 1e-3 * hessian.diagonal(dim1=-2, dim2=-1).mean(dim=-1) + 1e-6
    damped = hessian + damping[..., None, None] * torch.eye(6, device=hessian.device)
    step, _ = torch.linalg.solve_ex(damped, gradient)
    step = torch.nan_to_num(step[..., 0], nan=0.0, posinf=0.0, neginf=0.0)
    radius = radius_m[:, None, None]
    turn = (step[..., :3] / radius).clamp(-most_turn, most_turn)
    shift = torch.maximum(torch.minimum(step[..., 3:], most_shift * radius), -most_shift * radius)
    turned = rotation_from_vector(turn)
    if in_camera:
        return Poses(turned @ poses.R, poses.t + shift)
    R = poses.R @ turned
    return Poses(R, poses.t + (R @ shift[..., None])[..., 0])


def distinct_reference(poses: Poses, total: Tensor, count: int, angle_deg: float, distance_m: Tensor) -> Tensor:
    """`distinct` in plain torch."""
    order = torch.argsort(total, dim=-1, descending=True, stable=True)
    R = picked(poses.R, order).flatten(2)
    t = picked(poses.t, order)
    rows = torch.arange(len(order), device=order.device)
    free = torch.ones_like(order, dtype=torch.bool)
    kept = torch.zeros(len(order), count, dtype=torch.int64, device=order.device)
    for slot in range(count):
        first = free.to(torch.uint8).argmax(dim=1)  # 0, the best, where none is left
        kept[:, slot] = first
        alike = (R @ R[rows, first][:, :, None])[..., 0] > _trace(angle_deg)
        free &= ~(alike & ((t - t[rows, first][:, None]).abs().amax(dim=-1) < distance_m[:, None]))
        free[rows, first] = False
    return picked(order, kept)


def spread_reference(
    shelf: Shelf, poses: Poses, depth_m: Tensor, sample: Tensor, rays: Tensor, *, noise_m: Tensor, cell_m: Tensor
) -> Tensor:
    """`spread` in plain torch."""
    facing = (_normals(shelf, poses, sample) * rays[:, None]).sum(dim=-1).abs().clamp(min=0.15)
    slant = (1 - facing.square()).clamp(min=0).sqrt() / facing
    noise_m, cell_m = noise_m[:, None, None, None], cell_m[:, None, None, None]
    spread_m = (noise_m.square() + (0.6 * cell_m * slant).square()).sqrt()
    return torch.where(torch.isfinite(depth_m), spread_m, noise_m)


def colour_cost_reference(
    shelf: Shelf, observations: Observations, poses: Poses, sample: Tensor, seen: Tensor, rays: Tensor, use: Tensor
) -> Tensor:
    """`colour_cost` in plain torch."""
    assert shelf.dense_colours is not None
    albedo = shelf.dense_colours.index_select(0, sample.reshape(-1)).float() / 255.0
    albedo = observations.as_pictured(albedo.reshape(*sample.shape, 3)).flatten(2, 3)  # (B, H, P, 3)
    normal = _normals(shelf, poses, sample)
    away = (normal * rays[:, None]).sum(dim=-1, keepdim=True) > 0
    normal = torch.where(away, -normal, normal)  # not every mesh tells outside from inside
    basis = torch.cat((torch.ones_like(normal[..., :1]), normal), dim=-1).flatten(2, 3)  # (B, H, P, 4)
    seen, counted = seen.flatten(1, 2)[:, None], use.flatten(2)
    strength = albedo.square().sum(dim=-1).clamp(min=1e-3)
    gain = (albedo * seen).sum(dim=-1) / strength  # brightness of each cell, as a multiple of its albedo
    hue = (seen - gain[..., None] * albedo).square().sum(dim=-1) / (
        COLOUR_SPREAD**2 * (0.4 + seen.square().sum(dim=-1))
    )
    weight = counted * strength
    ridge = torch.diag(torch.tensor([1e-3, 0.05, 0.05, 0.05], device=seen.device))
    for _ in range(2):
        weighted = basis * weight[..., None]
        scale = weight.sum(dim=-1).clamp(min=1e-3)[..., None, None]
        light, _ = torch.linalg.solve_ex(weighted.mT @ basis / scale + ridge, weighted.mT @ gain[..., None] / scale)
        shade = (basis @ light)[..., 0].clamp(min=0.05)
        ratio = (gain.clamp(min=0.02) / shade).log()
        off = (ratio / BRIGHTNESS_SPREAD).square()
        weight = counted * strength * (off < 9)
    # Dark surfaces say little about hue or brightness.
    cost = (hue / 2).clamp(max=WRONG_COLOUR) + (off / 2).clamp(max=WRONG_BRIGHTNESS) * (strength * 4).clamp(max=1)
    return torch.where(counted, cost, 0.0).reshape(use.shape)


def _normals(shelf: Shelf, poses: Poses, sample: Tensor) -> Tensor:
    """Return the normals of dense samples (B, H, rows, columns) in the camera frame: (B, H, rows, columns, 3)."""
    return shelf.dense.index_select(0, sample.reshape(-1))[:, 3:].reshape(*sample.shape, 3) @ poses.R.mT[:, :, None]


def _trace(angle_deg: float) -> float:
    """Return the trace of a rotation by an angle."""
    return 1 + 2 * math.cos(math.radians(angle_deg))


def _slack_m(shelf: Shelf) -> Tensor:
    """Return how far along the surface a point may be from the sample that the field finds for it: (B,)."""
    return 1.5 * shelf.spacing_m + 0.5 * shelf.cell_m


def _rim_m2(shelf: Shelf) -> Tensor:
    """Return the squared distance along the surface, from sample to point, past which a point is off the rim: (B,)."""
    return (2 * shelf.spacing_m + 0.5 * shelf.cell_m) ** 2


def _tables(shelf: Shelf) -> tuple[int | Tensor, ...]:
    """Return the tables that a kernel needs to do the same as `Shelf.lookup`."""
    return (
        shelf.samples, shelf.surface, shelf.oriented, shelf.first_sample, shelf.nearest, shelf.first_cell,
        shelf.origin_m, shelf.cell_m, shelf.last_cell, shelf.stride,
    )  # fmt: skip


_compiled = load_kernels("posekit.geometric", Path(__file__).parent / "_kernels_cpu.so")
