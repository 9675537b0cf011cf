"""The public port: who may ask, what they ask, and what they are told. Everything heavy happens behind it.

A request passes through `Gateway.__call__` (id, key, route, one log line and one error form for everything), is read
and checked (body.py, parse.py), waits for its CAD (objects.py) and its turn (queue.py), and is answered here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import structlog

from posekit import images, masks, rle
from posekit.errors import PoseError
from serve import __version__, body, logs, openapi, parse, schemas
from serve.backend import Backend
from serve.body import ClientGone
from serve.errors import ApiError, from_posekit
from serve.ism import IsmClient
from serve.keys import KeyFileError, KeyRing
from serve.metrics import CONTENT_TYPE as METRICS_TYPE
from serve.metrics import Metrics
from serve.objects import Objects, Resolved, inside
from serve.parse import Question
from serve.queue import PoseQueue, Solution
from serve.retention import Outputs
from serve.settings import Settings
from serve.spool import RunDir
from workers.messages import Job, Row
from workers.state import WorkerState

log = structlog.get_logger()

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_OPEN: Final = frozenset({"/livez", "/readyz", "/docs"})  # the docs page asks for a key itself
_OBJECT: Final = "/api/v1/objects/"
_JSON, _MSGPACK, _FORM = "application/json", "application/msgpack", "multipart/form-data"
_INTERNAL: Final = "an internal error happened; the server's log has it under this request's id"


@dataclass
class Answer:
    """A response on its way out."""

    status: int
    body: bytes = b""
    content_type: str = _JSON
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Call:
    """One HTTP request, and what its log line will say."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    raw_receive: Receive
    peer: str
    request_id: str
    arrived: float
    client: str = ""
    body_read: bool = False
    body_received: float = 0.0
    detections: int | None = None
    poses: int | None = None
    timing: schemas.Timing | None = None
    error: str | None = None

    async def tracked_receive(self) -> dict[str, Any]:
        """ASGI's receive, noting when the body has ended."""
        message = await self.raw_receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self.body_read = True
        return message

    @property
    def receive(self) -> Receive:
        """What reads the body."""
        return self.tracked_receive

    @property
    def sends_body(self) -> bool:
        """Whether the client announced a body."""
        return self.headers.get("content-length", "0") != "0" or "transfer-encoding" in self.headers

    @property
    def wants_msgpack(self) -> bool:
        """Whether the answer is to be MessagePack."""
        return _MSGPACK in self.headers.get("accept", "")

    def encode(self, value: object) -> tuple[bytes, str]:
        """A struct in the form that the client accepts, and its content type."""
        if self.wants_msgpack:
            return msgspec.msgpack.encode(value), _MSGPACK
        return msgspec.json.encode(value), _JSON


Handler = Callable[["Gateway", Call], Awaitable[Answer]]


