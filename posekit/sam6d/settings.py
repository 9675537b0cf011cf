"""The settings table `[sam6d]` of SAM-6D's network."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from posekit.sam6d.checkpoint import manifest
from posekit.settings import WeightsTable


class Sam6d(WeightsTable, frozen=True):
    """SAM-6D's pose estimation network."""

    weights: str = manifest.FILE_NAME  # a file in checkpoints_dir, or its path
    fallback: bool = True  # where the network cannot be loaded the geometric engine answers, degraded; false: no start
    exact: bool = False  # float32 and the published arithmetic, step by step: slower
    precision: Literal["auto", "float32", "tf32", "bf16"] = "auto"  # auto: float32 on a CPU, bf16 on a GPU
    views: Annotated[int, Meta(ge=4, le=42)] = 42  # rendered of each object; fewer onboard faster and match worse
