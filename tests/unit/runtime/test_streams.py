"""Lists that are sent as they are made: to clients that fail, go away, or do not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import pytest
from starlette.requests import Request

from runtime.http import Problem
from runtime.streams import CSV, LINES, MAX_STREAMS, Streams, accepted_form

if TYPE_CHECKING:
    from starlette.types import Message

SCOPE: dict[str, Any] = {"type": "http"}


class Client:
    """The other end of a connection: what it has got, and whether it is there."""

    def __init__(self) -> None:
        """It is there, and reads."""
        self.got: list[Message] = []
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()

    async def receive(self) -> Message:
        """Say nothing until it goes away."""
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take a message, once it reads."""
        await self.reads.wait()
        self.got.append(message)

    @property
    def body(self) -> bytes:
        """What it has got."""
        return b"".join(message.get("body", b"") for message in self.got)


class Pieces:
    """A list of which every piece is counted as it is made."""

    def __init__(self, count: int, *, fails_at: int = -1) -> None:
        """Make so many; fail instead of one."""
        self.made = 0
        self.closed = False
        self._count, self._fails_at = count, fails_at

    async def all(self) -> AsyncGenerator[bytes, None]:
        """Make them."""
        try:
            for number in range(self._count):
                if number == self._fails_at:
                    raise LookupError("the database is away")
                self.made += 1
                yield b"%d\n" % number
                await asyncio.sleep(0)
        finally:
            self.closed = True


async def test_a_list_is_sent_whole_in_pieces() -> None:
    """Without a length; and an empty one is an answer, too."""
    for count in (0, 3):
        client, pieces = Client(), Pieces(count)
        await Streams().response(pieces.all(), CSV, {"x": "y"})(SCOPE, client.receive, client.send)
        assert b"".join(b"%d\n" % number for number in range(count)) == client.body
        names = [name for name, _ in client.got[0]["headers"]]
        assert (b"x" in names, b"content-length" in names) == (True, False)
        assert (False, True) == (client.got[-1]["more_body"], pieces.closed)


async def test_what_fails_before_the_first_piece_can_still_be_answered() -> None:
    """Nothing is sent; a later failure breaks the connection before the end is said."""
    client = Client()
    with pytest.raises(LookupError):
        await Streams().response(Pieces(3, fails_at=0).all(), CSV, {})(
            SCOPE, client.receive, client.send
        )
    assert [] == client.got
    with pytest.raises(LookupError):
        await Streams().response(Pieces(3, fails_at=2).all(), CSV, {})(
            SCOPE, client.receive, client.send
        )
    assert b"0\n1\n" == client.body
    assert client.got[-1]["more_body"]


async def test_nothing_more_is_made_for_a_client_that_has_gone() -> None:
    """What made it is closed, whatever it holds."""
    client, pieces = Client(), Pieces(1_000_000)
    client.gone.set()
    await Streams().response(pieces.all(), CSV, {})(SCOPE, client.receive, client.send)
    assert (True, True) == (pieces.made < 10, pieces.closed)


async def test_a_client_that_does_not_read_loses_the_connection() -> None:
    """What makes the list is closed after the time a piece may take."""
    client, pieces = Client(), Pieces(5)
    response = Streams(take_s=0).response(pieces.all(), CSV, {})

    async def send(message: Message) -> None:
        await client.send(message)
        client.reads.clear()

    with pytest.raises(TimeoutError):
        await response(SCOPE, client.receive, send)
    assert ([], True) == (
        [m for m in client.got if m["type"] == "http.response.body"],
        pieces.closed,
    )


async def test_a_list_too_many_is_refused_until_another_has_ended() -> None:
    """With a problem, before anything of it is made."""
    streams, client = Streams(), Client()
    client.reads.clear()
    running = [
        asyncio.create_task(
            streams.response(Pieces(2).all(), CSV, {})(SCOPE, client.receive, client.send)
        )
        for _ in range(MAX_STREAMS)
    ]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    late = Pieces(1)
    with pytest.raises(Problem) as refused:
        await streams.response(late.all(), CSV, {})(SCOPE, client.receive, client.send)
    assert ("too-many-requests", 0) == (refused.value.kind.code, late.made)
    client.reads.set()
    await asyncio.gather(*running)
    await streams.response(late.all(), CSV, {})(SCOPE, client.receive, client.send)
    assert 1 == late.made


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", None),
        ("*/*", None),
        ("application/json", None),
        ("text/csv", CSV),
        ("Text/CSV; header=present, */*;q=0.1", CSV),
        ("application/x-ndjson", LINES),
        ("application/x-ndjson, text/csv", CSV),
    ],
)
def test_a_form_is_asked_for_by_name(accept: str, expected: str | None) -> None:
    """Whoever takes anything gets JSON."""
    request = Request({"type": "http", "headers": [(b"accept", accept.encode())]})
    assert expected == accepted_form(request, (CSV, LINES))
