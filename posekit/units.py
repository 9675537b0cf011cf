"""Convert between millimetres and metres. The wire and the files use mm; everything inside uses metres.

Imports numpy only, so that every process can afford it.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

MM_PER_M: Final = 1000.0
METRES_OF: Final = {"mm": 0.001, "m": 1.0}  # metres per unit of a mesh file

_Float64 = npt.NDArray[np.float64]


def mm_to_m(lengths_mm: npt.NDArray[np.floating[Any]]) -> npt.NDArray[Any]:
    """Convert lengths of any shape; float32 stays float32."""
    return lengths_mm / MM_PER_M


def m_to_mm(lengths_m: npt.NDArray[np.floating[Any]]) -> npt.NDArray[Any]:
    """Convert lengths of any shape; float32 stays float32."""
    return lengths_m * MM_PER_M


def transform_mm_to_m(T_mm: npt.ArrayLike) -> _Float64:
    """Copy a (4, 4) transform, or its 16 numbers row-major, with its translation in metres."""
    T_m = np.array(T_mm, dtype=np.float64).reshape(4, 4)
    T_m[:3, 3] /= MM_PER_M
    return T_m


def transform_m_to_mm(T_m: npt.ArrayLike) -> _Float64:
    """Copy a (4, 4) transform, or its 16 numbers row-major, with its translation in millimetres."""
    T_mm = np.array(T_m, dtype=np.float64).reshape(4, 4)
    T_mm[:3, 3] *= MM_PER_M
    return T_mm
