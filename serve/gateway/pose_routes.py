"""The pose routes: read and check the body, find its deadline, and let the task answer unless the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pem import contract
from serve import reading
from serve.errors import ApiError
from serve.gateway.exchange import FORM, JSON, MSGPACK, Answer, Call
from serve.gateway.service import Service
from serve.reading import ClientGone, Protocol, decode, decode_form
from serve.tasks.pose import question
from serve.tasks.pose.question import Question

T = TypeVar("T")


async def pose_estimation(service: Service, call: Call) -> Answer:
    """`POST /api/v1/pose_estimation`"""
    return await _pose(service, call, contract.PoseRequest, question.pose_question)


async def full_pipeline(service: Service, call: Call) -> Answer:
    """`POST /api/v1/full_pipeline`"""
    return await _pose(service, call, contract.FullPipelineRequest, question.full_pipeline_question)


async def seg_data(service: Service, call: Call) -> Answer:
    """`POST /api/v1/pose-estimation`, the second dialect."""
    return await _pose(service, call, contract.SegDataRequest, question.seg_data_question)


async def _pose(service: Service, call: Call, kind: type[Any], ask: Callable[..., Question]) -> Answer:
    service.check_taking()
    with service.held(call):
        request, protocol = await _read(service, call, kind)
        call.trace.add("read", call.trace.begun_unix, call.trace.unix(call.body_received))
        asked = ask(request, protocol, service.settings.limits)
        del request  # frees its pictures once they are sent on
        asker = call.asker(_deadline(service, call, asked))
        call.notes.detections = len(asked.asked.detections)
        return call.answer(await unless_gone(call, service.pose.answer(asker, asked)))


async def _read(service: Service, call: Call, kind: type[T]) -> tuple[T, Protocol]:
    """Read the typed body from JSON, MessagePack or a multipart form."""
    limits = service.settings.limits
    limit = limits.body_mb * 2**20
    media, _ = reading.media_type(call.headers)
    if media not in (JSON, MSGPACK, "application/x-msgpack", FORM):
        raise ApiError(
            "unsupported_media_type",
            f"send {JSON}, {MSGPACK} or {FORM}, not {media or 'a body without a content type'}",
        )
    if media == FORM:
        form = await reading.read_form(
            call.receive, call.headers, limit=limit, idle_s=limits.body_idle_s, parts=question.FORM_PARTS
        )
        call.body_received = time.monotonic()
        return decode_form(form.values, question.FILE_PARTS, kind), "json"
    data = await reading.read_all(call.receive, call.headers, limit=limit, idle_s=limits.body_idle_s)
    call.body_received = time.monotonic()
    protocol: Protocol = "json" if media == JSON else "msgpack"
    return decode(data, protocol, kind), protocol


def _deadline(service: Service, call: Call, asked: Question) -> float:
    """Return the monotonic deadline: the shorter of the body's and the header's, else the default."""
    settings = service.settings.queue
    given = [ms for ms in (asked.deadline_ms, question.header_deadline_ms(call.headers)) if ms is not None]
    longest = settings.deadline_max_ms
    if given and min(given) > longest:
        raise ApiError(
            "invalid", f"the deadline is {min(given)} ms; at most {longest} are allowed", field="deadline_ms"
        )
    return call.arrived + min(given, default=settings.deadline_ms) / 1e3


async def unless_gone(call: Call, work: Awaitable[T]) -> T:
    """Return the result of `work`; cancel it and raise ClientGone if the client leaves first."""
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
