"""CAD files of every format, whole and broken; the claims of a file are checked before they are trusted."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

from posekit.errors import BadData, InvalidInput, PoseError, TooLarge
from posekit.io import images, meshes
from posekit.io.meshes import (
    RawMesh,
    content_id,
    diameter_m,
    health,
    load_mesh,
    resolve_unit,
    to_mesh,
    unreadable,
    unzip,
)
from tests.fuzzing import examples

REAL = Path(__file__).parents[3] / "../shared/real"
MANY = 2_000_000
FORMATS = ("ply", "obj", "stl", "glb", "off")
CORNERS = np.array([[0, 0, 0], [30, 0, 0], [0, 40, 0], [0, 0, 50]], float)
TETRAHEDRON = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])


def exported(mesh: trimesh.Trimesh | trimesh.Scene, cad_format: str, **options) -> bytes:
    data = mesh.export(file_type=cad_format, **options)
    return data if isinstance(data, bytes) else data.encode()


def box(cad_format: str) -> bytes:
    return exported(trimesh.creation.box((60, 40, 20)), cad_format)


def load(data: bytes, cad_format: str, max_faces: int = MANY, **others: bytes) -> RawMesh:
    return load_mesh({f"client's.{cad_format}": data, **others}, cad_format, max_faces)


def ply(header: str, body: bytes, kind: str = "ascii") -> bytes:
    return f"ply\nformat {kind} 1.0\n{header}\nend_header\n".encode() + body


def tetrahedron_ply(vertices: np.ndarray = CORNERS, faces: np.ndarray = TETRAHEDRON) -> bytes:
    header = (
        f"element vertex {len(vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {len(faces)}\nproperty list uchar int vertex_indices"
    )
    lines = [" ".join(map(str, row)) for row in vertices] + [" ".join(map(str, [len(row), *row])) for row in faces]
    return ply(header, "\n".join(lines).encode())


def same_surface(raw: RawMesh, mesh: trimesh.Trimesh) -> bool:
    """Same triangles, wherever their corners stand in the list."""
    ours = np.sort(raw.vertices[raw.faces].mean(axis=1).round(3), axis=0)
    theirs = np.sort(mesh.vertices[mesh.faces].mean(axis=1).round(3), axis=0)
    return ours.shape == theirs.shape and np.allclose(ours, theirs, atol=2e-3)


# -------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("cad_format", FORMATS)
def test_every_format_gives_the_same_closed_body(cad_format):
    mesh = trimesh.creation.torus(40, 12)
    raw = load(exported(mesh, cad_format), cad_format)
    assert same_surface(raw, mesh)
    assert len(raw.vertices) == len(mesh.vertices)
    assert raw.warnings == []
    assert health(raw, to_mesh(raw, "mm")).watertight


def test_an_ascii_stl_is_read():
    mesh = trimesh.creation.torus(40, 12)
    raw = load(exported(mesh, "stl_ascii"), "stl")
    assert same_surface(raw, mesh)
    assert len(raw.vertices) == len(mesh.vertices)


def test_a_binary_stl_that_begins_with_solid_is_read_as_binary():
    data = b"solid facet".ljust(80) + exported(trimesh.creation.box(), "stl")[80:]
    assert len(load(data, "stl").faces) == 12


@pytest.mark.parametrize("encoding", ["ascii", "binary"])
def test_vertex_colours_of_a_ply_are_kept(encoding):
    mesh = trimesh.creation.box((60, 40, 20))
    mesh.visual.vertex_colors = np.column_stack([np.arange(24).reshape(8, 3) * 10, np.full(8, 255)]).astype(np.uint8)
    raw = load(exported(mesh, "ply", encoding=encoding), "ply")
    place = {tuple(vertex): color for vertex, color in zip(raw.vertices, raw.vertex_colors.tolist(), strict=True)}
    for vertex, color in zip(mesh.vertices, mesh.visual.vertex_colors.tolist(), strict=True):
        assert place[tuple(vertex)] == color[:3]


def test_face_colours_become_vertex_colours_and_the_body_stays_closed():
    header = (
        "element vertex 4\nproperty float x\nproperty float y\nproperty float z\nelement face 4\n"
        "property list uchar int vertex_index\nproperty uchar red\nproperty uchar green\nproperty uchar blue"
    )
    rows = [" ".join(map(str, row)) for row in CORNERS]
    rows += [f"3 {' '.join(map(str, face))} {10 * index} 0 200" for index, face in enumerate(TETRAHEDRON)]
    raw = load(ply(header, "\n".join(rows).encode()), "ply")
    colors = raw.vertex_colors[raw.faces]
    assert np.array_equal(colors[:, 0], colors[:, 1])
    assert sorted(colors[:, 0, 0].tolist()) == [0, 10, 20, 30]
    assert health(raw, to_mesh(raw, "mm")).watertight


def test_colours_as_fractions_are_understood():
    header = (
        "element vertex 3\nproperty float x\nproperty float y\nproperty float z\nproperty float red\n"
        "property float green\nproperty float blue\nelement face 1\nproperty list uchar int vertex_index"
    )
    raw = load(ply(header, b"0 0 0 1 0.5 0\n9 0 0 1 0.5 0\n0 9 0 1 0.5 0\n3 0 1 2"), "ply")
    assert raw.vertex_colors.tolist() == [[255, 128, 0]] * 3


@pytest.mark.parametrize("kind, order", [("binary_little_endian", "<"), ("binary_big_endian", ">"), ("ascii", "")])
def test_mixed_polygons_and_unknown_elements_of_a_ply_are_read(kind, order):
    header = (
        "comment made by hand\nelement camera 1\nproperty list uchar short view\nproperty double focus\n"
        "element vertex 5\nproperty double x\nproperty double y\nproperty double z\nproperty uchar quality\n"
        "element face 5\nproperty list uchar uint vertex_indices\nproperty list uchar float texcoord\n"
        "element edge 1\nproperty int vertex1\nproperty int vertex2"
    )
    corners = [(0, 0, 0), (40, 0, 0), (40, 40, 0), (0, 40, 0), (20, 20, 30)]
    polygons = [(3, 2, 1, 0), (0, 1, 4), (1, 2, 4), (2, 3, 4), (3, 0, 4)]
    if kind == "ascii":
        lines = ["2 7 -7 1.5"] + [f"{x} {y} {z} 1" for x, y, z in corners]
        lines += [f"{len(one)} {' '.join(map(str, one))} {2 * len(one)} {'0.5 ' * 2 * len(one)}" for one in polygons]
        body = "\n".join([*lines, "0 1"]).encode()
    else:
        body = struct.pack(f"{order}Bhhd", 2, 7, -7, 1.5)
        body += b"".join(struct.pack(f"{order}dddB", *corner, 1) for corner in corners)
        for one in polygons:
            body += struct.pack(
                f"{order}B{len(one)}IB{2 * len(one)}f", len(one), *one, 2 * len(one), *[0.5] * 2 * len(one)
            )
        body += struct.pack(f"{order}ii", 0, 1)
    raw = load(ply(header, body, kind), "ply")
    assert len(raw.faces) == 6
    assert health(raw, to_mesh(raw, "mm")).watertight
    assert raw.vertex_colors is None


def textured_obj() -> dict[str, bytes]:
    """Return a square whose left half is red and right half green, by a texture."""
    texture = np.zeros((4, 8, 3), np.uint8)
    texture[:, :4, 0] = 255
    texture[:, 4:, 1] = 255
    obj = (
        b"mtllib tex\\square.mtl\nusemtl paint\nv 0 0 0\nv 10 0 0\nv 10 10 0\nv 0 10 0\n"
        b"vt 0.1 0.1\nvt 0.9 0.1\nvt 0.9 0.9\nvt 0.1 0.9\nf 1/1 2/2 3/3 4/4\n"
    )
    return {
        "square.obj": obj,
        "square.mtl": b"newmtl paint\nKd 1 1 1\nmap_Kd ../images/Paint.png\n",
        "paint.PNG": images.encode_png(texture),
    }


def test_the_texture_of_an_obj_becomes_vertex_colours():
    raw = load_mesh(textured_obj(), "obj", MANY)
    assert [tuple(color) for color in raw.vertex_colors] == [
        (255, 0, 0) if vertex[0] == 0 else (0, 255, 0) for vertex in raw.vertices
    ]
    assert raw.warnings == []


def test_an_obj_with_a_colour_and_no_texture_is_painted():
    files = textured_obj() | {"square.mtl": b"newmtl paint\nKd 0 0 1\n"}
    assert load_mesh(files, "obj", MANY).vertex_colors.tolist() == [[0, 0, 255]] * 4


def test_files_that_an_obj_misses_are_named_in_a_warning():
    files = textured_obj()
    raw = load_mesh({"square.obj": files["square.obj"]}, "obj", MANY)
    assert raw.warnings == ["the mesh refers to 'square.mtl', which was not sent: its colours are missing"]
    assert raw.vertex_colors is None
    raw = load_mesh({name: files[name] for name in ("square.obj", "square.mtl")}, "obj", MANY)
    assert raw.warnings == ["the mesh refers to 'paint.png', which was not sent: its colours are missing"]


def test_a_broken_texture_costs_the_colours_only():
    files = textured_obj() | {"paint.PNG": b"\x89PNG\r\n\x1a\n" + bytes(50)}
    raw = load_mesh(files, "obj", MANY)
    assert len(raw.faces) == 2


def test_the_texture_of_a_ply_is_used_where_it_was_sent():
    header = (
        "comment TextureFile paint.png\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
        "property float texture_u\nproperty float texture_v\nelement face 1\nproperty list uchar int vertex_indices"
    )
    data = ply(header, b"0 0 0 0.1 0.5\n9 0 0 0.9 0.5\n0 9 0 0.1 0.5\n3 0 1 2")
    raw = load_mesh({"a.ply": data, "paint.PNG": textured_obj()["paint.PNG"]}, "ply", MANY)
    assert raw.vertex_colors.tolist() == [[255, 0, 0], [0, 255, 0], [255, 0, 0]]
    assert "'paint.png', which was not sent" in load(data, "ply").warnings[0]


def test_the_texture_of_a_glb_becomes_vertex_colours():
    raw = load_mesh(textured_obj(), "obj", MANY)
    texture = trimesh.visual.texture.TextureVisuals(
        uv=np.array([[0.1, 0.1], [0.9, 0.1], [0.9, 0.9], [0.1, 0.9]]),
        image=__import__("PIL.Image").Image.open(io.BytesIO(textured_obj()["paint.PNG"])),
    )
    square = trimesh.Trimesh(
        [[0, 0, 0], [10, 0, 0], [10, 10, 0], [0, 10, 0]], [[0, 1, 2], [0, 2, 3]], visual=texture, process=False
    )
    from_glb = load(exported(square, "glb"), "glb")
    assert {tuple(v): tuple(c) for v, c in zip(from_glb.vertices, from_glb.vertex_colors, strict=True)} == {
        tuple(v): tuple(c) for v, c in zip(raw.vertices, raw.vertex_colors, strict=True)
    }


def test_the_bodies_of_a_scene_are_joined_each_at_its_place_and_never_inside_out():
    scene = trimesh.Scene()
    cube = trimesh.creation.box((10, 10, 10))
    scene.add_geometry(cube)
    scene.add_geometry(cube, transform=trimesh.transformations.translation_matrix([100, 0, 0]))
    scene.add_geometry(
        cube, transform=np.diag([-1.0, 1.0, 1.0, 1.0]) @ trimesh.transformations.translation_matrix([50, 0, 0])
    )
    raw = load(exported(scene, "glb"), "glb")
    assert np.ptp(raw.vertices, axis=0).tolist() == [160.0, 10.0, 10.0]
    assert len(raw.faces) == 36
    assert trimesh.Trimesh(raw.vertices, raw.faces, process=False).volume == pytest.approx(3000)


@pytest.mark.skipif(not REAL.exists(), reason="the real frames are not beside the project")
def test_real_models_are_read_and_healthy():
    raw = load((REAL / "lmo_can/obj_000005.ply").read_bytes(), "ply")
    assert raw.vertices.shape == raw.vertex_colors.shape == (22831, 3)
    assert raw.faces.shape == (45666, 3)
    report = health(raw, to_mesh(raw, "mm"))
    assert report.warnings == []
    assert report.diameter_mm == pytest.approx(201.404, abs=1e-3)  # as BOP's models_info.json has it
    assert resolve_unit(raw, "auto", "ply")[0] == "mm"
    mustard = load((REAL / "ycbv_mustard/obj_000005.ply").read_bytes(), "ply")
    assert mustard.faces.shape == (15728, 3)
    assert mustard.vertex_colors is None


# ------------------------------------------------------------------------------------------------------------ cleaning


def test_unused_vertices_are_dropped_and_equal_ones_merged():
    vertices = np.concatenate([CORNERS, [[900, 900, 900]], CORNERS])
    faces = np.concatenate([TETRAHEDRON[:2], TETRAHEDRON[2:] + 5])
    raw = load(tetrahedron_ply(vertices, faces), "ply")
    assert np.array_equal(raw.vertices, CORNERS)
    assert np.array_equal(raw.faces, TETRAHEDRON)


def test_degenerate_faces_are_dropped_and_counted():
    raw = load(
        tetrahedron_ply(np.concatenate([CORNERS, [[15, 0, 0]]]), np.concatenate([TETRAHEDRON, [[0, 0, 1], [0, 4, 1]]])),
        "ply",
    )
    assert len(raw.faces) == 4
    assert len(raw.vertices) == 4
    assert raw.warnings == ["2 degenerate faces (without area) were dropped"]


def test_a_mesh_of_degenerate_faces_only_is_refused():
    with pytest.raises(InvalidInput, match="all its triangles are degenerate"):
        load(tetrahedron_ply(CORNERS, np.array([[0, 0, 1], [2, 2, 2]])), "ply")
    with pytest.raises(InvalidInput, match="degenerate"):
        load(tetrahedron_ply(np.ones((4, 3))), "ply")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("cad_format", FORMATS)
def test_a_vertex_that_is_no_number_is_refused(cad_format, value):
    vertices = CORNERS.copy()
    vertices[3, 1] = value
    if cad_format == "ply":
        data = tetrahedron_ply(vertices)
    else:
        with np.errstate(invalid="ignore"):
            data = exported(trimesh.Trimesh(vertices, TETRAHEDRON, process=False, validate=False), cad_format)
    with pytest.raises((InvalidInput, BadData)) as caught:
        load(data, cad_format)
    if cad_format in ("ply", "stl", "obj"):
        assert isinstance(caught.value, InvalidInput)
        assert "NaN or infinite" in caught.value.detail


def test_an_unused_vertex_may_be_anything():
    assert len(load(tetrahedron_ply(np.concatenate([CORNERS, [[np.nan] * 3]])), "ply").vertices) == 4


def test_absurd_coordinates_are_refused():
    with pytest.raises(InvalidInput, match="no unit makes that an object"):
        load(tetrahedron_ply(CORNERS * 1e30), "ply")


# --------------------------------------------------------------------------------------------------- broken, too large


@pytest.mark.parametrize("cad_format", FORMATS)
def test_an_empty_file_is_bad_data(cad_format):
    with pytest.raises(BadData, match="empty") as caught:
        load_mesh({"model": b""}, cad_format, MANY, "cad")
    assert caught.value.field == "cad"


@pytest.mark.parametrize("cad_format", FORMATS)
@pytest.mark.parametrize("content", FORMATS)
def test_a_wrong_extension_is_told_with_what_the_file_looks_like(cad_format, content):
    if cad_format == content:
        return
    with pytest.raises(BadData, match=f"sent as {cad_format.upper()} and looks like {content.upper()}"):
        load(box(content), cad_format)


@pytest.mark.parametrize("cad_format", FORMATS)
@pytest.mark.parametrize(
    "data", [b"hello", b"\0" * 50, b"<html>", b"\x89PNG\r\n\x1a\n", b"ply", b"glTF", b"solid", b"OFF"]
)
def test_what_is_no_mesh_is_bad_data(cad_format, data):
    with pytest.raises(BadData):
        load(data, cad_format)


STEP = b"ISO-10303-21;\nHEADER;\nFILE_DESCRIPTION((''),'2;1');\n"
IGES = b"an IGES file".ljust(72) + b"S      1\n" + b"1H,,1H;,".ljust(72) + b"G      1\n"
COLLADA = b'<?xml version="1.0"?>\n<COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema" version="1.4.1">'
GLTF = b'{"asset": {"version": "2.0"}, "meshes": []}'


def three_mf() -> bytes:
    return zipped({"[Content_Types].xml": b"<Types/>", "_rels/.rels": b"", "3D/3dmodel.model": b"<model/>" * 20_000})


@pytest.mark.parametrize("cad_format", [*FORMATS, "zip"])
@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: STEP, "a STEP file, a CAD format without triangles: export the part .* as a mesh .* or tessellate"),
        (lambda: IGES, "an IGES file, a CAD format without triangles: .* FreeCAD"),
        (lambda: COLLADA, "COLLADA .* export the model as GLB or OBJ"),
        (three_mf, "3MF .* export the part as STL, PLY or OBJ"),
        (lambda: GLTF, "glTF in text form, .* as GLB"),
    ],
    ids=["step", "iges", "dae", "3mf", "gltf"],
)
def test_a_known_format_that_is_not_read_says_what_to_do(cad_format, make, words):
    with pytest.raises(InvalidInput, match=words) as caught:
        load_mesh({f"model.{cad_format}": make()}, cad_format, MANY, "cad")
    assert caught.value.field == "cad"


@pytest.mark.parametrize("ending", ["step", "stp", "p21", "iges", "igs", "dae", "3mf", "gltf"])
def test_a_known_format_that_is_not_read_is_known_by_its_ending(ending):
    assert "export" in unreadable(ending)
    with pytest.raises(InvalidInput, match="holds no mesh; of a file in it: this is"):
        load_mesh({"model.zip": zipped({f"PART.{ending.upper()}": b"x", "readme.txt": b""})}, "zip", MANY)


def test_an_ending_of_no_known_format_has_no_words():
    assert unreadable("ply") is None
    assert unreadable("docx") is None


def test_an_unknown_format_is_refused():
    with pytest.raises(InvalidInput, match="cad_format 'step' is unknown"):
        load(box("ply"), "step")


@pytest.mark.parametrize("cad_format", ["ply", "stl", "glb", "off"])
def test_a_mesh_cut_short_is_bad_data(cad_format):
    for source in (
        box(cad_format),
        exported(trimesh.creation.box(), "stl_ascii") if cad_format == "stl" else box(cad_format),
    ):
        for length in range(0, len(source) - 2, 41):
            with pytest.raises(BadData):
                load(source[:length], cad_format)


def claiming(vertices: int, faces: int, kind: str = "ascii") -> bytes:
    return ply(
        f"element vertex {vertices}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {faces}\nproperty list uchar int vertex_indices",
        b"1 2 3\n",
        kind,
    )


@pytest.mark.parametrize(
    "data, cad_format",
    [
        (claiming(9, 10**9), "ply"),
        (claiming(9 * 10**9, 1), "ply"),
        (claiming(9, 10**9, "binary_little_endian"), "ply"),
        (bytes(80) + struct.pack("<I", 10**9) + bytes(50), "stl"),
        (b"OFF\n8 1000000000 0\n0 0 0\n", "off"),
        (b"OFF\n1000000000 8 0\n0 0 0\n", "off"),
    ],
)
def test_a_tiny_file_that_claims_a_billion_is_refused_at_once(data, cad_format):
    start = time.perf_counter()
    with pytest.raises(TooLarge, match="simplify it"):
        load(data, cad_format)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("kind", ["ascii", "binary_little_endian"])
def test_a_ply_that_claims_more_than_it_holds_is_bad_data(kind):
    with pytest.raises(BadData, match="claims more than the file holds"):
        load(claiming(10**6, 1, kind), "ply")


@pytest.mark.parametrize("cad_format", FORMATS)
def test_more_faces_than_allowed_are_refused(cad_format):
    with pytest.raises(TooLarge, match="simplify it"):
        load(exported(trimesh.creation.icosphere(subdivisions=2), cad_format), cad_format, max_faces=100)


def test_polygons_count_by_their_triangles():
    header = (
        "element vertex 8\nproperty float x\nproperty float y\nproperty float z\n"
        "element face 1\nproperty list uchar int vertex_indices"
    )
    angles = np.arange(8) * np.pi / 4
    body = "\n".join(f"{9 * np.cos(a)} {9 * np.sin(a)} 0" for a in angles) + "\n8 0 1 2 3 4 5 6 7"
    assert len(load(ply(header, body.encode()), "ply", max_faces=6).faces) == 6
    with pytest.raises(TooLarge, match="6 faces, more than the limit of 5"):
        load(ply(header, body.encode()), "ply", max_faces=5)


@pytest.mark.parametrize("index", [4, -1, 2**31 - 1, -(2**31), 1.5, 1e300])
def test_a_face_that_points_nowhere_is_bad_data(index):
    faces = TETRAHEDRON.astype(object)
    faces[2, 1] = index
    with pytest.raises(BadData, match="vertex that does not exist"):
        load(tetrahedron_ply(CORNERS, faces), "ply")


@pytest.mark.parametrize("cad_format", ["obj", "off", "glb"])
def test_a_face_that_points_nowhere_is_bad_data_in_other_formats_too(cad_format):
    data = {
        "obj": b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n",
        "off": b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 9\n",
        "glb": exported(trimesh.Trimesh(CORNERS, TETRAHEDRON, process=False), "glb"),
    }[cad_format]
    if cad_format == "glb":
        indices = TETRAHEDRON.astype("<u4").tobytes()
        assert indices in data
        data = data.replace(indices, (TETRAHEDRON + 90).astype("<u4").tobytes())
    with pytest.raises(BadData):
        load(data, cad_format)


@pytest.mark.parametrize(
    "data, cad_format",
    [
        (ply("element vertex 3\nproperty float x\nproperty float y\nproperty float z", b"0 0 0\n1 0 0\n0 1 0"), "ply"),
        (tetrahedron_ply(CORNERS, TETRAHEDRON[:0]), "ply"),
        (b"v 0 0 0\nv 1 0 0\nv 0 1 0\n", "obj"),
        (bytes(84), "stl"),
        (b"solid nothing\nendsolid nothing\n", "stl"),
        (b"OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "off"),
        (exported(trimesh.Scene([trimesh.PointCloud(CORNERS)]), "glb"), "glb"),
    ],
)
def test_a_mesh_without_faces_is_refused(data, cad_format):
    with pytest.raises(InvalidInput, match="no faces; a point cloud is not enough"):
        load(data, cad_format)


def glb_with(**changes) -> bytes:
    """Return a box whose JSON was changed by hand."""
    data = box("glb")
    (length,) = struct.unpack_from("<I", data, 12)
    tree = json.loads(data[20 : 20 + length]) | changes
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    rest = data[20 + length :]
    return struct.pack("<4sIIII", b"glTF", 2, 20 + len(text) + len(rest), len(text), 0x4E4F534A) + text + rest


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"accessors": [{"componentType": 5126, "type": "VEC3", "count": 10**9}]}, BadData),
        ({"accessors": [{"bufferView": 0, "componentType": 5126, "type": "VEC3", "count": 10**9}]}, TooLarge),
        ({"accessors": [{"bufferView": 0, "componentType": 5126, "type": "VEC3", "count": -1}]}, BadData),
        ({"accessors": [{"bufferView": 0, "componentType": 5126, "type": "VEC3", "count": "9"}]}, BadData),
        ({"accessors": "x"}, BadData),
        ({"nodes": [{"children": [1, 1]}, {"children": [0]}]}, BadData),
        ({"scenes": [{"nodes": [0]}], "nodes": [{"children": [0]}]}, BadData),
        ({"buffers": [{"uri": "/etc/passwd", "byteLength": 10}]}, BadData),
        ({"buffers": [{"uri": "http://127.0.0.1:9/x", "byteLength": 10}]}, BadData),
        ({"extensionsRequired": ["KHR_draco_mesh_compression"]}, InvalidInput),
        ({"meshes": [{"primitives": [{"attributes": {"POSITION": 77}}]}]}, BadData),
    ],
)
def test_a_glb_made_to_harm_is_refused(changes, error):
    with pytest.raises(error):
        load(glb_with(**changes), "glb")


def test_a_body_instanced_a_million_times_is_refused():
    nodes = [{"mesh": 0} for _ in range(300)]
    data = glb_with(nodes=nodes, scenes=[{"nodes": list(range(300))}], scene=0)
    with pytest.raises(TooLarge, match="simplify it"):
        load(data, "glb", max_faces=1000)


def test_no_file_beside_the_given_ones_is_ever_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.mtl").write_bytes(b"newmtl paint\nKd 0 0 1\n")
    obj = b"v 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl paint\nf 1 2 3\n"
    for name in (
        b"secret.mtl",
        str(tmp_path / "secret.mtl").encode(),
        b"file://" + str(tmp_path / "secret.mtl").encode(),
    ):
        raw = load(b"mtllib " + name + b"\n" + obj, "obj")
        assert raw.vertex_colors is None
        assert raw.warnings == ["the mesh refers to 'secret.mtl', which was not sent: its colours are missing"]


def test_reading_prints_nothing(capfd):
    for cad_format in FORMATS:
        load(box(cad_format), cad_format)
        with contextlib.suppress(PoseError):
            load(box(cad_format)[:-9], cad_format)
    assert capfd.readouterr() == ("", "")


@settings(max_examples=examples(200), deadline=None)
@given(
    cad_format=st.sampled_from([*FORMATS, "stl_ascii"]),
    position=st.floats(0, 1, exclude_max=True),
    noise=st.binary(min_size=1, max_size=6) | st.sampled_from([b"-1", b"99", b"nan", b"\n", b" ", b"9999999"]),
)
def test_noise_in_a_mesh_raises_nothing_but_our_errors(cad_format, position, noise):
    source = box(cad_format)
    start = int(position * len(source))
    with contextlib.suppress(PoseError):
        raw = load(source[:start] + noise + source[start + len(noise) :], cad_format[:3], max_faces=10_000)
        assert np.isfinite(raw.vertices).all()
        assert raw.faces.min() >= 0
        assert raw.faces.max() < len(raw.vertices)


@settings(max_examples=examples(200), deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(
        [b"ply\n", b"ply\nformat ascii 1.0\n", b"glTF\2\0\0\0", b"OFF\n", b"solid facet\n", b"v 1 2 3\n", b""]
    ),
    st.text("0123456789 .-\nfv/elmntprofaxyzsdcou", max_size=120).map(str.encode) | st.binary(max_size=120),
)
def test_garbage_raises_nothing_but_our_errors(cad_format, start, garbage):
    with contextlib.suppress(PoseError):
        load(start + garbage, cad_format, max_faces=10_000)


# ----------------------------------------------------------------------------------------------------------------- zip


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_zip_of_an_obj_with_its_texture_is_read():
    files = textured_obj()
    data = zipped(
        {
            "scan/square.obj": files["square.obj"],
            "scan/tex/square.mtl": files["square.mtl"],
            "scan/images/paint.PNG": files["paint.PNG"],
            "__MACOSX/scan/square.obj": b"x",
            "scan/.DS_Store": b"x",
        }
    )
    assert unzip(data) == files
    assert load_mesh({"any name": data}, "zip", MANY).vertex_colors is not None


@pytest.mark.parametrize("name", ["../evil.obj", "/etc/evil.obj", "a/../../evil.obj", "..\\evil.obj", "C:\\evil.obj"])
def test_a_name_that_leaves_the_zip_is_bad_data(name):
    with pytest.raises(BadData, match="leads out of it"):
        unzip(zipped({name: b"v 0 0 0"}))


def test_a_zip_bomb_is_refused():
    data = zipped({f"{index}.obj": bytes(1 << 20) for index in range(4)})
    with pytest.raises(TooLarge, match="unpacks to more than 3000000 bytes"):
        unzip(data, max_bytes=3_000_000)
    with pytest.raises(TooLarge, match="holds 4 files, more than 3"):
        unzip(data, max_files=3)


def test_a_zip_that_lies_about_its_sizes_is_refused():
    data = bytearray(zipped({"a.obj": bytes(100_000)}))
    central = data.index(b"PK\1\2")
    struct.pack_into("<I", data, central + 24, 10)
    struct.pack_into("<I", data, 22, 10)
    with pytest.raises(PoseError):
        unzip(bytes(data))


@pytest.mark.parametrize("files", [{}, {"a.txt": b"x"}, {"a.obj": b"x", "b.ply": b"y"}])
def test_a_zip_must_hold_one_mesh(files):
    with pytest.raises(InvalidInput, match="it must hold one"):
        load_mesh({"model.zip": zipped(files)}, "zip", MANY)


def test_other_zips_that_cannot_be_used_are_refused():
    with pytest.raises(InvalidInput, match="two files named"):
        unzip(zipped({"a/x.png": b"1", "b/x.png": b"2"}))
    with pytest.raises(InvalidInput, match="unusual compression"):
        unzip(zipped({"a.obj": b"1"}, zipfile.ZIP_LZMA))
    encrypted = bytearray(zipped({"a.obj": b"1"}))
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
    with pytest.raises(InvalidInput, match="encrypted"):
        unzip(bytes(encrypted))
    whole = zipped({"a.obj": bytes(range(256)) * 9})
    for length in range(0, len(whole), 17):
        with pytest.raises(BadData):
            unzip(whole[:length])


@settings(max_examples=examples(150), deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4))
def test_noise_in_a_zip_raises_nothing_but_our_errors(position, noise):
    source = zipped(textured_obj())
    start = int(position * len(source))
    with contextlib.suppress(PoseError):
        unzip(source[:start] + noise + source[start + len(noise) :])


# ------------------------------------------------------------------------------------------------- units, health, ids


@pytest.mark.parametrize("scale, unit", [(1.0, "mm"), (0.001, "m"), (0.05, "m"), (20.0, "mm")])
def test_auto_guesses_the_unit_and_says_so(scale, unit):
    raw = load(exported(trimesh.creation.box((30 * scale, 40 * scale, 0.001)), "ply"), "ply")  # 50 across, or 0.05
    guess, note = resolve_unit(raw, "auto", "glb")
    assert guess == unit
    assert "metres" in note
    assert f'send model_unit: "{"m" if unit == "mm" else "mm"}"' in note


def test_a_unit_that_is_given_is_believed():
    raw = load(tetrahedron_ply(), "ply")
    assert resolve_unit(raw, "m", "ply") == ("m", None)
    assert resolve_unit(raw, "mm", "glb") == ("mm", None)


@pytest.mark.parametrize("cad_format", FORMATS)
def test_a_unit_that_is_not_given_is_the_formats(cad_format):
    assert resolve_unit(load(box(cad_format), cad_format), None, cad_format) == (
        "m" if cad_format == "glb" else "mm",
        None,
    )


def test_a_mesh_goes_to_metres():
    raw = load(tetrahedron_ply(), "ply")
    mesh = to_mesh(raw, "mm")
    assert mesh.vertices_m.dtype == np.float32
    assert mesh.faces.dtype == np.int32
    assert np.allclose(mesh.vertices_m, CORNERS / 1000)
    assert np.allclose(to_mesh(raw, "m").vertices_m, CORNERS)


def report_on(mesh: trimesh.Trimesh, unit="mm"):
    raw = load(exported(mesh, "ply"), "ply")
    return health(raw, to_mesh(raw, unit))


def test_a_healthy_mesh_has_nothing_to_report():
    report = report_on(trimesh.creation.box((60, 40, 20)))
    assert report.faces == 12
    assert report.watertight
    assert report.extents_mm == pytest.approx((60, 40, 20))
    assert report.diameter_mm == pytest.approx(np.sqrt(60**2 + 40**2 + 20**2))
    assert report.warnings == []


def test_a_tiny_mesh_is_suspected_to_be_in_metres():
    (warning,) = report_on(trimesh.creation.box((0.06, 0.04, 0.02))).warnings
    assert warning == 'the object is only 0.0748 mm across; if the file is in metres, send model_unit: "m"'


def test_a_huge_mesh_is_suspected_to_be_in_millimetres():
    (warning,) = report_on(trimesh.creation.box((60, 40, 20)), unit="m").warnings
    assert warning == 'the object is 74833 mm across; if the file is in millimetres, send model_unit: "mm"'


def test_holes_and_a_far_origin_are_reported():
    open_box = trimesh.creation.box((60, 40, 20))
    open_box.update_faces(np.arange(12) > 0)
    assert "not watertight" in report_on(open_box).warnings[0]
    far = trimesh.creation.box((60, 40, 20))
    far.apply_translation([1000, 0, 0])
    (warning,) = report_on(far).warnings
    assert warning.startswith("the mesh lies 1000 mm from its own origin")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 1, 1), (5, 5, 0), (1, 0, 0)])
def test_the_diameter_is_the_largest_distance(seed, shape):
    rng = np.random.default_rng(seed)
    points = (rng.random((3000, 3)) - 0.5) * shape
    assert diameter_m(points) == pytest.approx(pdist(points).max(), rel=1e-12)
    sphere = rng.normal(size=(3000, 3))
    sphere *= np.array(shape) / np.linalg.norm(sphere, axis=1, keepdims=True)
    assert diameter_m(sphere) == pytest.approx(pdist(sphere).max(), rel=1e-3)


def test_the_id_depends_on_unit_names_and_contents_and_nothing_else():
    files = {"a.obj": b"1", "b.mtl": b"2"}
    reference = content_id("mm", files)
    assert len(reference) == 64
    assert content_id("mm", dict(reversed(files.items()))) == reference
    others = [{"a.obj": b"1", "b.mtl": b"3"}, {"a.obj": b"1", "c.mtl": b"2"}, {"a.obj": b"1b.mtl", "": b"2"}, {}]
    assert len({reference, content_id("m", files), *(content_id("mm", other) for other in others)}) == 6


def test_a_single_file_has_the_same_id_whatever_its_name():
    reference = content_id("mm", {"model.ply": b"ply"})
    assert content_id("mm", {"My Mug (3).PLY": b"ply"}) == reference
    assert content_id("mm", {"model.obj": b"ply"}) != reference


def test_the_layout_behind_the_id_is_as_documented():
    def sized(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text

    blob = b"posekit-object-1\n" + sized(b"mm") + (1).to_bytes(8, "little") + sized(b"model.ply") + sized(b"data")
    assert content_id("mm", {"mug.ply": b"data"}) == hashlib.sha256(blob).hexdigest()


def test_importing_takes_neither_trimesh_nor_torch_nor_open3d():
    import subprocess
    import sys

    code = (
        "import sys, posekit.io.images, posekit.io.masks, posekit.io.meshes\n"
        "import posekit.unit_check, posekit.units, posekit.store\n"
        "assert not {'torch', 'open3d', 'trimesh', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
    assert meshes.FORMATS[-1] == "zip"
