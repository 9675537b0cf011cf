"""The stages' share of the settings; `serve/settings.py` composes it with the gateway's.

Workers are spawned processes: each reads the one environment variable `PEM_STAGES` (JSON, written by the supervisor)
and so gets the same frozen value.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1, le=100_000)]
Megabytes = Annotated[int, Meta(ge=1, le=1_000_000)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
EngineName = Literal["geometric", "sam6d"]


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A settings table; an unknown key is an error, so a typo never passes silently."""


class Decode(Table, frozen=True):
    """CPU stage: pictures, masks, crops."""

    workers: Count = 2
    threads: Count = 1


class Pose(Table, frozen=True):
    """The one batched stage per device."""

    pass_detections: Count = 8  # instances in one pass of the engine; halved on out-of-memory
    batch_requests: Count = 16  # requests that Mosec may gather into one batch
    batch_wait_ms: Annotated[int, Meta(ge=1, le=1000)] = 3
    threads: Annotated[int, Meta(ge=0)] = 0  # detections that a CPU works on at a time; 0 = its cores, at most 4
    object_cache_mb: Megabytes = 1024  # object models held in memory, least recently used leave first
    max_seconds: Seconds = 120.0  # a worker stuck in one batch for longer is killed and replaced


class Respond(Table, frozen=True):
    """CPU stage: rows, overlay, files."""

    workers: Count = 1


class Onboard(Table, frozen=True):
    """CAD stages: one process inspects meshes, one builds engine models at low priority."""

    threads: Count = 1
    max_faces: Annotated[int, Meta(ge=1)] = 2_000_000
    max_seconds: Seconds = 900.0


class Sam6d(Table, frozen=True):
    """SAM-6D's pose estimation network."""

    weights: str = "sam-6d-pem-base.safetensors"  # a file in checkpoints_dir, or its path
    fallback: bool = True  # where the network cannot be loaded the geometric engine answers, degraded; false: no start
    exact: bool = False  # float32 and the published arithmetic, step by step: slower
    precision: Literal["auto", "float32", "tf32", "bf16"] = "auto"  # auto: float32 on a CPU, bf16 on a GPU
    views: Annotated[int, Meta(ge=4, le=42)] = 42  # rendered of each object; fewer onboard faster and match worse


class Stages(Table, frozen=True):
    """Everything a worker needs to know."""

    objects_dir: str = "data/objects"
    run_dir: str = "data/run"  # state files of the workers, progress files of onboarding
    devices: tuple[str, ...] = ("cpu",)  # resolved: one pose worker each
    engines: tuple[EngineName, ...] = ("geometric",)  # the first is the default
    sam6d: Sam6d = Sam6d()  # its weights are an absolute path here
    sam6d_version: str | None = None  # of the weights that the server found at its start; None: of those there are
    decode: Decode = Decode()
    pose: Pose = Pose()
    respond: Respond = Respond()
    onboard: Onboard = Onboard()


ENVIRONMENT = "PEM_STAGES"


def to_environment(stages: Stages) -> dict[str, str]:
    """The variable that hands `stages` to spawned workers."""
    return {ENVIRONMENT: msgspec.json.encode(stages).decode()}


def from_environment() -> Stages:
    """The settings this process was started with (defaults where there are none, as in a test)."""
    text = os.environ.get(ENVIRONMENT)
    return msgspec.json.decode(text, type=Stages) if text else Stages()


def objects_path(stages: Stages) -> Path:
    """The object store's folder."""
    return Path(stages.objects_dir)
