"""`pem`: the command line. Everything but `pem serve`, `pem demo` and the scenes of `pem bench` needs only the base
install."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer
from rich.markup import escape
from rich.table import Table

from serve import __version__, client, keys, settings
from serve.commands import bench as bench_command
from serve.commands import common
from serve.commands import estimate as estimate_command
from serve.commands import keys as keys_commands
from serve.commands import objects as objects_commands
from serve.commands import weights as weights_commands

#: error code -> what to do about it on the command line; the server's own words are about the request
_HINTS: Final[dict[str, str]] = {
    "units": "on the command line: --depth-scale, --depth-unit m, --model-unit m",
    "unknown_object": "`pem objects list` shows the names; `pem objects add FILE --name NAME` registers one",
    "key_missing": "give the key with --api-key or the variable PEM_API_KEY",
    "key_wrong": "give the key with --api-key or the variable PEM_API_KEY",
}

app = typer.Typer(
    name="pem",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `pem`. Exits 0, 1 where something failed or was refused, 2 where it was used wrongly."""
    try:
        app(args=arguments, prog_name="pem")
    except client.RequestRefused as error:
        words = f"the server refused: {error}"
        if hint := _hint(error):
            words += f"\n{hint}"
        if error.request_id:
            words += f"\n(request id {error.request_id}, for the server's log)"
        _leave(words, 1)
    except client.ConnectionFailed as error:
        hint = f"\nStart one with `{common.program()} serve`, or name another with --url."
        _leave(f"{error}{'' if isinstance(error, client.TimedOut) else hint}", 1)
    except client.PemError as error:
        _leave(str(error), 1)
    except (settings.SettingsError, keys.KeyFileError, ValueError) as error:
        _leave(str(error), 2)


def _hint(error: client.RequestRefused) -> str | None:
    if (error.code, error.field) == ("invalid", "name") and "belongs to object" in error.detail:
        return "`pem objects remove NAME` frees it"
    return _HINTS.get(error.code)


def _leave(words: str, code: int) -> NoReturn:
    common.stderr().print(f"[bold red]error:[/] {escape(words)}")
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pem {__version__}")
        raise typer.Exit


@app.callback(
    help=f"PEM Server: an RGB-D frame, masks and a CAD model in, 6D poses out. Try `{common.program()} demo` first."
)
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """What comes before any command."""


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.", show_default="8003")] = None,
    data_dir: common.DataDir = None,
    cad_root: Annotated[
        Path | None, typer.Option(help="cad_path must lie inside.", show_default="<data dir>/cad")
    ] = None,
    output_root: Annotated[
        Path | None, typer.Option(help="output_dir must lie inside.", show_default="<data dir>/outputs")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="geometric, sam6d or auto.", show_default="auto")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:0,1.", show_default="auto")] = None,
    config: common.Config = None,
    log_format: Annotated[str | None, typer.Option(help="auto, console or json.", show_default="auto")] = None,
    ism_url: Annotated[str | None, typer.Option(help="Instance-segmentation server for full_pipeline.")] = None,
) -> None:
    """Start the server and run until SIGTERM or Ctrl-C; requests in flight may finish.

    Every setting is also an environment variable (PEM_PORT, PEM_DATA_DIR, PEM_POSE_THREADS, ...) and a key of the
    settings file; the command line wins over the environment, and that over the file.

    Examples:

      pem serve

      pem serve --host 0.0.0.0 --data-dir /var/lib/pem --device cuda

      pem serve --config configs/cpu.toml --engine geometric
    """
    in_tables = {"PEM_LOG_FORMAT": log_format, "PEM_ISM_URL": ism_url}
    given = {
        "host": host,
        "port": port,
        "data_dir": data_dir,
        "cad_root": cad_root,
        "output_root": output_root,
        "engine": engine,
        "device": device,
    }
    loaded = settings.load(
        config,
        environment=os.environ | {name: value for name, value in in_tables.items() if value is not None},
        overrides={name: str(value) if isinstance(value, Path) else value for name, value in given.items()},
    )
    try:
        from serve.engines import CannotStart
        from serve.server import serve as run
    except ImportError as error:
        common.need_server_extra(error)
    try:
        code = run(loaded)
    except CannotStart as error:
        common.fail(str(error))
    raise typer.Exit(code)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the overlay and the demo's data go.")] = Path("demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the demo's data (objects, logs) afterwards.")] = False,
    json: common.Json = None,
) -> None:
    """From nothing to a pose: start a server, send it a scene whose poses are known, compare, draw, stop the server.

    Exits 0 only where the poses are right: the main object within 2 mm and 2 degrees.
    """
    try:
        from serve.demo import run
    except ImportError as error:
        common.need_server_extra(error)
    common.check_folder(out)
    raise typer.Exit(run(out, keep=keep, json=json))


app.command()(estimate_command.estimate)
app.command()(bench_command.bench)


@app.command()
def status(
    wait: Annotated[float | None, typer.Option(help="Wait up to so many seconds for the server to be ready.")] = None,
    json: common.Json = None,
    url: common.Url = common.URL_DEFAULT,
    api_key: common.ApiKey = None,
) -> None:
    """Say how a server is doing."""
    with common.connect(url, api_key) as pem:
        if wait is not None:
            with common.spinner(f"waiting for {url}") as tell:
                pem.wait_ready(wait, on_wait=tell)
        state = pem.status()
    common.write_json(json, state)
    if json == "-":
        return
    rows = Table(show_header=False)
    rows.add_column(style="bold")
    rows.add_column()
    rows.add_row("server", f"{state.server}, version {state.version}, up {_duration(state.uptime)}")
    rows.add_row("model", "loaded" if state.model_loaded else "[yellow]not loaded yet[/]")
    rows.add_row("engine", escape(f"{state.engine} on {state.device}, release {state.release}"))
    if others := [release for name, release in state.engines.items() if name != state.engine]:
        rows.add_row("on request", escape(", ".join(others)))
    if state.degraded:
        rows.add_row("[yellow]degraded[/]", escape(f"in place of the network: {state.degraded_reason}"))
    for name, track in state.tracks.items():
        workers = ", ".join(f"{count} {stage}" for stage, count in track.workers.items())
        rows.add_row(f"track {escape(name)}", escape(f"{track.state}; workers: {workers}; {track.restarts} restarts"))
    rows.add_row("objects", str(state.objects))
    rows.add_row("queue", f"{state.queue.requests} requests, {state.queue.detections} detections")
    rows.add_row("speed", f"{state.detections_per_second:.2f} detections per second")
    rows.add_row("kernels", escape(", ".join(f"{op}: {kernel}" for op, kernel in state.kernels.items()) or "-"))
    common.stdout().print(rows)


app.add_typer(objects_commands.app, name="objects")
app.add_typer(keys_commands.app, name="keys")
app.add_typer(weights_commands.app, name="weights")


@app.command()
def openapi(url: common.Url = common.URL_DEFAULT, api_key: common.ApiKey = None) -> None:
    """Print a server's OpenAPI document."""
    with common.connect(url, api_key) as pem:
        common.write_json("-", pem.openapi())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    main()
