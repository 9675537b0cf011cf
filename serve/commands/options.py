"""The options that commands beside a server share: its data directory and its settings file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Where objects, outputs, logs and keys live.", show_default="./data")
]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="A TOML file of settings; the environment and the other options win over it."),
]
