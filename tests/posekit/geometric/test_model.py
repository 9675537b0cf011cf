"""Objects of a batch side by side, and the nearest surface of a point."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from posekit.geometric.model import Prepared, Shelf, prepare
from tests.posekit.geometric.support import cuboid, mesh_of, onboarded, prepared

WALL_M = 0.004


@pytest.fixture(scope="module")
def sheet() -> Prepared:
    return prepare(onboarded(mesh_of(cuboid((0.1, 0.08, WALL_M)))), torch.device("cpu"))


@pytest.mark.parametrize("below_m", [-0.001, 0.001, 0.0015, 0.0025, 0.003])
def test_a_point_in_a_wall_belongs_to_the_side_that_it_faces(sheet: Prepared, below_m: float) -> None:
    """Also where the other side is nearer."""
    up = torch.tensor([0.0, 0, 1])
    height = WALL_M / 2 - below_m
    points = torch.tensor([[[0.0, 0, height], [0.01, -0.02, height], [-0.03, 0.01, height]]])
    position, normal, facing, _ = Shelf.of([sheet]).lookup(points, up.expand_as(points))
    assert position[..., 2] == pytest.approx(WALL_M / 2, abs=2e-4)
    assert normal == pytest.approx(up.expand_as(points), abs=1e-4)
    assert facing == pytest.approx(1, abs=1e-4)


def test_a_point_that_faces_into_a_solid_does_not_face_as_its_surface_does() -> None:
    solid = prepare(onboarded(mesh_of(cuboid((0.06, 0.08, 0.11)))), torch.device("cpu"))
    top = torch.tensor([[[0.0, 0, 0.055]]])
    facings = [Shelf.of([solid]).lookup(top, torch.tensor([[[0.0, 0, z]]]))[2].item() for z in (1.0, -1.0)]
    assert facings == [pytest.approx(1, abs=1e-4), 0]
    unsigned = dataclasses.replace(solid, oriented=False)
    facings = [Shelf.of([unsigned]).lookup(top, torch.tensor([[[0.0, 0, z]]]))[2].item() for z in (1.0, -1.0)]
    assert facings == [pytest.approx(1, abs=1e-4)] * 2


def test_a_point_far_outside_is_far_from_what_is_found(sheet: Prepared) -> None:
    points = torch.tensor([[[5.0, 0, 0], [0, -3, 0]]])
    position, _, _, _ = Shelf.of([sheet]).lookup(points, torch.ones_like(points))
    assert (points - position).norm(dim=-1).min() > 2


def test_objects_side_by_side_are_looked_up_each_in_its_own_field(sheet: Prepared) -> None:
    models = [prepared("wedge"), sheet, prepared("wedge"), prepared("gear")]
    points = torch.stack([one.surface[::400, :3] for one in models])
    normals = torch.stack([one.surface[::400, 3:6] for one in models])
    shelf = Shelf.of(models)
    position, _, _, sample = shelf.lookup(points, normals)
    assert len(shelf.surface) == 3 * shelf.samples  # the wedge is stored once
    for row, one in enumerate(models):
        alone, _, _, index = Shelf.of([one]).lookup(points[row : row + 1], normals[row : row + 1])
        assert torch.equal(position[row], alone[0])
        assert torch.equal(sample[row] - shelf.first_sample[row], index[0])


def test_an_object_without_colours_stands_beside_one_with_them(sheet: Prepared) -> None:
    shelf = Shelf.of([sheet, prepared("wedge")])
    assert shelf.coloured.tolist() == [False, True]
    assert shelf.colours is not None
    assert shelf.dense_colours is not None
    assert len(shelf.colours) == len(shelf.surface)
    assert len(shelf.dense_colours) == len(shelf.dense)
    assert Shelf.of([sheet]).colours is None


def test_models_with_other_numbers_of_samples_are_refused(sheet: Prepared) -> None:
    with pytest.raises(ValueError, match="same number"):
        Shelf.of([sheet, dataclasses.replace(sheet, surface=sheet.surface[:100])])
