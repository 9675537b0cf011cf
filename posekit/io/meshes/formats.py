"""The mesh formats that can be read, and how to recognise one from its bytes."""

from __future__ import annotations

import re

FORMATS = ("ply", "obj", "stl", "glb", "off", "zip")


def suffix(name: str) -> str:
    """Return the part of a name after its last dot, in lower case; "" without a dot."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def sniff(data: bytes) -> str | None:
    """Return the format that the bytes themselves claim to be: "ply", "stl", "glb", "off", "obj", "zip", or None."""
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
        return "stl"  # binary and cut short; the STL reader says so
    return None
