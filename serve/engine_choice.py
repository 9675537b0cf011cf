"""Which engines a start can offer, judged from the settings and the weights' file, without loading any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from safetensors import SafetensorError, safe_open

from posekit.sam6d.checkpoint.version import sha256_of
from serve.errors import ApiError
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


class Engines:
    """Which engine answers a request, and why not the one that it would have had."""

    def __init__(
        self, settings: Settings, offer: Offer, versions: Mapping[str, str], lost: Callable[[], Mapping[str, str]]
    ) -> None:
        """`versions` of those of this start, the default first; `lost` says which of them workers could not start."""
        self.versions = versions
        self.releases = {name: f"{name}-{version}" for name, version in versions.items()}
        self._settings = settings
        self._offer = offer
        self._lost = lost

    @property
    def degraded(self) -> str | None:
        """Why the geometric engine stands in for the network; None where it does not have to."""
        return self._offer.lost or self._lost().get("sam6d")

    @property
    def engine(self) -> str:
        """What `engine: auto` means now."""
        return "geometric" if self.degraded else next(iter(self.releases))

    @property
    def release(self) -> str:
        """What answers now, unless a request asks for another engine."""
        return self.releases[self.engine]

    @property
    def answering(self) -> dict[str, str]:
        """Engine -> release of those that answer now."""
        return {name: release for name, release in self.releases.items() if name == self.engine or not self.degraded}

    def refine(self, engine: str) -> Literal["icp", "none"]:
        """What `refine: auto` means for an engine."""
        return "icp" if engine == "geometric" else "none"

    def stand_in(self, engine: str) -> str | None:
        """What answers, degraded, where this engine cannot."""
        return "geometric" if engine == "sam6d" and self._settings.sam6d.fallback else None

    def pick(self, asked: str) -> tuple[str, str | None]:
        """The engine for a request, and why it is not the one that the request would have had."""
        lost = self.degraded
        if lost is not None and asked != "geometric":
            return "geometric", lost
        name = self.engine if asked == "auto" else asked
        if name not in self.releases:
            raise ApiError(
                "invalid",
                f"the engine {name!r} is not configured here; there is {', '.join(self.releases)}",
                field="engine",
            )
        return name, None
