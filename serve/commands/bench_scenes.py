"""What `pem bench` of the client borrows from the server: rendered scenes with their truth, and facts about it."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from pem.bench.here import Instance, Picture
from pem.bench.here import Symmetries as AnySymmetries
from posekit.engine import Float64, Symmetries
from posekit.io.images import encode_png
from posekit.synthetic.scenes import make_scene, pose_errors
from posekit.synthetic.shapes import SHAPES, mesh_to_ply
from serve import settings
from workers.state import read_states

_PREFIX: Final = "bench-"  # of the objects' names, so that they clash with no others


class Lent:
    """The server's implementation of `pem.bench.here.Here`."""

    def __init__(self) -> None:
        shapes = (make() for make in SHAPES.values())
        self._shapes = {f"{_PREFIX}{shape.name}": replace(shape, name=f"{_PREFIX}{shape.name}") for shape in shapes}

    def object_names(self) -> Sequence[str]:
        """Return the names of SHAPES, each with the prefix."""
        return list(self._shapes)

    def ply(self, name: str) -> bytes:
        """Return an object's CAD as PLY, in millimetres."""
        return mesh_to_ply(self._shapes[name].mesh)

    def picture(self, seed: int, names: Sequence[str], *, count: int, width: int, height: int) -> Picture:
        """Render the scene of a seed. Objects do not overlap, so that their poses are certain."""
        shapes = [self._shapes[name] for name in names]
        scene = make_scene(seed, shapes, count=count, width=width, height=height, occlusion=False)
        return Picture(
            rgb_png=encode_png(scene.rgb),
            depth_png=encode_png(scene.depth_raw),
            depth_scale_mm=scene.depth_scale_mm,
            K=scene.K,
            instances=[
                Instance(name=one.shape.name, T_cam_obj=one.T_cam_obj, symmetries=one.shape.symmetries, mask=one.mask)
                for one in scene.instances
            ],
        )

    def pose_errors(self, T_est: Float64, T_true: Float64, symmetries: AnySymmetries) -> tuple[float, float]:
        """Return the pose error modulo symmetries: (degrees, millimetres)."""
        known = Symmetries(discrete=tuple(symmetries.discrete), continuous=tuple(symmetries.continuous))
        return pose_errors(T_est, T_true, known)

    def variables(self) -> Collection[str]:
        """Return the environment variables of all settings."""
        return settings.every().keys()

    def stage_names(self, server_pid: int) -> dict[int, str]:
        """Return pid -> stage of a server's workers, from their states in its run folder; {} if there is none."""
        for base in (Path("/dev/shm"), Path(tempfile.gettempdir())):
            for run_dir in base.glob(f"pem-server-{server_pid}-*"):
                return {state.pid: state.stage for state in read_states(run_dir)}
        return {}
