"""Read a request's bytes into typed values: bodies within their limits, forms, and checked values.

A body that does not parse is 400. A value that parses but is wrong is 422, with the field's path.
"""

from __future__ import annotations

import asyncio
import binascii
import os
import re
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import msgspec
from python_multipart.multipart import MultipartParser

from posekit.io.meshes import unreadable
from serve.errors import ApiError

T = TypeVar("T")
Protocol = Literal["json", "msgpack"]
Receive = Callable[[], Any]  # ASGI receive

#: A body refused for its size is still read, and thrown away, up to these limits: else its sender misses the refusal.
_DISCARD_SECONDS = 5.0
_DISCARD_BYTES = 256 * 2**20
_WHOLE_BODY_S = 120.0  # limit on a whole body, however steadily it trickles
_MAX_PARTS = 16
_MAX_PART_HEADERS = 8 * 1024
_SMALL_PART = 2**20


class ClientGone(Exception):
    """The client closed the connection: nobody is left to answer."""


@dataclass
class Form:
    """A multipart body: values and files in memory, and the files that were given a path on disk."""

    values: dict[str, bytes] = field(default_factory=dict)
    file_names: dict[str, str] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)


def media_type(headers: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return the content type and its parameters, names in lower case; ("", {}) if there is none."""
    message = Message()
    message["content-type"] = headers.get("content-type", "")
    if not headers.get("content-type"):
        return "", {}
    return message.get_content_type().lower(), {k.lower(): str(v) for k, v in message.get_params(failobj=[])[1:]}


def _mb(count: int) -> str:
    return f"{count / 2**20:.3g} MB"


async def chunks(
    receive: Receive, headers: Mapping[str, str], *, limit: int, idle_s: float, what: str = "body"
) -> AsyncIterator[bytes]:
    """Yield the body piece by piece, gunzipped if its headers say gzip; 413 as soon as it is over `limit` bytes."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise ApiError(
            "unsupported_media_type",
            f"content encoding {encoding!r} is not understood; send gzip or no encoding at all",
        )
    declared = headers.get("content-length")
    if declared is not None and declared.isdigit() and int(declared) > limit:
        await discard(receive, idle_s)
        raise ApiError("too_large", f"the {what} is {_mb(int(declared))}; at most {_mb(limit)} are accepted")
    gunzip = zlib.decompressobj(31) if encoding in ("gzip", "x-gzip") else None
    total = packed = 0
    end = time.monotonic() + _WHOLE_BODY_S
    while True:
        try:
            async with asyncio.timeout(min(idle_s, max(end - time.monotonic(), 0.0))):
                message = await receive()
        except TimeoutError:
            if time.monotonic() >= end:
                raise ApiError("body_timeout", f"the {what} was not complete after {_WHOLE_BODY_S:g} s") from None
            raise ApiError("body_timeout", f"nothing more of the {what} came for {idle_s:g} s") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        packed += len(chunk)
        pieces = _gunzip(gunzip, chunk, limit - total) if gunzip is not None else [chunk]
        for piece in pieces:
            total += len(piece)
            if total > limit or packed > limit:
                if more:
                    await discard(receive, idle_s)
                unpacked = " after gunzip" if gunzip is not None else ""
                raise ApiError("too_large", f"the {what} is larger{unpacked} than the {_mb(limit)} that are accepted")
            if piece:
                yield piece
        if not more:
            break
    if gunzip is not None and not gunzip.eof:
        raise ApiError("bad_body", f"the {what} is not a complete gzip stream")


def _gunzip(gunzip: Any, chunk: bytes, room: int) -> list[bytes]:
    """Unpack at most one byte more than `room`: enough to see that the limit is passed, never a whole gzip bomb."""
    after_its_end = bool(gunzip.eof and chunk)
    try:
        piece = b"" if after_its_end else gunzip.decompress(chunk, max(room, 0) + 1)
    except zlib.error as error:
        raise ApiError("bad_body", f"the body is not gzip: {error}") from None
    if after_its_end or gunzip.unused_data:
        raise ApiError("bad_body", "something follows the end of the gzip stream")
    return [piece]


