"""The families of the metrics page as docs/METRICS.md lists them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.running import ROOT

PAGE = ROOT / "docs" / "METRICS.md"
_ROW = re.compile(r"^\| `(?P<name>[a-z_]+)` \| (?P<type>counter|gauge|histogram) \|(?P<labels>[^|]*)\|", re.MULTILINE)


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    name: str  # as Prometheus calls it: a counter's with `_total`
    type: str
    labels: frozenset[str]

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its time series."""
        endings = ("_bucket", "_count", "_sum") if self.type == "histogram" else ("",)
        return tuple(self.name + ending for ending in endings)


def families() -> dict[str, Family]:
    """Every documented family by name."""
    return {
        row["name"]: Family(row["name"], row["type"], frozenset(re.findall(r"`(\w+)`", row["labels"])))
        for row in _ROW.finditer(PAGE.read_text())
    }


def family_of(series: str) -> str:
    """The family that a time series belongs to, as far as its name tells."""
    known = {name: family.name for family in families().values() for name in family.series}
    return known.get(series, series)
