"""The engines that there are, one row each. Adding one is its package and its line in `ENGINES`.

Routes of onboarding, stages, settings, labels, licences, `GET /v2/models/pem`, what stands in for what, and the words
of the command line derive from these rows. No torch is imported here.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from posekit.engine import EngineSpec
from posekit.geometric.spec import SPEC as GEOMETRIC
from posekit.sam6d.spec import SPEC as SAM6D

#: In the order in which `auto` prefers them: it means the first whose weights are there, or that needs none.
ENGINES: Final[tuple[EngineSpec, ...]] = (SAM6D, GEOMETRIC)

AUTO: Final = "auto"  # the choice that leaves the engine to the server


def spec(name: str) -> EngineSpec:
    """The row of the engine `name`. Raises ValueError, which names those there are."""
    for one in ENGINES:
        if one.name == name:
            return one
    raise ValueError(f"there is no engine {name!r}; there are: {', '.join(names())}")


def by_effort() -> tuple[EngineSpec, ...]:
    """All of them, the quickest to onboard first."""
    return tuple(sorted(ENGINES, key=lambda one: one.effort))


def names() -> tuple[str, ...]:
    """The names of all of them, the quickest to onboard first."""
    return tuple(one.name for one in by_effort())


def choices() -> tuple[str, ...]:
    """What a request and the settings may say of the engine: `names` and "auto"."""
    return (*names(), AUTO)


def needing_nothing() -> str:
    """The engine that `auto` prefers among those that need no weights: there is one on every machine."""
    return next(one.name for one in ENGINES if one.weights is None)


def company(name: str) -> tuple[str, ...]:
    """`name` and the engines that it counts on, each once: stand-in, refiner, finder of symmetries, and theirs."""
    found = {name: None}
    waiting = [name]
    while waiting:
        one = spec(waiting.pop(0))
        for other in (one.stand_in, one.refiner, one.symmetries_from):
            if other is not None and other not in found:
                found[other] = None
                waiting.append(other)
    return tuple(found)


def standing_in(name: str, lost: Collection[str]) -> str:
    """The engine that answers where `name` is asked for: itself, or the first of its stand-ins that is not lost."""
    while name in lost and (other := spec(name).stand_in) is not None:
        name = other
    return name
