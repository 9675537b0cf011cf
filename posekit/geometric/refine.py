"""Many poses at once, moved onto the observation: point-to-plane steps on the field, held back by the outline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posekit.geometric.model import Prepared
from posekit.geometric.observe import Observation, classify
from posekit.geometry import project, rotation_from_vector


@dataclass(frozen=True)
class Poses:
    """H poses of the centred frame in the camera's: `p_cam = R p + t`."""

    R: Tensor  # (H, 3, 3)
    t: Tensor  # (H, 3)

    def __len__(self) -> int:
        return len(self.R)

    def pick(self, index: Tensor) -> Poses:
        return Poses(self.R[index], self.t[index])

    def join(self, other: Poses) -> Poses:
        return Poses(torch.cat((self.R, other.R)), torch.cat((self.t, other.t)))

    def to_object(self, points_cam: Tensor) -> Tensor:
        """Camera points (N, 3) in the frame of each object: (H, N, 3)."""
        R_obj_cam = self.R.mT
        return points_cam @ self.R - (R_obj_cam @ self.t[:, :, None]).mT

    def to_camera(self, points: Tensor) -> Tensor:
        """Points of each object (H, M, 3) in the camera frame."""
        return points @ self.R.mT + self.t[:, None]


def nearest_views(model: Prepared, poses: Poses) -> Tensor:
    """The stored view that is closest to how the camera looks at each pose: (H,)."""
    towards_camera = -(poses.R.mT @ poses.t[:, :, None])[..., 0]
    return (towards_camera @ model.view_directions.mT).argmax(dim=1)


def visible_surface(model: Prepared, poses: Poses, count: int) -> Tensor:
    """`count` surface points that the camera should see of each pose: (H, count, 3), object frame."""
    samples = model.view_samples[nearest_views(model, poses), :count]
    return model.field.surface.index_select(0, samples.reshape(-1))[:, :3].reshape(len(poses), count, 3)


