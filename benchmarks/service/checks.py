"""What a benchmark that can fail says: each figure beside its limit, and whether it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pem.bench.report import Table


@dataclass(frozen=True, kw_only=True)
class Check:
    """One figure; without a limit it is only told."""

    what: str  # with the unit
    found: float | int
    limit: str = ""  # in words and figures; empty: there is none
    holds: bool = True


def at_most(what: str, found: float | int, limit: float | int) -> Check:
    """A figure that may not be larger; one that is not a number does not hold."""
    return Check(what=what, found=found, limit=f"at most {limit:g}", holds=found <= limit)


def at_least(what: str, found: float | int, limit: float | int) -> Check:
    """A figure that may not be smaller; one that is not a number does not hold."""
    return Check(what=what, found=found, limit=f"at least {limit:.4g}", holds=found >= limit)


def none(what: str, found: int) -> Check:
    """Something that may not happen at all."""
    return Check(what=what, found=found, limit="none", holds=found == 0)


def told(what: str, found: float | int) -> Check:
    """A figure without a limit."""
    return Check(what=what, found=found)


def table(checks: Sequence[Check]) -> Table:
    """The figures beside their limits."""
    found = Table(["figure", "found", "limit", "holds"])
    for check in checks:
        found.add(check.what, check.found, check.limit, ("yes" if check.holds else "NO") if check.limit else "")
    return found


def all_hold(checks: Sequence[Check]) -> bool:
    """Whether every limit was kept."""
    return all(check.holds for check in checks)
