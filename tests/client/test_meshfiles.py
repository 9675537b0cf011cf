"""Meshes as the server reads them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trimesh

from pem.meshfiles import read_cad, write_ply
from posekit.io.meshes import load_mesh

VERTICES = np.array([[0, 0, 0], [100, 0, 0], [0, 80.5, 0], [0, 0, 60.25]])
FACES = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]])


def read(ply: bytes) -> Any:
    return trimesh.load(trimesh.util.wrap_as_stream(ply), file_type="ply", process=False)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32])
@pytest.mark.parametrize("index", [np.int32, np.uint8, np.int64])
def test_triangles_are_read_as_they_were_written(kind: type[Any], index: type[Any]) -> None:
    found = read(write_ply(VERTICES.astype(kind), FACES.astype(index)))
    np.testing.assert_array_equal(found.vertices, VERTICES.astype(kind))
    np.testing.assert_array_equal(found.faces, FACES)


def test_float32_stays_and_everything_else_is_written_as_float64() -> None:
    assert b"property float x" in write_ply(VERTICES.astype(np.float32), FACES)
    assert b"property double x" in write_ply(VERTICES, FACES)
    assert b"property double x" in write_ply(VERTICES.tolist(), FACES.tolist())


def test_the_server_reads_a_mesh_with_its_colours() -> None:
    colors = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    mesh = trimesh.Trimesh(VERTICES, FACES, vertex_colors=colors, process=False)
    source, name, cad_format = read_cad(mesh, None)
    assert isinstance(source, bytes)
    assert (name, cad_format) == ("model.ply", "ply")
    loaded = load_mesh({name: source}, "ply", max_faces=100)
    assert loaded.vertex_colors is not None
    order = np.lexsort(VERTICES.T)
    again = np.lexsort(loaded.vertices.T)
    np.testing.assert_array_equal(loaded.vertices[again], VERTICES[order])
    np.testing.assert_array_equal(loaded.vertex_colors[again], colors[order, :3])


def test_a_mesh_without_colours_of_its_vertices_has_none() -> None:
    for mesh in (
        trimesh.Trimesh(VERTICES, FACES, process=False),
        trimesh.Trimesh(VERTICES, FACES, face_colors=np.full((4, 4), 9, np.uint8), process=False),
        SimpleNamespace(vertices=VERTICES, faces=FACES),
    ):
        source, _, _ = read_cad(mesh, "ply")
        assert isinstance(source, bytes)
        assert b"red" not in source


def test_files_and_bytes_pass_untouched(tmp_path: Path) -> None:
    assert read_cad("a/mug.STL", None) == (Path("a/mug.STL"), "mug.STL", None)
    assert read_cad(tmp_path / "mug", "obj") == (tmp_path / "mug", "mug", "obj")
    assert read_cad(b"solid", "stl") == (b"solid", "model.stl", "stl")


@pytest.mark.parametrize(
    "cad, cad_format, error, words",
    [
        (b"ply", None, ValueError, "needs cad_format: ply, obj"),
        ((VERTICES, FACES), "stl", ValueError, "a mesh is sent as PLY"),
        ((VERTICES[:, :2], FACES), None, ValueError, r"vertices must be \(n, 3\), not \(4, 2\)"),
        ((VERTICES, FACES[:, :2]), None, ValueError, r"faces must be \(n, 3\), not \(4, 2\)"),
        ((VERTICES, [[0, 1, 2], [0, 1]]), None, ValueError, "rows differ in length"),
        ((VERTICES, FACES * 1.0), None, ValueError, "faces must be integers"),
        ((VERTICES, FACES - 1), None, ValueError, "vertices 0 to 3; one names -1"),
        ((VERTICES, FACES + 1), None, ValueError, "vertices 0 to 3; one names 4"),
        ((VERTICES[:0], FACES), None, ValueError, "needs vertices and faces; this has 0 and 4"),
        ((VERTICES, np.zeros((0, 3), int)), None, ValueError, "needs vertices and faces; this has 4 and 0"),
        ((np.where(VERTICES == 0, np.nan, VERTICES), FACES), None, ValueError, "must be finite"),
        ((np.where(VERTICES == 0, np.inf, VERTICES), FACES), None, ValueError, "must be finite"),
        ((VERTICES.astype(str), FACES), None, ValueError, "must be numbers"),
        ((VERTICES,), None, TypeError, "not tuple"),
        (VERTICES, None, TypeError, "not ndarray"),
        (trimesh.Scene(), None, TypeError, "not Scene"),
    ],
    ids=str,
)
def test_what_is_no_mesh_is_refused_in_words(cad: Any, cad_format: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read_cad(cad, cad_format)


def test_colours_of_another_size_are_refused() -> None:
    colors: npt.NDArray[Any] = np.zeros((3, 3), np.uint8)
    with pytest.raises(ValueError, match=r"colors must be \(4, 3\) uint8, not \(3, 3\) uint8"):
        write_ply(VERTICES, FACES, colors)
