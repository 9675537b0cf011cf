"""Decode colour and depth images from a client's bytes; refuse what is broken, too large or lossy.

OpenCV decodes, but it is lenient: it returns an image for files whose checksums are wrong. So each file is checked
first: header, then size limits, then the structure (every PNG checksum, the exact inflated length, JPEG's end marker,
TIFF's strips inside the file). Inflating is most of the work of decoding a PNG, so OpenCV receives the bytes that the
check inflated, stored without compression.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from posekit.errors import BadData, InvalidInput, TooLarge

UInt8 = npt.NDArray[np.uint8]
UInt16 = npt.NDArray[np.uint16]
Float32 = npt.NDArray[np.float32]
Image = npt.NDArray[Any]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_SIDE = 1 << 20  # pixels; OpenCV's own limit
MAX_JPEG_SCANS = 100  # a usual progressive file has ten; each scan costs a pass over the whole image

# The answer tells the client what is wrong with a file. OpenCV's lines on stderr would reach nobody.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """The facts in an image's header."""

    format: Literal["png", "jpeg", "tiff"]
    width: int
    height: int
    channels: int  # of the decoded image: a palette counts as 3, alpha as one
    bit_depth: int  # bits per channel, as stored: 1, 2, 4, 8, 16, 32, 64
    dtype: str  # of the decoded image: "uint8", "uint16", "float32", ...

    @property
    def pixels(self) -> int:
        """Return width times height."""
        return self.width * self.height


# ------------------------------------------------------------------------------------------------------------ headers


def inspect(data: bytes, field: str | None = None) -> ImageInfo:
    """Read format and size from the header of a PNG, JPEG or TIFF. Decodes nothing, so any size is safe.

    Raises BadData for empty bytes, for any other format, and for a header that is cut short.
    """
    if not data:
        raise BadData("the image is empty (0 bytes)", field)
    if data.startswith(PNG_SIGNATURE):
        return _png_header(data, field).info
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg_header(data, field)
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _Tiff(data, field).info
    raise BadData("the bytes are no PNG, JPEG or TIFF image", field)


def depth_is_float(data: bytes) -> bool:
    """Return True if a depth image is a float TIFF, whose scale the client has to give; False for anything else."""
    return data[:4] in (b"II*\0", b"MM\0*")


def check_size(info: ImageInfo, max_megapixels: float, field: str | None = None) -> None:
    """Raise TooLarge if the decoded image would exceed the limit."""
    size = f"the image is {info.width} x {info.height} pixels"
    if info.pixels > max_megapixels * 1e6:
        raise TooLarge(f"{size}, more than the limit of {max_megapixels:g} megapixels", field)
    if max(info.width, info.height) > MAX_SIDE:
        raise TooLarge(f"{size}, more than {MAX_SIDE} on a side", field)


# --------------------------------------------------------------------------------------------------- decode and encode


def decode_color(data: bytes, max_megapixels: float, field: str | None = None) -> UInt8:
    """Decode a colour image to (H, W, 3) uint8 RGB.

    Takes JPEG and 8-bit PNG (palettes and fewer bits too). Grey is repeated and alpha dropped. EXIF rotation is not
    applied: masks and depth do not have it. Raises BadData, TooLarge, InvalidInput (16-bit, TIFF).
    """
    info = inspect(data, field)
    check_size(info, max_megapixels, field)
    if info.format == "tiff":
        raise InvalidInput("the colour image is a TIFF; send an 8-bit PNG or JPEG", field)
    if info.bit_depth > 8:
        raise InvalidInput(f"the colour image has {info.bit_depth} bits per channel; send an 8-bit PNG or JPEG", field)
    checked = _checked_png(data, field) if info.format == "png" else _checked_jpeg(data, field)
    image = _decode(checked, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION, info, field)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise BadData("the colour image cannot be decoded to 8-bit RGB", field)
    return image


