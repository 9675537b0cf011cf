"""The server's status, its version, and the metadata that the Open Inference Protocol asks for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta


class QueueState(msgspec.Struct, kw_only=True):
    """What waits or runs right now."""

    requests: Annotated[int, Meta(description="Waiting or running.")]
    detections: Annotated[int, Meta(description="Waiting or running.")]


class Track(msgspec.Struct, kw_only=True):
    """One backend."""

    state: Annotated[Literal["starting", "ready", "stopped"], Meta(description="Of the backend.")]
    release: Annotated[str, Meta(description="What it answers with.")]
    workers: Annotated[dict[str, int], Meta(description="Stage -> live processes.")]
    restarts: Annotated[int, Meta(description="Of its processes, since start.")]


class Status(msgspec.Struct, kw_only=True):
    """How the server is."""

    server: Annotated[
        Literal["running", "draining"], Meta(description="draining: finishes what it has, takes nothing new.")
    ]
    model_loaded: Annotated[bool, Meta(description="Whether poses can be answered.")]
    device: Annotated[str, Meta(description="Where the pose stage runs.")]
    uptime: Annotated[float, Meta(description="Seconds since start.")]
    version: Annotated[str, Meta(description="Of the server.")]
    engine: Annotated[str, Meta(description="What `engine: auto` means here.")]
    release: Annotated[str, Meta(description="What answers now.")]
    kernels: Annotated[dict[str, str], Meta(description="Operation -> compiled or reference.")]
    tracks: Annotated[dict[str, Track], Meta(description="The backends by name.")]
    objects: Annotated[int, Meta(description="How many are registered.")]
    queue: Annotated[QueueState, Meta(description="What waits or runs right now.")]
    detections_per_second: Annotated[
        float, Meta(description="Of `engine`, measured lately; the queue's admission reckons with it.")
    ]
    engines: Annotated[dict[str, str], Meta(description="Name -> release of those that answer, the default first.")]
    degraded: Annotated[bool, Meta(description="The geometric engine stands in for the network.")]
    degraded_reason: Annotated[str | None, Meta(description="Why; null where it does not.")]


class Version(msgspec.Struct, kw_only=True):
    """What answers here."""

    version: Annotated[str, Meta(description="Of the server.")]
    engine: Annotated[str, Meta(description="What `engine: auto` means here.")]
    release: Annotated[str, Meta(description="What answers now.")]
    checkpoint: Annotated[str | None, Meta(description="Name of the weights; null where the engine has none.")]
    sha256: Annotated[str | None, Meta(description="Of their file.")]
    engines: Annotated[dict[str, str], Meta(description="Name -> release of those that answer, the default first.")]
    degraded: Annotated[bool, Meta(description="The geometric engine stands in for the network.")]


class ModelMetadata(msgspec.Struct, kw_only=True):
    """Open Inference Protocol metadata."""

    name: Annotated[str, Meta(description="pem")]
    versions: Annotated[list[str], Meta(description="The release that answers now.")]
    platform: Annotated[str, Meta(description="pem-server")]
    inputs: Annotated[list[dict[str, Any]], Meta(description="Name, datatype and shape of what goes in.")]
    outputs: Annotated[list[dict[str, Any]], Meta(description="Name, datatype and shape of what comes out.")]
    parameters: Annotated[dict[str, Any], Meta(description="Engine, units, and the licences of engine and weights.")]
