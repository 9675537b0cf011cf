"""Client of the instance-segmentation (ISM) server, which `POST /api/v1/full_pipeline` asks for detections.

One POST with base64 pictures; 16-bit depth is passed on unchanged. A refused connection or a 5xx is tried once more. An
answer that cannot be read, reports a failure, or does not fit the contract is `ism_failed` (502), never an empty scene.
The client is told the status or the timeout, not the ISM server's address or its paths; these are in the log.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import aiohttp
import msgspec

from serve.errors import ApiError
from serve.settings import Ism
from serve.telemetry import logs

_INFERENCE: Final = "/api/v1/inference"
_HEALTH: Final = "/health"
_HEALTH_TIMEOUT_S: Final = 3.0
_LONGEST_ANSWER: Final = 256 * 2**20
_RETRY_PAUSE_S: Final = 0.2

Category = int | str | None


class _Detections(msgspec.Struct):
    masks: list[msgspec.Raw] | None = None
    boxes: list[list[float] | None] | None = None  # xyxy
    scores: list[float] | None = None
    object_ids: list[Category] | None = None
    error: Any = None


class _Answer(msgspec.Struct):
    success: bool = True
    detections: _Detections | None = None
    inference_time: float | None = None
    error_message: Any = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """The ISM server's detections: four columns of equal length, in its order."""

    masks: list[msgspec.Raw]  # JSON text of each mask as received: an RLE object or a nested 0/1 list
    boxes: list[list[float]]  # xywh, pixels; empty if there is no sensible one: the mask's own is used
    scores: list[float]
    object_ids: list[Category]
    inference_time: float | None  # seconds, as the ISM server reports
    seconds: float  # of the whole call, a retry included


