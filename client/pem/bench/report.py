"""What the benchmarks share: a plain table on standard output, the same figures as JSON, and the machine's name."""

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

_ROOT: Final = Path(__file__).parents[3]  # of the checkout, where this is one
_PATIENCE_S: Final = 10.0  # with a program that tells something about the machine


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
    text = msgspec.json.format(msgspec.json.encode({"machine": machine(), **figures}), indent=2)
    if target == "-":
        sys.stdout.buffer.write(text + b"\n")
    else:
        Path(target).write_bytes(text + b"\n")


def machine() -> dict[str, Any]:
    """The machine that this process runs on, for figures to be read by; what is not known is None.

    `cpu`: the model; `cores` and `memory_mb` (millions of bytes): what this process may use of it; `device`: the GPUs
    as nvidia-smi names them, "cpu" where it finds none; `system`, `python`, `version` of this package and, in a
    checkout, its `commit`, which ends in "-dirty" where files differ from it.
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
    """The machine in one line, for people: what is not known is left out."""
    return in_words(machine())


def in_words(machine: dict[str, Any]) -> str:
    """What `machine` found, in one line."""
    cores = f"{machine['cores']} core{'' if machine['cores'] == 1 else 's'}"
    memory = f"{machine['memory_mb'] / 1000:.1f} GB" if machine["memory_mb"] else ""
    device = machine["device"] if machine["device"] != "cpu" else "no GPU"
    release = f"pem {machine['version']}" + (f" at {machine['commit']}" if machine["commit"] else "")
    return ", ".join(part for part in (machine["cpu"], cores, memory, device, release) if part)


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """What the processor calls itself; on ARM, where it does not, its kind. None where there is no such file."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return " ".join(found[1].split()) if found else platform.machine() or None


def _device() -> str:
    """The GPUs' names, those that are alike counted."""
    told = _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    names = Counter(name.strip() for name in told.splitlines() if name.strip())
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items()) or "cpu"


def _commit() -> str | None:
    """Only of a checkout of this project: an installed package may lie in somebody else's."""
    if not (_ROOT / ".git").exists():
        return None
    return (
        _said("git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*").strip() or None
    )


def _said(*command: str) -> str:
    """What a program prints; nothing where it is not there, fails or takes too long."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
