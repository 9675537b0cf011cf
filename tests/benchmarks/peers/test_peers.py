"""The peers: their input arrives unchanged, and each finds an object that is plain to see."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.accuracy import bop
from benchmarks.accuracy.cases import Row
from benchmarks.peers import ask, job
from posekit.render import depth_to_points, render
from posekit.synthetic.shapes import SHAPES, rotation

K = np.array([[600.0, 0, 319.5], [0, 600.0, 239.5], [0, 0, 1]])


def seen_from_above() -> tuple[job.Job, np.ndarray[Any, Any]]:
    """Return a housing that stands alone 0.5 m away, and its pose."""
    T_cam_obj = np.eye(4)
    T_cam_obj[:3, :3] = rotation((1, 0.2, 0.1), 130)
    T_cam_obj[:3, 3] = 0.02, -0.01, 0.5
    mesh = SHAPES["housing"]().mesh
    depth_m = render([mesh], [T_cam_obj], K, 640, 480).depth_m
    points_m = depth_to_points(depth_m, K)[depth_m > 0]
    one = job.Job(vertices_m={"housing": mesh.vertices_m}, faces={"housing": mesh.faces}, cases=[("housing", points_m)])
    return one, T_cam_obj


def test_a_job_arrives_as_it_was_written(tmp_path: Path) -> None:
    sent, _ = seen_from_above()
    job.write_job(tmp_path / "job.npz", sent)
    got = job.read_job(tmp_path / "job.npz")
    assert [name for name, _ in got.cases] == ["housing"]
    assert np.array_equal(got.cases[0][1], sent.cases[0][1])
    assert np.array_equal(got.vertices_m["housing"], sent.vertices_m["housing"])
    assert np.array_equal(got.faces["housing"], sent.faces["housing"])


class MiddleFinder:
    """A peer that puts the object in the middle of its points, and finds nothing in a few points."""

    def prepare(self, vertices_m: job.Array, faces: job.Array) -> job.Array:
        return vertices_m.mean(axis=0)

    def solve(self, model: job.Array, points_m: job.Array) -> job.Array | None:
        T_cam_obj = np.eye(4)
        T_cam_obj[:3, 3] = points_m.mean(axis=0) - model
        return T_cam_obj if len(points_m) > 3 else None


def test_a_peers_answers_are_in_order_and_what_it_does_not_find_is_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = seen_from_above()
    name, points_m = one.cases[0]
    job.write_job(
        tmp_path / "job.npz",
        job.Job(
            vertices_m=one.vertices_m,
            faces=one.faces,
            cases=[(name, points_m), (name, points_m[:0]), (name, points_m[:2])],
        ),
    )
    monkeypatch.setattr(sys, "argv", ["peer", str(tmp_path / "job.npz"), str(tmp_path / "answer.npz")])
    job.run(MiddleFinder())
    answer = job.read_answer(tmp_path / "answer.npz")
    assert np.allclose(answer.T_cam_obj[0, :3, 3], points_m.mean(axis=0) - one.vertices_m[name].mean(axis=0))
    assert np.isnan(answer.T_cam_obj[1:]).all()
    assert answer.seconds.shape == (3,)
    assert answer.prepare_s.shape == (1,)


def test_surface_points_lie_on_the_surface_with_its_normals() -> None:
    corner = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3.0]], dtype=np.float32)
    faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2]])  # the three sides of a corner, in z, y and x
    points, normals = job.surface_points(corner, faces, 6000, seed=1)
    side = np.abs(normals).argmax(axis=1)
    assert np.allclose(points[np.arange(len(points)), side], 0, atol=1e-6)
    assert np.allclose(normals[np.arange(len(points)), side], -1)
    areas = np.array([3.0, 1.5, 1.0])  # of the sides with normals in x, y and z
    assert np.bincount(side) / len(side) == pytest.approx(areas / areas.sum(), abs=0.03)


def test_a_spread_is_even_and_no_more_than_there_is() -> None:
    facts: dict[str, Any] = {"quality": "exact", "object": "a", "asked": "a", "visibility": 1.0, "status": "ok"}
    rows = [Row(scene=scene, index=0, seconds=0.1, **facts) for scene in range(10)]
    assert [row.scene for row in ask.spread(rows, 4)] == [0, 3, 6, 9]
    assert ask.spread(rows, 99) == rows


def test_without_their_environment_the_peers_say_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ask.PeerFailed, match="make peers"):
        ask.ask("open3d", seen_from_above()[0], 1, tmp_path / "python")


def test_a_peer_that_cannot_run_says_why() -> None:
    with pytest.raises(ask.PeerFailed, match="ppf_match_3d"):  # this OpenCV is without contrib
        ask.ask("opencv", seen_from_above()[0], 1, Path(sys.executable))


@pytest.mark.slow
@pytest.mark.skipif(not ask.PYTHON.exists(), reason="the peers have no environment: make peers")
@pytest.mark.parametrize("name", ask.PEERS)
def test_each_peer_finds_an_object_that_stands_alone(name: str) -> None:
    one, T_cam_obj = seen_from_above()
    answer = ask.ask(name, one, threads=1)
    target = bop.prepare_target(SHAPES["housing"]().mesh, SHAPES["housing"]().symmetries)
    error_m = bop.mssd_m(answer.T_cam_obj[0], T_cam_obj, target.hull_m, target.transforms)
    assert error_m < 0.1 * target.diameter_m