class IsmClient:
    """Keeps connections to the configured server. Create and use it in one event loop."""

    def __init__(self, settings: Ism) -> None:
        self._settings = settings
        self._url = settings.url.rstrip("/") if settings.url else None
        self._session: aiohttp.ClientSession | None = None

    @property
    def configured(self) -> bool:
        """Return True if there is a server to ask."""
        return self._url is not None

    async def find(
        self,
        rgb: bytes,
        depth: bytes,
        cam_params: dict[str, Any],
        template_dir: str,
        cad_path: str | None = None,
        output_dir: str | None = None,
        *,
        deadline_unix: float = math.inf,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Found:
        """Return every detection of the picture.

        rgb, depth: encoded files, passed on unchanged; template_dir, cad_path, output_dir: the ISM server's own paths;
        deadline_unix: time.time() after which an answer is useless; headers: of the trace, sent along.
        Raises ApiError: `no_ism`, `ism_failed`, `deadline`.
        """
        if self._url is None:
            raise ApiError("no_ism", "no instance-segmentation server is configured: send the detections yourself")
        question: dict[str, Any] = {
            "rgb_image": rgb,  # bytes are base64 in JSON
            "depth_image": depth,
            "cam_params": cam_params,
            "template_dir": template_dir,
            "cad_path": cad_path,
        }
        if output_dir is not None:
            question["output_dir"] = output_dir
        body = msgspec.json.encode(question)
        started = time.monotonic()
        text = await self._ask(body, deadline_unix, request_id, headers or {})
        return _found(text, time.monotonic() - started, request_id)

    async def healthy(self) -> bool:
        """Return True if the server reports that it is up; False if none is configured."""
        if self._url is None:
            return False
        timeout = aiohttp.ClientTimeout(total=min(_HEALTH_TIMEOUT_S, self._settings.timeout_s))
        try:
            async with self._open().get(self._url + _HEALTH, timeout=timeout, allow_redirects=False) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return False

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(auto_decompress=True, trust_env=False)
        return self._session

    async def _ask(
        self, body: bytes, deadline_unix: float, request_id: str | None, headers: Mapping[str, str]
    ) -> bytes:
        """Return the text of a 200, after at most one retry."""
        first = await self._try(body, deadline_unix, request_id, headers)
        if isinstance(first, bytes):
            return first
        await asyncio.sleep(max(0.0, min(_RETRY_PAUSE_S, deadline_unix - time.time())))
        second = await self._try(body, deadline_unix, request_id, headers)
        if isinstance(second, bytes):
            return second
        raise ApiError("ism_failed", f"the instance-segmentation server {second}, twice in a row")

    async def _try(
        self, body: bytes, deadline_unix: float, request_id: str | None, headers: Mapping[str, str]
    ) -> bytes | str:
        """Return the text of a 200, or the description of a failure worth a retry; raise for other failures."""
        left_s = deadline_unix - time.time()
        if left_s <= 0:
            raise ApiError("deadline", "the deadline passed before the instance-segmentation server answered")
        limit_s = min(self._settings.timeout_s, left_s)
        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=self._settings.connect_timeout_s)
        headers = {"Content-Type": "application/json", **headers} | ({"X-Request-Id": request_id} if request_id else {})
        try:
            async with self._open().post(
                cast(str, self._url) + _INFERENCE, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                text = await _read(response)
                if response.status == 200:
                    return text
                _log("ism_status", request_id, status=response.status, answer=text[:1000].decode("utf-8", "replace"))
                words = f"answered with status {response.status}"
                if response.status >= 500:
                    return words
                raise ApiError("ism_failed", f"the instance-segmentation server {words}")
        except aiohttp.ConnectionTimeoutError:  # it is a TimeoutError, too
            if left_s <= self._settings.connect_timeout_s:
                raise ApiError(
                    "deadline", "the deadline passed before the instance-segmentation server was reached"
                ) from None
            _log("ism_unreachable", request_id, reason=f"no connection within {self._settings.connect_timeout_s:g} s")
            return "could not be reached"
        except TimeoutError:
            if left_s <= self._settings.timeout_s:
                raise ApiError(
                    "deadline", "the deadline passed before the instance-segmentation server answered"
                ) from None
            _log("ism_timeout", request_id, timeout_s=self._settings.timeout_s)
            detail = f"the instance-segmentation server did not answer within {self._settings.timeout_s:g} s"
            raise ApiError("ism_failed", detail) from None
        except (aiohttp.InvalidURL, ValueError) as error:
            _log("ism_url", request_id, reason=str(error))
            raise ApiError("ism_failed", "the instance-segmentation server's configured address is not a URL") from None
        except aiohttp.ClientConnectorError as error:
            _log("ism_unreachable", request_id, reason=str(error))
            return "could not be reached"
        except (aiohttp.ClientError, OSError) as error:
            _log("ism_connection", request_id, reason=f"{type(error).__name__}: {error}")
            return "closed the connection"


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Read the body, within limits."""
    parts = []
    total = 0
    async for part in response.content.iter_any():
        total += len(part)
        if total > _LONGEST_ANSWER:
            raise ApiError(
                "ism_failed", f"the instance-segmentation server's answer is over {_LONGEST_ANSWER >> 20} MB"
            )
        parts.append(part)
    return b"".join(parts)


def _log(event: str, request_id: str | None, **fields: Any) -> None:
    logs.get().warning(event, id=request_id, **fields)


# ------------------------------------------------------------------------------------------------------- the answer


def _found(text: bytes, seconds: float, request_id: str | None) -> Found:
    try:
        answer = msgspec.json.decode(text, type=_Answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _log("ism_malformed", request_id, reason=str(error), answer=text[:1000].decode("utf-8", "replace"))
        raise _malformed(_path(error)) from None
    detections = answer.detections
    if not answer.success or answer.error_message or (detections is not None and detections.error):
        said = answer.error_message or (detections.error if detections is not None else None)
        _log("ism_error", request_id, said=said)
        raise ApiError("ism_failed", "the instance-segmentation server reported a failure" + _said(said))
    if detections is None or detections.masks is None:
        raise _malformed("it has no detections.masks")
    count = len(detections.masks)
    columns = {"boxes": detections.boxes, "scores": detections.scores, "object_ids": detections.object_ids}
    for name, column in columns.items():
        if column is not None and len(column) != count:
            raise _malformed(f"{count} masks and {len(column)} {name}")
    return Found(
        masks=detections.masks,
        boxes=[_xywh(box) for box in detections.boxes] if detections.boxes is not None else [[] for _ in range(count)],
        scores=detections.scores if detections.scores is not None else [1.0] * count,
        object_ids=detections.object_ids if detections.object_ids is not None else [None] * count,
        inference_time=answer.inference_time,
        seconds=seconds,
    )


def _xywh(box: list[float] | None) -> list[float]:
    """Convert xyxy to xywh. An invalid box (such as [0, 0, -1, -1] of an empty mask) becomes empty."""
    if box is None or len(box) != 4:
        return []
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top] if right >= left and bottom >= top else []


def _malformed(what: str) -> ApiError:
    return ApiError("ism_failed", f"the instance-segmentation server's answer cannot be used: {what}")


_PATH: Final = re.compile(r" - at `\$\.?([\w.\[\]]*)`$")


def _path(error: Exception) -> str:
    if isinstance(error, msgspec.ValidationError):
        match = _PATH.search(str(error))
        return f"{str(error)[: match.start()]}, at {match[1]}" if match and match[1] else str(error).split(" - at ")[0]
    return "it is not JSON"


_ADDRESS: Final = re.compile(r"\w+://\S+|(?:[A-Za-z]:)?(?:[\\/][^\s\\/'\"]+){2,}[\\/]?|/[^\s/'\"]+")


def _said(reason: object) -> str:
    """Return the ISM server's own words for the client: one line, without addresses and paths."""
    if not isinstance(reason, str) or not reason.strip():
        return ""
    words = _ADDRESS.sub("…", " ".join(reason.strip().splitlines()[0].split()))
    return f": {words[:200]}{'…' if len(words) > 200 else ''}"
