"""Several things measured in one run: settings of the server by name, whose turn it is, and how far rounds lay apart.

Machines change their pace, and what runs first finds another machine than what runs last. So rounds go through all that
is compared, and each begins with the next one of it.
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
    """The settings in "pose.workers=1,pose.threads=2", none in "defaults"; ValueError where there is no such one."""
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
    """`--set NAME=VALUE[,NAME=VALUE]`, as often as one likes; `given` has what came of it."""
    parser.add_argument(
        "--set", action="append", type=_checked, default=[], metavar="NAME=VALUE", help="a setting of every server here"
    )


def add_try(parser: argparse.ArgumentParser, usual: Sequence[str] = ()) -> None:
    """`--try NAME=VALUE[,NAME=VALUE]`, as often as one likes; `compared` has what came of it, else `usual`."""
    words = "a server with these settings beside the one with the defaults" + (
        ", instead of the usual" if usual else ""
    )
    parser.add_argument("--try", dest="tried", action="append", type=_checked, metavar="NAME=VALUE,...", help=words)
    parser.set_defaults(usual=usual)


def compared(options: argparse.Namespace) -> list[str]:
    """The defaults, and what `--try` names beside them."""
    return [DEFAULTS, *(options.tried or options.usual)]


def given(options: argparse.Namespace) -> dict[str, str]:
    """What `--set` came to; of what was set twice the later one."""
    return {name: value for text in options.set for name, value in settings_of(text).items()}


def in_turns(these: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Everything once a round, A B C, then B C A, then C A B: (number of the round from 0, which)."""
    for number in range(rounds):
        first = number % max(1, len(these))
        for one in (*these[first:], *these[:first]):
            yield number, one


def engine_settings(engine: str, folder: Path, views: int = 8) -> dict[str, str]:
    """Of a server with this engine: the network has generated weights, written to `folder` the first time (432 MB).

    With made-up weights no pose is found. Few `views` of an object make for quick onboarding.
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
