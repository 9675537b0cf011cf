"""Read the pictures beside a mesh, and take vertex colours from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from posekit.errors import PoseError
from posekit.io import images
from posekit.io.meshes.raw import Float64, UInt8

MAX_TEXTURE_MEGAPIXELS = 50.0


class Files:
    """A resolver for trimesh that finds the given files by last name, in any case, and never anything else."""

    def __init__(self, files: Mapping[str, bytes], notes: list[str]) -> None:
        self.files = {_last_name(name): content for name, content in files.items()}
        self.notes = notes

    def get(self, name: str) -> bytes:
        content = self.files.get(_last_name(str(name)))
        if content is None:
            shown = _last_name(str(name))[:80]
            note = f"the mesh refers to {shown!r}, which was not sent: its colours are missing"
            if note not in self.notes:
                self.notes.append(note)
            raise FileNotFoundError(shown)
        return content

    def __getitem__(self, name: str) -> bytes:
        return self.get(name)

    def __contains__(self, name: str) -> bool:
        return _last_name(str(name)) in self.files

    def keys(self) -> Iterable[str]:
        return self.files.keys()

    def namespaced(self, namespace: str) -> Files:
        return self


def _last_name(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2].strip().lower()


def texture_image(files: Files, name: str, notes: list[str]) -> UInt8 | None:
    """Decode a texture by its name: (H, W, 3) RGB; None, with a note, if it is missing or cannot be used."""
    try:
        return images.decode_color(files.get(name), MAX_TEXTURE_MEGAPIXELS)
    except FileNotFoundError:
        return None
    except PoseError:
        notes.append("a texture is broken, too large, or no PNG or JPEG: its colours are missing")
        return None


def sampled(image: UInt8, uv: Float64) -> UInt8:
    """Return the texture's colours at (N, 2) coordinates, v upwards, repeating outside 0 to 1; the nearest pixel."""
    height, width = image.shape[:2]
    wrapped = np.nan_to_num(uv, posinf=0.0, neginf=0.0)
    wrapped = np.where((wrapped >= 0) & (wrapped <= 1), wrapped, wrapped % 1.0)
    columns = np.minimum((wrapped[:, 0] * width).astype(np.int64), width - 1)
    rows = np.minimum(((1.0 - wrapped[:, 1]) * height).astype(np.int64), height - 1)
    return np.ascontiguousarray(image[rows, columns, :3])


def bytes_of(colors: npt.NDArray[Any]) -> UInt8:
    """Round to 0..255; NaN becomes 0."""
    rounded: UInt8 = np.clip(np.nan_to_num(np.round(colors)), 0, 255).astype(np.uint8)
    return rounded
