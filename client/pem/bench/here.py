"""What an installed pem-server lends to the load generator; without it a server elsewhere and a ready request do.

Found by the entry point that also adds its commands, and made on first use: nothing heavy is imported for `pem status`.
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
SERVER: Final = "pem.server"  # the entry points by which pem-server adds its half


class NoServerHere(Exception):
    """pem-server is not installed beside this client."""


class Symmetries(Protocol):
    """An object's symmetries about the CAD's own frame, metres."""

    @property
    def discrete(self) -> Sequence[Float64]:
        """(4, 4) each."""

    @property
    def continuous(self) -> Sequence[tuple[Float64, Float64]]:
        """(axis (3,), offset_m (3,)) each."""


@dataclass(frozen=True, kw_only=True)
class Instance:
    """An object in a picture, with the truth about it."""

    name: str
    T_cam_obj: Float64  # (4, 4), metres
    symmetries: Symmetries
    mask: npt.NDArray[np.bool_]  # (H, W), the pixels that show it


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A rendered RGB-D frame and what stands in it."""

    rgb_png: bytes
    depth_png: bytes
    depth_scale_mm: float  # raw x scale = millimetres
    K: Float64  # (3, 3), pixels
    instances: Sequence[Instance]


class Here(Protocol):
    """What the server's half lends."""

    def object_names(self) -> Sequence[str]:
        """Every object that pictures can show."""

    def ply(self, name: str) -> bytes:
        """An object's CAD, millimetres."""

    def picture(self, seed: int, names: Sequence[str], *, count: int, width: int, height: int) -> Picture:
        """Up to `count` of these objects, standing apart; a function of its arguments."""

    def pose_errors(self, T_est: Float64, T_true: Float64, symmetries: Symmetries) -> tuple[float, float]:
        """(degrees, millimetres) between two poses (4, 4) in metres, modulo symmetries."""

    def variables(self) -> Collection[str]:
        """The environment variables that set something of a server."""

    def stage_names(self, server_pid: int) -> dict[int, str]:
        """pid -> stage of the workers of a server on this machine; empty where they cannot be read."""


def commands() -> Any | None:
    """The server's half of the command line: the module of pem-server's entry point; None where there is none."""
    for entry in importlib.metadata.entry_points(group=SERVER):
        return entry.load()
    return None


def find() -> Here:
    """What pem-server lends; NoServerHere where it is not installed."""
    lent = _lent()
    if lent is None:
        raise NoServerHere("pem-server is not installed here")
    return lent


def stage_names(server_pid: int) -> dict[int, str]:
    """As Here.stage_names; empty without pem-server, too."""
    lent = _lent()
    return {} if lent is None else lent.stage_names(server_pid)


@functools.cache
def _lent() -> Here | None:
    half = commands()
    if half is None:
        return None
    lent: Here = half.load_generator()
    return lent
