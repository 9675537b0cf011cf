"""A Grafana dashboard as its JSON has it: panels, their queries, their variables put in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards" / "pem-server.json"
ALL = {"instance": ".*", "object": ".*"}  # what Grafana puts in for "All"


@dataclass(frozen=True)
class Query:
    """One line of a panel."""

    panel: str
    expression: str  # with variables: `$instance`, `$__rate_interval`
    legend: str  # with labels in double braces

    def filled(self, rate_interval_s: int, variables: Mapping[str, str] = ALL) -> str:
        """PromQL with the variables' values put in."""
        expression = self.expression.replace("$__rate_interval", f"{rate_interval_s}s")
        for name, value in variables.items():
            expression = expression.replace(f"${name}", value)
        return expression

    def name(self, labels: Mapping[str, str]) -> str:
        """The legend of one series."""
        legend = self.legend
        for label, value in labels.items():
            legend = legend.replace("{{" + label + "}}", value)
        return legend


def load(path: Path = PATH) -> dict[str, Any]:
    """The dashboard as a tree."""
    tree: dict[str, Any] = json.loads(path.read_text())
    return tree


def queries(panel: Mapping[str, Any]) -> Iterator[Query]:
    """The queries of a panel, in its order."""
    for target in panel.get("targets", []):
        yield Query(panel["title"], target["expr"], target["legendFormat"])
