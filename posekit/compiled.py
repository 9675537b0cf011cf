"""Load a package's compiled kernels, and warn where they were not built."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch

Kernel = Literal["compiled", "reference"]
REBUILD = "rebuild with: pip install --no-build-isolation ."

_log = logging.getLogger(__name__)


def load_kernels(package: str, path: Path) -> bool:
    """Register the ops of the library at `path` with torch; if that fails, log a warning and return False."""
    if not path.exists():
        _log.warning("%s has no compiled kernels: the slower torch reference answers; %s", package, REBUILD)
        return False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        _log.warning(
            "%s of %s does not load with torch %s (%s); %s", path.name, package, torch.__version__, error, REBUILD
        )
        return False
    return True
