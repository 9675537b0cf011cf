"""The settings table `[sam6d]` of SAM-6D's network."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from posekit.sam6d.checkpoint import manifest
from posekit.settings import WeightsTable, says


class Sam6d(WeightsTable, frozen=True):
    """SAM-6D's pose estimation network."""

    weights: Annotated[str, says("File of the weights: a name in checkpoints_dir, or a path.")] = manifest.FILE_NAME
    exact: Annotated[bool, says("Compute in float32 and the published arithmetic, step by step: slower.")] = False
    precision: Annotated[
        Literal["auto", "float32", "tf32", "bf16"],
        says("Number format. auto: float32 on a CPU, bf16 on a GPU."),
    ] = "auto"
    views: Annotated[
        int,
        Meta(ge=4, le=42),
        says("Views rendered of each object. Fewer onboard faster and match worse.", unit="views"),
    ] = 42
