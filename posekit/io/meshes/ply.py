"""Read PLY: check the counts that its header claims, then read mixed polygons and colours of many kinds."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from posekit.errors import BadData, InvalidInput
from posekit.io.meshes.polygons import Ragged, triangulated
from posekit.io.meshes.raw import Float64, Parts, UInt8, bad_index, check_claim
from posekit.io.meshes.textures import Files, bytes_of, sampled, texture_image

_PLY_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "int64": "i8", "uint64": "u8",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip


@dataclass(frozen=True)
class _Property:
    name: str
    dtype: np.dtype[Any]
    count_dtype: np.dtype[Any] | None = None  # type of a list's length; None = not a list


@dataclass
class _Element:
    name: str
    rows: int
    properties: list[_Property]

    @property
    def least_bytes(self) -> int:
        """Return the bytes that a row takes in a binary file if its lists are empty."""
        return sum((one.count_dtype or one.dtype).itemsize for one in self.properties)


def read_ply(data: bytes, others: Mapping[str, bytes], max_faces: int, field: str | None) -> Parts:
    """Read a mesh in the file's unit, with colours from vertices, faces, or a texture among `others`."""
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
    if not isinstance(polygons, Ragged):
        raise InvalidInput("the PLY has no faces; a point cloud is not enough, send a triangle mesh", field)
    faces, rows = triangulated(polygons, max_faces, field)
    notes: list[str] = []
    colors = _ply_colors(vertex)
    if colors is None and texture is not None:
        colors = _ply_texture(vertex, others, texture, notes)
    face_colors = _ply_colors(face)
    if colors is None and face_colors is not None:
        if faces.size and not (faces.min() >= 0 and faces.max() < len(vertices)):
            raise bad_index(field)
        vertices, colors = vertices[faces.ravel()], np.repeat(face_colors[rows], 3, axis=0)
        faces = np.arange(len(vertices), dtype=np.int64).reshape(-1, 3)
    return Parts([vertices], [faces], [colors], notes)


def _ply_header(data: bytes, max_faces: int, field: str | None) -> tuple[list[_Element], bool, str | None, bytes]:
    """Check the header; return (elements, True if the body is text, name of the texture file, body)."""
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
    check_claim(rows.get("face", 0), rows.get("vertex", 0), max_faces, field)
    least = sum(one.rows * (2 * len(one.properties) if kind == "ascii" else one.least_bytes) for one in elements)
    if least > len(body) + 1 or any(one.rows and not one.properties for one in elements):
        raise BadData("the PLY is cut short or broken: its header claims more than the file holds", field)
    return elements, kind == "ascii", texture, body


_Columns = dict[str, dict[str, "npt.NDArray[Any] | Ragged"]]


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
        found: dict[str, npt.NDArray[Any] | Ragged] = {}
        table = np.frombuffer(body, dtype=dtype, count=element.rows, offset=position) if stop <= len(body) else None
        if table is not None and all((table[f"{one.name} count"] == sizes.get(one.name, 0)).all() for one in lists):
            for one in element.properties:
                if one.count_dtype is None:
                    found[one.name] = table[one.name]
                else:
                    counts = np.full(element.rows, sizes.get(one.name, 0), dtype=np.int64)
                    found[one.name] = Ragged(counts, table[one.name].reshape(-1))
            position = stop
        else:
            found, position = _ply_binary_ragged(element, body, position)
        columns[element.name] = found
    return columns


def _first_sizes(element: _Element, body: bytes, position: int) -> dict[str, int]:
    """Return the lengths of the lists in an element's first row: in most files all rows are alike."""
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
) -> tuple[dict[str, npt.NDArray[Any] | Ragged], int]:
    """Read row by row, for lists of different lengths (triangles and quads mixed)."""
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
    found: dict[str, npt.NDArray[Any] | Ragged] = {}
    for one, reader, pieces, sizes in steps:
        values = np.frombuffer(b"".join(pieces), dtype=one.dtype)
        found[one.name] = values if reader is None else Ragged(np.array(sizes, dtype=np.int64), values)
    return found, position


_STRUCT = {"i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q", "f4": "f", "f8": "d"}


def _ply_ascii(elements: list[_Element], body: bytes) -> _Columns:
    numbers = np.fromstring(body.decode("ascii"), sep=" ", dtype=np.float64)
    columns: _Columns = {}
    position = 0
    for element in elements:
        lists = [one for one in element.properties if one.count_dtype is not None]
        found: dict[str, npt.NDArray[Any] | Ragged] = {}
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
                        found[one.name] = Ragged(counts, table[:, column + 1 : column + 1 + size].reshape(-1))
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
            found[one.name] = values if one.count_dtype is None else Ragged(np.array(sizes, dtype=np.int64), values)
        columns[element.name] = found
    return columns


def _ply_colors(columns: Mapping[str, npt.NDArray[Any] | Ragged]) -> UInt8 | None:
    found = [columns.get(name) for name in ("red", "green", "blue")]
    channels = [channel for channel in found if isinstance(channel, np.ndarray)]
    if len(channels) < 3:
        return None
    colors = np.column_stack([np.asarray(channel, dtype=np.float64) for channel in channels])
    fractions = colors.size > 0 and bool((colors <= 1).all()) and bool((colors != np.round(colors)).any())
    return bytes_of(colors * 255 if fractions else colors)


def _ply_texture(
    vertex: Mapping[str, npt.NDArray[Any] | Ragged], others: Mapping[str, bytes], texture: str, notes: list[str]
) -> UInt8 | None:
    for u_name, v_name in (("texture_u", "texture_v"), ("u", "v"), ("s", "t")):
        u, v = vertex.get(u_name), vertex.get(v_name)
        if isinstance(u, np.ndarray) and isinstance(v, np.ndarray):
            image = texture_image(Files(others, notes), texture, notes)
            return None if image is None else sampled(image, np.column_stack([u, v]).astype(np.float64))
    return None
