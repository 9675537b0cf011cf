"""CAD models: from a client's files to vertices and faces, with every claim of the files checked before it is believed.

PLY, STL and OFF are read here (their headers claim counts, and PLY comes with mixed polygons and colours of many
kinds); OBJ and GLB are read by trimesh, which sees nothing but the files given. The result is one mesh in the file's
own unit; `resolve_unit`, `to_mesh` and `health` then say what it means in metres.

A mesh's content id is a sha256 over: the line `posekit-object-1`, the resolved unit, the number of files, and for each
file in the order of its name's UTF-8 bytes the name and the content. Every string and content is preceded by its
length in bytes, numbers being eight bytes, little-endian. A single file goes by the name `model.<format>`, so that a
client's name for it does not matter.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from posekit.engine import Mesh
from posekit.errors import BadData, InvalidInput, PoseError, TooLarge
from posekit.io import images

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]
Unit = Literal["mm", "m"]

FORMATS = ("ply", "obj", "stl", "glb", "off", "zip")
MAX_UNZIPPED_BYTES = 512 << 20
MAX_ZIP_FILES = 256
MAX_TEXTURE_MEGAPIXELS = 50.0
MAX_COORDINATE = 1e9  # in the file's unit
MANY_FACES = 500_000  # more than any pose engine gains from
METRES_BELOW = 3.0  # unit "auto": an object of 5 mm to 3 m, so a smaller diameter is in metres
SMALL_MM, LARGE_MM = 5.0, 3000.0
_GREY = np.array([128, 128, 128], dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class RawMesh:
    """A mesh in its file's unit, cleaned: finite, every vertex used and unique, no degenerate face."""

    vertices: Float64  # (V, 3)
    faces: Int64  # (F, 3)
    vertex_colors: UInt8 | None = None  # (V, 3) RGB
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class HealthReport:
    """What a CAD model looks like, for the person who sent it."""

    faces: int
    watertight: bool
    extents_mm: tuple[float, float, float]
    diameter_mm: float
    warnings: list[str]


@dataclass
class _Parts:
    """Pieces of a mesh as a reader finds them; corners index the vertices of their own piece."""

    vertices: list[Float64]
    faces: list[Int64]
    colors: list[UInt8 | None]
    warnings: list[str]


# --------------------------------------------------------------------------------------------------------- reading all


def load_mesh(files: Mapping[str, bytes], cad_format: str, max_faces: int, field: str | None = "file") -> RawMesh:
    """Read a mesh; `files` maps names to contents: one file, or an OBJ with its material and texture files, or a zip.

    Several bodies become one mesh, each at its place; textures and face colours become vertex colours (vertices are
    doubled where face colours meet). Raises BadData for what is not a mesh of that format, TooLarge for more faces than
    `max_faces` (before parsing where a header tells), InvalidInput for a mesh without faces, with NaN, or without area.
    """
    if cad_format not in FORMATS:
        raise InvalidInput(f"cad_format {cad_format!r} is unknown; it is one of {', '.join(FORMATS)}", field)
    if cad_format == "zip":
        files, cad_format = expand(files, field)
    name, data = _main_file(files, cad_format, field)
    if not data:
        raise BadData("the mesh file is empty (0 bytes)", field)
    found = sniff(data)
    if found != cad_format:
        like = f"looks like {found.upper()}" if found else "does not look like one"
        raise BadData(f"the mesh was sent as {cad_format.upper()} and {like}", field)
    others = {other: content for other, content in files.items() if other != name}
    try:
        if cad_format == "ply":
            parts = _read_ply(data, others, max_faces, field)
        elif cad_format == "stl":
            parts = _read_stl(data, max_faces, field)
        elif cad_format == "off":
            parts = _read_off(data, max_faces, field)
        else:
            parts = _read_with_trimesh(data, others, cad_format, max_faces, field)
        return _cleaned(parts, max_faces, field)
    except MemoryError:
        raise TooLarge("the mesh takes more memory than there is", field) from None


def sniff(data: bytes) -> str | None:
    """The format that the bytes themselves claim to be: "ply", "stl", "glb", "off", "obj", "zip", or None."""
    if data.startswith(b"glTF"):
        return "glb"
    if data.startswith(b"PK\x03\x04") or data.startswith(b"PK\x05\x06"):
        return "zip"
    if re.match(rb"ply[ \t]*\r?\n", data):
        return "ply"
    if len(data) >= 84 and len(data) == 84 + 50 * int.from_bytes(data[80:84], "little"):
        return "stl"
    start = data[:65536].lstrip(b"\xef\xbb\xbf \t\r\n")
    if re.match(rb"solid\b", start, re.IGNORECASE) and re.search(rb"\bfacet\b|endsolid", data, re.IGNORECASE):
        return "stl"
    if re.match(rb"(?:\s*#[^\n]*\n)*\s*(?:ST)?C?N?OFF\b", start):
        return "off"
    if b"\0" not in start and re.search(rb"^\s*v\s+[-+.\d]", data, re.MULTILINE):
        return "obj"
    if len(data) >= 84 and b"\0" in data[:84] and int.from_bytes(data[80:84], "little") * 50 > len(data):
        return "stl"  # binary and cut short, which its reader says in words
    return None


