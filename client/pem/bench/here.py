"""Access to an installed pem-server for the load generator. Without it, use a server elsewhere and a ready request.

It is found by the entry point that also adds its commands, and loaded on first use: `pem status` imports nothing heavy.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
SERVER: Final = "pem.server"  # entry points by which pem-server adds its half


class NoServerHere(Exception):
    """pem-server is not installed beside this client."""


class Symmetries(Protocol):
    """An object's symmetries about the CAD's own frame, metres."""

    @property
    def discrete(self) -> Sequence[Float64]:
        """Return discrete symmetries, (4, 4) each."""

    @property
    def continuous(self) -> Sequence[tuple[Float64, Float64]]:
        """Return continuous symmetries, (axis (3,), offset_m (3,)) each."""


@dataclass(frozen=True, kw_only=True)
class Instance:
    """An object in a picture, with its true pose and mask."""

    name: str
    T_cam_obj: Float64  # (4, 4), metres
    symmetries: Symmetries
    mask: npt.NDArray[np.bool_]  # (H, W), the pixels that show it


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A rendered RGB-D frame and the objects in it."""

    rgb_png: bytes
    depth_png: bytes
    depth_scale_mm: float  # raw x scale = millimetres
    K: Float64  # (3, 3), pixels
    instances: Sequence[Instance]


class Here(Protocol):
    """The interface that pem-server provides."""

    def object_names(self) -> Sequence[str]:
        """Return every object that pictures can show."""

    def ply(self, name: str) -> bytes:
        """Return an object's CAD, millimetres."""

    def picture(self, seed: int, names: Sequence[str], *, count: int, width: int, height: int) -> Picture:
        """Render up to `count` of these objects, standing apart. The same arguments give the same picture."""

    def pose_errors(self, T_est: Float64, T_true: Float64, symmetries: Symmetries) -> tuple[float, float]:
        """Return (degrees, millimetres) between two poses (4, 4) in metres, modulo symmetries."""

    def variables(self) -> Collection[str]:
        """Return the environment variables that set something of a server."""

    def stage_names(self, server_pid: int) -> dict[int, str]:
        """Return pid -> stage of the workers of a server on this machine; empty if they cannot be read."""


def commands() -> Any | None:
    """Return the module of pem-server's entry point, its half of the command line; None if there is none."""
    for entry in importlib.metadata.entry_points(group=SERVER):
        return entry.load()
    return None


def find() -> Here:
    """Return pem-server's interface; raise NoServerHere if it is not installed."""
    lent = _lent()
    if lent is None:
        raise NoServerHere("pem-server is not installed here")
    return lent


def stage_names(server_pid: int) -> dict[int, str]:
    """Return `Here.stage_names`; empty without pem-server, too."""
    lent = _lent()
    return {} if lent is None else lent.stage_names(server_pid)


@functools.cache
def _lent() -> Here | None:
    half = commands()
    if half is None:
        return None
    lent: Here = half.load_generator()
    return lent
