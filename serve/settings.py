"""All settings, as one typed struct: the type, unit, range, default and words of each.

`pem serve --print-config` prints them as a manual; `configs/default.toml` is its output, and `--help` has the same
words. Settings come from a TOML file (`--config`), then the environment, then the command line; the later wins. The
variable of a top-level setting is `PEM_` and its name (`PEM_PORT`); that of a setting in a table has the table's name
between them (`PEM_POSE_PASS_DETECTIONS`). Unknown keys of a file are refused with their path, and the start warns of
unknown variables: no typo passes silently.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from pem.host.machine import usable_cores, usable_memory_mb
from posekit import registry
from posekit.settings import Table, WeightsTable, says
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
Milliseconds = Annotated[int, Meta(ge=1, le=86_400_000, extra={"unit": "milliseconds"})]


class Limits(Table, frozen=True):
    """What one request, and all of them together, may take."""

    body_mb: Annotated[Megabytes, says("Body of a pose request, after gunzip.")] = 20
    object_body_mb: Annotated[Megabytes, says("Body of POST /api/v1/objects.")] = 80
    inline_cad_mb: Annotated[Megabytes, says("The field `cad` of a pose request.")] = 10
    image_megapixels: Annotated[
        float, Meta(gt=0), says("Each picture, colour and depth, once decoded.", unit="megapixels")
    ] = 50.0
    mask_megapixels: Annotated[
        float, Meta(gt=0), says("All masks of a request together, once decoded.", unit="megapixels")
    ] = 500.0
    detections: Annotated[Count, says("Detections in one request.", unit="detections")] = 200
    body_idle_s: Annotated[Seconds, says("A body that stops coming for this long is refused with 408.")] = 10.0
    in_flight_requests: Annotated[
        Count,
        says("Requests in flight. More are refused with 429, before their body is read.", unit="requests"),
    ] = 256
    in_flight_mb: Annotated[
        Megabytes,
        says("Bodies of the requests in flight. More are refused with 429, before they are read."),
    ] = 1024


class Queue(Table, frozen=True):
    """How requests wait for the pose stage."""

    deadline_ms: Annotated[Milliseconds, says("Deadline of a request that names none.")] = 30_000
    deadline_max_ms: Annotated[Milliseconds, says("The longest deadline that a request may name.")] = 600_000
    ceiling_detections: Annotated[
        Count,
        says("Detections that may wait. A request that finds the queue empty is always let in.", unit="detections"),
    ] = 256
    passes_in_flight: Annotated[
        Count,
        says(
            "Passes inside the pose stage for each of its processes: one computed, one gathered. "
            "With 1 small requests wait less.",
            unit="passes",
        ),
    ] = 2
    retries: Annotated[
        int,
        Meta(ge=0, le=10),
        says("How often a part of a request is sent again because its worker died.", unit="attempts"),
    ] = 2


class Storage(Table, frozen=True):
    """How much may stay on disk."""

    objects_mb: Annotated[
        Megabytes,
        says(
            "All objects. Above it unnamed ones leave, the least recently used first; with none left, new ones get 503."
        ),
    ] = 20_000
    output_days: Annotated[
        int,
        Meta(ge=0),
        says("Files that this server wrote under output_root leave after this time. 0: never.", unit="days"),
    ] = 30


class Ism(Table, frozen=True):
    """The instance-segmentation (ISM) server that POST /api/v1/full_pipeline asks for masks."""

    url: Annotated[
        str | None,
        says(
            "Address of the instance-segmentation server.",
            unset="none, and full_pipeline is 503",
            example="http://127.0.0.1:8002",
        ),
    ] = None
    timeout_s: Annotated[Seconds, says("How long its answer may take.")] = 60.0
    connect_timeout_s: Annotated[Seconds, says("How long the connection to it may take.")] = 3.0


class Log(Table, frozen=True):
    """The log: people read the console, machines the file."""

    level: Annotated[Literal["debug", "info", "warning", "error"], says("The least serious lines to write.")] = "info"
    format: Annotated[
        Literal["auto", "console", "json"],
        says("Form of the log on standard error. auto: console on a terminal, else json."),
    ] = "auto"
    file: Annotated[bool, says("Write JSON lines to <data_dir>/logs/pem.log, too.")] = True
    file_mb: Annotated[Megabytes, says("The file is rotated at this size.")] = 100
    files: Annotated[Count, says("Files kept, the current one included.", unit="files")] = 10


class Metrics(Table, frozen=True):
    """GET /metrics."""

    open: Annotated[bool, says("Answer without an API key. false: ask for one, where there are keys.")] = True
    objects: Annotated[
        tuple[str, ...],
        says("Registered names that may be the label `object`; everything else is `other`."),
    ] = ()


class Settings(EngineTables, frozen=True):
    """Everything `pem serve` can be told; the tables of engines, such as `[sam6d]`, are beside the engines."""

    host: Annotated[
        str,
        says('Address to listen on. "0.0.0.0" serves other machines: make keys first, with `pem keys add`.'),
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535), says("Port to listen on. 0: a free one, printed at start.")] = 8003
    data_dir: Annotated[
        str, says("Where objects, outputs, logs and keys live: everything that must survive a restart.")
    ] = "data"
    cad_root: Annotated[
        str | None,
        says("The directory that every cad_path must lie inside.", unset="<data_dir>/cad", example="/srv/cad"),
    ] = None
    output_root: Annotated[
        str | None,
        says(
            "The directory that every output_dir must lie inside.",
            unset="<data_dir>/outputs",
            example="/srv/outputs",
        ),
    ] = None
    keys_file: Annotated[
        str | None,
        says("The file of hashed API keys.", unset="<data_dir>/keys.json", example="/etc/pem-keys.json"),
    ] = None
    checkpoints_dir: Annotated[str, says("The directory of the weights that `pem weights import` keeps.")] = (
        "checkpoints"
    )
    engine: Annotated[
        EngineChoice,
        says(
            f"The engine that answers unless a request asks for another. auto: the first of "
            f"{', '.join(one.name for one in registry.ENGINES)} that has its weights, or needs none."
        ),
    ] = registry.AUTO
    device: Annotated[
        str,
        says(
            'Where poses are computed: auto, cpu, cuda, or some GPUs as "cuda:0,1". auto: every usable GPU, else cpu.'
        ),
    ] = "auto"
    drain_s: Annotated[Seconds, says("After SIGTERM requests in flight may finish for this long.")] = 30.0
    spool_dir: Annotated[
        str,
        says("Large requests pass through here to the workers. Without room they take a socket: slower, never wrong."),
    ] = "/dev/shm"
    cors_origins: Annotated[tuple[str, ...], says('Origins whose web pages may ask this server. ["*"]: all.')] = ()
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
        """Return the directory of everything that must survive a restart; absolute."""
        return Path(self.data_dir).expanduser().resolve()

    @property
    def cad_path(self) -> Path:
        """Return the CAD root; absolute, symlinks resolved."""
        return Path(self.cad_root).expanduser().resolve() if self.cad_root else self.data_path / "cad"

    @property
    def output_path(self) -> Path:
        """Return the output root; absolute, symlinks resolved."""
        return Path(self.output_root).expanduser().resolve() if self.output_root else self.data_path / "outputs"

    @property
    def keys_path(self) -> Path:
        """Return the file of hashed API keys; absolute."""
        return Path(self.keys_file).expanduser().resolve() if self.keys_file else self.data_path / "keys.json"

    @property
    def objects_path(self) -> Path:
        """Return the directory of the CAD store; absolute."""
        return self.data_path / "objects"

    @property
    def checkpoints_path(self) -> Path:
        """Return the directory of weights; absolute."""
        return Path(self.checkpoints_dir).expanduser().resolve()

    def weights_path(self, engine: str) -> Path | None:
        """Return the file of an engine's weights; absolute. None if the engine has none."""
        own = self.own(engine)
        if not isinstance(own, WeightsTable):
            return None
        return (self.checkpoints_path / Path(own.weights).expanduser()).resolve()

    def resolved(self, engine: str) -> Table | None:
        """Return the table that an engine is loaded with, its weights as an absolute path; None if it has no table."""
        own, path = self.own(engine), self.weights_path(engine)
        return own if own is None or path is None else msgspec.structs.replace(own, weights=str(path))

    def stages(self, *, run_dir: Path, devices: tuple[str, ...], engines: tuple[EngineName, ...]) -> Stages:
        """Return the workers' settings: devices, engines and weights resolved, and numbers that fit this machine."""
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
    """A settings file, variable or option cannot be used; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting: its path, its annotated type and its default."""

    path: tuple[str, ...]  # ("port",), or ("pose", "threads")
    type: Any  # Annotated, with its notes
    default: Any

    @property
    def kind(self) -> Any:
        """Return the type without its notes."""
        return get_args(self.type)[0] if get_origin(self.type) is Annotated else self.type

    @property
    def choices(self) -> tuple[str, ...]:
        """Return the values that the setting may have; empty if its type does not list them."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def notes(self) -> tuple[Meta, ...]:
        """Return the notes on the type: words, unit, range."""
        return get_args(self.type)[1:] if get_origin(self.type) is Annotated else ()

    @property
    def variable(self) -> str:
        """Return the name of the setting's environment variable."""
        return "_".join(("pem", *self.path)).upper()

    @property
    def words(self) -> str:
        """Return what the setting is for, in words."""
        return next((note.description for note in self.notes if note.description), "")

    def note(self, name: str) -> Any:
        """Return `unit`, `unset` or `example` as given to `says`, or a bound as given to `Meta`; None if not given."""
        found = (getattr(note, name, None) if name in _BOUNDS else (note.extra or {}).get(name) for note in self.notes)
        return next((one for one in found if one is not None), None)


