"""FastAPI as most people would write it: an endpoint that decodes and then loops over the detections.

Uvicorn with uvloop and httptools. The endpoint is a plain function, so FastAPI runs it in its threads; `callers` says
how many of them. With `engines` over 1 as many uvicorn workers run, each with an engine of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import anyio.to_thread
import uvicorn
from fastapi import Body, FastAPI, Response

from benchmarks.peers.serving import MSGPACK, READY, ROUTE, Decoder, Poses, answer, from_environment


def build() -> FastAPI:
    """The application of one uvicorn worker, its engine loaded."""
    setup = from_environment()
    decoder, poses = Decoder(setup), Poses(setup)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = setup.callers
        yield

    app = FastAPI(lifespan=lifespan)

    @app.get(READY)
    async def ready() -> Response:
        return Response()

    @app.post(ROUTE)
    def pose_estimation(body: Annotated[bytes, Body()]) -> Response:
        rows = poses.one_by_one(decoder.decode(body))
        return Response(answer(rows, setup.engine), media_type=MSGPACK)

    return app


def main() -> None:
    setup = from_environment()
    uvicorn.run(
        "benchmarks.peers.fastapi_loop:build",
        factory=True,
        port=setup.port,
        workers=setup.engines,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
