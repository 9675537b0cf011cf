"""Options that the commands on the server's machine share. An option for a setting has the setting's words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from serve import settings


def of_setting(name: str) -> Any:
    """Make the option for a setting, with its words and default. `log_format` is `format` in `[log]`."""
    setting = settings.named(name)
    default = setting.note("unset") if setting.default is None else setting.default
    words = f"{setting.words} One of {', '.join(setting.choices)}." if setting.choices else setting.words
    return typer.Option(f"--{name.replace('_', '-')}", help=words, show_default=str(default))


DataDir = Annotated[Path | None, of_setting("data_dir")]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="A TOML file of settings; the environment and the other options win over it."),
]
