"""What the subcommands share: connection options, output for people and for machines, progress bars."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pem.client import DEFAULT_URL, Client
from pem.options import ALREADY_KNOWN

Url = Annotated[str, typer.Option("--url", envvar="PEM_URL", help="Where the server is.")]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="PEM_API_KEY", help="The API key, where the server wants one.")
]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for standard output, without the table."),
]
URL_DEFAULT = DEFAULT_URL
MODEL_UNIT = "m for GLB, else mm"  # the default unit of a CAD file's numbers
INSTALL_SERVER = "run `pip install ./client .` in the folder of PEM Server"
WIDE = 150  # columns of a table that goes into a file or a pipe


def program() -> str:
    """Return how to call this `pem` from the current folder: its name if PATH finds it, else its path."""
    here = Path.cwd()
    python = Path(sys.executable)
    if python.is_relative_to(here):
        python = python.relative_to(here)
    script = python.with_name("pem")
    if not script.exists():
        return f"{python} -m pem"
    found = shutil.which("pem")
    return "pem" if found is not None and os.path.samefile(found, script) else str(script)


def stdout() -> Console:
    """Return the console for results."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


def stderr() -> Console:
    """Return the console for everything else: progress, warnings, errors."""
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Print a line beside the results, on standard error."""
    stderr().print(escape(text))


def warn(text: str) -> None:
    """Print a warning on standard error."""
    stderr().print(f"[yellow]warning:[/] {escape(text)}")


def fail(text: str, code: int = 1) -> NoReturn:
    """Print an error and exit: with 1 if something failed or was refused, with 2 if the usage was wrong."""
    stderr().print(f"[bold red]error:[/] {escape(text)}")
    raise typer.Exit(code)


def need_server(what: str = "this") -> NoReturn:
    """Exit with the advice to install pem-server."""
    fail(f"{what} needs pem-server, which is not installed here: {INSTALL_SERVER}")


def connect(url: str, api_key: str | None) -> Client:
    """Return a client for one command."""
    return Client(url, api_key, timeout_s=120.0)


def write_json(target: str | None, value: Any) -> None:
    """Write a value as indented JSON to the target of `--json`; do nothing without one."""
    if target is None:
        return
    data = msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
    if target == "-":
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    else:
        write_file(Path(target), data)


def check_folder(*paths: Path | str | None) -> None:
    """Exit if a result's folder is missing and not below the current folder: only those below are made."""
    here = Path.cwd()
    for path in paths:
        if path is None or path == "-":
            continue
        folder = Path(os.path.abspath(path)).parent
        if not folder.is_dir() and not folder.is_relative_to(here):
            fail(f"cannot write {path}: there is no folder {folder}; make it first", 2)


def write_file(path: Path, data: bytes) -> None:
    """Write a result; make its folder if that is below the current one."""
    check_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")


def read_file(path: Path) -> bytes:
    """Read a file that the user named; exit with an error if that fails."""
    try:
        return path.read_bytes()
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}", 2)


@contextmanager
def phases(what: str) -> Iterator[Callable[[str, float], None]]:
    """Show a progress bar per phase ("upload", "onboarding") during the block."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr(), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def show(phase: str, fraction: float) -> None:
            if phase == ALREADY_KNOWN:
                return
            if phase not in tasks:
                tasks[phase] = progress.add_task(f"{phase} of {escape(what)}", total=1.0)
            progress.update(tasks[phase], completed=fraction)

        yield show


@contextmanager
def spinner(text: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner during the block, with words that the block may change."""
    with stderr().status(escape(text)) as status:
        yield lambda words: status.update(escape(f"{text} ({words})" if words else text))


@contextmanager
def step(text: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done: a spinner on a terminal; elsewhere a line for each new text, to be read in a log."""
    if stderr().is_terminal:
        with spinner(text) as tell:
            yield tell
        return
    said = ""

    def tell_once(words: str) -> None:
        nonlocal said
        if words != said:
            note(f"{text} ({words})" if words else text)
        said = words

    note(text)
    yield tell_once
