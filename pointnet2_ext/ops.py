"""The operators: one schema each, the reference for every device, and compiled libraries that override a device.

Loading `_kernels_<device>.so` beside this file registers its kernels with torch's dispatcher; the rest of the package
does not know if the library exists. `kernel_for` tells which of the two runs.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from pointnet2_ext import reference

Kernel = Literal["compiled", "reference"]
OPS = ("ball_query", "furthest_point_sample")
_REBUILD = "rebuild with: pip install --no-build-isolation ."

_log = logging.getLogger(__name__)
_library = torch.library.Library("pointnet2_ext", "DEF")
_library.define("furthest_point_sample(Tensor points, int count) -> Tensor")
_library.define("ball_query(Tensor points, Tensor centers, float radius, int count) -> Tensor")
for _op in OPS:
    _library.impl(_op, getattr(reference, _op), "CompositeExplicitAutograd")


def _furthest_point_sample_shape(points: Tensor, count: int) -> Tensor:
    return points.new_empty((points.shape[0], count), dtype=torch.int64)


def _ball_query_shape(points: Tensor, centers: Tensor, radius: float, count: int) -> Tensor:
    return points.new_empty((*centers.shape[:2], count), dtype=torch.int64)


torch.library.register_fake("pointnet2_ext::furthest_point_sample", _furthest_point_sample_shape)
torch.library.register_fake("pointnet2_ext::ball_query", _ball_query_shape)


def furthest_point_sample(points: Tensor, count: int) -> Tensor:
    """Pick `count` points, each the furthest from those already picked.

    points: (B, N, 3) float32 or float64, finite (not checked). Returns (B, count) int64 indices into N. Starts at
    index 0; ties go to the lowest index. Raises ValueError for a wrong shape, dtype or count.
    """
    _check_points("points", points)
    if not 1 <= count <= points.shape[1]:
        raise ValueError(f"count must be between 1 and the {points.shape[1]} points, got {count}")
    return cast(Tensor, torch.ops.pointnet2_ext.furthest_point_sample(points.contiguous(), count))


def ball_query(points: Tensor, centers: Tensor, radius: float, count: int) -> Tensor:
    """Return for each center the first `count` points strictly within `radius` of it, in the order of their indices.

    points: (B, N, 3) float32 or float64; centers: (B, M, 3) of the same dtype and device; all finite (not checked);
    radius in the points' unit. Returns (B, M, count) int64 indices into N. Spare slots repeat the first hit; a center
    without a hit gets index 0 in all slots. Raises ValueError for a wrong shape, dtype, device, radius or count.
    """
    _check_points("points", points)
    _check_points("centers", centers)
    if centers.shape[0] != points.shape[0]:
        raise ValueError(f"points and centers must have the same batch, got {points.shape[0]} and {centers.shape[0]}")
    if centers.dtype != points.dtype or centers.device != points.device:
        raise ValueError(
            f"points and centers must have the same dtype and device, "
            f"got {points.dtype} on {points.device} and {centers.dtype} on {centers.device}"
        )
    if points.shape[1] < 1:
        raise ValueError("points must hold at least 1 point, got 0")
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius must be a positive number, got {radius}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    indices = torch.ops.pointnet2_ext.ball_query(points.contiguous(), centers.contiguous(), radius, count)
    return cast(Tensor, indices)


def kernel_for(device: str | torch.device) -> Kernel:
    """Return which kernels answer for tensors on `device` ("cpu", "cuda:1", ...): compiled ones or the reference."""
    return "compiled" if torch.device(device).type in _compiled_devices else "reference"


def kernels(device: str | torch.device) -> dict[str, Kernel]:
    """Return `kernel_for` for each operator by name, for status pages and metrics."""
    return {op: kernel_for(device) for op in OPS}


def _check_points(name: str, points: Tensor) -> None:
    if points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(f"{name} must be (B, N, 3), got {tuple(points.shape)}")
    if points.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {points.dtype}")


def _load_compiled(folder: Path) -> frozenset[str]:
    """Load every `_kernels_<device>.so` in `folder`; return the device types that they serve.

    Falling back to the reference is allowed, but never silent: it can be ten times slower.
    """
    devices = set()
    for path in sorted(folder.glob("_kernels_*.so")):
        try:
            torch.ops.load_library(path)
        except OSError as error:
            _log.warning("%s does not load with torch %s (%s); %s", path.name, torch.__version__, error, _REBUILD)
        else:
            devices.add(path.stem.removeprefix("_kernels_"))
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        if device not in devices:
            _log.warning(
                "pointnet2_ext has no compiled kernels for %s: the slower torch reference answers; %s", device, _REBUILD
            )
    return frozenset(devices)


_compiled_devices = _load_compiled(Path(__file__).parent)
