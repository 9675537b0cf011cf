"""The geometric engine's row in the registry. Importing it is cheap: `load` and `kernels` import torch."""

from __future__ import annotations

from collections.abc import Mapping

from posekit.engine import Engine, EngineSpec
from posekit.geometric import VERSION


def _load(_: None, device: str, threads: int) -> Engine:
    from posekit.geometric.engine import GeometricEngine

    return GeometricEngine(device=device, threads=threads)


def _version(_: None) -> str:
    return VERSION


def _kernels(device: str) -> Mapping[str, str]:
    from posekit.geometric.kernels import kernels

    return kernels(device)


SPEC = EngineSpec(
    name="geometric",
    words="the geometric engine",
    load=_load,
    version=_version,
    kernels=_kernels,
    licence="Apache-2.0",
    refine="icp",
    onboard_as="onboard",
)
