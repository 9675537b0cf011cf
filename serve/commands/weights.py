"""`pem weights import | verify | list`: the weights of learned engines, on the server's machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pem.commands import common
from posekit.errors import PoseError
from serve import settings
from serve.commands.options import Config, of_setting

if TYPE_CHECKING:  # its import loads torch, which takes seconds
    from posekit.sam6d.checkpoint.weights import Verdict

app = typer.Typer(
    help="Weights of learned engines, kept as safetensors. `pem weights import` brings them in.",
    no_args_is_help=True,
)
CheckpointsDir = Annotated[Path | None, of_setting("checkpoints_dir")]


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(exists=True, help="The checkpoint: .pth or .pt of torch.save, .safetensors.")],
    checkpoints_dir: CheckpointsDir = None,
    source: Annotated[
        str | None, typer.Option(help="Where the file is from, for the record.", show_default="the release of SAM-6D")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Terms of the weights, for the record.", show_default="unknown")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace other weights that are there.")] = False,
    config: Config = None,
    json: common.Json = None,
) -> None:
    """Check a checkpoint of SAM-6D's pose estimation network and keep it as safetensors, for the engine sam6d.

    Nothing in the file is executed: only tensors are read, and every name, shape and number is checked first.

    Examples:

      pem weights import sam-6d-pem-base.pth

      pem weights import tuned.pth --source "tuned here" --licence MIT --force
    """
    folder = _folder(checkpoints_dir, config)
    with _in_words(), common.step(f"importing {file.name}") as tell:
        from posekit.sam6d.checkpoint import manifest, weights

        there = (folder / manifest.FILE_NAME).exists()
        done = weights.import_checkpoint(file, folder, source=source, licence=licence, force=force, tell=tell)
    if there and not done.already:
        common.warn("other weights were replaced: a server that runs with them has to be started again")
    common.write_json(json, done)
    if json == "-":
        return
    for text in done.notes:
        common.note(text)
    common.stdout().print(escape(f"{done.path} {'is there already' if done.already else 'is written'}"))
    rows = Table(show_header=False)
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    rows.add_row("engine", done.entry.engine)
    rows.add_row("size", _size(done.entry.bytes))
    rows.add_row("sha256", done.entry.sha256)
    rows.add_row("source", escape(done.entry.source))
    rows.add_row("licence", escape(done.entry.licence))
    common.stdout().print(rows)


@app.command()
def verify(
    file: Annotated[Path | None, typer.Argument(exists=True, dir_okay=False, help="Only this file.")] = None,
    checkpoints_dir: CheckpointsDir = None,
    config: Config = None,
    json: common.Json = None,
) -> None:
    """Read the weights through: are they the bytes that were imported, the network's tensors, all numbers finite?

    Exits with 1 where anything is wrong, or where there are no weights.

    Example:

      pem weights verify
    """
    folder = _folder(checkpoints_dir, config)
    with _in_words():
        from posekit.sam6d.checkpoint import manifest, weights

        verdicts = []
        for path in [file] if file else manifest.files(folder):
            with common.step(f"reading {path.name}"):
                verdicts.append(weights.verify(path))
    _show(verdicts, folder, json)
    if not verdicts or any(verdict.problem for verdict in verdicts):
        raise typer.Exit(1)


@app.command("list")
def list_(
    checkpoints_dir: CheckpointsDir = None,
    config: Config = None,
    json: common.Json = None,
) -> None:
    """List the weights with what is recorded of them; `pem weights verify` reads them through."""
    folder = _folder(checkpoints_dir, config)
    with _in_words():
        from posekit.sam6d.checkpoint import manifest, weights

        verdicts = [weights.describe(path) for path in manifest.files(folder)]
    _show(verdicts, folder, json)


@contextmanager
def _in_words() -> Iterator[None]:
    """Turn an error with the weights into a message and exit code 1."""
    try:
        yield
    except PoseError as error:
        common.fail(error.detail)


def _folder(checkpoints_dir: Path | None, config: Path | None) -> Path:
    return settings.load(config, overrides={"checkpoints_dir": checkpoints_dir}).checkpoints_path


def _show(verdicts: list[Verdict], folder: Path, json: str | None) -> None:
    common.write_json(json, {"weights": verdicts})
    if json == "-":
        return
    if not verdicts:
        common.note(f"no weights in {folder}. Bring some in with: pem weights import FILE")
        return
    rows = Table(header_style="bold")
    for column in ("file", "engine", "size", "sha256", "source", "licence", "verdict"):
        rows.add_column(column, justify="right" if column == "size" else "left")
    for verdict in verdicts:
        entry = verdict.entry
        sha256 = verdict.sha256 or (entry.sha256 if entry else None)
        rows.add_row(
            escape(verdict.name),
            escape(entry.engine if entry else "-"),
            _size(verdict.bytes),
            sha256[:12] if sha256 else "-",
            escape(entry.source if entry else "-"),
            escape(entry.licence if entry else "-"),
            "[red]wrong[/]" if verdict.problem else f"[green]{'good' if verdict.sha256 else 'not read through'}[/]",
        )
    common.stdout().print(rows)
    for verdict in verdicts:
        if verdict.problem:
            common.warn(verdict.problem)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
