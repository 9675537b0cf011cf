"""`pem objects add | list | show | remove | templates`: the CAD models of a server."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from posekit.errors import PoseError
from serve import settings
from serve.client import ObjectOptions
from serve.client_wire import ALREADY_KNOWN
from serve.commands import common
from serve.schemas import ObjectAnswer, ObjectModelAnswer, Unit

if TYPE_CHECKING:  # at run time they come with what the base install leaves out
    from posekit.store import ObjectStore, StoredObject

app = typer.Typer(help="The CAD models that a server knows.", no_args_is_help=True)
Which = Annotated[str, typer.Argument(metavar="OBJECT", help="Name or id of the object.")]


@app.command()
def add(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="PLY, OBJ, STL, GLB, OFF, or zip of OBJ.")],
    name: Annotated[str | None, typer.Option(help="A name to ask for it by; works wherever the id does.")] = None,
    model_unit: Annotated[Unit | None, typer.Option(help="Unit of the file.", show_default="mm")] = None,
    wait: Annotated[bool, typer.Option(help="Wait until the object is ready.")] = True,
    json: common.Json = None,
    url: common.Url = common.URL_DEFAULT,
    api_key: common.ApiKey = None,
) -> None:
    """Register a CAD model and wait until it is ready. What the server already has costs nothing.

    Example:

      pem objects add mug.ply --name mug
    """
    options: ObjectOptions = {"wait": wait}
    if name is not None:
        options["name"] = name
    if model_unit is not None:
        options["model_unit"] = model_unit
    told: set[str] = set()
    with common.connect(url, api_key) as client, common.phases(file.name) as show:

        def progress(phase: str, fraction: float) -> None:
            told.add(phase)
            show(phase, fraction)

        options["on_progress"] = progress
        added = client.objects.add(file, **options)
    if ALREADY_KNOWN in told and json != "-":
        common.note(f"{file.name} was already known to the server")
    _show(added, json)


@app.command("list")
def list_(json: common.Json = None, url: common.Url = common.URL_DEFAULT, api_key: common.ApiKey = None) -> None:
    """List the registered objects."""
    with common.connect(url, api_key) as client:
        objects = client.objects.list()
    common.write_json(json, {"objects": objects})
    if json == "-":
        return
    if not objects:
        common.note("no objects yet: pem objects add FILE --name NAME")
        return
    rows = Table(header_style="bold")
    for column in ("name", "id", "status", "unit", "diameter (mm)", "faces", "warnings"):
        rows.add_column(column, justify="right" if column in ("diameter (mm)", "faces") else "left")
    for item in objects:
        rows.add_row(
            escape(item.name or "-"),
            item.object_id[:12],
            _status(item),
            item.model_unit,
            f"{item.health.diameter_mm:.1f}",
            f"{item.health.faces:,}",
            _count(len(item.health.warnings), "warning"),
        )
    common.stdout().print(rows)


@app.command()
def show(
    which: Which, json: common.Json = None, url: common.Url = common.URL_DEFAULT, api_key: common.ApiKey = None
) -> None:
    """Show one object: health, symmetries, state, and what each engine's model of it took in time and takes on disk."""
    with common.connect(url, api_key) as client:
        _show(client.objects.get(which), json)


@app.command()
def remove(
    which: Which, json: common.Json = None, url: common.Url = common.URL_DEFAULT, api_key: common.ApiKey = None
) -> None:
    """Forget an object."""
    with common.connect(url, api_key) as client:
        client.objects.remove(which)
    common.write_json(json, {"removed": which})
    if json != "-":
        common.note(f"removed {which}")


