"""The table of all engines, one row each. A new engine needs its package and a line in `ENGINES`.

Onboarding routes, stages, settings, labels, licences, `GET /v2/models/pem`, stand-ins and the words of the command
line all derive from these rows. No torch is imported here.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from posekit.engine import EngineSpec
from posekit.geometric.spec import SPEC as GEOMETRIC
from posekit.sam6d.spec import SPEC as SAM6D

#: In the order in which `auto` prefers them: it takes the first one whose weights exist, or that needs none.
ENGINES: Final[tuple[EngineSpec, ...]] = (SAM6D, GEOMETRIC)

AUTO: Final = "auto"  # the choice that leaves the engine to the server


def spec(name: str) -> EngineSpec:
    """Return the row of the engine `name`. Raises ValueError, which lists the known engines."""
    for one in ENGINES:
        if one.name == name:
            return one
    raise ValueError(f"there is no engine {name!r}; there are: {', '.join(names())}")


def by_effort() -> tuple[EngineSpec, ...]:
    """Return all rows, the quickest to onboard first."""
    return tuple(sorted(ENGINES, key=lambda one: one.effort))


def names() -> tuple[str, ...]:
    """Return all engine names, the quickest to onboard first."""
    return tuple(one.name for one in by_effort())


def choices() -> tuple[str, ...]:
    """Return the values that requests and settings may give for the engine: `names` and "auto"."""
    return (*names(), AUTO)


def needing_nothing() -> str:
    """Return the engine that `auto` prefers among those without weights: every machine has one."""
    return next(one.name for one in ENGINES if one.weights is None)


def company(name: str) -> tuple[str, ...]:
    """Return `name` and all engines it relies on, each once: stand-in, refiner, finder of symmetries, and theirs."""
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
    """Return the engine that answers requests for `name`: itself, or the first of its stand-ins that is not lost."""
    while name in lost and (other := spec(name).stand_in) is not None:
        name = other
    return name