def decode_depth(data: bytes, max_megapixels: float, field: str | None = None) -> UInt16 | Float32:
    """Decode a depth image to its raw values, (H, W) uint16 (PNG) or float32 (TIFF); 0 = no reading.

    NaN, infinities and negative values of a float image become 0. Raises BadData, TooLarge, InvalidInput (8-bit,
    several channels, JPEG).
    """
    info = inspect(data, field)
    check_size(info, max_megapixels, field)
    if info.format == "jpeg":
        raise InvalidInput(
            "the depth image is a JPEG, which holds 8 bits: it has lost its data; send a 16-bit PNG", field
        )
    if info.channels != 1:
        raise InvalidInput(
            f"the depth image has {info.channels} channels and looks like a picture of depth; send the readings "
            "themselves as a 16-bit single-channel PNG or a 32-bit float TIFF",
            field,
        )
    if info.bit_depth <= 8:
        raise InvalidInput(
            f"the depth image has {info.bit_depth} bits per pixel: it has lost its data (256 steps cannot hold depth "
            "in millimetres); send the sensor's 16-bit values as a 16-bit PNG or a 32-bit float TIFF",
            field,
        )
    if info.format == "png":
        image = _decode(_checked_png(data, field), cv2.IMREAD_UNCHANGED, info, field)
        if image.ndim != 2 or image.dtype != np.uint16:
            raise BadData("the depth image cannot be decoded to 16-bit values", field)
        return image
    if info.dtype != "float32":
        raise InvalidInput(f"the depth TIFF holds {info.dtype}; send a 32-bit float TIFF or a 16-bit PNG", field)
    image = _decode(_Tiff(data, field).checked(), cv2.IMREAD_UNCHANGED, info, field)
    if image.ndim != 2 or image.dtype != np.float32:
        raise BadData("the depth image cannot be decoded to 32-bit floats", field)
    return _without_nonsense(image)


def decode_depth_raw_f32(data: bytes, height: int, width: int, field: str | None = None) -> Float32:
    """Read bare little-endian float32 depth of a known size to (H, W) float32; NaN, infinities and negatives become 0.

    Raises BadData if there are no bytes, InvalidInput if their number is not 4 x height x width.
    """
    if not data:
        raise BadData("the depth image is empty (0 bytes)", field)
    if height < 1 or width < 1 or len(data) != 4 * height * width:
        raise InvalidInput(
            f"raw float32 depth of {width} x {height} pixels takes {4 * height * width} bytes, {len(data)} were sent",
            field,
        )
    return _without_nonsense(np.frombuffer(data, dtype="<f4").reshape(height, width))


def decode_png(data: bytes, field: str | None = None) -> Image:
    """Decode any PNG as it is stored: (H, W) or (H, W, 3 or 4 in BGR(A) order), uint8 or uint16.

    Palettes are expanded; the transparency of a palette or a key colour is ignored. Call `inspect` and `check_size`
    first: the size is not checked here.
    """
    info = inspect(data, field)
    if info.format != "png":
        raise InvalidInput(f"the image is a {info.format.upper()}; send a PNG", field)
    return _decode(_checked_png(data, field), cv2.IMREAD_UNCHANGED, info, field)


def encode_png(array: Image, compression: int = 1) -> bytes:
    """Encode (H, W) uint8, uint16 or bool (True = 255), or (H, W, 3 or 4) uint8 RGB(A) as PNG.

    `compression` is zlib's level, 0 to 9. Level 1 is by far the fastest that compresses at all.
    """
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else 0
    sixteen_bit = array.dtype == np.uint16 and channels == 1
    if channels not in (1, 3, 4) or array.size == 0 or not (array.dtype == np.uint8 or sixteen_bit):
        raise InvalidInput(f"cannot write an array of shape {array.shape} and type {array.dtype} as a PNG")
    if channels == 3:
        array = array[:, :, ::-1]
    elif channels == 4:
        array = array[:, :, [2, 1, 0, 3]]
    done, encoded = cv2.imencode(
        ".png", np.ascontiguousarray(array), [cv2.IMWRITE_PNG_COMPRESSION, min(9, max(0, compression))]
    )
    if not done:
        raise InvalidInput(f"cannot write an array of shape {array.shape} and type {array.dtype} as a PNG")
    return encoded.tobytes()


def _decode(data: bytes | bytearray, flags: int, info: ImageInfo, field: str | None) -> Image:
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    except cv2.error:
        image = None
    if image is None or image.shape[:2] != (info.height, info.width):
        raise BadData(f"the {info.format.upper()} image is broken: its pixels cannot be decoded", field)
    return image


def _without_nonsense(depth: Float32) -> Float32:
    """Return a copy with 0 for readings that are NaN, infinite or negative, in the machine's byte order."""
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0)).astype(np.float32, copy=False)


# ---------------------------------------------------------------------------------------------------------------- PNG

_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # samples per stored pixel, by colour type
_PNG_BIT_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_STEP = 1 << 20  # bytes inflated at a time where pixels are only counted
_STORED_STEP = (1 << 16) - 1  # bytes inflated at a time where pixels are passed on: the limit of one stored block
_STORED_BELOW = 8  # pixels are passed on inflated only if they are less than this many times their compressed size


