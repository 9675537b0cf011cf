"""Every verb of the client, once, as a generator that yields what to do next: send a request, or sleep.

The blocking and the async client in `client/pem/client.py` run the generators. Retries and deadlines are all here.
"""

from __future__ import annotations

import io
import ipaddress
import os
import random
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar
from urllib.parse import quote

import httpx
import msgspec
import numpy as np
import numpy.typing as npt

from pem import __version__
from pem.contract import ObjectAnswer, ObjectList
from pem.encode import asked_for, pose_request
from pem.errors import ConnectionFailed, OnboardingFailed, PemError, RequestRefused, TimedOut
from pem.meshfiles import Mesh, read_cad
from pem.options import (
    ALREADY_KNOWN,
    Camera,
    ClientOptions,
    DetectionOptions,
    Mask,
    ObjectOptions,
    Picture,
    PoseOptions,
    Progress,
    merged,
)
from pem.poses import PoseResult, pose_result
from pem.wire import JSON, MSGPACK, decoded, refused

DEFAULT_URL: Final = "http://127.0.0.1:8003"
KEY_VARIABLE: Final = "PEM_API_KEY"  # the API key of a client that gets none as an argument
T = TypeVar("T")

_GRACE_S: Final = 2.0  # beyond a deadline, for the server's 504 to arrive
_COME_BACK: Final = (429, 503)  # with Retry-After: the same request may succeed later
_BACKOFF_S: Final = 0.2  # after a broken connection; doubles
_NOT_YET: Final = (429, 502, 503, 504)  # of /readyz: the server's own 503, or a proxy that cannot reach it yet


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One exchange with the server."""

    method: str
    path: str
    body: bytes | None = None
    content_type: str | None = None
    accept: str = JSON
    upload: _Upload | None = None
    deadline_s: float | None = None  # for the whole call; also sent to the server
    retries: int | None = None  # None = the client's
    params: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class _Upload:
    """A file to upload as multipart, opened again for each attempt."""

    source: Path | bytes
    file_name: str
    request: bytes  # the JSON part
    on_progress: Progress | None

    def open(self) -> _Reader:
        file = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb")
        return _Reader(file, self.on_progress)


class _Reader:
    """A file that reports how much of it has been read."""

    def __init__(self, file: BinaryIO, on_progress: Progress | None) -> None:
        self._file = file
        self._on_progress = on_progress
        self._size = max(1, file.seek(0, io.SEEK_END))
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if self._on_progress is not None:
            self._on_progress("upload", self._file.tell() / self._size)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True, kw_only=True)
class _Send:
    """Step: send this request, then send the response into the generator, or throw httpx's error into it."""

    method: str
    path: str
    content: bytes | None
    headers: dict[str, str]
    upload: _Upload | None
    params: Mapping[str, str] | None
    timeout: httpx.Timeout

    @contextmanager
    def arguments(self) -> Iterator[dict[str, Any]]:
        """Yield the arguments of httpx's `request`; an upload's file is open during the block."""
        common: dict[str, Any] = {
            "method": self.method,
            "url": self.path,
            "headers": self.headers,
            "params": self.params,
            "timeout": self.timeout,
        }
        if self.upload is None:
            yield common | {"content": self.content}
            return
        file = self.upload.open()
        try:
            parts = [
                ("request", (None, self.upload.request, JSON)),
                ("file", (self.upload.file_name, file, "application/octet-stream")),
            ]
            yield common | {"files": parts}
        finally:
            file.close()


_Sleep = float  # step: sleep for this number of seconds
Steps = Generator[_Send | _Sleep, httpx.Response | None, T]