def expand(files: Mapping[str, bytes], field: str | None = "file") -> tuple[dict[str, bytes], str]:
    """Unpack the one zip in `files` and find the mesh in it: (its files, the mesh's format)."""
    if len(files) != 1:
        raise InvalidInput("a zip is sent alone", field)
    inside = unzip(next(iter(files.values())), field=field)
    meshes = [name for name in inside if _suffix(name) in FORMATS and _suffix(name) != "zip"]
    if len(meshes) != 1:
        what = "no mesh" if not meshes else f"{len(meshes)} meshes ({', '.join(sorted(meshes)[:5])})"
        raise InvalidInput(f"the zip holds {what}; it must hold one, with its material and texture files", field)
    return inside, _suffix(meshes[0])


def unzip(
    data: bytes, max_bytes: int = MAX_UNZIPPED_BYTES, max_files: int = MAX_ZIP_FILES, field: str | None = "file"
) -> dict[str, bytes]:
    """Unpack a zip in memory to {name without folders: content}; hidden files and those of macOS are left out.

    Raises BadData for a broken archive or names that leave it, TooLarge before more than `max_bytes` are unpacked or
    where there are more than `max_files`, InvalidInput for encryption, unusual compression and equal names.
    """
    found: dict[str, bytes] = {}
    left = max_bytes
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [entry for entry in archive.infolist() if not entry.filename.endswith("/")]
            if len(entries) > max_files:
                raise TooLarge(f"the zip holds {len(entries)} files, more than {max_files}", field)
            for entry in entries:
                path = PurePosixPath(entry.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in entry.filename or "\0" in entry.orig_filename:
                    raise BadData("the zip holds a name that leads out of it", field)
                if path.name.startswith(".") or "__MACOSX" in path.parts or not path.name:
                    continue
                if entry.flag_bits & 1:
                    raise InvalidInput("the zip is encrypted; send it without a password", field)
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise InvalidInput("the zip uses an unusual compression; send it deflated or stored", field)
                if path.name in found:
                    raise InvalidInput(f"the zip holds two files named {path.name!r}", field)
                with archive.open(entry) as file:
                    content = file.read(left + 1)
                left -= len(content)
                if left < 0:
                    raise TooLarge(f"the zip unpacks to more than {max_bytes} bytes", field)
                found[path.name] = content
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, LookupError, RuntimeError):
        raise BadData("the zip is broken and cannot be unpacked", field) from None
    return found


def content_id(unit: Unit, files: Mapping[str, bytes]) -> str:
    """The object's id: sha256 (64 hex characters) over unit, names and contents; the module's text has the layout."""
    digest = hashlib.sha256(b"posekit-object-1\n")

    def add(content: bytes) -> None:
        digest.update(struct.pack("<Q", len(content)))
        digest.update(content)

    add(unit.encode())
    digest.update(struct.pack("<Q", len(files)))
    for name in sorted(files, key=lambda name: name.encode("utf-8", "surrogatepass")):
        shown = f"model.{_suffix(name)}" if len(files) == 1 else name
        add(shown.encode("utf-8", "surrogatepass"))
        add(files[name])
    return digest.hexdigest()


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def _main_file(files: Mapping[str, bytes], cad_format: str, field: str | None) -> tuple[str, bytes]:
    if len(files) == 1:
        return next(iter(files.items()))
    named = [name for name in files if _suffix(name) == cad_format]
    if len(named) != 1:
        raise InvalidInput(f"{len(named)} of the files are named *.{cad_format}; exactly one must be", field)
    return named[0], files[named[0]]


def _check_claim(faces: int, vertices: int, max_faces: int, field: str | None) -> None:
    if faces > max_faces:
        raise TooLarge(f"the mesh has {faces} faces, more than the limit of {max_faces}; simplify it", field)
    if vertices > 3 * max_faces:
        raise TooLarge(f"the mesh has {vertices} vertices, more than {max_faces} faces can use; simplify it", field)


# ----------------------------------------------------------------------------------------------------------------- PLY

_PLY_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "int64": "i8", "uint64": "u8",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip


@dataclass(frozen=True)
class _Property:
    name: str
    dtype: np.dtype[Any]
    count_dtype: np.dtype[Any] | None = None  # of a list


@dataclass
class _Element:
    name: str
    rows: int
    properties: list[_Property]

    @property
    def least_bytes(self) -> int:
        """What a row takes in a binary file, its lists being empty."""
        return sum((one.count_dtype or one.dtype).itemsize for one in self.properties)


class _Ragged:
    """A list property: row i is `values[starts[i] : starts[i] + sizes[i]]`."""

    def __init__(self, sizes: Int64, values: npt.NDArray[Any]) -> None:
        self.sizes, self.values = sizes, values
        self.starts: Int64 = np.cumsum(sizes) - sizes


