"""All settings, as one typed struct: name, unit, range and default in one line each. This file is the manual.

They come from a TOML file (`--config`), then the environment, then the command line, the later winning. A top-level
setting is `PEM_` and its name (`PEM_PORT`), one in a table has the table's name between (`PEM_POSE_PASS_DETECTIONS`).
Unknown keys of a file are refused with their path, unknown variables are warned of at start: no typo passes silently.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pem.host.machine import usable_cores, usable_memory_mb
from posekit import registry
from posekit.settings import Table, WeightsTable
from workers.settings import (
    Count,
    Decode,
    EngineName,
    EngineTables,
    Megabytes,
    Onboard,
    Pose,
    Respond,
    Seconds,
    Stages,
    fitted,
    pose_workers,
)

if TYPE_CHECKING:
    EngineChoice = str  # checked where settings are read
else:
    EngineChoice = Literal[registry.choices()]
Milliseconds = Annotated[int, Meta(ge=1, le=86_400_000)]


class Limits(Table, frozen=True):
    """What one request, and all of them together, may take."""

    body_mb: Megabytes = 20  # pose routes, after gunzip
    object_body_mb: Megabytes = 80  # POST /api/v1/objects
    inline_cad_mb: Megabytes = 10  # the field `cad`
    image_megapixels: Annotated[float, Meta(gt=0)] = 50.0  # decoded, colour and depth each
    mask_megapixels: Annotated[float, Meta(gt=0)] = 500.0  # all masks of a request together
    detections: Count = 200  # in one request
    body_idle_s: Seconds = 10.0  # a body that stops coming for this long is 408
    in_flight_requests: Count = 256  # refused before the body is read
    in_flight_mb: Megabytes = 1024  # bodies held, likewise


class Queue(Table, frozen=True):
    """How requests wait for the pose stage."""

    deadline_ms: Milliseconds = 30_000  # when the request names none
    deadline_max_ms: Milliseconds = 600_000  # the longest a request may name
    ceiling_detections: Count = 256  # waiting ones; a request that finds the queue empty is always let in
    passes_in_flight: Count = 2  # passes' worth inside Mosec: one computed, one gathered; 1: small requests wait less
    retries: Annotated[int, Meta(ge=0, le=10)] = 2  # of a part whose worker died


class Storage(Table, frozen=True):
    """How much may stay on disk."""

    objects_mb: Megabytes = 20_000  # unnamed objects leave first, least recently used; then 503
    output_days: Annotated[int, Meta(ge=0)] = 30  # our files under the output root leave after; 0 = never


class Ism(Table, frozen=True):
    """The instance-segmentation server that POST /api/v1/full_pipeline asks."""

    url: str | None = None  # http://host:port
    timeout_s: Seconds = 60.0
    connect_timeout_s: Seconds = 3.0


class Log(Table, frozen=True):
    """The log: people read the console, machines the file."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"  # of standard error; auto: console on a terminal
    file: bool = True  # <data_dir>/logs/pem.log, JSON lines
    file_mb: Megabytes = 100
    files: Count = 10


class Metrics(Table, frozen=True):
    """GET /metrics."""

    open: bool = True  # false: wants an API key, where there are keys
    objects: tuple[str, ...] = ()  # registered names that may be a label; everything else is `other`


