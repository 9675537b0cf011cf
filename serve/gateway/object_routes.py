"""The routes of the CAD store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

from pem import contract
from serve import reading
from serve.errors import ApiError
from serve.gateway.exchange import FORM, Answer, Call
from serve.gateway.pose_routes import unless_gone
from serve.gateway.service import Service
from serve.reading import decode


async def add_object(service: Service, call: Call) -> Answer:
    """`POST /api/v1/objects`"""
    service.check_taking()
    limits, objects = service.settings.limits, service.objects
    if reading.media_type(call.headers)[0] != FORM:
        raise ApiError("unsupported_media_type", f"send {FORM} with the mesh as the part `file`")
    wait_s = _seconds(call.query.get("wait"))
    staged = await asyncio.to_thread(objects.ingest.stage)
    registering = False
    with service.counted():
        try:
            form = await reading.read_form(
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
            request = decode(form.values.get("request") or b"{}", "json", contract.ObjectRequest)
            registering = True  # the registration now owns the folder, and goes on if the client leaves
            work = asyncio.ensure_future(objects.register(staged, form.file_names.get("file", ""), request))
            work.add_done_callback(lambda done: done.cancelled() or done.exception())
            return await unless_gone(call, _registered(service, call, asyncio.shield(work), wait_s))
        finally:
            if not registering:
                objects.ingest.discard(staged)


async def _registered(
    service: Service, call: Call, work: Awaitable[tuple[contract.ObjectAnswer, bool]], wait_s: float
) -> Answer:
    answer, created = await work
    end = time.monotonic() + wait_s
    while answer.status == "onboarding" and not service.draining and (left := end - time.monotonic()) > 0:
        going_on = await service.objects.onboarding.wait(answer.object_id, min(left, 0.25))
        answer = service.objects.get(answer.object_id)
        if not going_on:  # the onboarding ended without a model and without an error of the CAD: stop waiting
            break
    return call.answer(answer, 201 if created else 200, {"Location": f"/api/v1/objects/{answer.object_id}"})


async def list_objects(service: Service, call: Call) -> Answer:
    """`GET /api/v1/objects`"""
    return call.answer(contract.ObjectList(objects=service.objects.listing()))


async def get_object(service: Service, call: Call) -> Answer:
    """`GET /api/v1/objects/{id}`"""
    return call.answer(service.objects.get(call.name))


async def delete_object(service: Service, call: Call) -> Answer:
    """`DELETE /api/v1/objects/{id}`"""
    service.objects.remove(call.name)
    return Answer(204)


def _seconds(text: str | None) -> float:
    """Read `?wait=SECONDS`: 0 to 600, 0 if absent."""
    if text is None:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 600:
        raise ApiError("invalid", "wait must be a number of seconds between 0 and 600", field="wait")
    return value
