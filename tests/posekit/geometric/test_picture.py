"""Poses drawn into the crop, compared with ray casting of the same poses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posekit.geometric.picture import Grid, draw, visible_surface
from posekit.render import render
from posekit.synthetic.shapes import SHAPES, rotation
from tests.posekit.geometric.support import at, cut, looked_at, nudged, photograph, poses_of, prepared


@pytest.mark.parametrize("name, z_m", [("housing", 0.6), ("mug", 0.5), ("bracket", 1.1)])
def test_a_pose_is_drawn_as_rays_meet_it(name: str, z_m: float) -> None:
    shape, model = SHAPES[name](), prepared(name)
    T = at(0.02, -0.01, z_m, rotation((1, 0.5, 0.3), 220))
    other = nudged(T, 25, 0.01)
    crop = cut(photograph([shape], [T]), 0)
    shelf, observations = looked_at(crop, model)
    grid = Grid(shelf, observations)
    drawn_m, sample = draw(shelf, observations, grid, poses_of([T, other], model))
    height, width = crop.mask.shape
    u, v = (((torch.arange(n) + 0.5) * grid.cell_px[0] - 0.5).numpy() for n in (grid.columns, grid.rows))
    columns, rows = np.rint(u).astype(int).clip(0, width - 1), np.rint(v).astype(int).clip(0, height - 1)
    assert np.array_equal(grid.mask[0].numpy(), crop.mask[np.ix_(rows, columns)])
    for index, pose in enumerate((T, other)):
        met_m = render([shape.mesh], [pose], crop.K, width, height).depth_m[np.ix_(rows, columns)]
        drawn = torch.isfinite(drawn_m[0, index]).numpy()
        union = drawn | (met_m > 0)
        assert (drawn & (met_m > 0)).sum() > 0.9 * union.sum()
        both = drawn & (met_m > 0)
        off_m = np.abs(drawn_m[0, index].numpy() - met_m)[both]
        assert np.median(off_m) < 0.8 * grid.cell_m[0].item()
        assert (off_m < 3 * grid.cell_m[0].item()).mean() > 0.97
        shown = shelf.dense[sample[0, index]][..., :3]
        depth_m = poses_of([pose], model).to_camera(shown.reshape(1, 1, -1, 3))[0, 0, :, 2].reshape(drawn.shape)
        assert depth_m[drawn].numpy() == pytest.approx(drawn_m[0, index].numpy()[drawn], abs=2e-5)


def test_the_surface_that_should_be_visible_faces_the_camera() -> None:
    model = prepared("housing")
    T = at(0.02, -0.01, 0.6, rotation((1, 0.5, 0.3), 220))
    shelf, _ = looked_at(cut(photograph([SHAPES["housing"]()], [T]), 0), model)
    poses = poses_of([T], model)
    points = visible_surface(shelf, poses, 200)
    met_m = render([SHAPES["housing"]().mesh], [T], np.array([[600.0, 0, 320], [0, 600, 240], [0, 0, 1]]), 640, 480)
    x, y, z = poses.to_camera(points)[0, 0].unbind(-1)
    seen = met_m.depth_m[(600 * y / z + 240).round().long(), (600 * x / z + 320).round().long()]
    assert (np.abs(seen - z.numpy()) < 0.006).mean() > 0.85