class Settings(EngineTables, frozen=True):
    """Everything `pem serve` can be told; the tables of engines, such as `[sam6d]`, are beside the engines."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8003  # 0: any free one, printed at start
    data_dir: str = "data"  # objects, outputs, logs, keys
    cad_root: str | None = None  # cad_path must lie inside; default <data_dir>/cad
    output_root: str | None = None  # output_dir must lie inside; default <data_dir>/outputs
    keys_file: str | None = None  # default <data_dir>/keys.json
    checkpoints_dir: str = "checkpoints"  # the weights that `pem weights import` keeps
    engine: EngineChoice = registry.AUTO  # auto: sam6d where its weights are, else geometric
    device: str = "auto"  # auto | cpu | cuda | cuda:0,1
    drain_s: Seconds = 30.0  # after SIGTERM requests in flight may finish for this long
    spool_dir: str = "/dev/shm"  # large requests pass through here to the workers; no room: through a socket
    cors_origins: tuple[str, ...] = ()  # ("*",) = any
    limits: Limits = Limits()
    queue: Queue = Queue()
    storage: Storage = Storage()
    ism: Ism = Ism()
    log: Log = Log()
    metrics: Metrics = Metrics()
    decode: Decode = Decode()
    pose: Pose = Pose()
    respond: Respond = Respond()
    onboard: Onboard = Onboard()

    @property
    def data_path(self) -> Path:
        """Where everything lives that must survive a restart; absolute."""
        return Path(self.data_dir).expanduser().resolve()

    @property
    def cad_path(self) -> Path:
        """The CAD root; absolute, symlinks resolved."""
        return Path(self.cad_root).expanduser().resolve() if self.cad_root else self.data_path / "cad"

    @property
    def output_path(self) -> Path:
        """The output root; absolute, symlinks resolved."""
        return Path(self.output_root).expanduser().resolve() if self.output_root else self.data_path / "outputs"

    @property
    def keys_path(self) -> Path:
        """The file of hashed API keys."""
        return Path(self.keys_file).expanduser().resolve() if self.keys_file else self.data_path / "keys.json"

    @property
    def objects_path(self) -> Path:
        """The CAD store."""
        return self.data_path / "objects"

    @property
    def checkpoints_path(self) -> Path:
        """The folder of weights; absolute."""
        return Path(self.checkpoints_dir).expanduser().resolve()

    def weights_path(self, engine: str) -> Path | None:
        """The file of an engine's weights; absolute. None where it has none."""
        own = self.own(engine)
        if not isinstance(own, WeightsTable):
            return None
        return (self.checkpoints_path / Path(own.weights).expanduser()).resolve()

    def resolved(self, engine: str) -> Table | None:
        """The table of an engine with the absolute path of its weights, as it is loaded with."""
        own, path = self.own(engine), self.weights_path(engine)
        return own if own is None or path is None else msgspec.structs.replace(own, weights=str(path))

    def stages(self, *, run_dir: Path, devices: tuple[str, ...], engines: tuple[EngineName, ...]) -> Stages:
        """The workers' share, with devices, engines and weights resolved, and numbers that fit this machine."""
        cores, memory_mb = usable_cores(), usable_memory_mb()
        tables = {name: table for name in registry.names() if (table := self.resolved(name)) is not None}
        stages = Stages(
            objects_dir=str(self.objects_path),
            run_dir=str(run_dir),
            devices=tuple(one for one in devices for _ in range(pose_workers(self.pose, one, cores, memory_mb))),
            engines=engines,
            decode=self.decode,
            pose=self.pose,
            respond=self.respond,
            onboard=self.onboard,
        )
        return fitted(msgspec.structs.replace(stages, **tables), cores)


class SettingsError(Exception):
    """A settings file, variable or option that cannot be used; the message names it."""


def load(
    path: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings from a TOML file, then `environment` (default: this process's), then `overrides`, the later winning.

    `overrides` holds top-level names; None values are skipped. Raises SettingsError with the path of what is wrong.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = msgspec.toml.decode(path.read_bytes())
        except OSError as error:
            raise SettingsError(f"cannot read the settings file {path}: {error.strerror}") from None
        except msgspec.DecodeError as error:
            raise SettingsError(f"{path}: {error}") from None
        _convert(tree, f"{path}: ")
    _merge_environment(tree, os.environ if environment is None else environment)
    for name, value in (overrides or {}).items():
        if value is not None:
            tree[name] = value
    return _convert(tree, "")


def _convert(tree: Mapping[str, Any], where: str) -> Settings:
    try:
        return msgspec.convert(tree, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{where}{error}") from None


def environment_names() -> dict[str, tuple[str, ...]]:
    """Variable name -> path in the settings, for every setting."""
    names: dict[str, tuple[str, ...]] = {}
    for field in msgspec.structs.fields(Settings):
        if isinstance(field.default, Table):
            for inner in msgspec.structs.fields(type(field.default)):
                names[f"PEM_{field.name}_{inner.name}".upper()] = (field.name, inner.name)
        else:
            names[f"PEM_{field.name}".upper()] = (field.name,)
    return names


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like settings and are none, so that the start can warn of a typo."""
    known = environment_names().keys() | _OTHER_VARIABLES
    return sorted(name for name in environment if name.startswith("PEM_") and name not in known)


#: Variables with our prefix that are no settings of the server.
_OTHER_VARIABLES = frozenset(
    {
        "PEM_URL",
        "PEM_API_KEY",
        "PEM_STAGES",
        "PEM_PARENT_PID",
        "PEM_SLOT",
        "PEM_SLOT_DEVICE",
        "PEM_SLOT_DEVICE_NAME",
        "PEM_KEEPER",
    }
)


def _merge_environment(tree: dict[str, Any], environment: Mapping[str, str]) -> None:
    names = environment_names()
    for variable, text in environment.items():
        if not variable.startswith("PEM_") or variable in _OTHER_VARIABLES:
            continue
        path = names.get(variable)
        if path is None:
            continue  # named by unknown_variables(), for the log: container platforms invent PEM_SERVICE_HOST and such
        *tables, leaf = path
        target = tree
        for table in tables:
            target = target.setdefault(table, {})
        target[leaf] = _parse(text, path, variable)


def _parse(text: str, path: tuple[str, ...], variable: str) -> Any:
    struct: Any = Settings
    for name in path[:-1]:
        struct = type({f.name: f for f in msgspec.structs.fields(struct)}[name].default)
    kind = {f.name: f for f in msgspec.structs.fields(struct)}[path[-1]].type
    value: Any = text
    if kind == tuple[str, ...]:
        value = [item.strip() for item in text.split(",") if item.strip()]
    try:
        return msgspec.to_builtins(msgspec.convert(value, kind, strict=False))
    except msgspec.ValidationError as error:
        raise SettingsError(f"{variable}: {error}") from None
