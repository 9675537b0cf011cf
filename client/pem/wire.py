"""Decode the bodies of answers, and turn refusals into errors."""

from __future__ import annotations

from typing import Final, TypeVar

import httpx
import msgspec

from pem.errors import PemError, RequestRefused, kind_of

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
T = TypeVar("T")


def decoded(response: httpx.Response, type_: type[T]) -> T:
    packed = response.headers.get("content-type", "").startswith(MSGPACK)
    try:
        if packed:
            return msgspec.msgpack.decode(response.content, type=type_)
        return msgspec.json.decode(response.content, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PemError(f"{response.request.url} does not answer as a PEM server does: {error}") from None


class _ErrorBody(msgspec.Struct):
    code: str
    detail: str
    request_id: str | None = None
    field: str | None = None


class _ErrorAnswer(msgspec.Struct):
    error: _ErrorBody


def refused(response: httpx.Response) -> RequestRefused:
    status = response.status_code
    retry_after_s = _retry_after(response)
    try:
        error = decoded(response, _ErrorAnswer).error
    except PemError:  # a proxy's page, or no PEM server at all
        words = f"{response.request.url} answered {status} {response.reason_phrase}"
        request_id = response.headers.get("x-request-id")
        kind = kind_of(status, "unknown")
        return kind(status, "unknown", words, request_id=request_id, retry_after_s=retry_after_s)
    return kind_of(status, error.code)(
        status,
        error.code,
        error.detail,
        field=error.field,
        request_id=error.request_id,
        retry_after_s=retry_after_s,
    )


def _retry_after(response: httpx.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else None
