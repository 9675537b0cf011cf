"""`pem keys add | list | revoke`: who may use a server. Edits its file of keys, and so runs on its machine."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pem.commands import common
from serve import settings
from serve.commands.options import Config, DataDir, of_setting
from serve.gateway import keys

app = typer.Typer(
    help="API keys of the server on this machine. With no keys, the service is open to all who reach it.",
    no_args_is_help=True,
)
KeysFile = Annotated[Path | None, of_setting("keys_file")]
Name = Annotated[str, typer.Argument(help="What to call the key: who or what uses it.")]


@app.command()
def add(
    name: Name,
    rate: Annotated[float | None, typer.Option(help="At most so many requests per second.")] = None,
    data_dir: DataDir = None,
    keys_file: KeysFile = None,
    config: Config = None,
    json: common.Json = None,
) -> None:
    """Make a key and print it: the only time that it is shown. A running server accepts it at once.

    Example:

      pem keys add robot-1 --rate 20
    """
    path = _path(data_dir, keys_file, config)
    key = keys.add(path, name, rate)
    common.write_json(json, {"name": name, "key": key})
    if json != "-":
        typer.echo(key)
        common.note(
            "Keep it: it is not stored and cannot be shown again. Clients send it as `Authorization: Bearer KEY`."
        )


@app.command("list")
def list_(
    data_dir: DataDir = None,
    keys_file: KeysFile = None,
    config: Config = None,
    json: common.Json = None,
) -> None:
    """List the keys by name; the keys themselves are not stored."""
    records = keys.list_keys(_path(data_dir, keys_file, config))
    public = [{"name": r.name, "created": r.created, "rate": r.rate} for r in records]
    common.write_json(json, {"keys": public})
    if json == "-":
        return
    if not records:
        common.note("no keys: the service is open to all who reach it. Make one with: pem keys add NAME")
        return
    rows = Table(header_style="bold")
    for column in ("name", "created", "requests per second"):
        rows.add_column(column)
    for record in records:
        made = datetime.fromtimestamp(record.created).isoformat(" ", "minutes")
        rows.add_row(escape(record.name), made, "no limit" if record.rate is None else f"{record.rate:g}")
    common.stdout().print(rows)


@app.command()
def revoke(
    name: Name,
    data_dir: DataDir = None,
    keys_file: KeysFile = None,
    config: Config = None,
    json: common.Json = None,
) -> None:
    """Forget a key; a running server refuses it from the next request on."""
    path = _path(data_dir, keys_file, config)
    keys.revoke(path, name)
    common.write_json(json, {"revoked": name})
    if json != "-":
        common.note(f"revoked {name}")
    if not keys.list_keys(path):
        common.warn("that was the last key: the service is open to all who reach it now")


def _path(data_dir: Path | None, keys_file: Path | None, config: Path | None) -> Path:
    given = {"data_dir": data_dir, "keys_file": keys_file}
    return settings.load(config, overrides=given).keys_path
