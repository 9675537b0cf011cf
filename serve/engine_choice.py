"""Choose the engines that a start offers, without loading any of them, and the engine that answers a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from posekit import registry
from posekit.engine import EngineSpec
from serve.backend.mosec import Backend
from serve.errors import ApiError
from serve.settings import Settings
from workers.engines import versions
from workers.settings import EngineName


class CannotStart(Exception):
    """The server cannot start; the message tells the operator why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The engines that the workers load, the default first."""

    engines: tuple[EngineName, ...]
    wanted: EngineName  # what `auto` means in requests; if it is lost, its stand-in answers
    sha256: dict[str, str] = field(default_factory=dict)  # engine -> digest of its weights
    lost: dict[str, str] = field(default_factory=dict)  # engine -> why it cannot be used; not in `engines`


def choose(settings: Settings) -> Offer:
    """Choose the engines of this start: the wanted ones and those that they rely on. Requests may ask for any of them.

    `engine` "auto" wants every engine that needs no weights or whose weights exist. An engine whose weights exist but
    cannot be used is lost. Raises CannotStart if an engine is lost and the settings allow no stand-in
    (`fallback = false`).
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


class Engines:
    """Picks the engine that answers a request, and says why if it is not the one wanted."""

    def __init__(self, settings: Settings, offer: Offer, backend: Backend) -> None:
        self.versions = versions(backend.stages)  # engine -> version, the default first
        self.releases = {name: f"{name}-{version}" for name, version in self.versions.items()}
        self._settings = settings
        self._offer = offer
        self._backend = backend

    @property
    def lost(self) -> dict[str, str]:
        """Return the engines that cannot answer: engine -> reason. Their stand-ins answer."""
        return self._backend.lost() | self._offer.lost

    @property
    def degraded(self) -> str | None:
        """Return why another engine stands in for the one that `auto` means; None if none does."""
        return self.lost.get(self._offer.wanted)

    @property
    def engine(self) -> str:
        """Return the engine that `engine: auto` means now."""
        return registry.standing_in(self._offer.wanted, self.lost)

    @property
    def release(self) -> str:
        """Return the release that answers now, unless a request asks for another engine."""
        return self.releases[self.engine]

    @property
    def answering(self) -> dict[str, str]:
        """Return the engines that answer now: engine -> release."""
        lost = self.lost
        return {name: release for name, release in self.releases.items() if name not in lost}

    @property
    def checkpoint(self) -> str | None:
        """Return the name of the weights in use; None if the engine has none."""
        path = self._settings.weights_path(self.engine)
        return path.stem if path is not None else None

    @property
    def sha256(self) -> str | None:
        """Return the digest of the weights in use; None if the engine has none."""
        return self._offer.sha256.get(self.engine)

    def pick(self, asked: str) -> Pick:
        """Pick the engine for a request that asks for `asked` or "auto". Raises ApiError if it is not configured."""
        wanted = self._offer.wanted if asked == registry.AUTO else asked
        lost = self.lost
        engine = registry.standing_in(wanted, lost)
        if engine not in self.releases:
            raise ApiError(
                "invalid",
                f"the engine {wanted!r} is not configured here; there is {', '.join(self.releases)}",
                field="engine",
            )
        return Pick(wanted, engine, lost.get(wanted))

    def instead(self, pick: Pick, reason: str) -> Pick | None:
        """Return the pick to use when the picked engine cannot onboard a CAD; None if nothing may stand in for it."""
        stand_in = self._settings.stand_in(pick.engine)
        return None if stand_in is None else Pick(pick.wanted, stand_in, reason)

    def answered(self, pick: Pick, engine: str) -> Pick:
        """Return the pick corrected to the engine that answered: workers that lost the picked one use another."""
        if engine == pick.engine:
            return pick
        words = registry.spec(pick.engine).words
        return Pick(pick.wanted, engine, self.lost.get(pick.engine) or f"{words} could not be used")


@dataclass(frozen=True)
class Pick:
    """An engine for one request."""

    wanted: str  # what the request asked for
    engine: str
    reason: str | None  # why `engine` is not `wanted`; None if it is

    @property
    def refine(self) -> Literal["icp", "none"]:
        """Return what `refine: auto` means for this engine."""
        return registry.spec(self.engine).refine

    @property
    def warning(self) -> str | None:
        """Return the warning for the client about a stand-in; None if there is none."""
        if self.reason is None:
            return None
        who, whom = registry.spec(self.engine).words, registry.spec(self.wanted).words
        return f"degraded: {who} stood in for {whom}: {self.reason}"
