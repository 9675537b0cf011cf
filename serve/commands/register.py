"""The server's half of `pem`, which the client's command line finds if pem-server is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pem.commands import common
from serve import settings
from serve.commands import keys as keys_commands
from serve.commands import manual
from serve.commands import templates as templates_command
from serve.commands import weights as weights_commands
from serve.commands.options import Config, DataDir, of_setting
from serve.gateway.keys import KeyFileError

if TYPE_CHECKING:
    from serve.commands.bench_scenes import Lent

#: Errors that `pem` reports on standard error, with exit code 2.
WRONG_USE = (settings.SettingsError, KeyFileError)


def add(app: typer.Typer, objects: typer.Typer) -> None:
    """Add the commands to `pem`, and to `pem objects`."""
    app.command()(serve)
    app.command()(demo)
    app.add_typer(keys_commands.app, name="keys")
    app.add_typer(weights_commands.app, name="weights")
    objects.command()(templates_command.templates)


def load_generator() -> Lent:
    """Return what `pem bench` borrows: rendered scenes, the settings' variables, the stages of processes."""
    from serve.commands.bench_scenes import Lent

    return Lent()


def serve(
    host: Annotated[str | None, of_setting("host")] = None,
    port: Annotated[int | None, of_setting("port")] = None,
    data_dir: DataDir = None,
    cad_root: Annotated[Path | None, of_setting("cad_root")] = None,
    output_root: Annotated[Path | None, of_setting("output_root")] = None,
    engine: Annotated[str | None, of_setting("engine")] = None,
    device: Annotated[str | None, of_setting("device")] = None,
    log_format: Annotated[str | None, of_setting("log_format")] = None,
    ism_url: Annotated[str | None, of_setting("ism_url")] = None,
    config: Config = None,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print every setting as TOML, with its words and its value, and leave."),
    ] = False,
) -> None:
    """Start the server and run until SIGTERM or Ctrl-C; requests in flight may finish.

    Every setting is also an environment variable (PEM_PORT, PEM_DATA_DIR, PEM_POSE_THREADS, ...) and a key of the
    settings file; the command line wins over the environment, and that over the file.

    Examples:

      pem serve

      pem serve --host 0.0.0.0 --data-dir /var/lib/pem --device cuda

      pem serve --config configs/cpu.toml --engine geometric

      pem serve --print-config > pem.toml
    """
    given = {
        "host": host,
        "port": port,
        "data_dir": data_dir,
        "cad_root": cad_root,
        "output_root": output_root,
        "engine": engine,
        "device": device,
        "log_format": log_format,
        "ism_url": ism_url,
    }
    loaded = settings.load(config, overrides=given)
    if print_config:
        typer.echo(manual.of(loaded, options=given), nl=False)
        return
    from serve.engine_choice import CannotStart
    from serve.server import serve as run

    try:
        code = run(loaded)
    except CannotStart as error:
        common.fail(str(error))
    raise typer.Exit(code)


def demo(
    out: Annotated[Path, typer.Option(help="Where the overlay and the demo's data go.")] = Path("demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the demo's data (objects, logs) afterwards.")] = False,
    json: common.Json = None,
) -> None:
    """From nothing to a pose: start a server, send it a scene whose poses are known, compare, draw, stop the server.

    Exits 0 only where the poses are right: the main object within 2 mm and 2 degrees.
    """
    from serve.commands.demo import run

    common.check_folder(out)
    raise typer.Exit(run(out, keep=keep, json=json))
