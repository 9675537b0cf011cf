"""A box and pictures of it, made quickly with numpy alone, for an engine's warm-up before its first request."""

from __future__ import annotations

import numpy as np

from posekit.engine import Float32, Float64, Instance, Mesh

_BOX_M = np.array([0.10, 0.06, 0.04])
_SIDE_PX = 112


def box_mesh() -> Mesh:
    """Return a box of 100 x 60 x 40 mm about the origin."""
    corners = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)]) * _BOX_M
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [face for a, b, c, d in quads for face in ((a, b, c), (a, c, d))]
    return Mesh(vertices_m=corners.astype(np.float32), faces=np.array(faces, dtype=np.int32))


def box_instance(seed: int, object_id: str) -> Instance:
    """Return the box, randomly turned, as a camera 0.6 m away sees it: rays against its three pairs of sides."""
    rng = np.random.default_rng(seed)
    R_cam_obj, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    R_cam_obj[:, 0] *= np.linalg.det(R_cam_obj)
    K = np.array([[600.0, 0, _SIDE_PX / 2], [0, 600.0, _SIDE_PX / 2], [0, 0, 1]])
    depth_m = _box_depth(R_cam_obj, np.array([0.0, 0.0, 0.6]), K)
    return Instance(
        object_id=object_id,
        rgb=np.full((_SIDE_PX, _SIDE_PX, 3), 128, dtype=np.uint8),
        depth_m=depth_m,
        mask=depth_m > 0,
        K=K,
        seed=seed,
    )


def _box_depth(R_cam_obj: Float64, t_cam_obj: Float64, K: Float64) -> Float32:
    u, v = np.meshgrid(np.arange(_SIDE_PX), np.arange(_SIDE_PX))
    rays_cam = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(K).T  # (h, w, 3), z = 1
    rays_obj, camera_obj = rays_cam @ R_cam_obj, -R_cam_obj.T @ t_cam_obj
    with np.errstate(divide="ignore", invalid="ignore"):
        sides = np.stack([(sign * _BOX_M / 2 - camera_obj) / rays_obj for sign in (-1, 1)])
    enters, leaves = sides.min(axis=0).max(axis=-1), sides.max(axis=0).min(axis=-1)
    return np.where(enters < leaves, enters, 0.0).astype(np.float32)
