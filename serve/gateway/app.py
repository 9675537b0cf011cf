"""The public port: check each request, find its route and send its answer. Everything heavy happens behind it.

`Gateway.__call__` takes a request through these steps: its id, its route (routes.py), its key (keys.py), the route's
handler. All failures have one form, and all answers get one log line and one set of headers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import structlog

from pem import contract
from posekit.errors import PoseError
from serve import reading
from serve.errors import ApiError, from_posekit, internal_error
from serve.gateway import routes
from serve.gateway.exchange import Answer, Call, Receive, Scope, Send
from serve.gateway.keys import KeyFileError
from serve.gateway.route import Route
from serve.gateway.routes import Found
from serve.gateway.service import Service
from serve.reading import ClientGone
from serve.telemetry import logs
from serve.telemetry.metrics import OTHER

log = structlog.get_logger()


class Gateway:
    """The ASGI application."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._buckets: dict[str, tuple[float, float]] = {}  # key name -> tokens, when they were counted (monotonic)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request; refuse WebSockets."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        call = Call.of(scope, receive)
        found = routes.find(call.path)
        traced = found.methods and found.quiet != "probe" and found.label != OTHER
        self.service.tracing.begin(call.trace, call.method, found.label if traced else None)
        try:
            answer = await self._answer(call, found)
        except ClientGone:
            call.error = "client_gone"
            self._log(call, found, 499)
            return
        answer.headers["X-Request-Id"] = call.request_id
        answer.headers["Server-Timing"] = call.server_timing
        answer.headers["traceparent"] = call.trace.traceparent
        if call.sends_body and not call.body_read:
            # A client that is still sending would miss the answer if the connection were closed now.
            patient = call.error != "body_timeout" and "expect" not in call.headers
            idle_s = self.service.settings.limits.body_idle_s
            if not (patient and await reading.discard(call.receive, idle_s)):
                answer.headers["Connection"] = "close"
        headers = [(b"content-type", answer.content_type.encode()), (b"content-length", str(len(answer.body)).encode())]
        headers += [
            (name.lower().encode(), value.encode("latin-1", "replace")) for name, value in answer.headers.items()
        ]
        self._log(call, found, answer.status)
        with contextlib.suppress(OSError):  # the client may have left
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            await send({"type": "http.response.body", "body": b"" if call.method == "HEAD" else answer.body})

    async def _answer(self, call: Call, found: Found) -> Answer:
        try:
            route = self._route(call, found)
            self._check_key(call, route)
            return await route.handler(self.service, call)
        except ApiError as error:
            return self._failed(call, found, error)
        except PoseError as error:
            return self._failed(call, found, from_posekit(error))
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("request_failed", id=call.request_id, route=call.path)
            return self._failed(call, found, internal_error())

    def _route(self, call: Call, found: Found) -> Route:
        if not found.methods:
            raise ApiError("not_found", "there is no such route; GET /docs lists them")
        route = found.methods.get("GET" if call.method == "HEAD" else call.method)
        if route is None:
            allowed = ", ".join(found.methods)
            raise ApiError("method_not_allowed", f"this route takes {allowed}", headers={"Allow": allowed})
        call.name = found.name
        return route

    def _check_key(self, call: Call, route: Route) -> None:
        """Check the key and set `call.client`, who takes turns in the queue: the key's name, or else the address."""
        call.client = f"address {call.peer}"
        if route.who == "anyone" or (route.who == "as the settings say" and self.service.settings.metrics.open):
            return
        keys = self.service.keys
        try:
            if not keys:
                return
            presented = call.headers.get("x-api-key", "")
            scheme, _, token = call.headers.get("authorization", "").partition(" ")
            if scheme.lower() == "bearer" and token.strip():
                presented = token.strip()
            if not presented:
                hint = "send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`"
                raise ApiError(
                    "key_missing", f"this server wants an API key; {hint}", headers={"WWW-Authenticate": "Bearer"}
                )
            record = keys.check(presented)
        except KeyFileError as error:
            log.error("keys_unusable", error=str(error))
            raise ApiError(
                "not_ready", "the server's API keys cannot be read; its operator must mend that", retry_after_s=30
            ) from None
        if record is None:
            raise ApiError("key_wrong", "this API key is not known, or was revoked")
        call.client = f"key {record.name}"
        if record.rate is not None and call.method == "POST":
            self._spend(record.name, record.rate)

    def _spend(self, name: str, rate: float) -> None:
        """Take a token from a key's bucket, or raise: `rate` requests a second, a burst of one second's worth."""
        now = time.monotonic()
        burst = max(rate, 1.0)
        tokens, when = self._buckets.get(name, (burst, now))
        tokens = min(burst, tokens + (now - when) * rate)
        if tokens < 1.0:
            self._buckets[name] = (tokens, now)
            raise ApiError(
                "rate_limited", f"this API key may send {rate:g} requests a second", retry_after_s=(1.0 - tokens) / rate
            )
        self._buckets[name] = (tokens - 1.0, now)

    def _failed(self, call: Call, found: Found, error: ApiError) -> Answer:
        call.error, call.detail, call.field = error.code, error.detail, error.field
        headers = dict(error.headers)
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, -int(-error.retry_after_s // 1)))
        what = contract.ErrorBody(code=error.code, detail=error.detail, field=error.field, request_id=call.request_id)
        failed = found.failure(success=False, error_message=error.detail, error=what)
        return call.answer(failed, error.status, headers)

    def _log(self, call: Call, found: Found, status: int) -> None:
        notes, now = call.notes, time.monotonic()
        timed_s = now - (call.body_received or call.arrived)
        self.service.metrics.request(found.label, status, timed_s if found.timed else None)
        pose = notes.detections is not None
        logs.log_request(
            request_id=call.request_id,
            method=call.method,
            route=call.path[:200],
            status=status,
            seconds=now - call.arrived,
            detections=notes.detections,
            poses=notes.poses,
            release=(notes.release or self.service.engines.release) if pose else None,
            timing=notes.timing,
            error=call.error,
            quiet=found.quiet if found.quiet != "watch" or call.method == "GET" else None,
            detail=call.detail,
            field=call.field,
            rejected=notes.rejected or None,
            client=call.client,
            trace_id=call.trace.trace_id,
        )
        self.service.tracing.end(
            call.trace,
            status,
            {
                "pem.request_id": call.request_id,
                "pem.detections": notes.detections,
                "pem.poses": notes.poses,
                "pem.engine": notes.engine,
                "pem.release": notes.release,
                "error.type": call.error,
            },
        )
