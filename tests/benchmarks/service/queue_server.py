"""A small HTTP server that is exactly an M/D/1 queue when requests arrive as a Poisson process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from pem.bench.sample import Target


class QueueServer:
    """A small HTTP server with one worker and a fixed time per request; `broken`: it answers 500."""

    def __init__(self, served_s: float, broken: bool = False) -> None:
        self.served_s = served_s
        self.broken = broken
        self.free = 0.0
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self._talk, "127.0.0.1", 0))
        self.port: int = self.server.sockets[0].getsockname()[1]

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
                arrived = self.loop.time()
                if head.startswith(b"get"):
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                    continue
                self.free = max(self.free, arrived) + self.served_s
                waited_ms = 1e3 * (self.free - arrived - self.served_s)
                await asyncio.sleep(self.free - arrived)
                row = '{"status": "ok", "rotation": [[1,0,0],[0,1,0],[0,0,1]], "translation": [0, 0, 500]}'
                timing = f'{{"queue_ms": {waited_ms}, "pose_ms": {1e3 * self.served_s}}}'
                body = f'{{"poses": [{row}, {row}], "timing": {timing}}}'
                first = "500 Internal Server Error" if self.broken else "200 OK"
                writer.write(
                    f"HTTP/1.1 {first}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                    f"{body}".encode()
                )


@contextlib.contextmanager
def queue_server(served_s: float, broken: bool = False) -> Iterator[Target]:
    """Run the server in a separate thread."""
    one = QueueServer(served_s, broken)
    thread = threading.Thread(target=one.loop.run_forever)
    thread.start()
    try:
        yield Target(url=f"http://127.0.0.1:{one.port}")
    finally:

        async def end() -> None:
            one.server.close()
            talks = asyncio.all_tasks() - {asyncio.current_task()}
            for talk in talks:
                talk.cancel()
            await asyncio.gather(*talks, return_exceptions=True)
            await asyncio.sleep(0)  # closed connections are released in the loop's next turn

        asyncio.run_coroutine_threadsafe(end(), one.loop).result(5)
        one.loop.call_soon_threadsafe(one.loop.stop)
        thread.join(5)
        one.loop.close()
