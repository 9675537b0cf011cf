"""The box that engines practise on."""

from __future__ import annotations

import numpy as np
import pytest

from posekit.render import depth_to_points
from posekit.synthetic.box import box_instance, box_mesh


@pytest.mark.parametrize("seed", range(4))
def test_what_the_camera_sees_is_the_boxs_surface(seed: int) -> None:
    instance = box_instance(seed, "box")
    points = depth_to_points(instance.depth_m, instance.K)[instance.mask].astype(np.float64)
    assert len(points) > 1000
    reach = np.linalg.norm(box_mesh().vertices_m, axis=1).max()
    assert np.linalg.norm(points - [0, 0, 0.6], axis=1).max() <= reach + 1e-6, "no point beyond its corners"
    assert np.linalg.norm(points - [0, 0, 0.6], axis=1).min() >= 0.02 - 1e-6, "none inside"
    assert instance.depth_m.dtype == np.float32
    assert not instance.depth_m[~instance.mask].any()


def test_a_seed_always_gives_the_same_picture_and_another_one_another() -> None:
    np.testing.assert_array_equal(box_instance(3, "box").depth_m, box_instance(3, "box").depth_m)
    assert (box_instance(3, "box").depth_m != box_instance(4, "box").depth_m).any()
