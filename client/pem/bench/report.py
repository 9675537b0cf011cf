"""Shared output of the benchmarks: a plain table, the same figures as JSON, and the machine's name."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

import msgspec

from pem import __version__
from pem.host.machine import usable_cores, usable_memory_mb

_ROOT: Final = Path(__file__).parents[3]  # of the checkout, if this is one
_PATIENCE_S: Final = 10.0  # time limit for a program that describes the machine


class Table:
    """Rows under fixed columns; numbers are shown with three significant digits and right-aligned."""

    def __init__(self, columns: list[str]) -> None:
        self.columns = columns
        self.rows: list[tuple[Any, ...]] = []

    def add(self, *values: Any) -> None:
        """Add a row, in the order of the columns."""
        if len(values) != len(self.columns):
            raise ValueError(f"{len(values)} values for {len(self.columns)} columns")
        self.rows.append(values)

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the rows for a machine."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def print(self) -> None:
        """Print the rows for people."""
        cells = [self.columns, *([_shown(value) for value in row] for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.columns))]
        for row in cells:
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def write_json(target: str | None, figures: dict[str, Any]) -> None:
    """Write figures with the machine they were measured on; `-` is standard output, None writes nothing."""
    if target is None:
        return
    text = msgspec.json.format(msgspec.json.encode({"machine": machine(), **figures}), indent=2)
    if target == "-":
        sys.stdout.buffer.write(text + b"\n")
    else:
        Path(target).write_bytes(text + b"\n")


def machine() -> dict[str, Any]:
    """Describe the machine that this process runs on; unknown values are None.

    `cpu`: the model; `cores` and `memory_mb` (millions of bytes): what this process may use; `device`: the GPUs as
    nvidia-smi names them, "cpu" if it finds none; `system`, `python`, `version` of this package and, in a checkout, its
    `commit`, which ends in "-dirty" if files differ from it.
    """
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_mb": usable_memory_mb(),
        "device": _device(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "version": __version__,
        "commit": _commit(),
    }


def machine_line() -> str:
    """Describe the machine in one line, for people; unknown values are left out."""
    return in_words(machine())


def in_words(machine: dict[str, Any]) -> str:
    """Describe a result of `machine` in one line."""
    cores = f"{machine['cores']} core{'' if machine['cores'] == 1 else 's'}"
    memory = f"{machine['memory_mb'] / 1000:.1f} GB" if machine["memory_mb"] else ""
    device = machine["device"] if machine["device"] != "cpu" else "no GPU"
    release = f"pem {machine['version']}" + (f" at {machine['commit']}" if machine["commit"] else "")
    return ", ".join(part for part in (machine["cpu"], cores, memory, device, release) if part)


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Return the processor's model name, or its kind on ARM, where it has none. None without such a file."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return " ".join(found[1].split()) if found else platform.machine() or None


def _device() -> str:
    """Return the GPUs' names; equal ones are counted."""
    told = _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    names = Counter(name.strip() for name in told.splitlines() if name.strip())
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items()) or "cpu"


def _commit() -> str | None:
    """Return the commit of a checkout of this project only: an installed package may lie in another project's."""
    if not (_ROOT / ".git").exists():
        return None
    return (
        _said("git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*").strip() or None
    )


def _said(*command: str) -> str:
    """Return a program's output; "" if it is missing, fails or takes too long."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
