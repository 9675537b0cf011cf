"""The three picture formats that the client needs, in numpy and zlib: PNG of 8-bit grey or RGB, PNG of 16-bit grey, and
float32 TIFF. This module trusts its input; the server reads more formats and trusts none."""

from __future__ import annotations

import struct
import zlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[Any]

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB = 0, 2
_UP = 2  # PNG filter: each row minus the row above; cheap, and pictures compress better


def write_png(image: Image, compression: int = 1) -> bytes:
    """Encode (H, W) uint8, uint16 or bool (True = 255), or (H, W, 3) uint8, as PNG without loss.

    `compression` is zlib's level, 0 to 9. Raises ValueError for any other shape or type, and for an empty image.
    """
    if image.dtype == np.bool_:
        image = image.astype(np.uint8) * np.uint8(255)
    color = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    grey = image.ndim == 2 and image.dtype in (np.uint8, np.uint16)
    if not (color or grey) or image.size == 0:
        raise ValueError(
            f"cannot write an array of shape {image.shape} and type {image.dtype} as PNG; "
            "it takes (H, W) uint8, uint16 or bool, or (H, W, 3) uint8"
        )
    height, width = image.shape[:2]
    big_endian = np.ascontiguousarray(image, dtype=image.dtype.newbyteorder(">"))
    rows = big_endian.view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, rows.shape[1] + 1), dtype=np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8 * image.dtype.itemsize, _RGB if color else _GREY, 0, 0, 0)
    pixels = zlib.compress(filtered.tobytes(), compression)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def read_png(data: bytes) -> Image:
    """Decode a PNG to (H, W) uint8 or uint16, or (H, W, 3) uint8.

    Raises ValueError if the file is broken, or of a kind that this small reader leaves out: palettes, alpha,
    16-bit colour, fewer than 8 bits, interlacing.
    """
    if not data.startswith(_SIGNATURE):
        raise ValueError("the bytes are no PNG")
    header, pixels, position = b"", [], len(_SIGNATURE)
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        if data[position + 8 + length : position + 12 + length] != struct.pack(">I", zlib.crc32(kind + body)):
            raise ValueError("the PNG is broken: a checksum does not match")
        if kind == b"IHDR":
            header = body
        elif kind == b"IDAT":
            pixels.append(body)
        position += 12 + length
    if len(header) != 13:
        raise ValueError("the PNG is broken: its header is missing")
    width, height, bits, color, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if (bits, color) not in ((8, _GREY), (16, _GREY), (8, _RGB)) or interlaced:
        raise ValueError("only plain 8-bit grey, 8-bit RGB and 16-bit grey PNGs can be read")
    step = 3 if color == _RGB else bits // 8
    try:
        stream = zlib.decompress(b"".join(pixels))
    except zlib.error:
        stream = b""
    if len(stream) != height * (width * step + 1):
        raise ValueError("the PNG is broken: its pixels do not fill its size")
    rows = _unfilter(np.frombuffer(stream, dtype=np.uint8).reshape(height, -1), step)
    if color == _RGB:
        return rows.reshape(height, width, 3)
    return rows if bits == 8 else rows.view(">u2").astype(np.uint16)


def png_size(data: bytes) -> tuple[int, int] | None:
    """Return the height and width in a PNG's header; None if the bytes are not a PNG."""
    if not data.startswith(_SIGNATURE) or len(data) < 24:
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return height, width


def write_float_tiff(image: Image) -> bytes:
    """Encode (H, W) floats as an uncompressed little-endian float32 TIFF of one strip; NaN and infinity stay."""
    if image.ndim != 2 or image.size == 0 or image.dtype.kind != "f":
        raise ValueError(f"cannot write an array of shape {image.shape} and type {image.dtype} as a float TIFF")
    height, width = image.shape
    pixels = np.ascontiguousarray(image, dtype="<f4").tobytes()
    short, long = 3, 4
    tags = [  # (tag, type, value), in ascending order, as TIFF requires
        (256, long, width),
        (257, long, height),
        (258, short, 32),  # bits per sample
        (259, short, 1),  # no compression
        (262, short, 1),  # black is zero
        (273, long, 0),  # offset of the strip: set below
        (277, short, 1),  # samples per pixel
        (278, long, height),  # rows per strip
        (279, long, len(pixels)),
        (339, short, 3),  # samples are IEEE floats
    ]
    start = 8 + 2 + 12 * len(tags) + 4
    directory = struct.pack("<H", len(tags))
    for tag, kind, value in tags:
        directory += struct.pack("<HHII", tag, kind, 1, start if tag == 273 else value)
    return struct.pack("<2sHI", b"II", 42, 8) + directory + struct.pack("<I", 0) + pixels


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _unfilter(filtered: npt.NDArray[np.uint8], step: int) -> npt.NDArray[np.uint8]:
    """Undo PNG's row filters; `step` is the number of bytes per pixel."""
    rows: npt.NDArray[np.uint8] = filtered[:, 1:].copy()
    above = np.zeros(rows.shape[1], dtype=np.uint8)
    for kind, row in zip(filtered[:, 0].tolist(), rows, strict=True):
        if kind == 1:
            by_pixel = row.reshape(-1, step)
            np.cumsum(by_pixel, axis=0, dtype=np.uint8, out=by_pixel)
        elif kind == _UP:
            row += above
        elif kind in (3, 4):
            row[:] = np.frombuffer(_average_or_paeth(kind, row.tobytes(), above.tobytes(), step), dtype=np.uint8)
        elif kind != 0:
            raise ValueError("the PNG is broken: a row has an unknown filter")
        above = row
    return rows


def _average_or_paeth(kind: int, row: bytes, above: bytes, step: int) -> bytes:
    """Undo the filters Average (3) and Paeth (4), in which each byte needs the decoded pixel to its left."""
    out = bytearray(row)
    for i, value in enumerate(row):
        left = out[i - step] if i >= step else 0
        up = above[i]
        if kind == 3:
            guess = (left + up) // 2
        else:
            corner = above[i - step] if i >= step else 0
            estimate = left + up - corner
            to_left, to_up, to_corner = abs(estimate - left), abs(estimate - up), abs(estimate - corner)
            guess = left if to_left <= to_up and to_left <= to_corner else up if to_up <= to_corner else corner
        out[i] = (value + guess) & 255
    return bytes(out)
