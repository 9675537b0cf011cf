"""Render meshes by ray casting: depth, instances, colours and normals, as a pinhole camera sees them.

The camera model is OpenCV's, pixel centres at whole numbers: pixel (u, v) looks along `K^-1 [u, v, 1]`.
Functions import Open3D when they need it, so that importing this module is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from posekit.engine import Bool, Float32, Float64, Int32, Mesh, UInt8

GREY = 180  # brightness of a mesh without colours


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The camera's view, pixel by pixel. Colours are the surface's own, without light."""

    depth_m: Float32  # (h, w), z in the camera frame, 0 = nothing there
    instance: Int32  # (h, w), index into the meshes, -1 = nothing
    face: Int32  # (h, w), face of that mesh, -1 = nothing
    rgb: UInt8  # (h, w, 3), 0 where nothing
    normals_cam: Float32  # (h, w, 3), unit, towards the camera; 0 where nothing


def pixel_rays(K: Float64, width: int, height: int, u0: float = 0.0, v0: float = 0.0) -> Float64:
    """Return the directions `K^-1 [u, v, 1]` of a window of pixels: (height, width, 3), z = 1.

    The window's first pixel is (u0, v0), which may be negative or fractional.
    """
    u, v = np.meshgrid(np.arange(width) + u0, np.arange(height) + v0)
    return np.asarray(np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(K).T, dtype=np.float64)


def finer(K: Float64, n: int) -> Float64:
    """K of the same picture with n x n pixels in place of each, whose middle stays where that pixel's centre was."""
    scale = np.diag([n, n, 1.0])
    scale[:2, 2] = (n - 1) / 2
    return scale @ K


def depth_to_points(depth_m: Float32, K: Float64) -> Float32:
    """Return points in the camera frame, (h, w, 3) metres; pixels without depth become (0, 0, 0)."""
    h, w = depth_m.shape
    return (pixel_rays(K, w, h) * depth_m[..., None]).astype(np.float32)


