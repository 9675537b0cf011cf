"""A small HTTP/1.1 client on asyncio's streams, for a load generator that shares its cores with the server.

A general client costs milliseconds of CPU for a request. This one costs a fraction of that, since it knows only what a
pose server needs: requests with a ready body, answers with a length, in chunks, or up to the connection's end, over
connections that are kept. Plain http; no redirects, cookies or compression.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final
from urllib.parse import urlsplit

_HEAD_LIMIT: Final = 64 * 1024  # limit of an answer's head, or of one line between chunks
_BODY_LIMIT: Final = 512 * 2**20


class Timeout:
    """`async with Timeout(seconds):` cancels what the block waits for after that time, and raises TimeoutError.

    Python 3.11 has it as `asyncio.timeout`; 3.10 has only `wait_for`, which wraps each request in a task of its own.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._over = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[object] = task
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._over and kind is asyncio.CancelledError:
            if (uncancel := getattr(self._task, "uncancel", None)) is not None and uncancel() > 0:
                return  # cancelled by somebody else, too: a time-out must not swallow that
            raise TimeoutError from None

    def _end(self) -> None:
        self._over = True
        self._task.cancel()


class NoAnswer(Exception):
    """A request without a usable answer; `kind` is one word for tables."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind  # refused | closed | timeout | broken


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def retry_after_s(self) -> float | None:
        """Return Retry-After in seconds; None if it is missing or unusable."""
        text = self.headers.get("retry-after", "").strip()
        return float(text) if text.isascii() and text.isdigit() else None


@dataclass(frozen=True, kw_only=True)
class Address:
    """The address of a server."""

    host: str
    port: int
    prefix: str = ""  # of every path, without a trailing slash

    @classmethod
    def of(cls, url: str) -> Address:
        """Parse `http://host:port`; ValueError for an address that this client cannot reach."""
        parts = urlsplit(url)
        if parts.scheme == "https":
            raise ValueError(f"{url}: the load generator speaks plain http, so that encryption is not what it measures")
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url!r} is no http address; one looks like http://127.0.0.1:8003")
        return cls(host=parts.hostname, port=parts.port or 80, prefix=parts.path.rstrip("/"))

    def head(self, method: str, path: str, length: int, headers: Mapping[str, str]) -> bytes:
        """Return a request's head, with its last empty line."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {host}:{self.port}", f"Content-Length: {length}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


@dataclass
class Counts:
    """Traffic counters of all connections that share them."""

    sent_bytes: int = 0
    received_bytes: int = 0
    connections: int = 0  # number of connections opened