def _read_ply(data: bytes, others: Mapping[str, bytes], max_faces: int, field: str | None) -> _Parts:
    elements, ascii_, texture, body = _ply_header(data, max_faces, field)
    try:
        columns = _ply_ascii(elements, body) if ascii_ else _ply_binary(elements, body)
    except (ValueError, IndexError, OverflowError, UnicodeDecodeError, TypeError):
        raise BadData("the PLY is cut short or broken: its data does not match its header", field) from None
    vertex, face = columns.get("vertex", {}), columns.get("face", {})
    if not all(isinstance(vertex.get(axis), np.ndarray) for axis in "xyz"):
        raise BadData("the PLY has no vertices with x, y and z", field)
    vertices = np.column_stack([np.asarray(vertex[axis], dtype=np.float64) for axis in "xyz"])
    polygons = face.get("vertex_indices", face.get("vertex_index"))
    if not isinstance(polygons, _Ragged):
        raise InvalidInput("the PLY has no faces; a point cloud is not enough, send a triangle mesh", field)
    faces, rows = _triangulated(polygons, max_faces, field)
    notes: list[str] = []
    colors = _ply_colors(vertex)
    if colors is None and texture is not None:
        colors = _ply_texture(vertex, others, texture, notes)
    face_colors = _ply_colors(face)
    if colors is None and face_colors is not None:
        if faces.size and not (faces.min() >= 0 and faces.max() < len(vertices)):
            raise _bad_index(field)
        vertices, colors = vertices[faces.ravel()], np.repeat(face_colors[rows], 3, axis=0)
        faces = np.arange(len(vertices), dtype=np.int64).reshape(-1, 3)
    return _Parts([vertices], [faces], [colors], notes)


def _ply_header(data: bytes, max_faces: int, field: str | None) -> tuple[list[_Element], bool, str | None, bytes]:
    """(elements, whether the body is text, texture file's name, body), the elements' claims checked."""
    broken = BadData("the PLY is broken: its header makes no sense", field)
    end = re.search(rb"^end_header[ \t]*\r?\n", data[: 1 << 20], re.MULTILINE)
    if end is None:
        raise BadData("the PLY is cut short: its header does not end", field)
    elements: list[_Element] = []
    kind, texture = "", None
    for line in data[: end.start()].decode("latin-1").splitlines()[1:]:
        words = line.split()
        try:
            if not words or words[0] == "obj_info":
                continue
            if words[0] == "comment":
                if len(words) > 2 and words[1].lower() == "texturefile":
                    texture = line.split(None, 2)[2].strip()
            elif words[0] == "format":
                kind = words[1]
            elif words[0] == "element":
                elements.append(_Element(words[1], int(words[2]), []))
            elif words[0] == "property" and words[1] == "list":
                order = ">" if kind == "binary_big_endian" else "<"
                count, item = np.dtype(order + _PLY_TYPES[words[2]]), np.dtype(order + _PLY_TYPES[words[3]])
                elements[-1].properties.append(_Property(words[4], item, count))
            elif words[0] == "property":
                order = ">" if kind == "binary_big_endian" else "<"
                elements[-1].properties.append(_Property(words[2], np.dtype(order + _PLY_TYPES[words[1]])))
            else:
                raise broken
        except (KeyError, IndexError, ValueError):
            raise broken from None
    if kind not in ("ascii", "binary_little_endian", "binary_big_endian") or any(one.rows < 0 for one in elements):
        raise broken
    body = data[end.end() :]
    rows = {one.name: one.rows for one in elements}
    names = [(one.name, [inner.name for inner in one.properties]) for one in elements]
    if len(rows) != len(elements) or any(len(set(inner)) != len(inner) for _, inner in names):
        raise broken
    _check_claim(rows.get("face", 0), rows.get("vertex", 0), max_faces, field)
    least = sum(one.rows * (2 * len(one.properties) if kind == "ascii" else one.least_bytes) for one in elements)
    if least > len(body) + 1 or any(one.rows and not one.properties for one in elements):
        raise BadData("the PLY is cut short or broken: its header claims more than the file holds", field)
    return elements, kind == "ascii", texture, body


_Columns = dict[str, dict[str, "npt.NDArray[Any] | _Ragged"]]


def _ply_binary(elements: list[_Element], body: bytes) -> _Columns:
    columns: _Columns = {}
    position = 0
    for element in elements:
        lists = [one for one in element.properties if one.count_dtype is not None]
        sizes = _first_sizes(element, body, position) if lists and element.rows else {}
        row: list[Any] = []
        for one in element.properties:
            if one.count_dtype is not None:
                row += [(f"{one.name} count", one.count_dtype), (one.name, one.dtype, (sizes.get(one.name, 0),))]
            else:
                row.append((one.name, one.dtype))
        dtype = np.dtype(row)
        stop = position + element.rows * dtype.itemsize
        found: dict[str, npt.NDArray[Any] | _Ragged] = {}
        table = np.frombuffer(body, dtype=dtype, count=element.rows, offset=position) if stop <= len(body) else None
        if table is not None and all((table[f"{one.name} count"] == sizes.get(one.name, 0)).all() for one in lists):
            for one in element.properties:
                if one.count_dtype is None:
                    found[one.name] = table[one.name]
                else:
                    counts = np.full(element.rows, sizes.get(one.name, 0), dtype=np.int64)
                    found[one.name] = _Ragged(counts, table[one.name].reshape(-1))
            position = stop
        else:
            found, position = _ply_binary_ragged(element, body, position)
        columns[element.name] = found
    return columns


