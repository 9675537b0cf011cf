"""A scene of two objects in a small picture, so that a request costs little: their CAD is part of the demo scene."""

from __future__ import annotations

import functools

import numpy as np

from posekit.render import Caster
from posekit.scenes import Scene, SceneInstance
from posekit.shapes import SHAPES, rotation
from tests.running import Question

WIDTH, HEIGHT = 160, 120
NAMES = ("stepped", "wedge")


@functools.cache
def tiny_scene() -> Scene:
    """Two parts, 0.4 m away before a wall, without noise; depth in tenths of a millimetre."""
    turns = (
        rotation((1, 0, 0), -40) @ rotation((0, 1, 0), 30),
        rotation((1, 0, 0), 35) @ rotation((0, 1, 0), -40) @ rotation((0, 0, 1), 20),
    )
    places = ((-0.08, 0.01, 0.40), (0.08, 0.0, 0.42))
    poses = [np.eye(4), np.eye(4)]
    for T_cam_obj, R, t in zip(poses, turns, places, strict=True):
        T_cam_obj[:3, :3], T_cam_obj[:3, 3] = R, t
    shapes = [SHAPES[name]() for name in NAMES]
    K = np.array([[170.0, 0, WIDTH / 2 - 0.5], [0, 170.0, HEIGHT / 2 - 0.5], [0, 0, 1]])
    caster = Caster([shape.mesh for shape in shapes], poses)
    seen = caster.render(np.eye(4), K, WIDTH, HEIGHT)
    depth_m = np.where(seen.depth_m > 0, seen.depth_m, 0.7)
    colours = np.where(seen.depth_m[..., None] > 0, seen.normals_cam * -100 + 128, 90.0)
    return Scene(
        rgb=np.clip(colours, 0, 255).astype(np.uint8),
        depth_raw=np.rint(depth_m * 10_000).astype(np.uint16),
        depth_scale_mm=0.1,
        K=K,
        instances=[
            SceneInstance(shape=shape, T_cam_obj=T, mask=np.asarray(seen.instance == index), visibility=1.0)
            for index, (shape, T) in enumerate(zip(shapes, poses, strict=True))
        ],
    )


def tiny_question() -> Question:
    """The scene as a request of a few kilobytes."""
    return Question(tiny_scene())
