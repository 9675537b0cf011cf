"""BentoML, divided as its documentation suggests: one service decodes, one has the engine and adaptive batching.

`decoders` processes of the first answer HTTP (through a mounted FastAPI application, which takes the body as it is) and
send each detection to the second, whose `engines` processes have a batchable method. BentoML decides by itself how long
a batch is gathered; a batch has at most `batch` detections. The two talk over a Unix socket, in BentoML's own format.

The first service's client of the second is renewed after `runner_connection.max_requests` calls, 100 by default.
BentoML 1.4.39 then closes the old one with calls still open, and each of those ends in a 500. Here it is never renewed.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile

import bentoml
import msgspec
from fastapi import FastAPI, Request, Response

from benchmarks.peers.serving import MSGPACK, ROUTE, Decoder, Poses, answer, from_environment
from pem.contract import Row
from workers.messages import Cut

_LONGEST_MS = 60_000  # BentoML refuses requests that it expects to take longer
_OPEN = 256  # requests at a time
_NEVER = {"max_requests": 1_000_000_000, "max_age": 1e9}  # renewal of the connection between the services

setup = from_environment()
http = FastAPI()


@bentoml.service(workers=setup.engines, traffic={"timeout": 120, "max_concurrency": _OPEN}, runner_connection=_NEVER)
class Engine:
    """The engine. A batch holds detections of whichever requests are waiting."""

    def __init__(self) -> None:
        self._poses = Poses(setup)

    @bentoml.api(batchable=True, max_batch_size=setup.batch, max_latency_ms=_LONGEST_MS)
    def rows(self, cuts: list[bytes]) -> list[bytes]:
        """Return one encoded row for each encoded detection."""
        found = self._poses.together([msgspec.msgpack.decode(one, type=Cut) for one in cuts])
        return [msgspec.msgpack.encode(rows) for rows in found]


@bentoml.service(workers=setup.decoders, traffic={"timeout": 120, "max_concurrency": _OPEN})
@bentoml.asgi_app(http)
class PoseEstimation:
    """The service that clients call."""

    engine = bentoml.depends(Engine)

    def __init__(self) -> None:
        self._decoder = Decoder(setup)

    @http.post(ROUTE)
    async def pose_estimation(self, request: Request) -> Response:
        """Decode here, estimate in the other service."""
        whole = await asyncio.to_thread(self._decoder.decode, await request.body())
        alone = [msgspec.msgpack.encode(msgspec.structs.replace(whole, crops=[crop])) for crop in whole.crops]
        encoded = await self.engine.to_async.rows(alone)
        rows = [row for one in encoded for row in msgspec.msgpack.decode(one, type=list[Row])]
        return Response(answer(rows, setup.engine), media_type=MSGPACK)


def main() -> None:
    """Replace this process by BentoML's own command."""
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    os.environ["BENTOML_CONFIG_OPTIONS"] = "api_server.logging.access.enabled=false"
    os.environ["BENTOML_HOME"] = tempfile.mkdtemp(dir=setup.ready_dir)
    words = ["serve", "benchmarks.peers.bentoml_peer:PoseEstimation", "--host", "127.0.0.1", "--port", str(setup.port)]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", *words, "--timeout-keep-alive", "120"])


if __name__ == "__main__":
    main()
