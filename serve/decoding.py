"""From bytes to typed values: what does not parse is 400; what parses and is wrong is 422, with the field's path."""

from __future__ import annotations

import binascii
import re
from collections.abc import Mapping
from typing import Literal, TypeVar

import msgspec

from serve.errors import ApiError

T = TypeVar("T")
Protocol = Literal["json", "msgpack"]


def decode(data: bytes, protocol: Protocol, type_: type[T]) -> T:
    """A typed value; what does not parse is 400, what parses and is wrong is 422 with the path."""
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
    """msgspec's sentence as ours, with the field's path; broken base64 is a body that does not parse (400)."""
    match = _PATH.search(message)
    path = prefix + (match.group(1) if match else "")
    text = message[: match.start()] if match else message
    if named := _FIELD.search(text):
        path = f"{path}.{named.group(1)}"
    path = path.lstrip(".")
    if "base64" in text:
        return ApiError("bad_body", f"{path} is not base64", field=path)
    return ApiError("invalid", f"{text}{f', at {path}' if path and not named else ''}", field=path or None)


def decode_form(parts: Mapping[str, bytes], fields: Mapping[str, str], type_: type[T]) -> T:
    """A multipart request: the JSON part `request`, the other parts put into its fields as `fields` names them."""
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
    """The value of a field that was kept undecoded; `name` is how the client calls it."""
    module = msgspec.json if protocol == "json" else msgspec.msgpack
    try:
        return module.decode(data, type=type_)  # type: ignore[no-any-return]
    except msgspec.ValidationError as error:
        raise validation_error(str(error), name) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError, ValueError) as error:
        raise ApiError("bad_body", f"{name} does not parse: {error}", field=name) from None