async def discard(receive: Receive, idle_s: float) -> bool:
    """Read the rest of a body and throw it away, within bounds: a sender cut off mid-body never sees the answer.

    Returns True if the body's end was reached: then the connection can be used again.
    """
    end = time.monotonic() + _DISCARD_SECONDS
    total = 0
    while total < _DISCARD_BYTES and (left := end - time.monotonic()) > 0:
        try:
            async with asyncio.timeout(min(left, idle_s)):
                message = await receive()
        except TimeoutError:
            return False
        if message["type"] == "http.disconnect":
            return False
        if not message.get("more_body", False):
            return True
        total += len(message.get("body", b""))
    return False


async def read_all(receive: Receive, headers: Mapping[str, str], *, limit: int, idle_s: float) -> bytes:
    """Read the whole body; an empty one is 400."""
    parts = [chunk async for chunk in chunks(receive, headers, limit=limit, idle_s=idle_s)]
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    if not body:
        raise ApiError("bad_body", "the body is empty")
    return body


async def read_form(
    receive: Receive,
    headers: Mapping[str, str],
    *,
    limit: int,
    idle_s: float,
    parts: frozenset[str],
    files: Mapping[str, Path] | None = None,
) -> Form:
    """Read a multipart/form-data body that may hold `parts`; any other part is 422 as soon as it begins.

    The parts in `files` are streamed to the paths given there. All others are kept in memory; if `files` names any,
    each of the others may hold 1 MiB.
    """
    kind, parameters = media_type(headers)
    boundary = parameters.get("boundary", "")
    if kind != "multipart/form-data" or not boundary:
        raise ApiError("unsupported_media_type", "send multipart/form-data with a boundary")
    sink = _FormSink(parts, files or {})
    parser = MultipartParser(boundary.encode(), sink.callbacks())  # type: ignore[arg-type]
    got_any = False
    try:
        async for chunk in chunks(receive, headers, limit=limit, idle_s=idle_s):
            got_any = True
            try:
                parser.write(chunk)
            except (ApiError, OSError):  # raised by the sink
                raise
            except Exception as error:  # raised by the parser: whatever it is, the body is at fault
                raise ApiError("bad_body", f"the multipart body does not parse: {error}") from None
        if not got_any:
            raise ApiError("bad_body", "the body is empty")
        if not sink.complete:
            raise ApiError("bad_body", "the multipart body ends before its last boundary")
    except OSError as error:
        raise ApiError(
            "storage_full", "the upload could not be stored: " + (error.strerror or "disk error"), retry_after_s=30
        ) from None
    finally:
        sink.close()
    return sink.form


class _FormSink:
    """The multipart parser's callbacks."""

    def __init__(self, parts: frozenset[str], files: Mapping[str, Path]) -> None:
        self._known = parts
        self.form = Form()
        self.complete = False
        self._files = files
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._headers: dict[str, str] = {}
        self._name = ""
        self._buffer: bytearray | None = None
        self._file: BinaryIO | None = None
        self._parts = 0

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._on_header_name,
            "on_header_value": self._on_header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise ApiError("bad_body", f"more than {_MAX_PARTS} parts in the multipart body")
        self._headers = {}

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        if len(self._header_value) > _MAX_PART_HEADERS:
            raise ApiError("bad_body", "a part's header is too long")

    def _header_end(self) -> None:
        self._headers[self._header_name.decode("latin-1").lower()] = self._header_value.decode("utf-8", "replace")
        self._header_name.clear()
        self._header_value.clear()

    def _headers_finished(self) -> None:
        message = Message()
        message["content-disposition"] = self._headers.get("content-disposition", "")
        name = message.get_param("name", header="content-disposition")
        if not isinstance(name, str) or not name:
            raise ApiError("bad_body", "a part of the multipart body has no name")
        if name not in self._known:
            known = ", ".join(sorted(self._known))
            raise ApiError("invalid", f"unknown part {name[:80]!r}; the parts are {known}", field=name[:80])
        if name in self.form.values or name in self.form.paths:
            raise ApiError("bad_body", f"the part {name!r} is there twice", field=name)
        self._name = name
        file_name = message.get_filename()
        if file_name:
            self.form.file_names[name] = os.path.basename(file_name.replace("\\", "/"))
        if name in self._files:
            self._file = self._files[name].open("wb")
            self.form.paths[name] = self._files[name]
        else:
            self._buffer = bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])
        elif self._buffer is not None:
            self._buffer += memoryview(data)[start:end]
            if self._files and len(self._buffer) > _SMALL_PART:
                raise ApiError("too_large", f"the part {self._name!r} is over {_mb(_SMALL_PART)}", field=self._name)

    def _part_end(self) -> None:
        if self._buffer is not None:
            self.form.values[self._name] = bytes(self._buffer)
            self._buffer = None
        self.close()

    def _end(self) -> None:
        self.complete = True