class Gateway:
    """The ASGI application, and the state that its routes share."""

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        run_dir: RunDir,
        *,
        engines: Mapping[str, str],
        device: str,
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.engines = dict(engines)  # name -> version; the first is the default
        self.engine = next(iter(self.engines))
        self.release = f"{self.engine}-{self.engines[self.engine]}"
        self.device = device
        self.started = time.time()
        self.warm = False  # the backend was ready once, and every registered object onboarded
        self.draining = False
        self.keys = KeyRing(settings.keys_path)
        self.metrics = Metrics(settings.metrics.objects)
        self.objects = Objects(settings, backend, engines)
        self.ism = IsmClient(settings.ism)
        self.outputs = Outputs(settings.data_path / "outputs.list", settings.storage.output_days)
        self.queue = PoseQueue(
            backend,
            run_dir,
            settings.queue,
            pass_detections=settings.pose.pass_detections,
            on_part=lambda answer, waited_s: self.metrics.part(answer, self.objects.label, waited_s=waited_s),
        )
        self.in_flight = 0
        self._in_flight_bytes = 0
        self._buckets: dict[str, tuple[float, float]] = {}  # key -> tokens, when
        self.metrics.model(engine=self.engine, release=self.release, sha256="")

    # ----------------------------------------------------------------------------------------------------- events

    async def backend_ready(self) -> None:
        """The backend can be called (again)."""
        if not self.warm:
            await self.objects.warm_up()
            self.warm = True
            log.info("ready", engine=self.engine, device=self.device, objects=self.objects.count)
        self.metrics.kernels(self._kernels())
        self.queue.wake()

    def worker_died(self, worker: WorkerState) -> None:
        """For the metrics."""
        self._count_cache(worker)
        self.metrics.worker_gone(worker.pid)
        self.metrics.restarted()

    def _count_cache(self, worker: WorkerState) -> None:
        info = worker.info
        if worker.stage == "pose" and "cache_hits" in info:
            self.metrics.cache(worker.pid, info["cache_hits"], info["cache_misses"], info["cache_bytes"])

    def _kernels(self) -> dict[str, str]:
        return dict(self.backend.pose_info().get("kernels") or {})

    @property
    def ready(self) -> bool:
        """Whether pose requests are taken."""
        return self.warm and self.backend.is_ready and not self.draining

    # ------------------------------------------------------------------------------------------------------- ASGI

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        call = _call(scope, receive)
        try:
            answer = await self._answer(call)
        except ClientGone:
            call.error = "client_gone"
            self._log(call, 499)
            return
        answer.headers["X-Request-Id"] = call.request_id
        answer.headers["Server-Timing"] = _server_timing(call)
        if call.sends_body and not call.body_read:
            # Whoever is still sending would never see the answer if the connection were closed under the body.
            patient = call.error != "body_timeout" and "expect" not in call.headers
            if not (patient and await body.discard(call.receive, self.settings.limits.body_idle_s)):
                answer.headers["Connection"] = "close"
        headers = [(b"content-type", answer.content_type.encode()), (b"content-length", str(len(answer.body)).encode())]
        headers += [
            (name.lower().encode(), value.encode("latin-1", "replace")) for name, value in answer.headers.items()
        ]
        self._log(call, answer.status)
        with contextlib.suppress(OSError):  # the client may be gone by now
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            await send({"type": "http.response.body", "body": b"" if call.method == "HEAD" else answer.body})

    async def _answer(self, call: Call) -> Answer:
        try:
            handler = self._route(call)
            self._check_key(call)
            return await handler(self, call)
        except ApiError as error:
            return self._failed(call, error)
        except PoseError as error:
            return self._failed(call, from_posekit(error))
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("request_failed", id=call.request_id, route=call.path)
            return self._failed(call, ApiError("internal", _INTERNAL))

    def _route(self, call: Call) -> Handler:
        path = call.path
        methods = ROUTES.get(path)
        if methods is None and path.startswith(_OBJECT) and len(path) > len(_OBJECT):
            methods = ROUTES[_OBJECT]
        if methods is None:
            raise ApiError("not_found", "there is no such route; GET /docs lists them")
        handler = methods.get("GET" if call.method == "HEAD" else call.method)
        if handler is None:
            allowed = ", ".join(methods)
            raise ApiError("method_not_allowed", f"this route takes {allowed}", headers={"Allow": allowed})
        return handler

    def _check_key(self, call: Call) -> None:
        """Sets `call.client`, whose turn it is in the queue: the key's name, or else the address."""
        call.client = f"address {call.peer}"
        if call.path in _OPEN or (call.path == "/metrics" and self.settings.metrics.open):
            return
        try:
            if not self.keys:
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
            record = self.keys.check(presented)
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
        """A token bucket: `rate` requests a second, one second's worth at once."""
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

    def _failed(self, call: Call, error: ApiError) -> Answer:
        call.error = error.code
        what = schemas.ErrorBody(code=error.code, detail=error.detail, field=error.field, request_id=call.request_id)
        failed: object = schemas.PoseAnswer(success=False, error_message=error.detail, error=what)
        if call.path == "/api/v1/pose-estimation":
            failed = schemas.SegDataAnswer(success=False, error_message=error.detail, error=what)
        data, content_type = call.encode(failed)
        headers = dict(error.headers)
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, -int(-error.retry_after_s // 1)))
        return Answer(error.status, data, content_type, headers)

    def _log(self, call: Call, status: int) -> None:
        now = time.monotonic()
        seconds = now - call.arrived
        self.metrics.request(call.path, status, now - call.body_received if call.body_received else seconds)
        pose = call.detections is not None
        logs.log_request(
            request_id=call.request_id,
            method=call.method,
            route=call.path[:200],
            status=status,
            seconds=seconds,
            detections=call.detections,
            poses=call.poses,
            release=self.release if pose else None,
            timing=call.timing,
            error=call.error,
            client=call.client,
        )

    # ----------------------------------------------------------------------------------------------- pose requests

    async def pose_estimation(self, call: Call) -> Answer:
        """`POST /api/v1/pose_estimation`"""
        return await self._pose(call, schemas.PoseRequest, parse.pose_question)

    async def full_pipeline(self, call: Call) -> Answer:
        """`POST /api/v1/full_pipeline`"""
        return await self._pose(call, schemas.FullPipelineRequest, parse.full_pipeline_question)

    async def seg_data(self, call: Call) -> Answer:
        """`POST /api/v1/pose-estimation`, the second dialect."""
        return await self._pose(call, schemas.SegDataRequest, parse.seg_data_question)

    async def _pose(self, call: Call, kind: type[Any], ask: Callable[..., Question]) -> Answer:
        self._check_taking()
        with self._held(call):
            request, protocol = await self._read(call, kind)
            question = ask(request, protocol, self.settings.limits)
            deadline = self._deadline(call, question)
            call.detections = len(question.detections)
            return await self._unless_gone(call, self._solve(call, question, deadline))

    def _check_taking(self) -> None:
        if self.draining:
            raise ApiError("draining", "the server is shutting down", retry_after_s=5)
        if not self.warm:
            raise ApiError(
                "not_ready", "the server is loading and warming up; GET /readyz says when it is done", retry_after_s=2
            )
        limits = self.settings.limits
        if self.in_flight >= limits.in_flight_requests:
            raise ApiError("over_capacity", f"{self.in_flight} requests are in flight already", retry_after_s=1)

    @contextlib.contextmanager
    def _held(self, call: Call) -> Iterator[None]:
        """Counts the request, and the memory that its body may take, from before it is read until it is answered."""
        limits = self.settings.limits
        declared = call.headers.get("content-length", "")
        limit = limits.body_mb * 2**20
        plain = declared.isdigit() and "content-encoding" not in call.headers  # a compressed body may become the limit
        size = min(int(declared), limit) if plain else limit
        if self._in_flight_bytes and self._in_flight_bytes + size > limits.in_flight_mb * 2**20:
            raise ApiError("over_capacity", "the requests in flight take all the memory that they may", retry_after_s=1)
        self.in_flight += 1
        self._in_flight_bytes += size
        try:
            yield
        finally:
            self.in_flight -= 1
            self._in_flight_bytes -= size

    async def _read(self, call: Call, kind: type[Any]) -> tuple[Any, Literal["json", "msgpack"]]:
        limits = self.settings.limits
        limit = limits.body_mb * 2**20
        media, _ = body.media_type(call.headers)
        if media not in (_JSON, _MSGPACK, "application/x-msgpack", _FORM):
            raise ApiError(
                "unsupported_media_type",
                f"send {_JSON}, {_MSGPACK} or {_FORM}, not {media or 'a body without a content type'}",
            )
        if media == _FORM:
            form = await body.read_form(
                call.receive, call.headers, limit=limit, idle_s=limits.body_idle_s, parts=parse.FORM_PARTS
            )
            call.body_received = time.monotonic()
            return parse.request_from_form(form, kind), "json"
        data = await body.read_all(call.receive, call.headers, limit=limit, idle_s=limits.body_idle_s)
        call.body_received = time.monotonic()
        protocol: Literal["json", "msgpack"] = "json" if media == _JSON else "msgpack"
        return parse.decode(data, protocol, kind), protocol

    def _deadline(self, call: Call, question: Question) -> float:
        """When the answer must be there (monotonic): the body's or the header's, the shorter one, else the default."""
        settings = self.settings.queue
        given = [ms for ms in (question.deadline_ms, parse.header_deadline_ms(call.headers)) if ms is not None]
        longest = settings.deadline_max_ms
        if given and min(given) > longest:
            raise ApiError(
                "invalid", f"the deadline is {min(given)} ms; at most {longest} are allowed", field="deadline_ms"
            )
        return call.arrived + min(given, default=settings.deadline_ms) / 1e3

    async def _unless_gone(self, call: Call, work: Awaitable[Answer]) -> Answer:
        """The work's answer; when the client goes away first, the work is dropped."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_gone(call.receive))
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            return task.result()
        finally:
            for one in (task, gone):
                if not one.done():
                    one.cancel()
                    with contextlib.suppress(asyncio.CancelledError, Exception):
                        await one

    async def _solve(self, call: Call, question: Question, deadline: float) -> Answer:
        engine = self._engine(question.engine)
        output_dir = self._output_dir(question.output_dir)
        whole = question.template_dir is not None
        count = max(len(question.detections), 1 if whole else 0)
        self.queue.admit(call.client, count, deadline - time.monotonic())
        resolved = await asyncio.gather(
            *(self.objects.resolve(c, question.model_unit, deadline) for c in question.choices)
        )
        ism_ms: float | None = None
        if whole:
            ism_ms = await self._ask_ism(call, question, deadline)
        if time.monotonic() >= deadline:
            raise ApiError("deadline", "the deadline passed before the answer was ready")
        self.queue.admit(call.client, len(question.detections), deadline - time.monotonic())  # others came meanwhile
        job = self._job(call, question, resolved, engine, output_dir, deadline)
        try:
            solution = await self.queue.solve(job, call.client, deadline)
        except ApiError as error:
            if whole and (error.field or "").startswith(question.field_prefix):  # a mask that the client never sent
                log.warning("ism_mask_broken", id=call.request_id, field=error.field, detail=error.detail)
                raise ApiError(
                    "ism_failed", f"the instance-segmentation server sent a mask that cannot be used: {error.detail}"
                ) from None
            raise
        if output_dir is not None and solution.output_written:
            self.outputs.wrote(output_dir)
        found = await asyncio.to_thread(_found_detections, question, solution.rows) if whole else None
        return self._pose_answer(call, question, resolved, solution, ism_ms, found)

    def _engine(self, asked: str) -> str:
        name = self.engine if asked == "auto" else asked
        if name not in self.engines:
            raise ApiError(
                "invalid",
                f"the engine {name!r} is not configured here; there is {', '.join(self.engines)}",
                field="engine",
            )
        return name

    def _output_dir(self, text: str | None) -> Path | None:
        if text is None:
            return None
        path = inside(self.settings.output_path, text, "output_dir")
        if os.path.isabs(text):
            raise ApiError("invalid", "output_dir is relative to the server's output root", field="output_dir")
        there = next((folder for folder in (path, *path.parents) if os.path.lexists(folder)), path)
        if not os.path.isdir(there) or any(len(os.fsencode(name)) > 255 for name in path.parts):
            detail = "no folder can be made at output_dir: a file is in its way, or its name is too long"
            raise ApiError("invalid", detail, field="output_dir")
        return path

    async def _ask_ism(self, call: Call, question: Question, deadline: float) -> float:
        begun = time.monotonic()
        assert question.template_dir is not None
        found = await self.ism.find(
            rgb=question.rgb,
            depth=question.depth,
            cam_params=question.cam_params,
            template_dir=question.template_dir,
            cad_path=question.ism_cad_path,
            deadline_unix=time.time() + deadline - begun,
            request_id=call.request_id,
        )
        self.metrics.stage("ism", found.seconds)
        parse.detections_from_ism(question, found.masks, found.boxes, found.scores, found.object_ids)
        call.detections = len(question.detections)
        return (time.monotonic() - begun) * 1e3

    def _job(
        self,
        call: Call,
        question: Question,
        resolved: list[Resolved],
        engine: str,
        output_dir: Path | None,
        deadline: float,
    ) -> Job:
        limits = self.settings.limits
        refine = ("icp" if engine == "geometric" else "none") if question.refine == "auto" else question.refine
        height, width = _bare_depth_size(question)
        return Job(
            request_id=f"{call.request_id}-{secrets.token_hex(4)}",  # a client may send one id twice
            rgb=question.rgb,
            depth=question.depth,
            depth_height=height,
            depth_width=width,
            K=question.K,
            depth_scale_mm=question.depth_scale_mm,
            detections=question.detections,
            objects=[one.ref for one in resolved],
            field_prefix=question.field_prefix,
            field_suffix=question.field_suffix,
            field_indices=question.kept,
            engine=engine,
            refine=refine,
            hypotheses=question.hypotheses,
            units=question.units,
            depth_unit_given=question.depth_unit_given,
            min_score=question.min_score,
            seed=question.seed,
            deadline_unix=time.time() + deadline - time.monotonic(),
            max_megapixels=limits.image_megapixels,
            max_mask_megapixels=limits.mask_megapixels,
            visualize=question.visualize,
            output_dir=str(output_dir) if output_dir is not None else None,
        )

    def _pose_answer(
        self,
        call: Call,
        question: Question,
        resolved: list[Resolved],
        solution: Solution,
        ism_ms: float | None,
        found: schemas.FoundDetections | None,
    ) -> Answer:
        rows = solution.rows
        call.poses = sum(row.status == "ok" for row in rows)
        waits = [one.onboard_ms for one in resolved if one.onboard_ms is not None]
        call.timing = schemas.Timing(
            decode_ms=_ms(solution.decode_ms),
            queue_ms=_ms(solution.queue_ms),
            pose_ms=_ms(solution.pose_ms),
            respond_ms=_ms(solution.respond_ms),
            onboard_ms=_ms(max(waits)) if waits else None,
            ism_ms=_ms(ism_ms) if ism_ms is not None else None,
            total_ms=_ms((time.monotonic() - call.body_received) * 1e3),
            batch_detections=solution.batch_detections,
            batch_requests=solution.batch_requests,
        )
        paths = [one.path_used for one in resolved if one.path_used is not None]
        common: dict[str, Any] = {
            "success": True,
            "inference_time": round(time.monotonic() - call.body_received, 6),
            "cad_path_used": paths[0] if paths else None,
            "output_dir_used": question.output_dir if solution.output_written else None,
            "warnings": [*question.warnings, *solution.warnings],
        }
        if question.kept is not None:
            data, content_type = call.encode(_second_dialect(question, rows, common))
        else:
            answer = schemas.PoseAnswer(
                poses=rows, timing=call.timing, engine=solution.engine, release=self.release, **common
            )
            if question.visualize and solution.visualization is not None:
                answer.visualization = solution.visualization
            if found is not None:
                answer.detections = found
            data, content_type = call.encode(answer)
        return Answer(200, data, content_type)

    # ----------------------------------------------------------------------------------------------------- objects

    async def add_object(self, call: Call) -> Answer:
        """`POST /api/v1/objects`"""
        self._check_taking()
        limits = self.settings.limits
        if body.media_type(call.headers)[0] != _FORM:
            raise ApiError("unsupported_media_type", f"send {_FORM} with the mesh as the part `file`")
        wait_s = _seconds(call.query.get("wait"))
        staged = await asyncio.to_thread(self.objects.stage)
        self.in_flight += 1
        registering = False
        try:
            form = await body.read_form(
                call.receive,
                call.headers,
                limit=limits.object_body_mb * 2**20,
                idle_s=limits.body_idle_s,
                parts=frozenset({"file", "request"}),
                files={"file": staged / "source" / "upload"},
            )
            if "file" not in form.paths:
                raise ApiError(
                    "invalid", "the multipart body needs the mesh as the part `file`, with a file name", field="file"
                )
            request = parse.decode(form.values.get("request") or b"{}", "json", schemas.ObjectRequest)
            file_name = form.file_names.get("file", "")
            registering = True  # from here on the folder is the registration's, which goes on when the client does not
            work = asyncio.ensure_future(self.objects.register(staged, file_name, request))
            work.add_done_callback(lambda done: done.cancelled() or done.exception())
            return await self._unless_gone(call, self._registered(call, asyncio.shield(work), wait_s))
        finally:
            self.in_flight -= 1
            if not registering:
                self.objects.discard(staged)

    async def _registered(
        self, call: Call, work: Awaitable[tuple[schemas.ObjectAnswer, bool]], wait_s: float
    ) -> Answer:
        answer, created = await work
        end = time.monotonic() + wait_s
        while answer.status == "onboarding" and not self.draining and (left := end - time.monotonic()) > 0:
            await self.objects.wait(answer.object_id, min(left, 0.25))
            answer = self.objects.get(answer.object_id)
        data, content_type = call.encode(answer)
        return Answer(201 if created else 200, data, content_type, {"Location": _OBJECT + answer.object_id})

    async def list_objects(self, call: Call) -> Answer:
        """`GET /api/v1/objects`"""
        return self._ok(call, schemas.ObjectList(objects=self.objects.listing()))

    async def get_object(self, call: Call) -> Answer:
        """`GET /api/v1/objects/{id}`"""
        return self._ok(call, self.objects.get(_object_in(call)))

    async def delete_object(self, call: Call) -> Answer:
        """`DELETE /api/v1/objects/{id}`"""
        self.objects.remove(_object_in(call))
        return Answer(204)

    # -------------------------------------------------------------------------------------------------- GET routes

    def _ok(self, call: Call, value: object) -> Answer:
        data, content_type = call.encode(value)
        return Answer(200, data, content_type)

    async def status(self, call: Call) -> Answer:
        """`GET /api/v1/status`"""
        backend = self.backend
        state: Literal["starting", "ready", "stopped"] = (
            "ready" if backend.is_ready else "stopped" if backend.state == "stopped" else "starting"
        )
        track = schemas.Track(
            state=state,
            release=self.release,
            workers=backend.worker_counts(),
            restarts=backend.restarts + backend.worker_restarts,
        )
        return self._ok(
            call,
            schemas.Status(
                server="draining" if self.draining else "running",
                model_loaded=self.warm and backend.is_ready,
                device=self.device,
                uptime=round(time.time() - self.started, 3),
                version=__version__,
                engine=self.engine,
                release=self.release,
                kernels=self._kernels(),
                tracks={backend.name: track},
                objects=self.objects.count,
                queue=schemas.QueueState(requests=self.queue.requests, detections=self.queue.detections),
                detections_per_second=round(self.queue.detections_per_second, 3),
            ),
        )

    async def version(self, call: Call) -> Answer:
        """`GET /api/v1/version`"""
        return self._ok(
            call,
            schemas.Version(
                version=__version__, engine=self.engine, release=self.release, checkpoint=None, sha256=None
            ),
        )

    async def livez(self, call: Call) -> Answer:
        """Alive as long as it can answer at all."""
        return self._ok(call, {"live": True})

    async def readyz(self, call: Call) -> Answer:
        """200 when pose requests are taken, else 503 with the reason."""
        if self.ready:
            return self._ok(call, {"ready": True})
        if self.draining:
            raise ApiError("draining", "the server is shutting down", retry_after_s=5)
        what = "restarting its workers" if self.warm else "loading and warming up"
        raise ApiError("not_ready", f"the server is {what}", retry_after_s=2)

    async def health(self, call: Call) -> Answer:
        """`GET /api/v1/health`, for the clients of the second dialect."""
        loaded = self.warm and self.backend.is_ready
        answer = schemas.Health2(
            status="healthy" if self.ready else "unhealthy",
            model={"loaded": loaded, "device": self.device},
            timestamp=time.time(),
        )
        return self._ok(call, answer)

    async def model(self, call: Call) -> Answer:
        """`GET /v2/models/pem`: what goes in and out, and under which licence."""
        return self._ok(call, openapi.model_metadata(version=__version__, release=self.release, engine=self.engine))

    async def metrics_page(self, call: Call) -> Answer:
        """`GET /metrics`"""
        for worker in self.backend.workers.values():
            self._count_cache(worker)
        self.metrics.queue(self.queue.waiting_detections)
        self.metrics.draining(self.draining)
        return Answer(200, self.metrics.expose(await self.backend.metrics_text()), METRICS_TYPE)

    async def openapi_json(self, call: Call) -> Answer:
        """`GET /openapi.json`"""
        return Answer(200, msgspec.json.encode(openapi.document(__version__)))

    async def docs(self, call: Call) -> Answer:
        """`GET /docs`"""
        return Answer(200, openapi.page(), "text/html; charset=utf-8")

    async def root(self, call: Call) -> Answer:
        """A browser that was pointed at the bare address."""
        return Answer(307, headers={"Location": "/docs"})


ROUTES: Final[dict[str, dict[str, Handler]]] = {
    "/": {"GET": Gateway.root},
    "/livez": {"GET": Gateway.livez},
    "/readyz": {"GET": Gateway.readyz},
    "/metrics": {"GET": Gateway.metrics_page},
    "/openapi.json": {"GET": Gateway.openapi_json},
    "/docs": {"GET": Gateway.docs},
    "/api/v1/status": {"GET": Gateway.status},
    "/api/v1/version": {"GET": Gateway.version},
    "/api/v1/health": {"GET": Gateway.health},
    "/api/v1/pose_estimation": {"POST": Gateway.pose_estimation},
    "/api/v1/full_pipeline": {"POST": Gateway.full_pipeline},
    "/api/v1/pose-estimation": {"POST": Gateway.seg_data},
    "/api/v1/objects": {"GET": Gateway.list_objects, "POST": Gateway.add_object},
    _OBJECT: {"GET": Gateway.get_object, "DELETE": Gateway.delete_object},
    "/v2/health/live": {"GET": Gateway.livez},
    "/v2/health/ready": {"GET": Gateway.readyz},
    "/v2/models/pem": {"GET": Gateway.model},
    "/v2/models/pem/ready": {"GET": Gateway.readyz},
}


# ------------------------------------------------------------------------------------------------------------- helpers


def _call(scope: Scope, receive: Receive) -> Call:
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    given = headers.get("x-request-id", "")
    query = dict(urllib.parse.parse_qsl(scope.get("query_string", b"").decode("latin-1")))
    peer = scope.get("client")
    return Call(
        method=scope["method"],
        path=scope["path"],
        query=query,
        headers=headers,
        raw_receive=receive,
        peer=peer[0] if peer else "unknown",
        request_id=given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12),
        arrived=time.monotonic(),
    )


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _server_timing(call: Call) -> str:
    entries = [("total", (time.monotonic() - call.arrived) * 1e3)]
    if call.timing is not None:
        parts = {
            name.removesuffix("_ms"): getattr(call.timing, name)
            for name in ("decode_ms", "queue_ms", "pose_ms", "respond_ms", "onboard_ms", "ism_ms")
        }
        entries += [(name, value) for name, value in parts.items() if value is not None]
    return ", ".join(f"{name};dur={value:.1f}" for name, value in entries)


def _ms(value: float) -> float:
    return round(value, 3)


def _seconds(text: str | None) -> float:
    """`?wait=SECONDS`, at most ten minutes."""
    if text is None:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 600:
        raise ApiError("invalid", "wait must be a number of seconds between 0 and 600", field="wait")
    return value


def _object_in(call: Call) -> str:
    return call.path[len(_OBJECT) :]


def _bare_depth_size(question: Question) -> tuple[int, int]:
    """(height, width) where the second dialect's depth is bare float32, else (0, 0)."""
    depth = question.depth
    if question.kept is None or depth[:8] == b"\x89PNG\r\n\x1a\n" or depth[:4] in (b"II*\0", b"MM\0*"):
        return 0, 0
    try:
        info = images.inspect(question.rgb, "rgb_image")
    except PoseError:
        return 0, 0  # decode says what is wrong with the colour image
    return (info.height, info.width) if len(depth) == 4 * info.height * info.width else (0, 0)


def _second_dialect(question: Question, rows: list[Row], common: dict[str, Any]) -> schemas.SegDataAnswer:
    assert question.kept is not None
    answer = schemas.SegDataAnswer(**common)
    answer.rejected = [
        schemas.RejectedDetection(index=i, code=code, detail=detail) for i, code, detail in question.left_out
    ]
    for index, spec, row in zip(question.kept, question.detections, rows, strict=True):
        if row.rotation is not None and row.translation is not None:
            answer.detections.append(question.coco[index])
            answer.pose_scores.append(row.confidence * spec.score)
            answer.pred_rot.append(row.rotation)
            answer.pred_trans.append(row.translation)
        elif row.error is not msgspec.UNSET:
            answer.rejected.append(schemas.RejectedDetection(index=index, code=row.error.code, detail=row.error.detail))
    answer.rejected.sort(key=lambda item: item.index)
    answer.num_detections = len(answer.detections)
    return answer


def _as_rle(mask: bytes, height: int, width: int) -> dict[str, Any]:
    value = masks.parse(mask)
    if isinstance(value, dict) and isinstance(value.get("counts"), str):
        return value
    return dict(rle.encode_rle(masks.decode_mask(value, height, width, None, height * width)))


def _found_detections(question: Question, rows: list[Row]) -> schemas.FoundDetections:
    """The ISM server's detections, masks as compressed RLE whatever they came as."""
    info = images.inspect(question.rgb, "rgb_image")
    return schemas.FoundDetections(
        masks=[_as_rle(spec.raw, info.height, info.width) for spec in question.detections],
        boxes=[list(row.bbox) for row in rows],
        scores=[spec.score for spec in question.detections],
        object_ids=[spec.category for spec in question.detections],
    )
