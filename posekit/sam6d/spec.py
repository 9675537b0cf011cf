"""The network's row in the registry. Importing it is cheap: `load` and `kernels` import torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from posekit.engine import Engine, EngineSpec, Weights
from posekit.sam6d.checkpoint.version import sha256_of, version_of
from posekit.sam6d.settings import Sam6d


def _load(own: Sam6d, device: str, threads: int) -> Engine:
    from posekit.sam6d.engine import Sam6dEngine

    precision = own.precision
    if precision == "auto":
        precision = "bf16" if device.startswith("cuda") and not own.exact else "float32"
    return Sam6dEngine(
        weights_file=Path(own.weights),
        device=device,
        threads=threads,
        exact=own.exact,
        precision=precision,
        views=own.views,
    )


def _version(own: Sam6d) -> str:
    return version_of(Path(own.weights), own.views)


def _kernels(device: str) -> Mapping[str, str]:
    from posekit.sam6d.kernels import kernels

    return kernels(device)


def _problem(weights_file: Path) -> str | None:
    try:
        with safe_open(weights_file, framework="np") as file:
            return None if file.keys() else "the network's weights are an empty file"
    except FileNotFoundError:
        return "the network's weights are missing"
    except (SafetensorError, ValueError):
        return "the network's weights are cut short, damaged or no safetensors file"
    except OSError as error:
        return f"the network's weights cannot be read: {error.strerror or 'it is no file'}"


SPEC = EngineSpec(
    name="sam6d",
    words="the network",
    load=_load,
    settings=Sam6d,
    version=_version,
    kernels=_kernels,
    licence="Apache-2.0",
    weights=Weights(
        licence="not stated by their authors: ask them before commercial use",
        problem=_problem,
        sha256=sha256_of,
    ),
    refine="none",
    refiner="geometric",
    symmetries_from="geometric",
    effort=20.0,
    stand_in="geometric",
    hint="`pem weights import FILE` puts SAM-6D's released weights in place; --engine geometric needs none",
)