def rendered_surface(model: Prepared, observation: Observation, poses: Poses, count: int) -> tuple[Tensor, Tensor]:
    """The visible surface by a depth buffer: exact where `visible_surface` takes the nearest stored view.

    `count` surface samples are splatted into cells about as wide as they are apart. Returns them in the camera frame
    (H, count, 3) and the share of its cell that each stands for, 0 where it is hidden (H, count).
    """
    stride = max(model.field.surface.shape[0] // count, 1)
    in_camera = poses.to_camera(model.field.surface[::stride, :3][:count].expand(len(poses), -1, -1))
    H = len(poses)
    h, w = observation.depth_m.shape
    u, v = project(in_camera, observation.K)
    z = in_camera[..., 2]
    columns, rows, margin = 96, 96, 2  # cells; those around the crop catch what lies outside it
    width_m = 1.4 * model.field.spacing_m * stride**0.5
    cell = width_m * observation.K[0, 0] / poses.t[:, 2].clamp(min=1e-3)  # (H,), pixels
    cell = torch.maximum(cell, torch.full_like(cell, max(w / (columns - 2 * margin), h / (rows - 2 * margin))))
    column = (u / cell[:, None]).floor().clamp(-margin, columns - margin - 1).long() + margin
    row = (v / cell[:, None]).floor().clamp(-margin, rows - margin - 1).long() + margin
    flat = row * columns + column
    front = torch.full((H, rows * columns), torch.inf, device=z.device).scatter_reduce(1, flat, z, "amin")
    around = -torch.nn.functional.max_pool2d(-front.reshape(H, 1, rows, columns), 3, stride=1, padding=1).reshape(H, -1)
    depth_step = 2.0 * cell[:, None] * z / observation.K[0, 0]
    shown = (z <= front.gather(1, flat) + 0.5 * depth_step) & (z <= around.gather(1, flat) + 2 * depth_step)
    sharing = torch.zeros_like(front).scatter_add(1, flat, shown.float())
    return in_camera, shown / sharing.gather(1, flat).clamp(min=1)


def refine(
    model: Prepared,
    observation: Observation,
    poses: Poses,
    *,
    points: int,
    visible: int,
    reach_m: list[float],
    tolerance_m: float,
) -> Poses:
    """One robust Gauss-Newton step per entry of `reach_m`, the distance at which a point stops pulling.

    `points` observed points are drawn to the model's surface; of the `visible` model points, those that the camera saw
    through are drawn to the mask. With `visible` 0 only the former.
    """
    seen = observation.points[:points]
    normals_seen = observation.normals[:points]
    radius = model.diameter_m / 2
    spacing = model.field.spacing_m
    H = len(poses)
    for reach in reach_m:
        x = poses.to_object(seen)  # (H, N, 3)
        surface, normal, _ = model.field.lookup(x.reshape(-1, 3))
        surface, normal = surface.reshape(x.shape), normal.reshape(x.shape)
        away = x - surface
        off_plane = (away * normal).sum(dim=-1, keepdim=True)
        distance = away.norm(dim=-1, keepdim=True)
        # Past the rim of the surface its plane says nothing: pull straight back to it.
        beyond = (distance**2 - off_plane**2) > (2 * spacing + 0.5 * model.field.cell_m) ** 2
        normal = torch.where(beyond, away / distance.clamp(min=1e-9), normal)
        residual = torch.where(beyond, distance - spacing, off_plane)
        facing = ((normals_seen @ poses.R) * normal).sum(dim=-1, keepdim=True).abs()
        robust = (1 - (distance / (2 * reach)) ** 2).clamp(min=0) ** 2
        weight = robust * torch.where(beyond, 0.5 * torch.ones_like(facing), facing.clamp(min=0.1))
        jacobian = torch.cat((torch.linalg.cross(x, normal) / radius, normal), dim=-1)  # (H, N, 6)
        weighted = jacobian * weight
        hessian = weighted.mT @ jacobian
        gradient = weighted.mT @ residual
        if visible:
            pull_hessian, pull_gradient = _outline_pull(model, observation, poses, visible, reach, tolerance_m)
            hessian = hessian + pull_hessian * (points / visible)
            gradient = gradient + pull_gradient * (points / visible)
        damping = 1e-3 * hessian.diagonal(dim1=-2, dim2=-1).mean(dim=-1) + 1e-6
        hessian = hessian + damping[:, None, None] * torch.eye(6, device=x.device)
        step, _ = torch.linalg.solve_ex(hessian, -gradient)
        step = torch.nan_to_num(step.reshape(H, 6), nan=0.0, posinf=0.0, neginf=0.0)
        turn = (step[:, :3] / radius).clamp(-0.4, 0.4)
        shift = step[:, 3:].clamp(-0.5 * model.diameter_m, 0.5 * model.diameter_m)
        # The step moves the observation in the object's frame; the pose moves the other way.
        dR = rotation_from_vector(turn)
        R = poses.R @ dR.mT
        poses = Poses(R, poses.t - (R @ shift[:, :, None])[..., 0])
    return poses


def _outline_pull(
    model: Prepared, observation: Observation, poses: Poses, visible: int, reach: float, tolerance_m: float
) -> tuple[Tensor, Tensor]:
    """Normal equations (H, 6, 6), (H, 6, 1) that draw seen-through model points sideways to the mask."""
    model_points = visible_surface(model, poses, visible)  # (H, M, 3)
    in_camera = poses.to_camera(model_points)
    _, _, through, _ = classify(observation, in_camera, tolerance_m)
    h, w = observation.depth_m.shape
    u, v = project(in_camera, observation.K)
    flat = (v.round().clamp(0, h - 1) * w + u.round().clamp(0, w - 1)).long()
    target = observation.nearest_in_mask.reshape(-1, 2)[flat]  # (H, M, 2)
    scale = in_camera[..., 2:] / observation.K[0, 0]
    sideways = (target - torch.stack((u, v), dim=-1)) * scale  # metres at the point's depth
    distance = sideways.norm(dim=-1, keepdim=True)
    direction = torch.cat((sideways / distance.clamp(min=1e-9), torch.zeros_like(distance)), dim=-1)
    normal = direction @ poses.R  # object frame
    robust = (1 - (distance / (4 * reach)) ** 2).clamp(min=0) ** 2
    weight = 0.5 * robust * (through & (distance[..., 0] > 0.5 * scale[..., 0]))[..., None]
    x = model_points + normal * distance
    jacobian = torch.cat((torch.linalg.cross(x, normal) / (model.diameter_m / 2), normal), dim=-1)
    weighted = jacobian * weight
    return weighted.mT @ jacobian, weighted.mT @ distance
