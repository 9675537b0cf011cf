"""The result of a benchmark that can fail: each figure beside its limit, and if the limit holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pem.bench.report import Table


@dataclass(frozen=True, kw_only=True)
class Check:
    """One figure; without a limit it is only reported."""

    what: str  # name of the figure, with its unit
    found: float | int
    limit: str = ""  # in words and figures; empty: no limit
    holds: bool = True


def at_most(what: str, found: float | int, limit: float | int) -> Check:
    """Check that a figure is not larger; NaN fails."""
    return Check(what=what, found=found, limit=f"at most {limit:g}", holds=found <= limit)


def at_least(what: str, found: float | int, limit: float | int) -> Check:
    """Check that a figure is not smaller; NaN fails."""
    return Check(what=what, found=found, limit=f"at least {limit:.4g}", holds=found >= limit)


def none(what: str, found: int) -> Check:
    """Check that something never happened."""
    return Check(what=what, found=found, limit="none", holds=found == 0)


def told(what: str, found: float | int) -> Check:
    """Report a figure without a limit."""
    return Check(what=what, found=found)


def table(checks: Sequence[Check]) -> Table:
    """Make a table of the figures beside their limits."""
    found = Table(["figure", "found", "limit", "holds"])
    for check in checks:
        found.add(check.what, check.found, check.limit, ("yes" if check.holds else "NO") if check.limit else "")
    return found


def all_hold(checks: Sequence[Check]) -> bool:
    """Return True if every limit holds."""
    return all(check.holds for check in checks)