class Verbs:
    """Every verb as steps, and the parts that both clients share."""

    def __init__(self, url: str, api_key: str | None, options: ClientOptions) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise PemError(f"{url!r} is no address: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise PemError(f"{url!r} is no address of a server; it looks like {DEFAULT_URL}")
        self.url = url.rstrip("/")
        self._options = options
        headers = {"User-Agent": f"pem-client/{__version__}"}
        if api_key is None:
            api_key = os.environ.get(KEY_VARIABLE)
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        # A proxy set in the environment is never meant for a server on this machine.
        self._http_arguments: dict[str, Any] = {
            "base_url": self.url,
            "headers": headers,
            "trust_env": not _is_loopback(parsed.host),
        }

    # Exchange: retries and failures.

    def _exchange(self, call: _Call) -> Steps[httpx.Response]:
        """Send a call, with retries, and return the response. Raises PemError if it fails or is refused."""
        end = None if call.deadline_s is None else time.monotonic() + call.deadline_s
        retries = self._options.retries if call.retries is None else call.retries
        budget_s = self._options.retry_budget_s
        attempt = 0
        while True:
            failure: PemError
            try:
                response = yield self._step(call, end)
            except httpx.TimeoutException as error:
                if not isinstance(error, httpx.ConnectTimeout):
                    raise TimedOut(f"{self.url} did not answer in time") from None
                failure, pause_s = ConnectionFailed(f"no server answers at {self.url} (connecting timed out)"), 0.0
            except httpx.RequestError as error:
                failure = self._connection_failed(error)
                pause_s = _BACKOFF_S * 2**attempt
            else:
                assert response is not None
                if response.is_success:
                    return response
                failure = refusal = refused(response)
                if refusal.retry_after_s is None or response.status_code not in _COME_BACK:
                    raise refusal
                pause_s = refusal.retry_after_s
            pause_s += random.uniform(0.0, 0.1 * pause_s + 0.05)  # keeps clients from coming back all at once
            left_s = budget_s if end is None else min(budget_s, end - time.monotonic())
            if attempt >= retries or pause_s > left_s:
                raise failure
            yield pause_s
            budget_s -= pause_s
            attempt += 1

    def _step(self, call: _Call, end: float | None) -> _Send:
        headers = {"Accept": call.accept} | _trace_headers()
        if call.content_type:
            headers["Content-Type"] = call.content_type
        timeout_s = self._options.timeout_s
        if end is not None:
            left_s = max(0.001, end - time.monotonic())
            headers["X-Request-Deadline-Ms"] = str(max(1, round(left_s * 1000)))
            timeout_s = left_s + _GRACE_S
        return _Send(
            method=call.method,
            path=call.path,
            content=call.body,
            headers=headers,
            upload=call.upload,
            params=call.params,
            timeout=httpx.Timeout(timeout_s, connect=min(5.0, timeout_s)),
        )

    def _connection_failed(self, error: httpx.RequestError) -> ConnectionFailed:
        if isinstance(error, httpx.ConnectError):
            return ConnectionFailed(f"no server answers at {self.url}: {error}")
        return ConnectionFailed(f"the connection to {self.url} broke: {error or type(error).__name__}")

    # Poses.

    def _pose(self, path: str, body: dict[str, Any], options: Mapping[str, Any]) -> Steps[PoseResult]:
        kind = JSON if self._options.use_json else MSGPACK
        data = msgspec.json.encode(body) if self._options.use_json else msgspec.msgpack.encode(body)
        deadline_ms = options.get("deadline_ms")
        deadline_s = self._options.deadline_s if deadline_ms is None else deadline_ms / 1000
        call = _Call(method="POST", path=path, body=data, content_type=kind, accept=kind, deadline_s=deadline_s)
        return pose_result((yield from self._exchange(call)), asked_for(options))

    def _estimate(
        self,
        rgb: Picture,
        depth: Picture,
        K: Camera,
        masks: Sequence[Mask] | None,
        options: PoseOptions | None,
        more: Mapping[str, Any],
    ) -> Steps[PoseResult]:
        chosen = merged("estimate", DetectionOptions, options, more, "rgb", "depth", "K", "masks", "options")
        if masks is None and chosen.get("detections") is None:
            raise ValueError("give masks, or detections as SAM-6D writes them")
        body = pose_request(rgb, depth, K, masks, chosen)
        return (yield from self._pose("/api/v1/pose_estimation", body, chosen))

    def _full_pipeline(
        self,
        rgb: Picture,
        depth: Picture,
        K: Camera,
        ism_paths: Mapping[str, str | None],
        options: PoseOptions | None,
        more: Mapping[str, Any],
    ) -> Steps[PoseResult]:
        named = ("rgb", "depth", "K", *ism_paths, "options")
        chosen = merged("full_pipeline", PoseOptions, options, more, *named)
        body = pose_request(rgb, depth, K, None, {**chosen, **ism_paths})
        return (yield from self._pose("/api/v1/full_pipeline", body, chosen))

    # The server.

    def _get(self, path: str, type_: type[T]) -> Steps[T]:
        return decoded((yield from self._exchange(_Call(method="GET", path=path))), type_)

    def _ready(self) -> Steps[str | None]:
        """Return None if the server is ready, else the reason in words."""
        try:
            yield from self._exchange(_Call(method="GET", path="/readyz", retries=0))
        except ConnectionFailed as error:
            return str(error)
        except RequestRefused as error:
            if error.status not in _NOT_YET:
                raise
            return error.detail
        return None

    def _wait_ready(self, timeout_s: float, on_wait: Callable[[str], None] | None) -> Steps[None]:
        end = time.monotonic() + timeout_s
        while (reason := (yield from self._ready())) is not None:
            if time.monotonic() > end:
                raise TimedOut(f"{self.url} was not ready within {timeout_s:g} s: {reason}")
            if on_wait is not None:
                on_wait(reason)
            yield 0.2

    # Objects.

    def _add(self, cad: str | Path | bytes | Mesh, options: ObjectOptions) -> Steps[ObjectAnswer]:
        source, file_name, cad_format = read_cad(cad, options.cad_format)
        discrete, continuous, on_progress = (
            options.symmetries_discrete,
            options.symmetries_continuous,
            options.on_progress,
        )
        request = {
            "name": options.name,
            "replace": options.replace or None,
            "model_unit": options.model_unit,
            "cad_format": cad_format,
            "symmetries_discrete": None if discrete is None else [_numbers(T_obj_obj) for T_obj_obj in discrete],
            "symmetries_continuous": None
            if continuous is None
            else [{key: _numbers(vector) for key, vector in axis.items()} for axis in continuous],
        }
        upload = _Upload(
            source=source,
            file_name=file_name,
            request=msgspec.json.encode({key: value for key, value in request.items() if value is not None}),
            on_progress=on_progress,
        )
        call = _Call(method="POST", path="/api/v1/objects", upload=upload)
        response = yield from self._exchange(call)
        added = decoded(response, ObjectAnswer)
        if on_progress is not None and response.status_code == httpx.codes.OK:  # a new object is 201
            on_progress(ALREADY_KNOWN, 1.0)
        if not options.wait:
            return added
        end = time.monotonic() + options.wait_timeout_s
        while True:
            if on_progress is not None:
                on_progress("onboarding", added.progress)
            if added.status == "ready":
                return added
            if added.status == "failed":
                raise OnboardingFailed(f"{added.name or added.object_id} could not be onboarded: {added.error}")
            if time.monotonic() > end:
                waited = f"{options.wait_timeout_s:g} s"
                raise OnboardingFailed(
                    f"{added.name or added.object_id} is still being onboarded after {waited}; it goes on"
                )
            yield 0.2
            added = yield from self._get(object_path(added.object_id), ObjectAnswer)

    def _list(self) -> Steps[list[ObjectAnswer]]:
        return (yield from self._get("/api/v1/objects", ObjectList)).objects

    def _remove(self, object_id: str) -> Steps[None]:
        yield from self._exchange(_Call(method="DELETE", path=object_path(object_id)))


def object_path(object_id: str) -> str:
    return f"/api/v1/objects/{quote(object_id, safe='')}"


def _numbers(array: npt.ArrayLike) -> list[float]:
    numbers: list[float] = np.asarray(array, dtype=np.float64).ravel().tolist()
    return numbers


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _trace_headers() -> dict[str, str]:
    """Return the headers of the caller's OpenTelemetry span, if any: the server's span becomes its child."""
    trace = sys.modules.get("opentelemetry.trace")  # not imported here: programs without OpenTelemetry pay nothing
    if trace is None:
        return {}
    span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        return {}
    headers = {"traceparent": f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"}
    state = span.trace_state.to_header()
    return headers | ({"tracestate": state} if state else {})
