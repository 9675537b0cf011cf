"""Read STL, text and binary."""

from __future__ import annotations

import re

import numpy as np

from posekit.errors import BadData
from posekit.io.meshes.raw import Parts, check_claim


def read_stl(data: bytes, max_faces: int, field: str | None) -> Parts:
    """Read three vertices per facet, in the file's unit. Raises BadData if cut short, TooLarge for too many facets."""
    claimed = int.from_bytes(data[80:84], "little") if len(data) >= 84 else 0
    text = re.match(rb"\s*solid\b", data[:512], re.IGNORECASE) and re.search(rb"facet|endsolid", data, re.IGNORECASE)
    if text and len(data) != 84 + 50 * claimed:
        if not re.search(rb"endsolid[^\n]*\s*$", data[-4096:], re.IGNORECASE):
            raise BadData("the STL is cut short: its endsolid is missing", field)
        corners = re.findall(rb"\bvertex\s+(\S+)\s+(\S+)\s+(\S+)", data, re.IGNORECASE)
        check_claim(len(corners) // 3, 0, max_faces, field)
        try:
            vertices = np.fromstring(b" ".join(map(b" ".join, corners)), sep=" ", dtype=np.float64).reshape(-1, 3)
        except ValueError:
            raise BadData("the STL is broken: a coordinate is no number", field) from None
        if len(vertices) % 3:
            raise BadData("the STL is broken: a facet does not have three vertices", field)
    else:
        check_claim(claimed, 0, max_faces, field)
        if len(data) < 84 + 50 * claimed:
            raise BadData(f"the STL is cut short: it claims {claimed} triangles and does not hold them", field)
        facet = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
        vertices = np.frombuffer(data, facet, count=claimed, offset=84)["corners"].reshape(-1, 3).astype(np.float64)
    return Parts([vertices], [np.arange(len(vertices), dtype=np.int64).reshape(-1, 3)], [None], [])
