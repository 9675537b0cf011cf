"""What the geometric engine keeps of an object: stored as plain arrays, used as tensors.

Everything here lives in the centred frame: the CAD's frame moved so that the middle of its bounding box is the origin.
`x_centred = x_obj - centre_m`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posekit.engine import ObjectModel, Symmetries


@dataclass(frozen=True, kw_only=True)
class Field:
    """Which surface sample is nearest, for every cell of a grid around the object."""

    origin_m: Tensor  # (3,), corner of the first cell
    cell_m: float
    shape: tuple[int, int, int]
    nearest: Tensor  # (X * Y * Z,) int32, sample nearest to the cell's middle
    surface: Tensor  # (S, 6): position in metres, unit normal of either sign
    spacing_m: float  # between neighbouring samples

    def lookup(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nearest surface of points (N, 3): its position (N, 3), normal (N, 3) and sample index (N,).

        Beyond the grid the answer is that of the border: far away, hence never mistaken for a fit.
        """
        X, Y, Z = self.shape
        cell = ((points - self.origin_m) * (1.0 / self.cell_m)).to(torch.int32)
        x = cell[:, 0].clamp(0, X - 1)
        y = cell[:, 1].clamp(0, Y - 1)
        z = cell[:, 2].clamp(0, Z - 1)
        sample = self.nearest.index_select(0, (x * Y + y) * Z + z)
        found = self.surface.index_select(0, sample)
        return found[:, :3], found[:, 3:], sample


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An object on its device."""

    diameter_m: float
    centre_m: Tensor  # (3,), object frame
    field: Field
    colours: Tensor | None  # (S, 3) in 0..1
    view_directions: Tensor  # (V, 3), towards the camera
    view_samples: Tensor  # (V, M) int64: samples seen from there, evenly over the picture
    view_centres_m: Tensor  # (V, 3), mean of what is seen
    twins: Tensor  # (T, 4, 4), centred frame: motions that nearly map the object onto itself, identity first
    symmetries: Symmetries  # object frame
    nbytes: int


def prepare(model: ObjectModel, device: torch.device) -> Prepared:
    """Turn stored arrays into tensors on `device`."""
    arrays = model.arrays
    tensors = {name: torch.tensor(array).to(device) for name, array in arrays.items() if name != "field_nearest"}
    nearest = torch.tensor(arrays["field_nearest"]).to(device)
    X, Y, Z = nearest.shape
    surface = torch.cat((tensors["points_m"], tensors["normals"]), dim=1).contiguous()
    colours = tensors["colours"].float() / 255.0 if "colours" in tensors else None
    view_samples = tensors["view_samples"].long()
    used = [nearest, surface, view_samples, tensors["view_directions"], tensors["view_centres_m"]]
    return Prepared(
        diameter_m=model.diameter_m,
        centre_m=tensors["centre_m"],
        field=Field(
            origin_m=tensors["field_origin_m"],
            cell_m=float(arrays["field_cell_m"][0]),
            shape=(X, Y, Z),
            nearest=nearest.reshape(-1),
            surface=surface,
            spacing_m=float(arrays["spacing_m"][0]),
        ),
        colours=colours,
        view_directions=tensors["view_directions"],
        view_samples=view_samples,
        view_centres_m=tensors["view_centres_m"],
        twins=tensors["twins"],
        symmetries=model.symmetries,
        nbytes=sum(tensor.nbytes for tensor in used) + (0 if colours is None else colours.nbytes),
    )
