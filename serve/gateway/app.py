"""The public port: who may ask, what they ask, and what they are told. Everything heavy happens behind it.

A request passes through `Gateway.__call__` (id, key, route, one log line and one error form for everything), is read
and checked (body.py, parse.py), waits for its CAD (objects.py) and its turn (queue.py), and is answered here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import structlog

from pem import contract as schemas
from posekit import registry
from posekit.errors import PoseError
from serve import __version__
from serve.backend.mosec import Backend
from serve.backend.run_dir import RunDir
from serve.engine_choice import Offer
from serve.errors import ApiError, from_posekit, internal_error
from serve.gateway import body, openapi
from serve.gateway.body import ClientGone
from serve.gateway.exchange import FORM, JSON, MSGPACK, Answer, Call, Receive, Scope, Send
from serve.gateway.keys import KeyFileError, KeyRing
from serve.objects.catalogue import Objects, Resolved, inside
from serve.scheduling.queue import PoseQueue
from serve.settings import Settings
from serve.tasks.pose import answer as answers
from serve.tasks.pose import question as parse
from serve.tasks.pose.ism import IsmClient
from serve.tasks.pose.outputs import Outputs
from serve.tasks.pose.question import Question
from serve.telemetry import logs
from serve.telemetry.metrics import CONTENT_TYPE as METRICS_TYPE
from serve.telemetry.metrics import Metrics, route_label
from serve.telemetry.tracing import Tracing
from workers.engines import versions
from workers.messages import Job, PartAnswer
from workers.state import WorkerState

log = structlog.get_logger()

_OPEN: Final = frozenset({"/livez", "/readyz", "/docs"})  # the docs page asks for a key itself
_OBJECT: Final = "/api/v1/objects/"


Handler = Callable[["Gateway", Call], Awaitable[Answer]]


class Gateway:
    """The ASGI application, and the state that its routes share."""

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        run_dir: RunDir,
        *,
        offer: Offer,
        device: str,
        tracing: Tracing | None = None,
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.offer = offer
        engines = versions(backend.stages)
        self.releases = {name: f"{name}-{version}" for name, version in engines.items()}  # the first is the default
        self.device = device
        self.started = time.time()
        self.warm = False  # the backend was ready once, and every registered object onboarded
        self.draining = False
        self.keys = KeyRing(settings.keys_path)
        self.metrics = Metrics(settings.metrics.objects)
        self.tracing = tracing or Tracing()
        self.objects = Objects(settings, backend, engines)
        self.objects.lost = backend.lost
        self.ism = IsmClient(settings.ism)
        self.outputs = Outputs(settings.data_path / "outputs.list", settings.storage.output_days)
        self.queue = PoseQueue(
            backend,
            run_dir,
            settings.queue,
            pass_detections=backend.stages.pose.pass_detections,
            on_part=self._part_answered,
            on_dispatch=self.metrics.dispatched,
        )
        self.in_flight = 0
        self._in_flight_bytes = 0
        self._buckets: dict[str, tuple[float, float]] = {}  # key -> tokens, when

    # ---------------------------------------------------------------------------------------------------- engines

    @property
    def lost(self) -> dict[str, str]:
        """Engine -> why it is not to be had, so that its stand-in answers."""
        return self.backend.lost() | self.offer.lost

    @property
    def degraded(self) -> str | None:
        """Why another engine stands in for the one that `auto` means; None where none has to."""
        return self.lost.get(self.offer.wanted)

    @property
    def engine(self) -> str:
        """What `engine: auto` means now."""
        return registry.standing_in(self.offer.wanted, self.lost)

    @property
    def release(self) -> str:
        """What answers now, unless a request asks for another engine."""
        return self.releases[self.engine]

    @property
    def answering(self) -> dict[str, str]:
        """Engine -> release of those that answer now."""
        lost = self.lost
        return {name: release for name, release in self.releases.items() if name not in lost}

    @property
    def checkpoint(self) -> str | None:
        """The name of the weights in use; None where the engine has none."""
        path = self.settings.weights_path(self.engine)
        return path.stem if path is not None else None

    @property
    def sha256(self) -> str | None:
        """Of the weights in use."""
        return self.offer.sha256.get(self.engine)

    # ----------------------------------------------------------------------------------------------------- events

    async def backend_ready(self) -> None:
        """The backend can be called (again)."""
        for name, reason in self.lost.items():
            weights, hint = self.settings.weights_path(name), registry.spec(name).hint
            log.error("degraded", reason=reason, weights=weights and str(weights), hint=hint)
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

    def _part_answered(self, answer: PartAnswer, waited_s: float) -> None:
        self.metrics.part(answer, self.objects.label, waited_s=waited_s)
        self.tracing.part(answer, waited_s)

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
        call = Call.of(scope, receive)
        self.tracing.begin(call.trace, call.method, route_label(call.path))
        try:
            answer = await self._answer(call)
        except ClientGone:
            call.error = "client_gone"
            self._log(call, 499)
            return
        answer.headers["X-Request-Id"] = call.request_id
        answer.headers["Server-Timing"] = call.server_timing
        answer.headers["traceparent"] = call.trace.own.traceparent
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
            return self._failed(call, internal_error())

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
        call.error, call.detail, call.field = error.code, error.detail, error.field
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
            release=(call.release or self.release) if pose else None,
            timing=call.timing,
            error=call.error,
            detail=call.detail,
            field=call.field,
            rejected=call.rejected or None,
            client=call.client,
            trace_id=call.trace.own.trace_id,
        )
        self.tracing.end(
            call.trace,
            status,
            {
                "pem.request_id": call.request_id,
                "pem.detections": call.detections,
                "pem.poses": call.poses,
                "pem.engine": call.engine,
                "pem.release": call.release,
                "error.type": call.error,
            },
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
            call.trace.add("read", call.trace.begun_unix, call.trace.unix(call.body_received))
            question = ask(request, protocol, self.settings.limits)
            del request  # and with it the pictures, once they are on their way
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
        if media not in (JSON, MSGPACK, "application/x-msgpack", FORM):
            raise ApiError(
                "unsupported_media_type",
                f"send {JSON}, {MSGPACK} or {FORM}, not {media or 'a body without a content type'}",
            )
        if media == FORM:
            form = await body.read_form(
                call.receive, call.headers, limit=limit, idle_s=limits.body_idle_s, parts=parse.FORM_PARTS
            )
            call.body_received = time.monotonic()
            return parse.request_from_form(form, kind), "json"
        data = await body.read_all(call.receive, call.headers, limit=limit, idle_s=limits.body_idle_s)
        call.body_received = time.monotonic()
        protocol: Literal["json", "msgpack"] = "json" if media == JSON else "msgpack"
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
        gone = asyncio.ensure_future(call.gone())
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
        asked = self.offer.wanted if question.engine == registry.AUTO else question.engine
        engine, reason = self._engine(asked)
        output_dir = self._output_dir(question.output_dir)
        whole = question.template_dir is not None
        count = max(len(question.detections), 1 if whole else 0)
        self.queue.admit(call.client, count, deadline - time.monotonic(), engine)
        try:
            resolved = await self._resolve(call, question, deadline, engine)
        except ApiError as error:
            stand_in = self.settings.stand_in(engine)
            if error.code != "onboarding_failed" or stand_in is None:
                raise
            engine, reason = stand_in, error.detail
            resolved = await self._resolve(call, question, deadline, engine)
        ism_ms: float | None = None
        if whole:
            ism_ms = await self._ask_ism(call, question, deadline)
        if time.monotonic() >= deadline:
            raise ApiError("deadline", "the deadline passed before the answer was ready")
        left_s = deadline - time.monotonic()
        self.queue.admit(call.client, len(question.detections), left_s, engine)  # others came meanwhile
        job = self._job(call, question, resolved, engine, output_dir, deadline)
        solving = self.queue.solve(job, call.client, deadline)
        request_id = job.request_id
        del job  # the queue lets go of the pictures once they are spooled
        if not whole:
            question.rgb = question.depth = b""
        try:
            with self.tracing.queued(request_id, call.trace):
                solution = await solving
        except ApiError as error:
            if whole and (error.field or "").startswith(question.field_prefix):  # a mask that the client never sent
                log.warning("ism_mask_broken", id=call.request_id, field=error.field, detail=error.detail)
                raise ApiError(
                    "ism_failed", f"the instance-segmentation server sent a mask that cannot be used: {error.detail}"
                ) from None
            raise
        if output_dir is not None and solution.output_written:
            self.outputs.wrote(output_dir)
        if solution.engine != engine:  # lost on the way
            reason = self.lost.get(engine) or f"{registry.spec(engine).words} could not be used"
        if reason is not None:
            who, whom = registry.spec(solution.engine).words, registry.spec(asked).words
            solution.warnings.append(f"degraded: {who} stood in for {whom}: {reason}")
        call.engine, call.release = solution.engine, self.releases[solution.engine]
        found = await asyncio.to_thread(answers.found_detections, question, solution.rows) if whole else None
        return answers.pose_answer(
            call, question, resolved, solution, degraded=reason is not None, ism_ms=ism_ms, found=found
        )

    async def _resolve(self, call: Call, question: Question, deadline: float, engine: str) -> list[Resolved]:
        one = partial(self.objects.resolve, unit=question.model_unit, deadline=deadline, engine=engine)
        begun_unix, waited = time.time(), False
        try:
            resolved = await asyncio.gather(*(one(choice) for choice in question.choices))
            waited = any(each.onboard_ms is not None for each in resolved)
        except ApiError as error:
            waited = error.code in ("onboarding", "onboarding_failed")
            raise
        finally:
            if waited:
                call.trace.add("onboard", begun_unix, time.time(), {"pem.engine": engine})
        return resolved

    def _engine(self, asked: str) -> tuple[str, str | None]:
        """The engine for a request, and why it is not the one that the request would have had."""
        lost = self.lost
        engine = registry.standing_in(asked, lost)
        if engine not in self.releases:
            raise ApiError(
                "invalid",
                f"the engine {asked!r} is not configured here; there is {', '.join(self.releases)}",
                field="engine",
            )
        return engine, lost.get(asked)

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
        with call.trace.asking("ism") as context:
            found = await self.ism.find(
                rgb=question.rgb,
                depth=question.depth,
                cam_params=question.cam_params,
                template_dir=question.template_dir,
                cad_path=question.ism_cad_path,
                deadline_unix=time.time() + deadline - begun,
                request_id=call.request_id,
                headers=context.headers,
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
        refine = registry.spec(engine).refine if question.refine == "auto" else question.refine
        height, width = answers.bare_depth_size(question)
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

    # ----------------------------------------------------------------------------------------------------- objects

    async def add_object(self, call: Call) -> Answer:
        """`POST /api/v1/objects`"""
        self._check_taking()
        limits = self.settings.limits
        if body.media_type(call.headers)[0] != FORM:
            raise ApiError("unsupported_media_type", f"send {FORM} with the mesh as the part `file`")
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
            going_on = await self.objects.wait(answer.object_id, min(left, 0.25))
            answer = self.objects.get(answer.object_id)
            if not going_on:  # it ended without a model and without an error of the CAD's: nothing more will come
                break
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
                detections_per_second=round(self.queue.detections_per_second(self.engine), 3),
                engines=self.answering,
                degraded=self.degraded is not None,
                degraded_reason=self.degraded,
            ),
        )

    async def version(self, call: Call) -> Answer:
        """`GET /api/v1/version`"""
        return self._ok(
            call,
            schemas.Version(
                version=__version__,
                engine=self.engine,
                release=self.release,
                checkpoint=self.checkpoint,
                sha256=self.sha256,
                engines=self.answering,
                degraded=self.degraded is not None,
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
        workers = list(self.backend.workers.values())
        for worker in workers:
            self._count_cache(worker)
        self.metrics.model(engine=self.engine, release=self.release, sha256=self.sha256 or "")
        self.metrics.ready(self.ready)
        self.metrics.degraded(self.degraded is not None)
        self.metrics.queue(self.queue.waiting_detections)
        self.metrics.draining(self.draining)
        self.metrics.worker_counts(self.backend.worker_counts())
        self.metrics.devices(self.backend.stages.devices, workers)
        self.metrics.processes(workers)
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