@dataclass
class Connection:
    """One kept connection, for one request at a time."""

    address: Address
    timeout_s: float
    counts: Counts = field(default_factory=Counts)
    _reader: asyncio.StreamReader | None = None
    _writer: asyncio.StreamWriter | None = None

    async def ask(self, head: bytes, body: bytes = b"") -> Answer:
        """Send a request made by `Address.head` and read its answer; raise NoAnswer if there is none.

        A kept connection that the server closed in the meantime is replaced once.
        """
        try:
            async with Timeout(self.timeout_s):
                return await self._ask(head, body)
        except TimeoutError:
            self.close()
            raise NoAnswer("timeout", f"no answer within {self.timeout_s:g} s") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._writer is not None:
            with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the event loop is already closed
                self._writer.close()
        self._reader = self._writer = None

    async def _ask(self, head: bytes, body: bytes) -> Answer:
        while True:
            kept = self._writer is not None
            reader, writer = await self._connected()
            # Not drained: an answer may come before the body has left, and then nobody reads at the other end.
            writer.writelines((head, body))
            self.counts.sent_bytes += len(head) + len(body)
            try:
                return await self._answer(reader, without_body=head.startswith(b"HEAD "))
            except _ClosedBeforeAnswer:
                self.close()
                if not kept:
                    raise NoAnswer("closed", "the server closed the connection without an answer") from None

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._reader is None or self._writer is None:
            try:
                self._reader, self._writer = await asyncio.open_connection(
                    self.address.host, self.address.port, limit=_HEAD_LIMIT
                )
            except OSError as error:
                why = error.strerror or str(error)
                raise NoAnswer("refused", f"no connection to {self.address.host}:{self.address.port}: {why}") from None
            self.counts.connections += 1
        return self._reader, self._writer

    async def _answer(self, reader: asyncio.StreamReader, *, without_body: bool) -> Answer:
        status, version = 100, ""
        headers: dict[str, str] = {}
        while 100 <= status < 200:  # "100 Continue" and others come before the answer
            status, version, headers = await self._head(reader)
        try:
            if without_body or status in (204, 304):
                body = b""
            elif "chunked" in headers.get("transfer-encoding", "").lower():
                body = await _chunks(reader)
            elif "content-length" in headers:
                body = await reader.readexactly(_length(headers["content-length"], 10))
            else:
                body = await _until_closed(reader)
                headers.setdefault("connection", "close")
        except asyncio.IncompleteReadError as error:
            raise NoAnswer("closed", f"the answer ended early: {error}") from None
        except (asyncio.LimitOverrunError, ValueError) as error:  # readline reports its limit as ValueError
            raise NoAnswer("broken", f"the answer's body is not HTTP: {error}") from None
        except OSError as error:
            raise NoAnswer("closed", f"the connection broke during the answer: {error}") from None
        self.counts.received_bytes += len(body)
        kept = headers.get("connection", "keep-alive" if version == "HTTP/1.1" else "close").lower()
        if "close" in kept:
            self.close()
        return Answer(status=status, headers=headers, body=body)

    async def _head(self, reader: asyncio.StreamReader) -> tuple[int, str, dict[str, str]]:
        """Return (status, HTTP version, headers) of the next head."""
        try:
            raw = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                raise _ClosedBeforeAnswer from None
            raise NoAnswer("broken", "the answer's head is not HTTP, or ended early") from None
        except asyncio.LimitOverrunError:
            raise NoAnswer("broken", f"the answer's head is longer than {_HEAD_LIMIT} bytes, or not HTTP") from None
        except OSError:
            raise _ClosedBeforeAnswer from None
        self.counts.received_bytes += len(raw)
        first, *lines = raw[:-4].decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        code = rest[:3]
        if not version.startswith("HTTP/1.") or not (code.isascii() and code.isdigit() and len(code) == 3):
            raise NoAnswer("broken", f"the answer does not begin as HTTP does: {first[:60]!r}")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return int(code), version, headers


class Pool:
    """Connections for any number of requests at a time; a free one is reused before another is opened."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        self.counts = Counts()
        self._address = address
        self._timeout_s = timeout_s
        self._free: list[Connection] = []

    async def ask(self, head: bytes, body: bytes = b"") -> Answer:
        """Ask over a free connection, as `Connection.ask` does."""
        connection = self._free.pop() if self._free else Connection(self._address, self._timeout_s, self.counts)
        try:
            return await connection.ask(head, body)
        finally:
            self._free.append(connection)  # a failed connection is closed, and opens anew

    def close(self) -> None:
        """Close all free connections."""
        while self._free:
            self._free.pop().close()


class _ClosedBeforeAnswer(Exception):
    """Not one byte came, as on a kept connection that the server gave up."""


def _length(text: str, base: int) -> int:
    """Parse a length as HTTP writes it; ValueError if it is none, or absurdly large."""
    digits = text.strip()
    if not digits or digits[0] in "+-" or (length := int(digits, base)) > _BODY_LIMIT:
        raise ValueError(f"{text[:40]!r} is no usable length")
    return length


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        line = await reader.readuntil(b"\r\n")
        length = _length(line.split(b";")[0].decode("latin-1"), 16)
        if length == 0:
            while await reader.readuntil(b"\r\n") != b"\r\n":  # trailers
                pass
            return b"".join(pieces)
        size += length
        if size > _BODY_LIMIT:
            raise ValueError(f"more than {_BODY_LIMIT} bytes")
        pieces.append((await reader.readexactly(length + 2))[:-2])


async def _until_closed(reader: asyncio.StreamReader) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while piece := await reader.read(_HEAD_LIMIT):
        pieces.append(piece)
        size += len(piece)
        if size > _BODY_LIMIT:
            raise ValueError(f"more than {_BODY_LIMIT} bytes")
    return b"".join(pieces)