# -------------------------------------------------------------------------------------------------------------- values


def decode(data: bytes, protocol: Protocol, type_: type[T]) -> T:
    """Decode a typed value. Data that does not parse is 400; a value of the wrong type is 422, with its path."""
    module = msgspec.json if protocol == "json" else msgspec.msgpack
    try:
        return module.decode(data, type=type_)  # type: ignore[no-any-return]
    except msgspec.ValidationError as error:
        raise validation_error(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        name = "JSON" if protocol == "json" else "MessagePack"
        nan = protocol == "json" and re.search(rb"[\[{,:]\s*-?(NaN|Infinity)", data)
        hint = " (NaN and Infinity are not JSON)" if nan else ""
        raise ApiError("bad_body", f"the body is not {name}: {error}{hint}") from None


_PATH = re.compile(r" - at `(?:key in )?\$?(.*?)`$")
_FIELD = re.compile(r"(?:unknown|required) field `([^`]*)`")


def validation_error(message: str, prefix: str = "") -> ApiError:
    """Turn msgspec's message into an ApiError with the field's path (422); broken base64 is a bad body (400)."""
    match = _PATH.search(message)
    path = prefix + (match.group(1) if match else "")
    text = message[: match.start()] if match else message
    if named := _FIELD.search(text):
        path = f"{path}.{named.group(1)}"
    path = path.lstrip(".")
    if "base64" in text:
        return ApiError("bad_body", f"{path} is not base64", field=path)
    if path.endswith("cad_format") and (words := unreadable("".join(text.split("'")[1:2]).lower())):
        return ApiError("invalid", words, field=path)
    return ApiError("invalid", f"{text}{f', at {path}' if path and not named else ''}", field=path or None)


def decode_form(parts: Mapping[str, bytes], fields: Mapping[str, str], type_: type[T]) -> T:
    """Decode a multipart request: the JSON part `request`, with the other parts in the fields that `fields` names."""
    values = dict(parts)
    if "request" not in values:
        raise ApiError("invalid", "the multipart body needs a JSON part named `request`", field="request")
    tree = decode(values.pop("request"), "json", dict[str, msgspec.Raw])
    document = {name: bytes(raw) for name, raw in tree.items()}
    for part, data in values.items():
        name = fields.get(part, part)
        if name in document:
            raise ApiError("invalid", f"{name} is there twice: as a file and in `request`", field=name)
        document[name] = b'"' + binascii.b2a_base64(data, newline=False) + b'"'
    whole = b"{" + b",".join(msgspec.json.encode(k) + b":" + v for k, v in document.items()) + b"}"
    return decode(whole, "json", type_)


def decode_field(data: bytes, protocol: Protocol, type_: type[T], name: str) -> T:
    """Decode a field that was kept undecoded; `name` is the client's name for it."""
    module = msgspec.json if protocol == "json" else msgspec.msgpack
    try:
        return module.decode(data, type=type_)  # type: ignore[no-any-return]
    except msgspec.ValidationError as error:
        raise validation_error(str(error), name) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError, ValueError) as error:
        raise ApiError("bad_body", f"{name} does not parse: {error}", field=name) from None
