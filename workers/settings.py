"""The stages' share of the settings; `serve/settings.py` combines it with the gateway's.

Workers are spawned processes: each reads the one environment variable `PEM_STAGES` (JSON, written by the supervisor)
and so gets the same frozen value.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from pem.host.machine import usable_cores
from posekit import registry
from posekit.settings import Table, WeightsTable, says

Count = Annotated[int, Meta(ge=1, le=100_000)]
Megabytes = Annotated[int, Meta(ge=1, le=1_000_000, extra={"unit": "MB"})]
Automatic = Annotated[int, Meta(ge=0, le=100_000)]  # 0: follows the machine
Seconds = Annotated[float, Meta(gt=0, le=86_400, extra={"unit": "seconds"})]


if TYPE_CHECKING:
    EngineName = str  # checked where settings are read

    class _OneTableEach(Table, frozen=True):
        """Base for the type checker, which cannot know the engines."""
else:
    EngineName = Literal[registry.names()]
    _OneTableEach = msgspec.defstruct(
        "_OneTableEach",
        [(each.name, each.settings, each.settings()) for each in registry.by_effort() if each.settings],
        bases=(Table,),
        module=__name__,
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
    )


class EngineTables(_OneTableEach, frozen=True):
    """Settings with one table for each engine that has settings, named after the engine: `[sam6d]`."""

    def own(self, engine: str) -> Table | None:
        """Return an engine's table; None if it has none."""
        table: Table | None = getattr(self, engine) if registry.spec(engine).settings else None
        return table

    def stand_in(self, engine: str) -> str | None:
        """Return the engine that answers if this one cannot be started; None if none may."""
        own = self.own(engine)
        return None if isinstance(own, WeightsTable) and not own.fallback else registry.spec(engine).stand_in


class Decode(Table, frozen=True):
    """The decode stage, on the CPU: cuts pictures and masks into crops, one for each detection."""

    workers: Annotated[Automatic, says("Processes. 0: half of the cores, 2 at least, 8 at most.", unit="processes")] = 0
    threads: Annotated[Count, says("Threads of each process.", unit="threads")] = 1


class Pose(Table, frozen=True):
    """The pose stage: computes poses in passes, each one run of an engine over some detections."""

    # `fitted` puts numbers in the place of zeros.
    workers: Annotated[
        Automatic,
        says(
            "Processes on each device. 0: one on a GPU; on a CPU one for each core, but no more than 4, "
            "and no more than one for each 2 GB of memory.",
            unit="processes",
        ),
    ] = 0
    threads: Annotated[
        Automatic,
        says(
            "Detections that a process computes at a time on a CPU. 0: the cores over the processes, 4 at most.",
            unit="threads",
        ),
    ] = 0
    pass_detections: Annotated[
        Automatic,
        says(
            "Detections in one pass at most, halved when memory runs out. 0: 8 on a GPU, 4 on a CPU.",
            unit="detections",
        ),
    ] = 0
    batch_requests: Annotated[
        Automatic, says("Requests that a process takes at a time. 0: 16 on a GPU, 1 on a CPU.", unit="requests")
    ] = 0
    batch_wait_ms: Annotated[
        int,
        Meta(ge=0, le=1000),
        says(
            "For how long work is gathered into a pass while all processes are busy. An idle one gets it at once.",
            unit="milliseconds",
        ),
    ] = 5
    object_cache_mb: Annotated[
        Megabytes, says("Object models that each process holds in memory. The least recently used leave first.")
    ] = 1024
    max_seconds: Annotated[Seconds, says("A process that is stuck in one batch for longer is killed and replaced.")] = (
        120.0
    )


class Respond(Table, frozen=True):
    """The respond stage, on the CPU: makes rows, overlays and files."""

    workers: Annotated[Count, says("Processes.", unit="processes")] = 1


class Onboard(Table, frozen=True):
    """Onboarding: what is computed once for each CAD model. One process inspects meshes, one for each engine builds."""

    threads: Annotated[Count, says("Threads of each process.", unit="threads")] = 1
    max_faces: Annotated[int, Meta(ge=1), says("A mesh with more faces is refused.", unit="faces")] = 2_000_000
    max_seconds: Annotated[
        Seconds, says("A process that is stuck on one object for longer is killed and replaced.")
    ] = 900.0


class Stages(EngineTables, frozen=True):
    """Everything a worker needs to know. The weights in engines' tables are absolute paths here."""

    objects_dir: str = "data/objects"
    run_dir: str = "data/run"  # state files of the workers, progress files of onboarding
    devices: tuple[str, ...] = ("cpu",)  # resolved: one device for each pose worker
    engines: tuple[EngineName, ...] = (registry.needing_nothing(),)  # the first is the default
    versions: Mapping[str, str] = msgspec.field(default_factory=dict)  # of engines, at the server's start; none: as now
    decode: Decode = Decode()
    pose: Pose = Pose()
    respond: Respond = Respond()
    onboard: Onboard = Onboard()


ENVIRONMENT = "PEM_STAGES"

_MOST_CPU_WORKERS = 4  # each holds a model of every object
_CPU_WORKER_MB = 2000  # memory for each: itself, its objects, and its share of the other processes
_MOST_THREADS = 4
_DECODERS = 2, 8  # at least, at most


def on_gpu(stages: Stages) -> bool:
    """Return True if the pose stage runs on GPUs."""
    return stages.devices[0] != "cpu"


def pose_workers(pose: Pose, device: str, cores: int, memory_mb: int | None) -> int:
    """Return the number of pose workers of a device. `memory_mb` is None if the amount of memory is unknown."""
    if pose.workers or device != "cpu":
        return pose.workers or 1
    room = _MOST_CPU_WORKERS if memory_mb is None else max(1, memory_mb // _CPU_WORKER_MB)
    return min(cores, room, _MOST_CPU_WORKERS)


def fitted(stages: Stages, cores: int) -> Stages:
    """Return the settings with a number for everything that depends on the machine.

    docs/decisions/0020-cpu-workers-are-processes.md explains the numbers.
    """
    gpu, pose, decode = on_gpu(stages), stages.pose, stages.decode
    fewest, most = _DECODERS
    return msgspec.structs.replace(
        stages,
        decode=msgspec.structs.replace(decode, workers=decode.workers or min(max(cores // 2, fewest), most)),
        pose=msgspec.structs.replace(
            pose,
            workers=pose.workers or stages.devices.count(stages.devices[0]),
            threads=pose.threads or max(1, min(cores // len(stages.devices), _MOST_THREADS)),
            pass_detections=pose.pass_detections or (8 if gpu else 4),
            batch_requests=pose.batch_requests or (16 if gpu else 1),
        ),
    )


def to_environment(stages: Stages) -> dict[str, str]:
    """Return the environment variable that hands `stages` to spawned workers."""
    return {ENVIRONMENT: msgspec.json.encode(stages).decode()}


def from_environment() -> Stages:
    """Return the fitted settings that this process was started with (defaults if there are none, as in a test)."""
    text = os.environ.get(ENVIRONMENT)
    return fitted(msgspec.json.decode(text, type=Stages) if text else Stages(), usable_cores())


def objects_path(stages: Stages) -> Path:
    """Return the object store's folder."""
    return Path(stages.objects_dir)
