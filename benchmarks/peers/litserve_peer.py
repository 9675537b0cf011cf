"""LitServe with its batching: decode_request, batch, predict, unbatch, encode_response.

LitServe batches whole requests and decodes them in the process that holds the engine; `engines` is its
`workers_per_device`. The body's type makes its FastAPI hand over the bytes as they are; answers from workers come over
ZeroMQ (`fast_queue`).
"""

from typing import Annotated  # LitServe reads the annotations below: none of them may be text

import litserve
from fastapi import Body, Response
from litserve.utils import generate_random_zmq_address

from benchmarks.peers.serving import MSGPACK, READY, ROUTE, Decoder, Poses, Setup, answer, from_environment
from pem.contract import Row
from workers.messages import Cut

Binary = Annotated[bytes, Body()]


class PoseEstimation(litserve.LitAPI):  # type: ignore[misc]
    """The stages of a worker."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(max_batch_size=setup.batch, batch_timeout=setup.wait_ms / 1000, api_path=ROUTE)

    def setup(self, device: str) -> None:
        """Load the engine, once in each worker."""
        setup = from_environment()
        self._decoder, self._poses, self._engine = Decoder(setup), Poses(setup), setup.engine

    def decode_request(self, request: Binary) -> Cut:
        """Decode one body."""
        return self._decoder.decode(request)

    def batch(self, inputs: list[Cut]) -> list[Cut]:
        """Return the inputs as a list: crops differ in size."""
        return inputs

    def predict(self, x: list[Cut]) -> list[list[Row]]:
        """Run one pass over all detections."""
        return self._poses.together(x)

    def unbatch(self, output: list[list[Row]]) -> list[list[Row]]:
        """Return the output, which is a list already."""
        return output

    def encode_response(self, output: list[Row]) -> Response:
        """Encode one answer."""
        return Response(answer(output, self._engine), media_type=MSGPACK)


def main() -> None:
    setup = from_environment()
    generate_random_zmq_address.__defaults__ = (setup.ready_dir,)  # sockets in this folder, not /tmp: removed with it
    server = litserve.LitServer(
        PoseEstimation(setup),
        accelerator="cuda" if setup.device.startswith("cuda") else "cpu",
        devices=1,
        workers_per_device=setup.engines,
        timeout=False,
        healthcheck_path=READY,
        fast_queue=True,
    )
    server.run(
        host="127.0.0.1",
        port=setup.port,
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        loop="uvloop",
        http="httptools",
        access_log=False,
    )


if __name__ == "__main__":
    main()
