"""Checks against real servers on the loopback, well-behaved and otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from farshore.config import Check, Service
from farshore.smm.checks import Observation, make_check
from farshore.smm.checks.http import MAX_HEADER

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(talk: Talk) -> AsyncIterator[int]:
    open_writers: list[asyncio.StreamWriter] = []

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_writers.append(writer)
        with contextlib.suppress(OSError):
            await talk(reader, writer)

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in open_writers:
            writer.transport.abort()


def says(answer: bytes, seen: list[bytes] | None = None) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        if seen is not None:
            seen.append(request)
        writer.write(answer)
        await writer.drain()
        writer.close()

    return talk


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"H")
        await writer.drain()
        await asyncio.sleep(0.02)


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nX: " + b"x" * (2 * MAX_HEADER))
    await writer.drain()
    await asyncio.sleep(30)


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def probe(port: int, kind: str = "http", **options: object) -> Observation:
    check = Check(kind=kind, **{"timeout": 0.3, **options})  # type: ignore[arg-type]
    return await make_check("web", "local", "127.0.0.1", Service(80, backend_port=port, check=check)).probe()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize(
    ("talk", "options", "ok", "detail"),
    [
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"), {}, True, "HTTP 200"),
        (says(b"HTTP/1.0 302 Found\r\n\r\n"), {}, True, "HTTP 302"),
        (says(b"HTTP/1.1 500 Internal Server Error\r\n\r\n"), {}, False, "HTTP 500"),
        (says(b"HTTP/1.1 401 Unauthorized\r\n\r\n"), {"statuses": (200, 401)}, True, "HTTP 401"),
        (says(b"HTTP/1.1 204 No Content\r\n\r\n"), {"statuses": (200, 401)}, False, "HTTP 204"),
        (says(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), {}, False, "not HTTP"),
        (says(b"\x00\xff" * 9), {}, False, "not HTTP"),
        (says(b"HTTP/1.1 abc\r\n\r\n"), {}, False, "not HTTP"),
        (says(b"HTTP/1.1 200 OK\r\nX: y"), {}, False, "within the header"),
        (hang_up, {}, False, ""),
        (hang, {}, False, "no answer within 0.3 s"),
        (drip, {}, False, "no answer within 0.3 s"),
        (flood, {}, False, f"over {MAX_HEADER} bytes"),
    ],
)
async def test_http(talk: Talk, options: dict[str, object], ok: bool, detail: str) -> None:
    async with serving(talk) as port:
        observation = await probe(port, **options)
    assert (observation.ok, observation.group, observation.service) == (ok, "web", "80/tcp")
    assert detail in observation.detail and observation.detail


@pytest.mark.parametrize(("host", "line"), [("www.example.org", b"www.example.org"), ("", b"127.0.0.1:%d")])
async def test_the_request_names_path_and_host(host: str, line: bytes) -> None:
    seen: list[bytes] = []
    async with serving(says(b"HTTP/1.1 200 OK\r\n\r\n", seen)) as port:
        await probe(port, path="/health?deep=1", host=host)
    assert seen[0].startswith(b"GET /health?deep=1 HTTP/1.1\r\n")
    assert b"\r\nHost: " + (line % port if b"%" in line else line) + b"\r\n" in seen[0]
    assert b"\r\nConnection: close\r\n" in seen[0]


async def test_tcp_is_content_with_a_connection() -> None:
    async with serving(hang) as port:
        observation = await probe(port, "tcp")
    assert observation.ok


@pytest.mark.parametrize("kind", ["tcp", "http"])
async def test_a_closed_port_is_refused(kind: str) -> None:
    observation = await probe(free_port(), kind)
    assert not observation.ok and "refused" in observation.detail.lower()


@pytest.mark.parametrize("kind", ["tcp", "http"])
async def test_a_server_that_accepts_nothing_is_not_waited_for(kind: str) -> None:
    # A listener with a full backlog drops what comes: the connection attempt hangs.
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        observation = await probe(listener.getsockname()[1], kind)
    assert not observation.ok and "no answer within" in observation.detail