def _first_sizes(element: _Element, body: bytes, position: int) -> dict[str, int]:
    """How long the lists of an element's first row are: most files have all rows alike."""
    sizes = {}
    for one in element.properties:
        if one.count_dtype is None:
            position += one.dtype.itemsize
        else:
            size = int(np.frombuffer(body, dtype=one.count_dtype, count=1, offset=position)[0])
            if not 0 <= size * one.dtype.itemsize <= len(body):
                raise ValueError("a list is longer than the file")
            sizes[one.name] = size
            position += one.count_dtype.itemsize + size * one.dtype.itemsize
    return sizes


def _ply_binary_ragged(
    element: _Element, body: bytes, position: int
) -> tuple[dict[str, npt.NDArray[Any] | _Ragged], int]:
    """Row by row, for lists of different lengths (triangles and quads mixed)."""
    steps = []
    for one in element.properties:
        pieces: list[bytes] = []
        sizes: list[int] = []
        count = one.count_dtype
        reader = struct.Struct(count.str[0].replace("|", "<") + _STRUCT[count.str[1:]]) if count is not None else None
        steps.append((one, reader, pieces, sizes))
    length = len(body)
    for _ in range(element.rows):
        for one, reader, pieces, sizes in steps:
            size = 1
            if reader is not None:
                if position + reader.size > length:
                    raise ValueError("cut short")
                (size,) = reader.unpack_from(body, position)
                position += reader.size
            stop = position + int(size) * one.dtype.itemsize
            if size < 0 or stop > length:
                raise ValueError("cut short")
            pieces.append(body[position:stop])
            sizes.append(int(size))
            position = stop
    found: dict[str, npt.NDArray[Any] | _Ragged] = {}
    for one, reader, pieces, sizes in steps:
        values = np.frombuffer(b"".join(pieces), dtype=one.dtype)
        found[one.name] = values if reader is None else _Ragged(np.array(sizes, dtype=np.int64), values)
    return found, position


_STRUCT = {"i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q", "f4": "f", "f8": "d"}


def _ply_ascii(elements: list[_Element], body: bytes) -> _Columns:
    numbers = np.fromstring(body.decode("ascii"), sep=" ", dtype=np.float64)
    columns: _Columns = {}
    position = 0
    for element in elements:
        lists = [one for one in element.properties if one.count_dtype is not None]
        found: dict[str, npt.NDArray[Any] | _Ragged] = {}
        if len(lists) <= 1:
            place = next((i for i, one in enumerate(element.properties) if one.count_dtype is not None), None)
            size = int(numbers[position + place]) if place is not None and element.rows else 0
            if not 0 <= size <= numbers.size:
                raise ValueError("a list is longer than the file")
            width = len(element.properties) + size
            stop = position + element.rows * width
            table = numbers[position:stop].reshape(-1, width) if stop <= numbers.size else None
            if table is not None and (place is None or (table[:, place] == size).all()):
                column = 0
                for one in element.properties:
                    if one.count_dtype is None:
                        found[one.name] = table[:, column]
                        column += 1
                    else:
                        counts = np.full(element.rows, size, dtype=np.int64)
                        found[one.name] = _Ragged(counts, table[:, column + 1 : column + 1 + size].reshape(-1))
                        column += 1 + size
                columns[element.name], position = found, stop
                continue
        kept: list[tuple[_Property, list[Float64], list[int]]] = [(one, [], []) for one in element.properties]
        for _ in range(element.rows):
            for one, pieces, sizes in kept:
                size = 1
                if one.count_dtype is not None:
                    size = int(numbers[position])
                    position += 1
                if size < 0 or position + size > numbers.size:
                    raise ValueError("cut short")
                pieces.append(numbers[position : position + size])
                sizes.append(size)
                position += size
        for one, pieces, sizes in kept:
            values = np.concatenate(pieces) if pieces else np.zeros(0)
            found[one.name] = values if one.count_dtype is None else _Ragged(np.array(sizes, dtype=np.int64), values)
        columns[element.name] = found
    return columns


