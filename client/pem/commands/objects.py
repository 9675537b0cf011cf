"""`pem objects add | list | show | remove`: the CAD models of a server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pem.client import Client, NotFound
from pem.commands import common
from pem.contract import CadFormat, ObjectAnswer, ObjectModelAnswer, Unit
from pem.options import ALREADY_KNOWN, ObjectOptions

app = typer.Typer(help="The CAD models that a server knows.", no_args_is_help=True)
Which = Annotated[
    str, typer.Argument(metavar="OBJECT", help="A name or the id of the object, or the beginning of the id.")
]
_SHORT = 12  # digits of an id as tables show it
_BEGINNING = re.compile(r"[0-9a-f]{4,63}", re.IGNORECASE)  # of an id; fewer digits are probably a typo


@app.command()
def add(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="PLY, OBJ, STL, GLB, OFF, or zip of OBJ.")],
    name: Annotated[str | None, typer.Option(help="A name to ask for it by; works wherever the id does.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the name from the object that has it, once this one is ready.")
    ] = False,
    model_unit: Annotated[Unit | None, typer.Option(help="Unit of the file.", show_default=common.MODEL_UNIT)] = None,
    cad_format: Annotated[
        CadFormat | None, typer.Option(help="What the file is.", show_default="its name's ending")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until the object is ready.")] = True,
    json: common.Json = None,
    url: common.Url = common.URL_DEFAULT,
    api_key: common.ApiKey = None,
) -> None:
    """Register a CAD model and wait until it is ready. What the server already has costs nothing.

    Examples:

      pem objects add mug.ply --name mug

      pem objects add mug-2.ply --name mug --replace
    """
    told: set[str] = set()
    with common.connect(url, api_key) as client, common.phases(file.name) as show:

        def progress(phase: str, fraction: float) -> None:
            told.add(phase)
            show(phase, fraction)

        options = ObjectOptions(name=name, replace=replace, model_unit=model_unit, cad_format=cad_format, wait=wait)
        added = client.objects.add(file, options, on_progress=progress)
    if ALREADY_KNOWN in told and json != "-":
        common.note(f"{file.name} was already known to the server")
    _show(added, json)
    if wait and added.pending_names:
        names = ", ".join(added.pending_names)
        common.fail(f"the object is ready, but {names} could not be moved to it; the server's log says why", 1)


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
    for column in ("names", "id", "status", "unit", "diameter (mm)", "faces", "warnings"):
        rows.add_column(column, justify="right" if column in ("diameter (mm)", "faces") else "left")
    for item in objects:
        rows.add_row(
            escape(_names(item)),
            item.object_id[:_SHORT],
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
        _show(_find(client, which), json)


@app.command()
def remove(
    which: Which, json: common.Json = None, url: common.Url = common.URL_DEFAULT, api_key: common.ApiKey = None
) -> None:
    """Take a name away, and the object with its last one; by its id, remove the object with all of its names."""
    with common.connect(url, api_key) as client:
        item = _find(client, which)
        removed = which if which in item.names else item.object_id
        client.objects.remove(removed)
    common.write_json(json, {"removed": removed})
    if json != "-":
        left = [name for name in item.names if which in item.names and name != which]
        common.note(f"removed the name {which}; the object is still {', '.join(left)}" if left else f"removed {which}")


def _find(client: Client, which: str) -> ObjectAnswer:
    """Return the object of a name, an id or the beginning of an id. Raises NotFound if there is none."""
    try:
        return client.objects.get(which)
    except NotFound:
        if not _BEGINNING.fullmatch(which):
            raise
        found = [item for item in client.objects.list() if item.object_id.startswith(which.lower())]
        if not found:
            raise
    if len(found) > 1:
        candidates = ", ".join(f"{item.object_id[:_SHORT]} ({_names(item)})" for item in found)
        common.fail(f"{len(found)} ids begin with {which}: {candidates}; write more digits, or a name", 2)
    return found[0]


def _names(item: ObjectAnswer) -> str:
    return ", ".join(item.names or [item.name or "-"])


def _show(item: ObjectAnswer, json: str | None) -> None:
    common.write_json(json, item)
    if json == "-":
        return
    rows = Table(show_header=False)
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    health, symmetries = item.health, item.symmetries
    rows.add_row("id", item.object_id)
    rows.add_row("names" if len(item.names) > 1 else "name", escape(_names(item)))
    if item.pending_names:
        rows.add_row("takes once ready", escape(", ".join(item.pending_names)))
    rows.add_row("status", _status(item))
    rows.add_row("unit of the file", item.model_unit)
    rows.add_row("diameter", f"{health.diameter_mm:.1f} mm")
    rows.add_row("extents", " x ".join(f"{side:.1f}" for side in health.extents_mm) + " mm")
    rows.add_row("faces", f"{health.faces:,}{'' if health.watertight else ', not watertight'}")
    if symmetries is not None:
        discrete, continuous = len(symmetries.symmetries_discrete), len(symmetries.symmetries_continuous)
        rows.add_row("symmetries", f"{discrete} discrete, {continuous} continuous")
    for engine, model in item.engines.items():
        rows.add_row(escape(f"engine {engine}"), escape(model_words(model)))
    for text in health.warnings:
        rows.add_row("[yellow]warning[/]", escape(text))
    if item.error:
        rows.add_row("[red]error[/]", escape(item.error))
    common.stdout().print(rows)


def model_words(model: ObjectModelAnswer) -> str:
    """Describe an engine's model of an object: its state, and its time and size if it is ready."""
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