@app.command()
def templates(
    which: Which,
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The folder of templates.")],
    data_dir: common.DataDir = None,
    config: common.Config = None,
    json: common.Json = None,
) -> None:
    """Give an object templates that another renderer made, in place of our own, for the engine sam6d.

    FOLDER holds 42 views as SAM-6D's renderer writes them, i from 0 to 41: rgb_i.png (colours), mask_i.png (255 on the
    object) and xyz_i.npy (where each pixel is in the CAD's frame, height x width x 3, millimetres). It takes about a
    minute. Run it on the server's machine, with its data directory and settings: a running server takes the new model
    at once. What makes it onboard the object anew (other symmetries, other weights) renders its own views again.

    Example:

      pem objects templates mug outputs/mug/templates --data-dir data
    """
    given = settings.load(config, overrides={"data_dir": str(data_dir) if data_dir else None})
    try:
        from posekit.sam6d import templates as read
        from posekit.sam6d.engine import Sam6dEngine
        from posekit.store import ObjectStore
        from workers.onboard import known_symmetries
    except ImportError as error:
        common.need_server_extra(error)
    if not given.objects_path.is_dir():
        common.fail(f"there are no objects in {given.data_path}: name the server's data directory with --data-dir", 2)
    threads = len(os.sched_getaffinity(0))
    try:
        store = ObjectStore(given.objects_path)
        stored = _stored(store, which)
        mesh = store.load_mesh(stored.object_id)
        views = read.read_folder(folder, given.sam6d.views, mesh)
        with common.phases(which) as show:
            begun = time.monotonic()
            show("onboarding", 0.0)
            engine = Sam6dEngine(
                weights_file=given.weights_path, threads=threads, exact=given.sam6d.exact, views=given.sam6d.views
            )
            symmetries = known_symmetries(store, stored, engine.name)
            model = engine.onboard_views(
                stored.object_id, mesh, views, symmetries, lambda share: show("onboarding", share)
            )
            seconds = time.monotonic() - begun
            store.save_model(model, seconds=seconds, threads=threads)
        nbytes = store.describe_model(stored.object_id, engine.name, engine.version).nbytes
    except PoseError as error:
        common.fail(error.detail)
    made = ObjectModelAnswer(status="ready", progress=1.0, seconds=round(seconds, 3), threads=threads, bytes=nbytes)
    common.write_json(json, {"object_id": stored.object_id, "engines": {engine.name: made}})
    if json != "-":
        common.note(f"{which} has these templates now: {_model_words(made)}")


def _stored(store: ObjectStore, which: str) -> StoredObject:
    """The object of this id or name in a data directory."""
    for stored in store.list():
        if which in (stored.object_id, stored.name, *stored.aliases):
            return stored
    common.fail(f"no object is registered as {which}; `pem objects add FILE --name NAME` registers one at the server")


def _show(item: ObjectAnswer, json: str | None) -> None:
    common.write_json(json, item)
    if json == "-":
        return
    rows = Table(show_header=False)
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    health, symmetries = item.health, item.symmetries
    rows.add_row("id", item.object_id)
    rows.add_row("name", escape(item.name or "-"))
    rows.add_row("status", _status(item))
    rows.add_row("unit of the file", item.model_unit)
    rows.add_row("diameter", f"{health.diameter_mm:.1f} mm")
    rows.add_row("extents", " x ".join(f"{side:.1f}" for side in health.extents_mm) + " mm")
    rows.add_row("faces", f"{health.faces:,}{'' if health.watertight else ', not watertight'}")
    if symmetries is not None:
        discrete, continuous = len(symmetries.symmetries_discrete), len(symmetries.symmetries_continuous)
        rows.add_row("symmetries", f"{discrete} discrete, {continuous} continuous")
    for engine, model in item.engines.items():
        rows.add_row(escape(f"engine {engine}"), escape(_model_words(model)))
    for text in health.warnings:
        rows.add_row("[yellow]warning[/]", escape(text))
    if item.error and not item.engines:
        rows.add_row("[red]error[/]", escape(item.error))
    common.stdout().print(rows)


def _model_words(model: ObjectModelAnswer) -> str:
    """What became of an engine's onboarding, in what time and size."""
    if model.status == "failed":
        return f"failed: {model.error}"
    if model.status != "ready":
        return f"{model.status} {model.progress:.0%}" if model.progress else model.status
    words = ["ready"]
    if model.seconds is not None:
        words.append(f"onboarded in {model.seconds:.1f} s on {_count(model.threads or 1, 'thread')}")
    if model.bytes is not None:
        words.append(f"{model.bytes / 1e6:.1f} MB on disk")
    return ", ".join(words)


def _count(number: int, what: str) -> str:
    return "-" if number == 0 else f"{number} {what}{'' if number == 1 else 's'}"


def _status(item: ObjectAnswer) -> str:
    color = {"ready": "green", "failed": "red", "onboarding": "yellow"}[item.status]
    progress = f" {item.progress:.0%}" if item.status == "onboarding" else ""
    return f"[{color}]{item.status}[/]{progress}"
