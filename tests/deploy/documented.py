"""The metric families as docs/METRICS.md lists them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.running import ROOT

PAGE = ROOT / "docs" / "METRICS.md"
_ROW = re.compile(r"^\| `(?P<name>[a-z_]+)` \| (?P<type>counter|gauge|histogram) \|(?P<labels>[^|]*)\|", re.MULTILINE)


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    name: str  # Prometheus's name: a counter's ends in `_total`
    type: str
    labels: frozenset[str]

    @property
    def series(self) -> tuple[str, ...]:
        """Return the names of the family's time series."""
        endings = ("_bucket", "_count", "_sum") if self.type == "histogram" else ("",)
        return tuple(self.name + ending for ending in endings)


def families() -> dict[str, Family]:
    """Return every documented family by name."""
    return {
        row["name"]: Family(row["name"], row["type"], frozenset(re.findall(r"`(\w+)`", row["labels"])))
        for row in _ROW.finditer(PAGE.read_text())
    }


def family_of(series: str) -> str:
    """Return the family of a time series, judged by the name."""
    known = {name: family.name for family in families().values() for name in family.series}
    return known.get(series, series)
