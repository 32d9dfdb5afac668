"""The server on real sockets: nobody holds one by being slow, and refusals are problems."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from runtime.application import create_app
from runtime.http import ANY_KEY, Resource, get, json_response, post, read_bytes
from runtime.server import Server, ServerLimits

PATIENCE_S = 120
"""A deadline of a second is met within it on any machine; without one the test fails."""
LARGE = 64 * 1_048_576


class Echo(Resource):
    """What a server needs to be tried on."""

    @post("/v1/echo", roles=ANY_KEY)
    async def echo(self, request: Request) -> Response:
        """Answer once the body is there."""
        return json_response({"bytes": len(await read_bytes(request))})

    @post("/v1/deaf", roles=ANY_KEY)
    async def deaf(self, _request: Request) -> Response:
        """Answer without a look at the body."""
        return json_response({})

    @get("/v1/large", roles=ANY_KEY)
    async def large(self, _request: Request) -> Response:
        """Answer with more than any socket takes at once."""
        return Response(b"x" * LARGE)


@contextlib.asynccontextmanager
async def serving(**limits: int) -> AsyncIterator[tuple[Server, int]]:
    """Run a server with these limits on a free port."""

    async def ready() -> None:
        """Be ready."""

    app = create_app("echo", "0", [Echo()], ready=ready)
    server = Server(app, "127.0.0.1", 0, limits=ServerLimits(**limits))
    running = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await running


async def until(holds: Callable[[], bool]) -> None:
    """Wait for something that the server does by itself."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - uvicorn tells nobody.
            await asyncio.sleep(0.01)


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    """Read one answer until the connection ends."""
    raw = await asyncio.wait_for(reader.read(), PATIENCE_S)
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, json.loads(body)


@pytest.mark.parametrize(
    "sent", [b"", b"GET /v1", b"GET / HTTP/1.1\r\nhost: a\r\nx-a: ", b"\r\n", b"\r\n\r\n"]
)
async def test_a_head_that_does_not_come_ends_the_connection(sent: bytes) -> None:
    """408 and closed, whether nothing came, or half a line, or half a head."""
    async with serving(head_s=1) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        status, headers, problem = await answer_of(reader)
        # A blank line is no request: some parsers pass over it, others refuse it at once.
        assert (status, problem["code"]) in {(408, "request-timeout"), (400, "bad-request")}
        assert "close" == headers["connection"]
        assert "application/problem+json" == headers["content-type"]
        writer.close()


@pytest.mark.defect("F67")
@pytest.mark.parametrize(
    ("begun", "dripped"),
    [
        (b"GET / HTTP/1.1\r\nx-a: ", b"a"),
        (b"POST /v1/echo HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n", b"a"),
        (b"POST /v1/echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
        (b"POST /v1/deaf HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n", b"a"),
    ],
)
async def test_a_drip_does_not_move_the_deadline(begun: bytes, dripped: bytes) -> None:
    """A byte now and then ends like silence, also behind an answer that needed no body."""
    async with serving(head_s=1, body_s=1) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(begun)
        await until(lambda: len(server.server_state.connections) == 1)
        async with asyncio.timeout(PATIENCE_S):
            while server.server_state.connections:
                writer.write(dripped)
                with contextlib.suppress(TimeoutError, ConnectionError):
                    await asyncio.wait_for(reader.read(4_096), 0.1)
                await asyncio.sleep(0.01)
        assert set() == server.server_state.connections
        writer.close()


@pytest.mark.defect("F67")
async def test_a_body_that_does_not_come_is_a_timeout() -> None:
    """408 to whoever waits for an answer, and no defect of ours is noted."""
    async with serving(body_s=1) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/echo HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nabc")
        status, headers, problem = await answer_of(reader)
        assert (408, "request-timeout", True) == (status, problem["code"], problem["retryable"])
        assert "1" == headers["retry-after"]
        writer.close()


@pytest.mark.parametrize(
    ("chunks", "then"), [(10_000, b'{"alive":true}'), (12_000, b"")], ids=["small", "large"]
)
async def test_what_is_left_of_an_answered_body_is_not_read_for_ever(
    chunks: int, then: bytes
) -> None:
    """Six bytes to a chunk: within 64 KiB the next request is served, beyond the connection ends.

    It ends behind the whole answer, and nothing of the rest is taken apart.
    """
    async with serving() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/deaf HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n{}")
        rest = b"1\r\na\r\n" * chunks + b"0\r\n\r\n"
        writer.write(rest + b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        raw = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert then == raw.partition(b"\r\n\r\n")[2]
        writer.close()


async def test_an_idle_connection_is_closed_and_a_busy_one_is_not() -> None:
    """Several requests on one connection, then silence: closed without a word."""
    async with serving(idle_s=1, head_s=1, body_s=1) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            writer.write(b"POST /v1/echo HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc")
            assert b"200" in await reader.readline()
            await reader.readuntil(b'{"bytes":3}')
        assert b"" == await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()


async def test_an_answer_that_nobody_takes_is_given_up() -> None:
    """64 MiB for a client that does not read: the socket is free again."""
    async with serving(answer_s=1) as (server, port):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /v1/large HTTP/1.1\r\nhost: a\r\n\r\n")
            await until(lambda: len(server.server_state.connections) == 1)
            await until(lambda: len(server.server_state.connections) == 0)


async def test_connections_beyond_the_bound_are_refused_and_those_within_work() -> None:
    """503 with Retry-After for one too many; when a place is free it is taken."""
    async with serving(connections=2) as (server, port):
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        status, headers, problem = await answer_of(reader)
        assert (503, "unavailable") == (status, problem["code"])
        assert "1" == headers["retry-after"]
        writer.close()
        held[0][1].close()
        await until(lambda: len(server.server_state.connections) == 1)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        status, _, alive = await answer_of(reader)
        assert (200, {"alive": True}) == (status, alive)
        for _, other in (*held, (reader, writer)):
            other.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00" * 100 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x-a: b\r\n" * 20_000,
        b"GET /" + b"a" * 1_048_576,
        b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: " + b"9" * 1_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: \xb2\r\n\r\n",
        b"POST /v1/echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_no_http_is_refused_with_a_problem(sent: bytes) -> None:
    """Binary, a head without an end, a length that is none: 4xx in the one form of all errors."""
    async with serving(head_s=5) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        status, headers, problem = await answer_of(reader)
        assert status in {400, 413}
        assert "application/problem+json" == headers["content-type"]
        assert status == problem["status"]
        writer.close()
