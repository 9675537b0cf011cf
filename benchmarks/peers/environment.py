"""The environment with the peers' packages, beside the project's own: `make peers` and `make peers-serving`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"


class PeerFailed(Exception):
    """A peer's process failed; the message holds the end of its output."""


def versions(packages: Sequence[str], python: Path = PYTHON) -> dict[str, str]:
    """Return package -> version in the environment of `python`; missing packages are left out."""
    folders = [str(path) for path in python.parents[1].glob("lib/python3.*/site-packages")]
    found = {one.name.lower(): one.version for one in distributions(path=folders)}
    return {package: found[package] for package in packages if package in found}
