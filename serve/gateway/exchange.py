"""One HTTP exchange: the request as the routes see it, and the answer that they return."""

from __future__ import annotations

import dataclasses
import re
import secrets
import time
import urllib.parse
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Self

import msgspec

from serve.tasks.asker import Asker, Notes
from serve.telemetry.tracing import Trace

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

JSON, MSGPACK, FORM = "application/json", "application/msgpack", "multipart/form-data"
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass
class Answer:
    """The response that a route returns."""

    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass
class Call:
    """One HTTP request, with the notes for its log line."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    raw_receive: Receive
    peer: str
    request_id: str
    arrived: float
    trace: Trace
    client: str = ""
    name: str = ""  # the text in place of `{id}` in the route's path
    body_read: bool = False
    body_received: float = 0.0
    error: str | None = None
    detail: str | None = None  # of the error, for the log
    field: str | None = None  # the field at fault, for the log
    notes: Notes = dataclasses.field(default_factory=Notes)

    @classmethod
    def of(cls, scope: Scope, receive: Receive) -> Self:
        """Return the request that an ASGI scope describes."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        query = dict(urllib.parse.parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        peer = scope.get("client")
        return cls(
            method=scope["method"],
            path=scope["path"],
            query=query,
            headers=headers,
            raw_receive=receive,
            peer=peer[0] if peer else "unknown",
            request_id=given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12),
            arrived=time.monotonic(),
            trace=Trace.of(scope["headers"]),
        )

    async def receive(self) -> dict[str, Any]:
        """Receive the next ASGI message, and note when the body has ended."""
        message = await self.raw_receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self.body_read = True
        return message

    async def gone(self) -> None:
        """Wait until the client has closed the connection. Call it only after the body is read."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    @property
    def sends_body(self) -> bool:
        """Return True if the client announced a body."""
        return self.headers.get("content-length", "0") != "0" or "transfer-encoding" in self.headers

    def asker(self, deadline: float) -> Asker:
        """Return the request as a task sees it; `deadline` is monotonic."""
        return Asker(self.request_id, self.client, self.body_received, deadline, self.trace, self.notes)

    def encode(self, value: object) -> tuple[bytes, str]:
        """Encode a struct in the format that the client accepts; return the bytes and their content type."""
        if MSGPACK in self.headers.get("accept", ""):
            return msgspec.msgpack.encode(value), MSGPACK
        return msgspec.json.encode(value), JSON

    def answer(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
        """Return a struct as the answer."""
        body, content_type = self.encode(value)
        return Answer(status, body, content_type, headers or {})

    @property
    def server_timing(self) -> str:
        """Return the header `Server-Timing`, with the times known so far."""
        entries = [("total", (time.monotonic() - self.arrived) * 1e3)]
        if self.notes.timing is not None:
            parts = {
                name.removesuffix("_ms"): getattr(self.notes.timing, name)
                for name in ("decode_ms", "queue_ms", "pose_ms", "respond_ms", "onboard_ms", "ism_ms")
            }
            entries += [(name, value) for name, value in parts.items() if value is not None]
        return ", ".join(f"{name};dur={value:.1f}" for name, value in entries)