_BOUNDS = ("ge", "gt", "le", "lt")


@functools.cache
def every() -> dict[str, Setting]:
    """Return all settings by environment variable, in the order of the structs."""
    found = [
        Setting(path=path, type=field.type, default=field.default)
        for table in msgspec.structs.fields(Settings)
        for path, field in _leaves(table)
    ]
    return {setting.variable: setting for setting in found}


def _leaves(field: msgspec.structs.FieldInfo) -> list[tuple[tuple[str, ...], msgspec.structs.FieldInfo]]:
    """Return the path and the field of a setting, or those of all settings in a table."""
    if not isinstance(field.default, Table):
        return [((field.name,), field)]
    return [((field.name, inner.name), inner) for inner in msgspec.structs.fields(type(field.default))]


def named(name: str) -> Setting:
    """Return the setting that a command line option sets: `host`, or `log_format` for `format` in `[log]`."""
    return every()[f"PEM_{name}".upper()]


def load(
    path: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Read settings from a TOML file, then `environment` (default: this process's), then `overrides`; the later wins.

    `overrides` has names as `named` takes them; None values are skipped. SettingsError names the path of a wrong value.
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
            _put(tree, named(name).path, str(value) if isinstance(value, Path) else value)
    return _convert(tree, "")


def _convert(tree: Mapping[str, Any], where: str) -> Settings:
    try:
        return msgspec.convert(tree, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{where}{error}") from None


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that begin with `PEM_` and are no settings, so that the start can warn of typos."""
    known = every().keys() | _OTHER_VARIABLES
    return sorted(name for name in environment if name.startswith("PEM_") and name not in known)


#: Variables with the prefix `PEM_` that are not settings of the server.
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
    for variable, text in environment.items():
        # Others are no error: container platforms set PEM_SERVICE_HOST and the like. unknown_variables() lists them.
        if setting := every().get(variable):
            _put(tree, setting.path, _parse(text, setting))


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *tables, leaf = path
    for table in tables:
        tree = tree.setdefault(table, {})
    tree[leaf] = value


def _parse(text: str, setting: Setting) -> Any:
    value: Any = text
    if setting.kind == tuple[str, ...]:
        value = [item.strip() for item in text.split(",") if item.strip()]
    try:
        return msgspec.to_builtins(msgspec.convert(value, setting.type, strict=False))
    except msgspec.ValidationError as error:
        raise SettingsError(f"{setting.variable}: {error}") from None
