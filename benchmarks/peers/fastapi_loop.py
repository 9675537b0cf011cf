"""FastAPI without batches: an endpoint that decodes and then loops over the detections.

Uvicorn with uvloop and httptools. The endpoint is a plain function, which FastAPI runs in its threads. The number of
threads, `callers`, makes it stand for three ways to serve:

- `fastapi-loop`, one: one request at a time on the one model, decoding included, as inference code that guards its
  model with a lock, for a GPU or because the model is not safe to call twice. FastAPI does not do so by itself.
- `fastapi-threads`, forty, FastAPI's own number: nothing is guarded, and all requests call the model at once.
- `fastapi-processes`, one in each of `engines` uvicorn workers: a model for each, and the kernel distributes
  connections.
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
    """Build the application of one uvicorn worker, with its engine loaded."""
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