def _triangulated(polygons: _Ragged, max_faces: int, field: str | None) -> tuple[Int64, Int64]:
    """Fans of triangles (F, 3) and the polygon that each came from (F,); fewer than three corners give none."""
    total = int(np.maximum(polygons.sizes - 2, 0).sum())
    _check_claim(total, 0, max_faces, field)
    corners = _whole(polygons.values, field)
    triangles, rows = [np.zeros((0, 3), dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for size in np.unique(polygons.sizes[polygons.sizes >= 3]):
        chosen = np.flatnonzero(polygons.sizes == size)
        grid = corners[polygons.starts[chosen, None] + np.arange(size)]  # (P, size)
        second = np.arange(1, size - 1)
        fan = np.stack([np.broadcast_to(grid[:, :1], (len(chosen), size - 2)), grid[:, second], grid[:, second + 1]], 2)
        triangles.append(fan.reshape(-1, 3))
        rows.append(np.repeat(chosen, size - 2))
    return np.concatenate(triangles), np.concatenate(rows)


def _whole(values: npt.NDArray[Any], field: str | None) -> Int64:
    """Indices as int64; BadData for what is no index."""
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (np.abs(values) < 2**53).all()):
        raise _bad_index(field)
    if values.dtype.kind == "u" and values.size and int(values.max()) >= 1 << 62:
        raise _bad_index(field)
    whole = values.astype(np.int64)
    if values.dtype.kind == "f" and (whole != values).any():
        raise _bad_index(field)
    return whole


def _bad_index(field: str | None) -> BadData:
    return BadData("the mesh is broken: a face points to a vertex that does not exist", field)


def _ply_colors(columns: Mapping[str, npt.NDArray[Any] | _Ragged]) -> UInt8 | None:
    found = [columns.get(name) for name in ("red", "green", "blue")]
    channels = [channel for channel in found if isinstance(channel, np.ndarray)]
    if len(channels) < 3:
        return None
    colors = np.column_stack([np.asarray(channel, dtype=np.float64) for channel in channels])
    fractions = colors.size > 0 and bool((colors <= 1).all()) and bool((colors != np.round(colors)).any())
    return _bytes_of(colors * 255 if fractions else colors)


def _bytes_of(colors: npt.NDArray[Any]) -> UInt8:
    rounded: UInt8 = np.clip(np.nan_to_num(np.round(colors)), 0, 255).astype(np.uint8)
    return rounded


def _ply_texture(
    vertex: Mapping[str, npt.NDArray[Any] | _Ragged], others: Mapping[str, bytes], texture: str, notes: list[str]
) -> UInt8 | None:
    for u_name, v_name in (("texture_u", "texture_v"), ("u", "v"), ("s", "t")):
        u, v = vertex.get(u_name), vertex.get(v_name)
        if isinstance(u, np.ndarray) and isinstance(v, np.ndarray):
            image = _texture(_Files(others, notes), texture, notes)
            return None if image is None else _sampled(image, np.column_stack([u, v]).astype(np.float64))
    return None


# ----------------------------------------------------------------------------------------------------------------- STL


def _read_stl(data: bytes, max_faces: int, field: str | None) -> _Parts:
    claimed = int.from_bytes(data[80:84], "little") if len(data) >= 84 else 0
    text = re.match(rb"\s*solid\b", data[:512], re.IGNORECASE) and re.search(rb"facet|endsolid", data, re.IGNORECASE)
    if text and len(data) != 84 + 50 * claimed:
        if not re.search(rb"endsolid[^\n]*\s*$", data[-4096:], re.IGNORECASE):
            raise BadData("the STL is cut short: its endsolid is missing", field)
        corners = re.findall(rb"\bvertex\s+(\S+)\s+(\S+)\s+(\S+)", data, re.IGNORECASE)
        _check_claim(len(corners) // 3, 0, max_faces, field)
        try:
            vertices = np.fromstring(b" ".join(map(b" ".join, corners)), sep=" ", dtype=np.float64).reshape(-1, 3)
        except ValueError:
            raise BadData("the STL is broken: a coordinate is no number", field) from None
        if len(vertices) % 3:
            raise BadData("the STL is broken: a facet does not have three vertices", field)
    else:
        _check_claim(claimed, 0, max_faces, field)
        if len(data) < 84 + 50 * claimed:
            raise BadData(f"the STL is cut short: it claims {claimed} triangles and does not hold them", field)
        facet = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
        vertices = np.frombuffer(data, facet, count=claimed, offset=84)["corners"].reshape(-1, 3).astype(np.float64)
    return _Parts([vertices], [np.arange(len(vertices), dtype=np.int64).reshape(-1, 3)], [None], [])


# ----------------------------------------------------------------------------------------------------------------- OFF


def _read_off(data: bytes, max_faces: int, field: str | None) -> _Parts:
    text = re.sub(rb"#[^\n]*", b"", data)
    counts = re.match(rb"\s*\w*OFF\s+(\d{1,18})\s+(\d{1,18})\b[^\n]*\n", text)
    if counts is None:
        raise BadData("the OFF is cut short or broken: its counts are missing", field)
    vertex_count, face_count = int(counts[1]), int(counts[2])
    _check_claim(face_count, vertex_count, max_faces, field)
    lines = [line for line in text[counts.end() :].splitlines() if line.strip()]
    if len(lines) < vertex_count + face_count:
        raise BadData("the OFF is cut short or broken: its header claims more than the file holds", field)
    try:
        vertices = np.array([[float(word) for word in line.split()[:3]] for line in lines[:vertex_count]], np.float64)
        sizes, corners = [], []
        for line in lines[vertex_count : vertex_count + face_count]:
            words = line.split()
            size = int(words[0])
            corner = [int(word) for word in words[1 : size + 1]]
            if len(corner) != size:
                raise ValueError("a face is cut short")
            sizes.append(size)
            corners += corner
        polygons = _Ragged(np.array(sizes, dtype=np.int64), np.array(corners, dtype=np.int64))
        vertices = vertices.reshape(vertex_count, 3)
    except (ValueError, OverflowError):
        raise BadData("the OFF is cut short or broken: a line is not what its header says", field) from None
    faces, _ = _triangulated(polygons, max_faces, field)
    return _Parts([vertices], [faces], [None], [])


# ------------------------------------------------------------------------------------------------------------- OBJ, GLB


class _Files:
    """The given files as trimesh wants to see them; by last name, whatever the case, and never anything else."""

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

    def namespaced(self, namespace: str) -> _Files:
        return self


def _last_name(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2].strip().lower()


def _read_with_trimesh(
    data: bytes, others: Mapping[str, bytes], cad_format: str, max_faces: int, field: str | None
) -> _Parts:
    if cad_format == "glb":
        _check_glb(data, max_faces, field)
    else:
        _check_claim(data.count(b"\nf "), data.count(b"\nv "), max_faces, field)
    import trimesh

    logging.getLogger("trimesh").setLevel(logging.CRITICAL + 1)
    parts = _Parts([], [], [], [])
    resolver: Any = _Files(others, parts.warnings)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scene = trimesh.load_scene(io.BytesIO(data), file_type=cad_format, resolver=resolver, process=False)
            total = 0
            for node in scene.graph.nodes_geometry:
                T_scene_body, name = scene.graph[node]
                body = scene.geometry[name]
                if not isinstance(body, trimesh.Trimesh) or len(body.faces) == 0:
                    continue
                total += len(body.faces)
                _check_claim(total, 0, max_faces, field)
                faces = np.asarray(body.faces, dtype=np.int64)
                T = np.asarray(T_scene_body, dtype=np.float64)
                mirrored = np.linalg.det(T[:3, :3]) < 0
                parts.vertices.append(np.asarray(body.vertices, dtype=np.float64) @ T[:3, :3].T + T[:3, 3])
                parts.faces.append(faces[:, ::-1] if mirrored else faces)
                parts.colors.append(_body_colors(body, parts.warnings))
    except (PoseError, MemoryError):
        raise
    except Exception:  # a parser of strangers' files fails in every way there is; what it means is one thing
        raise BadData(f"the {cad_format.upper()} is broken and cannot be read", field) from None
    return parts


def _check_glb(data: bytes, max_faces: int, field: str | None) -> None:
    """Check a GLB's chunks, and what its JSON claims, before trimesh takes memory for it."""
    broken = BadData("the GLB is cut short or broken", field)
    if len(data) < 20:
        raise broken
    version, length, json_length, json_kind = struct.unpack_from("<IIII", data, 4)
    if length > len(data) or json_kind != 0x4E4F534A or 20 + json_length > len(data):
        raise broken
    if version != 2:
        raise BadData(f"the GLB is of version {version}; version 2 is understood", field)
    try:
        tree = json.loads(data[20 : 20 + json_length])
        required = tree.get("extensionsRequired", [])
        unknown = [name for name in required if "draco" in str(name).lower() or "meshopt" in str(name).lower()]
        if unknown:
            raise InvalidInput(f"the GLB is compressed ({str(unknown[0])[:60]}); export it without compression", field)
        counts = [accessor["count"] for accessor in tree.get("accessors", [])]
        if any(type(count) is not int or count < 0 for count in counts):
            raise broken
        if any("bufferView" not in accessor and "sparse" not in accessor for accessor in tree.get("accessors", [])):
            raise BadData("the GLB is broken: it refers to data that is not in it", field)
        if sum(counts) > 12 * max_faces:
            raise TooLarge(f"the GLB holds more data than {max_faces} faces need; simplify it", field)
        children = [child for node in tree.get("nodes", []) for child in node.get("children", [])]
        roots = [root for scene in tree.get("scenes", []) for root in scene.get("nodes", [])]
        if len(set(children)) != len(children) or not set(children).isdisjoint(roots):
            raise BadData("the GLB is broken: its nodes do not form a tree", field)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise broken from None


def _body_colors(body: Any, notes: list[str]) -> UInt8 | None:
    """(V, 3) RGB of one body as trimesh read it, or None where it has no colours."""
    count = len(body.vertices)
    visual = body.visual
    if visual.kind == "vertex":
        return _bytes_of(np.asarray(visual.vertex_colors)[:, :3])
    if visual.kind != "texture":
        return None
    material, uv = visual.material, visual.uv
    image = getattr(material, "image", None)
    if image is None:
        image = getattr(material, "baseColorTexture", None)
    if getattr(image, "format", None) is None:  # trimesh's stand-in where there is no texture
        image = None
    if image is not None and uv is not None and len(uv) == count:
        if image.format not in ("PNG", "JPEG") or image.width * image.height > MAX_TEXTURE_MEGAPIXELS * 1e6:
            notes.append("a texture is no PNG or JPEG, or too large: its colours are missing")
            return None
        try:
            return _sampled(np.asarray(image.convert("RGB")), np.asarray(uv, dtype=np.float64))
        except (OSError, ValueError, SyntaxError):
            notes.append("a texture is broken: its colours are missing")
            return None
    painted = getattr(visual, "vertex_attributes", {}).get("color")
    if painted is not None and len(painted) == count:
        painted = np.asarray(painted)[:, :3]
        full = 1.0 if painted.dtype.kind == "f" else float(np.iinfo(painted.dtype).max)
        return _bytes_of(painted * (255.0 / full))
    plain = getattr(material, "baseColorFactor", None)
    if plain is None and "kd" in getattr(material, "kwargs", {}):
        plain = material.diffuse
    if plain is None:
        return None
    plain = np.asarray(plain)[:3]
    return np.tile(_bytes_of(plain * 255.0 if plain.dtype.kind == "f" else plain), (count, 1))


def _texture(files: _Files, name: str, notes: list[str]) -> UInt8 | None:
    try:
        return images.decode_color(files.get(name), MAX_TEXTURE_MEGAPIXELS)
    except FileNotFoundError:
        return None
    except PoseError:
        notes.append("a texture is broken, too large, or no PNG or JPEG: its colours are missing")
        return None


def _sampled(image: UInt8, uv: Float64) -> UInt8:
    """The texture's colour at (N, 2) coordinates, v upwards, repeating outside of 0 to 1; the nearest pixel."""
    height, width = image.shape[:2]
    wrapped = np.nan_to_num(uv, posinf=0.0, neginf=0.0)
    wrapped = np.where((wrapped >= 0) & (wrapped <= 1), wrapped, wrapped % 1.0)
    columns = np.minimum((wrapped[:, 0] * width).astype(np.int64), width - 1)
    rows = np.minimum(((1.0 - wrapped[:, 1]) * height).astype(np.int64), height - 1)
    return np.ascontiguousarray(image[rows, columns, :3])


# ------------------------------------------------------------------------------------------------------------ cleaning


def _cleaned(parts: _Parts, max_faces: int, field: str | None) -> RawMesh:
    """One mesh of all parts: checked, equal vertices merged, unused ones and degenerate faces dropped."""
    if sum(len(faces) for faces in parts.faces) == 0:
        raise InvalidInput("the mesh has no faces; a point cloud is not enough, send a triangle mesh", field)
    for vertices, faces in zip(parts.vertices, parts.faces, strict=True):
        if faces.size and not (faces.min() >= 0 and faces.max() < len(vertices)):
            raise _bad_index(field)
    offsets = np.cumsum([0] + [len(vertices) for vertices in parts.vertices])
    faces = np.concatenate([faces + offset for faces, offset in zip(parts.faces, offsets, strict=False)])
    _check_claim(len(faces), 0, max_faces, field)
    used, faces = _compact(faces, int(offsets[-1]))
    vertices = np.concatenate(parts.vertices)[used]
    if not np.isfinite(vertices).all():
        raise InvalidInput("the mesh has vertices that are NaN or infinite", field)
    if np.abs(vertices).max() > MAX_COORDINATE:
        raise InvalidInput(f"the mesh has coordinates beyond {MAX_COORDINATE:g}; no unit makes that an object", field)
    colors = None
    if any(color is not None for color in parts.colors):
        filled = [
            np.tile(_GREY, (len(part), 1)) if color is None else color
            for part, color in zip(parts.vertices, parts.colors, strict=True)
        ]
        colors = np.concatenate(filled)[used]
    representative, faces = _merged(vertices, colors, faces)
    vertices = vertices[representative]
    colors = None if colors is None else colors[representative]
    corners = vertices[faces]
    twice_area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    solid = twice_area > 1e-12 * float(np.square(np.ptp(vertices, axis=0)).sum())
    dropped = len(faces) - int(solid.sum())
    notes = list(parts.warnings)
    if dropped == len(faces):
        raise InvalidInput("the mesh has no face with an area: all its triangles are degenerate", field)
    if dropped:
        notes.append(f"{dropped} degenerate faces (without area) were dropped")
    used, faces = _compact(faces[solid], len(vertices))
    return RawMesh(
        vertices=vertices[used], faces=faces, vertex_colors=None if colors is None else colors[used], warnings=notes
    )


def _compact(faces: Int64, count: int) -> tuple[Int64, Int64]:
    """Which of `count` vertices are used, and the faces in their new numbers."""
    mask = np.zeros(count, dtype=bool)
    mask[faces] = True
    number = np.cumsum(mask) - 1
    return np.flatnonzero(mask), number[faces]


def _merged(vertices: Float64, colors: UInt8 | None, faces: Int64) -> tuple[Int64, Int64]:
    """Vertices that are equal in place and colour become one: (their representatives, the faces in new numbers)."""
    first, inverse = _unique_rows(vertices, colors)
    return first, inverse[faces]


def _unique_rows(vertices: Float64, colors: UInt8 | None = None) -> tuple[Int64, Int64]:
    """(index of each distinct row, in order of appearance; for each row the place of its own among them)."""
    keys = [vertices[:, 0], vertices[:, 1], vertices[:, 2]]
    if colors is not None:
        keys.append(colors.astype(np.int64) @ np.array([65536, 256, 1]))
    order = np.lexsort(keys)
    different = np.zeros(len(vertices), dtype=bool)
    different[:1] = True
    for key in keys:
        ordered = key[order]
        different[1:] |= ordered[1:] != ordered[:-1]
    group = np.cumsum(different) - 1
    first = np.minimum.reduceat(order, np.flatnonzero(different))
    appearance = np.argsort(first)
    place = np.empty(len(first), dtype=np.int64)
    place[appearance] = np.arange(len(first))
    inverse = np.empty(len(vertices), dtype=np.int64)
    inverse[order] = place[group]
    return first[appearance], inverse


# --------------------------------------------------------------------------------------------------- units and health


def resolve_unit(raw: RawMesh, unit: Literal["mm", "m", "auto"]) -> tuple[Unit, str | None]:
    """The unit of a mesh's file, and for `auto` a sentence that reports the guess.

    Objects that one estimates poses of measure 5 mm to 3 m: a number below 3 is in metres, any other in millimetres.
    """
    if unit != "auto":
        return unit, None
    diameter = diameter_m(raw.vertices)
    guess: Unit = "m" if diameter < METRES_BELOW else "mm"
    other: Unit = "mm" if guess == "m" else "m"
    named = {"m": "metres", "mm": "millimetres"}[guess]
    return guess, (
        f'model_unit "auto" took the file to be in {named}: its diameter reads {diameter:.4g}; if that is wrong, send '
        f'model_unit: "{other}"'
    )


def to_mesh(raw: RawMesh, unit: Unit) -> Mesh:
    """The mesh in metres, as the engines take it."""
    scale = {"mm": 0.001, "m": 1.0}[unit]
    return Mesh(
        vertices_m=(raw.vertices * scale).astype(np.float32),
        faces=raw.faces.astype(np.int32),
        vertex_colors=raw.vertex_colors,
    )


def health(raw: RawMesh, mesh: Mesh) -> HealthReport:
    """Judge a mesh for the person who sent it: what it is, and what about it is likely to make trouble."""
    vertices = mesh.vertices_m.astype(np.float64)
    extents = np.ptp(vertices, axis=0) * 1000.0
    diameter_mm = diameter_m(vertices) * 1000.0
    watertight = is_watertight(vertices, mesh.faces)
    notes = list(raw.warnings)
    if diameter_mm < SMALL_MM:
        notes.append(f'the object is only {diameter_mm:.3g} mm across; if the file is in metres, send model_unit: "m"')
    elif diameter_mm > LARGE_MM:
        notes.append(f'the object is {diameter_mm:.0f} mm across; if the file is in millimetres, send model_unit: "mm"')
    if not watertight:
        notes.append("the mesh is not watertight: it has holes or edges that do not belong to exactly two faces")
    if len(mesh.faces) > MANY_FACES:
        notes.append(f"the mesh has {len(mesh.faces)} faces; some ten thousand give the same poses, sooner")
    centre_mm = float(np.linalg.norm(vertices.min(axis=0) + vertices.max(axis=0))) * 500.0
    if centre_mm > 5.0 * diameter_mm:
        notes.append(
            f"the mesh lies {centre_mm:.0f} mm from its own origin, which is what translations refer to; is that meant?"
        )
    return HealthReport(
        faces=len(mesh.faces),
        watertight=watertight,
        extents_mm=(float(extents[0]), float(extents[1]), float(extents[2])),
        diameter_mm=diameter_mm,
        warnings=notes,
    )


def is_watertight(vertices: npt.NDArray[Any], faces: npt.NDArray[Any]) -> bool:
    """Whether every edge belongs to exactly two faces, vertices at the same place counting as one."""
    _, place = _unique_rows(vertices.astype(np.float64))
    corners = place[faces]
    edges = np.sort(np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]]), axis=1)
    _, counts = np.unique(edges[:, 0] * len(vertices) + edges[:, 1], return_counts=True)
    return bool((counts == 2).all())


