"""The version of the network's object models. It changes with the weights, because the stored features do.

Imports no torch, so that the gateway can afford it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from posekit.errors import BrokenCheckpoint
from posekit.sam6d import VERSION
from posekit.sam6d.checkpoint import manifest
from posekit.sam6d.network.config import Config


def version_of(weights_file: Path, views: int = Config.views) -> str:
    """Return `VERSION`, eight digits of the weights' sha256, and the number of views if it is not the published one.

    Raises BrokenCheckpoint if the file does not exist.
    """
    return f"{VERSION}.{sha256_of(weights_file)[:8]}" + (f".v{views}" if views != Config.views else "")


def sha256_of(weights_file: Path) -> str:
    """Return the sha256 recorded by the import, else compute it in a second. BrokenCheckpoint as in `version_of`."""
    known = manifest.entry(weights_file)
    if known:
        return known.sha256
    try:
        with open(weights_file, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BrokenCheckpoint(f"the weights {weights_file.name} cannot be read: {error.strerror}") from error
