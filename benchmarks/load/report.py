"""What the benchmarks share: a plain table on standard output, and the same figures as JSON."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import msgspec


class Table:
    """Rows under fixed columns; numbers are shown with three significant digits and right-aligned."""

    def __init__(self, columns: list[str]) -> None:
        self.columns = columns
        self.rows: list[tuple[Any, ...]] = []

    def add(self, *values: Any) -> None:
        """One row, in the order of the columns."""
        if len(values) != len(self.columns):
            raise ValueError(f"{len(values)} values for {len(self.columns)} columns")
        self.rows.append(values)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows for a machine."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def print(self) -> None:
        """The rows for people."""
        cells = [self.columns, *([_shown(value) for value in row] for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.columns))]
        for row in cells:
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def write_json(target: str | None, figures: dict[str, Any]) -> None:
    """Write figures with the machine they were measured on; `-` is standard output, None writes nothing."""
    if target is None:
        return
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    text = msgspec.json.format(msgspec.json.encode({"machine": machine, **figures}), indent=2)
    if target == "-":
        sys.stdout.buffer.write(text + b"\n")
    else:
        Path(target).write_bytes(text + b"\n")


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