class _PngHeader(NamedTuple):
    info: ImageInfo
    color_type: int
    interlaced: bool

    def passes(self) -> Iterator[tuple[int, int]]:
        """Yield (bytes per row with its filter byte, rows) for each pass that has pixels."""
        bits = _PNG_CHANNELS[self.color_type] * self.info.bit_depth
        steps = _ADAM7 if self.interlaced else ((0, 0, 1, 1),)
        for x0, y0, dx, dy in steps:
            columns = -(-(self.info.width - x0) // dx)
            rows = -(-(self.info.height - y0) // dy)
            if columns > 0 and rows > 0:
                yield 1 + (columns * bits + 7) // 8, rows


def _png_header(data: bytes, field: str | None) -> _PngHeader:
    if len(data) < 33 or data[8:16] != b"\0\0\0\x0dIHDR":
        raise BadData("the PNG is broken: its header is missing or cut short", field)
    width, height, bit_depth, color_type, compression, filtering, interlace, checksum = struct.unpack(
        ">IIBBBBBI", data[16:33]
    )
    if zlib.crc32(data[12:29]) != checksum:
        raise BadData("the PNG is broken: a checksum does not match its data", field)
    if (
        not 0 < width < 1 << 31
        or not 0 < height < 1 << 31
        or bit_depth not in _PNG_BIT_DEPTHS.get(color_type, ())
        or compression
        or filtering
        or interlace > 1
    ):
        raise BadData("the PNG is broken: its header makes no sense", field)
    info = ImageInfo(
        format="png",
        width=width,
        height=height,
        channels=3 if color_type == 3 else _PNG_CHANNELS[color_type],
        bit_depth=bit_depth,
        dtype="uint16" if bit_depth == 16 else "uint8",
    )
    return _PngHeader(info, color_type, interlace == 1)


def _checked_png(data: bytes, field: str | None) -> bytearray:
    """Return the PNG reduced to its pixels, after checking every checksum and the exact inflated length.

    Dropped are metadata, colour profiles, rotation, animation frames and transparency keys. None may change the pixels,
    and each is one more parser that could be fed nonsense. The pixels are passed on inflated, as the check has them,
    so that OpenCV need not inflate them again. Pixels that compression makes far smaller stay compressed: inflating
    them twice costs no more than copying, and a small file that claims a huge image stays small.
    """
    header = _png_header(data, field)
    kept = bytearray(PNG_SIGNATURE)
    pixels: list[memoryview] = []
    view = memoryview(data)
    position, kind, previous, has_palette = len(PNG_SIGNATURE), b"", b"", False
    while kind != b"IEND":
        if position + 12 > len(data):
            raise BadData("the PNG is cut short: its end marker is missing", field)
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data):
            raise BadData("the PNG is cut short or broken: a part reaches past the end of the file", field)
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(view[position + 4 : end - 4]) != checksum:
            raise BadData("the PNG is broken: a checksum does not match its data", field)
        if kind == b"IDAT":
            if pixels and previous != b"IDAT":
                raise BadData("the PNG is broken: its pixel data is not in one piece", field)
            pixels.append(view[position + 8 : end - 4])
        elif kind == b"PLTE":
            if length % 3 or not 0 < length <= 768 or pixels or has_palette or header.color_type in (0, 4):
                raise BadData("the PNG is broken: its palette makes no sense", field)
            has_palette = True
        elif kind not in (b"IHDR", b"IEND") and not kind[0] & 0x20:
            raise BadData("the PNG is broken: it holds a part of unknown kind", field)
        if (kind == b"IHDR") != (position == len(PNG_SIGNATURE)):
            raise BadData("the PNG is broken: its header is not its first part", field)
        if kind in (b"IHDR", b"PLTE"):
            kept += view[position:end]
        previous, position = kind, end
    if header.color_type == 3 and not has_palette:
        raise BadData("the PNG is broken: its palette is missing", field)
    _add_checked_pixels(kept, header, b"".join(pixels), field)
    _add_png_chunk(kept, b"IEND")
    return kept


def _add_checked_pixels(kept: bytearray, header: _PngHeader, stream: bytes, field: str | None) -> None:
    """Inflate the pixel data in bounded steps, count it, check every row's filter byte, and add its chunks to `kept`.

    Where pixels are added inflated, each step becomes a chunk that holds one stored block (RFC 1951, 3.2.4).
    """
    broken = BadData("the PNG is broken: its pixel data does not inflate to the size of the image", field)
    passes = list(header.passes())
    expected = sum(row_bytes * rows for row_bytes, rows in passes)
    stored = expected < _STORED_BELOW * len(stream)
    if stored:
        _add_png_chunk(kept, b"IDAT", b"\x78\x01")  # zlib's header
    inflater = zlib.decompressobj()
    count = taken = 0
    step = _STORED_STEP if stored else _STEP
    while taken < len(stream) and not inflater.eof:
        rest = stream[taken : taken + step]  # not all at once: zlib copies what a step leaves over
        taken += len(rest)
        more = True
        while more and not inflater.eof:
            try:
                inflated = inflater.decompress(rest, step)
            except zlib.error:
                raise broken from None
            rest = inflater.unconsumed_tail
            start = 0
            for row_bytes, rows in passes:
                stop = start + row_bytes * rows
                first = max(start, start + -(-(count - start) // row_bytes) * row_bytes)
                if max(inflated[first - count : max(0, stop - count) : row_bytes], default=0) > 4:
                    raise BadData("the PNG is broken: a row has an unknown filter", field)
                start = stop
            size = len(inflated)
            count += size
            if count > expected:
                raise broken
            if stored and size:
                _add_png_chunk(kept, b"IDAT", struct.pack("<BHH", 0, size, 0xFFFF - size), inflated)
            more = size == step  # a full step: zlib may hold back more
    if count != expected or not inflater.eof:
        raise broken
    taken -= len(inflater.unused_data)
    if stored:  # an empty last block, and the checksum of the inflated bytes
        _add_png_chunk(kept, b"IDAT", b"\1\0\0\xff\xff", stream[taken - 4 : taken])
    else:
        _add_png_chunk(kept, b"IDAT", stream[:taken])


def _add_png_chunk(kept: bytearray, kind: bytes, *parts: bytes) -> None:
    kept += struct.pack(">I", sum(map(len, parts))) + kind
    checksum = zlib.crc32(kind)
    for part in parts:
        kept += part
        checksum = zlib.crc32(part, checksum)
    kept += struct.pack(">I", checksum)


# --------------------------------------------------------------------------------------------------------------- JPEG

_JPEG_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # inside scan data
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def _jpeg_segments(data: bytes, field: str | None) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, stop) of each segment, up to and including the end marker (which is empty)."""
    position = 2
    while True:
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        if position + 2 > len(data):
            raise BadData("the JPEG is cut short: its end marker is missing", field)
        if data[position] != 0xFF:
            raise BadData("the JPEG is broken: a marker is missing", field)
        marker = data[position + 1]
        position += 2
        if marker == 0xD9:
            yield marker, position, position
            return
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:
            continue
        if position + 2 > len(data):
            raise BadData("the JPEG is cut short", field)
        (length,) = struct.unpack_from(">H", data, position)
        stop = position + length
        if length < 2 or stop > len(data):
            raise BadData("the JPEG is cut short or broken: a part reaches past the end of the file", field)
        yield marker, position + 2, stop
        position = stop
        if marker == 0xDA:
            following = _JPEG_NEXT_MARKER.search(data, position)
            if following is None:
                raise BadData("the JPEG is cut short: its end marker is missing", field)
            position = following.start()


def _jpeg_header(data: bytes, field: str | None) -> ImageInfo:
    for marker, start, stop in _jpeg_segments(data, field):
        if marker in _JPEG_FRAMES:
            if stop - start < 6:
                break
            bit_depth, height, width, channels = struct.unpack_from(">BHHB", data, start)
            if not (height and width) or channels not in (1, 3, 4) or bit_depth not in (8, 12, 16):
                break
            return ImageInfo(
                format="jpeg",
                width=width,
                height=height,
                channels=channels,
                bit_depth=bit_depth,
                dtype="uint8" if bit_depth == 8 else "uint16",
            )
        if marker == 0xDA:
            break
    raise BadData("the JPEG is broken: its header is missing or makes no sense", field)


def _checked_jpeg(data: bytes, field: str | None) -> bytes:
    frames = scans = end = 0
    for marker, start, _ in _jpeg_segments(data, field):
        frames += marker in _JPEG_FRAMES
        scans += marker == 0xDA
        if scans > MAX_JPEG_SCANS:
            raise BadData(f"the JPEG has more than {MAX_JPEG_SCANS} scans", field)
        end = start
    if frames != 1 or not scans:
        raise BadData("the JPEG is broken: it does not hold exactly one image", field)
    return data[:end]


# --------------------------------------------------------------------------------------------------------------- TIFF

_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I"}
_TIFF_COMPRESSIONS = (1, 5, 8, 32773, 32946)  # none, LZW, deflate, PackBits, deflate
_MAX_TIFF_TAGS = 1000


class _Tiff:
    """The first directory of a TIFF: enough to find the image's size and check that its strips lie inside the file."""

    def __init__(self, data: bytes, field: str | None) -> None:
        self.data, self.field = data, field
        self.order = "<" if data[:2] == b"II" else ">"
        self.entries: dict[int, tuple[int, int, int]] = {}  # tag -> (type, count, position of the values)
        (directory,) = self._unpack("I", 4)
        (count,) = self._unpack("H", directory)
        if not 0 < count <= _MAX_TIFF_TAGS:
            raise self._broken()
        for index in range(count):
            position = directory + 2 + 12 * index
            tag, kind = self._unpack("HH", position)
            (length,) = self._unpack("I", position + 4)
            size = _TIFF_SIZES.get(kind, 0) * length
            value_at = position + 8 if size <= 4 else self._unpack("I", position + 8)[0]
            self.entries.setdefault(tag, (kind, length, value_at))
        width, height = self._one(256), self._one(257)
        bits, formats = set(self._values(258, (1,))), set(self._values(339, (1,)))
        if width < 1 or height < 1 or len(bits) != 1 or len(formats) != 1:
            raise self._broken()
        sample = {1: "uint", 2: "int", 3: "float"}.get(formats.pop(), "")
        bit_depth = bits.pop()
        if not sample or bit_depth not in (1, 2, 4, 8, 16, 32, 64) or (sample == "float" and bit_depth < 16):
            raise self._broken()
        self.info = ImageInfo(
            format="tiff",
            width=width,
            height=height,
            channels=3 if self._one(262, 1) == 3 else self._one(277, 1),
            bit_depth=bit_depth,
            dtype=f"{sample}{max(8, bit_depth)}",
        )

    def checked(self) -> bytes:
        """Return the file with its rotation tag neutral, after checking that all strips or tiles lie inside it."""
        if self._one(259, 1) not in _TIFF_COMPRESSIONS:
            raise InvalidInput(
                "the TIFF uses an unusual compression; write it uncompressed, LZW or deflate", self.field
            )
        height, width = self.info.height, self.info.width
        if 322 in self.entries or 324 in self.entries:
            tile_width, tile_height = self._one(322), self._one(323)
            if not 0 < tile_width <= width + 4096 or not 0 < tile_height <= height + 4096:
                raise self._broken()
            pieces = -(-width // tile_width) * -(-height // tile_height)
            pixels_per_piece = tile_width * tile_height
            offsets_tag, counts_tag = 324, 325
        else:
            rows = min(height, self._one(278, height))
            if rows < 1:
                raise self._broken()
            pieces, pixels_per_piece = -(-height // rows), rows * width
            offsets_tag, counts_tag = 273, 279
        offsets, counts = self._values(offsets_tag), self._values(counts_tag)
        if len(offsets) != pieces or len(counts) != pieces:
            raise self._broken()
        for index, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
            needed = pixels_per_piece * self.info.bit_depth // 8 if self._one(259, 1) == 1 else 1
            if offsets_tag == 273 and index == pieces - 1:
                needed = min(needed, (height * width - index * pixels_per_piece) * self.info.bit_depth // 8)
            if offset + count > len(self.data) or count < needed:
                raise BadData("the TIFF is cut short or broken: its pixels reach past the end of the file", self.field)
        if self._one(274, 1) == 1:
            return self.data
        turned_back = bytearray(self.data)
        struct.pack_into(self.order + _TIFF_INTEGERS[self.entries[274][0]], turned_back, self.entries[274][2], 1)
        return bytes(turned_back)

    def _broken(self) -> BadData:
        return BadData("the TIFF is broken: its header is cut short or makes no sense", self.field)

    def _unpack(self, pattern: str, position: int) -> tuple[int, ...]:
        try:
            return struct.unpack_from(self.order + pattern, self.data, position)
        except struct.error:
            raise self._broken() from None

    def _values(self, tag: int, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        if tag not in self.entries and default is not None:
            return default
        kind, count, position = self.entries.get(tag, (0, 0, 0))
        pattern = _TIFF_INTEGERS.get(kind)
        if pattern is None or not 0 < count * _TIFF_SIZES[kind] <= len(self.data):
            raise self._broken()
        return self._unpack(f"{count}{pattern}", position)

    def _one(self, tag: int, default: int | None = None) -> int:
        return self._values(tag, None if default is None else (default,))[0]
