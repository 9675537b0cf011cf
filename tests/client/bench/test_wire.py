"""The load generator's HTTP client against a tiny real server whose connections a test controls."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from pem.bench.wire import Address, Answer, Connection, NoAnswer, Pool

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def read_request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """Read a request: (first line, body)."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    (length,) = [line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length")]
    return head.split("\r\n")[0], await reader.readexactly(int(length))


@asynccontextmanager
async def serving(talk: Talk) -> AsyncIterator[Address]:
    """Run a server that hands each connection to `talk` and closes it after that."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield Address.of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


def saying(*answers: bytes) -> Talk:
    """One answer for each request of a connection, then the end."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await read_request(reader)
            writer.write(answer)
            await writer.drain()

    return talk


def ask(*answers: bytes, times: int = 1, timeout_s: float = 5.0) -> tuple[list[Answer], Connection]:
    """Send `times` requests over one connection; return the answers and the connection."""

    async def run() -> tuple[list[Answer], Connection]:
        async with serving(saying(*answers)) as address:
            connection = Connection(address, timeout_s)
            try:
                return [await connection.ask(address.head("GET", "/", 0, {})) for _ in range(times)], connection
            finally:
                connection.close()

    return asyncio.run(run())


def trouble(*answers: bytes, timeout_s: float = 5.0) -> str:
    with pytest.raises(NoAnswer) as caught:
        ask(*answers, timeout_s=timeout_s)
    return caught.value.kind


def test_a_connection_is_kept_for_the_next_request():
    answers, connection = ask(OK, OK, OK, times=3)
    assert [answer.body for answer in answers] == [b"ok"] * 3
    assert connection.counts.connections == 1
    assert connection.counts.received_bytes == 3 * len(OK)


def test_method_path_headers_and_body_arrive():
    heard: list[tuple[str, bytes]] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await read_request(reader))
        writer.write(OK)

    async def run() -> None:
        async with serving(talk) as address:
            body = bytes(range(256)) * 4000  # more than the sockets' buffers take at once
            connection = Connection(address, 5.0)
            await connection.ask(address.head("POST", "/pose", len(body), {"X-One": "1"}), body)
            connection.close()
            assert heard == [("POST /pose HTTP/1.1", body)]
            assert connection.counts.sent_bytes > len(body)

    asyncio.run(run())


def test_an_answer_in_chunks_is_put_together():
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    answers, connection = ask(head + b"4;x=1\r\npose\r\nA\r\n0123456789\r\n0\r\nX-After: 1\r\n\r\n", OK, times=2)
    assert [answer.body for answer in answers] == [b"pose0123456789", b"ok"]
    assert connection.counts.connections == 1


def test_an_answer_without_a_length_ends_with_its_connection():
    answers, connection = ask(b"HTTP/1.1 200 OK\r\n\r\nall of it", times=2)
    assert [answer.body for answer in answers] == [b"all of it"] * 2
    assert connection.counts.connections == 2


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nConnection: close", b"HTTP/1.0 200 OK"])
def test_a_connection_that_the_server_closes_is_replaced(head):
    answers, connection = ask(head + b"\r\nContent-Length: 2\r\n\r\nok", times=3)
    assert len(answers) == 3
    assert connection.counts.connections == 3


def test_a_kept_connection_that_was_closed_silently_is_replaced_once():
    answers, connection = ask(OK, times=3)  # the server says nothing of closing, and closes
    assert len(answers) == 3
    assert connection.counts.connections == 3


def test_what_comes_before_the_answer_is_passed_over():
    answers, _ = ask(b"HTTP/1.1 100 Continue\r\n\r\n" + OK)
    assert (answers[0].status, answers[0].body) == (200, b"ok")


def test_retry_after_is_understood_in_seconds_alone():
    head = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\nRetry-After: "
    answers, _ = ask(head + b"3\r\n\r\n", head + b"Sat, 21 Nov 2026 10:00:00 GMT\r\n\r\n", times=2)
    assert [answer.retry_after_s for answer in answers] == [3.0, None]


def test_an_answer_may_come_before_the_body_was_taken():
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        await reader.read(1 << 20)

    async def run() -> Answer:
        async with serving(talk) as address:
            connection = Connection(address, 5.0)
            try:
                return await connection.ask(address.head("POST", "/", 1 << 19, {}), b"x" * (1 << 19))
            finally:
                connection.close()

    assert asyncio.run(run()).status == 429


def test_silence_is_a_timeout():
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await reader.read()

    async def run() -> None:
        async with serving(talk) as address:
            with pytest.raises(NoAnswer, match=r"no answer within 0\.1 s") as caught:
                await Connection(address, 0.1).ask(address.head("GET", "/", 0, {}))
            assert caught.value.kind == "timeout"

    asyncio.run(run())


def test_an_answer_that_ends_early_is_no_answer():
    assert trouble(b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\nhalf") == "closed"
    assert trouble(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nhalf") == "closed"
    assert trouble(b"") == "closed"
    assert trouble(b"HTTP/1.1 20") == "broken"


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"\x00" * 100_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
    ],
)
def test_garbage_is_no_answer(garbage):
    assert trouble(garbage) == "broken"


def test_a_port_where_nobody_listens_refuses():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = Address.of(f"http://127.0.0.1:{probe.getsockname()[1]}")
        with pytest.raises(NoAnswer, match="no connection to") as caught:
            asyncio.run(Connection(address, 5.0).ask(address.head("GET", "/", 0, {})))
    assert caught.value.kind == "refused"


def test_a_pool_opens_as_many_connections_as_are_needed_at_a_time():
    gate = asyncio.Event()
    waiting = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal waiting
        while True:
            await read_request(reader)
            waiting += 1
            if waiting == 5:
                gate.set()
            await gate.wait()
            writer.write(OK)

    async def run() -> None:
        async with serving(talk) as address:
            pool = Pool(address, 5.0)
            head = address.head("GET", "/", 0, {})
            answers = await asyncio.gather(*(pool.ask(head) for _ in range(5)))
            answers += [await pool.ask(head) for _ in range(5)]
            assert [answer.status for answer in answers] == [200] * 10
            assert pool.counts.connections == 5
            pool.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "url, why",
    [("https://cell:8003", "plain http"), ("cell:8003", "no http address"), ("http://", "no http address")],
)
def test_what_this_client_cannot_reach_is_said(url, why):
    with pytest.raises(ValueError, match=why):
        Address.of(url)


def test_an_address_may_have_a_path_before_the_routes():
    head = Address.of("http://[::1]:80/cell/7/").head("GET", "/livez", 0, {}).decode()
    assert head.startswith("GET /cell/7/livez HTTP/1.1\r\nHost: [::1]:80\r\n")