class Caster:
    """Meshes at fixed places, ready for ray casting: build once, cast often."""

    def __init__(self, meshes: Sequence[Mesh], T_world_obj: Sequence[Float64] | None = None) -> None:
        """`T_world_obj`: (4, 4) per mesh, metres; None = every mesh is placed in the world unchanged."""
        import open3d as o3d

        self._scene: Any = o3d.t.geometry.RaycastingScene()
        self._core: Any = o3d.core
        self._meshes = list(meshes)
        for index, mesh in enumerate(self._meshes):
            vertices = mesh.vertices_m
            if T_world_obj is not None:
                T = np.asarray(T_world_obj[index], dtype=np.float64)
                vertices = (vertices @ T[:3, :3].T + T[:3, 3]).astype(np.float32)
            self._scene.add_triangles(
                self._core.Tensor(np.ascontiguousarray(vertices, dtype=np.float32)),
                self._core.Tensor(np.ascontiguousarray(mesh.faces, dtype=np.uint32)),
            )

    def cast(self, origins: npt.NDArray[Any], directions: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return the closest hits of rays, both (..., 3) in metres: Open3D's arrays by name (`t_hit` inf = none)."""
        if not self._meshes:
            shape = np.broadcast_shapes(origins.shape, directions.shape)[:-1]
            none = np.full(shape, np.iinfo(np.uint32).max, dtype=np.uint32)
            return {
                "t_hit": np.full(shape, np.inf, dtype=np.float32),
                "geometry_ids": none,
                "primitive_ids": none,
                "primitive_uvs": np.zeros((*shape, 2), dtype=np.float32),
                "primitive_normals": np.zeros((*shape, 3), dtype=np.float32),
            }
        hits = self._scene.cast_rays(self._core.Tensor(_rays(origins, directions)))
        return {name: value.numpy() for name, value in hits.items()}

    def blocked(self, origins: npt.NDArray[Any], directions: npt.NDArray[Any], t_max: float = 1.0) -> Bool:
        """Return True for rays that hit anything before `t_max` directions from their origin."""
        if not self._meshes:
            return np.zeros(np.broadcast_shapes(origins.shape, directions.shape)[:-1], dtype=np.bool_)
        hit = self._scene.test_occlusions(self._core.Tensor(_rays(origins, directions)), tfar=t_max)
        return np.asarray(hit.numpy(), dtype=np.bool_)

    def silhouette(
        self, T_cam_world: Float64, K: Float64, width: int, height: int, u0: float = 0.0, v0: float = 0.0
    ) -> Bool:
        """Return True for the pixels of a window that see any mesh: (height, width)."""
        origins, directions = self._window(T_cam_world, K, width, height, u0, v0)
        return self.blocked(origins, directions, t_max=float("inf"))

    def render(
        self, T_cam_world: Float64, K: Float64, width: int, height: int, u0: float = 0.0, v0: float = 0.0
    ) -> Rendered:
        """Render the camera's view through a window of `width` x `height` pixels whose first pixel is (u0, v0)."""
        origins, directions = self._window(T_cam_world, K, width, height, u0, v0)
        hits = self.cast(origins, directions)
        hit = np.isfinite(hits["t_hit"])
        instance = np.where(hit, hits["geometry_ids"].astype(np.int64), -1).astype(np.int32)
        face = np.where(hit, hits["primitive_ids"].astype(np.int64), -1).astype(np.int32)
        normals = hits["primitive_normals"]
        normals = np.where((normals * directions).sum(-1, keepdims=True) > 0, -normals, normals)
        R = np.asarray(T_cam_world, dtype=np.float64)[:3, :3]
        return Rendered(
            depth_m=np.where(hit, hits["t_hit"], 0).astype(np.float32),
            instance=instance,
            face=face,
            rgb=self.colors(instance, face, hits["primitive_uvs"]),
            normals_cam=np.where(hit[..., None], normals @ R.T, 0).astype(np.float32),
        )

    def colors(self, instance: Int32, face: Int32, uvs: npt.NDArray[Any]) -> UInt8:
        """Blend vertex colours over the faces that were hit: (..., 3), 0 where no face was."""
        rgb = np.zeros((*instance.shape, 3), dtype=np.uint8)
        for index, mesh in enumerate(self._meshes):
            here = instance == index
            if mesh.vertex_colors is None:
                rgb[here] = GREY
                continue
            if not here.any():
                continue
            corners = mesh.vertex_colors[mesh.faces[face[here]]].astype(np.float32)  # (n, 3 corners, 3)
            u, v = uvs[here][:, :1], uvs[here][:, 1:]
            blend = corners[:, 0] * (1 - u - v) + corners[:, 1] * u + corners[:, 2] * v
            rgb[here] = np.clip(np.rint(blend), 0, 255).astype(np.uint8)
        return rgb

    @staticmethod
    def _window(
        T_cam_world: Float64, K: Float64, width: int, height: int, u0: float, v0: float
    ) -> tuple[Float64, Float64]:
        T = np.asarray(T_cam_world, dtype=np.float64)
        R, t = T[:3, :3], T[:3, 3]
        # Rays keep z = 1 in the camera frame, so a hit's distance along its ray is its depth.
        return -R.T @ t, pixel_rays(K, width, height, u0, v0) @ R


def render(meshes: Sequence[Mesh], T_cam_obj: Sequence[Float64], K: Float64, width: int, height: int) -> Rendered:
    """Render meshes at their poses ((4, 4) each, metres). Nearer surfaces hide farther ones."""
    if len(meshes) != len(T_cam_obj):
        raise ValueError(f"{len(meshes)} meshes need as many poses, got {len(T_cam_obj)}")
    return Caster(meshes, T_cam_obj).render(np.eye(4), K, width, height)


def _rays(origins: npt.NDArray[Any], directions: npt.NDArray[Any]) -> Float32:
    shape = np.broadcast_shapes(origins.shape, directions.shape)
    rays = np.empty((*shape[:-1], 6), dtype=np.float32)
    rays[..., :3] = origins
    rays[..., 3:] = directions
    return rays
