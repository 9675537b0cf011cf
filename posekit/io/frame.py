"""Decode and check an RGB-D image pair: colours, raw depth, and the camera that took both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from posekit.engine import Float32, Float64, UInt8
from posekit.errors import InvalidInput
from posekit.io import images


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A decoded image pair."""

    rgb: UInt8  # (H, W, 3)
    depth_raw: npt.NDArray[Any]  # (H, W) uint16 or float32, 0 = no reading
    depth_scale_mm: float
    K: Float64  # (3, 3)

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width in pixels."""
        return self.rgb.shape[0], self.rgb.shape[1]

    def depth_mm(self, window: tuple[slice, slice]) -> Float32:
        """Return the depth in millimetres, 0 where there is no reading or the scaled value is not a number."""
        with np.errstate(over="ignore", invalid="ignore"):
            depth_mm = self.depth_raw[window].astype(np.float32) * np.float32(self.depth_scale_mm)
        return np.where(np.isfinite(depth_mm), depth_mm, np.float32(0))


def decode_frame(
    rgb: bytes,
    depth: bytes,
    K: Sequence[float],
    depth_scale_mm: float | None,
    *,
    bare_depth_size: tuple[int, int] | None = None,
    max_megapixels: float = 50.0,
    rgb_field: str = "rgb_image",
    depth_field: str = "depth_image",
) -> Frame:
    """Decode both pictures.

    K: 9 numbers, row-major. `depth_scale_mm`: factor from a raw depth value to millimetres; None = 1.0, which a float
    TIFF refuses: its scale must be given. `bare_depth_size`: height and width of a depth image that is bare
    little-endian float32 without a file format. Raises BadData, TooLarge or InvalidInput with the field at fault;
    InvalidInput also where the two sizes differ.
    """
    if bare_depth_size is not None:
        depth_raw: npt.NDArray[Any] = images.decode_depth_raw_f32(depth, *bare_depth_size, depth_field)
    else:
        if depth_scale_mm is None and images.depth_is_float(depth):
            raise InvalidInput("depth_scale must be given for a float TIFF", "cam_params.depth_scale")
        depth_raw = images.decode_depth(depth, max_megapixels, depth_field)
    colours = images.decode_color(rgb, max_megapixels, rgb_field)
    if colours.shape[:2] != depth_raw.shape:
        height, width = colours.shape[:2]
        raise InvalidInput(
            f"the depth image is {depth_raw.shape[1]} x {depth_raw.shape[0]} pixels, the colour image {width} x "
            f"{height}: register the depth to the colour image, so that the two have one size",
            depth_field,
        )
    return Frame(
        rgb=colours,
        depth_raw=depth_raw,
        depth_scale_mm=1.0 if depth_scale_mm is None else depth_scale_mm,
        K=np.array(K, dtype=np.float64).reshape(3, 3),
    )


def camera_warnings(frame: Frame) -> list[str]:
    """Return warnings about an odd camera: a principal point outside the image."""
    (height, width), cx, cy = frame.size, frame.K[0, 2], frame.K[1, 2]
    if 0 <= cx <= width and 0 <= cy <= height:
        return []
    return [
        f"the principal point ({cx:g}, {cy:g}) of cam_K lies outside of the {width} x {height} image: "
        "is cam_K that of another image size?"
    ]
