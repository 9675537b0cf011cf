"""`pem`: the command line. Commands that ask a server are here; those that run one come with pem-server."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any, Final, NoReturn

import typer
from rich.markup import escape
from rich.table import Table

from pem import __version__, client
from pem.bench import here
from pem.commands import bench as bench_command
from pem.commands import common
from pem.commands import estimate as estimate_command
from pem.commands import objects as objects_commands

#: Help of pem-server's commands, shown if it is not installed.
_SERVER_COMMANDS: Final = {
    "serve": "Start the server (with pem-server).",
    "demo": "From nothing to a pose on this machine (with pem-server).",
    "keys": "API keys of the server on this machine (with pem-server).",
    "weights": "Weights of the server on this machine (with pem-server).",
}

_ANYTHING: Final[dict[str, Any]] = {"ignore_unknown_options": True, "help_option_names": []}

#: error code -> what to do on the command line, if the server's words do not say it
_HINTS: Final[dict[str, str]] = {
    "unknown_object": "`pem objects list` shows the names; `pem objects add FILE --name NAME` registers one",
    "key_missing": "give the key with --api-key or the variable PEM_API_KEY",
    "key_wrong": "give the key with --api-key or the variable PEM_API_KEY",
    "not_ready": "`pem status --wait 120` waits for it",
}

app = typer.Typer(
    name="pem",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `pem`. Exits with 0, with 1 if something failed or was refused, with 2 if the usage was wrong."""
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
        hint = "\nName another with --url."
        if here.commands() is not None:
            hint = f"\nStart one with `{common.program()} serve`, or name another with --url."
        _leave(f"{error}{'' if isinstance(error, client.TimedOut) else hint}", 1)
    except client.PemError as error:
        _leave(str(error), 1)
    except _wrong_use as error:
        _leave(str(error), 2)


def _hint(error: client.RequestRefused) -> str | None:
    if (error.code, error.field) == ("invalid", "name") and "belongs to object" in error.detail:
        return "`pem objects remove NAME` frees it, `pem objects add --replace` moves it"
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
    """Take the options that come before any command."""


_wrong_use: tuple[type[Exception], ...] = (ValueError,)


def _add_server_half() -> None:
    """Add the commands of pem-server; if it is missing, add commands that say what to install."""
    global _wrong_use
    half = here.commands()
    if half is not None:
        half.add(app, objects_commands.app)
        _wrong_use += half.WRONG_USE
        return
    for name, words in _SERVER_COMMANDS.items():
        app.command(name, help=words, context_settings=_ANYTHING)(_needs_server)
    objects_commands.app.command(
        "templates", help="Templates of another renderer (with pem-server).", context_settings=_ANYTHING
    )(_needs_server)


def _needs_server(words: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
    common.need_server()


_add_server_half()
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
            with common.step(f"waiting for {url}") as tell:
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
