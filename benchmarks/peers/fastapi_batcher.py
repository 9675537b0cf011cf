"""FastAPI with a batcher of its own: written by somebody who knows that several requests' detections may share a pass.

Uvicorn with uvloop and httptools. Bodies are decoded in a pool of `decoders` processes. One task takes decoded requests
from a queue, waits until there are `batch` detections or `wait_ms` have passed, and runs the engine on all of them in
a thread. The next batch gathers meanwhile.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager, suppress

import msgspec
import uvicorn
from fastapi import FastAPI, Request, Response

from benchmarks.peers.serving import MSGPACK, READY, ROUTE, Decoder, Poses, answer, from_environment
from pem.contract import Row
from workers.messages import Cut

_decoder: Decoder | None = None  # the decoder of a process in the pool


def start_decoder() -> None:
    """Initialise a process of the pool."""
    global _decoder
    _decoder = Decoder(from_environment())


def decode(body: bytes) -> bytes:
    """Decode in a process of the pool; return an encoded Cut, which is quicker to send than a pickled one."""
    assert _decoder is not None
    return msgspec.msgpack.encode(_decoder.decode(body))


class Batcher:
    """Waiting requests, and the task that brings them to the engine together."""

    def __init__(self, poses: Poses, *, batch: int, wait_s: float) -> None:
        self._poses = poses
        self._batch = batch
        self._wait_s = wait_s
        self._waiting: asyncio.Queue[tuple[Cut, asyncio.Future[list[Row]]]] = asyncio.Queue()

    async def estimate(self, one: Cut) -> list[Row]:
        """Return the rows of a request, computed together with whatever others are there."""
        found: asyncio.Future[list[Row]] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((one, found))
        return await found

    async def run(self) -> None:
        """Run batch after batch, for ever."""
        while True:
            together = await self._gather()
            try:
                every = await asyncio.to_thread(self._poses.together, [one for one, _ in together])
            except Exception as error:
                for _, found in together:
                    if not found.done():  # its client may be gone
                        found.set_exception(error)
                continue
            for (_, found), rows in zip(together, every, strict=True):
                if not found.done():
                    found.set_result(rows)

    async def _gather(self) -> list[tuple[Cut, asyncio.Future[list[Row]]]]:
        together = [await self._waiting.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s):
                while sum(len(one.crops) for one, _ in together) < self._batch:
                    together.append(await self._waiting.get())
        return together


def build() -> FastAPI:
    """Build the application, with its engine loaded."""
    setup = from_environment()
    batcher = Batcher(Poses(setup), batch=setup.batch, wait_s=setup.wait_ms / 1000)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(setup.decoders, mp_context=spawn, initializer=start_decoder)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(batcher.run())
        with pool:
            yield
        running.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.get(READY)
    async def ready() -> Response:
        return Response()

    @app.post(ROUTE)
    async def pose_estimation(request: Request) -> Response:
        body = await request.body()
        encoded = await asyncio.get_running_loop().run_in_executor(pool, decode, body)
        rows = await batcher.estimate(msgspec.msgpack.decode(encoded, type=Cut))
        return Response(answer(rows, setup.engine), media_type=MSGPACK)

    return app


def main() -> None:
    uvicorn.run(
        build(),
        port=from_environment().port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
