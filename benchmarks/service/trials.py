"""Compare several settings or servers in one run: parse settings, take turns, and report the spread of rounds.

Machines change their speed, so what runs first finds another machine than what runs last. So each round goes through
everything that is compared, and begins with the next one each time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

from pem.bench.server import variable

DEFAULTS: Final = "defaults"

T = TypeVar("T")


def settings_of(text: str) -> dict[str, str]:
    """Parse "pose.workers=1,pose.threads=2", or "defaults" (no settings); ValueError for an unknown setting."""
    if text == DEFAULTS:
        return {}
    found = {}
    for pair in text.split(","):
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} sets nothing: write NAME=VALUE, as pose.threads=1")
        variable(name.strip())
        found[name.strip()] = value.strip()
    return found


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add `--set NAME=VALUE[,NAME=VALUE]`, which may be repeated; `given` returns its settings."""
    parser.add_argument(
        "--set", action="append", type=_checked, default=[], metavar="NAME=VALUE", help="a setting of every server here"
    )


def add_try(parser: argparse.ArgumentParser, usual: Sequence[str] = ()) -> None:
    """Add `--try NAME=VALUE[,NAME=VALUE]`, which may be repeated; `compared` returns its values, else `usual`."""
    words = "a server with these settings beside the one with the defaults" + (
        ", instead of the usual" if usual else ""
    )
    parser.add_argument("--try", dest="tried", action="append", type=_checked, metavar="NAME=VALUE,...", help=words)
    parser.set_defaults(usual=usual)


def compared(options: argparse.Namespace) -> list[str]:
    """Return the defaults, and the values of `--try`."""
    return [DEFAULTS, *(options.tried or options.usual)]


def given(options: argparse.Namespace) -> dict[str, str]:
    """Return the settings of `--set`; of a repeated setting the last one."""
    return {name: value for text in options.set for name, value in settings_of(text).items()}


def in_turns(these: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Yield everything once a round, A B C, then B C A, then C A B: (number of the round from 0, item)."""
    for number in range(rounds):
        first = number % max(1, len(these))
        for one in (*these[first:], *these[:first]):
            yield number, one


def engine_settings(engine: str, folder: Path, views: int = 8) -> dict[str, str]:
    """Return the settings of a server with this engine. The network gets generated weights, written once (432 MB).

    Generated weights find no pose. Few `views` of an object make onboarding quick.
    """
    if engine != "sam6d":
        return {"engine": engine}
    from benchmarks.network import generated_weights  # imports torch

    if not generated_weights.available():
        raise SystemExit("there are no generated weights here")
    weights = folder / "generated.safetensors"
    if not weights.exists():
        generated_weights.write(weights)
    return {"engine": engine, "sam6d.weights": str(weights), "sam6d.views": str(views)}


def _checked(text: str) -> str:
    try:
        settings_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
