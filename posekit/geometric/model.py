"""The geometric engine's model of an object: stored as plain arrays, used as tensors.

Everything here is in the centred frame: the CAD's frame, moved so that the middle of its bounding box is the origin.
`x_centred = x_obj - centre_m`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posekit.engine import ObjectModel, Symmetries


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An object's tensors on its device."""

    diameter_m: float
    centre_m: Tensor  # (3,), object frame
    surface: Tensor  # (S, 7) samples: position in metres, unit normal, thickness of the wall below (0 = thick)
    oriented: bool  # normals point outwards; if False, their signs mean nothing
    colours: Tensor | None  # (S, 3) in 0..1
    spacing_m: float  # distance between neighbouring samples
    dense: Tensor  # (D, 6): many more samples, for drawing
    dense_colours: Tensor | None  # (D, 3) uint8
    dense_spacing_m: float
    field_origin_m: Tensor  # (3,), corner of the first cell of the grid around the object
    field_cell_m: float
    field_shape: tuple[int, int, int]
    field_nearest: Tensor  # (X * Y * Z,) int32, sample nearest to the middle of each cell
    view_directions: Tensor  # (V, 3), towards the camera
    view_samples: Tensor  # (V, M) int64: samples seen from each direction, evenly over the picture
    view_centres_m: Tensor  # (V, 3), mean of the samples seen
    twins: Tensor  # (T, 4, 4), centred frame: motions that nearly map the object onto itself, identity first
    symmetries: Symmetries  # object frame
    nbytes: int


