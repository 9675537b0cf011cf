"""Which engines a start can offer, judged from the settings and the weights' file, without loading any of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from posekit.sam6d.checkpoint.version import sha256_of
from serve.settings import Settings
from workers.settings import EngineName

HINT: Final = "`pem weights import FILE` puts SAM-6D's released weights in place; --engine geometric needs none"


class CannotStart(Exception):
    """The server cannot start; the message tells the operator why and what to do."""


@dataclass(frozen=True)
class Offer:
    """What the workers are to load, the default first."""

    engines: tuple[EngineName, ...]
    sha256: str | None = None  # of the network's weights
    lost: str | None = (
        None  # why the network, although it was chosen, is not among them: the geometric engine stands in
    )


def choose(settings: Settings) -> Offer:
    """The engines of this start. Beside the network there is always the geometric engine: a request may ask for it.

    Weights that are there and cannot be used are no reason to say nothing: with `engine` "auto" too the network counts
    as lost then. Raises CannotStart where it is, and `sam6d.fallback` is false.
    """
    path = settings.weights_path
    if settings.engine == "geometric" or (settings.engine == "auto" and not path.exists()):
        return Offer(engines=("geometric",))
    problem = _problem(path)
    if problem is None:
        return Offer(("sam6d", "geometric"), sha256=sha256_of(path))
    if not settings.sam6d.fallback:
        raise CannotStart(f"the engine sam6d cannot be started: {problem} ({path}); {HINT}")
    return Offer(("geometric",), lost=problem)


def _problem(path: Path) -> str | None:
    """What is wrong with a file of weights as far as its header tells; clients may read it, so it names no path."""
    try:
        with safe_open(path, framework="np") as file:
            return None if file.keys() else "the network's weights are an empty file"
    except FileNotFoundError:
        return "the network's weights are missing"
    except (SafetensorError, ValueError):
        return "the network's weights are cut short, damaged or no safetensors file"
    except OSError as error:
        return f"the network's weights cannot be read: {error.strerror or 'it is no file'}"
