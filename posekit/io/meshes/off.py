"""Read OFF text files."""

from __future__ import annotations

import re

import numpy as np

from posekit.errors import BadData
from posekit.io.meshes.polygons import Ragged, triangulated
from posekit.io.meshes.raw import Parts, check_claim


def read_off(data: bytes, max_faces: int, field: str | None) -> Parts:
    """Read vertices and polygons, in the file's unit. Raises BadData if cut short, TooLarge for too many faces."""
    text = re.sub(rb"#[^\n]*", b"", data)
    counts = re.match(rb"\s*\w*OFF\s+(\d{1,18})\s+(\d{1,18})\b[^\n]*\n", text)
    if counts is None:
        raise BadData("the OFF is cut short or broken: its counts are missing", field)
    vertex_count, face_count = int(counts[1]), int(counts[2])
    check_claim(face_count, vertex_count, max_faces, field)
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
        polygons = Ragged(np.array(sizes, dtype=np.int64), np.array(corners, dtype=np.int64))
        vertices = vertices.reshape(vertex_count, 3)
    except (ValueError, OverflowError):
        raise BadData("the OFF is cut short or broken: a line is not what its header says", field) from None
    faces, _ = triangulated(polygons, max_faces, field)
    return Parts([vertices], [faces], [None], [])
