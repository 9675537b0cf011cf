"""Which engines a start can offer, judged from the settings and the files of weights, without loading any of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from posekit import registry
from posekit.engine import EngineSpec
from serve.settings import Settings
from workers.settings import EngineName


class CannotStart(Exception):
    """The server cannot start; the message tells the operator why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What the workers are to load, the default first."""

    engines: tuple[EngineName, ...]
    wanted: EngineName  # what `auto` means in requests; answered by its stand-in where it is lost
    sha256: dict[str, str] = field(default_factory=dict)  # engine -> of its weights
    lost: dict[str, str] = field(default_factory=dict)  # engine -> why it was chosen and is not among `engines`


def choose(settings: Settings) -> Offer:
    """The engines of this start: those wanted, and beside each what it counts on; a request may ask for any of them.

    `engine` "auto" wants every engine whose weights are there, or that needs none. Weights that are there and cannot be
    used are no reason to say nothing: the engine counts as lost then. Raises CannotStart where it is, and the settings
    allow no stand-in (`fallback = false`).
    """
    if settings.engine == registry.AUTO:
        wanted = [one.name for one in registry.ENGINES if _is_there(settings, one)]
    else:
        wanted = [settings.engine]
    engines: dict[str, None] = {}
    sha256: dict[str, str] = {}
    lost: dict[str, str] = {}
    for name in dict.fromkeys(other for each in wanted for other in registry.company(each)):
        path, weights = settings.weights_path(name), registry.spec(name).weights
        if path is None or weights is None:
            engines[name] = None
        elif (problem := weights.problem(path)) is None:
            engines[name] = None
            sha256[name] = weights.sha256(path)
        elif settings.stand_in(name) is None:
            raise CannotStart(registry.spec(name).cannot_start(f"{problem} ({path})"))
        else:
            lost[name] = problem
    return Offer(engines=tuple(engines), wanted=wanted[0], sha256=sha256, lost=lost)


def _is_there(settings: Settings, engine: EngineSpec) -> bool:
    path = settings.weights_path(engine.name)
    return path is None or path.exists()