def diameter_m(vertices: npt.NDArray[Any]) -> float:
    """The largest distance between two of (V, 3) vertices, in their own unit (metres in, metres out).

    Exact up to 1000 vertices. Beyond that, found among the extreme points of 256 directions and improved by walking to
    the furthest vertex and back until that gains nothing: a lower bound, in practice the diameter itself.
    """
    points = np.unique(_extreme_points(vertices.astype(np.float64)), axis=0)
    squared = np.square(points[:, None] - points[None]).sum(axis=2)
    largest = float(squared.max(initial=0.0))
    everything = vertices.astype(np.float64) if len(points) < len(vertices) else points
    for start in np.unique(np.unravel_index(np.argsort(squared, axis=None)[-16:], squared.shape)[0]):
        here, reached = points[start], -1.0
        for _ in range(100):  # two or three in practice
            distances = np.square(everything - here).sum(axis=1)
            furthest = int(distances.argmax())
            if distances[furthest] <= reached:
                break
            here, reached = everything[furthest], float(distances[furthest])
        largest = max(largest, reached)
    return float(np.sqrt(largest))


def _extreme_points(points: Float64) -> Float64:
    """The points that lie outermost in 256 directions spread evenly over the sphere; all, where there are few."""
    if len(points) <= 1000:
        return points
    index = np.arange(256) + 0.5
    z, turn = 1.0 - index / 256.0, np.pi * (1.0 + 5.0**0.5) * index  # half the sphere: the ends of a line are both kept
    radius = np.sqrt(1.0 - z * z)
    directions = np.column_stack([radius * np.cos(turn), radius * np.sin(turn), z])
    across = np.ascontiguousarray(points.T)
    chosen: list[Int64] = []
    for block in np.split(directions, 32):
        along = block @ across  # (8, V)
        chosen += [along.argmin(axis=1), along.argmax(axis=1)]
    return points[np.unique(np.concatenate(chosen))]