def prepare(model: ObjectModel, device: torch.device) -> Prepared:
    """Turn stored arrays into tensors on `device`."""
    arrays = model.arrays
    tensors = {name: torch.tensor(array).to(device) for name, array in arrays.items()}
    X, Y, Z = tensors["field_nearest"].shape
    surface = torch.cat((tensors["points_m"], tensors["normals"], tensors["thickness_m"][:, None]), dim=1).contiguous()
    colours = tensors["colours"].float() / 255.0 if "colours" in tensors else None
    view_samples = tensors["view_samples"].long()
    dense = torch.cat((tensors["dense_points_m"], tensors["dense_normals"].float() / 127.0), dim=1).contiguous()
    made = [surface, dense, view_samples, *([] if colours is None else [colours])]
    kept = [tensors[name] for name in ("field_nearest", "view_directions", "view_centres_m", "twins")]
    if "dense_colours" in tensors:
        kept.append(tensors["dense_colours"])
    return Prepared(
        diameter_m=model.diameter_m,
        centre_m=tensors["centre_m"],
        surface=surface,
        oriented=bool(arrays["oriented"][0]),
        colours=colours,
        spacing_m=float(arrays["spacing_m"][0]),
        dense=dense,
        dense_colours=tensors.get("dense_colours"),
        dense_spacing_m=float(arrays["dense_spacing_m"][0]),
        field_origin_m=tensors["field_origin_m"],
        field_cell_m=float(arrays["field_cell_m"][0]),
        field_shape=(X, Y, Z),
        field_nearest=tensors["field_nearest"].reshape(-1),
        view_directions=tensors["view_directions"],
        view_samples=view_samples,
        view_centres_m=tensors["view_centres_m"],
        twins=tensors["twins"],
        symmetries=model.symmetries,
        nbytes=sum(tensor.nbytes for tensor in (*made, *kept)),
    )


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """The objects of a batch side by side, one entry per instance: (B, ...). Large tables are concatenated."""

    diameter_m: Tensor  # (B,)
    spacing_m: Tensor  # (B,)
    cell_m: Tensor  # (B,)
    surface: Tensor  # (all samples, 7)
    oriented: Tensor  # (B,) bool
    colours: Tensor | None  # (all samples, 3); None where no object has any
    coloured: Tensor  # (B,) bool
    first_sample: Tensor  # (B,), index in `surface` of an instance's first sample
    samples: int  # number of samples of each object
    dense: Tensor  # (all dense samples, 6)
    dense_colours: Tensor | None  # (all dense samples, 3) uint8
    dense_spacing_m: Tensor  # (B,)
    first_dense: Tensor  # (B,)
    dense_samples: int  # number of dense samples of each object
    view_directions: Tensor  # (V, 3), the same for all objects
    view_samples: Tensor  # (B, V, M), counted from `first_sample`
    view_centres_m: Tensor  # (B, V, 3)
    twins: Tensor  # (B, T, 4, 4), padded with the identity
    origin_m: Tensor  # (B, 1, 3)
    last_cell: Tensor  # (B, 1, 3) int32
    stride: Tensor  # (B, 1, 3) int32
    first_cell: Tensor  # (B, 1) int32
    nearest: Tensor  # (all cells,) int32

    @classmethod
    def of(cls, models: Sequence[Prepared]) -> Shelf:
        """Build one entry per model, in order. A model that occurs several times is stored once."""
        device = models[0].surface.device
        unique = list({id(model): model for model in models}.values())
        which = {id(model): index for index, model in enumerate(unique)}
        of = torch.tensor([which[id(model)] for model in models], device=device)

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[of]

        def starts(sizes: Sequence[int]) -> list[int]:
            return [sum(sizes[:index]) for index in range(len(sizes))]

        samples = len(unique[0].surface)
        if any(len(model.surface) != samples for model in unique):
            raise ValueError("models of one batch must have the same number of surface samples")
        coloured = [model.colours is not None for model in unique]
        colours = dense_colours = None
        if any(coloured):
            colours = _end_to_end([m.surface.new_zeros(samples, 3) if m.colours is None else m.colours for m in unique])
            dense_colours = _end_to_end(
                [
                    m.dense.new_zeros(len(m.dense), 3, dtype=torch.uint8)
                    if m.dense_colours is None
                    else m.dense_colours
                    for m in unique
                ]
            )
        most = max(len(model.twins) for model in unique)
        twins = torch.eye(4, device=device).repeat(len(unique), most, 1, 1)
        for index, model in enumerate(unique):
            twins[index, : len(model.twins)] = model.twins
        shapes = torch.tensor([model.field_shape for model in unique], dtype=torch.int32, device=device)[of]
        ones = torch.ones_like(shapes[:, 0])
        return cls(
            diameter_m=column([model.diameter_m for model in unique]),
            spacing_m=column([model.spacing_m for model in unique]),
            cell_m=column([model.field_cell_m for model in unique]),
            surface=_end_to_end([model.surface for model in unique]),
            colours=colours,
            oriented=column([model.oriented for model in unique], torch.bool),
            coloured=column(coloured, torch.bool),
            first_sample=column(starts([samples] * len(unique)), torch.int64),
            samples=samples,
            dense=_end_to_end([model.dense for model in unique]),
            dense_colours=dense_colours,
            dense_spacing_m=column([model.dense_spacing_m for model in unique]),
            first_dense=column(starts([len(model.dense) for model in unique]), torch.int64),
            dense_samples=len(unique[0].dense),
            view_directions=unique[0].view_directions,
            view_samples=torch.stack([model.view_samples for model in unique])[of],
            view_centres_m=torch.stack([model.view_centres_m for model in unique])[of],
            twins=twins[of],
            origin_m=torch.stack([model.field_origin_m for model in unique])[of][:, None],
            last_cell=(shapes - 1)[:, None],
            stride=torch.stack((shapes[:, 1] * shapes[:, 2], shapes[:, 2], ones), dim=-1)[:, None],
            first_cell=column(starts([len(model.field_nearest) for model in unique]), torch.int32)[:, None],
            nearest=_end_to_end([model.field_nearest for model in unique]),
        )

    def lookup(self, points: Tensor, normals: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find the nearest surface of oriented points, both (B, ..., 3), in the frame of the object.

        Returns position and normal (B, ..., 3), how far the surface faces the same way as the point, 0..1 (B, ...), and
        the index of the sample (B, ...). A point whose nearest sample faces the other way belongs to the other side of
        that wall. Beyond the grid the answer is that of its border: far away, hence never mistaken for a fit.
        """
        flat = points.reshape(len(points), -1, 3)
        cell = ((flat - self.origin_m) * (1.0 / self.cell_m)[:, None, None]).to(torch.int32)
        cell = torch.minimum(cell.clamp(min=0), self.last_cell)
        index = (cell * self.stride).sum(dim=-1, dtype=torch.int32) + self.first_cell
        sample = self.nearest.index_select(0, index.reshape(-1)).reshape(index.shape) + self.first_sample[:, None]
        found = self.surface.index_select(0, sample.reshape(-1)).reshape(*points.shape[:-1], 7)
        position, normal, thickness = found[..., :3], found[..., 3:6], found[..., 6:]
        facing = (normals * normal).sum(dim=-1, keepdim=True)
        other = (facing < 0) & (thickness > 0)
        position = torch.where(other, position - thickness * normal, position)
        normal = torch.where(other, -normal, normal)
        signed = self.oriented.reshape(-1, *(1,) * (points.dim() - 1)) & ~other
        facing = torch.where(signed, facing.clamp(min=0), facing.abs())
        return position, normal, facing[..., 0], sample.reshape(points.shape[:-1])


def _end_to_end(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
